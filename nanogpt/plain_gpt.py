"""A GPT made of torch's own modules, nothing fused or cached: what ours is measured against."""

import torch
import torch.nn.functional as F
from torch import nn

from nanogpt.config import GPTConfig


class PlainGPT(nn.Module):
    """GPT-2 as most people write it, with torch's fused attention.

    Source: Radford et al. 2019, GPT-2.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits (B, T, V), and the mean loss where targets are given."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        for block in self.h:
            x = block(x)
        if targets is None:  # only the last position is wanted
            x = x[:, -1:]
        logits = F.linear(self.ln_f(x), self.wte.weight)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    @torch.no_grad()
    def generate(self, tokens: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """Continue `tokens` (B, T); every token computes its whole context anew."""
        for _ in range(max_new_tokens):
            logits, _ = self(tokens[:, -self.block_size :])
            chosen = torch.multinomial(logits[:, -1].float().softmax(-1), 1)
            tokens = torch.cat([tokens, chosen], 1)
        return tokens


class PlainBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        c, bias = config.n_embd, config.bias
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(c, bias=bias), nn.LayerNorm(c, bias=bias)
        self.c_attn, self.c_proj = nn.Linear(c, 3 * c, bias=bias), nn.Linear(c, c, bias=bias)
        self.mlp = nn.Sequential(
            nn.Linear(c, 4 * c, bias=bias), nn.GELU("tanh"), nn.Linear(4 * c, c, bias=bias)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, c = x.shape
        q, k, v = (
            part.view(batch, length, self.n_head, c // self.n_head).transpose(1, 2)
            for part in self.c_attn(self.ln_1(x)).split(c, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(batch, length, c))
        return x + self.mlp(self.ln_2(x))
