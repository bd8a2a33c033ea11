"""Muon for the matrices of the blocks, AdamW for everything else: one optimizer.

A matrix moves by the orthonormal matrix that is nearest to its averaged gradient, so that no
direction is neglected because its gradient is small. With G the gradient, per step:

    m = lerp(m, G, 1 - mu)      u = lerp(G, m, mu)      W -= lr sqrt(max(1, rows / cols)) orth(u)

Source: Jordan et al. 2024, Muon: an optimizer for hidden layers in neural networks.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """About the nearest matrix with orthonormal rows, or columns where those are fewer.

    Newton and Schulz's iteration: every singular value ends between 0.7 and 1.2.

    Args:
        matrix: (…, rows, cols); computed in bfloat16 on a GPU, in float32 on a CPU.
    Returns: of the same shape and dtype.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-12)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Groups with `parts` are Muon's: each parameter is so many matrices one below the other.

    Args:
        groups: of parameters. Muon's have parts, lr, momentum and weight_decay; the others lr,
            betas, eps and weight_decay, as torch.optim.AdamW's. Both may have `rate`, which
            multiplies the scheduled learning rate.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"rate": 1.0, "weight_decay": 0.0})

    # Torch wraps these for its compiler, which the first call of one would import: a second at the
    # start of every run.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer's."""
        content: dict[str, Any] = inspect.unwrap(torch.optim.Optimizer.state_dict)(self)
        return content

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's."""
        inspect.unwrap(torch.optim.Optimizer.load_state_dict)(self, state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim.Optimizer's."""
        inspect.unwrap(torch.optim.Optimizer.zero_grad)(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                start_state(self, group, parameter)
                (_muon if "parts" in group else _adamw)(group, parameter, self.state[parameter])
        return loss


def start_state(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.Tensor
) -> None:
    """The state of a parameter before its first step, under torch's own names."""
    state = optimizer.state[parameter]
    if state:
        return
    if "parts" in group:
        state["momentum_buffer"] = torch.zeros_like(parameter)
    else:
        # Torch's fused AdamW counts on the device, all else on the host.
        device = parameter.device if group.get("fused") else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)


def _muon(group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> None:
    grad, momentum = parameter.grad, state["momentum_buffer"]
    assert grad is not None
    momentum.lerp_(grad, 1 - group["momentum"])
    rows, cols = parameter.shape
    parts = group["parts"]
    update = grad.lerp(momentum, group["momentum"]).view(parts, rows // parts, cols)
    size = max(1.0, rows / parts / cols) ** 0.5
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(orthogonalise(update).view(rows, cols), alpha=-group["lr"] * size)


def _adamw(group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> None:
    grad, (beta1, beta2) = parameter.grad, group["betas"]
    assert grad is not None
    state["step"] += 1
    count = float(state["step"])
    state["exp_avg"].lerp_(grad, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    bottom = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.addcdiv_(state["exp_avg"], bottom, value=-group["lr"] / (1 - beta1**count))
