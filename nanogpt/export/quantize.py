"""Weights for export: as they are, in bfloat16, or as int8 with one scale a row.

int8, symmetric, a row at a time: scale = max|row| / 127, W ~ scale * round(row / scale), so that no
weight moves by more than half its row's scale. Matrices of products and the token embedding (the
tied head) are int8; position embeddings and vectors stay float32. bf16 rounds every matrix.
"""

from collections.abc import Mapping

import torch

from nanogpt.errors import InputError
from nanogpt.model import GPT

QUANTIZATIONS = ("none", "bf16", "int8")
SCALE = ".scale"
POSITIONS = "transformer.wpe.weight"


def weights_of(model: GPT, quantize: str) -> dict[str, torch.Tensor]:
    """Tensors by their name in the state dict; an int8 matrix has its scales under name + ".scale".

    Args:
        quantize: one of QUANTIZATIONS.
    Returns: contiguous CPU tensors that share no memory with the model.
    Raises: InputError where a weight is not finite.
    """
    assert quantize in QUANTIZATIONS, quantize
    out = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().to("cpu", torch.float32).clone().contiguous()
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"the weights {name} hold numbers that are not finite")
        if weight.dim() == 1 or quantize == "none":
            out[name] = weight
        elif quantize == "bf16":
            out[name] = weight.to(torch.bfloat16)
        elif name == POSITIONS:
            out[name] = weight
        else:
            out[name], out[name + SCALE] = rows_to_int8(weight)
    return out


def rows_to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(F, C) float32 -> (F, C) int8 in -127 … 127 and (F,) float32 scales, 0 for a row of zeros."""
    scale = weight.abs().amax(1) / 127
    # A row so small that its scale rounds to zero is a row of zeros.
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    steps = (weight / divisor[:, None]).round().clamp(-127, 127)
    steps = torch.where(scale[:, None] > 0, steps, torch.zeros_like(steps))
    return steps.to(torch.int8), scale


def dequantized(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float32 weights that quantized ones stand for, by the names of the state dict."""
    out = {}
    for name, weight in weights.items():
        if name.endswith(SCALE):
            continue
        wide = weight.to(torch.float32)
        scale = weights.get(name + SCALE)
        out[name] = wide if scale is None else wide * scale[:, None]
    return out


def dequantized_model(model: GPT, quantize: str) -> GPT:
    """A GPT in float32 on the CPU that computes with the weights that an export stores."""
    again = GPT(model.config)
    again.load_state_dict(dequantized(weights_of(model, quantize)))
    again.tokenizer = model.tokenizer
    again.calibration_temperature = model.calibration_temperature
    return again.eval()
