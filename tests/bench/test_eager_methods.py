"""The eager loops of the benchmarks: each method has one, which follows the method's formula, reads as many
losses, and learns."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_check import examples_of
from models import build
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from twins import EPS, LR, Layered, check_loop  # noqa: E402

import zokern  # noqa: E402
from benchmarks import eager_methods  # noqa: E402
from benchmarks.defaults import asking  # noqa: E402
from benchmarks.eager_methods import LOOPS, Loop  # noqa: E402
from zokern.methods import METHODS  # noqa: E402

# Wrong loops ----------------------------------------------------------------------------------------------


class Update(Loop):
    """Moves along another z than that of the losses."""

    def update(self, seed: int, *rest: Any) -> None:
        super().update(seed + 1, *rest)


class Restore(Loop):
    """Stays at theta - eps z."""

    def move(self, seed: int, scaling: float, *rest: Any) -> None:
        super().move(seed, scaling if scaling != 1 or torch.initial_seed() != seed else 0.0, *rest)


def with_(name: str, **methods: Callable[..., Any]) -> tuple[str, type[Loop]]:
    """The loop of a method, of which change(right, self, ...) takes the place of one of its own."""

    def changed(method: str, change: Callable[..., Any]) -> Callable[..., Any]:
        right = getattr(LOOPS[name], method)
        return lambda self, *of: change(right, self, *of)

    return name, type(name, (LOOPS[name],), {m: changed(m, change) for m, change in methods.items()})


def of(name: str, **values: Any) -> tuple[str, type[Loop]]:
    """The loop of a method with other numbers than it is told."""

    def made(self: Loop, *rest: Any, **options: Any) -> None:
        LOOPS[name].__init__(self, *rest, **options)
        vars(self).update(values)

    return name, type(name, (LOOPS[name],), {"__init__": made})


def then(**values: Any) -> Callable[..., Any]:
    """A method after which these have other values: functions of the loop."""

    def change(right: Callable[..., Any], self: Loop, *rest: Any) -> Any:
        found = right(self, *rest)
        vars(self).update({name: value(self) for name, value in values.items()})
        return found

    return change


def first(**values: Any) -> Callable[..., Any]:
    """A method before which these have other values."""

    def change(right: Callable[..., Any], self: Loop, *rest: Any) -> Any:
        vars(self).update({name: value(self) for name, value in values.items()})
        return right(self, *rest)

    return change


def signs(right: Callable[..., Any], self: Loop, i: int, p: Tensor) -> Tensor:
    return torch.randn_like(p).sign()


def dense(right: Callable[..., Any], self: Loop, i: int, p: Tensor) -> Tensor:
    return torch.randn_like(p)


def begun_anew(right: Callable[..., Any], self: Any, i: int, x: Tensor) -> Tensor:
    self.right[i] = torch.randn_like(self.right[i])
    return right(self, i, x)


def here(self: Loop) -> list[Tensor]:
    return [p.data for p in self.parameters]


WRONG: dict[str, tuple[str, type[Loop]]] = {
    "signs in place of normals": ("MeZO", type("MeZO", (Loop,), {"z": lambda *of: signs(signs, *of)})),
    "another z in the update": ("RLOO", type("RLOO", (Update, LOOPS["RLOO"]), {})),
    "theta is not put back": ("LOZO", type("LOZO", (Restore, LOOPS["LOZO"]), {})),
    "c in place of its sign": ("ZOSignSGD", Loop),
    "the last of three": with_("ZOConservative", update=lambda right, s, seed, c: right(s, seed, abs(c))),
    "no clip": of("DPZO", clip=1e9),
    "noise": of("DPZO", noise=1.0),
    "normals in place of signs": with_("FZOO", z=dense),
    "no radius": with_("KerZOO", radius=lambda right, s, seed: 1.0),
    "two observations": of("BSZO", observations=2),
    "noise that does not follow": with_("BSZO", step=then(average=lambda s: None)),
    "the worse draw is kept": with_("MeZOGV", ahead=lambda right, s, *rest: -right(s, *rest)),
    "all blocks at once": with_("BlockMeZO", blocks=lambda right, s: [sum(right(s), [])]),
    "more layers": of("LeZO", sparsity=0.25),
    "no momentum": ("ZOMomentum", LOOPS["MeZO"]),
    "momentum in place of Adam": ("ZOAdam", LOOPS["ZOMomentum"]),
    "a longer window": of("AdaMeZO", window=4),
    "another first moment": of("AdaMeZO", betas=(0.9, 0.9)),
    "another cone": of("ConMeZO", angle=1.2),
    "a length that is not the momentum's": with_("ConMeZO", step=then(length=lambda s: 3.0)),
    "h that stays": of("HiZOO", smooth=0.0),
    "a mask of the large ones": with_("SparseMeZO", refresh=then(mask=lambda s: [~m for m in s.mask])),
    "an anchor that moves": with_("MeZOSVRG", difference=first(anchor=here)),
    "no projection": with_("DiZO", project=lambda right, s, *rest: None),
    "a search the other way": with_("DiZO", project=first(rate=lambda s: -abs(s.rate))),
    "a search of another width": with_("DiZO", project=first(width=lambda s: 2 * s.width)),
    "no scale": with_("SubZero", z=lambda right, s, i, p: right(s, i, p) * (0.2 if i in s.basis else 1)),
    "a basis that moves": with_("TeZO", z=lambda right, s, i, p: right(s, i, p) + 0.1 * torch.randn_like(p)),
    "no correction of the moments": with_("SubZeroPlus", quotient=first(count=lambda s: 10**6)),
    "no orthogonal matrix": with_("ZOMuon", orthogonal=lambda right, s, i, x: x),
    "a power iteration that begins anew": with_("ZOMOPI", orthogonal=begun_anew),
    "a rank that is full": with_("EGGROLL", z=dense),
    "no gradient": ("Addax", Loop),
    "another share of the gradient": of("Addax", alpha=0.5),
    "a difference in place of the derivative": ("FGD", Loop),
    "all by differences": ("Hybrid", Loop),
}


def test_every_method_has_a_loop() -> None:
    assert LOOPS.keys() == METHODS.keys()


def test_a_new_loop_is_found_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a method of another name is no loop of any."""
    (tmp_path / "added.py").write_text(
        "from benchmarks.eager_methods.loop import Loop\n\nclass LOZO(Loop): ...\n\nclass Other(Loop): ...\n"
    )
    monkeypatch.setattr(eager_methods, "__path__", [*eager_methods.__path__, str(tmp_path)])
    found = eager_methods.find()
    assert found.keys() == LOOPS.keys()
    assert found["LOZO"].__module__.endswith(".added") or found["LOZO"] is LOOPS["LOZO"]


