"""The four fused operations of a GPT and one rule that picks their implementation.

Each operation is a module with its equation, a plain `reference`, checks and a public function
whose last keyword is `impl`:

    "auto"       our kernels on a GPU that can run them, PyTorch's operators elsewhere; `train`
                 measures both at the run's shapes first (nanogpt.kernels.choice)
    "torch"      PyTorch's own operators
    "triton"     our fused GPU kernels
    "reference"  ten plain lines, the definition and the oracle of the tests

A named implementation never falls back: it raises RuntimeError with the reason.
"""

from nanogpt.kernels.attention import cached_attention, causal_attention
from nanogpt.kernels.cross_entropy import cross_entropy, linear_cross_entropy
from nanogpt.kernels.dispatch import IMPLEMENTATIONS, OPERATIONS, describe, unsupported
from nanogpt.kernels.ffn import gelu_ffn
from nanogpt.kernels.layer_norm import layer_norm
from nanogpt.kernels.linear import linear

__all__ = [
    "IMPLEMENTATIONS",
    "OPERATIONS",
    "cached_attention",
    "causal_attention",
    "cross_entropy",
    "describe",
    "gelu_ffn",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "unsupported",
]
