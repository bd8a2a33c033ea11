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
    from nanogpt.rewards import char_reward_fn as char_reward_fn
    from nanogpt.rewards import combine as combine
    from nanogpt.rewards import domain_term_reward as domain_term_reward
    from nanogpt.rewards import term_reward_fn as term_reward_fn
    from nanogpt.rewards import text_reward_fn as text_reward_fn

__version__ = "0.1.0"

_HOMES = {
    "GPT": "nanogpt.model",
    "GPTConfig": "nanogpt.config",
    "char_reward_fn": "nanogpt.rewards",
    "combine": "nanogpt.rewards",
    "domain_term_reward": "nanogpt.rewards",
    "load": "nanogpt.checkpoint",
    "save": "nanogpt.checkpoint",
    "term_reward_fn": "nanogpt.rewards",
    "text_reward_fn": "nanogpt.rewards",
}
__all__ = [
    "GPT",
    "GPTConfig",
    "__version__",
    "char_reward_fn",
    "combine",
    "domain_term_reward",
    "load",
    "save",
    "term_reward_fn",
    "text_reward_fn",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nanogpt' has no attribute {name!r}")
