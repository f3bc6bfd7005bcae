"""Estimators: which points a step reads, and what their losses say of the gradient. One file each."""

from .anchored import Anchored
from .base import SLOPES, Base, Estimate, Estimator, Oracle
from .bayesian import Bayesian
from .blocks import Blockwise
from .conservative import Conservative
from .kernel import Kernel
from .sign import Sign
from .spread import Spread
from .spsa import CENTRAL, FORWARD, STENCILS, Spsa, Stencil

__all__ = [
    "CENTRAL",
    "FORWARD",
    "SLOPES",
    "STENCILS",
    "Anchored",
    "Base",
    "Bayesian",
    "Blockwise",
    "Conservative",
    "Estimate",
    "Estimator",
    "Kernel",
    "Oracle",
    "Sign",
    "Spread",
    "Spsa",
    "Stencil",
]
