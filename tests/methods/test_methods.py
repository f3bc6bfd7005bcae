"""Each method against its formula in float64:
losses, coefficients, every step's weights, over changes of the basis."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import models
import pytest
import torch
from method_check import IDS, check_method, loss_of
from models import build, same_bits, snapshot, tiny
from mutant import misread, replaced, together
from recipes import DENSE, METHODS, ONE_EACH, ROWS, SLOPES
from torch import Tensor, nn
from torch.func import functional_call

import zokern
from zokern.directions import (
    Aligned,
    Diagonal,
    Drawn,
    Lazy,
    LowRank,
    Masked,
    Subspace,
    aligned,
    lowrank,
    orthonormal,
)
from zokern.estimator import ForwardGradient, Ranked, Spread, Spsa
from zokern.evaluation import Point
from zokern.methods import pgap
from zokern.rule import adam, carry, momentum, muon, sgd
from zokern.stream import BASIS, draw_word

pytestmark = pytest.mark.usefixtures("one_thread")

CASES: dict[str, dict] = {
    **{name: {"name": name} for name in METHODS},
    **{name: {"name": name, "steps": 20} for name in [*DENSE, *ROWS]},
    "subzero_adapters_narrow": {"name": "subzero_adapters", "width": 12},
    "subzero_queries_decay": {"name": "subzero", "queries": 3, "weight_decay": 0.5},
    "lozo_forward": {"name": "lozo", "queries": 2, "stencil": "forward"},
    "lozo_m_queries_decay": {"name": "lozo_m", "queries": 2, "weight_decay": 0.5},
    "tezo_adam_queries_decay": {"name": "tezo_adam", "queries": 2, "weight_decay": 0.5},
    "pgap_queries": {"name": "pgap", "queries": 2},
    "fzoo_decay": {"name": "fzoo", "weight_decay": 0.5},
    "adamezo_queries_decay": {"name": "adamezo", "queries": 2, "weight_decay": 0.5},
    "window_decay": {"name": "window_average", "weight_decay": 0.5},
    "blockmezo_decay": {"name": "blockmezo_jacobi", "weight_decay": 0.5},
    "subzero_plus_long": {"name": "subzero_plus", "steps": 20},
    "subzero_plus_carry_long": {"name": "subzero_plus_carry", "steps": 20, "weight_decay": 0.5},
    "zo_muon_long": {"name": "zo_muon", "steps": 20, "weight_decay": 0.5},
    "zo_mopi_long": {"name": "zo_mopi_carry", "steps": 20, "weight_decay": 0.5},
    "lozo_adam_queries": {"name": "lozo_adam_carry", "queries": 2, "stencil": "forward"},
    "right_drawn_long": {
        "name": "right_drawn",
        "steps": 20,
        "queries": 2,
        "stencil": "forward",
        "weight_decay": 0.5,
    },
    "eggroll_long": {"name": "eggroll", "steps": 20, "weight_decay": 0.5},
    "both_drawn_long": {"name": "both_drawn", "steps": 20, "weight_decay": 0.5},
    "sparse_momentum_decay": {
        "name": "SparseMeZO",
        "rule": zokern.Momentum(0.6),
        "queries": 2,
        "weight_decay": 0.5,
    },
    "sparse_global_adam": {"name": "SparseMeZO", "scope": "global", "rule": zokern.Adam((0.6, 0.9))},
    "hizoo": {"name": "HiZOO", "smooth": 0.05, "eps": 1e-2, "steps": 20},
    "hizoo_queries_decay": {"name": "HiZOO", "smooth": 0.3, "eps": 1e-2, "queries": 2, "weight_decay": 0.5},
    "sparse_random": {
        "name": "SparseMeZO",
        "by": "random",
        "every": 3,
        "sparsity": 0.8,
        "eps": 1e-2,
        "steps": 20,
    },
    "sparse_random_global": {
        "name": "SparseMeZO",
        "by": "random",
        "scope": "global",
        "direction": "rademacher",
    },
    "sparse_sign": {"name": "SparseMeZO", "by": "random", "every": 2, "rule": zokern.SignSgd(), "lr": 1e-4},
    "fgd_queries_decay": {"name": "FGD", "queries": 3, "weight_decay": 0.5},
    **{f"fgd_{d.name}": {"name": "FGD", "direction": d} for d in (Subspace(3, 3), Lazy(2, 3), Diagonal(3))},
    "addax_decay": {"name": "Addax", "weight_decay": 0.5, "steps": 20, "eps": 1e-2},
    **{f"addax_{d.name}": {"name": "Addax", "direction": d} for d in (Subspace(3, 3), Lazy(2, 3))},
    "addax_slopes": {"name": "Addax", "estimator": ForwardGradient()},
    "fgd_masked": {"name": "FGD", "direction": Masked(0.5)},
    "addax_masked": {"name": "Addax", "direction": Masked(0.5)},
    "hybrid_masked": {"name": "Hybrid", "direction": Masked(0.5)},
    "hybrid_queries": {"name": "Hybrid", "estimator": Spsa(2), "weight_decay": 0.5, "steps": 20},
    "hybrid_sgd": {
        "name": "Hybrid",
        "first_order": ["head", "up"],
        "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    },
    "hybrid_lowrank": {"name": "Hybrid", "direction": Lazy(2, 3), "rule": zokern.Momentum(0.6)},
}


MODES: dict[str, dict] = {
    "deferred": {"evaluation": "paired"}, "immediate": {"evaluation": "paired", "defer": False},
    "scratch": {"evaluation": "scratch"},
    "master": {"evaluation": "master"}, "inplace": {"evaluation": "inplace"}, "jvp": {"evaluation": "jvp"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        (case, mode)
        for case in CASES
        for mode in MODES
        if mode == ("jvp" if case == "addax_slopes" or CASES[case]["name"] in SLOPES else "deferred")
        or (case in (*ONE_EACH, "dpzo") and mode != "jvp")
    ],  # fmt: skip
)
def test_method_equals_formula(case: str, mode: str) -> None:
    check_method(**CASES[case], **MODES[mode])


@pytest.mark.parametrize(
    "method",
    [zokern.SubZero, zokern.PGAP, partial(zokern.MeZO, direction=Lazy(2))],
    ids=["subzero", "pgap", "lazy"],
)
def test_adam_is_refused_where_the_basis_changes(method: Callable) -> None:
    """Before a step, not at the first change of the basis. TeZO's does not change."""
    with pytest.raises(
        ValueError, match="rule is 'adam' with direction .*expected zokern.Adam.core=True.*zokern.TeZO"
    ):
        method(tiny(), rule=zokern.Adam())
    method(tiny(), rule=zokern.Sgd())
    method(tiny(), rule=zokern.Adam(core=True))
    zokern.MeZO(tiny(), direction=Diagonal(2), rule=zokern.Adam())


