"""Eager loops of the benchmarks against the formulas of their methods.

A loop is watched: each of its losses comes with the weights at which it was read. The draws are what these
weights differ by from theta, so nothing is taken from the loop's own generator. The questions are those of
paper.py and the update is that of recipes.py, to which tests/methods hold the method itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from method_check import examples_of
from models import VOCABULARY, build
from paper import Draw, Move, Paper, Read, Slope, script
from recipes import Factors, Formula, sized
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

import zokern
from benchmarks.eager_methods import LOOPS, Loop

LR, EPS, NEAR = 1e-2, 1e-3, 1e-9
SMALL = {"rank": 3, "queries": 3}

# Options of the loop, and those of the method beside them, which make both the printed formula.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SubZero": ({"rank": 3}, {"reshape": "none"}),
    "SubZeroPlus": (SMALL, {"reshape": "none", "norm": "unit", "dense_lr": LR}),
    "LOZO": ({}, {"norm": "unit"}),
    "TeZO": ({"rank": 3}, {"norm": "unit"}),
    "PGAP": ({"rank": 3}, {"norm": "unit"}),
    "ZOMuon": (SMALL, {"norm": "unit", "dense_lr": LR}),
    "ZOMOPI": ({**SMALL, "leading": 2}, {"norm": "unit", "dense_lr": LR}),
    "EGGROLL": ({"queries": 3}, {}),
    "FZOO": ({"queries": 3}, {}),
    "AdaMeZO": ({"window": 3}, {}),
    "HiZOO": ({"smooth": 0.05}, {}),
    "MeZOGV": ({}, {"norm": "unit"}),
    "DPZO": ({"clip": 1e-3, "noise": 0.0}, {}),
    "LeZO": ({"sparsity": 0.5}, {}),
    "DiZO": ({"interval": 2, "iterations": 3}, {"projected": ("k_proj.weight", "v_proj.weight")}),
}
ROWS = ("DPZO",)  # the loss of each example
SPACES = {"SubZeroPlus", "ZOMuon", "ZOMOPI"}  # their rules work in the space of a draw


class Layered(nn.Module):
    """Layers with numbers, some matrices with the names of attention, and vectors."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"k_proj": nn.Linear(width, width, bias=False), "up": nn.Linear(width, width)})
            for _ in range(4)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = h + layer["up"](torch.tanh(layer["k_proj"](h)))  # type: ignore[index]
        return self.head(self.norm(h))


@dataclass
class Reading:
    """A loss, where it was read, and the tangents that the weights had."""

    rows: list[float]
    weights: dict[str, Tensor]
    tangents: dict[str, Tensor | None]

    @property
    def loss(self) -> float:
        return math.fsum(self.rows) / len(self.rows)


@dataclass
class Watched:
    """A closure that notes its losses; those with a graph are of a gradient, and are counted alone."""

    model: nn.Module
    rows: bool = False
    readings: list[Reading] = field(default_factory=list)
    gradients: int = 0

    def __call__(self) -> Tensor:
        found = examples_of(self.model)
        if torch.is_grad_enabled():
            self.gradients += 1
        else:
            both = {n: forward_ad.unpack_dual(p) for n, p in self.model.named_parameters()}
            weights = {n: (one.primal + 0).detach() for n, one in both.items()}
            plain = forward_ad.unpack_dual(found).primal.tolist()
            self.readings.append(Reading(plain, weights, {n: one.tangent for n, one in both.items()}))
        return found if self.rows else found.mean()


