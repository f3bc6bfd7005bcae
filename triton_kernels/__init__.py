"""The verbs of csrc/elementwise.h, update.h, lowrank.h and linear.h as Triton kernels;
zokern/backends/triton.py launches them. Same stems as csrc/zo."""

from . import elementwise, linear, lowrank, normal, philox, portable, rademacher, rounding, update

__all__ = [
    "elementwise",
    "linear",
    "lowrank",
    "normal",
    "philox",
    "portable",
    "rademacher",
    "rounding",
    "update",
]
