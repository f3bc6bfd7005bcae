"""ZO-MOPI: ZO-Muon along the leading directions of a power iteration that goes on from step to step. Chen and
Ma 2026, "Accelerating Zeroth-Order Spectral Optimization with Partial Orthogonalization from Power
Iteration", arXiv 2605.09034."""

from __future__ import annotations

from typing import Any

from ..directions import Drawn, Kept, LowRank
from ..estimator import SLOPES, Spsa
from ..optimizer import ZerothOrder
from ..rule import Muon
from ..rule.muon import share_of


class ZOMOPI(ZerothOrder):
    """W <- (1 - lr wd) W - lr t P U V^T,   M <- beta M + (1 - beta) G
    V <- Q of M^T (M V),   U <- the columns of M V over their lengths

    G is the estimate of zokern.ZOMuon, (1/N) sum_i c_i Psi_i with c_i = (L(W + eps s P Psi_i) - L(W)) / eps.
    M starts as the first G. V (n x k) has orthonormal columns and is kept from step to step. It starts as
    normals of the stream at every new P. Parameters that are not matrices take a dense normal z and SGD.

    Use it as zokern.ZOMuon, where the estimate is noisy: k < r directions leave the weakest ones out.

    params     a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps    in weights, as for zokern.ZOMuon; None: 2e-4. Published for OPT-13B on RTE, with norm='unit':
               lr 1e-2, eps 1e-3
    dense_lr   lr of the parameters that are not matrices, while lr has its first value, above 0; it follows
               schedules of lr. The reference: 1e-7. A group of these alone that has an lr of its own moves by
               that
    rank       r, at most min(m, n); published: 64
    leading    k, at most r: 32 as published
    interval   steps between two P: 500
    queries    N: 8
    momentum   beta: 0, as in the published script for OPT; run.py alone has 0.9. The code also averages what
               is not a matrix; here it is not
    carry      True: at a new P M is carried over to it. False: its numbers stay as they are, as in the
               published code
    norm       as for zokern.ZOMuon, with t = sqrt(m n / k)
    options    those of zokern.MeZO; evaluation is 'auto' by default, and updates wait in an n x r sum

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: float = 1e-3,
        *,
        dense_lr: float = SLOPES,
        rank: int = 64,
        leading: int = 32,
        interval: int = 500,
        queries: int = 8,
        momentum: float = 0.0,
        carry: bool = False,
        norm: str = "matched",
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            eps=eps,
            direction=LowRank(Kept("orthonormal", interval), None, Drawn(), rank=rank, norm=norm),
            estimator=Spsa(queries, "forward"),
            rule=Muon(leading, momentum, carry, share_of(dense_lr, lr)),
            **options,
        )