class Seen(Formula):
    """A formula with the draws that a loop was seen to read its losses along."""

    loop: Any
    spaces: bool

    def watch(self, loop: Loop, spaces: bool) -> Seen:
        self.loop, self.spaces, self.drawn = loop, spaces, dict[Draw, dict[str, Tensor]]()
        self.tilts = list[tuple[Tensor, Tensor]]()  # draws of a cone, and its axis
        self.theta = {n: t.clone() for n, t in self.theta.items()}  # torch's optimizers write in place
        self.starts = {loop.names[i]: v.double() for i, v in getattr(loop, "right", {}).items() if spaces}
        if self.kind == "cone":
            self.memory |= {n: (sized(m.clone()), 1.0) for n, m in zip(self.theta, loop.momentum)}
        return self

    def shape(self, name: str) -> tuple[int, int] | None:
        return super().shape(name) if self.spaces else None

    def unit(self, name: str, step: int, query: int) -> Tensor:
        return self.drawn[step, query][name]

    def normals(self, shape: Sequence[int], name: str, step: int, word: int) -> Tensor:
        return self.starts[name]  # of a power iteration

    def factors(self, name: str, step: int, query: int) -> Factors:
        i, z = self.loop.names.index(name), self.drawn[step, query][name]
        if self.moving == "right":
            u = self.loop.left[i]
            found = Factors(sized(u), sized(torch.eye(u.shape[1])), sized((u.mT @ z).mT))
        else:
            u, v = self.loop.basis[i]
            found = Factors(sized(u), sized(u.mT @ z @ v.mT), sized(v.mT))
        assert torch.allclose(found.product().value, z, atol=1e-5), f"{name}: z is not of the basis"
        return found

    def note(self, draw: Draw, name: str, z: Tensor, step: int) -> None:
        """Keeps u, where z is what a method makes of it."""
        if self.kind == "cone":
            momentum, length = self.cone(name)
            angle = self.optimizer.rule.angle
            u = (z - momentum.value * math.cos(angle) / length) / math.sin(angle)
            self.tilts.append((u.flatten(), momentum.value.flatten()))
        else:
            factor = self.factor(name, step).expand(z.shape)
            assert not z[factor == 0].any(), f"{name}: an element moves that is masked"
            u = torch.where(factor == 0, z, z / factor)
        self.drawn.setdefault(draw, {})[name] = u

    def find(self, asked: Read, left: list[Reading], paper: Paper) -> Reading:
        """The reading that is asked for. It is where the draws of earlier ones say,
        or the next one away from theta, which then says what its draw is."""

        def at(terms: Sequence[tuple[Draw, float]]) -> dict[str, Tensor]:
            return self.moved(terms, paper.eps, asked.scope, paper.step, asked.anchored)

        terms = [(draw, a) for draw, a in asked.terms if abs(a) > NEAR]
        new = [(draw, a) for draw, a in terms if not {*asked.scope} <= self.drawn.get(draw, {}).keys()]
        if new:
            ((draw, a),) = new
            rest = at([term for term in terms if term[0] != draw])
            one = next((r for r in left if not near(r.weights, at(()))), None)
            assert one is not None, f"step {paper.step}: no loss is read along the draw {draw}"
            for name in asked.scope:
                z = (one.weights[name] - rest[name]) / (paper.eps * a)
                self.note(draw, name, z, paper.step)
        found = next((i for i, r in enumerate(left) if near(r.weights, at(terms))), None)
        assert found is not None, f"step {paper.step}: no loss is read at {asked.terms}"
        return left.pop(found)


def near(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.allclose(one[n], other[n], rtol=NEAR, atol=NEAR) for n in one)


@dataclass(frozen=True)
class Told:
    """What a formula takes from the stream, for which it is told what the loop has taken: radii of a step's
    queries, and the layers that were seen to move."""

    paper: Paper
    radii: Sequence[float]
    layers: set[str]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.paper, name)

    def word(self, who: str, draw: int) -> float:
        if who:
            return float(who not in self.layers)
        return (self.radii[draw & 0xFFFFFF] + 1.0) * 2**31 - 0.5


