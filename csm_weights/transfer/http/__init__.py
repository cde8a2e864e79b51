"""One way to ask servers: TLS trust, proxies, credentials, redirects, timeouts, retries.

Every request of every command goes through `HttpClient`. It never sends a
header to another origin than the one it belongs to, never waits without a
limit, and never believes a server's lengths or redirects.

    with HttpClient(threading.Event(), print) as client:
        credentials = HubCredentials.from_environment()
        url = f"{credentials.endpoint}/api/models/sesame/csm-1b"
        response, metadata = client.get_json(url, credentials.auth)
"""
