"""Rules: coefficients to new weights. One file each; a rule writes the parameters of a group, once a step, and keeps its own state."""

from __future__ import annotations

from .adam import Adam
from .averaged import Averaged
from .base import Rule, basis_of, check_basis, renew
from .cone import Cone
from .momentum import Momentum
from .projected import Projected
from .sgd import Sgd
from .state import START_ANEW, Keeps, check_state

__all__ = [
    "START_ANEW",
    "Adam",
    "Averaged",
    "Cone",
    "Keeps",
    "Momentum",
    "Projected",
    "Rule",
    "Sgd",
    "basis_of",
    "check_basis",
    "check_state",
    "renew",
]
