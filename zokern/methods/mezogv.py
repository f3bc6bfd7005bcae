"""MeZOGV: SGD along the best draw so far minus a new one (MeZO-GV). arXiv 2601.04710, 2026."""

from __future__ import annotations

from typing import Any

from ..estimator import Guided
from ..optimizer import ZerothOrder


class MeZOGV(ZerothOrder):
    """theta <- (1 - lr wd) theta - lr c g,   g = s (z_best - z_worst)
    c = (L(theta + eps g) - L(theta - eps g)) / (2 eps)

    z_best and z_worst are a new draw and the best draw of earlier steps, ranked by L(theta + eps z) of this
    batch. The first step has two new ones. The better one is kept as (step, draw word), and its z is made
    again. The reference keeps z and g in memory. It ranks draws of one seed for the whole model and makes
    them again from one seed for each tensor, so that its guide is made of other numbers than were ranked.

    Use it to compare with the paper. Only the draw that is kept depends on the ranking: c g is the same for g
    and -g. It reads 4 losses a step and keeps 8 bytes in all.

    params   a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps  per step and in weights, of MeZO's size. None: lr 2e-5. Published: lr 2e-7 (OPT-13B), with
             norm='unit'
    norm     s: 'matched' 1 / sqrt(2), so that g is as long as a draw; 'unit' 1, the published formula
    options  those of zokern.MeZO, without queries and stencil

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *, norm: str = "matched",
        **options: Any
    ) -> None:  # fmt: skip
        super().__init__(params, lr=lr, eps=eps, estimator=Guided(norm), **options)
