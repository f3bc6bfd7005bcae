"""Products with perturbed weights in one kernel (csrc/linear.cpp): against float64 with the weights that
`perturb` writes, on every path."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import models
import pytest
import torch
from mutant import mutant
from recipes import METHODS
from torch import Tensor

import zokern
from zokern import backends, gemm
from zokern.backends import Batch, Noise, Sides, Span, Thin, Weight, cpu, cpu_linear
from zokern.directions import Normal, Rademacher
from zokern.gemm import library

pytestmark = pytest.mark.skipif(cpu.why_off() is not None, reason=f"no compiled kernels: {cpu.why_off()}")
ISAS = cpu.architectures() if cpu.why_off() is None else []
ON = cpu.Cpu()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEPTH, COLUMNS, BLOCK = 384, 96, 256  # of csrc/linear.cpp: a panel's depth and columns, and a block of rows
SEED, STEP = 11, 5


class Case(NamedTuple):
    """A product of several sides: two of one draw, W itself,
    one of another draw, W itself again, and one more draw."""

    m: int
    n: int
    rows: int
    dtype: torch.dtype
    direction: object
    transposed: bool = False
    first: int = 1003  # number of W's first element: no row begins with a block of the stream

    @property
    def span(self) -> Span:
        return Span(77, self.first)

    def inputs(self) -> dict:
        draw = lambda *shape: torch.randn(*shape, dtype=torch.float64).float()  # noqa: E731
        rows = [self.rows, self.rows + 3, 1, self.rows, 2, 3]
        last = draw(self.m, 9)
        bias, first = draw(self.m).to(self.dtype), draw(5, self.n) * 0.1
        return {
            "xs": [draw(r, self.n).to(self.dtype) for r in rows],
            "weight": (draw(*((self.n, self.m) if self.transposed else (self.m, self.n))) * 0.1).to(
                self.dtype
            ),
            "draws": [3, 3, -1, 8, -1, 9],
            "scales": [0.05, -0.05, 0.0, 0.03, 0.0, -0.04],
            "biases": [bias, None, draw(self.m).to(self.dtype), bias, None, None],
            "thins": [(j, first, draw(5, 7) * 0.2, last[:, 1:8]) for j in (0, 1, 4)]
            + [
                (1, first, draw(3, 5).mT * 0.2, last[:, 1:4]),
                (0, draw(390, self.n) * 0.1, draw(390, 400) * 0.1, draw(self.m, 400)),
            ],
        }


SHAPES = [
    (1, 1, 1), (7, 401, 9), (24, 16, 4), (25, DEPTH, 5), (COLUMNS + 1, DEPTH + 1, 7), (100, 30, 3),
    (2 * COLUMNS, 2 * DEPTH, 5), (25, DEPTH + 8, BLOCK + 1),
]  # fmt: skip
BATCH = 128  # of csrc/linear.cpp: columns that are made at a time where every row begins with a block
ALIGNED = [
    (1, BATCH, 1),
    (17, 2 * BATCH, 4),
    (COLUMNS + 15, 2 * DEPTH + BATCH, 3),
    (50, 40, 5),
    (25, DEPTH + 72, 2),
]


def operands(case: Case, given: dict) -> tuple[Weight, Sides, Noise]:
    thins = [Thin([j], first, middle[None], last) for j, first, middle, last in given["thins"]]
    weight = Weight(given["weight"], case.span, case.transposed, given.get("shrink", 1.0))
    noise = Noise(case.direction, SEED, [(STEP, draw) for draw in given["draws"]])
    return weight, Sides(given["xs"], given["biases"], given["scales"], thins), noise


def run(case: Case, given: dict, threads: int | None = None) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return ON.linear(*operands(case, given))
    finally:
        torch.set_num_threads(before)


def check(case: Case, found: Callable = run) -> None:
    """Every element within the rounding of its own sum,
    of the weights that perturb() writes; nothing else is written."""
    given = case.inputs()
    kept = {name: [t.clone() for t in given[name]] for name in ("xs",)} | {"weight": given["weight"].clone()}
    ys = found(case, given)
    assert torch.equal(kept["weight"], given["weight"]) and all(map(torch.equal, kept["xs"], given["xs"]))
    for j, (x, y) in enumerate(zip(given["xs"], ys)):
        (weight,), bias = [given["weight"]], given["biases"][j]
        if given["draws"][j] >= 0:
            outs = [[torch.empty_like(weight)]]
            noise = Noise(case.direction, SEED, [(STEP, given["draws"][j])])
            backends.get("reference").perturb(Batch([weight], [case.span]), noise, [given["scales"][j]], outs)
            weight = outs[0][0]
        if case.transposed:
            weight = weight.t()
        weight = weight.double() * given.get("shrink", 1.0)
        unit = 0.0 if case.dtype == torch.float32 else torch.finfo(case.dtype).eps / 2
        exact, size, rounded = x.double() @ weight.t(), x.double().abs() @ weight.abs().t(), 0.0
        for side, *factors in given["thins"]:
            if side == j:
                first, middle, last = (factor.double() for factor in factors)
                if case.dtype == torch.bfloat16:  # what is multiplied is, too
                    first, last = (factor.bfloat16().double() for factor in (first, last))
                rows = x.double() @ first.t() @ middle
                exact = exact + rows @ last.t()
                size = size + x.double().abs() @ first.abs().t() @ middle.abs() @ last.abs().t()
                if case.dtype == torch.bfloat16:
                    rounded = rounded + rows.abs() @ last.abs().t() * unit
        if bias is not None:
            exact, size = exact + bias.double(), size + bias.double().abs()
        assert y.shape == exact.shape and y.dtype == case.dtype
        small = 2.0**-25 if case.dtype == torch.float16 else 0.0  # half of its smallest number
        bound = size * 2.0**-21 + rounded + exact.abs() * unit + small
        worst = float(((y.double() - exact).abs() / bound).max())
        assert worst < 1.1, f"side {j}: {worst:.3g} times the bound"


@contextmanager
def isa_of(name: str) -> Iterator[None]:
    before = cpu.isa()
    cpu.select(name)
    try:
        yield
    finally:
        cpu.select(before)


@pytest.fixture(params=ISAS)
def isa(request) -> Iterator[None]:
    with isa_of(request.param):
        yield


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "transposed"])
@pytest.mark.parametrize("direction", [Normal(), Rademacher()], ids=["normal", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n, rows", SHAPES)
def test_equal_to_rounding(
    isa, m: int, n: int, rows: int, dtype: torch.dtype, direction, transposed: bool
) -> None:
    check(Case(m, n, rows, dtype, direction, transposed))


@pytest.mark.parametrize("direction", [Normal(), Rademacher()], ids=["normal", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n, rows", ALIGNED)
def test_equal_to_rounding_where_rows_begin_with_a_block(
    isa, m: int, n: int, rows: int, dtype: torch.dtype, direction
) -> None:
    check(Case(m, n, rows, dtype, direction, first=1024))


@pytest.mark.parametrize(
    "m, n, first",
    [(*shape[:2], 1024) for shape in ALIGNED] + [(33, 2 * BATCH, 1024 + 64), (7, 401, 0), (3, 40, 8)],
)
@pytest.mark.parametrize("direction", [Normal(), Rademacher()], ids=["normal", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weights_of_perturb_bit_for_bit(
    isa, m: int, n: int, first: int, dtype: torch.dtype, direction
) -> None:
    """Where z is made beside the product and where perturb's
    weights are given to it, the results are the same."""
    case = Case(m, n, 2, dtype, direction, first=first)
    given = case.inputs() | {"thins": []}
    weight = given["weight"]
    weight.view(-1)[:: max(1, m * n // 5)] = float("inf")
    weight.view(-1)[m * n // 2] = float("nan")
    for x, y, draw, scale, bias in zip(
        given["xs"], run(case, given), given["draws"], given["scales"], given["biases"]
    ):
        read = weight
        if draw >= 0:
            (read,) = outs = [torch.empty_like(weight)]
            noise = Noise(direction, SEED, [(STEP, draw)])
            backends.get("reference").perturb(Batch([weight], [case.span]), noise, [scale], [outs])
        (expected,) = ON.linear(Weight(read, case.span), Sides([x], [bias]))
        assert torch.equal(expected.nan_to_num(7.0), y.nan_to_num(7.0))
        assert torch.equal(expected.isnan(), y.isnan())


def wrong_draw(case: Case, given: dict) -> list[Tensor]:
    return run(case, given | {"draws": [3, 3, -1, 3, -1, 9]})


def swapped_draws(case: Case, given: dict) -> list[Tensor]:
    return run(case, given | {"draws": [3, 3, -1, 9, -1, 8]})


def wrong_sign(case: Case, given: dict) -> list[Tensor]:
    return run(case, given | {"scales": [0.05, 0.05, 0.0, 0.03, 0.0, -0.04]})


def wrong_offset(case: Case, given: dict) -> list[Tensor]:
    return run(case._replace(first=case.first + 8), given)


def wrong_bias(case: Case, given: dict) -> list[Tensor]:
    return run(case, given | {"biases": given["biases"][:1] * 6})


def wrong_thin(case: Case, given: dict) -> list[Tensor]:
    return run(
        case,
        given | {"thins": [(j, first, middle, last.roll(1, 0)) for j, first, middle, last in given["thins"]]},
    )


def wrong_middle(case: Case, given: dict) -> list[Tensor]:
    """One side's for another."""
    one, (j, first, _, last), *others = given["thins"]
    return run(case, given | {"thins": [one, (j, first, one[2], last), *others]})


