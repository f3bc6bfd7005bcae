"""Public operations: what they accept, what they refuse, and their registration with torch.library.

Equality of the values over backends is the business of tests/conformance.py.
"""

from __future__ import annotations

import random

import pytest
import torch
from models import same_bits

import zokern
from zokern.stream import parameter_id

INF, NAN = float("inf"), float("nan")


def theta(n: int = 50, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.linspace(-1, 1, n).to(dtype)


# Registration ---------------------------------------------------------------------------------------------------------------------


def axpy_arguments(dtype: torch.dtype, rounding: str, backend: str) -> tuple:
    tensors = [theta(33, dtype), theta(64, dtype).view(8, 8).t()]
    low = [torch.arange(t.numel(), dtype=torch.int16).view(t.shape) for t in tensors] if rounding == "residual" else []
    return tensors, low, torch.tensor([0.1, -0.2]), [1, 2], [0, 7], [3, 3], [0, 1], "normal", -5, 0.9, rounding, backend


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, "nearest"), (torch.float16, "stochastic"), (torch.bfloat16, "residual")]
)
def test_axpy_passes_opcheck(dtype: torch.dtype, rounding: str, backend: str) -> None:
    torch.library.opcheck(torch.ops.zokern.axpy_, axpy_arguments(dtype, rounding, backend))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True)])
def test_perturb_passes_opcheck(dtype: torch.dtype, wide: bool, backend: str) -> None:
    tensors = [theta(33, dtype), theta(64, dtype).view(8, 8).t()]
    torch.library.opcheck(
        torch.ops.zokern.perturb, (tensors, [], [1, 2], [0, 7], 3, 1, "rademacher", 5, [1e-3, -1e-3], wide, backend)
    )


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


# Meaning ---------------------------------------------------------------------------------------------------------------------------


def test_clock_is_added_to_the_step() -> None:
    """In all three verbs, eagerly and as registered operations; a clock that is no int64[1] is refused."""
    clock, names = torch.tensor([4]), dict(seed=3, who="w")
    right = zokern.draw("normal", (7, 9), step=6, **names)
    assert torch.equal(zokern.draw("normal", (7, 9), step=2, clock=clock, **names), right)
    sum = torch.zeros(7, 9)
    zokern.axpy_(sum, "normal", draws=[(2, 0)], coeffs=[1.0], clock=clock, **names)
    assert torch.equal(sum, right)
    ((plus,), _) = zokern.perturb(torch.zeros(7, 9), "normal", step=2, scales=(1.0, -1.0), clock=clock, **names)
    assert torch.equal(plus, right)
    again, who = torch.zeros(7, 9), zokern.stream.parameter_id("w")
    torch.ops.zokern.axpy_([again], [], torch.ones(1), [who], [0], [2], [0], "normal", 3, 1.0, "nearest", "reference", clock)
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
    plus, minus = zokern.perturb([torch.zeros(7, 9)], direction, seed=3, who="w", step=2, draw=1, scales=(1.0, -1.0))
    assert torch.equal(plus[0], z) and torch.equal(minus[0], -z)
    assert same_bits(z, zokern.draw(direction, (63,), seed=3, who=parameter_id("w"), step=2, draw=1).view(7, 9))
    assert same_bits(z.half(), zokern.draw(direction, (7, 9), seed=3, who="w", step=2, draw=1, dtype=torch.float16))


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
        zokern.axpy_(pieces, direction, seed=9, who=["w"] * shards, draws=names["draws"], coeffs=names["coeffs"], first=starts)
    finally:
        torch.set_num_threads(before)
    assert same_bits(whole, parts)
    wrong = theta(n)
    zokern.axpy_(wrong, direction, first=first + 1, **names)
    assert not same_bits(whole, wrong)


def test_torch_compile_sees_the_operation() -> None:
    def update(x):
        zokern.axpy_(x, "normal", seed=1, who="w", draws=[(0, 0)], coeffs=[0.5])
        return x * 2

    expected = update(theta())
    assert same_bits(torch.compile(update, backend="eager")(theta()), expected)


# Refusals --------------------------------------------------------------------------------------------------------------------------