def method_of(name: str, model: nn.Module, lr: float = LR) -> Any:
    """The method with the formula that its loop has."""
    own, more = CASES.get(name, ({}, {}))
    if name == "Hybrid":
        names = [n for n, _ in model.named_parameters()]
        more = {"first_order": names[-max(1, len(names) // 10) :]}
    if name == "EGGROLL":  # its weights are rank / (n - 1) - 1 / 2, those of zokern.Ranked have variance 1
        n = 2 * own["queries"]
        lr = lr * math.sqrt((n * n - 1) / 12) / (n - 1)
    alpha = {"alpha": LOOPS[name].alpha} if name == "Addax" else {}  # type: ignore[attr-defined]
    return getattr(zokern, name)(model, lr=lr, eps=EPS, **own, **more, **alpha)


def check_loop(
    name: str, kind: type[Loop] | None = None, steps: int = 5, lr: float = LR, eps: float = EPS, **wrong: Any
) -> None:
    """Steps of a loop against the formula of its method, in float64; AssertionError when anything differs.

    kind, lr, eps, wrong  a wrong loop: its class, and its numbers and options"""
    torch.manual_seed(12345)  # no step has it
    model = build(Layered, torch.float64)
    named = dict(model.named_parameters())
    loop = (kind or LOOPS[name])(
        list(named.values()), lr, eps, list(named), **{**CASES.get(name, ({}, {}))[0], **wrong}
    )
    optimizer = method_of(name, build(Layered))
    formula = Seen.of(optimizer, model).watch(loop, name in SPACES)  # type: ignore[attr-defined]
    formula.loss = lambda weights: examples_of(lambda ids: functional_call(model, weights, (ids,))).mean()
    closure, moved, told = Watched(model, name in ROWS), 0.0, list[float]()
    for step in range(steps):
        radii = told_by(loop, "radius", partial(loop.step, projecting(loop, closure, formula), step))
        told += radii
        seen = closure.readings.copy()
        closure.readings.clear()
        group = optimizer.param_groups[0]
        count = sum(t.numel() for t in formula.theta.values())
        paper = Paper(step, 0, EPS, group["lr"], count, 0, formula.memory)
        check_step(formula, seen, Told(paper, radii, layers_of(seen, formula.theta)))  # type: ignore[arg-type]
        for n, p in named.items():
            now, want = p.detach() + 0, formula.theta[n]
            size = max((want - seen[0].weights[n]).abs().max().item(), LR * 1e-3)
            away = (now - want).abs().max().item()
            assert away <= 1e-4 * size, f"step {step}: {n} is {away / size:.3g} moves away from the formula"
            moved, formula.theta[n] = max(moved, (now - seen[0].weights[n]).abs().max().item()), now
    assert moved > 1e-6, "the loop moves nothing"
    check_draws(formula, optimizer)
    if told:
        sizes = sorted(map(abs, told))
        assert sizes[0] < 0.25 < 0.75 < sizes[-1] < 1, "radii are not uniform"


def told_by(loop: Loop, name: str, run: Callable[[], Any]) -> list[Any]:
    """Runs a step; returns what a method of the loop said meanwhile."""
    said: list[Any] = []
    if not hasattr(loop, name):
        run()
        return said
    right = getattr(loop, name)
    with patch.object(loop, name, lambda *of: said.append(right(*of)) or said[-1]):
        run()
    return said


def projecting(loop: Any, closure: Watched, formula: Seen) -> Watched:
    """The closure. Where the loop searches a projection, its losses are held to the search's formula, and
    the step's formula is told the factors."""
    if not hasattr(loop, "project"):
        return closure
    right, rule = type(loop).project, formula.optimizer.rule

    def project(closure: Watched, seed: int) -> None:
        away = {i: loop.parameters[i].data - start for i, start in loop.start.items()}
        right(loop, closure, seed)

        def factors(weights: dict[str, Tensor]) -> Tensor:
            return torch.stack(
                [((weights[loop.names[i]] - loop.start[i]) / far).median() for i, far in away.items()]
            )

        t = torch.tensor([far.double().norm().item() for far in away.values()], dtype=torch.float64)
        sides, found = closure.readings.copy(), torch.ones(len(away), dtype=torch.float64)
        closure.readings.clear()
        assert len(sides) == 2 * rule.iterations, f"{len(sides)} losses of a search"
        for ahead, behind in zip(sides[::2], sides[1::2]):
            both = factors(ahead.weights), factors(behind.weights)
            z = (both[0] - both[1]) * t / (2 * rule.width)  # in the units of gamma = t f
            slope = (ahead.loss - behind.loss) / (2 * rule.width)
            assert torch.allclose((both[0] + both[1]) / 2, found, atol=1e-6), "the search does not go on"
            assert z.any() and (z.abs() / t).max() <= rule.reach / rule.width + 1e-6
            found = (found - rule.rate * slope * z).clamp(1 - rule.reach, 1 + rule.reach)
        now = factors({name: p.data for name, p in zip(loop.names, loop.parameters)})
        assert torch.allclose(now, found, atol=1e-6) and (now != 1).all(), "other factors than were found"
        names = [loop.names[i] for i in away]
        rule._factors = dict(zip(names, now.tolist()))

    loop.project = project
    return closure


def layers_of(seen: Sequence[Reading], theta: dict[str, Tensor]) -> set[str]:
    """The layers that a step was seen to perturb."""
    names = {n for r in seen for n in theta if not torch.allclose(r.weights[n], theta[n], rtol=0, atol=NEAR)}
    return {layer for n in names if (layer := zokern.estimator.blocks.layer_of(n)) is not None}


def check_step(formula: Seen, seen: Sequence[Reading], paper: Paper) -> None:
    """What a step read, in the order in which the estimator asks on paper; moves the formula's weights."""
    asks = script(formula.optimizer.estimator, paper, tuple(formula.theta))
    left, known, answer = list(seen), dict[Any, Reading](), None
    while True:
        try:
            asked = asks.send(answer)
        except StopIteration:
            break
        if isinstance(asked, Move):
            formula.update(asked, asked.coefficients, paper.lr)
            known.clear()
            answer = None
        elif isinstance(asked, Slope):
            tangents = {n: t + 0 for n, t in left.pop(0).tangents.items() if t is not None}
            assert tangents.keys() == formula.theta.keys(), "no derivative is read"
            formula.drawn[asked.draw] = tangents
            answer = formula.slope(asked.draw, asked.scope)
        else:
            key = asked.terms, asked.scope, asked.anchored  # paper asks for the loss of theta with every draw
            if key not in known or any(near(r.weights, known[key].weights) for r in left):
                known[key] = formula.find(asked, left, paper)
            answer = known[key].rows if asked.rows else known[key].loss
    assert not left, f"step {paper.step}: {len(left)} losses more than on paper"


def check_draws(formula: Seen, optimizer: Any) -> None:
    """Draws are normal or signs; those of a low-rank direction have its rank and length on matrices."""
    low, dense, factored, formula.spaces = [], [], optimizer.factored, True
    for draw in formula.drawn.values():
        for name, u in draw.items():
            matrix = factored is not None and formula.shape(name) is not None
            (low if matrix else dense).append((name, u))
    values = torch.cat([u[u != 0].flatten() for _, u in dense])
    bound, signs = 8 / math.sqrt(len(values)), optimizer.direction.name == "rademacher"
    assert abs(values.mean()) < bound and abs(values.square().mean() - 1) < 2 * bound, (
        "draws are not standard"
    )
    assert (values.pow(4).mean() < 2) == signs, "signs in place of normals, or normals in place of signs"
    if formula.tilts:
        u, m = (torch.cat(both) for both in zip(*formula.tilts))
        assert abs(u @ m) / u.norm() / m.norm() < bound / 2, "z has another angle to the momentum"
    for name, z in low:
        assert torch.linalg.matrix_rank(z, rtol=1e-5) <= formula.rank(name), f"the rank of z of {name}"
    if low and factored.norm == "unit":
        with patch.object(factored, "norm", "matched"):
            expected = {name: formula.long(name) ** -2 for name, _ in low}
    else:
        expected = {name: 1.0 for name, _ in low}
    if low:
        share = sum(z.square().mean().item() / expected[name] for name, z in low) / len(low)
        assert 0.6 < share < 1.6, f"z of matrices are {share:.3g} times as long, squared, as the method's"
