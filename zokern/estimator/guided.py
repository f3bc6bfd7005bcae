"""Estimator ``guided``: a central difference along the best draw so far minus a new one (MeZO-GV).

    g = s (z_best - z_new),   c = (L(theta + eps g) - L(theta - eps g)) / (2 eps),   gradient estimate c g

arXiv 2601.04710, 2026.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..device_numbers import constant
from ..evaluation import Point
from ..group import Draw
from ..plan import Plan
from .base import Estimate, Oracle
from .spsa import Spsa

NORMS = {"matched": math.sqrt(0.5), "unit": 1.0}


class Guided(Spsa):
    """Estimates along the difference of two draws: the best of earlier steps, and a new one (MeZO-GV).

        g = s (z_best - z_new),   estimate c g,   c = (L(theta + eps g) - L(theta - eps g)) / (2 eps)

    norm  s: 'matched' takes 1 / sqrt(2), so that E||g||^2 is that of a draw; 'unit' takes 1, the
          published formula
    clip  bound on |c|, in units of loss per weight; None: no bound

    A step reads 4 losses: those at theta + eps z for both draws, which decide the draw that is kept, and
    the two sides of g. c g is the same for g and -g, so it does not matter which of the two draws is
    better. `state` holds the (step, draw word) of the kept draw, 8 bytes. The first step has two new
    draws, and so has the first in a new basis of a low-rank direction. A skipped step keeps the draw of
    the step before.
    Raises ValueError for arguments out of range. arXiv 2601.04710, 2026."""

    follows = True

    def __init__(self, norm: str = "matched", clip: float | None = None) -> None:
        super().__init__(1, "central", clip)
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}; expected one of {list(NORMS)}")
        self.norm, self.gain = norm, 2.0 * NORMS[norm] ** 2

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        kept, scale = self.state.get("best"), NORMS[self.norm]
        known = kept is not None and plan.reaches(kept[0])
        draws: tuple[Draw, Draw] = (tuple(kept), plan.draw(0)) if known else (plan.draw(0), plan.draw(1))  # type: ignore[arg-type]
        alone = oracle.losses([Point(((draw, 1.0),)) for draw in draws])
        guide = Point(((draws[0], scale), (draws[1], -scale)))
        sides = oracle.losses([guide, guide.scaled(-1.0)]).to(alone.device)
        difference = self.differences(sides.view(1, 2))
        found = self.slopes(difference, sides, plan).float().double()
        if self.clip is not None:
            found = found.clamp(-self.clip, self.clip)
        both = constant((scale, -scale), torch.float64, found.device)
        # of which c g knows their difference alone
        slopes = difference / plan.groups[0].eps * both / (2.0 * scale * scale)
        yield Estimate(draws, found * both, torch.cat((alone, sides)).unsqueeze(0), slopes=slopes)
        if oracle.moved():
            best = int(alone.argmax() if plan.maximize else alone.argmin())
            self.state["best"] = list(plan.named(draws[best]))


__all__ = ["Guided"]
