"""Reports of users: read right in every evaluation, or refused by name. reports.py has the table of readings.

A case is built anew for every point of the oracle,
so nothing that a reading leaves behind can reach the next one.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ranks
import readings
import torch
import torch.nn.functional as F
from readings import WAYS, check_refusal, check_weights, clones, optimizer, write
from recipes import SLOPES
from reports import CASES, LOCAL, LOG, STACK, VARIABLE, WRITES, Case, Setup, built, line, square, swapped
from torch import Tensor, nn

import zokern

STEPS = 3  # 'auto' may choose in the first and change in the second


# The test of the table --------------------------------------------------------------------------------------


def seed_of(one: Case) -> int:
    return one.options.get("seed", 0)


def offsets_of(one: Case) -> tuple[float, float]:
    return readings.OFFSETS["forward" if one.method == "FZOO" else one.options.get("stencil", "central")]


def at(one: Case, theta: dict[str, Tensor], step: int, query: int, offset: float) -> float:
    """The loss of a new setup whose weights are theta + offset eps z."""
    setup = built(one)
    for earlier in range(step + 1):
        setup.each(earlier)
    z = readings.direction(one.method, {k: v for k, v in one.options.items() if k in ("rank", "direction")})
    write(setup.params, theta, offset * one.eps, z, seed_of(one), step, query)
    with one.around(), torch.no_grad():
        return float(setup.loss())


ORACLE: dict[tuple[str, int], Tensor] = {}


def expected(one: Case, theta: dict[str, Tensor], step: int) -> Tensor:
    """The losses of a step, a row for each query; remembered where theta does not move."""
    key = one.name, step
    if one.lr or key not in ORACLE:
        queries = one.options.get("queries", 8 if one.method == "FZOO" else 1)
        ORACLE[key] = torch.tensor(
            [[at(one, theta, step, k, offset) for offset in offsets_of(one)] for k in range(queries)],
            dtype=torch.float64,
        )
    return ORACLE[key]


def compare(one: Case, got: Tensor, want: Tensor) -> None:
    """Differences of losses as a vector over queries, and the losses."""
    rounding = one.ulps * 2.0**-24 * float(want.abs().max())
    change, right = got[:, 0] - got[:, 1], want[:, 0] - want[:, 1]
    assert right.norm() > 4 * rounding, (
        f"the case says nothing: differences {right.tolist()}, rounding {rounding:.3g}"
    )
    bound = one.tol * float(right.norm()) + rounding
    error = float((change - right).norm())
    assert error <= bound, f"differences {change.tolist()}, right {right.tolist()}; {error:.3g} > {bound:.3g}"
    if one.exact:
        error = float((got - want).abs().max())
        assert error <= bound, f"losses {got.tolist()}, right {want.tolist()}; {error:.3g} > {bound:.3g}"


def refuses(one: Case, way: str, error: Exception) -> None:
    """A refusal is right where the report allows one, or where another evaluation reads the case."""
    if one.refused is not None and re.search(one.refused, str(error)):
        assert isinstance(error, readings.REFUSALS)
        return
    if way in ("default", "auto", "master"):
        raise AssertionError(f"{way} must read {one.name!r} and refused it: {error}") from error
    check_refusal(error)


@pytest.fixture(autouse=True)
def repaired(one_thread):
    """What a wrong version left behind is not the next test's fault."""
    stdout, limit = sys.stdout, sys.getrecursionlimit()
    yield
    sys.stdout = stdout
    sys.setrecursionlimit(limit)
    os.environ.pop("ZOKERN_TEST_REPORTS", None)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.autograd.set_detect_anomaly(False)
    torch.set_autocast_enabled("cpu", False)
    torch.backends.mkldnn.enabled = True
    for backend in ("flash", "mem_efficient", "math"):
        getattr(torch.backends.cuda, f"enable_{backend}_sdp")(True)
    np.seterr(all="warn")
    LOG.setLevel(logging.NOTSET)
    LOCAL.depth, STACK[:] = 0, ["bottom"]
    VARIABLE.set("outside")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("one", CASES, ids=lambda one: one.name.replace(" ", "_"))
def test_report(one: Case, way: str) -> None:
    setup = built(one)
    start = clones(setup.params)
    written = one.name.startswith(("m28", "m42"))  # in place, what the closure writes stays
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run(one, setup, way)
            assert not one.must, f"{way} read a closure that does not repeat"
        except AssertionError:
            raise
        except Exception as error:
            if not isinstance(error, readings.REFUSALS):
                raise
            refuses(one, way, error)
    if not one.lr and "writes weights" not in one.name and not (written and way == "inplace"):
        check_weights(setup.params, start, way, 2 * STEPS)
    if not one.must:
        assert len(readings.fallbacks(caught)) <= 1, readings.fallbacks(caught)


