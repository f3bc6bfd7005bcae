"""The eager MeZO loop, as people run it: what the benchmarks compare with. Malladi et al. 2023, Algorithm 1.

theta <- theta + eps z;  l1 = L;  theta <- theta - 2 eps z;  l2 = L;  theta <- theta + eps z;  theta <- theta
                         - lr c z
c = (l1 - l2) / (2 eps);  z is drawn again from the step's seed in each of the four passes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def normal_like(tensor: Tensor) -> Tensor:
    return torch.normal(mean=0.0, std=1.0, size=tensor.shape, dtype=tensor.dtype, device=tensor.device)


def perturbed(tensor: Tensor, scaling: float, eps: float) -> Tensor:
    """perturb's arithmetic as a function, for torch.compile."""
    return tensor + scaling * normal_like(tensor) * eps


def updated(tensor: Tensor, lr: float, coefficient: float, weight_decay: float = 0.0) -> Tensor:
    """update's arithmetic as a function, for torch.compile."""
    return tensor - lr * (coefficient * normal_like(tensor) + weight_decay * tensor)


def perturb(
    parameters: Iterable[Tensor], seed: int, scaling: float, eps: float, moved: Callable = perturbed
) -> None:
    torch.manual_seed(seed)
    for p in parameters:
        p.data = moved(p.data, scaling, eps)


def update(
    parameters: Iterable[Tensor], seed: int, lr: float, coefficient: float, weight_decay: float = 0.0,
    moved: Callable = updated
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    for p in parameters:
        p.data = moved(p.data, lr, coefficient, weight_decay)


@torch.no_grad()
def step(
    parameters: list[Tensor], closure: Callable[[], Tensor], seed: int, lr: float, eps: float,
    moves: tuple[Callable, Callable] = (perturbed, updated)
) -> float:  # fmt: skip
    """One step; moves: perturbed and updated, or what torch.compile made of them."""
    perturb(parameters, seed, +1, eps, moves[0])
    plus = closure()
    perturb(parameters, seed, -2, eps, moves[0])
    minus = closure()
    coefficient = ((plus - minus) / (2 * eps)).item()
    perturb(parameters, seed, +1, eps, moves[0])
    update(parameters, seed, lr, coefficient, moved=moves[1])
    return plus.item()


def in_place(tensor: Tensor, buffer: Tensor, scale: float) -> None:
    """What one writes by hand instead: one buffer for z, no temporaries."""
    tensor.add_(buffer.normal_(), alpha=scale)
