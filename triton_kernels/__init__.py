"""The verbs of csrc/elementwise.h, update.h and lowrank.h as Triton kernels; zokern/backends/triton.py
launches them. Same stems as csrc/zo."""

from . import elementwise, lowrank, normal, philox, portable, rademacher, rounding, update

__all__ = ["elementwise", "lowrank", "normal", "philox", "portable", "rademacher", "rounding", "update"]
