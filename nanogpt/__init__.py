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
    from nanogpt.reward_decoding import (
        RewardAugmentedLogitsProcessor as RewardAugmentedLogitsProcessor,
    )
    from nanogpt.reward_decoding import best_of_n as best_of_n
    from nanogpt.reward_model import RewardModel as RewardModel
    from nanogpt.reward_model import fit_reward_model as fit_reward_model
    from nanogpt.rewards import TokenReward as TokenReward
    from nanogpt.rewards import char_reward_fn as char_reward_fn
    from nanogpt.rewards import combine as combine
    from nanogpt.rewards import ids_reward_fn as ids_reward_fn
    from nanogpt.rewards import term_reward_fn as term_reward_fn
    from nanogpt.rewards import text_reward_fn as text_reward_fn
    from nanogpt.text_rewards import domain_term_reward as domain_term_reward
    from nanogpt.text_rewards import repetition_penalty_reward as repetition_penalty_reward
    from nanogpt.text_rewards import soft_overlong_punishment as soft_overlong_punishment

__version__ = "0.1.0"

_HOMES = {
    "GPT": "nanogpt.model",
    "GPTConfig": "nanogpt.config",
    "RewardAugmentedLogitsProcessor": "nanogpt.reward_decoding",
    "RewardModel": "nanogpt.reward_model",
    "TokenReward": "nanogpt.rewards",
    "best_of_n": "nanogpt.reward_decoding",
    "char_reward_fn": "nanogpt.rewards",
    "combine": "nanogpt.rewards",
    "domain_term_reward": "nanogpt.text_rewards",
    "fit_reward_model": "nanogpt.reward_model",
    "ids_reward_fn": "nanogpt.rewards",
    "load": "nanogpt.checkpoint",
    "repetition_penalty_reward": "nanogpt.text_rewards",
    "save": "nanogpt.checkpoint",
    "soft_overlong_punishment": "nanogpt.text_rewards",
    "term_reward_fn": "nanogpt.rewards",
    "text_reward_fn": "nanogpt.rewards",
}
__all__ = [
    "GPT",
    "GPTConfig",
    "RewardAugmentedLogitsProcessor",
    "RewardModel",
    "TokenReward",
    "__version__",
    "best_of_n",
    "char_reward_fn",
    "combine",
    "domain_term_reward",
    "fit_reward_model",
    "ids_reward_fn",
    "load",
    "repetition_penalty_reward",
    "save",
    "soft_overlong_punishment",
    "term_reward_fn",
    "text_reward_fn",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nanogpt' has no attribute {name!r}")