def wrong_depth(case: Case, given: dict) -> list[Tensor]:
    """The last element of every sum is left out."""
    return run(
        case, given | {"xs": [torch.cat([x[:, :-1], torch.zeros_like(x[:, -1:])], 1) for x in given["xs"]]}
    )


def wrong_rounding(case: Case, given: dict) -> list[Tensor]:
    """The result is rounded before the bias is added, and again after it."""
    ys = run(case, given | {"biases": [None] * 6})
    return [y if bias is None else y + bias for y, bias in zip(ys, given["biases"])]


@pytest.mark.parametrize(
    "wrong",
    [
        wrong_draw,
        swapped_draws,
        wrong_sign,
        wrong_offset,
        wrong_bias,
        wrong_thin,
        wrong_middle,
        wrong_depth,
        wrong_rounding,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("form", ["linear", "transposed", "aligned"])
def test_wrong_products_are_rejected(wrong: Callable, form: str) -> None:
    dtype = torch.bfloat16 if wrong is wrong_rounding else torch.float32
    case = Case(COLUMNS + 1, DEPTH + 1, 7, dtype, Normal(), form == "transposed")
    if form == "aligned":
        case = case._replace(n=DEPTH + BATCH, first=1024)
    with pytest.raises(AssertionError, match="times the bound"):
        check(case, wrong)


@pytest.mark.parametrize("rank", [1, 8, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_measured_direction_is_the_one_of_the_factors(isa, dtype: torch.dtype, rank: int) -> None:
    """Rows of x pick the rows of middle products:
    what stands beside W, here zero, against U Z V^T in float64."""
    m, n = 200, 150
    first, middle, last = torch.randn(rank, n), torch.randn(rank, rank) * 1e-3, torch.randn(m, rank)
    x, weight = torch.eye(n).to(dtype), torch.zeros(m, n, dtype=dtype)
    (y,) = ON.linear(
        Weight(weight, Span(1)), Sides([x], [None], thins=[Thin([0], first, middle[None], last)])
    )
    exact = first.double().t() @ middle.double() @ last.double().t()
    cosines = [
        torch.cosine_similarity(y.double().flatten(), z.flatten(), dim=0) for z in (exact, exact.roll(1, 0))
    ]
    assert cosines[0] > 0.9999 and cosines[1] < 0.5


@pytest.mark.parametrize("wrong", [wrong_thin, wrong_middle], ids=lambda f: f.__name__)
def test_wrong_thin_products_of_bfloat16_are_rejected(isa, wrong: Callable) -> None:
    with pytest.raises(AssertionError, match="times the bound"):
        check(Case(COLUMNS + 1, DEPTH + 1, 7, torch.bfloat16, Normal()), wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shrunk_matrix(isa, dtype: torch.dtype) -> None:
    """The decay that waits with an update is W's alone."""
    case = Case(COLUMNS + 1, DEPTH + 9, 5, dtype, Normal())
    check(case, lambda case, given: run(case, given.setdefault("shrink", 0.75) and given))
    with pytest.raises(AssertionError, match="times the bound"):
        check(
            case, lambda case, given: run(case, given.setdefault("shrink", 0.75) and given | {"shrink": 1.0})
        )


def test_unrounded_weights_are_rejected() -> None:
    """In 16 bits W + scale z is rounded to W's type, as every other reading rounds it."""

    def unrounded(case: Case, given: dict) -> list[Tensor]:
        wide = given | {"weight": given["weight"].float(), "xs": [x.float() for x in given["xs"]]}
        return [y.to(case.dtype) for y in run(case, wide)]

    with pytest.raises(AssertionError, match="times the bound"):
        check(Case(COLUMNS + 1, DEPTH + 1, 7, torch.bfloat16, Normal()), unrounded)


@pytest.mark.parametrize("aligned", [False, True], ids=["", "aligned"])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_however_it_is_run(dtype: torch.dtype, transposed: bool, aligned: bool) -> None:
    """Any instruction set, any number of threads, alone or beside other sides:
    sums run over k in a fixed order."""
    case = Case(
        4 * COLUMNS + 5,
        DEPTH + (BATCH if aligned else 9),
        6,
        dtype,
        Normal(),
        transposed,
        1024 if aligned else 1003,
    )
    given = case.inputs()
    expected = run(case, given, 1)
    for threads, name in itertools.product((1, 2, 3), ISAS):
        with isa_of(name):
            assert all(map(torch.equal, expected, run(case, given, threads))), (threads, name)
    for j, y in enumerate(expected):
        alone = {name: given[name][j : j + 1] for name in ("xs", "draws", "scales", "biases")}
        alone |= {
            "weight": given["weight"],
            "thins": [(0, *factors) for side, *factors in given["thins"] if side == j],
        }
        assert torch.equal(y, run(case, alone)[0]), j
    alone = {name: given[name][:1] for name in ("draws", "scales", "biases")} | {
        "weight": given["weight"],
        "thins": [],
    }
    few, many = (run(case, alone | {"xs": [given["xs"][0][:rows]]})[0] for rows in (2, 6))
    assert torch.equal(few, many[:2])


@pytest.mark.parametrize("n, first", [(50, 1003), (2 * BATCH, 1024)])
def test_a_shard_of_rows_reads_its_own_numbers(n: int, first: int) -> None:
    case = Case(60, n, 4, torch.float32, Normal(), first=first)
    given = case.inputs()
    alone = {name: given[name][:1] for name in ("xs", "draws", "scales")} | {
        "weight": given["weight"],
        "thins": [],
        "biases": [None],
    }
    rows = alone | {"weight": given["weight"][20:]}
    whole = run(case, alone)[0]
    assert torch.equal(whole[:, 20:], run(case._replace(first=first + 20 * n), rows)[0])
    assert not torch.equal(whole[:, 20:], run(case, rows)[0])


def test_bfloat16_takes_its_pairs_the_odd_one_first() -> None:
    """The order of the processor's dot product of pairs, whether it has one or not;
    to it, numbers under 2^-126 are zero."""
    x = torch.ones(1, 4).bfloat16()
    weight = torch.tensor([[2.0**24, 0.0, 1.0, -(2.0**24)], [2.0**-130, 0.0, 0.0, 0.0]]).bfloat16()
    for name in ISAS:
        with isa_of(name):
            (y,) = ON.linear(Weight(weight, Span(0)), Sides([x], [None]))
            # from k = 0 up the first would be 0
            assert y.tolist() == [[1.0, 0.0 if cpu.pairs() else 2.0**-130]], name


def test_many_thin_products_of_one_side() -> None:
    """More rows than there are sums for at a time."""
    case = Case(30, 50, 40, torch.float32, Normal())
    given = case.inputs()
    first = given["thins"][0][1]
    thins = [Thin([0], first, torch.randn(1, 5, 7), torch.randn(30, 7)) for _ in range(6)]
    (y,) = ON.linear(Weight(given["weight"], case.span), Sides(given["xs"][:1], [None], thins=thins))
    x = given["xs"][0].double()
    exact = x @ given["weight"].double().t() + sum(
        x @ a.double().t() @ b[0].double() @ c.double().t() for _, a, b, c in thins
    )
    assert float((y - exact).abs().max() / exact.abs().max()) < 1e-6


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "fused"])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "transposed"])
def test_no_rows(transposed: bool, fused: bool) -> None:
    """An expert that no token was sent to."""
    weight = torch.randn((30, 20) if transposed else (20, 30))
    bias, x = torch.randn(20), torch.zeros(2, 0, 30)
    thin = Thin([0], torch.randn(3, 30), torch.randn(1, 3, 3), torch.randn(20, 3))
    matrix, noise = Weight(weight, Span(77, 1003), transposed), Noise(Normal(), SEED, [(STEP, 3)])
    with patch.object(library, "yields", lambda dtype: fused):
        assert gemm.fuses(backends.get("cpu"), [x], weight, transposed) == fused
        factored = gemm.factored_linear(backends.get("cpu"), matrix, Sides([x], [bias], thins=[thin]))
        dense = gemm.fused_linear(ON, matrix, Sides([x], [bias], [0.05]), noise)
    assert factored.shape == dense.shape == (0, 20)


def test_room_bounds_the_threads(monkeypatch) -> None:
    """What is short of memory multiplies some rows at a time,
    and then on fewer threads; the record's bytes say so."""
    monkeypatch.setattr(cpu_linear, "SHARED_ROWS", 20)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        one = ON.linear_bytes([100], 1)
        row = COLUMNS * 4
        assert one == ON.linear_bytes([20]) // 3
        assert ON.linear_bytes([100]) - ON.linear_bytes([40]) == 3 * 60 * row
        whole = ON.linear_bytes([60, 40])
        assert ON.linear_bytes([60, 40], whole) == whole
        assert ON.linear_bytes([60, 40], whole - 1) == whole - 3 * 50 * row  # two parts
        # three: 20 and 14 rows
        assert ON.linear_bytes([60, 40], whole - 3 * 50 * row - 1) == whole - 3 * 66 * row
        least = whole // 3 - 80 * row  # five parts, one thread
        assert ON.linear_bytes([60, 40], 1) == least and ON.linear_bytes([60, 40], 2 * least) == 2 * least
        weight, xs = torch.zeros(60, 30), [torch.zeros(2, 30, 30), torch.zeros(40, 30)]
        with patch.object(library, "yields", lambda dtype: True):
            assert gemm.fuses(backends.get("cpu"), xs, weight, room=least)
            assert not gemm.fuses(backends.get("cpu"), xs, weight, room=least - 1)
    finally:
        torch.set_num_threads(before)


def test_parts_of_the_rows_give_the_same_bits(monkeypatch) -> None:
    monkeypatch.setattr(cpu_linear, "SHARED_ROWS", 16)
    case = Case(COLUMNS + 5, 50, 40, torch.float32, Normal())
    given = case.inputs()
    arguments = operands(case, given)
    calls = []
    right = cpu_linear.module()
    monkeypatch.setattr(cpu_linear, "module", lambda: Counted(right, calls))
    expected = ON.linear(*arguments)
    assert len(calls) == 1
    found = ON.linear(*arguments, room=1)
    assert len(calls) == 1 + sum(len(x) for x in given["xs"]) // 16
    assert all(map(torch.equal, expected, found))
    broken = mutant(cpu_linear.Products, "linear", "begin * pitch", "0")
    found = broken(ON, *arguments, room=1)
    assert not all(map(torch.equal, expected, found))


class Counted:
    """The compiled module, with its products counted."""

    def __init__(self, module, calls: list) -> None:
        self.module, self.calls = module, calls

    def __getattr__(self, name: str):
        return getattr(self.module, name)

    def linear(self, *arguments) -> None:
        self.calls.append(arguments)
        self.module.linear(*arguments)


def test_left_to_tiles() -> None:
    """What the kernel does not take goes the other way."""
    weight, x, on = torch.zeros(60, 30), torch.zeros(4, 30), backends.get("cpu")
    with patch.object(library, "yields", lambda dtype: True):
        assert gemm.fuses(on, [x, x[None]], weight) and gemm.fuses(on, [x], weight.t().contiguous(), True)
        assert not gemm.fuses(on, [x], weight, True)
        assert not gemm.fuses(backends.get("reference"), [x], weight)
        assert not gemm.fuses(on, [x], weight.t().contiguous().t())
        assert not gemm.fuses(on, [x.double()], weight) and not gemm.fuses(on, [x, x.bfloat16()], weight)
        assert not gemm.fuses(on, [x[:, :29]], weight) and not gemm.fuses(on, [torch.tensor(1.0)], weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not gemm.fuses(on, [x], weight)
        seen = []
        torch.vmap(lambda one: (seen.append(gemm.fuses(on, [one], weight)), one)[1])(x[None])
        assert seen == [False]


@pytest.mark.parametrize("maker, half, pairs, expected", [
    ("AuthenticAMD", False, False, (True, True, True)), ("AuthenticAMD", True, False, (True, False, False)),
    ("AuthenticAMD", True, True, (True, True, False)), ("GenuineIntel", False, True, (False, False, False)),
    ("", False, True, (False, False, False)),
])  # fmt: skip
def test_the_choice_is_the_processor_s(
    maker: str, half: bool, pairs: bool, expected: tuple[bool, ...], monkeypatch
) -> None:
    monkeypatch.setattr(library, "maker", lambda: maker)
    monkeypatch.setattr(library, "has_onednn", library.has_onednn.__wrapped__)
    monkeypatch.setattr(library, "has_half", lambda dtype: half)
    monkeypatch.setattr(cpu, "pairs", lambda: pairs)
    assert tuple(map(library.yields, DTYPES)) == expected or cpu.isa() == "scalar"
    with isa_of("scalar"):
        assert not library.yields(torch.float32)


# In a step --------------------------------------------------------------------------------------------------

EVALUATIONS = {"scratch": zokern.Scratch, "paired": zokern.Paired}


def counted(calls: list, fused: bool) -> contextlib.ExitStack:
    """Large parameters beside the kernel, or all of them by tiles; the calls of the kernel are noted."""
    right, stack = cpu.Cpu.linear, contextlib.ExitStack()
    stack.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", "the loss did not read|rounding to nearest|the padding row")
    stack.enter_context(patch.object(library, "yields", lambda dtype: fused))
    stack.enter_context(patch("zokern.evaluation.copies.RESIDENT", 64))
    stack.enter_context(patch.object(cpu.Cpu, "linear", lambda *args: (calls.append(1), right(*args))[1]))
    return stack


def losses(make: Callable, fused: bool, evaluation: str) -> list[tuple[float, ...]]:
    model, ids = models.tiny(width=120), models.batch()
    chosen = models.at_use(EVALUATIONS[evaluation](check=False), 1 << 19)
    optimizer = make(model, lr=3e-3, eps=1e-2, weight_decay=0.5, seed=3, queries=2, evaluation=chosen)
    calls: list = []
    with counted(calls, fused):
        found = [
            zokern.step(optimizer, lambda: models.next_token_loss(model(ids), ids)).losses for _ in range(2)
        ]
    assert bool(calls) == fused
    return [pair for step in found for pair in step]


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("method", ["dense", "subzero", "lozo", "tezo"])
def test_a_step_reads_the_losses_of_tiles(method: str, evaluation: str) -> None:
    make = zokern.MeZO if method == "dense" else METHODS[method]
    both = [losses(make, fused, evaluation) for fused in (True, False)]
    for one, two in zip(*both):
        assert max(abs(a - b) / abs(a) for a, b in zip(one, two)) < 4e-6, (one, two)
        assert abs((one[0] - one[1]) - (two[0] - two[1])) < 0.02 * abs(two[0] - two[1]), (one, two)


def products_of_a_step(evaluation: str, rows: Callable = lambda x: x) -> list[tuple[float, ...]]:
    """Elements of x W^T on both sides."""
    model = models.build(lambda: torch.nn.Linear(400, 300))
    x = torch.randn(5, 400, generator=torch.Generator().manual_seed(3))
    calls: list = []
    with counted(calls, True):
        found = []
        for element in (0, 333, 1499):
            optimizer = zokern.MeZO(
                model,
                lr=0.0,
                eps=1e-2,
                evaluation=models.at_use(EVALUATIONS[evaluation](check=False), 1 << 19),
            )
            found.append(zokern.step(optimizer, lambda i=element: model(rows(x)).flatten()[i]).losses[0])
    assert calls
    return found


def test_paired_multiplies_with_the_bits_of_scratch() -> None:
    """A row's sums do not depend on the rows beside it, so joining sides changes no bit of a product."""
    scratch = products_of_a_step("scratch")
    assert products_of_a_step("paired") == scratch
    assert products_of_a_step("paired", lambda x: x + 1e-6) != scratch
