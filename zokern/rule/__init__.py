"""Rules: coefficients to new weights. One file each; a rule writes the parameters of a group, once a step,
and keeps its own state."""

from __future__ import annotations

from .adam import Adam
from .averaged import Averaged
from .base import Rule, basis_of, check_basis, check_scaled, renew
from .cone import Cone
from .momentum import Momentum
from .muon import Muon
from .projected import Projected
from .sgd import Sgd
from .sign import SignSgd
from .state import START_ANEW, Keeps, check_state
from .window import WindowAdam, WindowMomentum

__all__ = [
    "Adam", "Averaged", "Cone", "Keeps", "Momentum", "Muon", "Projected", "Rule", "START_ANEW", "Sgd",
    "SignSgd", "WindowAdam", "WindowMomentum", "basis_of", "check_basis", "check_scaled", "check_state",
    "renew",
]  # fmt: skip