def run(one: Case, setup: Setup, way: str) -> None:
    """Some steps, each against the oracle; the surroundings are the same after each."""
    opt = optimizer(one.method, setup.params, way, lr=one.lr, eps=one.eps, **one.options)
    with one.around():
        for step in range(STEPS):
            setup.each(step)
            theta, seen = clones(setup.params), setup.look()
            stream = torch.get_rng_state()
            result = zokern.step(opt, setup.loss)
            assert setup.look() == seen, (
                f"step {step} under {result.evaluation} left {setup.look()}, found {seen}"
            )
            assert torch.equal(stream, torch.get_rng_state()), "the step moved torch's stream"
            got = torch.tensor(result.losses, dtype=torch.float64)
            with outside(one):
                compare(one, got, expected(one, theta, step))
    if not one.lr:
        last_look(one, setup, clones(setup.params))


# That the comparison rejects --------------------------------------------------------------------------------


def altered(result: Any, losses: Any) -> Any:
    """A record with other losses."""
    return types.SimpleNamespace(losses=losses, evaluation=result.evaluation)


@pytest.mark.parametrize("one", [c for c in CASES if not c.must], ids=lambda one: one.name.replace(" ", "_"))
def test_exchanged_sides_are_rejected(one: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """No case is so flat, or its bound so wide, that the wrong sign would pass."""
    real = zokern.step

    def wrong(opt: Any, closure: Callable[[], Any]) -> Any:
        result = real(opt, closure)
        return altered(result, [sides[::-1] for sides in result.losses])

    monkeypatch.setattr(zokern, "step", wrong)
    try:
        run(one, built(one), "master")
    except AssertionError as error:
        assert "differences" in str(error), error
    except readings.REFUSALS as error:
        assert one.refused is not None and re.search(one.refused, str(error)), error
    else:
        raise AssertionError("exchanged sides pass")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "what", ["a side at theta", "a bit of a weight", "the stream", "the surroundings", "an attribute"]
)
def test_what_a_step_must_not_do_is_rejected(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = next(case for case in CASES if case.name == "m15 2 in default dtype")
    setup, real = built(one), zokern.step
    start = clones(setup.params)

    def wrong(opt: Any, closure: Callable[[], Any]) -> Any:
        result = real(opt, closure)
        if what == "a side at theta":
            with torch.no_grad():
                return altered(result, [(first, float(closure())) for first, _ in result.losses])
        if what == "a bit of a weight":
            p = next(setup.params.parameters()).data
            p[0, 0] = torch.nextafter(p[0, 0], torch.tensor(2.0))
        if what == "the stream":
            torch.rand(1)
        if what == "the surroundings":
            torch.set_default_dtype(torch.float64)
        return result

    monkeypatch.setattr(zokern, "step", wrong)
    expected_words = {
        "a side at theta": "differences",
        "a bit of a weight": "lost its bits",
        "the stream": "moved torch's stream",
    }
    if what == "an attribute":
        setup = setup._replace(look=iter(range(99)).__next__)
    with pytest.raises(AssertionError, match=expected_words.get(what, "left")):
        run(one, setup, "master")
        check_weights(setup.params, start, "master")


def test_refusals_without_a_name_are_rejected() -> None:
    """A short text, another kind of exception, and zokern's own error that does not name the way out."""
    net, _ = plain()
    with pytest.raises(ValueError) as ours:
        zokern.MeZO(net, lr=-1.0)
    for error in (
        RuntimeError(""),
        RuntimeError("no"),
        KeyError("a text that is long enough to say something"),
        ours.value,
    ):
        with pytest.raises(AssertionError):
            check_refusal(error)
    check_refusal(RuntimeError("vmap: this operation has no rule for a batch of weights"))


def outside(one: Case) -> contextlib.AbstractContextManager:
    """The oracle opens the context of its own."""
    return (
        torch.autocast("cpu", enabled=False)
        if one.around is not contextlib.nullcontext
        else contextlib.nullcontext()
    )


def last_look(one: Case, setup: Setup, theta: dict[str, Tensor]) -> None:
    """After steps that moved nothing, the model reads as a new one does."""
    with one.around(), torch.no_grad():
        now = float(setup.loss())
    right = at(one, theta, STEPS - 1, 0, 0.0)
    bound = one.ulps * 2.0**-24 * abs(right) * (1 if one.exact else 2.0**8)
    assert abs(now - right) <= bound, f"the model reads {now} afterwards, a new one {right}"


# Reports that are about more than one reading ---------------------------------------------------------------

ways = pytest.mark.parametrize("way", WAYS)


def plain(seed: int = 7, sizes: tuple[int, ...] = (8, 8, 1)) -> tuple[nn.Sequential, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return line(*sizes), torch.randn(4, sizes[0])


def said(caught: list[warnings.WarningMessage], pattern: str) -> list[str]:
    """Warnings whose text matches."""
    return [str(w.message) for w in caught if re.search(pattern, str(w.message))]


@contextlib.contextmanager
def recorded() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def test_auto_is_the_default_of_every_method() -> None:
    assert readings.defaults() == dict.fromkeys(readings.METHODS, "auto")


def one_example(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A scalar to most methods, and the losses of a batch of one example."""
    return lambda: square(net, x)().reshape(1)


@pytest.mark.parametrize("method", [method for method in readings.METHODS if method not in SLOPES])
def test_old_name_is_an_alias(method: str) -> None:
    """'walk' and 'inplace' are one evaluation under two names."""
    runs = []
    for name in ("walk", "inplace"):
        net, x = plain()
        opt = optimizer(method, net, name, lr=1e-3, eps=1e-3)
        runs.append(
            [(r.losses, r.evaluation) for r in (zokern.step(opt, one_example(net, x)) for _ in range(2))]
        )
    assert runs[0] == runs[1]


@pytest.mark.parametrize("way", ["master", "paired", "scratch", "inplace"])
def test_the_record_names_the_evaluation(way: str) -> None:
    """An evaluation that was asked for by name is the one that ran: nothing is exchanged silently."""
    net, x = plain()
    opt = optimizer("MeZO", net, way)
    assert [zokern.step(opt, square(net, x)).evaluation for _ in range(STEPS)] == [way] * STEPS


DEFAULTS = {
    "bfloat16": lambda: swapped(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "float16": lambda: swapped(torch.get_default_dtype, torch.set_default_dtype, torch.float16),
    "float64": lambda: swapped(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "meta": lambda: torch.device("meta"),
}
RECIPES: dict[str, dict[str, Any]] = {
    "MeZO": {},
    "FZOO": dict(queries=2),
    "SubZero": dict(interval=2),
    "LOZO": dict(interval=2),
    "TeZO": {},
    "PGAP": dict(interval=2, probes=2),
    "MeZO momentum": dict(rule=zokern.Momentum(0.9)),
    "MeZO Adam": dict(rule=zokern.Adam()),
    "TeZO adam": dict(rule="adam"),
}


def run_of(method: str, way: str, around: Callable[[], Any]) -> tuple[list[Any], dict[str, Tensor]]:
    """Losses and weights of a few steps. All but the model's forward is inside the context."""
    net, x = plain(sizes=(300, 300))

    def loss() -> float:
        with torch.device("cpu"), swapped(torch.get_default_dtype, torch.set_default_dtype, torch.float32):
            return net(x).square().mean()

    with around():
        opt = optimizer(method.split()[0], net, way, lr=1e-4, eps=1e-3, seed=1, **RECIPES[method])
        losses = [zokern.step(opt, loss).losses for _ in range(4)]
        opt.flush()
    return losses, clones(net)


ORDINARY: dict[tuple[str, str], Any] = {}


@ways
@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("method", RECIPES)
def test_m23_defaults_of_the_process_change_nothing(method: str, default: str, way: str) -> None:
    """Another default dtype or device around the step: the bits of the ordinary run."""
    if (method, way) not in ORDINARY:
        ORDINARY[method, way] = run_of(method, way, contextlib.nullcontext)
    losses, weights = run_of(method, way, DEFAULTS[default])
    right, moved = ORDINARY[method, way]
    assert losses == right
    assert all(torch.isfinite(w).all() and torch.equal(w, moved[name]) for name, w in weights.items())


@ways
def test_m28_flags_that_write_are_treated_alike(way: str) -> None:
    """max_norm of two layers and inplace=True: all are read right, or all are refused."""
    outcomes = {}
    for one in CASES:
        if one.name in ("m28 max_norm Embedding", "m28 max_norm EmbeddingBag", "m28 inplace relu"):
            setup = built(one)
            try:
                zokern.step(optimizer("MeZO", setup.params, way, lr=0.0, eps=one.eps), setup.loss)
                outcomes[one.name] = "read"
            except RuntimeError as error:
                assert re.search(WRITES, str(error)), error
                outcomes[one.name] = "refused"
    assert len(outcomes) == 3 and len(set(outcomes.values())) == 1, outcomes


@ways
def test_m29_a_padding_row_stays_or_is_named(way: str) -> None:
    """torch never moves a padding row; here it stays too, or a warning says that it moves."""
    emb, head = nn.Embedding(30, 8, padding_idx=0), nn.Linear(8, 2)
    net, ids = nn.ModuleList([emb, head]), torch.randint(0, 10, (8, 6))
    mask = (ids > 0).float()[..., None]
    with recorded() as caught:
        opt = optimizer("MeZO", net, way, lr=1e-2, eps=1e-3)
        for _ in range(STEPS):
            zokern.step(opt, lambda: F.cross_entropy(head((emb(ids) * mask).sum(1)), ids.sum(1) % 2))
    assert emb.weight[1:].abs().max() > 0
    assert bool((emb.weight[0] == 0).all()) or said(caught, "padding"), "the row moved without a word"


NORMS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8), True),
    "InstanceNorm": (lambda: nn.Sequential(nn.Unflatten(1, (2, 4)),
        nn.InstanceNorm1d(2, track_running_stats=True),
                                           nn.Flatten()), True),
    "no statistics": (lambda: nn.BatchNorm1d(8, track_running_stats=False), False),
    "eval mode": (lambda: nn.BatchNorm1d(8).eval(), False),
    "LayerNorm": (lambda: nn.LayerNorm(8), False),
}  # fmt: skip


