"""Rules: coefficients to new weights. One file each; a rule writes the parameters of a group, once a step, and keeps its own state."""

from __future__ import annotations

from .adam import Adam
from .base import Rule, basis_of, check_basis, renew
from .momentum import Momentum
from .sgd import Sgd

__all__ = ["Adam", "Momentum", "Rule", "Sgd", "basis_of", "check_basis", "renew"]
