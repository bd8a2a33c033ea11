"""KVCache: the keys and values of the tokens so far, the only mutable state of decoding."""

import torch

from nanogpt.config import GPTConfig


class KVCache:
    """Keys and values of every layer, written in place as decoding goes on.

    Args:
        config: the model's shape; `block_size` positions are reserved.
        batch: B, the sequences decoded together.
        dtype, device: of the keys and values.
    Attributes:
        length: S, the positions filled so far.
        count: None, or (1,) int32 on the device: S with the token that is being computed. Then
            one token at a time is appended at a place that only the device knows, which lets a
            CUDA graph replay the step; all `block_size` positions are handed out, of which
            `count` are filled.
    """

    def __init__(
        self, config: GPTConfig, batch: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        head_width = config.n_embd // config.n_head
        shape = (config.n_layer, batch, config.n_head, config.block_size, head_width)
        # Zeros, because with `count` what is not filled yet is multiplied by probability zero.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # (L, B, H, block, D)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0
        self.count: torch.Tensor | None = None

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T new positions of one layer, (B, H, T, D), and give all S + T of them.

        `length` moves on only in `advance`, once every layer has stored its part.
        """
        if self.count is not None:
            place = self.count.long() - 1
            self.keys[layer].index_copy_(2, place, k)
            self.values[layer].index_copy_(2, place, v)
            return self.keys[layer], self.values[layer]
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, positions: int) -> None:
        """Count `positions` new tokens as filled."""
        self.length += positions

    def select(self, rows: torch.Tensor) -> None:
        """Let row i go on from row rows[i], (B,) int64; the memory stays where it is."""
        for stored in (self.keys, self.values):
            filled = stored[:, :, :, : self.length]
            filled.copy_(filled.index_select(1, rows))

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.length = 0
