"""The runs of a study, in an order that makes a part of them useful."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    """Returns all runs once: one seed of the small model,
    main methods on the large one, further seeds, the rest."""
    every = main_first(methods)
    main = [name for name in every if name in MAIN]

    def of(models: Iterable[str], names: Iterable[str], seeds: Iterable[int]) -> Iterator[Run]:
        return (Run(m, data, name, seed) for seed in seeds for m in models for data in SETS for name in names)

    stages = [
        of((SMALL,), every, SEEDS[:1]),
        of((LARGE, ADAPTERS), main, SEEDS[:1]),
        of((SMALL,), main, SEEDS[1:]),
        of((LARGE, ADAPTERS), main, SEEDS[1:]),
        of((SMALL,), every, SEEDS[1:]),
        of((LARGE, ADAPTERS), every, SEEDS),
    ]
    return list(dict.fromkeys(run for stage in stages for run in stage))
