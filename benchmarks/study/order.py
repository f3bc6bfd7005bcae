"""The runs of a study, in an order that makes a part of them useful."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

SMALL, LARGE, ADAPTERS = "MiniLM", "SmolLM2-135M", "SmolLM2-135M LoRA"
MODELS, SETS, SEEDS = (SMALL, LARGE, ADAPTERS), ("news", "reviews"), (0, 1, 2)
BASE = "MeZO"  # what the papers compare with
MAIN = (BASE, "SubZero", "LOZO", "PGAP", "KerZOO", "FZOO", "TeZO", "ZOMuon")


class Run(NamedTuple):
    """One method on one model and set with one seed."""

    model: str
    data: str
    method: str
    seed: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Run:
        """Returns the run that a row is of."""
        return cls(*(row[field] for field in cls._fields))

    def __str__(self) -> str:
        return f"{self.method} on {self.model}, {self.data}, seed {self.seed}"


def main_first(methods: Iterable[str]) -> list[str]:
    """Returns the methods, MAIN before the others."""
    found = list(methods)
    return [name for name in MAIN if name in found] + [name for name in found if name not in MAIN]


def order(methods: Iterable[str]) -> list[Run]:
    """Returns all runs once: one seed of the small model, then of the large one, then further seeds.

    The large model has the main methods alone: with all of them a study takes 20 hours of a core more."""
    every = main_first(methods)
    main = [name for name in every if name in MAIN]

    def of(models: Iterable[str], names: Iterable[str], seeds: Iterable[int]) -> list[Run]:
        return [Run(m, data, name, seed) for seed in seeds for m in models for data in SETS for name in names]

    return [
        run
        for seeds in (SEEDS[:1], SEEDS[1:])
        for run in (*of((SMALL,), every, seeds), *of((LARGE, ADAPTERS), main, seeds))
    ]
