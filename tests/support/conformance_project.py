"""project on every backend, bit for bit the reference; and verbs that read decay and go from a control.

As conformance.py: each ``check_*(backend, device, scale)`` raises AssertionError. A verb with a control is
compared with the same backend's call whose decay the host knows, so that the checks hold for products on
matrix units too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import conformance
import torch
from conformance import DTYPES, SEED, ids, low_of, source, theta_of
from guarded import Guarded, equal
from torch import Tensor

from zokern.backends import (
    PROJECTED,
    ROUNDINGS,
    STATES,
    Batch,
    Noise,
    Outer,
    Projection,
    Span,
    Terms,
    Update,
)
from zokern.backends.reference import Reference
from zokern.directions import resolve

USUAL = dict(eps=1e-3, lr=1e-4, weight_decay=0.1, clip=math.inf, sign=-1.0, count=1.0)
WILD = (0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, -1e-320, 1e-40, -1e-45, 1e38, -3e39, 1e300, 1.0)


def project(backend, device: str, losses: Tensor, weights: Tensor | None, what: str, **scalars) -> None:
    """One call on a backend and on the reference, from equal numbers."""
    numbers = torch.tensor([(USUAL | scalars)[name] for name in PROJECTED], dtype=torch.float64)
    right = Reference().project(Projection(losses, weights, numbers))
    given = Projection(*[x if x is None else x.to(device, copy=True) for x in (losses, weights, numbers)])
    mine = backend.project(given)
    for name, got, expected in zip(right._fields, mine, right):
        equal(got, expected, f"project {what} {scalars}, {name}")
    for got, kept in zip(given, (losses, weights, numbers)):
        if kept is not None and got is not None:
            equal(got, kept, f"project {what}, an argument (only read)")


def normal(generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def sparse(generator, *shape: int, values: Sequence[float] = (0.0, -0.0)) -> Tensor:
    """Normal numbers, a third of them replaced by some of these values."""
    chosen = torch.tensor(values, dtype=torch.float64)[
        torch.randint(0, len(values), shape, generator=generator)
    ]
    return torch.where(
        torch.rand(shape, generator=generator) < 1 / 3, chosen, normal(generator, *shape)
    ).contiguous()


def check_project_sizes(backend, device="cpu", scale="full") -> None:
    """Any number of micro-batches, points and draws, with weights and without."""
    generator = source(check_project_sizes)
    sizes = [(1, 2, 1), (1, 1, 1), (3, 2, 1), (1, 9, 4), (2, 5, 33), (5, 1, 3)]
    if scale == "full":
        sizes += [(1, 130, 64), (2, 65, 32), (1, 3, 31), (7, 33, 100), (1, 5000, 3), (2, 3, 4099)]
    for m, n, count in sizes:
        losses = normal(generator, m, n)
        project(backend, device, losses, sparse(generator, count, n), f"{m, n, count}", count=float(count))
        project(backend, device, losses, None, f"{m, n} without weights", sign=1.0, clip=1e-9)


def check_project_order(backend, device="cpu", scale="full") -> None:
    """Sums in order, each product and sum rounded on its own, in float64: nothing else is left of these."""
    generator = source(check_project_order)
    for _ in range(3 if scale == "quick" else 20):
        a, b, c, d = normal(generator, 4).tolist()
        # a b - b a is 0, and the rounding error of a b where it was contracted
        crossed = torch.tensor([[b, a], [a, -b]], dtype=torch.float64).split(1)
        project(backend, device, *crossed, "a sum that is 0")
        wide = torch.tensor([[a, b, c, d]], dtype=torch.float64)
        far = [[1e17, 1.0, -1e17, 1e-3], [1e-9, -1e17, 1e17, 1.0], [1.0, 1e17, 1.0, -1e17]]
        weights = torch.tensor(far, dtype=torch.float64)
        project(backend, device, torch.ones_like(wide), weights * a, "cancelling terms")
        reads = torch.tensor([[1e17 * a, b], [c, d], [-1e17 * a, 1e-3], [b, a]], dtype=torch.float64)
        project(backend, device, reads, torch.eye(2, dtype=torch.float64), "cancelling reads")
        project(backend, device, reads, None, "cancelling reads without weights")
        # 1 - lr weight_decay, which is 0 where the product rounds to 1
        project(backend, device, wide, wide.clone(), "decay", lr=49.0, weight_decay=1 / 49.0)
        project(backend, device, wide, wide.clone(), "count", count=3.0, sign=0.7, lr=abs(a) / 3)


def check_project_zeros(backend, device="cpu", scale="full") -> None:
    """A weight of 0 reads no loss, a row of zeros is 0, and a sum of zeros has the sign of its terms."""
    generator = source(check_project_zeros)
    for _ in range(3 if scale == "quick" else 20):
        losses = sparse(generator, 2, 6, values=(math.inf, -math.inf, math.nan, 0.0, -0.0))
        read = losses.isfinite().all(0)
        weights = sparse(generator, 5, 6) * read
        weights[1], weights[2] = 0.0, -0.0
        project(backend, device, losses, weights.contiguous(), "unread losses")
        project(backend, device, losses, sparse(generator, 5, 6), "losses that are read")
    tiny = torch.tensor([[-0.0, 0.0, 1.0, -1.0]], dtype=torch.float64)
    weights = torch.tensor(
        [[1.0, 0, 0, 0], [-1.0, 0, 0, 0], [1.0, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.float64
    )
    for sign in (1.0, -1.0):
        project(backend, device, tiny, weights, "zeros", sign=sign, weight_decay=0.0)


def check_project_clip(backend, device="cpu", scale="full") -> None:
    """A bound is for the rounded coefficient, and is not rounded; a NaN stays one."""
    values = [0.1, -0.1, 0.0, -0.0, 1e-50, 3.0, -3.0, math.inf, -math.inf, math.nan, 0.09999999999999999]
    losses = torch.tensor([values], dtype=torch.float64)
    weights = torch.eye(len(values), dtype=torch.float64)
    for clip in (0.1, 0.0, 3.0, 1e300, 1e-300, math.inf):
        for keep in (len(values), 7):  # with what is not finite, and without
            project(backend, device, losses[:, :keep].contiguous(), weights[:keep, :keep].contiguous(),
                    f"clip of {keep}", clip=clip, eps=1.0)  # fmt: skip
            project(backend, device, losses[:, :keep].contiguous(), None, f"clip of {keep}", clip=clip)


def check_project_control(backend, device="cpu", scale="full") -> None:
    """decay, go and finite by each of the numbers that make them."""
    two = torch.tensor([[1.5, 0.5]], dtype=torch.float64)
    half = torch.tensor([[0.5, -0.5]], dtype=torch.float64)
    cases: list[dict[str, float]] = [
        {}, dict(lr=0.0), dict(lr=0.0, weight_decay=0.0), dict(weight_decay=0.0), dict(lr=1e-50),
        dict(lr=1e-50, weight_decay=0.0), dict(lr=1e-44), dict(lr=1e36), dict(lr=1e39), dict(lr=math.nan),
        dict(lr=math.inf), dict(lr=1e-4, weight_decay=1e43), dict(weight_decay=math.inf), dict(eps=1e-45),
        dict(eps=math.inf), dict(count=0.0), dict(count=1e-50), dict(count=1e300), dict(clip=math.nan),
        dict(lr=1e-9, weight_decay=1e-9), dict(lr=1e-30, count=1e-30), dict(sign=math.nan), dict(clip=-1.0),
    ]  # fmt: skip
    for case in cases:
        for losses in (two, torch.zeros_like(two), torch.full_like(two, 3e38)):
            project(backend, device, losses, half, "two points", **case)
            project(backend, device, losses, None, "coefficients", **case)
    generator = source(check_project_control)
    for _ in range(5 if scale == "quick" else 200):
        m, n, count = torch.randint(1, 6, (3,), generator=generator).tolist()
        losses, weights = sparse(generator, m, n, values=WILD), sparse(generator, count, n, values=WILD)
        numbers = dict(zip(PROJECTED, sparse(generator, 6, values=WILD).tolist()))
        project(backend, device, losses, weights, "wild losses")
        project(backend, device, normal(generator, m, n), weights, "wild numbers", **numbers)


# --- verbs that read a control ------------------------------------------------------------------------------

# decay, go, finite: a factor, none, and steps that stop; the decay of a verb that stopped is not read
CONTROLS = ((0.97, 1.0, 1.0), (1.0, 1.0, 1.0), (0.5, 0.0, 1.0), (0.5, 0.0, 0.0))


def copies(groups: Sequence[Sequence[Guarded]], device: str) -> list[list[Guarded]]:
    return [[tensor.copy_to(device) for tensor in group] for group in groups]


def compare(groups, device: str, with_control: Callable, without: Callable | None, what: str) -> None:
    """A call with a control on copies, and the same call without one; None: it has to change nothing and
    count nothing."""
    mine, right = copies(groups, device), copies(groups, device)
    count = with_control([[t.view for t in group] for group in mine])
    expected = torch.zeros(1, dtype=torch.int64)
    if without is not None:
        expected = without([[t.view for t in group] for group in right]).cpu()
    for i, (group, other) in enumerate(zip(mine, right)):
        for got, wanted in zip(group, other):
            equal(got.buffer, wanted.buffer.cpu(), f"{what}, group {i}")
    equal(count, expected, f"{what}, how many results are inf or NaN")


def lists(
    generator, scale: str, shapes=((331,), (9, 40)), dtypes=DTYPES, roundings=ROUNDINGS
) -> Iterator[tuple]:
    """A list of all types with its spans and low bits, for each rounding; some weights are not finite."""
    for rounding in roundings:
        thetas = [theta_of(generator, shape, dtype, offset=8) for shape in shapes for dtype in dtypes]
        for theta in thetas[:2]:
            theta.view.view(-1)[3] = math.inf
        lows = [low_of(generator, theta) for theta in thetas] if rounding == "residual" else []
        yield rounding, thetas, lows, [Span(who, 8) for who in ids(generator, len(thetas))]


def check_control_axpy(backend, device="cpu", scale="full", roundings=ROUNDINGS) -> None:
    """One term or several. The decay of the terms is not read."""
    generator = source(check_control_axpy)
    shapes = ((331,), (9, 40)) if scale == "quick" else ((331,), (9, 40), (40_003,))
    for rounding, thetas, lows, spans in lists(generator, scale, shapes, roundings=roundings):
        for count, direction in ((1, "normal"), (3, "rademacher")) if scale == "quick" else (
            (1, "normal"), (1, "rademacher"), (3, "normal"), (40, "rademacher")
        ):  # fmt: skip
            coeffs = torch.full((count,), 0.01, device=device)
            noise = Noise(resolve(direction), SEED, [(k, 1) for k in range(count)])
            for control in CONTROLS[::2] if scale == "quick" else CONTROLS:

                def call(groups, terms: Terms, noise=noise, rounding=rounding, spans=spans):
                    return backend.axpy_(Batch(groups[0], spans, rounding, groups[1] or None), noise, terms)

                given = Terms(coeffs, 0.5, control=torch.tensor(control, device=device))
                known = Terms(coeffs, control[0])
                compare([thetas, lows], device, lambda groups, call=call, t=given: call(groups, t),
                        (lambda groups, call=call, t=known: call(groups, t)) if control[1] else None,
                        f"axpy_ {direction} K={count} {rounding} under {control}")  # fmt: skip


def check_control_update(backend, device="cpu", scale="full") -> None:
    """Whether the step is finite counts, and neither its decay nor whether an amount moves."""
    from conformance_update import USUAL as NUMBERS
    from conformance_update import states_of

    generator = source(check_control_update)
    for rounding, thetas, lows, spans in lists(generator, scale, ((331,),)):
        quick = {"nearest": "adam", "stochastic": "momentum", "residual": "sign"}[rounding]
        for rule in (quick,) if scale == "quick" else STATES:
            states = states_of(generator, rule, thetas)
            numbers, coeffs = (
                torch.tensor(NUMBERS[rule], device=device),
                torch.full((1,), 0.01, device=device),
            )
            noise = Noise(resolve("normal"), SEED, [(3, 1)])
            for control in CONTROLS[2:] if scale == "quick" else CONTROLS:

                def call(groups, told, noise=noise, rounding=rounding, spans=spans, rule=rule, a=coeffs,
                         numbers=numbers):  # fmt: skip
                    theta, low, *kept = groups
                    batch = Batch(theta, spans, rounding, low or None)
                    return backend.update_(batch, noise, Update(a, rule, numbers, kept, told))

                told = torch.tensor(control, device=device)
                compare([thetas, lows, *states], device, lambda groups, call=call, t=told: call(groups, t),
                        (lambda groups, call=call: call(groups, None)) if control[2] else None,
                        f"update_ {rule} {rounding} under {control}")  # fmt: skip


def products_of(generator, scale: str) -> Iterator[tuple]:
    """Matrices of one type each, whole tiles and what is beside them, and their factors."""
    shapes = ((24, 40), (5, 7)) if scale == "quick" else ((24, 40), (130, 264), (37, 29))
    for dtype in DTYPES:
        for rounding, thetas, lows, spans in lists(generator, scale, shapes, (dtype,)):
            spans = [Span(span.who, 0) for span in spans]
            for rank in (16, 5):
                pairs = [[torch.randn(k, rank, generator=generator) for k in shape] for shape in shapes]
                yield rounding, thetas, lows, spans, [list(side) for side in zip(*pairs)]


def check_control_lowrank(backend, device="cpu", scale="full") -> None:
    """In place, to nearest and not; whole tiles and single elements."""
    generator, noise = source(check_control_lowrank), Noise(None, SEED, [(3, 0)])
    for rounding, thetas, lows, spans, (lefts, rights) in products_of(generator, scale):
        lefts, rights = ([factor.to(device) for factor in side] for side in (lefts, rights))
        for control in CONTROLS:

            def call(groups, decay, told, rounding=rounding, spans=spans, lefts=lefts, rights=rights):
                batch = Batch(groups[0], spans, rounding, groups[1] or None)
                outer = Outer(lefts, rights, [0.37] * len(lefts), decay, told)
                return backend.lowrank_(batch, outer, noise)

            told = torch.tensor(control, device=device)
            compare([thetas, lows], device, lambda groups, call=call, t=told: call(groups, 0.5, t),
                    (lambda groups, call=call, d=control[0]: call(groups, d, None)) if control[1] else None,
                    f"lowrank_ {rounding} rank {rights[0].shape[1]} under {control}")  # fmt: skip


def check_lowrank_clock(backend, device="cpu", scale="full") -> None:
    """A clock is added to the step whose bits stochastic rounding spends, modulo 2^32."""
    generator = source(check_lowrank_clock)
    for rounding, thetas, lows, spans, (lefts, rights) in products_of(generator, scale):
        if rounding != "stochastic":
            continue
        outer = Outer([u.to(device) for u in lefts], [v.to(device) for v in rights], [0.37] * len(lefts))
        for time in (7, 2**32 - 2):
            clock = torch.tensor([time], device=device)

            def call(groups, step, clock=None, spans=spans, outer=outer):
                noise = Noise(None, SEED, [(step, 0)], clock)
                return backend.lowrank_(Batch(groups[0], spans, "stochastic"), outer, noise)

            compare([thetas, lows], device, lambda groups, call=call, clock=clock: call(groups, 3, clock),
                    lambda groups, call=call, time=time: call(groups, (3 + time) % 2**32),
                    f"lowrank_ at clock {time}")  # fmt: skip


CHECKS: dict[str, Callable] = {
    name[6:]: check for name, check in list(globals().items()) if name.startswith("check_")
}


def run(
    backend, device: str = "cpu", scale: str = "full", only: Sequence[str] = tuple(CHECKS)
) -> dict[str, str | None]:
    """As conformance.run."""
    return conformance.run(backend, device, scale, only, CHECKS)