@ways
@pytest.mark.parametrize("norm", NORMS)
def test_m30_statistics_that_never_move_are_named_once(norm: str, way: str) -> None:
    make, warns = NORMS[norm]
    net, x = nn.Sequential(nn.Linear(16, 8), make(), nn.ReLU(), nn.Linear(8, 4)), torch.randn(12, 16)
    with recorded() as caught:
        opt = optimizer("MeZO", net, way, lr=1e-3)
        with contextlib.suppress(*(readings.REFUSALS if way in ("paired", "scratch") else ())):
            for _ in range(STEPS):
                zokern.step(opt, square(net, x))
    found = said(caught, "(?i)statistic|update_bn")
    if opt.result is not None:  # else the evaluation has refused it by name, which the table looks at
        assert len(found) == warns and all("update_bn" in text for text in found), [
            str(w.message) for w in caught
        ]


@ways
def test_m32_13_after_a_step_the_parameters_hold_theta(way: str) -> None:
    """Whoever reads parameters without a hook sees every update;
    where updates wait, `optimizer.pending` says so."""
    from torch.nn.utils import parameters_to_vector as vector
    from torch.optim.swa_utils import AveragedModel

    net, x = plain(sizes=(32, 64, 4))
    traced, exported = torch.jit.trace(net, x), torch.export.export(net, (x,)).module()
    try:
        opt = optimizer("SubZero", net, way, lr=3e-2, rank=4, interval=100)
        average = AveragedModel(net, avg_fn=lambda old, new, n: new)
        for _ in range(4):
            zokern.step(opt, square(net, x))
    except readings.REFUSALS as error:
        assert way in ("paired", "scratch")
        return check_refusal(error)
    waits = way not in ("master", "inplace") and getattr(opt, "pending", None) is True
    with torch.no_grad():
        average.update_parameters(net)
        looks = {
            "vector": lambda: vector(net.parameters()),
            "average": lambda: vector(average.module.parameters()),
            "norm": lambda: torch.stack([p.norm() for p in net.parameters()]),
            "traced": lambda: traced(x),
            "exported": lambda: exported(x),
        }
        before = {name: look().clone() for name, look in looks.items()}
        opt.flush()
        average.update_parameters(net)
        late = [name for name, look in looks.items() if (look() - before[name]).abs().max() > 1e-6]
    assert not late or (waits and not opt.pending), f"{late} were shown old weights"


