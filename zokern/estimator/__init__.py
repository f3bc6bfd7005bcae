"""Estimators: which points a step reads, and what their losses say of the gradient. One file each."""

from .anchored import Anchored
from .base import SLOPES, Base, Estimate, Estimator, Gradient, Oracle
from .bayesian import Bayesian
from .blocks import Blockwise, Layers
from .conservative import Conservative
from .curvature import Curvature
from .forward_gradient import ForwardGradient
from .guided import Guided
from .kernel import Kernel
from .leave_one_out import LeaveOneOut
from .mixed import Mixed
from .private import Private
from .ranked import Ranked
from .sign import Sign
from .split import Split
from .spread import Spread
from .spsa import CENTRAL, FORWARD, STENCILS, Spsa, Stencil

__all__ = [
    "Anchored", "Base", "Bayesian", "Blockwise", "CENTRAL", "Conservative", "Curvature", "Estimate",
    "Estimator", "FORWARD", "ForwardGradient", "Gradient", "Guided", "Kernel", "Layers", "LeaveOneOut",
    "Mixed", "Oracle", "Private", "Ranked", "SLOPES", "STENCILS", "Sign", "Split", "Spread", "Spsa",
    "Stencil",
]  # fmt: skip
