"""Evaluation `paired`: the losses of `scratch` from one pass of the model, per-thread state kept apart, and a way back where that cannot be."""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import models
import pytest
import torch
import torch.nn.functional as F
from models import build, changed, next_token_loss, one_thread, snapshot, tiny  # noqa: F401 (a fixture)
from mutant import mutant
from recipes import METHODS
from torch import Tensor, nn

import zokern
from zokern import matmul, products
from zokern.evaluation import copies, factors, meeting
from zokern.evaluation.plan import Point

greenlet = pytest.importorskip("greenlet")
pytestmark = pytest.mark.usefixtures("both_products")
IDS = models.batch()
DIRECTIONS: dict[str, Callable] = {
    "dense": zokern.MeZO,
    "rademacher": lambda model, **options: zokern.MeZO(model, direction="rademacher", **options),
    **{name: METHODS[name] for name in ("subzero", "subzero_adapters", "lozo", "tezo", "pgap")},
}
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6}  # relative: sums in another order; bfloat16 results, rounded anew


@contextmanager
def large(resident: int = 64, join: int | None = None) -> Iterator[None]:
    """Matrices above `resident` elements take the paths of large ones; join=0 multiplies each side's rows apart."""
    with patch.object(copies, "RESIDENT", resident), patch.object(products, "JOIN", products.JOIN if join is None else join):
        yield


def compare(
    model: nn.Module, closure: Callable, make: Callable, bound: float, paired=None, resident=64, join=None, **options
) -> zokern.StepResult:
    """One step at lr = 0, read both ways; AssertionError where a loss is not within the bound, or the sides are not told apart by it."""
    before, found = snapshot(model), []
    options = {"eps": 2e-2, "seed": 7, "lr": 0.0, "force": True, **options}
    for evaluation in ("scratch", paired or zokern.Paired(check=False)):
        with large(resident, join), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a perturbation of eps|the loss did not read")
            found.append(zokern.step(make(model, evaluation=evaluation, **options), closure))
    assert changed(model, before) == []
    apart, together = found
    assert (apart.evaluation, together.evaluation) == ("scratch", "paired")
    pairs = [(a, b) for one, two in zip(apart.losses, together.losses) for a, b in zip(one, two)]
    worst = max(abs(a - b) / abs(a) for a, b in pairs)
    difference = max(abs(a - b) / abs(a) for a, b in apart.losses)
    print(f"paired: losses within {worst:.2g} of scratch's, bound {bound:.2g}; sides differ by {difference:.2g}")
    assert worst <= bound, f"{together.losses} against {apart.losses}: {worst:.2g} apart, bound {bound:.2g}"
    assert difference > bound, f"sides differ by {difference:.2g}, too little to tell them apart"
    assert (together.unseen, together.whole) == (apart.unseen, apart.whole)
    return together


def of_architecture(name: str, dtype: torch.dtype) -> tuple[nn.Module, Callable]:
    model, inputs = build(models.ARCHITECTURES[name], dtype).train(), models.inputs(name)
    if dtype == torch.float32:
        return model, lambda: model(**inputs).loss
    return model, lambda: model(**inputs).logits.float().square().mean()  # its own loss is a bfloat16 number


WAYS = {"central_joined": {"queries": 1}, "forward_apart": {"queries": 3, "stencil": "forward", "join": 0}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["dense", "subzero", "lozo", "tezo"])
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_losses_equal_scratch(name: str, direction: str, dtype: torch.dtype, way: str) -> None:
    """Tied heads (opt, gpt2, t5) and experts (mixtral) among them; the rest of the ways on one architecture below."""
    model, closure = of_architecture(name, dtype)
    eps = 2e-2 if dtype == torch.float32 else 6e-2
    result = compare(model, closure, DIRECTIONS[direction], BOUNDS[dtype], eps=eps, **WAYS[way])
    looked_up = {n + ".weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    named = dict(model.named_parameters())
    assert {n for n in result.unpaired if "experts" not in n and named[n].dim() > 1} <= looked_up, result.unpaired


@pytest.mark.parametrize("options", [
    {"queries": 3}, {"queries": 3, "join": 0}, {"stencil": "forward"}, {"queries": 2, "stencil": "forward", "resident": 1 << 16},
    {"queries": 3, "paired": zokern.Paired(sides=2, check=False)},
    {"queries": 3, "stencil": "forward", "paired": zokern.Paired(sides=3, check=False)},
    {"paired": zokern.Paired(1 << 20, check=False)},
], ids=lambda o: "_".join(f"{k}{'' if k == 'paired' else v}" for k, v in o.items()))  # fmt: skip
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_way_equals_scratch(direction: str, options: dict) -> None:
    model, closure = of_architecture("gpt2", torch.float32)
    compare(model, closure, DIRECTIONS[direction], BOUNDS[torch.float32], **options)


def lora() -> tuple[nn.Module, Callable]:
    """Adapters away from B = 0, where a step would not see A."""
    peft = pytest.importorskip("peft")
    model = build(
        lambda: peft.get_peft_model(models.llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0))
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.linspace(-0.2, 0.2, p.numel()).view_as(p))
    inputs = models.inputs("llama")
    return model, lambda: model(**inputs).loss


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lora(direction: str) -> None:
    model, closure = lora()
    compare(model, closure, DIRECTIONS[direction], BOUNDS[torch.float32], eps=0.05, queries=2)


