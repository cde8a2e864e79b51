"""Weight files and manifests that are wrong on purpose, named for what is wrong with them.

Each collection maps a name to the bytes of a file and to a phrase of the finding that must
refuse it. Everything is built by hand, so that the readers are not tested against their own
writer, and needs no torch.
"""

from tests.support.hostile.checkpoints import BAD_ZIPS, GOOD_PICKLE, checkpoint, good_checkpoint
from tests.support.hostile.common import UNREAD, written
from tests.support.hostile.configs import BAD_CONFIGS, BAD_INDEXES, config, config_of_layers
from tests.support.hostile.headers import BAD_SAFETENSORS, entry, good_safetensors, safetensors
from tests.support.hostile.heavy import heavy_safetensors, heavy_zips
from tests.support.hostile.legacy import BAD_LEGACY, STORAGE, legacy, listed
from tests.support.hostile.manifests import BAD_MANIFESTS, files, manifest, piece
from tests.support.hostile.opcodes import HOOKS, number, state_dict, storage, tensor, text
from tests.support.hostile.payloads import DECOYS, EXTENSION, running_files, running_pickles
from tests.support.hostile.pickles import BAD_PICKLES
from tests.support.hostile.zips import Entry, zip_of

__all__ = [
    "BAD_CONFIGS",
    "BAD_INDEXES",
    "BAD_LEGACY",
    "BAD_MANIFESTS",
    "BAD_PICKLES",
    "BAD_SAFETENSORS",
    "BAD_ZIPS",
    "DECOYS",
    "EXTENSION",
    "GOOD_PICKLE",
    "HOOKS",
    "STORAGE",
    "UNREAD",
    "Entry",
    "checkpoint",
    "config",
    "config_of_layers",
    "entry",
    "files",
    "good_checkpoint",
    "good_safetensors",
    "heavy_safetensors",
    "heavy_zips",
    "legacy",
    "listed",
    "manifest",
    "number",
    "piece",
    "running_files",
    "running_pickles",
    "safetensors",
    "state_dict",
    "storage",
    "tensor",
    "text",
    "written",
    "zip_of",
]
