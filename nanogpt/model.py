"""GPT: tokens -> logits. Pre-norm GPT-2 blocks, learned or rotary positions, tanh GELU, tied head.

Dimensions: B batch, T positions, H heads, D head width, C = H*D model width, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanogpt import metadata
from nanogpt.cache import KVCache
from nanogpt.config import GPTConfig
from nanogpt.errors import InputError
from nanogpt.kernels import (
    cached_attention,
    causal_attention,
    cross_entropy,
    gelu_ffn,
    layer_norm,
    linear,
    linear_cross_entropy,
)
from nanogpt.tokenizer import Tokenizer, tokenizer_from_dict

_STD = 0.02
QK_GAIN = 1.5
"""With qk_norm the attention's logits are scaled by QK_GAIN * D**-0.5; as kQkGain in C++."""
QK_EPS = 1e-6
ROTARY_BASE = 10_000.0


def rotation_of(config: GPTConfig) -> torch.Tensor:
    """Cosines and sines of every position, (2, block, D/2) float32 on the CPU.

    cos and sin of the angles position * 10000^(-2i/D), i = 0 … D/2 - 1, computed in float64.
    Source: Su et al. 2021, RoFormer, section 3.2.2 (arXiv:2104.09864).
    """
    width = config.n_embd // config.n_head
    pairs = torch.arange(0, width, 2, dtype=torch.float64, device="cpu")  # 2i
    positions = torch.arange(config.block_size, dtype=torch.float64, device="cpu")
    angles = torch.outer(positions, ROTARY_BASE ** (-pairs / width))  # (block, D/2)
    return torch.stack([angles.cos(), angles.sin()]).to(torch.float32)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn pairs of features by their position's angles, so that <q, k> sees distances alone.

    Feature i and feature i + D/2 are a pair: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    Args:
        x: (..., T, D), float32 or wider.
        rotation: (2, T, D/2), T rows of `rotation_of`.
    Returns: (..., T, D).
    Source: Su et al. 2021, RoFormer, equation 34 (arXiv:2104.09864), in the halves of GPT-NeoX.
    """
    cos, sin = rotation.unbind(0)  # 2 x (T, D/2)
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


def to_unit_rms(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x^2) + 1e-6) over the last dimension; float32 or wider.

    Source: Henry et al. 2020, Query-key normalization for transformers (arXiv:2010.04245).
    """
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + QK_EPS)


