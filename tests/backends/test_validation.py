"""Validation: a wrong call of a backend, or of a registered operation, is refused by name before a kernel
takes an address."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import zokern
from zokern.backends import Batch, Noise, Outer, Sides, Span, Terms, Thin, Update, Weight, get
from zokern.backends.validation import Validator
from zokern.directions import Normal

N = Normal()
BACKENDS = ("cpu", "reference")


def low(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int16)


def good(verb: str) -> dict[str, Any]:
    """Arguments of a backend's verb that fit, flat and by name."""
    bf16 = [torch.randn(6, 4).bfloat16(), torch.randn(24).bfloat16()]
    batch = {
        "tensors": bf16,
        "spans": [Span(1), Span(2)],
        "rounding": "residual",
        "residuals": [low(6, 4), low(24)],
    }
    noise = {"direction": N, "seed": 0, "draws": [(0, 0)], "clock": None}
    several = {"draws": [(0, 0), (1, 0), (2, 0)], "coefficients": torch.ones(3)}
    if verb == "draw":
        return {
            "tensors": [torch.empty(6, 4)],
            "spans": [Span(1)],
            **noise,
            "clock": torch.zeros(1, dtype=torch.int64),
        }
    if verb == "axpy_":
        return {**batch, **noise, **several, "decay": 1.0}
    if verb == "update_":
        states = [[torch.zeros(6, 4), torch.zeros(24)] for _ in range(2)]
        scalars = torch.tensor(zokern.Adam().scalars(0.1))
        return {**batch, **noise, **several, "rule": "adam", "scalars": scalars, "states": states}
    if verb == "perturb":
        outs = [[torch.empty(6, 4), torch.empty(24).bfloat16()] for _ in range(2)]
        return {**batch, **noise, "scales": [0.1, -0.1], "outs": outs}
    factors = {
        "lefts": [torch.randn(6, 3), torch.randn(6, 2)],
        "rights": [torch.randn(4, 3), torch.randn(4, 2)],
    }
    return {**batch, **factors, "scales": [1.0, 1.0], "decay": 1.0}


TUPLES = {"draw": (Batch, Noise), "axpy_": (Batch, Noise, Terms), "update_": (Batch, Noise, Update),
    "perturb": (Batch, Noise),
          "lowrank_": (Batch, Outer)}  # fmt: skip


def arguments(verb: str, given: dict[str, Any]) -> list[Any]:
    """The tuples of a launch from flat arguments, and what stands beside them."""
    rest = dict(given)
    fields = {
        kind: [name for name in kind._fields if (kind, name) != (Batch, "scales")] for kind in TUPLES[verb]
    }  # test_scaled.py has it
    tuples = [
        kind(**{name: rest.pop(name) for name in names if name in rest}) for kind, names in fields.items()
    ]
    return [*tuples, *rest.values()]


def put(name: str, *path: int, make: Callable[[Any], Any]) -> Callable[[dict], dict]:
    """Arguments with another object at a place of one of them."""

    def change(given: dict) -> dict:
        if not path:
            return given | {name: make(given[name])}
        outer = list(given[name])
        if len(path) == 1:
            outer[path[0]] = make(outer[path[0]])
        else:
            outer[path[0]] = list(outer[path[0]])
            outer[path[0]][path[1]] = make(outer[path[0]][path[1]])
        return given | {name: outer}

    return change


def short(t: Tensor) -> Tensor:
    return t.reshape(-1)[:-1].clone()


def strided(t: Tensor) -> Tensor:
    return torch.empty(*t.shape, 2, dtype=t.dtype)[..., 0].copy_(t)