@pytest.mark.parametrize("rule", [zokern.Momentum(), zokern.Adam(core=True)], ids=lambda rule: rule.name)
def test_a_rule_that_keeps_numbers_needs_a_factor_that_is_kept(rule) -> None:
    """Where U and V are drawn, a sum of draws has the columns of all of them."""
    with pytest.raises(
        ValueError, match=f"rule is '{rule.name}' with direction 'lowrank', which draws U and V in every step"
    ):
        zokern.MeZO(tiny(), direction=LowRank(Drawn(), None, Drawn(), rank=2), rule=rule)


BAD_METHODS = {
    "rank": (partial(zokern.TeZO, rank=2.0), r"rank is 2.0; expected an integer, at least 1, or a mapping"),
    "rank 0": (partial(zokern.TeZO, rank=0), "rank is 0"),
    "misspelt": (
        partial(zokern.TeZO, rank={"misspelt": 4, "up.weight": 2}),
        r"rank names \['misspelt'\].*'up.weight'",
    ),
    "rule": (
        partial(zokern.TeZO, rule="adma"),
        "rule is 'adma'; expected 'sgd', 'momentum' or 'adam', or a rule",
    ),
    "rule's class": (partial(zokern.TeZO, rule=zokern.Adam), "rule is <class .*zokern.Adam\\(\\)"),
    "stencil": (
        partial(zokern.FZOO, stencil="central"),
        "stencil is 'central' beside an estimator.*zokern.Spsa",
    ),
}


