"""A captured step has the bits of zokern.step: on the CPU, and as a graph that is simulated there."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from models import batch, next_token_loss, snapshot, tiny
from simulated import graphs_on_cpu, noted
from torch import Tensor, nn

import zokern
from zokern.evaluation import exchange
from zokern.plan import Plan

graphs = importlib.import_module("zokern.graph")  # zokern.graph is the function
IDS = batch()
STEPS = 20
MASTER = {"evaluation": "master"}

Made = Callable[[nn.Module, Any], Any]
CASES: dict[str, tuple[torch.dtype, Made]] = {
    "master": (torch.float32, lambda m, b: zokern.MeZO(m, lr=1e-2, backend=b, **MASTER)),
    "paired": (
        torch.float32,
        lambda m, b: zokern.MeZO(m, lr=1e-2, backend=b, evaluation="paired", weight_decay=0.1),
    ),
    "auto, stochastic": (
        torch.bfloat16,
        lambda m, b: zokern.MeZO(m, lr=1e-2, eps=1e-2, backend=b, rounding="stochastic", queries=2),
    ),
    "residual": (
        torch.bfloat16,
        lambda m, b: zokern.MeZO(m, lr=1e-2, eps=1e-2, backend=b, rounding="residual", **MASTER),
    ),
    "adam": (torch.float32, lambda m, b: zokern.ZOAdam(m, lr=1e-2, backend=b, weight_decay=0.1, **MASTER)),
    "momentum": (torch.float32, lambda m, b: zokern.ZOMomentum(m, lr=1e-2, backend=b, **MASTER)),
    "sign": (
        torch.float32,
        lambda m, b: zokern.MeZO(m, lr=1e-2, backend=b, rule=zokern.SignSgd(), weight_decay=0.1, **MASTER),
    ),
    "spread": (torch.float32, lambda m, b: zokern.FZOO(m, lr=1e-2, backend=b, **MASTER)),
    "subzero": (
        torch.float32,
        lambda m, b: zokern.SubZero(m, lr=1e-2, backend=b, defer=False, interval=8, **MASTER),
    ),
    "lozo_m": (
        torch.bfloat16,
        lambda m, b: zokern.LOZO(
            m, lr=1e-2, eps=1e-2, backend=b, defer=False, momentum=0.9, rounding="stochastic", **MASTER
        ),
    ),
    "muon": (torch.float32, lambda m, b: zokern.ZOMuon(m, lr=1e-2, backend=b, defer=False, **MASTER)),
    "subzero_plus": (
        torch.float32,
        lambda m, b: zokern.SubZeroPlus(m, lr=1e-2, queries=4, backend=b, defer=False, **MASTER),
    ),
    "hizoo": (torch.float32, lambda m, b: zokern.HiZOO(m, lr=1e-2, backend=b, **MASTER)),
    "rloo": (torch.float32, lambda m, b: zokern.RLOO(m, lr=1e-2, backend=b, **MASTER)),
    "eggroll": (
        torch.float32,
        lambda m, b: zokern.EGGROLL(m, lr=1e-2, queries=3, backend=b, defer=False, **MASTER),
    ),
    "conservative": (
        torch.bfloat16,
        lambda m, b: zokern.ZOConservative(
            m, lr=0.3, eps=1e-2, queries=2, backend=b, rounding="residual", **MASTER
        ),
    ),
    "conmezo": (
        torch.bfloat16,
        lambda m, b: zokern.ConMeZO(
            m, lr=1e-2, eps=1e-2, weight_decay=0.1, backend=b, rounding="residual", **MASTER
        ),
    ),
    "conservative, one draw": (
        torch.float32,
        lambda m, b: zokern.ZOConservative(m, lr=0.3, eps=1e-2, backend=b, **MASTER),
    ),
    "conservative, low rank": (
        torch.float32,
        lambda m, b: zokern.SubZero(
            m, lr=0.3, estimator=zokern.Conservative(), backend=b, defer=False, interval=8, **MASTER
        ),
    ),
    "pgap": (
        torch.float32,
        lambda m, b: zokern.PGAP(m, lr=1e-2, rank=4, backend=b, defer=False, interval=8, **MASTER),
    ),
    "sparse": (torch.float32, lambda m, b: zokern.SparseMeZO(m, lr=1e-2, backend=b, **MASTER)),
    "blocks": (torch.float32, lambda m, b: zokern.BlockMeZO(m, lr=1e-2, backend=b, **MASTER)),
}


def run(
    case: str, how: str, steps: int = STEPS, change: Callable[[int, Any], None] | None = None,
    plain: Collection[int] = (), broken: Collection[int] = (),
) -> tuple[dict[str, Tensor], list, int]:  # fmt: skip
    """Trains on other rows in every step, with an lr that falls. Returns weights, records and captures.

    plain   steps that zokern.step runs;  broken  steps that are taken again, because the closure raised"""
    dtype, make = CASES[case]
    torch.manual_seed(0)
    model, ids = tiny(dtype), IDS.clone()
    optimizer = make(model, noted() if how == "simulated" else None)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + step))

    raising = False

    def closure() -> Tensor:
        if raising:
            raise KeyError("a file")
        return next_token_loss(model(ids), ids)

    step: Any = lambda: zokern.step(optimizer, closure)  # noqa: E731
    graph = step if how == "step" else zokern.graph(optimizer, closure)
    records = []
    with graphs_on_cpu(optimizer) if how == "simulated" else nullcontext():
        for number in range(steps):
            ids.copy_((IDS + number) % int(IDS.max() + 1))
            if change is not None:
                change(number, optimizer)
            if raising := number in broken:
                with pytest.raises((KeyError, RuntimeError), match="a file"):
                    graph()
                raising = False
            result = step() if number in plain else graph()
            records.append((result.step, result.losses, result.coefficients, result.draws, result.skipped))
            schedule.step()
    return snapshot(model), records, 0 if how == "step" else graph.captures


def check(case: str, how: str, **options: Any) -> int:
    """Returns the captures of a run whose weights and records are those of zokern.step, to the bit."""
    weights, records, _ = run(case, "step", **options)
    found, same, captures = run(case, how, **options)
    for name, weight in weights.items():
        assert torch.equal(weight, found[name]), f"{name} is not that of zokern.step"
    for a, b in zip(records, same):
        assert a == b, f"the record of step {a[0]} is not that of zokern.step"
    return captures


@pytest.mark.parametrize("how", ["cpu", "simulated"])
@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_a_step(case: str, how: str) -> None:
    assert check(case, how) == (
        3 if case in ("subzero", "pgap", "conservative, low rank") else 1
    )  # a basis for eight steps


INTERVALS: dict[str, Callable[..., Any]] = {
    "pgap": lambda m, b, k: zokern.PGAP(
        m, lr=1e-2, rank=4, probes=2, interval=k, defer=False, backend=b, **MASTER
    ),
    "subzero": lambda m, b, k: zokern.SubZero(m, lr=1e-2, interval=k, defer=False, backend=b, **MASTER),
    "subzero_plus": lambda m, b, k: zokern.SubZeroPlus(
        m, lr=1e-2, queries=2, interval=k, defer=False, backend=b, **MASTER
    ),
    "lozo_m": lambda m, b, k: zokern.LOZO(
        m, lr=1e-2, interval=k, momentum=0.9, defer=False, backend=b, **MASTER
    ),
    "muon": lambda m, b, k: zokern.ZOMuon(m, lr=1e-2, interval=k, defer=False, backend=b, **MASTER),
    "sparse": lambda m, b, k: zokern.SparseMeZO(m, lr=1e-2, by="random", every=k, backend=b, **MASTER),
}


def check_interval(method: str, how: str, interval: int) -> None:
    """The step that runs without the graph stands before a new basis, and elsewhere."""
    made: tuple = torch.float32, lambda m, b: INTERVALS[method](m, b, interval)
    with patch.dict(CASES, {"interval": made}), patch.object(graphs, "EVERY", 4):
        check("interval", how)


@pytest.mark.parametrize("how, interval", [("cpu", 2), ("simulated", 4)])
@pytest.mark.parametrize("method", INTERVALS)
def test_bits_with_bases_that_last_some_steps(method: str, how: str, interval: int) -> None:
    check_interval(method, how, interval)


def test_a_basis_that_a_tape_does_not_rely_on_is_rejected() -> None:
    right = graphs._relied_on

    def blind(optimizer: Any) -> Any:
        with patch.object(optimizer, "factored", None):
            return right(optimizer)

    with (
        patch.object(graphs, "_relied_on", blind),
        pytest.raises((AssertionError, ValueError), match="not that of zokern.step|scalars is"),
    ):
        check_interval("pgap", "cpu", 4)


PLAIN = (6, 7, 13)  # steps that zokern.step runs, between those of the graph


@pytest.mark.parametrize(
    "case, how", [*((case, "simulated") for case in CASES), ("conmezo", "cpu"), ("subzero_plus", "cpu")]
)
def test_bits_with_plain_steps_between(case: str, how: str) -> None:
    check(case, how, plain=PLAIN)


def resumed(number: int, optimizer: Any) -> None:
    """Loads its own state, as after a run that went astray."""
    if number == 10:
        optimizer.load_state_dict(optimizer.state_dict())


def written(number: int, optimizer: Any) -> None:
    """Writes weights in the step that is captured and in one that is replayed."""
    if number in (3, 8):
        with torch.no_grad():
            optimizer.param_groups[0]["params"][1].mul_(0.75)


@pytest.mark.parametrize("case", ["residual", "conmezo"])
def test_weights_that_others_wrote_have_no_low_bits(case: str) -> None:
    check(case, "simulated", change=written)


@pytest.mark.parametrize("case", ["adam", "lozo_m", "subzero", "conmezo", "residual"])
def test_bits_after_a_state_was_loaded(case: str) -> None:
    check(case, "simulated", change=resumed, plain=PLAIN)


@pytest.mark.parametrize("broken", [2, 3, 7])  # the step that is recorded, the capture, a later one
@pytest.mark.parametrize("how", ["cpu", "simulated"])
@pytest.mark.parametrize("case", ["adam", "conmezo", "subzero_plus"])
def test_a_step_that_failed_is_taken_again(case: str, how: str, broken: int) -> None:
    """An exception of the closure loses nothing. A graph that was captured runs no closure."""
    check(case, how, broken=[] if (how, broken) == ("simulated", 7) else [broken])


BETWEEN: dict[str, tuple[str, dict[str, Any], Callable[[], Any]]] = {
    "state that another step made": (
        "conmezo", {"plain": PLAIN}, lambda: patch.object(graphs, "_held", lambda optimizer: []),
    ),
    "low bits that others overwrote": (
        "residual", {"change": written}, lambda: patch.object(graphs.Graph, "_accept", nothing),
    ),
    "counts of a step that failed": (
        "adam", {"broken": [3]}, lambda: patch.object(graphs._State, "restore", nothing),
    ),
}  # fmt: skip


def nothing(*given: Any, **options: Any) -> None:
    pass


@pytest.mark.parametrize("wrong", BETWEEN)
def test_check_rejects_a_graph_that_does_not_look(wrong: str) -> None:
    case, options, mistake = BETWEEN[wrong]
    with mistake(), pytest.raises((AssertionError, RuntimeError), match="not that of zokern.step"):
        check(case, "simulated", **options)


def changes(number: int, optimizer: Any) -> None:
    if number == 5:
        optimizer.param_groups[0]["eps"] *= 2.0
    if number == 9:
        optimizer.param_groups[0]["params"][-1].requires_grad_(False)
    if number == 14:
        optimizer.param_groups[0]["weight_decay"] = 0.1


@pytest.mark.parametrize("how", ["cpu", "simulated"])
def test_what_moves_is_captured_again(how: str) -> None:
    assert check("master", how, change=changes) == 4


def forgotten(name: str) -> Any:
    """Tape.renew without a part of it."""
    right = graphs.Tape.renew

    def renew(self: Any, step: int) -> None:
        with patch.object(self, name, type(getattr(self, name))()):
            right(self, step)

    return patch.object(graphs.Tape, "renew", renew)


WRONG: dict[str, tuple[str, Callable[[], Any]]] = {
    "the clock stands still": ("master", lambda: forgotten("clocks")),
    "the lr of the capture": ("master", lambda: forgotten("given")),
    "updates that are not counted": ("adam", lambda: forgotten("actions")),
    "state that is made anew": ("lozo_m", lambda: patch.object(graphs._State, "put_back", lambda self: None)),
    "names of the captured step": (
        "master",
        lambda: patch.object(Plan, "noise", lambda self, draws, direction=...: plain(self, draws, direction)),
    ),
}


def plain(plan: Plan, draws: Any, direction: Any) -> Any:
    return zokern.backends.Noise(plan.direction if direction is ... else direction, plan.seed, draws)


@pytest.mark.parametrize("wrong", WRONG)
def test_check_rejects_a_wrong_replay(wrong: str) -> None:
    case, mistake = WRONG[wrong]
    with mistake(), pytest.raises(AssertionError, match="not that of zokern.step"):
        check(case, "simulated")


def test_a_value_that_is_read_is_refused() -> None:
    """By a simulated capture, as on a GPU."""
    model, ids = tiny(), IDS
    optimizer = zokern.MeZO(model, backend=noted(), **MASTER)
    step = zokern.graph(optimizer, lambda: next_token_loss(model(ids), ids).item())
    with graphs_on_cpu(optimizer), pytest.raises(RuntimeError, match=r"cannot be captured.*reads a value"):
        for _ in range(4):
            step()


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "points of losses": (zokern.BSZO, "estimator Bayesian.*zokern.step"),
    "numbers of the host": (zokern.KerZOO, "estimator Kernel"),
    "layers of a step": (zokern.LeZO, "estimator Layers"),
    "a rule with numbers": (zokern.AdaMeZO, "rule WindowAdam"),
    "weights beside theta": (lambda m: zokern.MeZO(m, rule=zokern.Averaged()), "rule Averaged.*on the host"),
    "an anchor": (zokern.MeZOSVRG, "estimator Anchored"),
    "a search now and then": (zokern.DiZO, "rule Projected.*on the host"),
    "a schedule of draws": (
        lambda m: zokern.PGAP(m, rank=2, defer=False, steps=9),
        "delta falls.*steps=None",
    ),
    "evaluation": (lambda m: zokern.MeZO(m, evaluation="inplace"), "'inplace'; expected 'master'"),
    "lr by value": (lambda m: zokern.TeZO(m, rule="adam", defer=False), "rule Adam.*by value"),
    "deferred": (zokern.SubZero, "defer=False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_captured_is_refused(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        zokern.graph(make(tiny()), lambda: 0.0)


def test_dropout_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"Dropout is in train mode.*model.eval\(\)"):
        zokern.graph(zokern.MeZO(model), lambda: 0.0)
    zokern.graph(zokern.MeZO(model.eval()), lambda: 0.0)


def test_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="closure is int 3"):
        zokern.graph(zokern.MeZO(tiny()), 3)
    with pytest.raises(TypeError, match="expected a zokern optimizer"):
        zokern.graph(torch.optim.SGD(tiny().parameters()), lambda: 0.0)


# torch.compile ----------------------------------------------------------------------------------------------


def compiled_run(way: Any, how: Callable[[Any, Any], Callable[[], Any]]) -> tuple[list[Tensor], list[int]]:
    """Returns the weights after 12 steps of a compiled closure, and how often its graphs ran in each step;
    -1 where a step made one."""
    torch.compiler.reset()  # other tests' graphs count towards the limit of recompilations
    made, ran = [], []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(1)
        return lambda *args: (ran.append(1), graph.forward(*args))[1]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8)).eval()
    x = torch.empty(16, 64)
    loss = torch.compile(lambda: model(x).square().mean(), backend=backend)
    step = how(zokern.MeZO(model, lr=1e-2, evaluation=way), loss)
    counts = []
    for number in range(12):
        x.normal_(generator=torch.Generator().manual_seed(number))
        ran.clear(), made.clear()
        step()
        counts.append(-1 if made else len(ran))
    return list(model.parameters()), counts


def check_compiled(way: Any, readings: int = 2) -> None:
    weights, counts = compiled_run(way, lambda opt, loss: lambda: zokern.step(opt, loss))
    mine, again = compiled_run(way, zokern.graph)
    assert all(torch.equal(a, b) for a, b in zip(weights, mine, strict=True))
    assert counts[3:] == again[3:] == [readings] * 9, (counts, again)


@pytest.mark.parametrize("way, readings", [("master", 2), ("auto", 2), ("paired", 1)])
def test_a_compiled_closure_stays_compiled(way: str, readings: int) -> None:
    """Its graph runs at every reading of a captured step, and no step makes another."""
    if way == "paired" and not exchange.guards_see_stand_ins():
        pytest.skip(f"guards of torch {torch.__version__} do not see stand-ins, so Python runs")
    check_compiled(way, readings)


def test_a_closure_that_is_compiled_anew_is_rejected() -> None:
    class Forgets(zokern.Master):
        """An evaluation that throws compiled graphs away."""

        def losses(self, *given: Any) -> Tensor:
            torch.compiler.reset()
            return super().losses(*given)

    with pytest.raises(AssertionError, match="-1"):
        check_compiled(Forgets())
