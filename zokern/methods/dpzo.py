"""DPZO: SGD with coefficients clipped by example and noised (DP-ZO). Tang et al. 2024, arXiv 2401.04343."""

from __future__ import annotations

from typing import Any

from ..estimator import Private
from ..optimizer import ZerothOrder


class DPZO(ZerothOrder):
    """theta <- (1 - lr wd) theta - (lr / q) sum_k c_k z_k
    c_k = (sum_i clip(L_i(theta + eps z_k) - L_i(theta - eps z_k), -C, C) + C sigma n_k) / (2 eps B)

    L_i is the loss of example i: the closure returns a vector, the loss of each example, shape [examples].
    n_k is standard normal or Laplace, one number for a draw. z_k tells nothing of the data and needs no
    noise.

    No privacy is claimed: there is no accountant, and no (epsilon, delta). The noise is a function of the
    run's seed. Draw the seed with secrets.randbits(64), and keep it, state_dicts and StepResult.losses to
    yourself. zokern.Private says what is covered and what is not.

    Use it to bound what a single example can do to the weights. It reads 2 q losses of each example a step
    and keeps nothing.

    params   a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps  per step and in weights, as for MeZO. None: lr 2e-5. No published numbers are at hand
    clip     C, in units of loss
    noise    sigma, in units of C
    kind     of the noise: 'gaussian' or 'laplace'
    batch    B; None: the number of examples. With batches sampled example by example give their expected size
    queries  q: draws a step, each with noise of its own
    options  those of zokern.MeZO, without stencil

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range, and for a
    closure that returns no vector."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *, clip: float = 0.1,
        noise: float = 1.0, kind: str = "gaussian",
        batch: int | None = None, queries: int = 1, **options: Any,
    ) -> None:  # fmt: skip
        estimator = Private(clip, noise, kind, batch, queries)
        super().__init__(params, lr=lr, eps=eps, estimator=estimator, **options)
