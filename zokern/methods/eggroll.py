"""EGGROLL: an evolution strategy whose members are low-rank. Sarkar et al. 2025, "Evolution Strategies at the
Hyperscale", arXiv 2511.16652."""

from __future__ import annotations

from typing import Any

from ..directions import Drawn, LowRank
from ..estimator import Ranked
from ..optimizer import ZerothOrder


class EGGROLL(ZerothOrder):
    """W <- (1 - lr wd) W - (lr / q) sum_k c_k E_k,   E_k = s A_k B_k^T
    c_k = (u(L(W + eps E_k)) - u(L(W - eps E_k))) / 2,   u the centred rank among the 2 q losses of the step

    A_k (m x r) and B_k (n x r) are standard normal, anew for every step and pair. The population is the 2 q
    members W + eps E_k and W - eps E_k. Ranks have mean 0 and variance 1 (zokern.Ranked), so the scale and
    the outliers of the losses do not matter. Parameters that are not matrices take a dense normal z.

    Use it where the closure returns a reward of any scale, or where many members are read at once: a member
    costs two thin products of rank r beside x W^T. Nothing is kept.

    params     a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps    in weights; eps is the paper's sigma. A step is lr long in every weight, times an average of E
               of about 1 / sqrt(q). None: 2e-4
    rank       r: 1 as published
    queries    q, pairs of members: half of the population. A step is one update of rank q r, which is at most
               128 on a GPU
    norm       s: 'matched' 1 / sqrt(r), as published, E||E||_F^2 = m n; 'unit' 1
    options    those of zokern.MeZO, of which maximize=True takes the closure for a reward; evaluation is
               'auto' by default

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: float = 1e-3,
        *,
        rank: int = 1,
        queries: int = 16,
        norm: str = "matched",
        **options: Any,
    ) -> None:
        direction = LowRank(Drawn(), None, Drawn(), rank=rank, norm=norm)
        super().__init__(
            params,
            lr=lr,
            eps=eps,
            direction=direction,
            estimator=Ranked(queries),
            **options,
        )