WRONG: dict[str, tuple[str, Callable[[dict], dict], str]] = {
    "draw out dtype": ("draw", put("tensors", 0, make=Tensor.double), r"outs\[0\]|tensors\[0\]"),
    "draw out device": ("draw", put("tensors", 0, make=lambda t: t.to("meta")), r"outs\[0\]"),
    "draw out strides": ("draw", put("tensors", 0, make=strided), r"outs\[0\]"),
    "draw clock dtype": ("draw", put("clock", make=Tensor.int), "clock"),
    "draw clock size": ("draw", put("clock", make=lambda t: t.repeat(2)), "clock"),
    "draw spans": ("draw", put("spans", make=lambda s: s * 2), "spans"),
    "axpy_ theta dtype": ("axpy_", put("tensors", 1, make=Tensor.double), r"tensors\[1\]"),
    "axpy_ theta device": ("axpy_", put("tensors", 1, make=lambda t: t.to("meta")), r"tensors\[1\]"),
    "axpy_ coeffs dtype": ("axpy_", put("coefficients", make=Tensor.double), "coeffs"),
    "axpy_ coeffs count": ("axpy_", put("coefficients", make=lambda t: t[:1]), "coeffs"),
    "axpy_ coeffs device": ("axpy_", put("coefficients", make=lambda t: t.to("meta")), "coeffs"),
    "axpy_ residual dtype": ("axpy_", put("residuals", 1, make=Tensor.int), r"residuals\[1\]"),
    "axpy_ residual size": ("axpy_", put("residuals", 1, make=short), r"residuals\[1\]"),
    "axpy_ residual strides": ("axpy_", put("residuals", 1, make=strided), r"residuals\[1\]"),
    "axpy_ residual device": ("axpy_", put("residuals", 1, make=lambda t: t.to("meta")), r"residuals\[1\]"),
    "axpy_ residuals count": ("axpy_", put("residuals", make=lambda r: r[:1]), "residuals"),
    "axpy_ rounding": ("axpy_", put("rounding", make=lambda r: "up"), "rounding"),
    "axpy_ spans": ("axpy_", put("spans", make=lambda s: s[:1]), "spans"),
    "axpy_ span of a vector": (
        "axpy_",
        put("spans", 1, make=lambda s: s._replace(pitch=3)),
        r"tensors\[1\].*matrix",
    ),
    "update_ state dtype": ("update_", put("states", 1, 0, make=Tensor.bfloat16), r"v\[0\]"),
    "update_ state size": ("update_", put("states", 1, 0, make=short), r"v\[0\]"),
    "update_ state device": ("update_", put("states", 1, 0, make=lambda t: t.to("meta")), r"states\[2\]"),
    "update_ states count": ("update_", put("states", make=lambda s: s[:1]), "rule"),
    "update_ scalars dtype": ("update_", put("scalars", make=Tensor.double), "scalars"),
    "update_ scalars count": ("update_", put("scalars", make=short), "scalars"),
    "update_ coeffs count": ("update_", put("coefficients", make=lambda t: t[:1]), "coeffs"),
    "perturb out dtype": ("perturb", put("outs", 1, 0, make=Tensor.half), r"outs\[1\]\[0\]"),
    "perturb out size": ("perturb", put("outs", 1, 0, make=short), r"outs\[1\]\[0\]"),
    "perturb out device": ("perturb", put("outs", 1, 0, make=lambda t: t.to("meta")), r"outs\[2\]"),
    "perturb outs of two dtypes": (
        "perturb",
        put("outs", 1, 0, make=Tensor.bfloat16),
        r"outs\[0\] and outs\[1\]",
    ),
    "perturb scales": ("perturb", put("scales", make=lambda s: s[:1]), "scales"),
    "perturb residual size": ("perturb", put("residuals", 0, make=short), r"residuals\[0\]"),
    "perturb rows dtype": (
        "perturb",
        put("spans", 0, make=lambda s: s._replace(rows=torch.arange(6).int())),
        r"rows",
    ),
    "lowrank_ left dtype": ("lowrank_", put("lefts", 0, make=Tensor.bfloat16), r"left\[0\]"),
    "lowrank_ left short": ("lowrank_", put("lefts", 0, make=lambda t: t[:5]), r"tensors\[0\]"),
    "lowrank_ left strides": ("lowrank_", put("lefts", 0, make=strided), r"left\[0\]"),
    "lowrank_ left device": ("lowrank_", put("lefts", 1, make=lambda t: t.to("meta")), r"left\[1\]"),
    "lowrank_ right dtype": ("lowrank_", put("rights", 1, make=Tensor.double), r"right\[1\]"),
    "lowrank_ right rank": (
        "lowrank_",
        put("rights", 1, make=lambda t: t[:, :1].contiguous()),
        r"right\[1\]",
    ),
    "lowrank_ scales": ("lowrank_", put("scales", make=lambda s: s[:1]), "scales"),
    "lowrank_ residual size": ("lowrank_", put("residuals", 0, make=short), r"residuals\[0\]"),
}


