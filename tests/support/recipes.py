"""The methods with ranks and intervals small enough for small models,
and each method's update written out in float64.

A formula takes numbers from `zokern.draw` alone, at the names of docs/stream.md, and factors from
torch.linalg. Every value comes with a size, the same expression with magnitudes in place of numbers, so that
rounding is bounded by a multiple of 2^-24 size.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from paper import Move
from torch import Tensor, nn

import zokern
from zokern.directions import Aligned, Curved, Diagonal, Drawn, Kept, Lazy, LowRank, Masked, Scaled, Subspace
from zokern.estimator import Anchored
from zokern.estimator.blocks import block_of
from zokern.methods.pgap import Probed
from zokern.stream import BASIS, MASK, RADIUS, draw_word


def stem_of(name: str) -> str:
    """The file of a method."""
    return getattr(zokern, name).__module__.rsplit(".", 1)[1]


METHODS: dict[str, Callable[..., Any]] = {
    "subzero": partial(zokern.SubZero, rank=3, interval=3, reshape="none", lr=3e-3),
    "subzero_unit": partial(
        zokern.SubZero, rank=3, interval=3, reshape="none", norm="unit", lr=0.1, eps=1e-2
    ),
    "subzero_adapters": partial(zokern.SubZero, rank=3, interval=3, lr=3e-3),
    "subzero_all": partial(zokern.SubZero, rank=3, interval=3, reshape="all", lr=3e-3),
    "lozo": partial(zokern.LOZO, rank=2, interval=3, lr=3e-3),
    "lozo_m": partial(zokern.LOZO, rank=2, interval=3, momentum=0.6, lr=3e-3),
    "lozo_unit": partial(zokern.LOZO, rank=2, interval=3, norm="unit", lr=3e-3),
    "subzero_momentum": partial(
        zokern.SubZero, rank=3, interval=3, reshape="none", rule=zokern.Momentum(0.6), lr=3e-3
    ),
    "subzero_plus": partial(zokern.SubZeroPlus, rank=3, interval=3, queries=4, reshape="none", lr=3e-3),
    "subzero_plus_carry": partial(
        zokern.SubZeroPlus, rank=3, interval=3, queries=4, carry=True, reshape="none", lr=3e-3
    ),
    "subzero_plus_unit": partial(
        zokern.SubZeroPlus, rank=3, interval=3, queries=4, norm="unit", lr=1e-2, eps=1e-2
    ),
    "lozo_adam": partial(zokern.MeZO, direction=Lazy(2, 3), rule=zokern.Adam((0.6, 0.9), core=True), lr=3e-3),
    "lozo_adam_carry": partial(
        zokern.MeZO, direction=Lazy(2, 3), rule=zokern.Adam((0.6, 0.9), core=True, carry=True), lr=3e-3
    ),
    "right_drawn": partial(
        zokern.MeZO, direction=LowRank(Kept("orthonormal", 3), None, Drawn(), rank=3), lr=3e-3
    ),
    "right_drawn_momentum": partial(
        zokern.MeZO,
        direction=LowRank(Kept("normal", 3), None, Drawn(), rank=3),
        rule=zokern.Momentum(0.6),
        lr=3e-3,
    ),
    "right_drawn_adam": partial(
        zokern.MeZO,
        direction=LowRank(Kept("orthonormal", 3), None, Drawn(), rank=3),
        rule=zokern.Adam(core=True, carry=True),
        lr=3e-3,
        eps=4e-3,
    ),
    "eggroll": partial(zokern.EGGROLL, queries=3, lr=3e-3),
    "eggroll_unit": partial(zokern.EGGROLL, rank=2, queries=3, norm="unit", lr=3e-3),
    "both_drawn": partial(zokern.MeZO, direction=LowRank(Drawn(), None, Drawn(), rank=2), queries=3, lr=3e-3),
    "zo_muon": partial(zokern.ZOMuon, rank=3, interval=3, queries=2, lr=3e-3, dense_lr=1e-3),
    "zo_muon_unit": partial(
        zokern.ZOMuon, rank=3, interval=3, queries=2, norm="unit", lr=1e-2, eps=4e-3, dense_lr=1e-3
    ),
    "zo_mopi": partial(zokern.ZOMOPI, rank=3, interval=3, leading=2, queries=2, lr=3e-3, dense_lr=1e-3),
    "zo_mopi_carry": partial(
        zokern.ZOMOPI, rank=3, interval=3, leading=2, queries=2, momentum=0.6, carry=True, lr=3e-3
    ),
    "zo_mopi_kept": partial(zokern.ZOMOPI, rank=3, interval=3, leading=2, queries=2, momentum=0.6, lr=3e-3),
    "lozo_muon": partial(zokern.MeZO, direction=Lazy(2, 3), rule=zokern.Muon(), lr=3e-3),
    "subzero_muon": partial(
        zokern.SubZero, rank=3, interval=3, reshape="none", rule=zokern.Muon(beta=0.5, carry=True), lr=3e-3
    ),
    "tezo": partial(zokern.TeZO, rank=3, lr=3e-3),
    "tezo_unit": partial(zokern.TeZO, rank=3, norm="unit", lr=3e-3),
    "tezo_m": partial(zokern.TeZO, rank=3, rule="momentum", betas=(0.6, 0.9), lr=1e-3),
    "tezo_adam": partial(zokern.TeZO, rank=3, rule="adam", betas=(0.6, 0.9), lr=3e-3),
    "tezo_adam_corrected": partial(
        zokern.TeZO, rank=3, rule="adam", betas=(0.6, 0.9), bias_correction=True, lr=3e-3
    ),
    "pgap": partial(zokern.PGAP, rank=3, interval=3, probes=3, norm="unit", lr=0.1, eps=1e-2),
    "pgap_matched": partial(zokern.PGAP, rank=3, interval=3, probes=3, steps=8, lr=3e-3),
    "pgap_step": partial(
        zokern.PGAP, rank=3, interval=3, probes=3, sign="step", norm="unit", lr=0.1, eps=1e-2
    ),
    "pgap_positive": partial(
        zokern.PGAP, rank=3, interval=3, probes=3, sign="positive", norm="unit", lr=0.1, eps=1e-2
    ),
    "fzoo": partial(zokern.FZOO, queries=3, lr=3e-3, eps=1e-3),
    "adamezo": partial(zokern.AdaMeZO, window=3, lr=3e-5),
    "adamezo_early": partial(zokern.AdaMeZO, window=3, scale=1.0, warmup=False, lr=3e-3),
    "zosignsgd_element": partial(zokern.ZOSignSGD, of="element", queries=2, lr=1e-3),
    "zomomentum_window": partial(zokern.ZOMomentum, window=3, lr=1e-3),
    "window_average": partial(zokern.MeZO, rule=zokern.WindowMomentum(0.6, 4), queries=2, lr=3e-3),
    "blockmezo": partial(zokern.BlockMeZO, block="module", lr=3e-3),
    "blockmezo_jacobi": partial(zokern.BlockMeZO, block="module", order="jacobi", stencil="forward", lr=3e-3),
    "lezo": partial(zokern.LeZO, sparsity=0.5, layer=block_of, lr=3e-3),
    "zoconservative": partial(zokern.ZOConservative, queries=2, lr=0.05, eps=1e-2),
    "bszo": partial(zokern.BSZO, lr=1.0),
    "mezogv_unit": partial(zokern.MeZOGV, norm="unit", lr=1e-3),
    "mezogv_lozo": lambda m, **options: zokern.LOZO(
        m, estimator=zokern.Guided(), **{"rank": 2, "interval": 3, "lr": 3e-3, **options}
    ),
    "conmezo": partial(zokern.ConMeZO, lr=3e-3),
    "conmezo_number": partial(zokern.ConMeZO, lr=3e-3, beta=0.8, angle=0.9),
    "mezosvrg": partial(zokern.MeZOSVRG, lr=3e-3),
    "mezosvrg_queries": partial(zokern.MeZOSVRG, lr=3e-3, interval=3, ratio=2.0, queries=2),
    "dizo": partial(zokern.DiZO, lr=3e-3, projected=("",), interval=2, iterations=3, rate=5.0),
    "kerzoo": partial(zokern.KerZOO, lr=1e-3, eps=1e-2),
    "kerzoo_5_averaged": partial(
        zokern.KerZOO, order=5, width=0.8, scale=2.0, averaging=True, lr=1e-3, eps=1e-2
    ),
}
# Methods whose closure returns the loss of each example.
ROWS: dict[str, Callable[..., Any]] = {
    "dpzo": partial(zokern.DPZO, clip=2e-4, noise=0.3, queries=2, lr=3e-3),
    "dpzo_laplace": partial(zokern.DPZO, clip=2e-4, noise=0.3, kind="laplace", batch=5, lr=3e-3),
}
# Every method of the package that has no case above, with what it takes by default.
METHODS |= {
    name: partial(method, lr=3e-3)
    for name, method in zokern.methods.METHODS.items()
    if stem_of(name) not in METHODS | ROWS and name != "MeZO"
}
METHODS["mezo"] = partial(zokern.MeZO, lr=3e-3)
METHODS["Addax"] = partial(zokern.Addax, lr=3e-3, alpha=0.4)
SLOPES = ("FGD",)  # they read derivatives, in the one way that there is
GRADIENTS = ("Addax", "FGD", "Hybrid")  # not from losses alone, so their bits depend on torch's products
LOW_RANK = [
    name
    for name in METHODS
    if name.startswith(("subzero", "lozo", "tezo", "pgap", "zo_", "right", "both", "eggroll"))
]
DENSE = [name for name in METHODS if name not in LOW_RANK]
ONE_EACH = (
    "subzero", "lozo", "lozo_m", "tezo", "tezo_m", "tezo_adam", "pgap", "fzoo", "adamezo", "lezo",
    "mezogv_lozo", "subzero_plus", "right_drawn", "both_drawn", "eggroll", "zo_muon", "zo_mopi",
    "kerzoo_5_averaged", "conmezo_number", "mezosvrg_queries", "dizo", "SparseMeZO",
)  # fmt: skip


class Sized(NamedTuple):
    """A number and the sum of the magnitudes that it was made of."""

    value: Tensor
    size: Tensor

    def __matmul__(self, other: Sized) -> Sized:  # type: ignore[override]
        return Sized(self.value @ other.value, self.size @ other.size)

    def __add__(self, other: Sized) -> Sized:  # type: ignore[override]
        return Sized(self.value + other.value, self.size + other.size)

    def __mul__(self, factor: float | Tensor) -> Sized:  # type: ignore[override]
        return Sized(self.value * factor, self.size * abs(factor))

    @property
    def mT(self) -> Sized:
        return Sized(self.value.mT, self.size.mT)


def sized(value: Tensor) -> Sized:
    return Sized(value.double(), value.double().abs())


class Factors(NamedTuple):
    """z = left core right^T."""

    left: Sized
    core: Sized
    right: Sized

    def product(self) -> Sized:
        return self.left @ self.core @ self.right.mT


@dataclass
class Formula:
    """A method on paper: float64 weights that follow it, given the coefficients of each step. What a step
    asks is in paper.py.

    It is read off the names and options of the optimizer's parts, and takes no number from them; P-GAP's
    basis is the exception, whose own checks are in test_methods.py. A part that it does not know is an
    AssertionError: write its formula here."""

    optimizer: Any
    theta: dict[str, Tensor]
    size: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    now: int = 0  # step of the update
    start: dict[str, Tensor] = field(default_factory=dict)
    # float64, of weights by name; for slopes and gradients
    loss: Callable[[dict[str, Tensor]], Tensor] | None = None

    @classmethod
    def of(cls, optimizer: Any, model: nn.Module) -> Formula:
        theta = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}
        direction, known = optimizer.factored, (Subspace, Lazy, Diagonal, LowRank, Aligned, Probed)
        assert direction is None or type(direction) in known, (
            f"the formula of direction {type(direction).__name__} is not known"
        )
        assert optimizer.scaled is None or type(optimizer.scaled) in (Curved, Masked, Scaled), (
            f"the formula of direction {type(optimizer.scaled).__name__} is not known"
        )
        return cls(optimizer, theta, {n: t.abs() for n, t in theta.items()}, start=dict(theta))

    # Directions

    def normals(self, shape: Sequence[int], name: str, step: int, word: int) -> Tensor:
        return zokern.draw(
            "normal", tuple(shape), seed=self.optimizer.seed, who=name, step=step, draw=word
        ).double()

    def shape(self, name: str) -> tuple[int, int] | None:
        """Rows and columns of the matrix that a parameter is factored as."""
        long = [side for side in self.theta[name].shape if side != 1]
        direction, count = self.optimizer.factored, self.theta[name].numel()
        if direction is None or len(long) != 2:
            return None
        near = min(
            ((a, count // a) for a in range(1, count + 1) if count % a == 0 and a * a <= count),
            key=lambda p: p[1] - p[0],
        )
        if direction.reshape == "all" or (
            direction.reshape == "adapters" and min(long) <= 4 * direction.rank
        ):
            return near
        return long[0], long[1]

    def basis_step(self, step: int) -> int:
        direction = self.optimizer.factored
        kept = [factor.every for factor in (direction.u, direction.v) if isinstance(factor, Kept)]
        return step if not kept else 0 if kept[0] is None else step - step % kept[0]

    def rank(self, name: str) -> int:
        return min(self.optimizer.factored.rank_of(name), *self.shape(name))  # type: ignore[misc]

    def factors(self, name: str, step: int, query: int) -> Factors:
        """U, C and V of one draw; s is in the factor that is drawn, in U where both are."""
        (m, n), r, born = self.shape(name), self.rank(name), self.basis_step(step)  # type: ignore[misc]
        direction, moving = self.optimizer.factored, self.moving
        u, v, core = torch.zeros(0, r), torch.zeros(0, r), torch.eye(r)
        if isinstance(direction.u, Kept):
            u = self.kept(direction.u, (m, r), name, born, draw_word(0, BASIS))
        if isinstance(direction.v, Kept):
            v = self.kept(direction.v, (n, r), name, born, draw_word(1, BASIS))
        if moving == "core":
            numbers = self.normals((r,) if direction.c.diagonal else (r, r), name, step, query)
            core = torch.diag(numbers) if direction.c.diagonal else numbers
        else:
            numbers = self.normals(({"left": m, "right": n, "both": m + n}[moving], r), name, step, query)
            u, v = {"left": (numbers, v), "right": (u, numbers), "both": (numbers[:m], numbers[m:])}[moving]
        if isinstance(direction, Aligned):
            matrix = next(x for x in self.optimizer.matrices.values() if x.name == name)
            core = self.aligned(core, matrix.extra["spectrum"].double(), name, step, query)
            u, v = matrix.left, matrix.right
        long = self.long(name)
        if moving == "core":
            return Factors(sized(u), sized(core * long), sized(v))
        return Factors(
            sized(u if moving == "right" else u * long),
            sized(core),
            sized(v * long if moving == "right" else v),
        )

    @property
    def moving(self) -> str:
        """What is drawn in every step."""
        drawn = [
            isinstance(factor, Drawn) for factor in (self.optimizer.factored.u, self.optimizer.factored.v)
        ]
        return {(False, False): "core", (True, False): "left", (False, True): "right", (True, True): "both"}[
            tuple(drawn)
        ]  # type: ignore[index]

    def long(self, name: str) -> float:
        """s: the square of U C V^T has the expectation m n / s^2."""
        direction, (m, n), r = self.optimizer.factored, self.shape(name), self.rank(name)
        if direction.norm == "unit":
            return 1.0
        square = float(r * r if direction.c is not None and not direction.c.diagonal else r)
        for factor, size in ((direction.u, m), (direction.v, n)):
            square *= 1.0 if isinstance(factor, Kept) and factor.values == "orthonormal" else size
        return math.sqrt(m * n / square)

    def kept(self, factor: Kept, shape: tuple[int, int], name: str, born: int, word: int) -> Tensor:
        found = self.normals(shape, name, born, word)
        return orthonormal(found) if factor.values == "orthonormal" else found

    def aligned(self, core: Tensor, s: Tensor, name: str, step: int, query: int) -> Tensor:
        """Z0 - alpha diag(S), alpha = (sum_i S_i Z0_ii - xi sqrt(delta) ||S||) / ||S||^2."""
        word, xi = draw_word(query, RADIUS), 1.0
        direction = self.optimizer.factored
        if direction.sign == "matrix":
            xi = 1.0 if float(self.normals((1,), name, step, word)) >= 0 else -1.0
        elif direction.sign == "step":
            first = min(n for n in self.theta if self.shape(n) is not None)
            xi = 1.0 if float(self.normals((1,), first, step, word)) >= 0 else -1.0
        delta = direction.delta * (1.0 if direction.steps is None else 1.0 - step / direction.steps)
        alpha = ((s * core.diagonal()).sum() - xi * math.sqrt(delta) * s.norm()) / (s.norm() ** 2 + 1e-12)
        return core - alpha * torch.diag(s)

    def unit(self, name: str, step: int, query: int) -> Tensor:
        """A dense draw before anything scales it."""
        direction, shape = self.optimizer.direction.name, tuple(self.theta[name].shape)
        return zokern.draw(direction, shape, seed=self.optimizer.seed, who=name, step=step, draw=query)

    def dense(self, name: str, step: int, query: int) -> Sized:
        u = sized(self.unit(name, step, query))
        if self.kind != "cone":
            return sized(u.value * self.factor(name, step))
        momentum, length = self.cone(name)
        return momentum * (math.cos(self.optimizer.rule.angle) / length) + u * math.sin(
            self.optimizer.rule.angle
        )

    def cone(self, name: str) -> tuple[Sized, float]:
        """ConMeZO's momentum, and its expected root mean square."""
        shape = tuple(self.theta[name].shape)
        return self.memory.get(name) or (sized(self.normals(shape, name, 0, draw_word(2**23, BASIS))), 1.0)

    def tilted(self, name: str, c: float, step: int) -> None:
        """The momentum after a step of length c along z, in the direction of the loss's growth."""
        rule, (momentum, length) = self.optimizer.rule, self.cone(name)
        beta = rule.beta if isinstance(rule.beta, float) else 0.1
        assert step < 200 or isinstance(rule.beta, float), "the formula of beta after 200 steps is not known"
        along = beta * length + (1 - beta) * c * math.cos(rule.angle)
        across = (1 - beta) * c * math.sin(rule.angle)
        self.memory[name] = (
            momentum * beta + self.dense(name, step, 0) * ((1 - beta) * c),
            math.sqrt(along**2 + across**2),
        )

    def factor(self, name: str, step: int) -> Tensor:
        """What an element's z is multiplied with: given, or 1 for the share that moves and 0 for the rest."""
        direction, theta = self.optimizer.scaled, self.start[name]
        if direction is None:
            return torch.ones(())
        if isinstance(direction, Curved):
            return self.memory.get(f"{name} s", torch.ones(theta.shape, dtype=torch.float64))
        if isinstance(direction, Masked):
            return self.mask(direction, name, step).float()
        found = direction.scales(name, theta) if callable(direction.scales) else direction.scales.get(name)
        return torch.ones(()) if found is None else found.float()

    def mask(self, direction: Masked, name: str, step: int) -> Tensor:
        theta = self.start[name]
        everything = torch.cat([t.flatten() for t in self.start.values()]).abs().sort().values
        sizes = everything if direction.scope == "global" else theta.flatten().abs().sort().values
        if direction.by == "magnitude":
            return theta.abs() <= sizes[max(1, round(direction.keep * len(sizes))) - 1]
        share = direction.keep
        if direction.scope == "global":
            share = float((theta.abs() > sizes[max(1, round((1 - share) * len(sizes))) - 1]).double().mean())
        z = self.normals(theta.shape, name, step - step % direction.every, draw_word(0, MASK))
        return (1 + torch.erf(z / math.sqrt(2))) / 2 < share

    def z(self, name: str, step: int, query: int) -> Tensor:
        if self.shape(name) is None:
            return self.dense(name, step, query).value
        return self.factors(name, step, query).product().value.reshape(self.theta[name].shape)

    def moved(
        self,
        terms: Sequence[tuple[tuple[int, int], float]],
        eps: float,
        scope: Sequence[str],
        step: int = 0,
        anchored: bool = False,
    ) -> dict[str, Tensor]:
        """theta + eps sum_k a_k z_k of some parameters, around the weights where a step reads its losses."""
        around = self.memory["anchor"] if anchored else {n: self.base(n, step) for n in self.theta}
        return {
            n: t + sum(eps * a * self.z(n, *draw) for draw, a in terms) if n in scope else t
            for n, t in around.items()
        }

    def base(self, name: str, step: int) -> Tensor:
        """Where losses are read. The factors of a projection are the optimizer's, as its coefficients are
        (test_dizo.py checks them)."""
        if self.kind == "projected" and step and step % self.optimizer.rule.interval == 0:
            start = self.memory["start"].get(name)
            factor = self.optimizer.rule.factors.get(name, 1.0)
            return self.theta[name] if start is None else start + factor * (self.theta[name] - start)
        if self.kind != "averaged":
            return self.theta[name]
        fast, count = self.memory.get(name, (sized(self.theta[name]), 0))
        return self.theta[name] + (fast.value - self.theta[name]) / (1 + count / self.optimizer.rule.span)

    def gradient(self) -> dict[str, Tensor]:
        """By back-propagation, in float64."""
        assert self.loss is not None
        weights = {n: t.detach().requires_grad_() for n, t in self.theta.items()}
        return dict(zip(weights, torch.autograd.grad(self.loss(weights), list(weights.values()))))

    def slope(self, draw: tuple[int, int], scope: Sequence[str]) -> float:
        """<gradient, z> of some parameters."""
        return float(sum((g * self.z(n, *draw)).sum() for n, g in self.gradient().items() if n in scope))

    # Updates

    def update(self, move: Move, coefficients: Sequence[float], lr: float, weight_decay: float = 0.0) -> None:
        """theta <- (1 - lr wd) theta - lr times what the rule makes of g = (1 / count) sum_k c_k z_k, and a
        share of the gradient."""
        weights, step = [c / move.count for c in coefficients], move.draws[-1][0]
        if isinstance(self.optimizer.scaled, Curved):
            self.learn(step)
        gradient = self.gradient() if move.share or move.by_torch else {}
        if self.kind == "projected":
            chosen = {
                n: t for n, t in self.theta.items() if any(part in n for part in self.optimizer.rule.names)
            }
            self.memory.setdefault("start", chosen)
            self.theta = {n: self.base(n, step) for n in self.theta}
        if type(self.optimizer.estimator) is Anchored and step % self.optimizer.estimator.interval == 0:
            self.memory["anchor"] = dict(self.theta)
        self.now = max(step for step, _ in move.draws)
        for name in move.scope:
            share = self.optimizer.rule.share if self.shape(name) is None else 1.0
            theta = self.theta[name]
            if self.shape(name) is None:
                total = sum_of([self.dense(name, *draw) * w for draw, w in zip(move.draws, weights)])
                if self.kind == "averaged":
                    self.average(name, total, lr, weight_decay)
                    continue
                plain = self.kind in ("sgd", "muon", "cone", "projected")
                made = (total if plain else self.averaged(name, total)) * share
                if self.kind == "cone":
                    self.tilted(name, weights[0], step)
            else:
                made = self.matrix_move(name, [self.factors(name, *draw) for draw in move.draws], weights)
            if move.share:
                term, made = gradient[name] * move.share, Sized(*(part.reshape(theta.shape) for part in made))
                made = made + Sized(term, term.abs().max())
            decay = 1.0 - share * lr * weight_decay
            self.theta[name] = decay * theta - lr * made.value.reshape(theta.shape)
            self.size[name] = decay * self.size[name] + lr * made.size.reshape(theta.shape)

        if move.by_torch:
            self.step_of_torch({name: gradient[name] for name in move.by_torch})

    def learn(self, step: int) -> None:
        """h <- (1 - alpha) h + alpha h mean_k v_k z_k^2, of which s = h^(-1/2) is kept."""
        alpha, curvatures = self.optimizer.scaled.smooth, self.memory["curvatures"]
        for name in self.theta:
            h = self.factor(name, step).double() ** -2
            squares = [self.unit(name, step, k).double() ** 2 * v for k, v in enumerate(curvatures)]
            self.memory[f"{name} s"] = ((1 - alpha) * h + alpha * h * sum(squares) / len(squares)) ** -0.5

    def step_of_torch(self, gradient: dict[str, Tensor]) -> None:
        """A step of the torch optimizer, in float64:
        one of its class and options that has seen these weights from the start."""
        if "torch" not in self.memory:
            given = self.optimizer.first_order
            takes = inspect.signature(type(given)).parameters
            options = {
                key: value for key, value in given.param_groups[0].items() if key in takes and key != "params"
            }
            tensors = {name: self.theta[name].clone().requires_grad_() for name in gradient}
            self.memory["torch"] = tensors, type(given)(tensors.values(), **options)
        tensors, optimizer = self.memory["torch"]
        for name, g in gradient.items():
            tensors[name].grad = g
        optimizer.step()
        for name, t in tensors.items():
            self.size[name] = self.size[name] + (t.detach() - self.theta[name]).abs().max()
            self.theta[name] = t.detach().clone()

    @property
    def kind(self) -> str:
        rule = self.optimizer.rule
        known = (zokern.Sgd, zokern.Momentum, zokern.Adam, zokern.WindowMomentum, zokern.WindowAdam)
        known += (zokern.Averaged, zokern.Cone, zokern.Projected, zokern.Muon, zokern.SignSgd)
        assert type(rule) in known, f"the formula of rule {type(rule).__name__} is not known"
        return rule.name

    def averaged(self, name: str, gradient: Sized) -> Sized:
        """Momentum or Adam of a dense gradient, or the first moment in a small space."""
        rule = self.optimizer.rule
        if self.kind.startswith("window"):
            return self.windowed(name, gradient)
        if self.kind == "sign":
            return Sized(gradient.value.sign(), torch.ones_like(gradient.size))
        if self.kind == "momentum":
            old = self.memory.get(name)
            self.memory[name] = (
                gradient if old is None else old * rule.beta + gradient * (1.0 - rule.dampening)
            )
            return self.memory[name]
        first, second = self.moments(name, gradient)
        return first * (1.0 / self.root(second.value))

    def windowed(self, name: str, gradient: Sized) -> Sized:
        """What a rule makes of the last estimates, of which the newest has the power 0."""
        rule = self.optimizer.rule
        past = self.memory[name] = [gradient, *self.memory.get(name, [])][: rule.length]
        if self.kind == "window_momentum":
            total = sum_of([g * rule.beta**j for j, g in enumerate(past)])
            return total * (1.0 / sum(rule.beta**j for j in range(len(past)))) if rule.average else total
        if rule.warmup and len(past) < rule.length:
            return gradient
        one, two = rule.betas
        first = sum_of([g * one**j for j, g in enumerate(past)])
        second = sum(g.value**2 * two**j for j, g in enumerate(past))
        return first * (rule.scale / (second.sqrt() + rule.eps))

    def average(self, name: str, gradient: Sized, lr: float, weight_decay: float) -> None:
        """KerZOO's acceleration: fast weights, and their average."""
        theta = Sized(self.theta[name], self.size[name])
        fast, count = self.memory.get(name, (theta, 0))
        fast = fast * (1.0 - lr * weight_decay) + gradient * -lr
        share = 1.0 / (1.0 + count / self.optimizer.rule.span)
        self.memory[name] = fast, count + 1
        self.theta[name], self.size[name] = theta * (1.0 - share) + fast * share

    def root(self, second: Tensor) -> Tensor:
        rule = self.optimizer.rule
        return (second + rule.eps).sqrt() if rule.inside else second.sqrt() + rule.eps

    def moments(self, name: str, gradient: Sized) -> tuple[Sized, Sized]:
        zero = gradient * 0.0
        first, second, count = self.memory.get(name, (zero, zero, 0))
        squared, (one, two) = Sized(gradient.value**2, gradient.value**2), self.optimizer.rule.betas
        first = first * one + gradient * (1 - one)
        second = second * two + squared * (1 - two)
        count = count + 1
        self.memory[name] = first, second, count
        if self.optimizer.rule.bias_correction:
            return first * (1.0 / (1.0 - one**count)), second * (1.0 / (1.0 - two**count))
        return first, second

    def matrix_move(self, name: str, draws: Sequence[Factors], weights: Sequence[float]) -> Sized:
        if self.kind in ("sgd", "projected"):
            return sum_of([f.product() * w for f, w in zip(draws, weights)])
        left, _, right = draws[0]
        if self.kind == "adam" and not self.optimizer.rule.core:
            tau = sum_of(
                [Sized(f.core.value.diagonal(), f.core.size.diagonal()) * w for f, w in zip(draws, weights)]
            )
            first, second = self.moments(name, tau)
            spread = left.value**2 @ torch.diag(second.value) @ (right.value**2).mT
            return (left @ Sized(torch.diag(first.value), torch.diag(first.size)) @ right.mT) * (
                1.0 / self.root(spread)
            )
        assert self.moving != "both", "there is no space that numbers could be kept in"
        self.turn(name, draws[0])
        total = sum_of([getattr(f, self.moving) * w for f, w in zip(draws, weights)])
        move = self.in_small_space(name, total)
        if self.moving == "core":
            return left @ move @ right.mT
        return move @ right.mT if self.moving == "left" else left @ move.mT

    def in_small_space(self, name: str, total: Sized) -> Sized:
        """What takes the place of a draw. s is in `total`; Adam's moments are those of total / s, and its
        step is s times as long."""
        if self.kind == "momentum":
            return self.averaged(name, total)
        if self.kind == "muon":
            return self.orthogonal(name, total)
        long = self.long(name)
        return self.averaged(name, total * (1.0 / long)) * long

    def orthogonal(self, name: str, total: Sized) -> Sized:
        """t O of the average of the estimates: by an eigendecomposition of M^T M, without an iteration of
        matrices; or one power step."""
        rule, direction, (m, n) = self.optimizer.rule, self.optimizer.factored, self.shape(name)
        old = self.memory.get(name)
        first = not rule.beta or old is None
        average = total if first else old * rule.beta + total * (1 - rule.beta)
        self.memory[name] = average
        x = average.value
        if rule.power is None:
            columns = self.rank(name)
            squares, q = torch.linalg.eigh(x.mT @ x / (x.norm() + 1e-7) ** 2)
            factor = torch.ones_like(squares)
            for _ in range(5):
                one = 3.4445 - 4.7750 * squares + 2.0315 * squares**2
                factor, squares = factor * one, squares * one**2
            found = x / (x.norm() + 1e-7) @ q @ torch.diag(factor) @ q.mT
        else:
            columns = min(rule.power, self.rank(name))
            shape, born = (len(x), columns), self.basis_step(self.now)
            before, v = self.memory.get(name + " power", (-1, None))
            v = v if before == born else self.normals(shape, name, born, draw_word(2**24 - 1, BASIS))
            v = orthonormal(x @ (x.mT @ v))
            self.memory[name + " power"] = born, v
            found = v @ nn.functional.normalize(x.mT @ v, dim=0).mT
        long = 1.0
        # of U O V^T, whose square is the number of columns, times that of a normal factor
        if direction.norm == "matched":
            square = columns * (
                n if isinstance(direction.v, Kept) and direction.v.values == "normal" else 1.0
            )
            long = math.sqrt(m * n / square)
        # which small singular values grow by
        return Sized(found, found.abs() + 3.4445**5 * found.abs().max()) * long

    def turn(self, name: str, now: Factors) -> None:
        """At a new basis: what is remembered becomes its part in the space of the new basis."""
        direction, rule = self.optimizer.factored, self.optimizer.rule
        before = self.memory.get(name + " basis")
        self.memory[name + " basis"] = now
        carries = (self.kind == "momentum" or rule.carry) and name in self.memory
        if (
            before is None
            or not carries
            or torch.equal(before.left.value, now.left.value)
            and self.moving != "left"
        ):
            return
        if self.moving == "left" and torch.equal(before.right.value, now.right.value):
            return

        def overlap(factor: Any, old: Sized, new: Sized) -> Sized:
            return old.mT @ new * (1.0 / len(new.value) if factor.values == "normal" else 1.0)

        def turned(x: Sized, power: int = 1) -> Sized:
            if self.moving != "left":
                u = raised(overlap(direction.u, before.left, now.left), power)
                x = x @ u if self.moving == "right" else u.mT @ x
            return (
                x
                if self.moving == "right"
                else x @ raised(overlap(direction.v, before.right, now.right), power)
            )

        kept = self.memory[name]
        self.memory[name] = (
            turned(kept) if self.kind != "adam" else (turned(kept[0]), turned(kept[1], 2), kept[2])
        )


def raised(x: Sized, power: int) -> Sized:
    return Sized(x.value**power, x.size**power)


def sum_of(terms: Sequence[Sized]) -> Sized:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def orthonormal(x: Tensor) -> Tensor:
    """Q of the QR decomposition with a positive diagonal of R, float64."""
    q, r = torch.linalg.qr(x.double())
    return q * r.diagonal().sign()
