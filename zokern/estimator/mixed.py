"""Estimator ``mixed``: a zeroth-order estimate plus a back-propagated gradient. Li et al. 2025 (Addax)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..checks import finite_number
from ..plan import Plan
from .around import Around
from .base import Estimate, Estimator, Gradient, Oracle


class Mixed(Around):
    """Mixes a zeroth-order estimate with a back-propagated gradient, both at the same weights (Addax).

        g = alpha g0 + (1 - alpha) grad L1,   g0 the estimate of `inner` from the step's closure

    alpha  0 <= alpha <= 1, the weight of the zeroth-order part
    inner  None: zokern.Spsa(), the central difference

    L1 is the loss of zokern.step(..., first_order=closure), or that of the same closure. The weights are
    written parameter by parameter, as gradients arrive. It goes with rule SGD. A record's coefficients
    are those of `inner` times alpha.
    Raises ValueError for alpha out of range and for an inner estimator that moves blocks. Li et al. 2025
    (arXiv 2410.06441)."""

    backpropagates, shards = True, False

    def __init__(self, alpha: float, inner: Estimator | None = None) -> None:
        super().__init__(inner)
        self.alpha = finite_number("alpha", alpha, minimum=0.0)
        if self.alpha > 1.0:
            raise ValueError(f"alpha is {alpha!r}; expected 0 <= alpha <= 1")

    def __call__(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        for estimate in self.forwards(oracle, plan):
            yield replace(estimate, slopes=None, gradient=Gradient(1.0 - self.alpha))

    def forwards(self, oracle: Oracle, plan: Plan) -> Iterator[Estimate]:
        """Yields the zeroth-order part, alpha g0, for zokern.tune. The slopes are s_k / alpha: alpha c_k of
        them is c_k s_k, the expected fall by both parts, since E[(grad . z)^2] = |grad|^2."""
        for estimate in self.inner(oracle, plan):
            if estimate.scope is not None or estimate.gradient is not None:
                raise ValueError(
                    f"inner is {type(self.inner).__name__}, which moves parts of the parameters; expected "
                    "one such as Spsa"
                )
            slopes = None if estimate.slopes is None or not self.alpha else estimate.slopes / self.alpha
            yield replace(estimate, coefficients=estimate.coefficients * self.alpha, slopes=slopes)


__all__ = ["Mixed"]
