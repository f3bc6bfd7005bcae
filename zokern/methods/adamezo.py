"""AdaMeZO: Adam with moments from a window of draws, none of them stored. arXiv 2605.00650, 2026."""

from __future__ import annotations

from typing import Any

from ..optimizer import ZerothOrder
from ..rule import WindowAdam


class AdaMeZO(ZerothOrder):
    """theta <- (1 - lr wd) theta - lr scale M / (sqrt(V) + adam_eps)
    M = sum_{j < n} beta1^j g_j,   V = sum_{j < n} beta2^j g_j^2,   g_j: MeZO's estimate of j steps ago

    An estimate is known by its step and coefficients. Both moments are made again in every step, a piece of
    the weights at a time. Until the window is full, a step is MeZO's with the same lr. The reference works in
    float16, where small squares are 0, and needs a CUDA generator. Here moments are float32.

    Use it for Adam's steps where ZOAdam's 8 bytes a weight do not fit. It reads 2 q losses a step, keeps 16 q
    n bytes in all, and takes 12 MB while it writes. An update makes n times the z of MeZO's.

    params    a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps   lr in weights, and eps of the difference. A step is about 0.55 scale lr long in every weight.
              None: lr 2e-4 / scale
    window    n: 10, as published
    betas     (0.7, 0.9), as published, with neither a factor 1 - beta nor a bias correction
    adam_eps  1e-5, as published
    scale     100, as published: it multiplies the length of a step, in weights
    warmup    True: MeZO's steps until the window is full, as published. False: the sums over what there is,
              at once
    options   those of zokern.MeZO

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range, and for a
    direction that is low-rank."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *, window: int = 10,
        betas: tuple[float, float] = (0.7, 0.9), adam_eps: float = 1e-5, scale: float = 100.0,
        warmup: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        rule = WindowAdam(betas, adam_eps, window, scale, warmup)
        super().__init__(params, lr=lr, eps=eps, rule=rule, **options)
