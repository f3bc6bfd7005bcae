"""LOZO and LOZO-M: low-rank zeroth-order SGD. Chen et al. 2025, "Enhancing Zeroth-Order Fine-Tuning for Language Models with Low-Rank
Structures"."""

from __future__ import annotations

from typing import Any

from ..directions import Lazy
from ..optimizer import ZerothOrder
from ..rule import Momentum, Sgd


class LOZO(ZerothOrder):
    """W <- (1 - lr wd) W - (lr / q) sum_k c_k U_k V^T,   c_k = (L(W + eps U_k V^T) - L(W - eps U_k V^T)) / (2 eps).

    U_k (m x r) is drawn anew for every step and query, V (n x r) every `interval` steps. In the reference the step that draws a new V
    measures one direction and moves along another, because both are cut from one sequential stream; here every number has an address.
    Parameters that are not matrices take a dense normal z.

    params     a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr         per step. The reference's code has no 1/r: lr here is the paper's divided by r (OPT-13B: 1e-6 or 1e-7)
    eps        in weights; E||U V^T||_F^2 = m n r, so a step of MeZO's length needs eps / sqrt(r)
    rank       r; the reference: 1 or 2 (OPT-13B), 4 (RoBERTa-large)
    interval   steps between two V (the paper's nu): 50 or 100
    momentum   beta of LOZO-M: M <- beta M + (1 - beta) c U, W <- W - lr M V^T, M carried over to a new V as beta M (V_old^T V_new) / n;
               None: LOZO
    defer      updates wait in an m x r sum until V changes, and W is written once per interval; None: where a module was given
    options    those of zokern.MeZO; evaluation is 'auto' by default

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        rank: int = 2,
        interval: int = 50,
        momentum: float | None = None,
        evaluation: Any = "auto",
        **options: Any,
    ) -> None:
        rule = Sgd() if momentum is None else Momentum(momentum)
        super().__init__(params, lr=lr, eps=eps, direction=Lazy(rank, interval), rule=rule, evaluation=evaluation, **options)
