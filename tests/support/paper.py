"""Estimators on paper: each is a generator that asks for losses and says what moves, in Python's numbers.

    Read   a point, theta + eps sum_k a_k z_k of some parameters: the loss there is sent back
    Slope  a draw: the derivative of the loss along z of some parameters is sent back
    Move   what the weights do: theta <- theta - lr (1/count) sum_k c_k z_k of some parameters

They are told the losses that a step recorded.
Where a step does not record a loss they are told what it is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch

import zokern
from zokern.estimator import Spread, Spsa
from zokern.stream import LAYERS, PRIVACY, RADIUS, draw_word, parameter_id

Draw = tuple[int, int]  # step and draw word


class Read(NamedTuple):
    """terms: (draw, amount in units of eps). recorded: the step's record has this loss. rows: the loss of
    each example is asked for. anchored: around the anchor, the weights of an earlier step."""

    terms: tuple[tuple[Draw, float], ...]
    scope: tuple[str, ...]
    recorded: bool = True
    rows: bool = False
    anchored: bool = False


class Slope(NamedTuple):
    """The step's record has the loss of theta for it."""

    draw: Draw
    scope: tuple[str, ...]


class Move(NamedTuple):
    """apart: by how much a coefficient may differ: of itself, from rounding of algebra, and outright, from
    that of unrecorded losses. share: of the gradient, which moves the same parameters. by_torch: those that
    the torch optimizer moves along the gradient."""

    draws: list[Draw]
    coefficients: list[float]
    scope: tuple[str, ...]
    count: int = 1
    apart: tuple[float, float] = (1e-6, 0.0)
    share: float = 0.0
    by_torch: tuple[str, ...] = ()


class Paper(NamedTuple):
    """What the estimators are told of a run.

    began   the first step whose draws are directions of this step: the first one, or that of the basis in use
    memory  what they learn, from step to step"""

    step: int
    seed: int
    eps: float
    lr: float
    weights: int
    began: int
    memory: dict[str, Any]

    def word(self, who: str, draw: int) -> int:
        """The first word of the stream at a name."""
        counter = torch.tensor([[0, parameter_id(who), self.step, draw]])
        return int(zokern.philox4x32(counter, (self.seed & 0xFFFFFFFF, self.seed >> 32))[0, 0])


Script = Generator[Any, Any, None]


def differences(
    e: Any, p: Paper, scope: tuple[str, ...], radii: list[float] | None = None
) -> Generator[Any, Any, list[list[float]]]:
    """The losses of a stencil along each draw."""
    found = []
    for k in range(e.queries):
        sides = [o * (1.0 if radii is None else radii[k]) for o in e.stencil.offsets]
        row = []
        for offset in sides:
            row.append((yield Read((((p.step, k), offset),) if offset else (), scope)))
        found.append(row)
    return found


def weighed(e: Any, losses: list[list[float]], unit: float) -> list[float]:
    return [math.fsum(w * loss for w, loss in zip(e.stencil.weights, sides)) / unit for sides in losses]


def numbered(p: Paper, count: int) -> list[Draw]:
    return [(p.step, k) for k in range(count)]


def by_spsa(e: Any, p: Paper, scope: tuple[str, ...]) -> Script:
    losses = yield from differences(e, p, scope)
    yield Move(numbered(p, e.queries), weighed(e, losses, p.eps), scope, e.queries)


def by_curvature(e: Any, p: Paper, scope: tuple[str, ...]) -> Script:
    """HiZOO: and half of the second difference along each draw, for the factors of the direction."""
    losses = yield from differences(e, p, scope)
    p.memory["curvatures"] = [
        abs(ahead + behind - 2 * here) / (2 * p.eps**2) for ahead, behind, here in losses
    ]
    yield Move(numbered(p, e.queries), weighed(e, losses, p.eps), scope, e.queries)


def by_sign(e: Any, p: Paper, scope: tuple[str, ...]) -> Script:
    losses = yield from differences(e, p, scope)
    yield Move(
        numbered(p, e.queries), [math.copysign(1.0, c) for c in weighed(e, losses, p.eps)], scope, e.queries
    )


def by_spread(e: Any, p: Paper, scope: tuple[str, ...]) -> Script:
    losses = yield from differences(e, p, scope)
    ahead = [loss for sides in losses for loss, offset in zip(sides, e.stencil.offsets) if offset]
    middle = math.fsum(ahead) / len(ahead)
    sigma = math.sqrt(math.fsum((loss - middle) ** 2 for loss in ahead) / len(ahead))
    yield Move(numbered(p, e.queries), weighed(e, losses, sigma), scope, e.queries)


def by_ranks(e: Any, p: Paper, scope: tuple[str, ...]) -> Script:
    """Ranks counted: how many perturbed losses are less."""
    losses = yield from differences(e, p, scope)
    every = [loss for sides in losses for loss, offset in zip(sides, e.stencil.offsets) if offset]
    middle, deviation = (len(every) - 1) / 2, math.sqrt((len(every) ** 2 - 1) / 12)
    ranks = [
        [
            sum(other < loss for other in every) - middle if o else 0.0
            for loss, o in zip(sides, e.stencil.offsets)
        ]
        for sides in losses
    ]
    yield Move(numbered(p, e.queries), weighed(e, ranks, deviation), scope, e.queries)