@ways
def test_m34_two_optimizers_on_one_model(way: str) -> None:
    """Each reads the other's updates, whether or not they wait."""
    found = []
    for defer in (True, False):
        net, x = plain(sizes=(32, 64, 32, 4))
        pair = [
            optimizer("SubZero", [(n, net[i].weight)], way, lr=1e-2, rank=4, interval=50, seed=1, defer=defer)
            for n, i in (("first", 0), ("second", 2))
        ]
        found.append([zokern.step(opt, square(net, x)).coefficients[0] for _ in range(4) for opt in pair])
    waited, written = (torch.tensor(c) for c in found)
    assert (waited - written).abs().max() <= 1e-3 + 1e-3 * written.abs().max(), found


# K11, several processes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def inside(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Wrap the model's first part."""

    def wrapped(net: nn.Module) -> nn.Module:
        net[0] = wrap(net[0])  # type: ignore[operator,index]
        return net

    return wrapped


def eager(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")  # type: ignore[return-value]


def checkpointed(net: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(net)


def parallel(net: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": eager,
    "parallel": parallel,
    "checkpoint": checkpointed,
    "checkpoint inside": inside(checkpointed),
    "compile inside": inside(eager),
    "compile of parallel": lambda net: eager(parallel(net)),
    "parallel of compile": lambda net: parallel(eager(net)),
    "parallel of checkpoint inside": lambda net: parallel(inside(checkpointed)(net)),
    "both inside": inside(lambda layer: eager(checkpointed(layer))),
}


def wrapped_run(
    wrap: Callable[[nn.Module], nn.Module], method: str, way: str
) -> tuple[list[Any], Any, dict[str, Any]]:
    net, x = plain(sizes=(16, 16, 2))
    net = wrap(net)
    options = dict(rank=4) if method == "SubZero" else {}
    opt = optimizer(method, net, way, lr=1e-2, eps=1e-2, seed=5, **options)
    coefficients = [zokern.step(opt, square(net, x)).coefficients[0] for _ in range(2)]
    return coefficients, optimizer(method, net, way, lr=1e-2, seed=5, **options), opt.state_dict()


@ways
@pytest.mark.parametrize("method", ["MeZO", "SubZero"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_m35_a_wrapper_never_changes_z(wrapper: str, method: str, way: str, group: None) -> None:
    """The same coefficients wrapped and plain, and the state goes from one to the other and back."""
    try:
        wrapped, opt, state = wrapped_run(WRAPPERS[wrapper], method, way)
    except readings.REFUSALS as error:
        assert way in ("paired", "scratch"), error
        return check_refusal(error)
    right, other, own = wrapped_run(lambda net: net, method, way)
    error = max(abs(a - b) for a, b in zip(wrapped, right))
    assert error <= 2e-3 * max(map(abs, right)), (wrapped, right)
    opt.load_state_dict(own)
    other.load_state_dict(state)
    assert (opt.steps, other.steps) == (2, 2)


def one_of_two(rank: int) -> list[tuple[str, float, str]]:
    """A process of two that have other batches: each way, how far the weights are apart, what was said."""
    lines = []
    for way in WAYS:
        net, _ = plain()
        net = parallel(net)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
        try:
            with recorded() as caught:
                opt = optimizer("MeZO", net, way, lr=1e-2, eps=1e-3)
                zokern.step(opt, square(net, x))
            outcome = "; ".join(str(w.message) for w in caught)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        mine = torch.cat([p.detach().flatten() for p in net.parameters()])
        both = [torch.zeros_like(mine) for _ in range(2)]
        torch.distributed.all_gather(both, mine)
        lines.append((way, float((both[0] - both[1]).abs().max()), outcome))
    return lines


def test_m36_several_processes_never_drift_silently(tmp_path: Any) -> None:
    """Two processes under DistributedDataParallel: equal weights, or a word about processes."""
    lines, _ = ranks.processes(2, one_of_two, tmp_path)
    assert [way for way, _, _ in lines] == list(WAYS), lines
    bad = [line for line in lines if line[1] > 0 and not re.search("(?i)process|rank|distributed", line[2])]
    assert not bad, bad


def test_11_a_sharded_parameter_is_trained(group: None) -> None:
    """As the plain tensor is; a loss that is a DTensor is gathered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    plain = nn.Parameter(torch.randn(4, 4))
    w = nn.Parameter(distribute_tensor(plain.data.clone(), init_device_mesh("cpu", (1,)), [Replicate()]))
    for p in (w, plain):
        zokern.step(zokern.MeZO([("w", p)], lr=0.1, evaluation="master"), lambda p=p: p.square().mean())
    assert torch.equal(w.to_local(), plain)


# The audit: state around the arithmetic ---------------------------------------------------------------------


def looks() -> dict[str, Callable[[Any, nn.Module, Tensor], Any]]:
    """Ways to look at a model or an optimizer between two steps."""
    return {
        "forward": lambda opt, net, x: net(x),
        "state_dict": lambda opt, net, x: net.state_dict(),
        "optimizer's state_dict": lambda opt, net, x: opt.state_dict(),
        "deepcopy": lambda opt, net, x: copy.deepcopy(net),
        "flush": lambda opt, net, x: opt.flush(),
        "part of it": lambda opt, net, x: net[0](x),
    }


@ways
@pytest.mark.parametrize("look", looks())
@pytest.mark.parametrize("method", ["SubZero", "LOZO", "TeZO", "PGAP"])
def test_D2_a_look_keeps_the_low_bits(method: str, look: str, way: str) -> None:
    """Steps far below bfloat16's resolution add up in the low bits. A look in between keeps them."""
    options: dict[str, Any] = dict(rank=4, lr=2e-7, eps=1e-2, rounding="residual")
    options |= dict(interval=100) if method != "TeZO" else {}
    options |= dict(probes=2) if method == "PGAP" else {}
    found = []
    for looked in (True, False):
        net, x = plain(sizes=(40, 40))
        net, x = net.bfloat16(), x.bfloat16()
        net[0].bias.requires_grad_(False)
        before = net[0].weight.detach().clone()
        try:
            opt = optimizer(method, net, way, **options)
            for step in range(6):
                zokern.step(opt, lambda net=net, x=x: net(x).float().square().mean() * 1000)
                if looked and step in (2, 4):
                    looks()[look](opt, net, x)
            opt.flush()
        except readings.REFUSALS as error:
            assert way in ("paired", "scratch"), error
            return check_refusal(error)
        low = opt.state[net[0].weight]["residual"]
        found.append(((net[0].weight - before).float(), low.clone()))
    (moved, low), (right, low_right) = found
    assert (low_right != 0).float().mean() > 0.5, (
        "the run that is not looked at has no low bits: the case says nothing"
    )
    assert (low != 0).float().mean() > 0.5, "low bits were lost"
    # A look rounds W, so later losses differ by bfloat16's rounding. At most 7 % of the weights were seen to
    # differ then, and at least 21 % where each look forgot the low bits.
    differ = float((moved != right).float().mean())
    assert differ <= 0.13, f"{differ:.0%} of the weights are elsewhere in the run that is looked at"


@ways
def test_D3_a_matrix_of_any_strides(way: str) -> None:
    """All parameters of a step move, or none."""
    a, b, c = (nn.Parameter(t) for t in (torch.randn(20, 30), torch.randn(20, 30).t(), torch.randn(7)))
    named = [("a", a), ("b", b), ("c", c)]
    start = clones(named)
    opt = optimizer("TeZO", named, way, lr=1e-3, rule="adam")
    try:
        zokern.step(opt, lambda: (a @ b).square().mean() + c.square().mean())
    except readings.REFUSALS as error:
        assert "'b'" in str(error), error
        return check_weights(named, start, way)
    opt.flush()
    assert [bool((p != start[name]).any()) for name, p in named] == [True, True, True]
    assert opt.steps == 1


MOMENTS: dict[str, dict[str, Any]] = {
    "SubZero": dict(rule=zokern.Momentum(0.9), rank=3, interval=2),
    "LOZO": dict(momentum=0.9, rank=3, interval=2),
    "PGAP": dict(rule=zokern.Momentum(0.9), rank=3, interval=2, probes=2),
}


@ways
@pytest.mark.parametrize("method", MOMENTS)
def test_D4_momentum_of_a_matrix_that_was_frozen(method: str, way: str) -> None:
    """A matrix is frozen across a refresh, and the run is saved: it goes on as the run that was not saved."""
    ends = []
    for resumed in (False, True):
        net, x = plain(sizes=(40, 40, 30))
        opt = optimizer(method, net, way, lr=1e-3, eps=1e-2, defer=False, **MOMENTS[method])
        for step in range(9):
            if step in (3, 6):
                net[0].weight.requires_grad_(step == 6)
            if step == 6 and resumed:
                state = copy.deepcopy(opt.state_dict())
                opt = optimizer(method, net, way, lr=1e-3, eps=1e-2, defer=False, **MOMENTS[method])
                opt.load_state_dict(state)
            zokern.step(opt, lambda net=net, x=x: net(x).square().mean() * 10)
        ends.append(clones(net))
    moved = (ends[0]["0.weight"] - plain(sizes=(40, 40, 30))[0][0].weight).abs().max()
    error = max(float((ends[0][name] - ends[1][name]).detach().abs().max()) for name in ends[0])
    assert error <= 1e-4 * float(moved.detach()), (
        f"{error:.3g} apart after moves of {float(moved.detach()):.3g}"
    )


@ways
@pytest.mark.parametrize("method", ["MeZO", "SubZero", "LOZO"])
def test_D5_a_perturbation_that_rounding_swallows_is_named(method: str, way: str) -> None:
    """bfloat16 rows of size 1 do not see most of eps z: a refusal, a warning, or a right difference."""
    emb, head, ids = nn.Embedding(50, 40), torch.randn(40, 4), torch.randint(0, 50, (6, 8))
    emb.weight.data = torch.randn(50, 40).bfloat16()
    options = {} if method == "MeZO" else dict(rank=4)
    eps = 3e-4

    def loss(rows: Tensor) -> Tensor:
        return (rows.mean(1) @ head.to(rows.dtype)).tanh().square().mean()

    with recorded() as caught:
        try:
            result = zokern.step(
                optimizer(method, emb, way, lr=0.0, eps=eps, **options),
                lambda: loss(F.embedding(ids, emb.weight).float()),
            )
        except (ValueError, RuntimeError) as error:
            assert re.search("(?i)eps|round", str(error)), error
            return
    if said(caught, "(?i)eps|round"):
        return
    z = readings.direction(method, options)("weight", (50, 40), 0, 0, 0)
    ahead, behind = (float(loss((emb.weight.detach().double() + a * eps * z)[ids])) for a in (1, -1))
    right = (ahead - behind) / (2 * eps)
    error = abs(result.coefficients[0] - right)
    assert error <= 0.03 * abs(right) + 1e-3, (
        f"{result.coefficients[0]} is read, {right} is right, without a word"
    )


@ways
@pytest.mark.parametrize("how", ["refused", "frozen"])
def test_D7a_low_bits_are_not_kept_for_weights_that_the_user_wrote(how: str, way: str) -> None:
    net, x = plain(sizes=(50, 50))
    net, x = net.bfloat16(), x.bfloat16()
    opt = optimizer("MeZO", net, way, lr=1e-4, eps=1e-2, rounding="residual")
    closure = lambda: net(x).float().square().mean() * 10  # noqa: E731
    for _ in range(3):
        zokern.step(opt, closure)
    w = net[0].weight
    assert (opt.state[w]["residual"] != 0).float().mean() > 0.5
    if how == "frozen":
        w.requires_grad_(False)
    with torch.no_grad():
        w.copy_(torch.randn(50, 50))
    lr = opt.param_groups[0]["lr"]
    if how == "refused":
        opt.param_groups[0]["lr"] = float("nan")
        with pytest.raises(ValueError, match="lr"):
            zokern.step(opt, closure)
    else:
        zokern.step(opt, closure)
        w.requires_grad_(True)
    opt.param_groups[0]["lr"] = 0.0
    zokern.step(opt, closure)
    opt.param_groups[0]["lr"] = lr
    low = opt.state[w]["residual"].abs()
    # there and back by arithmetic: what rounding leaves, in 2^-16 of a unit
    most = 2**9 if way == "inplace" else 0
    assert int(low.max()) <= most, f"the user's weights were given old low bits, up to {int(low.max())}"


# Frictions: what is said, and when --------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("method", ["MeZO", "SubZero", "TeZO"])
def test_4_divergence_is_named(method: str, way: str) -> None:
    """A loss that grows quickly: a RuntimeWarning about lr within 20 steps, none that blames a small eps."""
    net, x = plain(sizes=(16, 16, 1))
    with recorded() as caught:
        opt = optimizer(method, net, way, lr=3.0, eps=1e-3, max_skips=None, nonfinite="ignore")
        losses = [zokern.step(opt, lambda: (net(x) - 1).square().mean()).loss for _ in range(20)]
    assert max(v for v in losses if v == v) > 10 * losses[0], "the loss did not grow: the case says nothing"
    about = [w for w in caught if w.category is RuntimeWarning and re.search(r"\blr\b", str(w.message))]
    assert about, [str(w.message) for w in caught]
    assert not said(caught, "eps too small"), "a loss that grows does not ask for a larger eps"


def test_4_an_ordinary_run_is_not_called_divergent() -> None:
    """Noise from batch to batch, and a loss that falls, are no divergence."""
    net, _ = plain(sizes=(16, 16, 1))
    g = torch.Generator().manual_seed(3)
    with recorded() as caught:
        opt = zokern.MeZO(net, lr=1e-3, eps=1e-3)
        for _ in range(60):
            x = torch.randn(4, 16, generator=g) * torch.rand(1, generator=g)
            zokern.step(opt, lambda x=x: (net(x) - 1).square().mean())
    assert not said(caught, r"\blr\b"), said(caught, r"\blr\b")


class Wrapper:
    """What a training framework hands out: another object of the wrapped class, with `.optimizer`."""

    def __init__(self, opt: Any) -> None:
        self.__class__ = type("Wrapped" + type(opt).__name__, (Wrapper, type(opt)), {})
        self.__dict__.update({k: v for k, v in opt.__dict__.items() if k not in ("step", "result")})
        self.optimizer = opt

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        return self.optimizer.step(closure)


@ways
def test_7_a_wrapper_of_the_optimizers_own_class(way: str) -> None:
    """The result is that of the step, and the wrapped optimizer's counter moves."""
    net, x = plain()
    opt = optimizer("MeZO", net, way, lr=0.0, eps=1e-2)
    wrapper = Wrapper(opt)
    results = [zokern.step(wrapper, square(net, x)) for _ in range(2)]
    assert all(isinstance(r, zokern.StepResult) for r in results) and opt.steps == 2
    assert [r.step for r in results] == [0, 1] and opt.result is results[1]


NEAREST = {
    "momentum": "Momentum",
    "betas": "Adam",
    "epsilon": "eps",
    "querys": "queries",
    "evaluations": "evaluation",
}


@pytest.mark.parametrize("method", readings.METHODS)
@pytest.mark.parametrize("option", NEAREST)
def test_14_an_unknown_option_names_the_class_and_the_nearest(option: str, method: str) -> None:
    if option in inspect.signature(readings.METHODS[method]).parameters:
        pytest.skip(f"{method} has the option {option!r}")
    net, _ = plain()
    with pytest.raises(TypeError) as caught:
        readings.METHODS[method](net, **{option: 1})
    text = str(caught.value)
    assert method in text and repr(option) in text and NEAREST[option] in text, text
    assert "ZerothOrder" not in text, text


@ways
@pytest.mark.parametrize("what", ["backward", "accelerate", "grad"])
def test_15_m40_backward_in_the_closure(what: str, way: str) -> None:
    """One line of zokern's own: no backward here."""
    net, x = plain()
    start = clones(net)

    def closure() -> Tensor:
        loss = net(x).square().mean()
        if what == "backward":
            loss.backward()
        elif what == "accelerate":
            torch.autograd.backward([loss])
        else:
            torch.autograd.grad(loss, list(net.parameters()))
        return loss

    with pytest.raises(RuntimeError) as caught:
        zokern.step(optimizer("MeZO", net, way), closure)
    assert "backward" in str(caught.value) and re.search(
        "(?i)not need|no need|needs no|none", str(caught.value)
    )
    check_weights(net, start, way)


@ways
@pytest.mark.parametrize("graph", [True, False])
def test_16_a_loss_that_was_computed_before_the_step(graph: bool, way: str) -> None:
    net, x = plain()
    start = clones(net)
    with torch.set_grad_enabled(graph):
        loss = net(x).square().mean()
    with pytest.raises((RuntimeError, ValueError), match="before the step"):
        zokern.step(optimizer("MeZO", net, way), lambda: loss)
    check_weights(net, start, way)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pop": lambda batch: batch.pop("x"),
    "next": lambda batch: next(batch["once"]),
    "del": lambda batch: (batch["x"], batch.__delitem__("x"))[0],
}


@ways
@pytest.mark.parametrize("change", CHANGES)
def test_17_an_exception_says_which_reading_failed(change: str, way: str) -> None:
    """The second call finds the batch changed. The model's own error carries a note about it."""
    net, x = plain()
    start, batch = clones(net), {"x": x, "once": iter([x])}
    with pytest.raises((KeyError, StopIteration, RuntimeError)) as caught:
        zokern.step(optimizer("MeZO", net, way), lambda: net(CHANGES[change](batch)).square().mean())
    notes = " ".join(getattr(caught.value, "__notes__", ()))
    assert re.search(r"(?i)reading (number )?2|second (reading|time)", notes) and "batch" in notes, (
        f"{caught.value!r} with notes {notes!r}"
    )
    check_weights(net, start, way)


def test_17_the_first_reading_is_not_blamed_on_the_batch() -> None:
    net, x = plain()
    with pytest.raises(ZeroDivisionError) as caught:
        zokern.step(zokern.MeZO(net, evaluation="scratch"), lambda: net(x).sum() * (1 / 0))
    assert "batch" not in " ".join(getattr(caught.value, "__notes__", ()))


@ways
def test_18_a_step_without_closure_is_a_probe(way: str) -> None:
    """While every lr is 0 it does nothing, as torch.distributed.checkpoint expects. Else it is an error."""
    net, x = plain()
    opt = optimizer("MeZO", net, way, lr=1e-3, eps=1e-2)
    start = clones(net)
    with pytest.raises(TypeError, match="closure"):
        opt.step()
    opt.param_groups[0]["lr"] = 0.0
    assert opt.step() is None and opt.steps == 0 and opt.result is None
    check_weights(net, start, "master")
    opt.param_groups[0]["lr"] = 1e-3
    other, _ = plain()
    right = zokern.step(optimizer("MeZO", other, way, lr=1e-3, eps=1e-2), square(other, x))
    assert zokern.step(opt, square(net, x)).coefficients == right.coefficients


@pytest.mark.parametrize("method", readings.METHODS)
def test_18_distributed_checkpoint_takes_the_state(method: str) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    net, x = plain(sizes=(16, 16, 1))
    opt = readings.METHODS[method](net, lr=1e-3)
    start = clones(net)
    weights, state = get_state_dict(net, opt)
    assert set(weights) == set(start) and "param_groups" in state
    assert opt.steps == 0 and opt.param_groups[0]["lr"] == 1e-3
    check_weights(net, start, "master")
    zokern.step(opt, one_example(net, x))
    get_state_dict(net, opt)
    assert opt.steps == 1


def test_21_frozen_parameters_are_refused_when_the_optimizer_is_built() -> None:
    net, _ = plain()
    net.requires_grad_(False)
    texts = []
    for params in (net, net.parameters(), list(net.named_parameters()), [{"params": net.parameters()}]):
        with pytest.raises(ValueError, match="requires_grad") as caught:
            zokern.MeZO(params)
        texts.append(str(caught.value))
    assert not any("any more" in text for text in texts), texts


@ways
def test_22_an_eps_that_is_too_large_is_named(way: str) -> None:
    """The losses' second difference dwarfs the first: the loss of the record is not that of the model."""
    net, x = plain(sizes=(16, 32, 1))
    for eps, warns in ((1.0, True), (1e-3, False)):
        with recorded() as caught:
            opt = optimizer("MeZO", net, way, lr=0.0, eps=eps)
            for _ in range(STEPS):
                zokern.step(opt, lambda: (net(x) - 1).square().mean())
        assert bool(said(caught, r"\beps\b.*large|large.*\beps\b")) == warns, [str(w.message) for w in caught]
