"""zokern: zeroth-order fine-tuning of language models, training with forward passes only, exact and fast.

opt = zokern.MeZO(model, lr=2e-5, eps=1e-3, seed=0)         # a torch.optim.Optimizer
for batch in loader:
    result = zokern.step(opt, lambda: model(**batch).loss)  # result.loss, result.coefficients, ...
"""

from .directions import Masked, Normal, Rademacher, Scaled
from .estimator import (
    Anchored,
    Bayesian,
    Blockwise,
    Conservative,
    Curvature,
    Estimate,
    Estimator,
    ForwardGradient,
    Guided,
    Kernel,
    Layers,
    LeaveOneOut,
    Mixed,
    Oracle,
    Private,
    Ranked,
    Sign,
    Split,
    Spread,
    Spsa,
    Stencil,
)  # fmt: skip
from .evaluation import THETA, Auto, InPlace, Jvp, Master, Paired, Point, Refused, Scratch
from .evaluation import InPlace as Walk
from .graph import graph
from .methods import *  # noqa: F403  (their names are found in the folder)
from .methods import METHODS
from .objective import Objective
from .ops import axpy_, draw, lowrank_, perturb, philox4x32, project, update_
from .ops.linear import linear, sketch
from .parallel import Parallel, RankFailed
from .result import StepResult
from .rule import (
    Adam,
    Averaged,
    Cone,
    Momentum,
    Muon,
    Projected,
    Rule,
    Sgd,
    SignSgd,
    WindowAdam,
    WindowMomentum,
)  # fmt: skip
from .step import step
from .tuning import Tuning, tune

__version__ = "0.1.0"

__all__ = [
    "Adam", "Anchored", "Auto", "Averaged", "Bayesian", "Blockwise", "Cone", "Conservative", "Curvature",
    "Estimate", "Estimator", "ForwardGradient", "Guided", "InPlace", "Jvp", "Kernel", "Layers", "LeaveOneOut",
    "Masked", "Master", "Mixed", "Momentum", "Muon", "Normal", "Objective", "Oracle", "Paired", "Parallel",
    "Point", "Private", "Projected", "Rademacher", "RankFailed", "Ranked", "Refused", "Rule", "Scaled",
    "Scratch", "Sgd", "Sign", "SignSgd", "Split", "Spread", "Spsa", "Stencil", "StepResult", "THETA",
    "Tuning", "Walk", "WindowAdam", "WindowMomentum", "__version__", "axpy_", "draw", "graph",
    "linear", "lowrank_", "perturb", "philox4x32", "project", "sketch", "step", "tune", "update_",
]  # fmt: skip
__all__ += METHODS
