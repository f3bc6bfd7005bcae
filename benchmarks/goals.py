"""Holds the aims, as data: which figure must reach what. `make bench` prints each with reached or missed."""

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
    Goal(
        "axpy_ rademacher fp32 / w += c", "axpy_ Rademacher, time over `w += c`, fp32", 1.15, at_least=False
    ),
    Goal(
        "perturb pair layer fp32 / two",
        "perturb, both signs at once over two single ones, fp32, a matrix of 1024 x 1024",
        1.5,
    ),
    Goal("perturb pair layer bf16 / two", "the same, bf16", 1.5),
    Goal("perturb pair large fp32 / two", "the same, fp32, one large tensor", 1.5),
    Goal("perturb pair large bf16 / two", "the same, bf16, one large tensor", 1.5),
    Goal(
        "MeZO scratch OPT-125M fp32 4x128 / forwards",
        "MeZO scratch over two forwards, OPT-125M fp32 4x128",
        1.15,
        at_least=False,
    ),
    Goal(
        "MeZO OPT-125M fp32 4x128 / forwards",
        "MeZO at its default over two forwards, OPT-125M fp32 4x128",
        1.05,
        at_least=False,
    ),
    Goal("MeZO OPT-125M fp32 1x32 / forwards", "the same, fp32 1x32", 1.0, at_least=False),
    Goal("MeZO OPT-125M fp32 1x4 / forwards", "the same, fp32 1x4", 0.9, at_least=False),
    Goal(
        "MeZO scratch OPT-125M bf16 1x128 / eager",
        "MeZO scratch, times as fast as the eager loop, OPT-125M bf16 1x128",
        12,
    ),
    Goal("MeZO OPT-125M bf16 1x128 / eager", "the same at its default", 12),
    Goal(
        "memory fp32 4x128 MeZO scratch 64",
        "extra peak memory of a step over weights and one forward, fp32 4x128, budget 64 MB",
        72,
        "MB",
        False,
    ),
    Goal("memory fp32 4x128 MeZO scratch 16", "the same, budget 16 MB", 24, "MB", False),
    Goal("memory bf16 1x128 MeZO scratch 64", "the same, bf16 1x128, budget 64 MB", 72, "MB", False),
    Goal(
        "SubZero OPT-125M fp32 4x128 / forwards",
        "SubZero step over two forwards, OPT-125M fp32 4x128",
        0.95,
        at_least=False,
    ),
    Goal(
        "SubZero OPT-125M fp32 1x32 / forwards",
        "SubZero step over two forwards, OPT-125M fp32 1x32",
        0.75,
        at_least=False,
    ),
    Goal(
        "SubZero OPT-125M fp32 1x4 / forwards",
        "SubZero step over two forwards, OPT-125M fp32 1x4",
        0.6,
        at_least=False,
    ),
    Goal(
        "SubZero OPT-125M bf16 1x128 / forwards",
        "SubZero step over two forwards, OPT-125M bf16 1x128",
        1.1,
        at_least=False,
    ),
    Goal(
        "LOZO OPT-125M fp32 4x128 / forwards",
        "LOZO step over two forwards, OPT-125M fp32 4x128",
        1.05,
        at_least=False,
    ),
    Goal(
        "LOZO OPT-125M fp32 1x32 / forwards",
        "LOZO step over two forwards, OPT-125M fp32 1x32",
        0.95,
        at_least=False,
    ),
    Goal(
        "LOZO OPT-125M fp32 1x4 / forwards",
        "LOZO step over two forwards, OPT-125M fp32 1x4",
        0.8,
        at_least=False,
    ),
    Goal(
        "LOZO OPT-125M bf16 1x128 / forwards",
        "LOZO step over two forwards, OPT-125M bf16 1x128",
        1.1,
        at_least=False,
    ),
    Goal(
        "PGAP OPT-125M fp32 4x128 / forwards",
        "PGAP step over two forwards, OPT-125M fp32 4x128",
        1.05,
        at_least=False,
    ),
    Goal(
        "PGAP OPT-125M fp32 1x32 / forwards",
        "PGAP step over two forwards, OPT-125M fp32 1x32",
        0.95,
        at_least=False,
    ),
    Goal(
        "PGAP OPT-125M fp32 1x4 / forwards",
        "PGAP step over two forwards, OPT-125M fp32 1x4",
        0.8,
        at_least=False,
    ),
    Goal(
        "PGAP OPT-125M bf16 1x128 / forwards",
        "PGAP step over two forwards, OPT-125M bf16 1x128",
        1.1,
        at_least=False,
    ),
    Goal(
        "MeZO paired OPT-125M fp32 4x128 / forwards",
        "MeZO paired over two forwards, OPT-125M fp32 4x128",
        1.12,
        at_least=False,
    ),
    Goal(
        "MeZO paired OPT-125M fp32 1x32 / forwards",
        "MeZO paired over two forwards, OPT-125M fp32 1x32",
        1.4,
        at_least=False,
    ),
    Goal(
        "SubZero K=8 OPT-125M fp32 1x4 / steps",
        "SubZero, 8 queries in one pass over 8 steps, OPT-125M fp32 1x4",
        0.35,
        at_least=False,
    ),
    Goal(
        "Rademacher K=8 OPT-125M fp32 1x4 / steps",
        "Rademacher, 8 queries in one pass over 8 steps, OPT-125M fp32 1x4",
        0.35,
        at_least=False,
    ),
    Goal(
        "SubZero+ K=99 Llama-narrow fp32 4x4, one pass / 100 forwards",
        "SubZero+, 99 queries in one pass over 100 bare forwards, Llama of 28 narrow layers, 4x4",
        0.35,
        at_least=False,
    ),
    Goal(
        "least of the methods OPT-125M bf16 1x128 / eager",
        "every method over its own eager loop, the least of those measured, OPT-125M bf16 1x128",
        6,
    ),
    Goal("SubZero OPT-125M bf16 1x128 / eager", "SubZero step over its eager loop, OPT-125M bf16 1x128", 4),
    Goal(
        "MeZO paired Llama-narrow fp32 1x8 / forwards",
        "host time: MeZO paired over two forwards, Llama of 28 narrow layers",
        1.1,
        at_least=False,
    ),
    Goal(
        "MeZO master Llama-narrow fp32 1x8 / forwards",
        "the same with evaluation='master'",
        1.2,
        at_least=False,
    ),
    Goal(
        "MeZO inplace Llama-narrow fp32 1x8 / forwards",
        "the same with evaluation='inplace'",
        1.15,
        at_least=False,
    ),
    Goal(
        "MeZO scratch Llama-narrow fp32 1x8 / forwards",
        "the same with evaluation='scratch'",
        2.0,
        at_least=False,
    ),
    Goal(
        "SubZero Llama-narrow fp32 1x8 / forwards",
        "host time: SubZero over two forwards, Llama of 28 narrow layers",
        1.25,
        at_least=False,
    ),
    Goal(
        "MeZO OPT-125M fp32 1x8, 24 tokens generated / forwards",
        "MeZO step over two greedy generations of 24 tokens, OPT-125M fp32",
        1.2,
        at_least=False,
    ),
    Goal(
        "memory SubZero beyond activations",
        "SubZero paired, fp32 1x128: extra beyond the doubled batch's activations",
        72,
        "MB",
        False,
    ),
)
