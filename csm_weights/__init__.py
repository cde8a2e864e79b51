"""Get the CSM-1B speech model onto a machine and know that it is right."""

from __future__ import annotations

import importlib
import warnings

TYPE_CHECKING = False  # typing would be taken from the current folder by python -m csm_weights
if TYPE_CHECKING:
    from csm_weights.api import Generator, Model, Segment, load_csm_1b

# torch does without NumPy, and warns of it when it is imported; nothing here needs it
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

__all__ = ["Generator", "Model", "Segment", "load_csm_1b"]


def __getattr__(name: str) -> object:
    """Return what a program imports from here; torch is loaded when it is first asked for."""
    if name in __all__:
        try:
            return getattr(importlib.import_module("csm_weights.api"), name)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            from csm_weights.config import pip_command

            message = f"csm_weights.{name} needs torch: {pip_command('torch')}"
            raise ModuleNotFoundError(message, name="torch") from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
