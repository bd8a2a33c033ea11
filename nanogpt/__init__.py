"""PersonalNanoGPT: train a GPT on your own text, and write from it.

Names are imported on first use, so that `import nanogpt` and `--help` cost no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanogpt.checkpoint import load as load
    from nanogpt.checkpoint import save as save
    from nanogpt.config import GPTConfig as GPTConfig
    from nanogpt.model import GPT as GPT

__version__ = "0.1.0"

_HOMES = {
    "GPT": "nanogpt.model",
    "GPTConfig": "nanogpt.config",
    "load": "nanogpt.checkpoint",
    "save": "nanogpt.checkpoint",
}
__all__ = ["GPT", "GPTConfig", "__version__", "load", "save"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nanogpt' has no attribute {name!r}")
