"""The goals, as data: which measured ratio must reach what. `make bench` prints each with reached or not reached."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
OVERHEAD = 8 * MIB  # bytes a step may take beside its scratch budget


@dataclass(frozen=True)
class Goal:
    key: str  # of the figure that a group records
    what: str
    bound: float
    unit: str = "x"
    at_least: bool = True

    def reached(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


GOALS = (
    Goal("axpy_ normal fp32 / eager", "axpy_ Normal over the eager MeZO perturb, fp32, one large tensor", 24),
    Goal("axpy_ normal bf16 / eager", "axpy_ Normal over the eager MeZO perturb, bf16, one large tensor", 26),
    Goal("axpy_ list fp32 / eager", "axpy_ Normal over the eager loop, fp32, 500 tensors of 4096", 8),
    Goal("axpy_ list bf16 / eager", "axpy_ Normal over the eager loop, bf16, 500 tensors of 4096", 8),
    Goal("axpy_ rademacher fp32 / w += c", "axpy_ Rademacher, time over `w += c`, fp32", 1.15, at_least=False),
    Goal("perturb pair fp32 / two", "perturb, both signs at once over two single ones, fp32", 1.5),
    Goal("perturb pair bf16 / two", "perturb, both signs at once over two single ones, bf16", 1.5),
    Goal("step fp32 4x128 / forwards", "MeZO step, OPT-125M fp32 4x128, time over its two forwards", 1.15, at_least=False),
    Goal("step bf16 1x128 / eager", "MeZO step over the eager loop's, OPT-125M bf16 1x128", 12),
    Goal(
        "memory fp32 64 MB",
        "extra peak memory of a step over weights and one forward, fp32 4x128, budget 64 MB",
        72,
        "MB",
        False,
    ),
    Goal("memory fp32 16 MB", "the same, budget 16 MB", 24, "MB", False),
    Goal("memory bf16 64 MB", "the same, bf16 1x128, budget 64 MB", 72, "MB", False),
)
