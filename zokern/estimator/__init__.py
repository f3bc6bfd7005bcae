"""Estimators: which points a step reads, and what their losses say of the gradient. One file each."""

from .base import SLOPES, Estimate, Estimator, Oracle
from .bayesian import Bayesian
from .blocks import Blockwise, Layers
from .conservative import Conservative
from .guided import Guided
from .kernel import Kernel
from .leave_one_out import LeaveOneOut
from .private import Private
from .ranked import Ranked
from .sign import Sign
from .spread import Spread
from .spsa import CENTRAL, FORWARD, STENCILS, Spsa, Stencil

__all__ = [
    "CENTRAL",
    "FORWARD",
    "SLOPES",
    "STENCILS",
    "Bayesian",
    "Blockwise",
    "Conservative",
    "Estimate",
    "Estimator",
    "Guided",
    "Kernel",
    "Layers",
    "LeaveOneOut",
    "Oracle",
    "Private",
    "Ranked",
    "Sign",
    "Spread",
    "Spsa",
    "Stencil",
]
