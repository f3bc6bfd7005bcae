"""update_: bit for bit the reference on every backend,
the public operation, and MeZO with momentum and Adam on paper."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from unittest.mock import patch

import conformance_update
import models
import oracle
import pytest
import torch
from models import batch, build, same_bits, snapshot, tiny
from torch import Tensor
from wrong.update import BACKENDS

import zokern
from zokern.backends import SCALARS, STATES
from zokern.backends.reference import Reference
from zokern.group import Group
from zokern.rule import dense, waiting

IDS = batch()
NAN = float("nan")


# Bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", conformance_update.CHECKS)
def test_cpu_is_the_reference(cpu, check: str) -> None:
    conformance_update.CHECKS[check](cpu, "cpu", "full")


def test_threads_change_no_bit(cpu) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            theta, m, v = torch.linspace(-1, 1, 200_003).bfloat16(), torch.ones(200_003), torch.ones(200_003)
            call(theta, "adam", (m, v), rounding="stochastic", first=9)
            results.append((theta, m, v))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(other, results[0]))


@pytest.mark.parametrize("check", ["update_shards", "update_empty"])
def test_reference(check: str) -> None:
    """Facts that need no second implementation."""
    conformance_update.CHECKS[check](Reference(), "cpu", "full")


@pytest.mark.parametrize("kind", BACKENDS, ids=lambda kind: kind.__name__)
def test_wrong_backend_is_rejected(kind) -> None:
    verdicts = conformance_update.run(kind(), scale="quick", only=kind.rejected_by)
    assert verdicts and all(verdicts.values()), (
        f"not rejected by {[name for name, problem in verdicts.items() if not problem]}"
    )
    assert (
        all("AssertionError" in problem for problem in verdicts.values()) or kind.__name__ == "EmptyFails"
    ), verdicts


def test_every_check_rejects_something() -> None:
    assert {check for kind in BACKENDS for check in kind.rejected_by} == set(conformance_update.CHECKS)


# The operation ----------------------------------------------------------------------------------------------


def call(theta, rule: str, states, **options) -> Tensor:
    given = {
        "seed": 3,
        "who": "w",
        "draws": [(2, 1)],
        "coeffs": [0.5],
        "scalars": conformance_update.USUAL.get(rule),
    } | options
    return zokern.update_(theta, given.pop("direction", "normal"), rule, states=states, **given)


def operands(rule: str, dtype: torch.dtype = torch.float32, n: int = 50) -> tuple[Tensor, list[Tensor]]:
    return torch.linspace(-1, 1, n).to(dtype), [torch.linspace(0.1, 2, n) for _ in STATES[rule]]


@pytest.mark.parametrize(
    ("rule", "dtype", "rounding", "backend"),
    [
        ("momentum", torch.float16, "stochastic", "cpu"),
        ("adam", torch.float32, "nearest", "reference"),
        ("adam", torch.bfloat16, "residual", "cpu"),
        ("sign", torch.bfloat16, "stochastic", "cpu"),
    ],
)
def test_passes_opcheck(rule: str, dtype: torch.dtype, rounding: str, backend: str) -> None:
    tensors = [torch.linspace(-1, 1, 33).to(dtype), torch.linspace(-1, 1, 64).to(dtype).view(8, 8).t()]
    states = [torch.linspace(0.1, 1, t.numel()).view(t.shape) for _ in STATES[rule] for t in tensors]
    low = (
        [torch.arange(t.numel(), dtype=torch.int16).view(t.shape) for t in tensors]
        if rounding == "residual"
        else []
    )
    numbers = torch.tensor(conformance_update.USUAL[rule])
    names = dict(
        direction="normal",
        rule=rule,
        seed=-5,
        who=[1, 2],
        steps=[3, 3],
        draws=[0, 1],
        first=[0, 7],
        clock=None,
    )
    rest = dict(
        coeffs=torch.tensor([0.1, -0.2]), scalars=numbers, rounding=rounding, residuals=low, backend=backend
    )
    torch.library.opcheck(torch.ops.zokern.update_, (), dict(tensors=tensors, states=states) | names | rest)


def on_paper(
    rule: str, scalars, theta: Tensor, g: Tensor, states: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The formula in float64."""
    s = dict(zip(SCALARS[rule], scalars))
    if rule == "sign":
        return s["decay"] * theta + s["lr"] * g.sign(), []
    if rule == "momentum":
        m = s["beta"] * states[0] + s["alpha"] * g
        return s["decay"] * theta + s["lr"] * m, [m]
    m, v = s["beta1"] * states[0] + s["alpha1"] * g, s["beta2"] * states[1] + s["alpha2"] * g * g
    return s["decay"] * theta + s["lr"] * m / ((v + s["inside"]).sqrt() * s["correction"] + s["eps"]), [m, v]