@pytest.mark.parametrize("direction", ["dense", "subzero", "lozo"])
def test_updates_that_wait_are_read(direction: str) -> None:
    """With weight decay and updates waiting, the sides still read theta: the losses of a run that writes at once, to rounding."""
    ends = []
    for defer in (True, False):
        model, closure = of_architecture("opt", torch.float32)
        options = {} if direction == "dense" else {"defer": defer}
        with large():
            optimizer = DIRECTIONS[direction](
                model, lr=3e-3, weight_decay=1.0, seed=2, queries=2, evaluation=zokern.Paired(check=False), eps=1e-2, **options
            )
            ends.append([zokern.step(optimizer, closure).losses for _ in range(4)])
    for one, two in zip(*ends):
        assert all(abs(a - b) <= 1e-5 * abs(a) for x, y in zip(one, two) for a, b in zip(x, y)), (one, two)
    assert abs(ends[0][0][0][0] - ends[0][3][0][0]) > 1e-3


def check_cores(direction: str, waits: bool, resting: bool) -> None:
    """The cores of each side are pending + offset eps draw, bit for bit, and those of a product the ones of its sides in order."""
    model, closure = of_architecture("opt", torch.float32)
    with large():
        optimizer = DIRECTIONS[direction](model, lr=1e-2, seed=2, queries=2, eps=1e-2, evaluation=zokern.Paired(check=False))
        zokern.step(optimizer, closure)
    if not waits:
        optimizer.flush()
    plan = optimizer.plan()
    points = [Point(0, 1.0), Point(1, 1.0), Point(0, -1.0), Point(1, -0.5)] + ([Point(1, 0.0)] if resting else [])
    made = factors.Factors(plan)
    made.prepare(points)
    group = next(group for group in plan.groups if group.matrices is not None)
    g = plan.groups.index(group)
    for i, matrix in enumerate(group.matrices):
        assert (matrix.pending is not None) == waits
        middles = []
        for side, (query, offset) in enumerate(points):
            expected = group.draws(plan, query)[i] * (offset * group.eps)
            if waits:
                expected = matrix.pending + expected
            if not waits and offset == 0.0:
                assert g not in made.middles[side]
                continue
            assert torch.equal(made.middles[side][g][i], expected)
            middles.append(expected)
        for order in ([0, 1, 2, 3], [3, 1], list(range(len(points)))):
            (part,) = made.parts(group, i, order, transposed=True)
            assert torch.equal(part.middles, torch.stack([middles[side] for side in order if side < len(middles)]))


@pytest.mark.parametrize("resting", [False, True], ids=["all_move", "one_rests"])
@pytest.mark.parametrize("waits", [False, True], ids=["written", "waiting"])
@pytest.mark.parametrize("direction", ["subzero", "tezo", "pgap"])
def test_cores_of_all_sides(direction: str, waits: bool, resting: bool) -> None:
    check_cores(direction, waits, resting)


@pytest.mark.parametrize("name, right, instead", [
    ("_prepare_cores", "zip(moving, cores.unbind(1))", "zip(moving, cores.flip(1).unbind(1))"),
    ("_prepare_cores", "(offset * group.eps)", "(abs(offset) * group.eps)"),
    ("_prepare_cores", "pending + moved", "moved"),
    ("_prepare_cores", "draws[query] *", "draws[0] *"),
    ("parts", "list(sides) == list(range(len(self.points)))", "len(sides) > 1"),
], ids=["sides turned round", "no sign", "what waits", "the draw of the first query", "sides in any order"])  # fmt: skip
def test_wrong_cores_are_rejected(name: str, right: str, instead: str) -> None:
    with patch.object(factors.Factors, name, mutant(factors.Factors, name, right, instead)), pytest.raises(AssertionError):
        check_cores("subzero", True, False)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_autocast_inside_the_closure(name: str, direction: str) -> None:
    """Products in bfloat16 of float32 weights: paired reads what scratch reads, and scratch what weights in place give."""
    model, _ = of_architecture(name, torch.float32)
    inputs = models.inputs(name)

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**inputs).logits.float().square().mean()

    compare(model, closure, DIRECTIONS[direction], BOUNDS[torch.bfloat16], eps=6e-2)
    found = []
    for evaluation in ("scratch", "walk"):
        with large():
            found.append(
                zokern.step(DIRECTIONS[direction](model, lr=0.0, eps=2e-2, seed=7, evaluation=evaluation), closure).losses[0]
            )
    assert all(abs(a - b) <= 2.0**-5 * abs(a) for a, b in zip(*found)), found


