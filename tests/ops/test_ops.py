"""Public operations: what they accept, what they refuse, and their registration with torch.library.

Equality of the values over backends is the business of tests/support/conformance.py.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from guarded import GUARD, filled, guarded
from models import same_bits

import zokern
from zokern.stream import parameter_id

INF, NAN = float("inf"), float("nan")


def theta(n: int = 50, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.linspace(-1, 1, n).to(dtype)


# Registration -----------------------------------------------------------------------------------------------


def two(dtype: torch.dtype, rounding: str, backend: str) -> dict:
    tensors = [theta(33, dtype), theta(64, dtype).view(8, 8).t()]
    low = (
        [torch.arange(t.numel(), dtype=torch.int16).view(t.shape) for t in tensors]
        if rounding == "residual"
        else []
    )
    return dict(
        tensors=tensors, who=[1, 2], first=[0, 7], rounding=rounding, residuals=low, backend=backend, seed=-5
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, "nearest"), (torch.float16, "stochastic"), (torch.bfloat16, "residual")],
)
def test_axpy_passes_opcheck(dtype: torch.dtype, rounding: str, backend: str) -> None:
    terms = dict(direction="normal", steps=[3, 3], draws=[0, 1], coeffs=torch.tensor([0.1, -0.2]), clock=None)
    for decay, each in (([0.9], 0), ([0.9, 0.8], 1)):
        given = two(dtype, rounding, backend) | terms | dict(decay=decay, each=each)
        torch.library.opcheck(torch.ops.zokern.axpy_, (), given)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("dtype", "to"), [(torch.float32, None), (torch.bfloat16, None), (torch.float16, torch.float32)]
)
def test_perturb_passes_opcheck(dtype: torch.dtype, to: torch.dtype | None, backend: str) -> None:
    given = two(dtype, "nearest", backend) | dict(
        direction="rademacher", step=3, draw=1, scales=[1e-3, -1e-3], dtype=to, clock=None
    )
    del given["rounding"]
    torch.library.opcheck(torch.ops.zokern.perturb, (), given)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, "nearest"), (torch.float16, "stochastic"), (torch.bfloat16, "residual")],
)
def test_lowrank_passes_opcheck(dtype: torch.dtype, rounding: str, backend: str) -> None:
    left, right = [theta(12).view(6, 2), theta(24).view(8, 3)], [theta(20).view(10, 2), theta(27).view(9, 3)]
    given = two(dtype, rounding, backend) | dict(left=left, right=right, scale=[0.1, -2.0], decay=0.9, step=3)
    torch.library.opcheck(torch.ops.zokern.lowrank_, (), given)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_products_pass_opcheck(backend: str) -> None:
    w, x, b = theta(60).view(10, 6), theta(18).view(3, 6), theta(10)
    factors = [theta(20).view(10, 2), theta(12).view(6, 2), theta(4).view(2, 2)]
    given = dict(
        xs=[x] * 3,
        weight=w,
        direction="normal",
        scales=[0.5, -0.5, 0.0],
        seed=3,
        who=5,
        step=1,
        draw=0,
        bias=b,
        first=0,
    )
    for thin in ([], factors):
        rest = dict(factors=thin, residual=None, tile=24, backend=backend)
        torch.library.opcheck(torch.ops.zokern.linear, (), given | rest)
    given = dict(
        direction="normal",
        shape=[10, 6],
        omega=theta(12).view(6, 2),
        seed=3,
        who=5,
        steps=[0, 1],
        draws=[0, 2],
    )
    rest = dict(coeffs=[0.5, 2.0], transposed=False, first=0, tile=24, backend=backend)
    torch.library.opcheck(torch.ops.zokern.sketch, (), given | rest)
    drawn = dict(
        out=theta(), direction="normal", seed=3, who=5, step=1, draw=0, first=0, clock=None, backend=backend
    )
    torch.library.opcheck(torch.ops.zokern.draw_, (), drawn)
    words = dict(counter=torch.ones(3, 4, dtype=torch.int64), key=[1, 2], rounds=10, backend=backend)
    torch.library.opcheck(torch.ops.zokern.philox4x32, (), words)


# Products ---------------------------------------------------------------------------------------------------


def problem(dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(1)
    w, b = torch.randn(70, 50, generator=g).to(dtype), torch.randn(70, generator=g).to(dtype)
    return w, b, [torch.randn(3, 4, 50, generator=g).to(dtype), torch.randn(5, 50, generator=g).to(dtype)]


def check_linear(call, direction, bound: float = 1e-5, dtype: torch.dtype = torch.float32) -> None:
    """call(xs, w, scales, bias) against the matrices that it stands for, in float64."""
    w, b, xs = problem(dtype)
    kept, scales = w.clone(), (0.01, -0.01)
    got = call(xs, w, scales, b)
    for x, scale, y in zip(xs, scales, got):
        z = direction(w.shape)
        right = x.double() @ (kept.double() + scale * z.double()).T + b.double()
        assert y.dtype == dtype and y.shape == (*x.shape[:-1], 70)
        assert (y.double() - right).abs().max() <= bound * right.abs().max()
    assert same_bits(w, kept)


DENSE = {"seed": 3, "who": "w", "step": 7, "draw": 2}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("tile", [1, 777, 1 << 21])
def test_linear_reads_perturbed_weights(dtype: torch.dtype, bound: float, tile: int) -> None:
    def dense(shape):
        return zokern.draw("normal", shape, **DENSE)

    def call(xs, w, scales, b):
        return zokern.linear(xs, w, scales=scales, bias=b, tile=tile, **DENSE)

    check_linear(call, dense, bound, dtype)


def factors(shape) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(2)
    return tuple(torch.randn(*size, generator=g) for size in ((shape[0], 3), (shape[1], 3), (3, 3)))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_linear_reads_factored_weights(dtype: torch.dtype, bound: float) -> None:
    def low_rank(shape):
        u, v, c = factors(shape)
        return u @ c @ v.T

    check_linear(
        lambda xs, w, scales, b: zokern.linear(xs, w, factors(w.shape), scales=scales, bias=b),
        low_rank,
        bound,
        dtype,
    )


WRONG_LINEAR = {
    "the same sign twice": lambda xs, w, s, b: zokern.linear(xs, w, scales=(s[0], s[0]), bias=b, **DENSE),
    "no bias": lambda xs, w, s, b: zokern.linear(xs, w, scales=s, **DENSE),
    "another draw": lambda xs, w, s, b: zokern.linear(xs, w, scales=s, bias=b, **{**DENSE, "draw": 0}),
    "a shard's numbers": lambda xs, w, s, b: zokern.linear(xs, w, scales=s, bias=b, first=50, **DENSE),
    "writes W": lambda xs, w, s, b: (zokern.linear(xs, w, scales=s, bias=b, **DENSE), w.add_(1e-3))[0],
}


@pytest.mark.parametrize("wrong", WRONG_LINEAR)
def test_linear_check_rejects(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_linear(WRONG_LINEAR[wrong], lambda shape: zokern.draw("normal", shape, **DENSE))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", [1, 333, 1 << 20])
def test_sketch(transposed: bool, tile: int) -> None:
    g, draws, coeffs = torch.zeros(40, 30), [(0, 0), (5, 1)], [0.5, -2.0]
    zokern.axpy_(g, "normal", seed=1, who="w", draws=draws, coeffs=coeffs, first=7)
    omega = torch.randn(40 if transposed else 30, 4, generator=torch.Generator().manual_seed(3))
    right = (g.T if transposed else g).double() @ omega.double()

    def error(**options) -> float:
        given = (
            dict(seed=1, who="w", draws=draws, coeffs=coeffs, first=7, transposed=transposed, tile=tile)
            | options
        )
        return float(
            (zokern.sketch("normal", (40, 30), omega, **given).double() - right).abs().max()
            / right.abs().max()
        )

    assert error() < 1e-6
    assert error(first=0) > 0.1 and error(coeffs=[0.5, 2.0]) > 0.1 and error(draws=[(0, 0), (5, 0)]) > 0.1


BAD_PRODUCTS = [
    (lambda w, b, x: zokern.linear(x, w, scales=()), "expected a finite scale"),
    (lambda w, b, x: zokern.linear(x, w, scales=(NAN, 1.0)), "expected finite scales"),
    (lambda w, b, x: zokern.linear(x, w.t(), scales=(1.0, 1.0)), "expected a contiguous matrix"),
    (lambda w, b, x: zokern.linear(x[0].double(), w, scales=(1.0,)), r"xs\[0\] is torch.float64"),
    (lambda w, b, x: zokern.linear(x, w, scales=(1.0, 1.0), bias=b[:3]), "bias is"),
    (
        lambda w, b, x: zokern.linear(x, w, (torch.ones(3, 2), torch.ones(50, 2)), scales=(1.0, 1.0)),
        r"U is torch.float32\[3, 2\]",
    ),
    (lambda w, b, x: zokern.linear(x, w, (torch.ones(70, 2),), scales=(1.0, 1.0)), "has 1 factors"),
    (lambda w, b, x: zokern.linear(x, w, scales=(1.0, 1.0), tile=0), "tile is 0"),
    (
        lambda w, b, x: zokern.sketch(
            "normal", (4, 5), torch.ones(4, 2), seed=0, who="w", draws=[(0, 0)], coeffs=[1.0]
        ),
        "omega is",
    ),
    (
        lambda w, b, x: zokern.sketch(
            "normal", (4, 5), torch.ones(5, 2), seed=0, who="w", draws=[], coeffs=[]
        ),
        "0 draws",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD_PRODUCTS)
def test_products_refuse(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*problem())


def test_opcheck_rejects_an_undeclared_write() -> None:
    @torch.library.custom_op("zokern_test::undeclared", mutates_args=())
    def undeclared(x: torch.Tensor) -> torch.Tensor:
        zokern.axpy_(x, "normal", seed=1, who=1, draws=[(0, 0)], coeffs=[1.0])
        return x.clone()

    @undeclared.register_fake
    def _(x):
        return torch.empty_like(x)

    with pytest.raises(Exception, match="mutat|schema"):
        torch.library.opcheck(undeclared, (theta(),))


# Meaning ----------------------------------------------------------------------------------------------------


def test_clock_is_added_to_the_step() -> None:
    """In all three verbs, eagerly and as registered operations; a clock that is no int64[1] is refused."""
    clock, names = torch.tensor([4]), dict(seed=3, who="w")
    right = zokern.draw("normal", (7, 9), step=6, **names)
    assert torch.equal(zokern.draw("normal", (7, 9), step=2, clock=clock, **names), right)
    sum = torch.zeros(7, 9)
    zokern.axpy_(sum, "normal", draws=[(2, 0)], coeffs=[1.0], clock=clock, **names)
    assert torch.equal(sum, right)
    ((plus,), _) = zokern.perturb(
        torch.zeros(7, 9), "normal", step=2, scales=(1.0, -1.0), clock=clock, **names
    )
    assert torch.equal(plus, right)
    again, who = torch.zeros(7, 9), zokern.stream.parameter_id("w")
    torch.ops.zokern.axpy_(
        [again], "normal", 3, [who], [2], [0], torch.ones(1), [1.0], [0], "nearest", [], 0, clock, "reference"
    )
    assert torch.equal(again, right)
    for wrong in (torch.tensor([4.0]), torch.tensor([4, 5])):
        with pytest.raises(ValueError, match="clock .* expected int64"):
            zokern.perturb(torch.zeros(3), "normal", step=2, clock=wrong, **names)


@pytest.mark.parametrize("direction", ["normal", "rademacher"])
def test_draw_is_what_axpy_adds_and_perturb_shows(direction: str) -> None:
    z = zokern.draw(direction, (7, 9), seed=3, who="w", step=2, draw=1)
    assert z.shape == (7, 9) and z.dtype == torch.float32 and z.is_contiguous()
    weight = torch.zeros(7, 9)
    count = zokern.axpy_(weight, direction, seed=3, who="w", draws=[(2, 1)], coeffs=[1.0])
    assert same_bits(weight, z) and count.tolist() == [0]
    plus, minus = zokern.perturb(
        [torch.zeros(7, 9)], direction, seed=3, who="w", step=2, draw=1, scales=(1.0, -1.0)
    )
    assert torch.equal(plus[0], z) and torch.equal(minus[0], -z)
    assert same_bits(
        z, zokern.draw(direction, (63,), seed=3, who=parameter_id("w"), step=2, draw=1).view(7, 9)
    )
    assert same_bits(
        z.half(), zokern.draw(direction, (7, 9), seed=3, who="w", step=2, draw=1, dtype=torch.float16)
    )


NAMES = {"direction": "normal", "seed": 3, "step": 2, "draw": 1}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True)]
)
def test_out_is_written_whole(dtype: torch.dtype, wide: bool, backend: str) -> None:
    """The bits of the call without `out`, in poisoned tensors that begin anywhere,
    and no byte beside them."""
    kind = torch.float32 if wide else dtype
    shapes, calls = [(7, 9), (130,), (0,)], NAMES | {"backend": backend}
    tensors, who = [theta(math.prod(shape), dtype).view(shape) for shape in shapes], ["a", "b", "c"]
    for scales in ((1e-2, -1e-2), (0.5,)):
        right = zokern.perturb(tensors, who=who, scales=scales, dtype=kind, **calls)
        poisoned = [[guarded(shape, kind, offset=2 + j) for shape in shapes] for j, _ in enumerate(scales)]
        out = [[g.view for g in side] for side in poisoned]
        versions = [t._version for side in out for t in side]
        got = zokern.perturb(tensors, who=who, scales=scales, dtype=kind, out=out, **calls)
        for mine, side, expected, guards in zip(got, out, right, poisoned):
            assert all(a is b for a, b in zip(mine, side))
            for value, guard in zip(expected, guards):
                assert same_bits(guard.buffer, filled(value, guard.offset - GUARD).buffer)
        assert all(t._version > v for t, v in zip((t for side in out for t in side), versions))
    guard, right = guarded((5, 3), dtype, offset=1), zokern.draw(shape=(5, 3), who="a", dtype=dtype, **calls)
    out = guard.view
    assert zokern.draw(shape=(5, 3), who="a", dtype=dtype, out=out, **calls) is out
    assert same_bits(guard.buffer, filled(right, offset=1).buffer)


def test_out_of_one_tensor_and_of_a_parameter() -> None:
    weight = torch.nn.Parameter(theta())
    right = zokern.perturb(weight, who="w", **NAMES)
    plus, minus = torch.nn.Parameter(torch.empty(50)), torch.empty(50)
    assert zokern.perturb(weight, who="w", out=(plus, minus), **NAMES) == [[plus], [minus]]
    assert same_bits(plus, right[0][0]) and same_bits(minus, right[1][0])
    zokern.draw(shape=50, who="w", out=plus, **NAMES)
    assert same_bits(plus, zokern.draw(shape=50, who="w", **NAMES))


def test_out_under_torch_compile() -> None:
    def both(x, plus, minus):
        zokern.perturb([x], who=["w"], out=[[plus], [minus]], **NAMES)
        return zokern.draw(shape=(50,), who="w", out=torch.empty(50), **NAMES) + plus - minus

    eager, compiled = ([torch.empty(50), torch.empty(50)] for _ in range(2))
    right = both(theta(), *eager)
    assert same_bits(torch.compile(both, backend="eager")(theta(), *compiled), right)
    assert all(same_bits(a, b) for a, b in zip(eager, compiled))


W, ROOM = theta(), torch.empty(200)
BAD_OUT = {
    "one list": (
        [torch.empty(50)],
        "out is list for 2 scales; expected for each scale a tensor, or a list of one",
    ),
    "a tensor": (torch.empty(2, 50), "out is Tensor for 2 scales"),
    "two in a side": ([[torch.empty(50)] * 2, [torch.empty(50)]], r"out\[0\] is list for 1 tensors"),
    "None": ([torch.empty(50), None], r"out\[1\] is NoneType for 1 tensors"),
    "a number": ([torch.empty(50), [3]], r"out\[1\]\[0\] is int 3; expected a torch.Tensor"),
    "shape": (
        [torch.empty(50), torch.empty(49)],
        r"out\[1\]\[0\] is torch.float32\[49\] on cpu; expected contiguous torch.float32\[50\]",
    ),
    "dtype": ([torch.empty(50).half(), torch.empty(50)], r"out\[0\]\[0\] is torch.float16\[50\]"),
    "device": ([torch.empty(50, device="meta"), torch.empty(50)], "on meta"),
    "strides": ([torch.empty(100)[::2], torch.empty(50)], "not contiguous"),
    "the weight": ([W, torch.empty(50)], r"out\[0\]\[0\] and a tensor that is read share memory"),
    "each other": ([ROOM[:50], ROOM[49:99]], r"out\[0\]\[0\] and out\[1\]\[0\] share memory"),
}


@pytest.mark.parametrize("case", BAD_OUT)
def test_bad_out_is_refused(case: str) -> None:
    out, message = BAD_OUT[case]
    before, _ = W.clone(), ROOM.fill_(7.0)
    with pytest.raises((ValueError, TypeError), match=message):
        zokern.perturb(W, who="w", out=out, **NAMES)
    if case in ("shape", "dtype", "device", "strides"):
        with pytest.raises(ValueError, match="draw: out is "):
            zokern.draw(shape=50, who="w", out=out[case == "shape"], **NAMES)
    assert same_bits(W, before) and (ROOM == 7.0).all()


def test_inputs_that_share_memory_are_still_compared_with_out() -> None:
    with pytest.raises(ValueError, match="a tensor that is read share memory"):
        zokern.perturb([W, W], who=["a", "b"], scales=(1.0,), out=[[torch.empty(50), W]], **NAMES)
    zokern.perturb([W, W], who=["a", "b"], scales=(1.0,), out=[[torch.empty(50), torch.empty(50)]], **NAMES)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("each", [True, 2])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "residual"])
def test_each_is_one_call_a_step(rounding: str, each: int, backend: str) -> None:
    """And not one long sum."""
    draws, coeffs = [(step, 0) for step in range(6)], [0.01 * 3**-k for k in range(6)]
    decays = [0.9, 0.95, 1.0, 0.99, 0.98, 0.97]
    names = {"direction": "normal", "seed": 9, "who": "w", "rounding": rounding, "backend": backend}
    decays = decays[: 6 // each]

    def weights() -> dict:
        low = {"residuals": torch.zeros(50, dtype=torch.int16)} if rounding == "residual" else {}
        return {"tensors": theta(50, torch.bfloat16), **low}

    def bits(given: dict) -> torch.Tensor:
        return torch.cat(
            [given[name].view(torch.int16) for name in ("tensors", "residuals") if name in given]
        )

    one, calls, sum = weights(), weights(), weights()
    zokern.axpy_(**one, **names, draws=draws, coeffs=coeffs, decay=decays, each=each)
    for k, decay in zip(range(0, 6, each), decays):
        zokern.axpy_(**calls, **names, draws=draws[k : k + each], coeffs=coeffs[k : k + each], decay=decay)
    assert torch.equal(bits(one), bits(calls))
    zokern.axpy_(**sum, **names, draws=draws, coeffs=coeffs)
    assert not torch.equal(bits(one), bits(sum))


@pytest.mark.parametrize("direction", ["normal", "rademacher"])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("threads", [1, 2])
def test_shards_and_threads_change_no_bit(direction: str, shards: int, threads: int) -> None:
    names = {"seed": 9, "who": "w", "draws": [(5, 0), (5, 1)], "coeffs": [0.1, 0.2]}
    n, first = 300_001, 2**31 - 150_000
    whole = theta(n)
    zokern.axpy_(whole, direction, first=first, **names)
    parts = theta(n)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        pieces = list(torch.tensor_split(parts, shards))
        starts = [first + piece.storage_offset() for piece in pieces]
        zokern.axpy_(
            pieces,
            direction,
            seed=9,
            who=["w"] * shards,
            draws=names["draws"],
            coeffs=names["coeffs"],
            first=starts,
        )
    finally:
        torch.set_num_threads(before)
    assert same_bits(whole, parts)
    wrong = theta(n)
    zokern.axpy_(wrong, direction, first=first + 1, **names)
    assert not same_bits(whole, wrong)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("core", [None, (4,), (4, 3)], ids=["identity", "diagonal", "dense"])
def test_lowrank_is_the_product(core, backend: str) -> None:
    """decay W + scale U C V^T, within the rounding of float32 sums of this length;
    C = None is the identity."""
    m, n, inner = 37, 53, 3 if core and len(core) == 2 else 4
    weight, left, right = torch.randn(m, n), torch.randn(m, 4), torch.randn(n, inner)
    c = None if core is None else torch.randn(core)
    matrix = torch.eye(4) if c is None else torch.diag(c) if c.dim() == 1 else c
    result = weight.clone()
    count = zokern.lowrank_(result, left, right, core=c, scale=0.3, decay=0.9, backend=backend)
    exact = 0.9 * weight.double() + 0.3 * left.double() @ matrix.double() @ right.double().t()
    size = 0.9 * weight.abs() + 0.3 * left.abs() @ matrix.abs() @ right.abs().t()
    # r + s sums and a few factors, each to half a unit
    error = ((result - exact).abs() / (16 * 2.0**-24 * size)).max()
    assert error <= 1 and count.tolist() == [0]
    wrong = weight.clone()
    zokern.lowrank_(wrong, left, right, core=c, scale=0.3001, decay=0.9, backend=backend)
    assert ((wrong - exact).abs() / (16 * 2.0**-24 * size)).max() > 1
    if c is not None and c.dim() == 2:  # the core is folded into U by the verb itself
        folded = torch.zeros(m, inner)
        zokern.lowrank_(folded, left, c.t().contiguous(), backend=backend)
        again = weight.clone()
        zokern.lowrank_(again, folded, right, scale=0.3, decay=0.9, backend=backend)
        assert same_bits(again, result)


def test_lowrank_of_shards_and_lists_is_that_of_the_whole() -> None:
    left, right = torch.randn(31, 5), torch.randn(17, 5)
    whole = torch.randn(31, 17)
    parts, listed = whole.clone(), [whole.clone(), whole.clone().bfloat16()]
    zokern.lowrank_(whole, left, right, scale=0.1)
    pieces = list(torch.tensor_split(parts.view(-1), 3))
    zokern.lowrank_(pieces, [left] * 3, [right] * 3, scale=0.1, first=[p.storage_offset() for p in pieces])
    assert same_bits(whole, parts)
    alone = listed[1].clone()
    zokern.lowrank_(alone, left, right, scale=0.2, who="b", seed=3, step=2, rounding="stochastic")
    zokern.lowrank_(
        listed,
        [left] * 2,
        [right] * 2,
        scale=[0.1, 0.2],
        who=["a", "b"],
        seed=3,
        step=2,
        rounding="stochastic",
    )
    assert same_bits(listed[0], whole) and same_bits(listed[1], alone)


@pytest.mark.parametrize(
    ("shape", "left", "right", "words"),
    [
        ((6, 8), 8, 6, [r"tensors\[0\] is \[6, 8\]", "8 x 6", "left and right are swapped", r"\.view\(-1\)"]),
        ((6, 8), 6, 80, [r"tensors\[0\] is \[6, 8\]", "6 x 80", r"expected right \(8, 2\)"]),
    ],
)
def test_lowrank_refuses_factors_of_another_matrix(shape, left: int, right: int, words: list[str]) -> None:
    """Flattened, the same elements are what they say;
    rows of W, and W in another near-square form, stay legal too."""
    w, u, v = torch.zeros(shape), torch.ones(left, 2), torch.ones(right, 2)
    with pytest.raises(ValueError, match=".*".join(words)):
        zokern.lowrank_(w, u, v)
    assert not w.any()
    zokern.lowrank_(w.view(-1), u, v)
    for legal in (torch.zeros(3, right), torch.zeros(left // 2, 2 * right), torch.zeros(left, right)):
        zokern.lowrank_(legal, u, v)
        assert (legal == 2).all()


def test_torch_compile_sees_the_operation() -> None:
    def update(x):
        zokern.axpy_(x, "normal", seed=1, who="w", draws=[(0, 0)], coeffs=[0.5])
        return x * 2

    expected = update(theta())
    assert same_bits(torch.compile(update, backend="eager")(theta()), expected)


# Refusals ---------------------------------------------------------------------------------------------------

GOOD = {
    "draw": lambda **o: zokern.draw(
        **{"direction": "normal", "shape": (5,), "seed": 1, "who": "w", "step": 0, **o}
    ),
    "axpy_": lambda **o: zokern.axpy_(
        **{
            "tensors": theta(),
            "direction": "normal",
            "seed": 1,
            "who": "w",
            "draws": [(0, 0)],
            "coeffs": [0.1],
            **o,
        }
    ),
    "perturb": lambda **o: zokern.perturb(
        **{"tensors": theta(), "direction": "normal", "seed": 1, "who": "w", "step": 0, **o}
    ),
    "lowrank_": lambda **o: zokern.lowrank_(
        **{
            "tensors": theta(),
            "left": torch.ones(10, 2),
            "right": torch.ones(5, 2),
            "core": torch.ones(2),
            "who": "w",
            **o,
        }
    ),
    "philox4x32": lambda **o: zokern.philox4x32(**{"counter": [0, 0, 0, 0], "key": (0, 0), **o}),
}
LONG = torch.empty(3, dtype=torch.int64)
BAD_TENSORS = [
    [], LONG, torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.complex64),
    torch.ones(3, dtype=torch.bool), torch.ones(1).expand(4), torch.ones(3, 1).expand(3, 4),
    torch.ones(8).as_strided((4, 4), (1, 1)), torch.ones(3).to_sparse(),
    torch.ones(3).to(torch.float8_e4m3fn), None, 3, "w", [theta(), None],
]  # fmt: skip
BAD_FACTORS = [
    torch.ones(10, 3), torch.ones(10, 2).double(), torch.ones(10, 2).half(), torch.ones(2, 10).t(),
    torch.ones(20), torch.ones(10, 2, 1), None,
    3, [], torch.ones(10, 2).to_sparse(), [torch.ones(10, 2)] * 2, torch.ones(10, 2, device="meta"),
]  # fmt: skip
BAD_SEEDS = [-1, 2**64, 1.5, True, None, "0", NAN]
BAD_WORDS = [-1, 2**32, 1.5, None, "0"]
BAD = {
    "draw": {
        "direction": ["uniform", None, 3], "shape": [(-1,), "x", (2.5,), None], "seed": BAD_SEEDS,
        "who": [-1, 2**32, None, 1.5, ["a", "b"]],
        "step": BAD_WORDS, "draw": BAD_WORDS, "first": [-1, 2**35, 2**35 - 4, 1.5, None],
        "dtype": [torch.float64, torch.int64, None, "float32"],
        "backend": ["gpu", "cuda" if not torch.cuda.is_available() else "gpu", 3], "device": ["nowhere"],
    },
    "axpy_": {
        "tensors": BAD_TENSORS, "direction": ["uniform", None, 3], "seed": BAD_SEEDS,
        "who": [-1, 2**32, None, 1.5, ["a", "b"], []],
        "draws": [[], [(0, 0), (0, 1)], [(-1, 0)], [(0, 2**32)], [0], None],
        "decay": [NAN, INF, None, "1", [], [1.0, 1.0], [NAN]],
        "each": [-1, 3, 1.5, None, "1"],
        "coeffs": [[], [1.0, 2.0, 3.0], [NAN], [INF], ["1"], None, torch.ones(1, dtype=torch.float64),
            torch.ones(()), torch.ones(1, 1), 0.1],
        "first": [-1, 2**35 - 4, 1.5, [0, 0], None], "rounding": ["up", None, "residual"],
        "residuals": [torch.zeros(50, dtype=torch.int16)],
        "backend": ["gpu", 3],
    },
    "perturb": {
        "tensors": BAD_TENSORS, "direction": ["uniform", None, 3], "seed": BAD_SEEDS,
        "who": [-1, 2**32, None, 1.5, ["a", "b"]],
        "step": BAD_WORDS, "draw": BAD_WORDS,
        "scales": [(), (1.0, 2.0, 3.0), (NAN,), (INF, 1.0), 1.0, None, ("1",)],
        "first": [-1, 2**35 - 4, 1.5], "residuals": [torch.zeros(50, dtype=torch.int16), [LONG]],
        "dtype": [torch.float64, torch.bfloat16, torch.int8],
        "backend": ["gpu", 3],
    },
    "lowrank_": {
        "tensors": BAD_TENSORS, "left": [*BAD_FACTORS, torch.ones(9, 2), torch.ones(10, 0)],
        "right": [*BAD_FACTORS, torch.ones(4, 2)],
        "core": [torch.ones(3), torch.ones(2, 3), torch.ones(3, 2), torch.ones(()), torch.ones(2).double(),
            torch.ones(4)[::2], 3, [None] * 2],
        "scale": [NAN, INF, "1", None, [1.0, 1.0], []], "decay": [NAN, INF, None, "1"],
        "who": [-1, 2**32, 1.5, ["a", "b"], []],
        "seed": BAD_SEEDS, "step": BAD_WORDS, "first": [-1, 1, 2**35 - 4, 1.5, [0, 0], None],
        "rounding": ["up", None, "residual"],
        "residuals": [torch.zeros(50, dtype=torch.int16)], "backend": ["gpu", 3],
    },
    "philox4x32": {
        "counter": [[0, 0, 0], [-1, 0, 0, 0], [2**32, 0, 0, 0], 3, None, "x", torch.ones(4), [0.5, 0, 0, 0]],
        "key": [(0,), (0, 0, 0), (-1, 0), (0, 2**32), None, 3, (0.5, 0)], "rounds": [0, -1, 17, 1.5, None],
        "backend": ["gpu", 3],
    },
}  # fmt: skip


@pytest.mark.parametrize("verb", GOOD)
def test_bad_argument_is_refused(verb: str) -> None:
    """Each bad value on its own raises a ValueError, TypeError or RuntimeError;
    the good call beside it does not."""
    GOOD[verb]()
    accepted = []
    for name, values in BAD[verb].items():
        for value in values:
            try:
                GOOD[verb](**{name: value})
            except (ValueError, TypeError, RuntimeError, OverflowError):
                continue
            accepted.append((name, value))
    assert accepted == []


@pytest.mark.parametrize("verb", GOOD)
def test_2500_random_bad_calls_raise_and_write_nothing(verb: str) -> None:
    """Any mixture of good and at least one bad argument;
    12,500 calls over the five verbs, no crash, no weight changed."""
    generator = random.Random(verb)
    names = list(BAD[verb])
    weight = theta()
    start = weight.clone()
    for i in range(2500):
        bad = generator.sample(names, generator.randint(1, min(3, len(names))))
        arguments = {name: generator.choice(BAD[verb][name]) for name in bad}
        if verb in ("axpy_", "lowrank_") and "tensors" not in arguments:
            arguments["tensors"] = weight
        if (
            verb in ("axpy_", "lowrank_")
            and arguments.get("rounding") == "residual"
            and "residuals" in arguments
        ):
            arguments["tensors"] = weight  # float32, which residual refuses
        with pytest.raises((ValueError, TypeError, RuntimeError, OverflowError)):
            GOOD[verb](**arguments)
            print("accepted", i, arguments)
    assert same_bits(weight, start)


def test_errors_name_argument_value_and_way_out() -> None:
    cases = [
        (lambda: GOOD["axpy_"](tensors=torch.ones(3).double()),
            ["axpy_", "tensors[0]", "float64", "float32, bfloat16 or float16", "cast"]),
        (lambda: GOOD["axpy_"](coeffs=[NAN]), ["coeffs", "nan", "finite"]),
        (lambda: GOOD["axpy_"](tensors=torch.ones(1).expand(4)), ["overlapping", ".clone()"]),
        (lambda: GOOD["axpy_"](tensors=[theta(), theta()], who="w"), ["who", "'w'", "one name per tensor"]),
        (lambda: GOOD["axpy_"](each=1.5), ["axpy_", "each", "1.5", "number of terms"]),
        (lambda: GOOD["axpy_"](each=3), ["each is 3", "1 draws", "divisor"]),
        (lambda: GOOD["axpy_"](each=True, decay=[0.9, 0.8]),
            ["decay has 2 numbers", "each is 1", "expected one number, or 1"]),
        (lambda: GOOD["axpy_"](rounding="up"), ["rounding", "'up'", "nearest", "stochastic", "residual"]),
        (lambda: GOOD["lowrank_"](left=torch.ones(2, 10).t()),
            ["lowrank_", "left[0]", "[10, 2]", "contiguous", ".contiguous()"]),
        (lambda: GOOD["lowrank_"](right=torch.ones(5, 2).half()),
            ["right[0]", "float16", "float32", ".float()"]),
        (lambda: GOOD["lowrank_"](first=1), ["tensors[0]", "1 to 51", "10 x 5"]),
        (lambda: GOOD["lowrank_"](who=None, rounding="stochastic"), ["who", "None", "stochastic"]),
        (lambda: GOOD["draw"](seed=2**64), ["seed", str(2**64), "2**64"]),
        (lambda: GOOD["draw"](direction="uniform"), ["direction", "'uniform'", "normal", "rademacher"]),
        (lambda: GOOD["draw"](dtype="float32"), ["dtype is 'float32'", "torch.float32"]),
        (lambda: GOOD["axpy_"](coeffs=0.1), ["axpy_: coeffs is 0.1", "sequence of finite numbers"]),
        (lambda: GOOD["axpy_"](coeffs=["1"]), ["axpy_: coeffs is ['1']", "finite numbers"]),
        (lambda: GOOD["axpy_"](decay=None), ["axpy_: decay is None", "finite numbers"]),
        (lambda: GOOD["axpy_"](who=None), ["axpy_: who is None", "one name per tensor"]),
        (lambda: GOOD["axpy_"](first=None), ["axpy_: first is None", "number of the first element"]),
        (lambda: GOOD["axpy_"](draws=[0]), ["axpy_: draws is [0]", "pairs (step, draw)"]),
        (lambda: GOOD["axpy_"](draws=None), ["axpy_: draws is None", "pairs (step, draw)"]),
        (lambda: GOOD["perturb"](scales=0.1), ["perturb: scales is 0.1", "one or two finite numbers"]),
        (lambda: GOOD["perturb"](residuals=[None]), ["residuals[0] is NoneType", "torch.Tensor"]),
        (lambda: GOOD["perturb"](tensors=3), ["tensors is int 3", "torch.Tensor"]),
        (lambda: GOOD["lowrank_"](scale="1"),
            ["lowrank_: scale is ['1']", "a finite number, or one for each of 1"]),
        (lambda: GOOD["lowrank_"](decay=None), ["lowrank_: decay is [None]", "a finite number"]),
        (lambda: GOOD["philox4x32"](key=[0]), ["philox4x32: key is [0]", "two words"]),
        (lambda: zokern.linear(W.view(5, 10), W.view(5, 10), scales=0.1),
            ["linear: scales is 0.1", "sequence of finite scales"]),
        (lambda: zokern.sketch("normal", (2, 5, 5), W.view(5, 10), seed=0, who="w", draws=[(0, 0)],
            coeffs=[1.0]), ["shape is (2, 5, 5)", "(m, n)"]),
        (lambda: zokern.sketch("normal", (2, 5), W.view(5, 10), seed=0, who="w", draws=[0], coeffs=[1.0]),
            ["sketch: draws is [0]", "pairs"]),
        (lambda: zokern.sketch("normal", (2, 5), W.view(5, 10), seed=0, who="w", draws=[(0, 0)], coeffs=1.0),
            ["sketch: coeffs is 1.0"]),
        (lambda: GOOD["draw"](backend="gpu"), ["backend", "'gpu'", "reference"]),
        (lambda: GOOD["draw"](first=2**35), ["first", "2**35"]),
        (lambda: GOOD["philox4x32"](rounds=17), ["rounds", "17", "1 to 16"]),
    ]  # fmt: skip
    for call, words in cases:
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            call()
        assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


FLOAT32 = {  # every argument that the kernels use in float32, and the part of the message that names it
    "coeffs of axpy_": (lambda x: GOOD["axpy_"](coeffs=[x]), "coeffs"),
    "decay of axpy_": (lambda x: GOOD["axpy_"](decay=x), "decay"),
    "scales of perturb": (lambda x: GOOD["perturb"](scales=(x,)), "scales"),
    "scale of lowrank_": (lambda x: GOOD["lowrank_"](scale=x), "scale"),
    "decay of lowrank_": (lambda x: GOOD["lowrank_"](decay=x), "decay"),
    "scales of linear": (lambda x: zokern.linear(torch.ones(3, 5), torch.ones(4, 5), scales=(x,)), "scales"),
    "coeffs of sketch": (
        lambda x: zokern.sketch(
            "normal", (4, 5), torch.ones(5, 2), seed=0, who="w", draws=[(0, 0)], coeffs=[x]
        ),
        "coeffs",
    ),
    "coeffs of update_": (lambda x: momentum(coeffs=[x]), "coeffs"),
    "scalars of update_": (lambda x: momentum(scalars=(1.0, x, 0.9, 0.1)), "scalars"),
}


def momentum(**options):
    given = dict(
        seed=1, who="w", draws=[(0, 0)], coeffs=[0.1], states=[torch.zeros(50)], scalars=(1.0, 0.1, 0.9, 0.1)
    )
    return zokern.update_(theta(), "normal", "momentum", **given | options)


@pytest.mark.parametrize(
    "value", [1e39, -1e39, 2.0**128 - 2.0**103, 10**400], ids=["1e39", "-1e39", "halfway", "10**400"]
)
@pytest.mark.parametrize("name", FLOAT32)
def test_numbers_are_checked_as_float32(name: str, value) -> None:
    """What is finite as a Python number and infinite in float32 is refused; the largest float32 is not."""
    call, word = FLOAT32[name]
    with pytest.raises(ValueError, match=f"{word} .*finite"):
        call(value)
    call(torch.finfo(torch.float32).max)


@pytest.mark.parametrize(
    "number", [np.float32, np.float64, torch.tensor], ids=["float32", "float64", "0-d tensor"]
)
def test_numbers_of_numpy_and_torch_are_numbers(number) -> None:
    """As decay and scale, one or in a list, and as coefficients;
    and NumPy's integers as names and offsets."""
    given = {"decay": 0.5, "coeffs": [0.25], "who": 7, "first": 16}
    kinds = {"decay": number(0.5), "coeffs": [number(0.25)], "who": np.int64(7), "first": np.int64(16)}
    a, b = theta(), theta()
    GOOD["axpy_"](tensors=a, **given), GOOD["axpy_"](tensors=b, **kinds)
    assert same_bits(a, b)
    for scale in (number(0.5), [number(0.5)]):
        a, b = theta(), theta()
        (
            GOOD["lowrank_"](tensors=a, scale=0.5, decay=0.25),
            GOOD["lowrank_"](tensors=b, scale=scale, decay=number(0.25)),
        )
        assert same_bits(a, b)


def test_shared_memory_is_refused() -> None:
    """Two tensors of one call on the same elements would be written twice."""
    base = theta(40)
    square = torch.zeros(8, 8)
    overlapping = [
        [base, base], [base[:30], base[20:]], [base, base[5:9]], [base.view(5, 8), base[3:]],
        [square.t(), square], [square.t(), square[2]], [square[:, ::2], square[:, 1:4]],
    ]  # fmt: skip
    for tensors in overlapping:
        before = [t.clone() for t in tensors]
        with pytest.raises(ValueError, match="memory"):
            zokern.axpy_(tensors, "normal", seed=1, who=["a", "b"], draws=[(0, 0)], coeffs=[1.0])
        assert all(same_bits(t, b) for t, b in zip(tensors, before))
    for tensors in ([base[:20], base[20:]], [square[:, ::2], square[:, 1::2]]):
        zokern.axpy_(tensors, "normal", seed=1, who=["a", "b"], draws=[(0, 0)], coeffs=[1.0])
