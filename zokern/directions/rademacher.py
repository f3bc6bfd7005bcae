"""Direction ``rademacher``: independent signs, 128 a Philox block.
The definition of csrc/zo/rademacher.h, in PyTorch.

Element i is -1 where bit i mod 32 of word (i mod 128) div 32 of block i div 128 is set, +1 elsewhere. Spall
1992.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Rademacher:
    """Draws every element of z as +1 or -1 with probability 1/2 each, independently; E[z z^T] = I and z^2
    = 1.

    It has no arguments. z is float32, and a function of (seed, name, step, query, element) alone:
    docs/stream.md. Salmon et al. 2011 (Philox); Dang et al. 2026 (FZOO's signs)."""

    name = "rademacher"
    per_block = 128

    def values(self, words: Tensor) -> Tensor:
        """int64[n, 4] words to float32[n, 128] values."""
        bit = torch.arange(32, dtype=torch.int64, device=words.device)
        return (1 - 2 * (words.unsqueeze(-1) >> bit & 1)).float().flatten(-2)
