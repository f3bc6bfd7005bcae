"""ZOSignSGD: SGD along the sign of the estimate, or of the slope. Zhang et al. 2024, arXiv 2402.11592."""

from __future__ import annotations

from typing import Any

from ..estimator import Sign, Spsa, Stencil
from ..optimizer import ZerothOrder
from ..rule import Rule, Sgd, SignSgd


class ZOSignSGD(ZerothOrder):
    """theta <- (1 - lr wd) theta - (lr / q) sum_k sign(c_k) z_k,   or - lr sign(sum_k c_k z_k)
    c_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps)

    The first form is the code of ZO-Bench's ZO-SGD-Sign: the sign of the projected gradient c_k, and z_k
    stays normal. The second is signSGD via a zeroth-order oracle (Liu et al. 2019): the sign of every
    element. ZO-Bench's published sweeps name no optimizer, so transformers' AdamW runs on sign(c) z there.
    Here the rule is SGD.

    Use it where losses have outliers: every step has one length, and a batch with large losses moves no
    farther than another. It reads 2 q losses a step and keeps nothing.

    params   a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps  in weights. None: lr 2e-4, the length of a step in every weight
    of       what the sign is taken of: 'coefficient', the first form, or 'element', the second
    queries  q: draws a step, averaged
    stencil  'central' (two losses a query) or 'forward' (one, and that of theta)
    options  those of zokern.MeZO

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *, of: str = "coefficient",
        queries: int = 1, stencil: str | Stencil = "central", **options: Any,
    ) -> None:  # fmt: skip
        forms: dict[str, tuple[Spsa, Rule]] = {
            "coefficient": (Sign(queries, stencil), Sgd()), "element": (Spsa(queries, stencil), SignSgd()),
        }  # fmt: skip
        if of not in forms:
            raise ValueError(f"of is {of!r}; expected one of {list(forms)}")
        estimator, rule = forms[of]
        super().__init__(params, lr=lr, eps=eps, estimator=estimator, rule=rule, **options)
