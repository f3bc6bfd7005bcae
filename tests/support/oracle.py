"""What a step must give, written out: losses through torch.func.functional_call, the update in float64.

Only `zokern.draw` is taken from the library; the stream has tests of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

import zokern
from zokern.stream import fma


def z(
    name: str, tensor: Tensor, result_or_seed, step: int = 0, query: int = 0, direction: str = "normal"
) -> Tensor:
    """The float32 direction of a parameter."""
    return zokern.draw(direction, tensor.shape, seed=result_or_seed, who=name, step=step, draw=query)


def perturbed(
    weights: Mapping[str, Tensor],
    scale: float | Mapping[str, float],
    seed: int,
    step: int,
    query: int,
    direction: str = "normal",
) -> dict[str, Tensor]:
    """theta + scale z for every name, one rounding to the parameter's dtype."""
    result = {}
    for name, theta in weights.items():
        amount = torch.tensor(scale[name] if isinstance(scale, Mapping) else scale, dtype=torch.float32)
        result[name] = fma(amount, z(name, theta, seed, step, query, direction), theta.detach().float()).to(
            theta.dtype
        )
    return result


@torch.no_grad()
def loss(model: nn.Module, weights: Mapping[str, Tensor], loss_of: Callable[[Callable], Tensor]) -> float:
    """loss_of(call) with the model's parameters replaced; call(*args, **kwargs) runs the model. Tied names
    follow their tie."""
    return float(loss_of(lambda *args, **kwargs: functional_call(model, dict(weights), args, kwargs)))


def coefficient(sides: Sequence[float], offsets: Sequence[float], eps: float) -> float:
    """(L(theta + o_0 eps z) - L(theta + o_1 eps z)) / ((o_0 - o_1) eps), rounded to float32."""
    return torch.tensor((sides[0] - sides[1]) / ((offsets[0] - offsets[1]) * eps), dtype=torch.float32).item()


def check_update(
    name: str,
    before: Tensor,
    after: Tensor,
    seed: int,
    step: int,
    amounts: Sequence[float],
    decay: float = 1.0,
    direction: str = "normal",
) -> None:
    """after = decay before + sum_k amounts[k] z_k within a
    unit in the last place an operation; float32 tensors."""
    expected = decay * before.double()
    size = expected.abs()
    for query, amount in enumerate(amounts):
        term = amount * z(name, before, seed, step, query, direction).double()
        expected, size = expected + term, size + term.abs()
    bound = (len(amounts) + 2) * 2.0**-24 * size + 1e-45
    ratio = ((after.detach().double() - expected).abs() / bound).max().item() if before.numel() else 0.0
    assert math.isfinite(ratio) and ratio <= 1.0, (
        f"{name}: the update is {ratio:.3g} times the bound away from the formula"
    )
