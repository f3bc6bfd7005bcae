"""LOZO and LOZO-M: SGD along products of two thin factors. Chen et al. 2025, "Enhancing Zeroth-Order
Fine-Tuning for Language Models with Low-Rank Structures"."""

from __future__ import annotations

from typing import Any

from ..directions import Lazy
from ..optimizer import ZerothOrder
from ..rule import Momentum, Sgd


class LOZO(ZerothOrder):
    """W <- (1 - lr wd) W - (lr / q) sum_k c_k z_k,   z_k = s U_k V^T
    c_k = (L(W + eps z_k) - L(W - eps z_k)) / (2 eps)

    U_k (m x r) is drawn anew for every step and query, V (n x r) every `interval` steps. Parameters that are
    not matrices take a dense normal z.

    The reference measures one direction and moves along another in steps that draw a new V, because both are
    cut from one sequential stream. Here every number has an address.

    Use it where momentum has to be cheap: LOZO-M keeps it for an m x r factor. Its deferred updates write W
    once an interval.

    params     a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps    per step and in weights, of MeZO's size. The reference has norm='unit', lr 1e-6 or 1e-7 and eps
               1e-3 (OPT-13B)
    rank       r; the reference: 1 or 2 (OPT-13B), 4 (RoBERTa-large)
    interval   steps between two V (the paper's nu): 50 or 100
    momentum   beta of LOZO-M: M <- beta M + (1 - beta) c s U, W <- W - lr M V^T, M carried over to a new V as
               beta M (V_old^T V_new) / n; None: LOZO
    norm       s: 'matched' 1 / sqrt(r), E||z||_F^2 = m n as for a dense z; 'unit' 1, the reference's code.
               The paper has 1 / r
    defer      updates wait in an m x r sum until V changes, and W is written once per interval; None: where a
               module was given
    options    those of zokern.MeZO; evaluation is 'auto' by default

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: float = 1e-3,
        *,
        rank: int = 2,
        interval: int = 50,
        momentum: float | None = None,
        norm: str = "matched",
        **options: Any,
    ) -> None:
        rule = Sgd() if momentum is None else Momentum(momentum)
        direction = Lazy(rank, interval, norm)
        super().__init__(params, lr=lr, eps=eps, direction=direction, rule=rule, **options)