# Wrong versions -------------------------------------------------------------------------------------------------------------------


@contextmanager
def swapped_results() -> Iterator[None]:
    right = meeting.Meeting.join
    with patch.object(
        meeting.Meeting, "join", lambda self, key, use, compute: right(self, key, use, lambda uses: compute(uses)[::-1])
    ):
        yield


@contextmanager
def stale_sides() -> Iterator[None]:
    """Whoever runs reads what the first side reads, where it reads alone."""
    right = meeting.Meeting.__init__
    with patch.object(meeting.Meeting, "__init__", lambda self, select: right(self, lambda side: select(0))):
        yield


@contextmanager
def first_bias_for_all() -> Iterator[None]:
    right = copies.Copies.bias

    def bias(self, bias, side, wide):
        return right(self, bias, 0 if self.meet else side, wide)

    with patch.object(copies.Copies, "bias", bias):
        yield


@contextmanager
def one_middle_for_all() -> Iterator[None]:
    right = copies.Factors.parts

    def parts(self, group, i, sides, transposed):
        return [
            part._replace(middles=part.middles[:1].expand_as(part.middles)) for part in right(self, group, i, sides, transposed)
        ]

    with patch.object(copies.Factors, "parts", parts):
        yield


@contextmanager
def one_sign_for_all() -> Iterator[None]:
    right = products.fused_linear

    def fused(backend, xs, weight, span, direction, seed, step, draws, scales, biases, *rest):
        return right(backend, xs, weight, span, direction, seed, step, draws, scales[:1] * len(xs), biases, *rest)

    with patch.object(products, "fused_linear", fused):
        yield


@contextmanager
def one_tile_for_all() -> Iterator[None]:
    right = copies.Copies.pieces

    def pieces(self, group, i, view, span, sides, outs, residual):
        right(self, group, i, view, span, [sides[0]] * len(sides), outs, residual)

    with patch.object(copies.Copies, "pieces", pieces):
        yield


WRONG = {
    "swapped_results": (swapped_results, ("dense", "subzero", "lozo")), "stale_sides": (stale_sides, ("dense", "subzero", "lozo")),
    "first_bias_for_all": (first_bias_for_all, ("dense", "subzero")), "one_middle_for_all": (one_middle_for_all, ("subzero", "lozo")),
    "one_tile_for_all": (one_tile_for_all, ("dense",)), "one_sign_for_all": (one_sign_for_all, ("dense",)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "direction"), [(wrong, direction) for wrong, (_, found) in WRONG.items() for direction in found]
)
def test_check_rejects_wrong_meeting(wrong: str, direction: str, monkeypatch) -> None:
    if wrong.startswith("one_"):  # where z is made: in tiles by torch's products, or beside the product
        monkeypatch.setattr(matmul, "yields", lambda dtype: wrong == "one_sign_for_all")
    model, closure = of_architecture("opt", torch.float32)
    with WRONG[wrong][0](), pytest.raises(AssertionError, match="against"):
        compare(model, closure, DIRECTIONS[direction], BOUNDS[torch.float32])


# What torch keeps per thread ------------------------------------------------------------------------------------------------------

VARIABLE: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)


