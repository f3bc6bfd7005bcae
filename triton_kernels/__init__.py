"""The verbs of csrc/elementwise.h as Triton kernels; zokern/backends/triton.py launches them. Same stems as csrc/zo."""

from . import elementwise, normal, philox, portable, rademacher, rounding

__all__ = ["elementwise", "normal", "philox", "portable", "rademacher", "rounding"]
