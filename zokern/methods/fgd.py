"""FGD: forward gradient descent, SGD along a draw with the exact derivative. Baydin et al. 2022, "Gradients
without Backpropagation", arXiv 2202.08587; Zhang et al. 2024 (ZO-Bench's Forward-Grad)."""

from __future__ import annotations

from typing import Any

from ..estimator import ForwardGradient
from ..optimizer import ZerothOrder


class FGD(ZerothOrder):
    """theta <- (1 - lr wd) theta - (lr / q) sum_k c_k z_k
    c_k = <gradient of L at theta, z_k>, exact, in forward mode

    A step is q forward passes that carry z as tangents (dual numbers). Nothing is kept for a backward pass. A
    derivative has neither a difference's bias nor its rounding, so there is no eps.

    Memory beside weights and a forward: z of what is trained, in the weights' dtype, and tangents of the
    widest layer. ZO-Bench rounds z to the weights' dtype in the update too; here the update has float32 z.

    Use it where differences are noise: losses in 16 bits, tiny slopes. The loss needs a derivative: a count
    has none. An operation without a forward formula is refused by name.

    params    a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr        per step, in weights per unit of slope, of MeZO's size. None: 2e-5. Published (ZO-Bench,
              OPT-1.3B): 5e-7 for all weights, 1e-5 with LoRA, 5e-4 for prefixes
    eps       in weights, of P-GAP's probes, where that is the direction; nothing else uses it
    queries   q: draws per step, averaged (1)
    clip      bound on |c_k|, in units of loss per weight; None: no bound
    options   those of zokern.MeZO; evaluation is 'auto', which takes 'jvp'. A low-rank direction serves as
              well

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *, queries: int = 1,
        clip: float | None = None, **options: Any,
    ) -> None:  # fmt: skip
        estimator = ForwardGradient(queries, clip)
        super().__init__(params, lr=lr, eps=eps, estimator=estimator, **options)