GOOD = {
    "draw": lambda **o: zokern.draw(**{"direction": "normal", "shape": (5,), "seed": 1, "who": "w", "step": 0, **o}),
    "axpy_": lambda **o: zokern.axpy_(
        **{"tensors": theta(), "direction": "normal", "seed": 1, "who": "w", "draws": [(0, 0)], "coeffs": [0.1], **o}
    ),
    "perturb": lambda **o: zokern.perturb(**{"tensors": theta(), "direction": "normal", "seed": 1, "who": "w", "step": 0, **o}),
    "philox4x32": lambda **o: zokern.philox4x32(**{"counter": [0, 0, 0, 0], "key": (0, 0), **o}),
}
LONG = torch.empty(3, dtype=torch.int64)
BAD_TENSORS = [
    [], LONG, torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.complex64), torch.ones(3, dtype=torch.bool),
    torch.ones(1).expand(4), torch.ones(3, 1).expand(3, 4), torch.ones(8).as_strided((4, 4), (1, 1)), torch.ones(3).to_sparse(),
    torch.ones(3).to(torch.float8_e4m3fn), None, 3, "w", [theta(), None],
]  # fmt: skip
BAD_SEEDS = [-1, 2**64, 1.5, True, None, "0", NAN]
BAD_WORDS = [-1, 2**32, 1.5, None, "0"]
BAD = {
    "draw": {
        "direction": ["uniform", None, 3], "shape": [(-1,), "x", (2.5,), None], "seed": BAD_SEEDS, "who": [-1, 2**32, None, 1.5, ["a", "b"]],
        "step": BAD_WORDS, "draw": BAD_WORDS, "first": [-1, 2**35, 2**35 - 4, 1.5, None], "dtype": [torch.float64, torch.int64, None, "float32"],
        "backend": ["gpu", "cuda" if not torch.cuda.is_available() else "gpu", 3], "device": ["nowhere"],
    },
    "axpy_": {
        "tensors": BAD_TENSORS, "direction": ["uniform", None, 3], "seed": BAD_SEEDS, "who": [-1, 2**32, None, 1.5, ["a", "b"], []],
        "draws": [[], [(0, 0), (0, 1)], [(-1, 0)], [(0, 2**32)], [0], None], "decay": [NAN, INF, None, "1"],
        "coeffs": [[], [1.0, 2.0], [NAN], [INF], ["1"], None, torch.ones(1, dtype=torch.float64), torch.ones(()), torch.ones(1, 1), 0.1],
        "first": [-1, 2**35 - 4, 1.5, [0, 0], None], "rounding": ["up", None, "residual"], "residuals": [torch.zeros(50, dtype=torch.int16)],
        "backend": ["gpu", 3],
    },
    "perturb": {
        "tensors": BAD_TENSORS, "direction": ["uniform", None, 3], "seed": BAD_SEEDS, "who": [-1, 2**32, None, 1.5, ["a", "b"]],
        "step": BAD_WORDS, "draw": BAD_WORDS, "scales": [(), (1.0, 2.0, 3.0), (NAN,), (INF, 1.0), 1.0, None, ("1",)],
        "first": [-1, 2**35 - 4, 1.5], "residuals": [torch.zeros(50, dtype=torch.int16), [LONG]],
        "dtype": [torch.float64, torch.bfloat16, torch.int8],
        "backend": ["gpu", 3],
    },
    "philox4x32": {
        "counter": [[0, 0, 0], [-1, 0, 0, 0], [2**32, 0, 0, 0], 3, None, "x", torch.ones(4), [0.5, 0, 0, 0]],
        "key": [(0,), (0, 0, 0), (-1, 0), (0, 2**32), None, 3, (0.5, 0)], "rounds": [0, -1, 17, 1.5, None], "backend": ["gpu", 3],
    },
}  # fmt: skip


@pytest.mark.parametrize("verb", GOOD)
def test_bad_argument_is_refused(verb: str) -> None:
    """Each bad value on its own raises a ValueError, TypeError or RuntimeError; the good call beside it does not."""
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
    """Any mixture of good and at least one bad argument; 10,000 calls over the four verbs, no crash, no weight changed."""
    generator = random.Random(verb)
    names = list(BAD[verb])
    weight = theta()
    start = weight.clone()
    for i in range(2500):
        bad = generator.sample(names, generator.randint(1, min(3, len(names))))
        arguments = {name: generator.choice(BAD[verb][name]) for name in bad}
        if verb == "axpy_" and "tensors" not in arguments:
            arguments["tensors"] = weight
        if verb == "axpy_" and arguments.get("rounding") == "residual" and "residuals" in arguments:
            arguments["tensors"] = weight  # float32, which residual refuses
        with pytest.raises((ValueError, TypeError, RuntimeError, OverflowError)):
            GOOD[verb](**arguments)
            print("accepted", i, arguments)
    assert same_bits(weight, start)


def test_errors_name_argument_value_and_way_out() -> None:
    cases = [
        (lambda: GOOD["axpy_"](tensors=torch.ones(3).double()), ["axpy_", "tensors[0]", "float64", "float32, bfloat16 or float16", "cast"]),
        (lambda: GOOD["axpy_"](coeffs=[NAN]), ["coeffs", "nan", "finite"]),
        (lambda: GOOD["axpy_"](tensors=torch.ones(1).expand(4)), ["overlapping", ".clone()"]),
        (lambda: GOOD["axpy_"](tensors=[theta(), theta()], who="w"), ["who", "'w'", "one name per tensor"]),
        (lambda: GOOD["axpy_"](rounding="up"), ["rounding", "'up'", "nearest", "stochastic", "residual"]),
        (lambda: GOOD["draw"](seed=2**64), ["seed", str(2**64), "2**64"]),
        (lambda: GOOD["draw"](direction="uniform"), ["direction", "'uniform'", "normal", "rademacher"]),
        (lambda: GOOD["draw"](backend="gpu"), ["backend", "'gpu'", "reference"]),
        (lambda: GOOD["draw"](first=2**35), ["first", "2**35"]),
        (lambda: GOOD["philox4x32"](rounds=17), ["rounds", "17", "1 to 16"]),
    ]  # fmt: skip
    for call, words in cases:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            call()
        assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


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
