"""Dense directions with a factor for each element: z' = z * s, multiplied inside the kernels
(backends/launch.py, Batch.scales).

    Scaled   factors that are given
    Masked   0 or 1: of random elements, or of the smallest weights

A mask is made once, when it changes, and kept: 1 byte an element. docs/stream.md says which numbers of the
stream a random one reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checks import whole_number, within
from ..stream import MASK, draw_word

Factors = Mapping[str, Tensor] | Callable[[str, Tensor], Tensor | None]
WORD = draw_word(0, MASK)
INFINITY = 0x7F800000  # its bits: above those of every finite magnitude


class Normals(Protocol):
    """Normals of the stream for the tensors of a step; the optimizer provides them."""

    def below(self, i: int, step: int, draw: int, limit: float) -> Tensor:
        """Returns a mask shaped like tensor i: where its normal of (step, draw word) is below the limit."""


class Scaled:
    """Multiplies a dense z by a fixed factor for each element.

        z' = z * s

    scales  s, without a unit, for the weights of each parameter: a mapping from names to factors, or a
            function of name and parameter that returns them, or None for 1. Factors are float32, bfloat16
            or bool (a mask), shaped like the parameter. They are read when the optimizer first sees the
            parameter, and copied
    base    the direction of z: 'normal', 'rademacher' or a Direction

    Keeps a copy of the factors: 4, 2 or 1 bytes an element. A weight with s = 0 moves by weight decay
    alone.
    Raises ValueError for names that no parameter has, and for other shapes. Zhao et al. 2024 (HiZOO) and
    Liu et al. 2024 (Sparse-MeZO) scale z so."""

    name = "scaled"

    def __init__(self, scales: Factors, base: Any = "normal") -> None:
        if not callable(scales) and not isinstance(scales, Mapping):
            raise TypeError(
                f"scales is {type(scales).__name__}; expected a dict from names to tensors, or a function of "
                "name and parameter"
            )
        self.scales, self.base = scales, base

    def born(self, step: int) -> int:
        """Returns the step at which the factors in use at `step` are made."""
        return 0

    def factors(
        self, names: Sequence[str], tensors: Sequence[Tensor], states: Sequence[dict], normals: Normals,
        born: int
    ) -> list[Tensor | None]:  # fmt: skip
        """Returns the factors of every tensor. states:
        the optimizer's state of each, where what lasts is kept."""
        if isinstance(self.scales, Mapping) and (unknown := sorted(self.scales.keys() - {*names})):
            raise ValueError(
                f"scales has {unknown}; expected names of trained dense parameters, such as {list(names)[:2]}"
            )
        get = self.scales.get if isinstance(self.scales, Mapping) else None
        found = []
        for name, tensor in zip(names, tensors):
            factor = get(name) if get is not None else self.scales(name, tensor)  # type: ignore[operator]
            if factor is not None:
                wrong = not isinstance(factor, Tensor) or factor.dtype not in (
                    torch.float32,
                    torch.bfloat16,
                    torch.bool,
                )
                if wrong or factor.shape != tensor.shape:
                    kind = (
                        f"{factor.dtype}{list(factor.shape)}"
                        if isinstance(factor, Tensor)
                        else type(factor).__name__
                    )
                    raise ValueError(
                        f"the factors of {name!r} are {kind}; expected float32, bfloat16 or "
                        f"bool{list(tensor.shape)}, as the parameter"
                    )
                factor = factor.detach().to(tensor.device, copy=True, memory_format=torch.contiguous_format)
            found.append(factor)
        return found


class Curved(Scaled):
    """z' = z * s, s = h^(-1/2): long where the loss is flat and short where it curves. h is learned from the
    losses (Zhao et al. 2024, HiZOO).

    smooth  alpha of h <- (1 - alpha) h + alpha |z^T H z| h z^2, 0 <= alpha < 1, which is s <- s / sqrt(1 -
            alpha + alpha |z^T H z| z^2)
    base    the direction of z: 'normal'; for signs z^2 = 1, and all elements of h stay equal

    Keeps s as `scale` in the optimizer's state, float32, 4 bytes an element, from 1. It goes with
    zokern.Curvature, which reads z^T H z."""

    name = "curved"

    def __init__(self, smooth: float, base: Any = "normal") -> None:
        self.smooth, self.base = within("smooth", smooth, 0.0, 1.0, "a number, 0 <= smooth < 1"), base

    def factors(
        self, names: Sequence[str], tensors: Sequence[Tensor], states: Sequence[dict], normals: Normals,
        born: int
    ) -> list[Tensor | None]:  # fmt: skip
        for tensor, state in zip(tensors, states):
            if "scale" not in state:
                state["scale"] = torch.ones(tensor.shape, dtype=torch.float32, device=tensor.device)
        return [state["scale"] for state in states]