# KerZOO's kernels of the orders that the cases have, in whole numbers: K(r) = r (a + b r^2 + c r^4).
POLYNOMIALS = {3: (75 / 4, -105 / 4, 0.0), 5: (3675 / 64, -6615 / 32, 10395 / 64)}


def by_kernel(e: Any, p: Paper, scope: tuple[str, ...]) -> Script:
    assert e.scope == "query" and e.rescale, "the formula of these radii is not known here (test_kernel.py)"
    width = e.width(p.step) if callable(e.width) else e.width
    units = [(p.word("", draw_word(k, RADIUS)) + 0.5) / 2**31 - 1.0 for k in range(e.queries)]
    losses = yield from differences(e, p, scope, [width * r for r in units])
    kernel = [
        e.scale / width * sum(a * r ** (2 * i + 1) for i, a in enumerate(POLYNOMIALS[e.order])) for r in units
    ]
    yield Move(
        numbered(p, e.queries), [c * k for c, k in zip(weighed(e, losses, p.eps), kernel)], scope, e.queries
    )


def by_the_anchor(e: Any, p: Paper, scope: tuple[str, ...]) -> Script:
    """MeZO-SVRG: the estimate at the anchor, and what has changed since."""
    sets, found = p.step % e.interval == 0, []
    for k in range(e.queries):
        sides = []
        for anchored in (False,) if sets else (False, True):
            for offset in e.stencil.offsets:
                sides.append((yield Read((((p.step, k), offset),), scope, anchored=anchored)))
        there = weighed(e, [sides[2:]], p.eps)[0] if sides[2:] else 0.0
        found.append(weighed(e, [sides[:2]], p.eps)[0] - there)
    if sets:
        p.memory["full"] = numbered(p, e.queries), found
        yield Move(numbered(p, e.queries), [e.ratio * c for c in found], scope, e.queries)
        return
    draws, full = p.memory["full"]
    yield Move([*draws, *numbered(p, e.queries)], [*full, *found], scope, e.queries)


def by_the_best(e: Any, p: Paper, scope: tuple[str, ...]) -> Script:
    losses = yield from differences(e, p, scope)
    found, draws = weighed(e, losses, p.eps), numbered(p, e.queries)
    ways = {}
    for factor in (0.0, 1.0, -1.0):
        terms = tuple((draw, -factor * p.lr * c / e.queries / p.eps) for draw, c in zip(draws, found))
        ways[factor] = yield Read(terms if factor else (), scope, recorded=False)
    best = min(ways, key=lambda factor: ways[factor])
    yield Move(draws, [best * c for c in found], scope, e.queries)


def by_filter(e: Any, p: Paper, scope: tuple[str, ...]) -> Script:
    """A Kalman filter in its information form: the posterior of all observations at once. The noise of an
    observation follows its residual before it is weighed; its standard deviation is a tenth of the prior's
    at least."""
    q, sigma = e.queries, math.sqrt(p.weights / 1e6)
    average = p.memory.get("average", sigma**2)
    base = yield Read((), scope)
    axes, mean = torch.eye(q).double(), torch.zeros(q).double()
    precision = axes / sigma**2
    for j in range(e.observations):
        along = axes[j] if j < q else torch.linalg.eigh(precision)[1][:, 0]
        along = along * along[along.abs().argmax()].sign()
        loss = yield Read(tuple(((p.step, k), float(d)) for k, d in enumerate(along)), scope)
        slope = (loss - base) / p.eps
        average = 0.9 * average + 0.1 * (slope - float(along @ mean)) ** 2
        noise = max(0.1 * sigma, math.sqrt(average)) ** 2
        seen = precision @ mean + along * slope / noise
        precision = precision + torch.outer(along, along) / noise
        mean = torch.linalg.solve(precision, seen)
    p.memory["average"] = average
    yield Move(numbered(p, q), mean.tolist(), scope, apart=(1e-4, 1e-9))


def by_the_others(e: Any, p: Paper, scope: tuple[str, ...]) -> Script:
    losses = []
    for k in range(e.queries):
        losses.append((yield Read((((p.step, k), 1.0),), scope)))
    found = [
        (a - math.fsum(losses[:k] + losses[k + 1 :]) / (e.queries - 1)) / p.eps for k, a in enumerate(losses)
    ]
    yield Move(numbered(p, e.queries), found, scope, e.queries)