class Rotation(nn.Module):
    """The table of `rotation_of`: it goes to the model's device, but is no part of its state and
    keeps its precision when the model is cast."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.table: torch.Tensor
        self.register_buffer("table", rotation_of(config), persistent=False)  # (2, block, D/2)

    def _apply(self, fn: Any, recurse: bool = True) -> "Rotation":
        super()._apply(fn, recurse)
        if self.table.dtype != torch.float32:
            self.table = rotation_of(self.config).to(self.table.device)
        return self


def attention_scale(config: GPTConfig) -> float:
    """What the attention's logits are multiplied by."""
    return (QK_GAIN if config.qk_norm else 1.0) * (config.n_embd // config.n_head) ** -0.5


class LayerNorm(nn.Module):
    """Weights of one layer norm; with a residual it returns the sum too."""

    operation = "layer_norm"

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.impl = "auto"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, impl=self.impl)

    def after_adding(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return layer_norm(x, self.weight, self.bias, residual=residual, impl=self.impl)


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the past; the cache holds keys as they are compared."""

    operation = "attention"

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.qk_norm = config.n_head, config.qk_norm
        self.scale = attention_scale(config)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.impl = "auto"

    def forward(
        self, x: torch.Tensor, cache: KVCache | None, layer: int, rotation: torch.Tensor | None
    ) -> torch.Tensor:
        batch, positions, width = x.shape
        qkv = linear(x, self.c_attn.weight, self.c_attn.bias)  # (B, T, 3C)
        qkv = qkv.view(batch, positions, 3, self.n_head, width // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, H, T, D)
        q, k = self._prepared(q, rotation), self._prepared(k, rotation)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, S, D)
        how: dict[str, Any] = {"scale": self.scale, "impl": self.impl}
        if cache is not None and cache.count is not None:
            out = cached_attention(q, k, v, cache.count, **how)  # (B, H, 1, D)
        else:
            out = causal_attention(q, k, v, **how)  # (B, H, T, D)
        out = out.transpose(1, 2).reshape(batch, positions, width)  # (B, T, C)
        return linear(out, self.c_proj.weight, self.c_proj.bias)

    def _prepared(self, x: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
        """Queries or keys (B, H, T, D), normalised and then turned, where the shape says so."""
        if rotation is None and not self.qk_norm:
            return x
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = to_unit_rms(y) if self.qk_norm else y
        return (y if rotation is None else rotate(y, rotation)).to(x.dtype)


class FeedForward(nn.Module):
    """Two linear maps, four times as wide between them."""

    operation = "ffn"

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.impl = "auto"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fc, proj = self.c_fc, self.c_proj
        return gelu_ffn(x, fc.weight, fc.bias, proj.weight, proj.bias, impl=self.impl)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    Each sum is made by the norm that reads it, the last one by the next block's: a block takes and
    gives the residual stream and the branch that is still to be added to it.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config)
        self.mlp = FeedForward(config)
        self.dropout = config.dropout

    def forward(
        self,
        x: torch.Tensor,
        branch: torch.Tensor | None,
        cache: KVCache | None,
        layer: int,
        rotation: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if branch is None:
            y = self.ln_1(x)
        else:
            y, x = self.ln_1.after_adding(branch, residual=x)
        mixed = self._drop(self.attn(y, cache, layer, rotation))
        y, x = self.ln_2.after_adding(mixed, residual=x)
        return x, self._drop(self.mlp(y))

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class GPT(nn.Module):
    """A decoder-only transformer.

    Args:
        config: the shape; or give its fields by keyword, as in GPT(vocab_size=65).
    Attributes:
        config: GPTConfig.
        tokenizer: the Tokenizer of the text it was trained on, or None.
        calibration_temperature: fitted temperature, or None.
        calibration: how it was fitted (see `nanogpt.calibrate`), kept when training goes on, but
            marked "stale"; or None.
        recompute: in training keep the inputs of a block alone and compute the rest once more in
            the backward pass: less memory for a forward pass more, and the same gradients.
    Source: Radford et al. 2019, GPT-2; parameter names as in Hugging Face's and nanoGPT's.
    """

    operation = "cross_entropy"

    def __init__(self, config: GPTConfig | None = None, **shape: Any) -> None:
        super().__init__()
        if config is not None and shape:
            raise ValueError("give GPT either a GPTConfig or its fields by keyword, not both")
        self.config = config if config is not None else GPTConfig(**shape)
        self.tokenizer: Tokenizer | None = None
        self.calibration_temperature: float | None = None
        self.calibration: dict[str, Any] | None = None
        self.impl = "auto"
        self.recompute = False
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(self.config.vocab_size, self.config.n_embd)
        }
        if not self.config.rotary:
            parts["wpe"] = nn.Embedding(self.config.block_size, self.config.n_embd)
        parts["h"] = nn.ModuleList(Block(self.config) for _ in range(self.config.n_layer))
        parts["ln_f"] = LayerNorm(self.config)
        self.transformer = nn.ModuleDict(parts)
        self.rotation = Rotation(self.config) if self.config.rotary else None
        self._initialise()
        self._register_load_state_dict_pre_hook(self._before_load)

    @torch.no_grad()
    def _initialise(self) -> None:
        """GPT-2's: N(0, 0.02), residual projections divided by sqrt(2 L), biases zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                shrink = 1 / math.sqrt(2 * self.config.n_layer) if residual else 1.0
                parameter.normal_(mean=0.0, std=_STD * shrink)

    @torch.no_grad()
    def begin_quickly(self) -> None:
        """Weights for large learning rates, in place of GPT-2's: those of --recipe speed.

        Blocks begin by passing on what they are given, as residual projections are zero; the other
        matrices have a standard deviation of 0.45 / sqrt(C), embeddings of 1.13 / sqrt(C). The last
        layer norm is so small that the logit of the token itself, which stands out for as long as
        blocks add nothing, begins at 3.2 whatever the width.
        """
        width = self.config.n_embd
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.zero_()
            elif parameter.dim() == 2:
                size = 0.45 if ".h." in name else 1.13
                parameter.mul_(size / math.sqrt(width) / _STD)
        cast(LayerNorm, self.transformer["ln_f"]).weight.fill_(min(1.0, 2.83 / math.sqrt(width)))

    @property
    def token_weight(self) -> torch.Tensor:
        """(V, C): the token embedding, and the output head that is tied to it."""
        return cast(nn.Embedding, self.transformer["wte"]).weight

    def set_kernels(self, impl: str | Mapping[str, str]) -> "GPT":
        """Choose the implementation of every fused operation; see nanogpt.kernels.

        Args:
            impl: one for all, or one for each of nanogpt.kernels.OPERATIONS.
        """
        for module in self.modules():
            if isinstance(module, LayerNorm | CausalSelfAttention | FeedForward | GPT):
                module.impl = impl if isinstance(impl, str) else impl[module.operation]
        return self

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        return_logits: bool = True,
        chunk_bytes: int | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits of the next token at every position, and the mean loss where targets are given.

        Args:
            tokens: (B, T) int64, T <= block_size.
            targets: (B, T) int64, the next tokens; -100 does not count.
            return_logits: False where only the loss is wanted, so that the logits' memory can
                hold their gradient.
            chunk_bytes: without logits, most memory that they may take at a time.
        Returns: logits (B, T, V), or None; and the loss, a scalar in nats per target, or None.
        Raises: ValueError where T is longer than the context, or where neither is asked for.
        """
        hidden = self._hidden(tokens, None)  # (B, T, C)
        if not return_logits:
            if targets is None:
                raise ValueError("return_logits=False needs targets")
            return None, linear_cross_entropy(
                hidden.flatten(0, 1),
                self.token_weight,
                targets.reshape(-1),
                chunk_bytes=chunk_bytes,
                impl=self.impl,
            )
        logits = F.linear(hidden, self.token_weight)  # (B, T, V)
        if targets is None:
            return logits, None
        flat = logits.view(-1, logits.shape[-1])
        return logits, cross_entropy(flat, targets.reshape(-1), impl=self.impl)

    def next_logits(self, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Logits of the token that follows, (B, V).

        Args:
            tokens: (B, T) int64; with a cache only the tokens that are not in it yet.
            cache: read and extended in place.
        """
        return self.head(self.next_hidden(tokens, cache))

    def hidden_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """The last normalised hidden state of every position, (B, T, C), T <= block_size."""
        return self._hidden(tokens, None)

    def next_hidden(self, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """What `next_logits` are made of: the last normalised hidden state, (B, C)."""
        return self._hidden(tokens, cache)[:, -1]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of last hidden states (B, C)."""
        return linear(hidden, self.token_weight, None)

    def _hidden(self, tokens: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit the context of {self.config.block_size}")
        if self.rotation is None:
            by_position = cast(nn.Embedding, self.transformer["wpe"]).weight  # (block, C)
        else:
            by_position = self.rotation.table  # (2, block, D/2)
        if cache is not None and cache.count is not None:
            here = by_position.index_select(-2, cache.count.long() - 1)  # (…, 1, …)
        else:
            here = by_position[..., start:end, :]  # (…, T, …)
        x = F.embedding(tokens, self.token_weight)
        rotation = None if self.rotation is None else here
        if rotation is None:
            x = x + here
        if self.config.dropout:
            x = F.dropout(x, self.config.dropout, self.training)
        branch = None
        recompute = self.recompute and self.training and cache is None and torch.is_grad_enabled()
        for layer, block in enumerate(cast(nn.ModuleList, self.transformer["h"])):
            if recompute:
                x, branch = checkpoint(block, x, branch, None, layer, rotation, use_reentrant=False)
            else:
                x, branch = block(x, branch, cache, layer, rotation)
        if cache is not None:
            cache.advance(tokens.shape[1])
        assert branch is not None  # a model has a layer at least
        return cast(LayerNorm, self.transformer["ln_f"]).after_adding(branch, residual=x)[0]

    def generate(
        self, tokens: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, **options: Any
    ) -> Any:
        """Continue `tokens` (B, T): (B, T + new) int64. See `nanogpt.decoding.generate`."""
        from nanogpt.decoding import generate

        return generate(self, tokens, max_new_tokens, temperature=temperature, **options)

    def generate_reward_augmented(
        self,
        tokens: torch.Tensor,
        max_new_tokens: int,
        reward_fn: Any,
        beta: float,
        **options: Any,
    ) -> Any:
        """Continue `tokens` (B, T) with a distribution tilted by rewards: (B, T + new) int64.

        beta is a multiplier. See `nanogpt.reward_decoding.generate_reward_augmented`.
        """
        from nanogpt.reward_decoding import generate_reward_augmented

        return generate_reward_augmented(self, tokens, max_new_tokens, reward_fn, beta, **options)

    def describe(self) -> dict[str, Any]:
        """Configuration, tokenizer and calibration as JSON-ready values."""
        shape = {name: getattr(self.config, name) for name in GPTConfig.__dataclass_fields__}
        # Left out where they are off, so that a file of GPT-2's architecture is what it always was.
        for name in ("rotary", "qk_norm"):
            if not shape[name]:
                del shape[name]
        tokenizer = None if self.tokenizer is None else self.tokenizer.to_dict()
        return {
            "config": shape,
            "tokenizer": tokenizer,
            "calibration_temperature": self.calibration_temperature,
            "calibration": self.calibration,
        }

    @property
    def calibration_is_stale(self) -> bool:
        """Whether a temperature was fitted, but to other weights than these."""
        return bool(self.calibration and self.calibration.get("stale"))

    def mark_calibration_stale(self) -> None:
        """The weights are about to change: forget the temperature, keep what is known of it."""
        content = metadata.with_stale_calibration(self.describe())
        self.calibration_temperature = content["calibration_temperature"]
        self.calibration = content["calibration"]

    def get_extra_state(self) -> torch.Tensor:
        """The model's metadata as a uint8 tensor, so that a state dict carries it."""
        return metadata.to_tensor(self.describe())

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Adopt tokenizer and calibration of a state dict and check that the shape agrees.

        Raises: InputError where the state dict belongs to another architecture. (A head count
            changes no tensor's shape, so that torch alone would load it and be wrong.)
        """
        content = _unpack(state)
        stated, later = content.get("config") or {}, ("rotary", "qk_norm")
        for name in GPTConfig.__dataclass_fields__:
            ours = getattr(self.config, name)
            # What a configuration does not name is as it was before there was a choice.
            theirs = stated.get(name, False if stated and name in later else ours)
            if name != "dropout" and theirs != ours:
                raise InputError(
                    f"these weights belong to a model with {name} = {theirs!r}, not {ours!r}"
                )
        stored = content.get("tokenizer")
        self.tokenizer = None if stored is None else tokenizer_from_dict(stored)
        temperature, calibration = (
            content.get(name) for name in ("calibration_temperature", "calibration")
        )
        usable = isinstance(temperature, int | float) and not isinstance(temperature, bool)
        if temperature is not None and not (usable and 1e-6 <= temperature <= 1e6):
            raise InputError(
                f"the calibration temperature is {temperature!r}, not a number from 1e-6 to 1e6"
            )
        if calibration is not None and not isinstance(calibration, dict):
            raise InputError("the record of the calibration is damaged")
        self.calibration_temperature = temperature
        self.calibration = content.get("calibration")  # files of earlier versions have none

    def _before_load(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Refuse damaged weights; let a state dict without metadata pass a strict load."""
        key = prefix + metadata.KEY
        if key not in state_dict:
            state_dict[key] = self.get_extra_state()
            return
        own = {
            name.removeprefix(prefix): value
            for name, value in state_dict.items()
            if name.startswith(prefix) and name != key
        }
        problem = metadata.verify(_unpack(state_dict[key]), own)
        if problem:
            raise InputError(
                f"this state dict is damaged or was changed: {problem} "
                f"(changed on purpose? then delete its {metadata.KEY!r})"
            )


@contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """Evaluation mode, without dropout, and back to the mode it had."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _unpack(state: torch.Tensor) -> dict[str, Any]:
    try:
        return metadata.from_tensor(state)
    except ValueError as error:
        raise InputError(f"this state dict is damaged: {error}") from None
