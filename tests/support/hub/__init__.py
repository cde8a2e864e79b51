"""A Hugging Face Hub on loopback: it answers as the real one does, and has faults by name.

    with HubServer() as hub:
        hub.add_token("hf_good")
        commit = hub.add_repo("org/model", {"model.safetensors": data}, gated=True)
        fault = hub.fault("reset", host="storage", at=100_000, times=1)
        ...                                   # HF_ENDPOINT=hub.endpoint
        assert fault.hits == 1 and len(hub.requests(host="storage")) == 2

Files in LFS are served by a storage host at another address, through signed URLs that
expire; a file in git comes from the hub itself. Only repositories of models are served.

`hub.fault(name, match="*", host=None, method=None, times=None, after=0, **options)`
switches a fault on. `match` is a glob over the path of the request, with or without its
query, or over the path of a file in its repository. `times` is how often the fault is
applied; `after` is how many requests that it matches pass first. Faults of a body apply to
GET only. Several can be active; they apply in the order of the table in `faults.py`.

`repository` has the files and accounts, `responses` the requests and responses, `faults`
the table of faults, `server` what is answered, `sockets` how it is sent.
"""

from tests.support.hub.faults import FAULTS, Fault
from tests.support.hub.repository import Content
from tests.support.hub.responses import Request, Response
from tests.support.hub.server import HubServer

__all__ = ["FAULTS", "Content", "Fault", "HubServer", "Request", "Response"]