class Moods(nn.Module):
    """Between its products it changes everything that torch keeps per thread; each side must find its own again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(8)])
        self.seen: list[list[tuple]] = []

    def look(self) -> None:
        state = (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(), VARIABLE.get(), torch.get_rng_state().sum().item(),
        )  # fmt: skip
        self.seen[self.side()].append(state)

    def side(self) -> int:
        return SIDE.get()

    def forward(self, x: Tensor) -> Tensor:
        use = iter(self.layers)

        def layer(h: Tensor) -> Tensor:
            self.look()
            h = torch.tanh(next(use)(h))
            self.look()
            return h

        h = F.dropout(layer(x), 0.3)
        VARIABLE.set(VARIABLE.get() + 1)
        with torch.enable_grad():
            h = layer(h)
        with torch.inference_mode():
            h = layer(F.dropout(h, 0.3))
            with torch.inference_mode(False):
                h = layer(h.clone())
            h = layer(h)
        h = h.clone()
        with torch.autocast("cpu", dtype=torch.float16, cache_enabled=False):
            h = layer(h)
            with torch.autocast("cpu", enabled=False):
                h = layer(h.float())
            self.look()
        VARIABLE.set(VARIABLE.get() + 10)
        torch.manual_seed(7 + int(torch.rand(()) * 100))
        return F.dropout(layer(h.float()), 0.5).detach()


SIDE: contextvars.ContextVar[int] = contextvars.ContextVar("side", default=-1)


def moods(model: Moods, evaluation, direction: str = "dense") -> tuple[tuple, list]:
    """Losses, and what each reading saw, of a step with three queries; everything of the thread is as it was."""
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))

    def closure() -> Tensor:
        model.seen.append([])
        SIDE.set(len(model.seen) - 1)
        model.look()
        loss = model(x).square().mean()
        model.look()
        return loss

    def thread() -> tuple:
        return (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(), VARIABLE.get(), SIDE.get(), torch.get_rng_state().numpy().tobytes(),
        )  # fmt: skip

    before = thread()
    with large():
        result = zokern.step(DIRECTIONS[direction](model, lr=0.0, eps=0.05, queries=3, seed=2, evaluation=evaluation), closure)
    assert evaluation == "scratch" or (result.evaluation == "paired" and result.unpaired == ())
    if evaluation != "scratch":
        assert thread() == before, "the step left something of the thread changed"
    return result.losses, model.seen


@pytest.mark.parametrize("where", ["plain", "inference_mode", "no_grad", "autocast"])
def test_sides_keep_their_own_thread_state(where: str) -> None:
    """Modes, autocast, generators and context variables, also where the step itself runs inside of a mode."""
    outer = {
        "plain": torch.enable_grad, "inference_mode": torch.inference_mode, "no_grad": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }[where]  # fmt: skip
    found = []
    for evaluation in ("scratch", zokern.Paired(check=False)):
        model = build(Moods)
        with outer():
            found.append(contextvars.copy_context().run(moods, model, evaluation))
    (apart, first), (together, second) = found
    assert len(first) == len(second) == 6
    variables = [[state[5] for state in one] for one in second]
    assert all(v == variables[0] for v in variables), "context variables of one side reach another"
    for one, two in zip(first, second):
        assert [s[:5] + s[6:] for s in one] == [s[:5] + s[6:] for s in two], "a side did not find its own state again"
    bound = 1e-2  # some layers are 16-bit
    for a, b in zip((x for sides in apart for x in sides), (x for sides in together for x in sides)):
        assert abs(a - b) <= bound * abs(a), (apart, together)


def left_out(name: str):
    """_Thread.enter without one of the things that it puts back."""
    right = meeting._Thread.enter

    def enter(self) -> None:
        with patch.object(*name) if isinstance(name, tuple) else patch.object(torch, name, lambda *_: None):
            right(self)

    return patch.object(meeting._Thread, "enter", enter)


LEFT_OUT = {
    "grad mode": (torch._C, "_set_grad_enabled", lambda _: None), "autocast": "set_autocast_enabled", "autocast dtype": "set_autocast_dtype",
    "autocast cache": "set_autocast_cache_enabled", "dropout masks": "set_rng_state",
}  # fmt: skip


@pytest.mark.parametrize("what", LEFT_OUT)
def test_state_that_is_not_put_back_is_rejected(what: str) -> None:
    with left_out(LEFT_OUT[what]), pytest.raises((AssertionError, RuntimeError)):
        test_sides_keep_their_own_thread_state("autocast" if what == "autocast dtype" else "plain")
    torch.set_autocast_enabled("cpu", False)
    torch.set_autocast_cache_enabled(True)


@pytest.mark.parametrize("direction", ["dense", "subzero"])
def test_dropout_masks_are_shared_by_the_sides(direction: str) -> None:
    """In train mode: one mask for all readings of a step, that of scratch; another one in the next step."""
    model = tiny(dropout=0.5, width=16)
    closure = lambda: next_token_loss(model(IDS), IDS)  # noqa: E731
    compare(model, closure, DIRECTIONS[direction], BOUNDS[torch.float32], queries=2)
    masks = []

    def noting() -> Tensor:
        masks.append(F.dropout(torch.ones(64), 0.5))
        return closure()

    with large():
        optimizer = DIRECTIONS[direction](model, lr=0.0, seed=2, evaluation=zokern.Paired(check=False))
        for _ in range(2):
            zokern.step(optimizer, noting)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3]) and not torch.equal(masks[0], masks[2])
    with left_out("set_rng_state"), pytest.raises(AssertionError, match="against"):
        compare(model, closure, DIRECTIONS[direction], BOUNDS[torch.float32], queries=2)