def by_clipped_sums(e: Any, p: Paper, scope: tuple[str, ...]) -> Script:
    found = []
    for k in range(e.queries):
        ahead = yield Read((((p.step, k), 1.0),), scope, rows=True)
        behind = yield Read((((p.step, k), -1.0),), scope, rows=True)
        clipped = [max(-e.bound, min(e.bound, a - b)) for a, b in zip(ahead, behind)]
        z = (
            zokern.draw("normal", 8, seed=p.seed, who="", step=p.step, draw=draw_word(k, PRIVACY))
            .double()
            .tolist()
        )
        n = z[0] if e.kind == "gaussian" else (z[0] ** 2 + z[1] ** 2 - z[2] ** 2 - z[3] ** 2) / 2
        found.append((math.fsum(clipped) + e.bound * e.noise * n) / (2 * p.eps * (e.batch or len(ahead))))
    yield Move(numbered(p, e.queries), found, scope, e.queries, apart=(1e-6, 2.0**-20 / p.eps))


def by_the_guide(e: Any, p: Paper, scope: tuple[str, ...]) -> Script:
    """As published: rank two draws, take the difference of the better and the worse, keep the better."""
    known = p.memory.get("best")
    draws = numbered(p, 2) if known is None or known[0] < p.began else [known, (p.step, 0)]
    alone = []
    for draw in draws:
        alone.append((yield Read(((draw, 1.0),), scope)))
    better = alone.index(min(alone))
    s = math.sqrt(0.5) if e.norm == "matched" else 1.0
    signs = [s if i == better else -s for i in range(2)]
    ahead = yield Read(((draws[0], s), (draws[1], -s)), scope)
    behind = yield Read(((draws[0], -s), (draws[1], s)), scope)
    c = (ahead - behind) / (2 * p.eps) * signs[0] / s  # of the guide, whose first sign is signs[0]
    p.memory["best"] = draws[better]
    yield Move(draws, [c * sign for sign in signs], scope)


def by_blocks(e: Any, p: Paper, scope: tuple[str, ...]) -> Script:
    blocks: dict[str, list[str]] = {}
    for name in scope:
        blocks.setdefault(e.block(name), []).append(name)
    scripts = [script(e.inner, p, tuple(names)) for names in blocks.values()]
    if e.order == "gauss-seidel":
        for each in scripts:
            yield from each
        return
    moves = []
    for each in scripts:
        answer = None
        while True:
            try:
                asked = each.send(answer)
            except StopIteration:
                break
            if isinstance(asked, Move):
                moves.append(asked)
                answer = None
            else:
                answer = yield asked
    yield from moves


def by_layers(e: Any, p: Paper, scope: tuple[str, ...]) -> Script:
    layers = {e.layer(name) for name in scope} - {None}
    order = sorted(layers, key=lambda layer: (p.word(layer, draw_word(0, LAYERS)), layer))
    kept = {None, *order[: max(1, round((1 - e.sparsity) * len(order)))]}
    yield from script(e.inner, p, tuple(name for name in scope if e.layer(name) in kept))


def by_slopes(e: Any, p: Paper, scope: tuple[str, ...]) -> Script:
    found = []
    for draw in numbered(p, e.queries):
        found.append((yield Slope(draw, scope)))
    yield Move(numbered(p, e.queries), found, scope, e.queries, apart=(1e-6, 1e-6))


def changed(asks: Script, change: Callable[[Move], Move]) -> Script:
    """The same questions, and other moves."""
    answer = None
    while True:
        try:
            asked = asks.send(answer)
        except StopIteration:
            return
        answer = yield (change(asked) if isinstance(asked, Move) else asked)


def by_mixing(e: Any, p: Paper, scope: tuple[str, ...]) -> Script:
    a = e.alpha
    inner = script(e.inner, p, scope)
    yield from changed(inner, lambda m: m._replace(coefficients=[a * c for c in m.coefficients], share=1 - a))


def by_splitting(e: Any, p: Paper, scope: tuple[str, ...]) -> Script:
    first = tuple(name for name in scope if name in e.first)
    inner = script(e.inner, p, tuple(name for name in scope if name not in e.first))
    yield from changed(inner, lambda m: m._replace(by_torch=first))


SCRIPTS: dict[type, Callable[..., Script]] = {
    Spsa: by_spsa, Spread: by_spread, zokern.Ranked: by_ranks, zokern.Sign: by_sign, zokern.Kernel: by_kernel,
    zokern.Conservative: by_the_best, zokern.Bayesian: by_filter, zokern.LeaveOneOut: by_the_others,
    zokern.Private: by_clipped_sums, zokern.Guided: by_the_guide, zokern.Blockwise: by_blocks,
    zokern.Layers: by_layers, zokern.Anchored: by_the_anchor, zokern.Curvature: by_curvature,
    zokern.ForwardGradient: by_slopes, zokern.Mixed: by_mixing, zokern.Split: by_splitting,
}  # fmt: skip


def script(estimator: Any, paper: Paper, scope: tuple[str, ...]) -> Script:
    """The generator of an estimator. An estimator that is not known is an AssertionError:
    write its formula here."""
    assert type(estimator) in SCRIPTS, f"the formula of estimator {type(estimator).__name__} is not known"
    return SCRIPTS[type(estimator)](estimator, paper, scope)