class Masked(Scaled):
    """Perturbs and moves a share of the elements; the others move by weight decay alone.

        z' = z * m,   m in {0, 1}

    keep   the share that moves, 0 < keep <= 1; its complement is the papers' sparsity
    by     'random': elements are drawn with probability `keep`, anew every `every` steps, as ZO-Bench's
           gradient sparsity states it. 'magnitude': the smallest weights, |theta_i| <= h, with the
           weights of the optimizer's first step, as in Sparse-MeZO
    every  steps between two random masks
    scope  'layer': `keep` of every tensor. 'global': one h for all tensors; a random mask keeps of each
           tensor the share of its weights that lie above the h of the smallest 1 - keep of all (ZO-Bench)
    base   the direction of z: 'normal', 'rademacher' or a Direction

    Keeps 1 byte an element. A mask by magnitude is `mask` in the optimizer's state, saved and loaded,
    because the weights that made it move. A random one is a function of (seed, name, step); with scope
    'global' the state has the shares.
    Raises ValueError for a keep outside (0, 1] and for other names. Zhang et al. 2024 (ZO-Bench); Liu et
    al. 2024 (Sparse-MeZO)."""

    name = "masked"

    def __init__(
        self, keep: float, by: str = "random", every: int = 1, scope: str = "layer", base: Any = "normal"
    ) -> None:
        keep = within("keep", keep, 0.0, 1.0 + 2.0**-52, "a number, 0 < keep <= 1")
        if not keep:
            raise ValueError("keep is 0.0; expected a number, 0 < keep <= 1: nothing would move")
        for what, value, known in (
            ("by", by, ("random", "magnitude")),
            ("scope", scope, ("layer", "global")),
        ):
            if value not in known:
                raise ValueError(f"{what} is {value!r}; expected one of {list(known)}")
        self.keep, self.by, self.every = keep, by, whole_number("every", every)
        self.scope, self.base = scope, base

    def born(self, step: int) -> int:
        return step - step % self.every if self.by == "random" else 0

    def factors(
        self, names: Sequence[str], tensors: Sequence[Tensor], states: Sequence[dict], normals: Normals,
        born: int
    ) -> list[Tensor | None]:  # fmt: skip
        self._measure(tensors, states)
        if self.by == "magnitude":
            return [state["mask"] for state in states]
        shares = [state.get("keep", self.keep) for state in states]
        limits = [NormalDist().inv_cdf(p) if 0.0 < p < 1.0 else (p - 0.5) * float("inf") for p in shares]
        return [normals.below(i, born, WORD, limit) for i, limit in enumerate(limits)]

    def _measure(self, tensors: Sequence[Tensor], states: Sequence[dict]) -> None:
        """Keeps what is read off the weights of a parameter when it is first seen:
        its mask, or the share of it that moves."""
        key = "mask" if self.by == "magnitude" else "keep"
        new = [i for i, state in enumerate(states) if key not in state]
        if not new or (self.by, self.scope) == ("random", "layer"):
            return
        share = self.keep if self.by == "magnitude" else 1.0 - self.keep
        shared = smallest(tensors, share) if self.scope == "global" else None
        for i in new:
            limit = smallest([tensors[i]], share) if shared is None else shared.to(tensors[i].device)
            below = tensors[i].abs() <= limit
            states[i][key] = (
                below.contiguous() if key == "mask" else 1.0 - int(below.sum()) / max(1, below.numel())
            )


def smallest(tensors: Sequence[Tensor], share: float) -> Tensor:
    """Returns the least h with |w| <= h for a share of all elements, at least one, float32 [].

    It is found bit by bit on the device, so without a sorted copy and without a value that is read."""
    wanted = max(1, round(share * sum(t.numel() for t in tensors)))
    low = torch.zeros((), dtype=torch.int32, device=tensors[0].device)
    high = low + INFINITY
    for _ in range(INFINITY.bit_length()):
        middle = low + (high - low) // 2
        h = middle.view(torch.float32)
        found = [(t.abs() <= h.to(t.device)).sum().to(low.device) for t in tensors]
        enough = torch.stack(found).sum() >= wanted
        low, high = (
            torch.where(enough, low, torch.minimum(middle + 1, high)),
            torch.where(enough, middle, high),
        )
    return low.view(torch.float32)


__all__ = ["WORD", "Curved", "Masked", "Normals", "Scaled", "smallest"]
