"""DiZO: SGD whose distance from the pre-trained weights is rescaled now and then. arXiv 2502.03304, 2025."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..optimizer import ZerothOrder
from ..rule import Projected


class DiZO(ZerothOrder):
    """theta <- (1 - lr wd) theta - (lr / q) sum_k c_k z_k
    c_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps)
    W <- W0 + f (W - W0) before that, every `interval` steps, for some parameters

    f is one number for each of them, found on the step's batch from f = 1. An iteration draws z, normal and
    cut at +-reach t / width, where t = ||W - W0||. Then g = (L(f + width z / t) - L(f - width z / t)) /
    (2 width), and f <- f - rate g z, cut at 1 +- reach. The paper writes this for gamma = t f.

    The public code reads another batch in every iteration, and leaves token embeddings as they are.

    Use it where layers of a pre-trained model should move by different lengths,
    which MeZO's one lr does not give.

    params      a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps     per step and in weights, as for MeZO. None: 2e-5. Published: lr 1e-6, eps 1e-3 (OPT-2.7B, 4000
                steps)
    projected   parts of the names of the parameters that are rescaled. None, as published: 'lora_' where a
                name has it, else 'k_proj.weight' and 'v_proj.weight'. All where no name has these
    interval    steps between two projections: 50
    iterations  of a search, two losses each: 10, as published
    rate        of a search, in weights per unit of loss: 2.0, as published
    width       half-width of the differences in gamma = t f, in weights: 0.1, as published
    reach       how far f goes from 1 per search: 0.2, as published
    options     those of zokern.MeZO; evaluation is 'auto' by default

    W0 is kept in float32, for projected parameters alone.

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range. The first step
    raises ValueError where no parameter has such a name."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *,
        projected: Sequence[str] | None = None, interval: int = 50, iterations: int = 10, rate: float = 2.0,
        width: float = 0.1, reach: float = 0.2, **options: Any,
    ) -> None:  # fmt: skip
        rule = Projected(projected, interval, iterations, rate, width, reach)
        super().__init__(params, lr=lr, eps=eps, rule=rule, **options)
