"""One way to ask servers: TLS trust, proxies, credentials, redirects, timeouts, retries.

Promises: every request of every command goes through `HttpClient`, and so meets
the same limits and ends in the same findings. Never: sends a header to another
origin than the one it belongs to, waits without a limit, or believes a server's
lengths or redirects.

    import threading
    from csm_weights.transfer.http.auth import HubCredentials
    from csm_weights.transfer.http.client import HttpClient

    with HttpClient(threading.Event(), print) as client:
        credentials = HubCredentials.from_environment()
        url = f"{credentials.endpoint}/api/models/sesame/csm-1b"
        response, metadata = client.get_json(url, credentials.auth)
"""
