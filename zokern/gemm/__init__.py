"""Matrix products with perturbed weights, which are never written.

linear   y_j = x_j (W + a_j z_j)^T + b_j, j = 1 .. sides
         fused    one kernel of ours makes z beside the product, for the rows of all sides
         tiled    dense z: a tile of W + a z at a time, both signs of a z from one read of W and one
                  evaluation of the generator
         lowrank  factored z: x (shrink W + left right^T)^T, one product for the rows of all sides and two
                  thin ones beside it
sketch   Y = (sum_k c_k z_k) Omega, or its transpose's, a tile of rows at a time: no m x n buffer
library  x W^T by the fastest product that torch ships; all but the fused products end there
"""

from .fused import fused_linear, fuses, own
from .lowrank import JOIN, MANY, factored_linear, is_long
from .rows import counts_of
from .sketch import sketch_of
from .tiled import tiled_linear

__all__ = [
    "JOIN",
    "MANY",
    "counts_of",
    "factored_linear",
    "fused_linear",
    "fuses",
    "is_long",
    "own",
    "sketch_of",
    "tiled_linear",
]