FOURTH = zokern.Stencil("fourth", (2.0, 1.0, -1.0, -2.0), (-1 / 12, 8 / 12, -8 / 12, 1 / 12))
PARTS: dict[str, dict[str, Any]] = {
    "three queries": {"queries": 3},
    "one-sided signs": {"queries": 2, "stencil": "forward", "direction": "rademacher"},
    "fourth order": {"stencil": FOURTH},
}
OTHERS: dict[str, dict[str, Any]] = {
    "three queries": {"queries": 2},
    "one-sided signs": {"rademacher": False},
    "fourth order": {"weights": (0.1, 0.3, -0.3, -0.1)},
}


@pytest.mark.parametrize("why", PARTS)
def test_a_method_of_known_parts_needs_no_loop(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loop is made of them, is held to the formula as others are, and reads as many losses."""
    added = partial(zokern.MeZO, **PARTS[why])
    monkeypatch.setattr(zokern, "Added", added, raising=False)
    monkeypatch.setitem(METHODS, "Added", added)  # type: ignore[arg-type]
    loop = eager_methods.find()["Added"]
    check_loop("Added", loop)
    check_losses("Added", loop)
    with pytest.raises(AssertionError):
        check_loop("Added", type("Added", (loop,), OTHERS[why]))


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_made_of_no_other_parts(name: str) -> None:
    assert (eager_methods.of_parts(METHODS[name]) is not None) == (name == "MeZO")


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_follows_the_formula_of_its_method(name: str) -> None:
    check_loop(name)


@pytest.mark.parametrize("why", WRONG)
def test_a_wrong_loop_is_rejected(why: str) -> None:
    name, kind = WRONG[why]
    with pytest.raises(AssertionError):
        check_loop(name, kind)


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_another_lr_is_rejected(name: str) -> None:
    with pytest.raises(AssertionError):
        check_loop(name, lr=1.5 * LR)


# Losses ---------------------------------------------------------------------------------------------------

# lr of those whose steps have another length than 0.01 times a slope
LRS = {
    "AdaMeZO": 1e-4,
    "ZOMomentum": 1e-3,
    "BSZO": 1.0,
    "MeZOGV": 3e-3,
    "KerZOO": 2e-3,
    "TeZO": 3e-4,
} | dict.fromkeys(("FZOO", "ZOSignSGD", "ZOAdam", "ZOMuon", "ZOMOPI", "SubZeroPlus"), 3e-3)
FEW: dict[str, dict[str, Any]] = {
    "DPZO": {"noise": 0.0},
    "DiZO": {"interval": 2},
    "EGGROLL": {"queries": 4},
    "SubZeroPlus": {"queries": 8},
}


def run(name: str, kind: type[Loop], steps: int, sign: int = 1, **options: Any) -> tuple[list[int], float]:
    """Trains a float32 model. Returns how many losses each step read, and how far the loss has risen."""
    torch.manual_seed(12345)
    model, counts = build(Layered), list[int]()
    named, closure = dict(model.named_parameters()), Counted(model, name, sign)
    loop = kind(list(named.values()), LRS.get(name, 1e-2), EPS, list(named), **options)
    before = closure.value()
    for step in range(steps):
        loop.step(closure, step)
        counts.append(closure.calls)
        closure.calls = 0
    return counts, closure.value() - before


class Counted:
    """A closure, or its opposite, that counts its calls."""

    def __init__(self, model: torch.nn.Module, name: str, sign: int = 1) -> None:
        self.model, self.rows, self.sign, self.calls = model, name == "DPZO", sign, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        found = self.sign * examples_of(self.model)
        return found if self.rows else found.mean()

    @torch.no_grad()
    def value(self) -> float:
        return examples_of(self.model).mean().item()


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_descends(name: str) -> None:
    """Towards a lower loss, and under the opposite loss towards a higher one."""
    steps = 40 if name == "KerZOO" else 15  # its weights are of both signs
    assert run(name, LOOPS[name], steps, **FEW.get(name, {}))[1] < -1e-3
    assert run(name, LOOPS[name], steps, sign=-1, **FEW.get(name, {}))[1] > 1e-3


def check_losses(name: str, kind: type[Loop]) -> None:
    """A loop reads as many losses in a step as its method with the same defaults.
    The first step of a method is left out: it looks at the closure too, and P-GAP's probes."""
    interval = {"interval": 2} if name == "DiZO" else {}
    model, steps, counts = build(Layered), 4, list[int]()
    optimizer, closure = METHODS[name](model, lr=1e-4, eps=EPS, **interval), Counted(model, name)
    with asking() as asked:
        for _ in range(steps):
            asked.clear()
            result = zokern.step(optimizer, closure)
            counts.append(len(asked) + (result.first_order_loss is not None))
    read, _ = run(name, kind, steps, **interval)
    assert read[1:] == counts[1:], f"{name} reads {counts[1:]} losses, and its loop {read[1:]}"


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_reads_as_many_losses_as_its_method(name: str) -> None:
    check_losses(name, LOOPS[name])


def test_a_loop_that_reads_other_losses_is_rejected() -> None:
    class Logged(LOOPS["HiZOO"]):  # type: ignore[misc]
        def step(self, closure: Any, seed: int) -> None:
            super().step(closure, seed)
            closure()  # as published

    with pytest.raises(AssertionError, match="HiZOO reads"):
        check_losses("HiZOO", Logged)
    with pytest.raises(AssertionError, match="FZOO reads"):
        check_losses(*of("FZOO", queries=7))
