"""Estimators: which points a step reads, and what their losses say of the gradient. One file each."""

from .anchored import Anchored
from .base import SLOPES, Base, Estimate, Estimator, Oracle
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
    "Anchored", "Base", "Bayesian", "Blockwise", "CENTRAL", "Conservative", "Estimate", "Estimator",
    "FORWARD", "Guided", "Kernel", "Layers", "LeaveOneOut", "Oracle", "Private", "Ranked", "SLOPES", "STENCILS",
    "Sign", "Spread", "Spsa", "Stencil",
]  # fmt: skip