EXAMPLE = {
    "momentum": (0.99, 0.1, 0.9, 0.3),
    "adam": (0.99, 1.0, 0.9, 0.1, 0.99, 0.01, 0.2, 1.5, 0.5),
    "sign": (0.99, 0.1),
}


def distance(rule: str, backend: str, **change) -> float:
    """How far a call is from the formula, in units of what ten roundings may do;
    `change` are wrong arguments."""
    scalars = EXAMPLE[rule]
    theta, states = operands(rule, n=500)
    g = 0.5 * zokern.draw("normal", (500,), seed=3, who="w", step=2, draw=1).double()
    want, kept = on_paper(rule, scalars, theta.double(), g, [t.double() for t in states])
    call(theta, rule, states, backend=backend, **{"scalars": scalars} | change)
    size = 1.0 + want.abs()
    return max(
        float(((a - b).abs() / (10 * 2.0**-24 * size)).max()) for a, b in zip([theta, *states], [want, *kept])
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("rule", STATES)
def test_is_the_formula(rule: str, backend: str) -> None:
    assert distance(rule, backend) <= 1.0
    other = [-0.5] if rule == "sign" else [0.5001]
    assert distance(rule, backend, coeffs=other) > 1.0 and distance(rule, backend, draws=[(2, 0)]) > 1.0
    right = EXAMPLE[rule]
    for i in range(len(right)):
        wrong = [x * 1.001 if i == j else x for j, x in enumerate(right)]
        assert distance(rule, backend, scalars=wrong) > 1.0, SCALARS[rule][i]


@pytest.mark.parametrize("rule", STATES)
def test_lr_0_moves_no_weight(rule: str) -> None:
    """And the states go on; a decay of 1 is no rounding."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rounding in ("nearest", "stochastic", *(["residual"] if dtype == torch.bfloat16 else [])):
            theta, states = operands(rule, dtype)
            low = [torch.arange(50, dtype=torch.int16)] if rounding == "residual" else None
            before = theta.clone()
            was = [state.clone() for state in states]
            bits = torch.arange(50, dtype=torch.int16)
            scalars = (1.0, 0.0, *conformance_update.USUAL[rule][2:])
            assert call(theta, rule, states, scalars=scalars, rounding=rounding, residuals=low).tolist() == [
                0
            ]
            assert (
                same_bits(theta, before)
                and not any(map(same_bits, states, was))
                and (low is None or torch.equal(low[0], bits))
            )
            call(theta, rule, states, scalars=(1.0, 0.5, *scalars[2:]), rounding=rounding, residuals=low)
            assert not same_bits(theta, before)


def test_a_list_is_its_tensors_one_by_one() -> None:
    thetas = [
        operands("adam", dtype, n)[0]
        for dtype, n in ((torch.float32, 50), (torch.bfloat16, 7), (torch.float16, 1001))
    ]
    states = [[torch.rand(t.shape) for t in thetas] for _ in range(2)]
    alone = copy.deepcopy((thetas, states))
    call(
        thetas,
        "adam",
        states,
        who=["a", "b", "c"],
        first=[0, 3, 9],
        draws=[(1, 0), (1, 1)],
        coeffs=[0.5, 2.0],
    )
    for i in (2, 0, 1):
        m, v = (kept[i] for kept in alone[1])
        call(
            alone[0][i],
            "adam",
            (m, v),
            who="abc"[i],
            first=(0, 3, 9)[i],
            draws=[(1, 0), (1, 1)],
            coeffs=[0.5, 2.0],
        )
    assert all(
        same_bits(a, b)
        for a, b in zip((*thetas, *states[0], *states[1]), (*alone[0], *alone[1][0], *alone[1][1]))
    )


def test_torch_compile_sees_the_operation() -> None:
    def step(theta, m):
        call(theta, "momentum", [m])
        return theta * 2

    theta, (m,) = operands("momentum")
    expected = step(theta.clone(), m.clone())
    assert same_bits(torch.compile(step, backend="eager")(theta, m), expected)


THETA, M, V = torch.linspace(-1, 1, 50), torch.zeros(50), torch.zeros(50)
BAD = [
    ({"rule": "sgd"}, "rule is 'sgd'; expected one of"),
    ({"rule": "sign"}, r"states has \[1, 1\] tensors; rule 'sign' keeps nothing: expected ()"),
    ({"states": (M,)}, r"states has \[1\] tensors; rule 'adam' keeps m, v"),
    ({"states": ([M], [V, V])}, "expected 1 of each"),
    ({"states": (M, V.double())}, r"v\[0\] is float64"),
    ({"states": (M.bfloat16(), V)}, r"m\[0\] is bfloat16\[50\] on cpu; expected contiguous float32\[50\]"),
    ({"states": (M[:49], V)}, r"m\[0\] is float32\[49\]"),
    ({"states": (torch.zeros(100)[::2], V)}, "expected contiguous"),
    ({"states": (M, M)}, "state 0 and state 1 share memory"),
    ({"states": (THETA, V)}, r"tensors\[0\] and state 0 share memory"),
    ({"states": (M, V.to("meta"))}, "on meta"),
    ({"scalars": (1.0, 0.1, 0.9, 0.1)}, "expected 9 finite numbers: decay, lr, beta1"),
    ({"scalars": (NAN,) * 9}, "expected 9 finite numbers"),
    (
        {"scalars": torch.zeros(9, dtype=torch.float64)},
        r"scalars is torch.float64\[9\] on cpu; expected float32\[9\] on cpu",
    ),
    ({"scalars": torch.zeros(4)}, r"scalars is torch.float32\[4\]"),
    ({"states": (M, [None])}, r"states\[1\]\[0\] is NoneType"),
    ({"states": None}, r"states is NoneType; expected \(\[m, ...\],\)"),
    ({"coeffs": 0.1}, "coeffs is 0.1; expected a sequence"),
    ({"scalars": 0.1}, "scalars is 0.1; expected a sequence of 9 finite numbers: decay"),
    ({"draws": [0]}, r"draws is \[0\]; expected pairs"),
    ({"coeffs": []}, "1 draws and 0 coefficients"),
    ({"coeffs": [NAN]}, "coeffs is"),
    ({"draws": []}, "0 draws"),
    ({"rounding": "up"}, "rounding is 'up'"),
    ({"rounding": "residual"}, "needs bfloat16"),
    ({"clock": torch.zeros(1)}, "clock is"),
    ({"who": ["a", "b"]}, "1 tensors, 2 names"),
    ({"first": 2**35}, "first"),
    ({"seed": -1}, "seed"),
    ({"backend": "gpu"}, "gpu"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_refuses_and_writes_nothing(change: dict, message: str) -> None:
    before = THETA.clone()
    given = {"rule": "adam", "states": (M, V), "theta": THETA} | change
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        call(given.pop("theta"), given.pop("rule"), given.pop("states"), **given)
    assert same_bits(THETA, before) and not M.any() and not V.any()


# MeZO with a rule -------------------------------------------------------------------------------------------

RULES: dict[str, Callable[[], zokern.rule.Rule]] = {
    "zo_sgd_mmt": lambda: zokern.Momentum(0.6, dampening=0.0),
    "average": lambda: zokern.Momentum(0.6),
    "zo_adam": lambda: zokern.Adam((0.6, 0.9)),
    "adam_inside": lambda: zokern.Adam((0.6, 0.9), bias_correction=False, inside=True),
    "adam_inside_corrected": lambda: zokern.Adam((0.6, 0.9), inside=True, eps=1e-4),
    "sign": lambda: zokern.SignSgd(),
}


def check_rule(
    name: str,
    steps: int = 3,
    queries: int = 1,
    weight_decay: float = 0.0,
    evaluation: str = "scratch",
    **options,
) -> None:
    """Steps of a float32 model against the rule on paper, in float64, from the coefficients of each step."""
    model = tiny()
    options = {
        "lr": 3e-3,
        "seed": 5,
        "queries": queries,
        "weight_decay": weight_decay,
        "evaluation": evaluation,
    } | options
    optimizer = zokern.MeZO(model, rule=RULES[name](), **options)
    lr = options["lr"]
    theta = {n: p.detach().double() for n, p in model.named_parameters()}
    size = {n: t.abs() + (4e-3 if evaluation == "inplace" else 0.0) for n, t in theta.items()}
    m = {n: torch.zeros_like(t) for n, t in theta.items()}
    v, spread = copy.deepcopy(m), copy.deepcopy(m)
    for t in range(1, steps + 1):
        result = zokern.step(optimizer, lambda: models.next_token_loss(model(IDS), IDS))
        for n, p in model.named_parameters():
            draws = [oracle.z(n, p, optimizer.seed, t - 1, k).double() for k in range(queries)]
            g = sum(-c / queries * z for c, z in zip(result.coefficients, draws))
            around = sum(abs(c) / queries * z.abs() for c, z in zip(result.coefficients, draws))
            if name == "sign":
                move, scale = g.sign(), torch.ones_like(g)
            elif name in ("zo_sgd_mmt", "average"):
                new = 1.0 if name == "zo_sgd_mmt" or t == 1 else 0.4
                m[n], spread[n] = 0.6 * m[n] + new * g, 0.6 * spread[n] + around
                move, scale = m[n], spread[n]
            else:
                m[n], v[n] = 0.6 * m[n] + 0.4 * g, 0.9 * v[n] + 0.1 * g * g
                spread[n] = 0.6 * spread[n] + 0.4 * around
                c1, c2 = (1.0, 1.0) if name == "adam_inside" else (1 - 0.6**t, 1 - 0.9**t)
                if name == "zo_adam":
                    root = (v[n] / c2).sqrt() + 1e-8
                else:
                    root = (v[n] / c2 + (1e-4 if name == "adam_inside_corrected" else 1e-8)).sqrt()
                move, scale = m[n] / c1 / root, spread[n] / c1 / root
            decay = 1.0 - lr * weight_decay
            theta[n] = decay * theta[n] + lr * move
            size[n] = decay * size[n] + lr * scale
            ratio = float(((p.detach().double() - theta[n]).abs() / (30 * 2.0**-24 * size[n] + 1e-12)).max())
            assert ratio <= 1.0, f"step {t}: {n} is {ratio:.3g} times the bound away from the formula"


@pytest.mark.parametrize("name", RULES)
def test_rule_equals_formula(name: str) -> None:
    check_rule(name)
    check_rule(name, queries=3, weight_decay=0.5, steps=2)


@pytest.mark.parametrize("name", ["zo_sgd_mmt", "zo_adam"])
def test_rule_in_place(name: str) -> None:
    """An evaluation in place is undone before the rule moves the weights."""
    check_rule(name, evaluation="inplace", steps=2)


def with_scalars(change: Callable):
    """The numbers of a step changed on the way to the verb."""
    right = Group.update_

    def wrong(self, plan, members, coeffs, rule, scalars, states):
        return right(self, plan, members, coeffs, rule, lambda: change(plan.step, scalars()), states)

    return patch.object(Group, "update_", wrong)


WRONG = {
    "momentum_from_zero": ("average", lambda: with_scalars(lambda step, s: (*s[:2], 0.6, 0.4))),
    "dampened": ("zo_sgd_mmt", lambda: with_scalars(lambda step, s: (*s[:3], s[3] if step == 0 else 0.4))),
    "ascends": ("zo_adam", lambda: with_scalars(lambda step, s: (s[0], -s[1], *s[2:]))),
    "not_corrected": ("zo_adam", lambda: with_scalars(lambda step, s: (s[0], 3e-3, *s[2:7], 1.0, s[8]))),
    "corrected_by_the_step_after": ("zo_adam",
        lambda: with_scalars(lambda step, s: RULES["zo_adam"]().scalars(3e-3, updates=step + 2))),
    "eps_moved": ("adam_inside_corrected", lambda: with_scalars(lambda step, s: (*s[:6], 0.0, s[7], 1e-4))),
    "state_not_kept": ("average", lambda: patch("zokern.rule.momentum.advance", forgets)),
}  # fmt: skip


def forgets(rule, plan, group, weights, scalars, states, *rates):
    for tensor in group.tensors:
        states.pop(tensor, None)
    return dense.advance(rule, plan, group, weights, scalars, states, *rates)


@pytest.mark.parametrize("wrong", WRONG)
def test_check_rejects_wrong_rule(wrong: str) -> None:
    name, mistake = WRONG[wrong]
    with mistake(), pytest.raises(AssertionError, match="away from the formula"):
        check_rule(name)


def run(rule: Callable, steps: int, model=None, optimizer=None, **options):
    model = tiny(torch.bfloat16) if model is None else model
    optimizer = (
        zokern.MeZO(model, rule=rule(), lr=3e-3, eps=1e-2, seed=7, **options)
        if optimizer is None
        else optimizer
    )
    for _ in range(steps):
        zokern.step(optimizer, lambda: models.next_token_loss(model(IDS), IDS))
    return model, optimizer


@pytest.mark.parametrize("rounding", ["stochastic", "residual"])
@pytest.mark.parametrize("name", ["average", "zo_adam"])
def test_resumes_to_the_same_bits(name: str, rounding: str) -> None:
    """States and the number of updates come back with state_dict; without them the run is another."""
    straight, _ = run(RULES[name], 5, rounding=rounding)
    half, optimizer = run(RULES[name], 2, rounding=rounding)
    saved, weights = copy.deepcopy(optimizer.state_dict()), snapshot(half)
    kinds = {t.dtype for state in saved["state"].values() for t in state.values() if isinstance(t, Tensor)}
    assert kinds <= {torch.float32, torch.int16} and torch.float32 in kinds
    for forget in (False, True):
        model = tiny(torch.bfloat16)
        model.load_state_dict(weights)
        again = zokern.MeZO(model, rule=RULES[name](), lr=3e-3, eps=1e-2, seed=7, rounding=rounding)
        again.load_state_dict(copy.deepcopy(saved))
        if forget:
            for state in again.state.values():
                for key in [key for key in state if key != "residual"]:
                    del state[key]
        run(RULES[name], 3, model, again)
        same = all(same_bits(a, b) for a, b in zip(model.parameters(), straight.parameters()))
        assert same is not forget


def test_a_parameter_that_thaws_starts_its_own_count() -> None:
    """Tensors with equally many updates share a launch;
    a frozen one is corrected for its own number of updates."""
    model = tiny()
    last = list(model.parameters())[-1]
    last.requires_grad_(False)
    optimizer = zokern.MeZO(model, rule=zokern.Adam(), seed=1, lr=1e-3)
    launches: list[int] = []
    right = Group.update_

    def counted(self, plan, members, *rest):
        launches.append(len(members))
        return right(self, plan, members, *rest)

    with patch.object(Group, "update_", counted):
        zokern.step(optimizer, lambda: models.next_token_loss(model(IDS), IDS))
        last.requires_grad_(True)
        optimizer.add_param_group({"params": [last]})
        zokern.step(optimizer, lambda: models.next_token_loss(model(IDS), IDS))
    total = len(list(model.parameters()))
    assert launches == [total - 1, total - 1, 1]
    assert {optimizer.state[p]["updates"] for p in model.parameters()} == {1, 2} and optimizer.state[last][
        "updates"
    ] == 1


LEARNS = {
    "zo_sgd_mmt": (zokern.Momentum, {"beta": 0.9, "dampening": 0.0}, 2e-4),
    "zo_adam": (zokern.Adam, {}, 2e-3),
}


@pytest.mark.parametrize("name", LEARNS)
def test_loss_falls(name: str) -> None:
    """Of a batch on a small OPT; and rises where the sign of a step is wrong."""
    kind, options, lr = LEARNS[name]

    def fall(maximize: bool, steps: int) -> float:
        model, inputs = build(models.ARCHITECTURES["opt"]), models.inputs("opt")
        optimizer = zokern.MeZO(model, rule=kind(**options), lr=lr, maximize=maximize)
        losses = [zokern.step(optimizer, lambda: model(**inputs).loss).loss for _ in range(steps)]
        print(f"{name}: {losses[0]:.3f} to {sum(losses[-5:]) / 5:.3f} in {steps} steps")
        return losses[0] - sum(losses[-5:]) / 5

    assert fall(False, 20) > 0.04 and fall(True, 8) < 0.0


def test_numbers_of_the_rules() -> None:
    assert zokern.Momentum(0.9).scalars(1e-3) == (1.0, 1e-3, 0.0, 1.0)
    assert zokern.Momentum(0.9).scalars(1e-3, 0.5, 2) == pytest.approx((0.5, 1e-3, 0.9, 0.1))
    assert zokern.Momentum(0.9, dampening=0.0).scalars(1e-3, updates=7) == (1.0, 1e-3, 0.9, 1.0)
    got = zokern.Adam().scalars(1e-3, updates=3)
    assert got == pytest.approx(
        (1.0, 1e-3 / (1 - 0.9**3), 0.9, 0.1, 0.999, 0.001, 0.0, 1 / math.sqrt(1 - 0.999**3), 1e-8)
    )


BAD_RULES = [
    (lambda: zokern.Momentum(1.0), "beta is 1.0"),
    (lambda: zokern.Momentum(0.9, dampening=1.5), "dampening is 1.5"),
    (lambda: zokern.Adam(eps=0.0), "eps is 0.0"),
    (lambda: zokern.Adam(0.9), "betas is 0.9; expected two numbers"),
    (lambda: zokern.Adam(betas=(0.9, 1.0)), r"betas is \(0.9, 1.0\)"),
    (lambda: zokern.Adam().scalars(1e-3, updates=0), "updates is 0; expected .* counted from 1"),
    (lambda: zokern.Momentum().scalars(1e-3, updates=0), "updates is 0"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_RULES)
def test_bad_numbers_of_a_rule_are_refused(wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*(name for name in RULES if name != "sign"), "tezo_adam"])
def test_steps_of_lr_0_keep_up_the_states_and_no_more(name: str, dtype: torch.dtype, monkeypatch) -> None:
    """Not even -0.0 moves, and the states have the bits of a run whose weights were read as they are."""
    monkeypatch.setattr(dense, "PIECE", 1000)
    left, right = tiny().to(dtype), tiny().to(dtype)
    for model in (left, right):
        with torch.no_grad():
            for p in model.parameters():
                p.view(-1)[::5] = -0.0
    before = [p.detach().clone() for p in left.parameters()]
    optimizers = [
        zokern.TeZO(model, rule="adam", lr=0.0, eps=1e-2, seed=5) if name == "tezo_adam"
        else zokern.MeZO(model, rule=RULES[name](), lr=0.0, eps=1e-2, seed=5, force=True) for model in (left,
            right)
    ]  # fmt: skip
    for _ in range(2):
        zokern.step(optimizers[0], lambda: models.next_token_loss(left(IDS), IDS))
        with (
            patch.object(waiting, "is_nothing", lambda *_: False),
            patch.object(dense, "is_nothing", lambda *_: False),
        ):
            with torch.no_grad():  # what the launch makes of -0.0 is put back
                zokern.step(optimizers[1], lambda: models.next_token_loss(right(IDS), IDS))
                assert not all(map(same_bits, right.parameters(), before))
                for p, q in zip(right.parameters(), before):
                    p.copy_(q)
        assert all(map(same_bits, left.parameters(), before))
    for p, q in zip(left.parameters(), right.parameters()):
        kept, other = (optimizer.state[t] for optimizer, t in zip(optimizers, (p, q)))
        assert kept.keys() == other.keys() and kept
        assert all(
            same_bits(kept[k], other[k]) if isinstance(kept[k], Tensor) else kept[k] == other[k] for k in kept
        )