@pytest.mark.parametrize("case", BAD_METHODS)
def test_bad_arguments_are_refused_by_name(case: str) -> None:
    method, message = BAD_METHODS[case]
    with pytest.raises(ValueError, match=message):
        method(tiny())


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("sgd", zokern.Sgd()),
        ("momentum", zokern.Momentum(0.9)),
        ("adam", zokern.Adam(inside=True, bias_correction=False)),
    ],
)
def test_tezo_takes_a_rule_as_it_takes_its_name(name: str, rule) -> None:
    ends = []
    for given in (name, rule):
        model = tiny()
        optimizer = zokern.TeZO(model, rank={"up.weight": 2}, rule=given, lr=1e-3, seed=1)
        ends.append([zokern.step(optimizer, lambda model=model: loss_of(model)).losses for _ in range(3)])
    assert ends[0] == ends[1]


def test_tensors_that_squeeze_to_matrices_are_factored() -> None:
    """(m, n, 1) is a matrix, a stack is not."""
    for name in ("subzero", "lozo", "tezo", "pgap"):
        optimizer = METHODS[name](
            nn.ParameterDict({"a": torch.ones(4, 5, 1), "b": torch.ones(2, 4, 5), "c": torch.ones(7)})
        )
        zokern.step(
            optimizer,
            lambda o=optimizer: sum((p * p).sum() for p in o.param_groups[0]["params"]) + torch.rand(()),
        )
        assert {m.name: m.shape for m in optimizer.matrices.values()} == {"a": (4, 5)}


# Wrong versions ---------------------------------------------------------------------------------------------


def scaled_updates(factor: Callable[[int], float], *kinds: type):
    """The update of each step times a factor."""

    def update(right, self, p, g, weights, lr, *rest, **more):
        return right(self, p, g, weights, factor(p.step) * lr, *rest, **more)

    return together(replaced(kind, "update", update) for kind in kinds or (sgd.Sgd, momentum.Momentum))


def doubled_writes():
    """What waits is written twice over."""

    def write(right, self, *rest):
        for matrix in self.matrices:
            if matrix.pending is not None:
                matrix.pending = matrix.pending * 2
        return right(self, *rest)

    return replaced(zokern.group.Group, "write", write)


def draws_of_step(kind: type, of: Callable):
    """Draws named after the step of(self, step)."""
    return replaced(
        kind, "draws", lambda right, self, m, source, step, draw: right(self, m, source, of(self, step), draw)
    )


def spread(factor: float):
    """sigma times a factor."""
    return replaced(Spread, "slopes", lambda right, *rest: right(*rest) / factor)


def losses_of_step(change: Callable):
    """Differences of changed losses."""
    return replaced(Spsa, "differences", lambda right, self, losses: right(self, change(losses)))


def misread_always(kind: type, wrong: dict):
    """A rule that is built with one number, and works with another from then on."""

    def rebase(right, self, *rest):
        before = dict(vars(self))
        vars(self).update(wrong)
        right(self, *rest)
        vars(self).update(before)

    return replaced(kind, "rebase", rebase)


def begun_short(right, rule, state, matrix, new, beta):
    """M is (1 - beta) G in the first step."""
    share = 1.0 if "momentum" in state else 1.0 - rule.beta
    return right(rule, state, matrix, new * share, beta)