def tensors_of(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    values = given.values() if isinstance(given, dict) else given if isinstance(given, (list, tuple)) else ()
    return [tensor for value in values for tensor in tensors_of(value)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", WRONG)
def test_a_backend_refuses_by_name_before_it_writes(which: str, backend: str) -> None:
    verb, change, named = WRONG[which]
    getattr(get(backend), verb)(*arguments(verb, good(verb)))  # what fits is taken
    given = change(good(verb))
    kept = [t.clone() if not t.is_meta else t for t in tensors_of(given)]
    with pytest.raises(ValueError, match=f"backend '{backend}': {verb}: .*{named}"):
        getattr(get(backend), verb)(*arguments(verb, given))
    for before, now in zip(kept, tensors_of(given)):
        assert now.is_meta or torch.equal(before.nan_to_num(), now.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_matrix_of_a_forward_pass_is_looked_at_too(dtype: torch.dtype) -> None:
    """lowrank_ of one tensor goes past the table, by pointers."""
    theta, left, right = torch.zeros(6, 4), torch.randn(6, 3), torch.randn(4, 3)

    def run(*factors: Tensor, outs: Any = None) -> None:
        get("cpu").lowrank_(Batch([theta], [Span(0)]), Outer(*([f] for f in factors), [1.0]), outs=outs)

    run(left, right)
    for wrong in (
        (left.to(dtype), right),
        (left, right.to(dtype)),
        (left[:5], right),
        (left, right[:, :2].contiguous()),
    ):
        with pytest.raises(ValueError, match="lowrank_: "):
            run(*wrong)
    with pytest.raises(ValueError, match=r"outs\[0\]"):
        run(left, right, outs=[torch.empty(23)])
    with pytest.raises(ValueError, match=r"tensors\[0\] is torch.float64"):
        theta = theta.double()
        run(left, right)


@pytest.mark.parametrize("what, make", [
    ("xs", Tensor.double), ("biases", Tensor.double), ("factors", Tensor.bfloat16),
    ("xs", lambda t: t.to("meta")), ("weight", Tensor.t),
])  # fmt: skip
def test_a_product_refuses_other_operands(what: str, make: Callable[[Tensor], Tensor]) -> None:
    given = {
        "xs": torch.randn(3, 4),
        "weight": torch.randn(6, 4),
        "biases": torch.randn(6),
        "factors": torch.randn(2, 4),
    }

    def run() -> None:
        thins = [Thin([0], given["factors"], torch.randn(1, 2, 2), torch.randn(6, 2))]
        sides = Sides([given["xs"]], [given["biases"]], [0.1], thins)
        get("cpu").linear(Weight(given["weight"], Span(0)), sides, Noise(N, 0, [(0, 0)]))

    run()
    given[what] = make(given[what])
    with pytest.raises(ValueError, match=f"backend 'cpu': linear: {what}"):
        run()


def test_another_backend_has_the_same_checks() -> None:
    with pytest.raises(
        ValueError,
        match=r"backend 'cuda': axpy_: tensors\[0\] is torch.bfloat16\[6, 4\] on cpu; expected a cuda tensor",
    ):
        Validator("cuda", "cuda").axpy_(*arguments("axpy_", good("axpy_")))


def test_a_missing_check_is_seen(monkeypatch) -> None:
    """Without the check, coefficients of another dtype are
    taken for numbers of float32, or fail without a name."""
    monkeypatch.setattr(Validator, "axpy_", lambda self, *_: torch.device("cpu"))
    with pytest.raises(pytest.fail.Exception):
        test_a_backend_refuses_by_name_before_it_writes("axpy_ coeffs dtype", "cpu")


# Registered operations, called past their verbs -------------------------------------------------------------

OPS = torch.ops.zokern
W = torch.zeros(6, 4)


def axpy(**other: Any) -> Any:
    given = dict(
        tensors=[W.clone()],
        direction="normal",
        seed=0,
        who=[1],
        steps=[0, 1, 2],
        draws=[0, 0, 0],
        coeffs=torch.ones(3),
    )
    rest = dict(decay=[1.0], first=[0], rounding="nearest", residuals=[], each=0, clock=None, backend="cpu")
    return OPS.axpy_(**(given | rest | other))


def perturb(**other: Any) -> Any:
    given = dict(
        tensors=[W.clone()], direction="normal", seed=0, who=[1], step=0, draw=0, scales=[0.1], first=[0]
    )
    return OPS.perturb(**(given | dict(residuals=[], dtype=None, clock=None, backend="cpu") | other))


def lowrank(**other: Any) -> Any:
    given = dict(
        tensors=[W.clone()],
        left=[torch.randn(6, 2)],
        right=[torch.randn(4, 2)],
        scale=[1.0],
        decay=1.0,
        who=[0],
    )
    return OPS.lowrank_(
        **(given | dict(seed=0, step=0, first=[0], rounding="nearest", residuals=[], backend="cpu") | other)
    )


def update(**other: Any) -> Any:
    given = dict(
        tensors=[W.clone()], direction="normal", rule="momentum", seed=0, who=[1], steps=[0], draws=[0]
    )
    rest = dict(
        coeffs=torch.ones(1), states=[W.clone()], scalars=torch.ones(4), first=[0], rounding="nearest"
    )
    return OPS.update_(**(given | rest | dict(residuals=[], clock=None, backend="cpu") | other))


def product(**other: Any) -> Any:
    xs, weight = [torch.randn(2, 4).bfloat16()], W.bfloat16()
    given = dict(
        xs=xs, weight=weight, direction="normal", factors=[], scales=[0.1], seed=0, who=1, step=0, draw=0
    )
    return OPS.linear(**(given | dict(bias=None, first=0, residual=low(6, 4), tile=4, backend="cpu") | other))


def thin(**other: Any) -> Any:
    factors = [torch.randn(6, 2), torch.randn(4, 2), torch.eye(2)]
    factors = [other.pop(name, factor) for name, factor in zip(("left", "right", "core"), factors)]
    return product(**(dict(xs=[torch.randn(2, 4)], weight=W, factors=factors, residual=None) | other))


def sketched(**other: Any) -> Any:
    given = dict(
        direction="normal",
        shape=[6, 4],
        omega=torch.randn(4, 2),
        seed=0,
        who=1,
        steps=[0],
        draws=[0],
        coeffs=[1.0],
    )
    return OPS.sketch(**(given | dict(transposed=False, first=0, tile=8, backend="cpu") | other))


def drawn(**other: Any) -> Any:
    given = dict(
        out=torch.empty(8),
        direction="normal",
        seed=0,
        who=1,
        step=0,
        draw=0,
        first=0,
        clock=None,
        backend="cpu",
    )
    return OPS.draw_(**(given | other))


def words(**other: Any) -> Any:
    given = dict(counter=torch.zeros(2, 4, dtype=torch.int64), key=[1, 2], rounds=10, backend="cpu")
    return OPS.philox4x32(**(given | other))


REFUSED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (axpy, dict(coeffs=torch.ones(1)), "coefficients"), (axpy, dict(coeffs=torch.ones(3).double()), "coeffs"),
    (axpy, dict(steps=[0]), "steps"), (axpy, dict(who=[]), "names"), (axpy, dict(who=[-1]), "who"),
    (axpy, dict(first=[-1]), "elements"), (axpy, dict(steps=[0, 0, -1]), "step"),
    (axpy, dict(decay=[1.0, 1.0]), "decay"), (axpy, dict(each=2), "each"),
    (axpy, dict(rounding="up"), "rounding"), (axpy, dict(residuals=[low(6, 4)]), "residual"),
    (axpy, dict(clock=torch.zeros(1)), "clock"),
    (axpy, dict(tensors=[torch.zeros(1).expand(24)]), "overlapping"),
    (axpy, dict(tensors=[W, W], who=[1, 2], first=[0, 0]), "share memory"),
    (axpy, dict(tensors=[W.bfloat16()], residuals=[low(5, 4)], rounding="residual"), "residuals"),
    (perturb, dict(scales=[]), "scales"), (perturb, dict(scales=[float("nan")]), "scales"),
    (perturb, dict(residuals=[low(6, 4)]), "residual"), (perturb, dict(tensors=[W.double()]), "float64"),
    (perturb, dict(first=[2**35]), "elements"), (perturb, dict(draw=-1), "draw"),
    (lowrank, dict(left=[torch.randn(5, 2)]), "elements"),
    (lowrank, dict(left=[torch.randn(6, 2).double()]), "left"), (lowrank, dict(left=[]), "left"),
    (lowrank, dict(scale=[1.0, 1.0]), "scale"), (lowrank, dict(right=[torch.randn(4, 1)]), "right"),
    (update, dict(states=[torch.zeros(5, 4)]), r"m\[0\]"), (update, dict(states=[]), "states"),
    (update, dict(scalars=torch.ones(3)), "scalars"), (update, dict(rule="none"), "rule"),
    (update, dict(rule="adam", scalars=torch.ones(9)), "rule"),
    (update, dict(coeffs=torch.ones(2)), "coefficients"),
    (product, dict(residual=low(5, 4)), "residual"), (product, dict(residual=low(4, 6).t()), "residual"),
    (product, dict(tile=0), "tile"), (product, dict(scales=[0.1, 0.2]), "scales"),
    (product, dict(weight=W.bfloat16()[:, :3]), "weight"), (product, dict(step=-1), "step"),
    (thin, dict(left=torch.randn(5, 2)), "U is"), (thin, dict(core=torch.eye(3)), "C is"),
    (thin, dict(weight=W.t()), "weight"),
    (sketched, dict(omega=torch.randn(3, 2)), "omega"), (sketched, dict(coeffs=[1.0, 2.0]), "coeffs"),
    (sketched, dict(first=-1), "first"),
    (words, dict(counter=torch.zeros(8, dtype=torch.int64)), "counter"),
    (words, dict(counter=torch.zeros(2, 4)), "counter"), (words, dict(rounds=0), "rounds"),
    (words, dict(key=[-1, 2]), "key"),
    (drawn, dict(out=torch.empty(8).double()), "float64"), (drawn, dict(first=2**35), "elements"),
    (drawn, dict(who=-1), "who"),
]  # fmt: skip


@pytest.mark.parametrize(
    "call, other, named",
    REFUSED,
    ids=lambda value: (
        getattr(value, "__name__", None) or (value if isinstance(value, str) else "-".join(value))
    ),
)
def test_a_registered_operation_checks_what_it_is_given(
    call: Callable[..., Any], other: dict[str, Any], named: str
) -> None:
    call()
    with pytest.raises(ValueError, match=named):
        call(**other)


# Operands and arguments of the verbs ------------------------------------------------------------------------


def linear(**other: Any) -> Any:
    given = dict(
        xs=torch.ones(3, 64).bfloat16(),
        weight=torch.zeros(64, 64).bfloat16(),
        scales=[0.0],
        residual=low(64, 64),
        who="w",
    )
    return zokern.linear(**(given | other))


META = {"device": "meta"}


@pytest.mark.parametrize("other, named", [
    (dict(residual=low(64, 64).t().contiguous().t()[:, :63]), "residual"),
    (dict(residual=torch.arange(4096, dtype=torch.int16).view(64, 64).t()), "residual.*strides"),
    (dict(residual=torch.zeros(1, 1, dtype=torch.int16).expand(64, 64)), "residual.*strides"),
    (dict(residual=torch.zeros(64, 64, dtype=torch.int16, **META)), "residual.*meta"),
    (dict(weight=torch.zeros(64, 64, dtype=torch.bfloat16, **META),
        xs=torch.ones(3, 64, dtype=torch.bfloat16, **META)), "weight.*meta"),
    (dict(xs=torch.ones(3, 64, dtype=torch.bfloat16, **META)), r"xs\[0\].*meta"),
    (dict(bias=torch.zeros(64, dtype=torch.bfloat16, **META)), "bias.*meta"),
    (dict(bias=torch.zeros(64, dtype=torch.float64)), "bias is torch.float64"),
    (dict(residual=None, direction=(torch.zeros(64, 2, **META), torch.zeros(64, 2))), "U is.*meta"),
])  # fmt: skip
def test_operands_of_linear(other: dict, named: str) -> None:
    linear()
    with pytest.raises(ValueError, match=f"linear: {named}"):
        linear(**other)


def test_factors_with_other_strides_are_the_same_factors() -> None:
    """Thin factors are read by torch's products or copied: their strides do not matter."""
    x, weight = torch.randn(3, 10), torch.randn(12, 10)
    left, right, core = torch.randn(12, 2), torch.randn(10, 2), torch.randn(2, 2)
    wanted = zokern.linear(x, weight, (left, right, core), scales=[0.1])
    found = zokern.linear(x, weight, tuple(f.t().contiguous().t() for f in (left, right, core)), scales=[0.1])
    assert torch.equal(wanted[0], found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_without_rows_or_columns(dtype: torch.dtype, both_products) -> None:
    for m, n in ((0, 4), (5, 0), (0, 0)):
        x, weight = torch.randn(3, n).to(dtype), torch.zeros(m, n, dtype=dtype)
        bias = torch.ones(m, dtype=dtype)
        for direction in ("normal", (torch.randn(m, 2), torch.randn(n, 2))):
            for y in zokern.linear(x, weight, direction, scales=[0.1, -0.1, 0.0], bias=bias):
                assert torch.equal(y, bias.expand(3, m))


def verb_axpy(**other: Any) -> Any:
    return zokern.axpy_(
        **(
            dict(tensors=torch.zeros(4), direction="normal", seed=0, who="w", draws=[(0, 0)], coeffs=[1.0])
            | other
        )
    )


NAN = float("nan")


@pytest.mark.parametrize("call, named", [
    (lambda: verb_axpy(decay=b"x"), "decay is b'x'"), (lambda: verb_axpy(decay=False), "decay is .*False"),
    (lambda: verb_axpy(first=b"x"), "first is b'x'"), (lambda: verb_axpy(first=True), "first is True"),
    (lambda: verb_axpy(first=[0.5]), r"first is \[0.5\]"), (lambda: verb_axpy(who=b"w"), "who is b'w'"),
    (lambda: verb_axpy(who=True), "who is True"),
    (lambda: verb_axpy(coeffs=b"x"), "coeffs is b'x'"),
    (lambda: verb_axpy(coeffs=[True]), "coeffs is .*True"),
    (lambda: verb_axpy(coeffs={1.0: 2}), "coeffs is {1.0: 2}"),
    (lambda: verb_axpy(draws=[(True, 0)]), "step is True"),
    (lambda: verb_axpy(clock=True), "clock is bool True"),
    (lambda: verb_axpy(tensors=torch.zeros(4, device="meta")), "meta"),
    (lambda: zokern.linear(torch.ones(1, 2), True, scales=[0.1]), "weight is bool True"),
    (lambda: linear(residual=True), "residual is bool True"), (lambda: linear(bias=1), "bias is int 1"),
    (lambda: linear(first="x"), "first is 'x'"),
    (lambda: linear(first=False), "first is False"), (lambda: linear(xs=3), "xs is int 3"),
    (lambda: linear(tile=True), "tile is True"),
    (lambda: linear(direction=(1, 2), residual=None), r"direction\[0\] is int 1"),
    (lambda: zokern.sketch("normal", (4, 3), True, seed=0, who="w", draws=[(0, 0)], coeffs=[1.0]),
        "omega is bool True"),
    (lambda: zokern.sketch("normal", (4, "x"), torch.ones(3, 1), seed=0, who="w", draws=[(0, 0)],
        coeffs=[1.0]), r"shape\[1\] is 'x'"),
    (lambda: zokern.sketch("normal", (4, 3), torch.ones(3, 1, device="meta"), seed=0, who="w", draws=[(0, 0)],
        coeffs=[1.0]), "omega.*meta"),
    (lambda: zokern.philox4x32([[1, 2, 3, 4]], [5, 6], rounds=()), r"rounds is \(\)"),
    (lambda: zokern.philox4x32([[1, 2, 3, 4]], [5, 6], rounds=True), "rounds is True"),
    (lambda: zokern.philox4x32([[1.5, 2, 3, 4]], [5, 6]), "counter is .*integers"),
    (lambda: zokern.lowrank_(torch.zeros(2, 2), 1, torch.ones(2, 1)), "left is int 1"),
    (lambda: zokern.Momentum(beta=None), "beta is None"),
    (lambda: zokern.Momentum(dampening="x"), "dampening is 'x'"),
    (lambda: zokern.Momentum(beta=NAN), "beta is nan"), (lambda: zokern.Momentum(beta=True), "beta is True"),
    (lambda: zokern.Adam(betas=(None, 0.9)), "betas is"), (lambda: zokern.Adam(betas=(0.9, NAN)), "betas is"),
    (lambda: zokern.Adam(bias_correction="x"), "bias_correction is 'x'"),
    (lambda: zokern.Adam(inside="x"), "inside is 'x'"),
    (lambda: zokern.Adam(eps=10**60), "adam_eps is 1000"), (lambda: zokern.Adam(eps=0.0), "adam_eps is 0.0"),
    (lambda: zokern.Adam(eps=1e-60), "adam_eps is 1e-60"), (lambda: zokern.Adam(eps="x"), "adam_eps is 'x'"),
    (lambda: zokern.directions.Aligned(delta="x"), "delta is 'x'"),
    (lambda: zokern.directions.Aligned(steps=True), "steps is True"),
    (lambda: zokern.directions.Aligned(delta=float("inf")), "delta is inf"),
    (lambda: zokern.directions.Lazy(rank=True), "rank is True"),
    (lambda: zokern.Spsa(1, zokern.Stencil("s", (1.0, -1.0), (NAN, NAN))), "stencil is"),
    (lambda: zokern.Spsa(1, zokern.Stencil("s", ("a", "b"), (0.5, -0.5))), "stencil is"),
    (lambda: zokern.Spsa(1, []), "stencil"),
])  # fmt: skip
def test_arguments_are_refused_with_their_names(call: Callable[[], Any], named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named):
        call()
