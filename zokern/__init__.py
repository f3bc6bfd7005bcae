"""zokern: zeroth-order fine-tuning of language models, training with forward passes only, exact and fast.

opt = zokern.MeZO(model, lr=1e-6, eps=1e-3, seed=0)         # a torch.optim.Optimizer
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
    ForwardGradient,
    Guided,
    Kernel,
    Layers,
    LeaveOneOut,
    Mixed,
    Private,
    Ranked,
    Sign,
    Split,
    Spread,
    Spsa,
    Stencil,
)  # fmt: skip
from .evaluation import Auto, InPlace, Jvp, Master, Paired, Refused, Scratch
from .evaluation import InPlace as Walk
from .methods import (
    BSZO,
    DPZO,
    EGGROLL,
    FGD,
    FZOO,
    LOZO,
    METHODS,
    PGAP,
    RLOO,
    ZOMOPI,
    AdaMeZO,
    Addax,
    BlockMeZO,
    ConMeZO,
    DiZO,
    HiZOO,
    Hybrid,
    KerZOO,
    LeZO,
    MeZO,
    MeZOGV,
    MeZOSVRG,
    SparseMeZO,
    SubZero,
    SubZeroPlus,
    TeZO,
    ZOAdam,
    ZOConservative,
    ZOMomentum,
    ZOMuon,
    ZOSignSGD,
)  # fmt: skip
from .objective import Objective
from .ops import axpy_, draw, lowrank_, perturb, philox4x32, update_
from .ops.linear import linear, sketch
from .rule import Adam, Averaged, Cone, Momentum, Muon, Projected, Sgd, SignSgd, WindowAdam, WindowMomentum
from .step import StepResult, step
from .tuning import Tuning, tune

__version__ = "0.1.0"

__all__ = [
    "AdaMeZO", "Adam", "Addax", "Anchored", "Auto", "Averaged", "BSZO", "Bayesian", "BlockMeZO",
    "Blockwise", "ConMeZO", "Cone", "Conservative", "Curvature", "DPZO", "DiZO", "EGGROLL", "FGD", "FZOO",
    "ForwardGradient", "Guided", "HiZOO", "Hybrid", "InPlace", "Jvp", "KerZOO", "Kernel", "LOZO", "Layers",
    "LeZO", "LeaveOneOut", "Masked", "Master", "MeZO", "MeZOGV", "MeZOSVRG", "Mixed", "Momentum", "Muon",
    "Normal", "Objective", "PGAP", "Paired", "Private", "Projected", "RLOO", "Rademacher", "Ranked",
    "Refused", "Scaled", "Scratch", "Sgd", "Sign", "SignSgd", "SparseMeZO", "Split", "Spread", "Spsa",
    "Stencil", "StepResult", "SubZero", "SubZeroPlus", "TeZO", "Tuning", "Walk", "WindowAdam",
    "WindowMomentum", "ZOAdam", "ZOConservative", "ZOMOPI", "ZOMomentum", "ZOMuon", "ZOSignSGD",
    "__version__", "axpy_", "draw", "linear", "lowrank_", "perturb", "philox4x32", "sketch", "step", "tune",
    "update_",
]  # fmt: skip
__all__ += [name for name in METHODS if name not in __all__]
globals().update(METHODS)