def unnormalised(right: Callable, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    _, v = right(x, v)
    return v @ (x.mT @ v).mT, v


def each_draw(kind: type, change: Callable):
    return replaced(kind, "draws", lambda right, *rest: [change(x) for x in right(*rest)])


def each_reach(change: Callable):
    """P-GAP's alignment with other distances."""
    return replaced(
        aligned, "align_", lambda right, cores, s, reaches: right(cores, s, [change(r) for r in reaches])
    )


WRONG: dict[str, tuple[str, Callable]] = {
    "sign_flip": ("subzero", lambda: scaled_updates(lambda step: -1.0)),
    "half_a_step": ("lozo", lambda: scaled_updates(lambda step: 0.5)),
    "update_scaled_twice": ("subzero", doubled_writes),
    "scale_forgotten": ("subzero", lambda: patch.object(Subspace, "scale", lambda self, matrix: 1.0)),
    "scale_of_ranks": ("subzero",
        lambda: patch.object(Subspace, "scale", lambda self, m: math.sqrt(m.rows * m.columns / m.rank))),
    "basis_not_orthonormal": ("subzero",
        lambda: patch.object(lowrank, "orthonormal", lambda xs: [x.contiguous() for x in xs])),
    "negative_diagonal": ("subzero",
        lambda: patch.object(lowrank, "orthonormal",
            lambda xs: [torch.linalg.qr(x)[0].contiguous() for x in xs])),
    "basis_of_every_step": ("subzero", lambda: patch.object(Subspace, "basis_step", lambda self, step: step)),
    "basis_of_the_first_step": ("subzero",
        lambda: patch.object(Subspace, "basis_step", lambda self, step: 0)),
    "sides_swapped": ("subzero", lambda: patch.multiple(lowrank, LEFT=lowrank.RIGHT, RIGHT=lowrank.LEFT)),
    "one_core_for_all_steps": ("subzero", lambda: draws_of_step(Subspace, lambda self, step: 0)),
    "core_transposed": ("subzero", lambda: each_draw(Subspace, lambda c: c.mT.contiguous())),
    "adapters_not_reshaped": ("subzero_all",
        lambda: patch.object(Subspace, "shape", lambda self, t: lowrank.matrix_shape(t))),
    "far_from_square": ("subzero_all",
        lambda: patch.object(lowrank, "near_square", lambda count: (2, count // 2))),
    "left_kept_for_the_interval": ("lozo",
        lambda: draws_of_step(Lazy, lambda self, step: self.basis_step(step))),
    "right_kept_for_ever": ("lozo", lambda: patch.object(Lazy, "basis_step", lambda self, step: 0)),
    "lazy_scale_forgotten": ("lozo", lambda: patch.object(Lazy, "scale", lambda self, matrix: 1.0)),
    "lazy_scale_of_one_rank": ("lozo",
        lambda: patch.object(Lazy, "scale", lambda self, matrix: 1.0 / matrix.rank)),
    "lazy_never_unit": ("lozo_unit", lambda: each_draw(Lazy, lambda u: u / math.sqrt(u.shape[1]))),
    "diagonal_scale_forgotten": ("tezo", lambda: patch.object(Diagonal, "scale", lambda self, matrix: 1.0)),
    "diagonal_scale_of_a_full_core": ("tezo",
        lambda: patch.object(Diagonal, "scale", lambda self, matrix: 1.0 / matrix.rank)),
    "diagonal_never_unit": ("tezo_unit", lambda: each_draw(Diagonal, lambda c: c / math.sqrt(len(c)))),
    "paper_scale": ("lozo",
        lambda: replaced(Lazy, "draws", lambda right, self, *a: [u / self.rank for u in right(self, *a)])),
    "not_carried_over": ("lozo_m", lambda: patch.object(momentum.Momentum, "rebase", lambda *_: None)),
    "carried_without_n": ("lozo_m",
        lambda: replaced(carry, "_gram", lambda right, a, b: right(a, b) * len(a))),
    "carried_backwards": ("lozo_m", lambda: replaced(carry, "_gram", lambda right, a, b: right(b, a))),
    "beta_on_the_new": ("lozo_m",
        lambda: misread(momentum.Momentum,
            lambda rule: {"beta": 1.0 - rule.beta, "dampening": 1.0 - rule.dampening})),
    "tau_of_the_first_step": ("tezo", lambda: draws_of_step(Diagonal, lambda self, step: 0)),
    "basis_moves": ("tezo", lambda: patch.object(Diagonal, "basis_step", lambda self, step: step)),
    "full_core": ("tezo",
        lambda: replaced(Diagonal, "draws",
            lambda right, self, m, source, *rest: source(m, [(x.rank, x.rank) for x in m], *rest))),
    "momentum_from_zero": ("tezo_m", lambda: scaled_updates(lambda step: 0.4 if step == 0 else 1.0)),
    "second_moment_forgotten": ("tezo_adam", lambda: patch.object(adam, "_root", torch.ones_like)),
    "eps_outside_the_root": ("tezo_adam",
        lambda: patch.object(adam, "_root", lambda x: (x - 1e-8).clamp(min=0).sqrt() + 1e-8)),
    "not_corrected": ("tezo_adam_corrected",
        lambda: misread(adam.Adam, lambda rule: {"bias_correction": False})),
    "betas_swapped": ("tezo_adam", lambda: misread(adam.Adam, lambda rule: {"betas": rule.betas[::-1]})),
    "not_aligned": ("pgap", lambda: patch.object(aligned, "align_", lambda cores, spectra, reaches: None)),
    "aligned_the_other_way": ("pgap", lambda: each_reach(lambda r: -r)),
    "delta_without_root": ("pgap", lambda: each_reach(lambda r: r * abs(r))),
    "delta_stays": ("pgap_matched", lambda: patch.object(Aligned, "delta_at", lambda self, step: self.delta)),
    "delta_too_fast": ("pgap_matched",
        lambda: replaced(Aligned, "delta_at", lambda right, self, step: right(self, step + 1))),
    "always_positive": ("pgap", lambda: each_reach(abs)),
    "core_moments_swapped": ("subzero_plus",
        lambda: misread(adam.Adam, lambda rule: {"betas": rule.betas[::-1]})),
    "core_not_corrected": ("subzero_plus",
        lambda: misread(adam.Adam, lambda rule: {"bias_correction": False})),
    "core_step_unscaled": ("subzero_plus", lambda: scaled_updates(lambda step: 3 / 28, adam.Adam)),
    "core_moments_of_scaled_draws": ("right_drawn_adam",
        lambda: misread(adam.Adam, lambda rule: {"eps": 1e-2})),
    "core_moments_carried_all_the_same": ("subzero_plus", lambda: misread_always(adam.Adam, {"carry": True})),
    "core_moments_not_carried": ("subzero_plus_carry",
        lambda: patch.object(adam.Adam, "rebase", lambda *_: None)),
    "second_moment_carried_as_the_first": ("lozo_adam_carry",
        lambda: replaced(adam, "carried", lambda right, *rest, squares: right(*rest).abs())),
    "right_carried_by_the_inverse": ("right_drawn_momentum",
        lambda: replaced(carry, "_gram", lambda right, a, b: right(b, a))),
    "right_carried_without_m": ("right_drawn_momentum",
        lambda: replaced(carry, "_gram", lambda right, a, b: right(a, b) * len(a))),
    "right_of_the_first_step": ("right_drawn", lambda: draws_of_step(LowRank, lambda self, step: 0)),
    "left_of_every_step": ("right_drawn",
        lambda: patch.object(LowRank, "basis_step", lambda self, step: step)),
    "four_iterations": ("zo_muon", lambda: patch.object(muon, "ITERATIONS", 4)),
    "other_coefficients": ("zo_muon", lambda: patch.object(muon, "COEFFICIENTS", (3.0, -3.2, 1.2))),
    "not_orthogonal": ("zo_muon", lambda: patch.object(muon, "msign", lambda x: x / x.norm())),
    "muon_step_unscaled": ("zo_muon", lambda: patch.object(LowRank, "stretch", lambda *_: 1.0)),
    "muon_step_of_a_draw": ("zo_muon",
        lambda: patch.object(LowRank, "stretch", lambda self, matrix, square: self.scale(matrix))),
    "dense_at_the_lr_of_matrices": ("zo_muon", lambda: misread(muon.Muon, lambda rule: {"share": 1.0})),
    "power_from_anew_at_every_step": ("zo_mopi",
        lambda: replaced(muon, "power_step", lambda right, x, v: (right(x, v)[0], v))),
    "power_kept_over_a_basis": ("zo_mopi", lambda: patch.object(muon.Muon, "rebase", lambda *_: None)),
    "columns_not_normalised": ("zo_mopi", lambda: replaced(muon, "power_step", unnormalised)),
    "muon_average_not_carried": ("zo_mopi_carry", lambda: misread_always(muon.Muon, {"carry": False})),
    "muon_average_carried": ("zo_mopi_kept", lambda: misread_always(muon.Muon, {"carry": True})),
    "muon_average_begun_short": ("zo_mopi_kept", lambda: replaced(muon.Muon, "_average", begun_short)),
    "both_scaled": ("both_drawn", lambda: each_draw(LowRank, lambda x: x * 2**-0.5)),
    "ranks_backwards": ("eggroll", lambda: replaced(Ranked, "slopes", lambda right, *rest: -right(*rest))),
    "losses_in_place_of_ranks": ("eggroll", lambda: patch.object(Ranked, "slopes", Spread.slopes)),
    "first_draw_alone": ("both_drawn",
        lambda: replaced(LowRank, "plus",
            lambda right, self, m, sums, *rest: sums or right(self, m, sums, *rest))),
    "sample_deviation": ("fzoo", lambda: spread(math.sqrt(1.5))),
    "eps_in_place_of_the_spread": ("fzoo", lambda: patch.object(Spread, "slopes", Spsa.slopes)),
    "loss_at_the_weights_doubled": ("fzoo",
        lambda: losses_of_step(lambda losses: losses * torch.tensor([1.0, 2.0]).double())),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_check_rejects_wrong_method(wrong: str) -> None:
    name, mistake = WRONG[wrong]
    with (
        mistake(),
        pytest.raises(
            AssertionError, match="away from the formula|against|not orthonormal|told apart|on paper|not of"
        ),
    ):
        check_method(name, **{"steps": 20} if name in [*DENSE, *ROWS] else {})


# The basis of P-GAP -----------------------------------------------------------------------------------------


def check_basis(width: int = 11, tolerance: float = 1e-5, rank: int = 3, probes: int = 4, **options) -> None:
    """U S V^T of every matrix against its part of G, which is formed here."""
    model = tiny(width=width)
    double = copy.deepcopy(model).double()
    start = {n: p.detach().double() for n, p in model.named_parameters()}
    eps, born = 1e-2, 2
    optimizer = zokern.PGAP(
        model,
        rank=rank,
        interval=2,
        probes=probes,
        lr=0.0,
        eps=eps,
        seed=9,
        delta=1.5,
        norm="unit",
        **options,
    )
    for _ in range(3):
        zokern.step(optimizer, lambda: loss_of(model))
    assert list(optimizer.factored.state) == [born]
    z = {
        (n, k): zokern.draw("normal", t.shape, seed=9, who=n, step=born,
            draw=draw_word(2 + k, BASIS)).double()
        for n, t in start.items() for k in range(probes)
    }  # fmt: skip
    for k, got in enumerate(optimizer.factored.state[born]):
        ahead, behind = ({n: t + sign * eps * z[n, k] for n, t in start.items()} for sign in (1, -1))
        sides = [loss_of(lambda ids, w=w: functional_call(double, w, (ids,))) for w in (ahead, behind)]
        want = float((sides[0] - sides[1]) / (2 * eps))
        assert abs(got - want) <= 2e-6 * float(sides[0].detach()) / eps, f"probe {k}: {got} against {want}"
    assert {m.name for m in optimizer.matrices.values()} == {n for n, t in start.items() if t.dim() == 2}
    for matrix in optimizer.matrices.values():
        gradient = sum(c / probes * z[matrix.name, k] for k, c in enumerate(optimizer.factored.state[born]))
        u, s, v = matrix.left.double(), matrix.extra["spectrum"].double(), matrix.right.double()
        assert (
            u.shape == (matrix.rows, rank) and v.shape == (matrix.columns, rank) and (s[:-1] >= s[1:]).all()
        )
        for side in (u, v):
            assert (side.mT @ side - torch.eye(rank)).abs().max() < 1e-6, f"{matrix.name}: not orthonormal"
        exact = torch.linalg.svdvals(gradient)
        missed, least = (gradient - u @ torch.diag(s) @ v.mT).norm(), exact[rank:].norm()
        assert missed <= (1 + tolerance) * least, (
            f"{matrix.name}: misses {missed:.4f} of G, the best {least:.4f}"
        )
        assert (s - exact[:rank]).abs().max() <= 10 * tolerance * exact[0], (
            f"{matrix.name}: {s} against svdvals {exact[:rank]}"
        )
    source = next(g for g in optimizer.plan().groups if g.matrices is not None).source(9)
    matrices = list(optimizer.matrices.values())
    signs = set()
    for draw in range(3):
        for matrix, core in zip(matrices, optimizer.factored.draws(matrices, source, 2, draw)):
            s = matrix.extra["spectrum"].double()
            along = (s * core.double().diagonal()).sum() / (math.sqrt(1.5) * s.norm())
            assert abs(abs(along) - 1) < 1e-5, f"<diag S, Z> is {along} of what it should be"
            signs.add((draw, bool(along > 0)))
    per_draw = [len({x for d, x in signs if d == draw}) for draw in range(3)]
    sign = options.get("sign", "matrix")
    assert (
        signs == {(d, True) for d in range(3)}
        if sign == "positive"
        else max(per_draw) == (2 if sign == "matrix" else 1)
    )
    assert sign != "step" or len({x for _, x in signs}) == 2


@pytest.mark.parametrize("sign", ["matrix", "step", "positive"])
def test_basis_of_pgap(sign: str) -> None:
    check_basis(sign=sign)


def test_basis_of_pgap_by_range_finder() -> None:
    """Sketches narrower than the matrix, whose G is noise with a flat spectrum:
    close to the best all the same."""
    check_basis(width=40, tolerance=0.01, power=2)


def sketch(change: Callable):
    """gemm.sketch_of other draws and coefficients."""

    def wrong(right, backend, noise, coeffs, *rest):
        draws, coeffs = change(noise.draws, coeffs)
        return right(backend, noise._replace(draws=draws), coeffs, *rest)

    return replaced(zokern.group.gemm, "sketch_of", wrong)


class OneProbe(zokern.Scratch):
    """Reads every probe along the first one."""

    def losses(self, plan, points, closure):
        first = [
            Point(tuple((min(word, draw_word(pgap.PROBE, BASIS)), amount) for word, amount in point.terms))
            for point in points
        ]
        return super().losses(plan, first, closure)


def with_roots(right: Callable, *given, **options) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = right(*given, **options)
    return u, s.sqrt(), v


WRONG_BASES: dict[str, tuple[dict, Callable]] = {
    "no_power_or_extra": ({"width": 40, "tolerance": 0.01, "power": 0, "oversample": 0}, nullcontext),
    "transposed_sketch": ({},
        lambda: replaced(zokern.group.gemm, "sketch_of", lambda right, *a: right(*a).flip(0))),
    "a_probe_too_few": ({}, lambda: sketch(lambda draws, coeffs: (draws[:-1], coeffs[:-1]))),
    "random_basis": ({},
        lambda: replaced(zokern.group.gemm, "sketch_of", lambda right, *a: torch.randn(right(*a).shape))),
    "probes_share_a_draw": ({"evaluation": OneProbe()}, nullcontext),
    "spectrum_forgotten": ({}, lambda: replaced(torch.linalg, "svd", with_roots)),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_BASES)
def test_check_rejects_wrong_basis(wrong: str) -> None:
    options, mistake = WRONG_BASES[wrong]
    with mistake(), pytest.raises(AssertionError, match="misses|probe|orthonormal|svdvals"):
        check_basis(**options)


def test_no_estimate_is_a_random_basis() -> None:
    """Where every probe reads equal losses the basis is drawn, as SubZero's, and a draw is Z0 itself."""
    model = tiny()
    optimizer = zokern.PGAP(model, rank=3, interval=2, probes=2, lr=0.0, seed=9)
    zokern.step(optimizer, lambda: model(IDS).sum() * 0 + 1.0)
    for matrix in optimizer.matrices.values():
        assert "spectrum" not in matrix.extra
        x = zokern.draw("normal", (matrix.rows, 3), seed=9, who=matrix.name, step=0, draw=draw_word(0, BASIS))
        assert same_bits(matrix.left, orthonormal.orthonormal([x])[0])


# It learns --------------------------------------------------------------------------------------------------

LEARNS: dict[str, Callable] = {
    "subzero": lambda model: zokern.SubZero(model, rank=8, interval=10, lr=2e-3),
    "lozo": lambda model: zokern.LOZO(model, rank=2, interval=10, lr=1e-3),
    "lozo_m": lambda model: zokern.LOZO(model, rank=2, interval=10, momentum=0.5, lr=1e-3),
    "tezo": lambda model: zokern.TeZO(model, rank=8, lr=3e-4),
    "tezo_m": lambda model: zokern.TeZO(model, rank=8, rule="momentum", betas=(0.5, 0.9), lr=3e-4),
    "tezo_adam": lambda model: zokern.TeZO(model, rank=8, rule="adam", betas=(0.5, 0.9), lr=3e-3),
    "pgap": lambda model: zokern.PGAP(model, rank=8, interval=10, probes=4, lr=2e-3),
    "fzoo": lambda model: zokern.FZOO(model, lr=3e-3, eps=1e-3),
    "subzero_plus": lambda model: zokern.SubZeroPlus(model, rank=4, interval=10, queries=8, lr=2e-3),
    "zo_muon": lambda model: zokern.ZOMuon(model, rank=4, interval=10, lr=2e-3),
    "zo_mopi": lambda model: zokern.ZOMOPI(model, rank=4, leading=2, interval=10, lr=2e-3),
    "eggroll": lambda model: zokern.EGGROLL(model, queries=8, lr=3e-3),
}


def fall(name: str, architecture: str, steps: int) -> float:
    """By how much the loss of a fixed batch falls, from the first step to the mean of the last five."""
    model, inputs = build(models.ARCHITECTURES[architecture]), models.inputs(architecture)
    optimizer = LEARNS[name](model)
    losses = [zokern.step(optimizer, lambda: model(**inputs).loss).loss for _ in range(steps)]
    print(f"{name} on {architecture}: {losses[0]:.3f} to {sum(losses[-5:]) / 5:.3f} in {steps} steps")
    return losses[0] - sum(losses[-5:]) / 5


@pytest.mark.parametrize("name", LEARNS)
def test_loss_falls(name: str) -> None:
    """On a batch, by about 0.1 in 25 steps; and by nothing where the sign of a step is wrong."""
    assert fall(name, "opt", 25) > 0.04
    with replaced(Spsa, "differences", lambda right, *rest: -right(*rest)):
        assert fall(name, "opt", 12) < 0.0


def test_momentum_of_pgap_is_carried_over() -> None:
    """To the new basis as far as that holds it:
    U_new U_new^T M V_new V_new^T, and not as numbers of another space."""
    model = tiny(width=16)
    optimizer = METHODS["pgap"](model, seed=5, rule=zokern.Momentum(0.9), defer=False)
    moved = []
    right = momentum.Momentum.rebase

    def rebase(self, group, matrix, left, old, state):
        before = left.double() @ state["momentum"].double() @ old.double().mT
        right(self, group, matrix, left, old, state)
        u, v = matrix.left.double(), matrix.right.double()
        assert torch.allclose(
            state["momentum"].double(), u.mT @ before @ v, atol=1e-5 * float(before.abs().max())
        )
        moved.append(matrix.name)

    with patch.object(momentum.Momentum, "rebase", rebase):
        for _ in range(7):
            zokern.step(optimizer, lambda: loss_of(model))
    assert len(moved) == 2 * len(optimizer.matrices)


@pytest.mark.parametrize("after", [2, 3, 4])
def test_a_resumed_run_of_pgap_carries_the_same_momentum(after: int) -> None:
    ends = []
    for resumed in (False, True):
        model = tiny(width=16)

        def make(model: nn.Module) -> torch.optim.Optimizer:
            return METHODS["pgap"](model, seed=5, rule=zokern.Momentum(0.9), evaluation="scratch")

        optimizer = make(model)
        for step in range(7):
            if step == after:
                state = optimizer.state_dict()
                if resumed:
                    optimizer = make(model)
                    optimizer.load_state_dict(copy.deepcopy(state))
            zokern.step(optimizer, lambda model=model: loss_of(model))
        optimizer.flush()
        ends.append(snapshot(model))
    assert all(same_bits(ends[0][n], ends[1][n]) for n in ends[0])


def test_probes_in_place_come_back() -> None:
    """With the low bits of 16-bit weights, to the bit."""
    model = nn.Linear(64, 64).bfloat16()
    x, before = torch.randn(4, 64).bfloat16(), model.weight.detach().clone()
    optimizer = zokern.PGAP(
        model,
        lr=0.0,
        eps=1e-2,
        rank=4,
        interval=2,
        probes=4,
        rounding="residual",
        evaluation="inplace",
        force=True,
    )
    for _ in range(6):
        zokern.step(optimizer, lambda: model(x).float().square().mean())
    assert same_bits(model.weight, before)
