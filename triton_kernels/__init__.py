"""The verbs of csrc/elementwise.h and csrc/lowrank.h as Triton kernels; zokern/backends/triton.py launches them. Same stems as csrc/zo."""

from . import elementwise, lowrank, normal, philox, portable, rademacher, rounding

__all__ = ["elementwise", "lowrank", "normal", "philox", "portable", "rademacher", "rounding"]
