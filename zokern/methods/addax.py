"""Addax: a zeroth-order estimate of long sequences and an in-place gradient of short ones. Li et al. 2025,
"Addax: Utilizing Zeroth-Order Gradients to Improve Memory Efficiency and Performance of SGD for Fine-Tuning
Language Models", arXiv 2410.06441."""

from __future__ import annotations

from typing import Any

from ..estimator import SLOPES, Estimator, Mixed
from ..optimizer import ZerothOrder


class Addax(ZerothOrder):
    """theta <- (1 - lr wd) theta - lr (alpha c z + (1 - alpha) grad L1)
    c = (L0(theta + eps z) - L0(theta - eps z)) / (2 eps)
    zokern.step(opt, lambda: model(**long).loss, first_order=lambda: model(**short).loss)

    L0 is the loss of the step's closure, read with forwards alone: long sequences. L1 is that of
    `first_order`, which is back-propagated: short ones. Without it both are of one closure. The data loader
    says which sequences are long: the paper's threshold L_T.

    Both are taken at theta, and each weight is rounded once. A parameter is written when its gradient
    arrives, and the gradient is freed. So the memory is that of the activations of L1, and gradients of about
    one parameter at a time. An error within back-propagation leaves those parameters moved that it had
    reached. 16-bit gradients are not scaled.

    Use it where back-propagation fits for short sequences, and not for the long ones.

    params     a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps    lr is that of SGD, in weights per unit of slope. None: 1e-3. The zeroth-order part moves with
               lr alpha
    alpha      0 <= alpha <= 1. None: 2e-5 / lr, which gives the zeroth-order part MeZO's default lr. No
               published value was found
    estimator  of the zeroth-order part; None: zokern.Spsa(), the formula above
    options    those of zokern.MeZO; rule SGD alone

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *, alpha: float | None = None,
        estimator: Estimator | None = None, **options: Any,
    ) -> None:  # fmt: skip
        lr = 1e-3 if lr is None else lr
        mixed = Mixed(SLOPES / max(SLOPES, lr) if alpha is None else alpha, estimator)
        super().__init__(params, lr=lr, eps=eps, estimator=mixed, **options)
