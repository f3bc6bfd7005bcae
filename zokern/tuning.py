"""Tuning: a workable eps and lr for an optimizer, from a few dozen forwards and before its first step.

    eps   the slopes s_k = <gradient, z_k> are read at several eps along the same draws. Where eps is too
          small, the rounding of the losses decides; where it is too large, their curvature does. Between them
          the slopes agree from one eps to the next.
    lr    = share L / f, with f the mean over probes of sum_k c_k s_k / n: the first-order fall of the loss L
          by a step at lr = 1. A step at this lr is expected to take `share` of the loss off. It is less where
          such a step would leave the range of eps in which the slopes hold.

An lr from curvature, (L(theta + eps z) + L(theta - eps z) - 2 L(theta)) / eps^2, is not offered: over eight
probes its sign changed from run to run.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .checks import finite_number, whole_number
from .estimator import Estimate, Estimator, Oracle, Spsa, Stencil
from .estimator.base import ONES
from .estimator.spsa import CENTRAL
from .evaluation import Evaluation, resolve
from .evaluation.loss import mean_of
from .optimizer import ZerothOrder
from .parallel import Together
from .plan import Plan
from .step import unwrapped
from .underflow import swallowed

WIDTHS = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)  # the eps that are tried, in units of the optimizer's
FEW = 4  # slopes that are compared at each eps
AGREES = 0.1  # two eps agree where their slopes differ by less than this share of them
NO_SLOPE = (
    "the losses show no slope: the expected fall is {}, the mean loss {}. Look whether the closure runs the "
    "model that is trained, and whether its loss is finite; the estimator has to tell slopes (zokern.Spsa() "
    "does)"
)
Say = Callable[[str], None]


class Width(NamedTuple):
    """What was read at one eps.

    slope      root mean square of the slopes, in units of loss per weight
    change     rms of their change to the neighbouring eps, over `slope`: the larger one of both neighbours
    swallowed  share of sampled 16-bit weights that rounding leaves as they are"""

    eps: float
    slope: float
    change: float
    swallowed: float

    @property
    def is_sound(self) -> bool:
        """Whether neither curvature nor rounding decides what is read here."""
        return self.change < AGREES and self.swallowed < AGREES


class Probe(NamedTuple):
    """What one step's worth of losses says.

    loss    their mean;  fall  of the loss at lr = 1, first order
    length  square of the change of a weight at lr = 1, mean over draws with unit variance"""

    loss: float
    fall: float
    length: float


@dataclass(frozen=True)
class Tuning:
    """Holds an eps and an lr, and what they were chosen from: the result of zokern.tune.

    eps, lr   of the first parameter group; eps in weights
    old       (eps, lr) that the optimizer had
    widths    what was read at each eps
    loss      mean loss L over the probes
    fall      first-order fall of the loss by a step at lr = 1, mean over the probes, in units of loss
    error     its standard error over the probes, as a share of `fall`
    share     of the loss that a step is expected to take off
    reach     rms change of a weight by a step, where it bounds lr; None: it does not
    probes    steps' worth of losses that lr is told from
    forwards  losses that were read in all

    str() is the report, and apply() sets both numbers. A Tuning writes nothing by itself."""

    eps: float
    lr: float
    old: tuple[float, float]
    widths: tuple[Width, ...]
    loss: float
    fall: float
    error: float
    share: float
    reach: float | None
    probes: int
    forwards: int

    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Sets eps and lr of the first group, and those of other groups by the same factors."""
        for name, value in (("eps", self.eps), ("lr", self.lr)):
            first = float(optimizer.param_groups[0][name])
            for group in optimizer.param_groups:
                group[name] = value if not first else value * (float(group[name]) / first)

    def __str__(self) -> str:
        chosen = next(width for width in self.widths if width.eps == self.eps)
        kept = "kept" if self.eps == self.old[0] else f"it was {self.old[0]:.2g}"
        lines = ["eps       slope     change to its neighbours   swallowed by rounding"]
        lines += [f"{w.eps:<9.2g} {w.slope:<9.3g} {w.change:<26.1%} {w.swallowed:.0%}" for w in self.widths]
        lines.append(f"eps {self.eps:.2g} ({kept}): slopes change by {chosen.change:.1%} to the next eps")
        if not chosen.is_sound:
            lines.append(
                "    No eps is sound: every one is decided by rounding or by curvature. Compute the loss in "
                "float32, or train in float32."
            )
        lines.append(
            f"lr {self.lr:.2g} (it was {self.old[1]:.2g}): a step is expected to take {self.share:.1%} off "
            f"the loss of {self.loss:.3g}; {self.probes} probes, standard error {self.error:.0%}; "
            f"{self.forwards} forwards in all"
        )
        if self.reach is not None:
            lines.append(f"    bounded: such a step changes a weight by {self.reach:.2g}, root mean square")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draws the slopes' change and the swallowed share over eps,
        and the expected fall over lr, into a file."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
        eps = [w.eps for w in self.widths]
        left.plot(
            eps,
            [max(w.change, 1e-6) for w in self.widths],
            "o-",
            label="change of the slopes to the next eps",
        )
        if any(w.swallowed for w in self.widths):
            left.plot(
                eps,
                [max(w.swallowed, 1e-6) for w in self.widths],
                "s--",
                label="16-bit weights that do not move",
            )
        left.axvline(self.eps, color="C2", label=f"chosen: {self.eps:.2g}")
        left.axhline(AGREES, color="0.7", linewidth=0.8)
        left.set(
            xscale="log",
            yscale="log",
            xlabel="eps",
            ylabel="share",
            title="eps: between rounding and curvature",
        )
        rates = [self.lr * 10 ** (k / 8) for k in range(-16, 9)]
        right.plot(rates, [rate * self.fall for rate in rates], color="C0")
        for rate, name, color in ((self.lr, "chosen", "C2"), (self.old[1], "before", "0.5")):
            right.axvline(rate, color=color, label=f"{name}: {rate:.2g}")
        right.axhline(self.loss, color="0.7", linewidth=0.8, linestyle="--", label="the loss itself")
        right.set(
            xscale="log",
            yscale="log",
            xlabel="lr",
            ylabel="loss",
            title="expected fall of the loss by one step",
        )
        left.legend(fontsize=8)
        right.legend(fontsize=8)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


class _Counted(Oracle):
    """An oracle that counts the losses that it reads."""

    read = 0

    def losses(self, points: Any, scope: Any = None, closure: Any = None) -> torch.Tensor:
        self.read += len(set(points))
        return super().losses(points, scope, closure)

    def slopes(self, draws: Any, scope: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        self.read += len(draws)
        return super().slopes(draws, scope)


def tune(
    optimizer: ZerothOrder,
    closures: Callable[[], Any] | Sequence[Callable[[], Any]],
    *,
    probes: int = 8,
    share: float = 0.02,
    reach: float | None = None,
    evaluation: Evaluation | None = None,
    say: Say | None = None,
) -> Tuning:
    """Returns an eps and an lr for an optimizer.
    Writes nothing: weights, state, step number and options stay.

    optimizer   a zokern optimizer at its options, whatever lr they have; deferred updates are flushed
    closures    one or more, each computing the loss of its own batch as for zokern.step. The first one serves
                eps; lr is told from all of them in turn, so several batches give a better lr
    probes      draws that lr is told from. Its relative standard error is about sqrt(2 / probes)
    share       of the loss that a step is expected to take off
    reach       bounds lr: the change of a weight by a step, root mean square. None: the largest eps that was
                tried and is sound, or the one that is chosen. Where gradients are small, a share of the loss
                can be far, and the slopes say nothing of the loss there. math.inf: no bound
    evaluation  how losses are read; None: zokern.Jvp(), which takes one copy of the trained weights, as
                zokern.Master() does
    say         is called with a line of text for every stage
    The promise is one of first order, for steps after the first ones: moments have settled, and estimates
    agree from step to step (Rule.gain). Where the run finds better directions than the first ones, as ConMeZO
    and MeZOGV do, steps take more off.
    Reads 5 eps x 4 slopes x 2 losses and 2 losses a probe, 56 in all, with a central difference. An estimator
    that learns reads more, until it has settled (Estimator.settles): BSZO 88 in all.
    eps stays where slopes agree with its neighbours' to 10 % and rounding swallows less than 10 % of the
    perturbation; else the larger of both shares is least at it. A rule whose steps have one length gets
    the lr at which they are as long as SGD's. Raises ValueError for arguments out of range and where the
    losses show no slope."""
    optimizer = unwrapped(optimizer)
    given = _losses_of(closures, optimizer.estimator)
    probes, share = whole_number("probes", probes, 2), finite_number("share", share, above=0.0)
    if reach is not None and reach != math.inf:
        reach = finite_number("reach", reach, above=0.0)
    say = say or (lambda text: None)
    with optimizer.ranks.telling(optimizer.steps), _borrowed(optimizer) as plan:
        reading = Together(resolve("jvp" if evaluation is None else evaluation), optimizer.ranks)
        oracle = _Counted(reading, plan, given[0], optimizer.state)
        optimizer.prepare(plan, oracle)
        own = [group.eps for group in plan.groups]
        widths = _widths(optimizer, oracle, plan, own, say)
        best = min(widths, key=lambda w: (max(w.change, w.swallowed), -w.eps))
        now = widths[WIDTHS.index(1.0)]
        eps = now.eps if now.is_sound else best.eps
        _set(plan, own, eps / own[0])
        found = _probes(optimizer, oracle, plan, given, probes, say)
    loss, fall, length = (math.fsum(values) / len(found) for values in zip(*found))
    if not fall > 0.0 or not math.isfinite(loss):
        raise ValueError(NO_SLOPE.format(fall, loss))
    if reach is None:
        reach = max((width.eps for width in widths if width.is_sound), default=eps)
    free, most = _rates(share * abs(loss) / fall, reach, math.sqrt(length), optimizer.rule.lr)
    lr, bound = min(free, most), reach if most < free else None
    error = statistics.stdev(probe.fall for probe in found) / math.sqrt(len(found)) / fall
    old = own[0], float(optimizer.param_groups[0]["lr"])
    taken = share if bound is None else share * lr / free
    return Tuning(eps, lr, old, tuple(widths), loss, fall, error, taken, bound, len(found), oracle.read)


def _losses_of(closures: Any, estimator: Any) -> list[Callable[[], Any]]:
    """Returns the closures in a list, each as the mean loss of its batch."""
    given = [closures] if callable(closures) else list(closures) if isinstance(closures, Sequence) else []
    if not given or not all(map(callable, given)):
        raise TypeError(
            f"closures is {closures!r:.80}; expected a function that computes a batch's loss, or a list of "
            "them"
        )
    rows = estimator.rows  # closures of the loss of each example
    return [mean_of(one) for one in given] if rows else given


def _rates(lr: float, reach: float, length: float, own: float | None) -> tuple[float, float]:
    """Returns (lr for a rule, the largest lr whose step changes a weight by no more than `reach`).

    length  rms of a weight's change at lr = 1, where the rule is SGD
    own     lr of a rule whose steps have one length, whatever the slope; None: SGD's"""
    if own is not None:
        lr, length = lr * length * own / ONES, ONES / own
    return lr, reach / length if length else math.inf


@contextmanager
def _borrowed(optimizer: ZerothOrder) -> Iterator[Plan]:
    """Inside, losses may be read; what the optimizer's parts learn meanwhile is forgotten at the end."""
    optimizer.flush()
    parts = [part for part in (optimizer.estimator, optimizer.factored) if part is not None]
    kept, force = [copy.deepcopy(part.state) for part in parts], optimizer.guards.force
    states = {tensor: dict(state) for tensor, state in optimizer.state.items()}
    with torch.inference_mode(False), torch.no_grad(), optimizer.readings():
        optimizer.guards.force = True  # an eps that rounding swallows is what is looked for
        try:
            yield optimizer.plan()
        finally:
            optimizer.guards.force = force
            optimizer.work.forget()
            for part, state in zip(parts, kept):
                part.state = state
            optimizer.state.clear()
            optimizer.state.update(states)


def _set(plan: Plan, own: Sequence[float], factor: float) -> None:
    for group, eps in zip(plan.groups, own):
        group.eps = eps * factor


def _ask(estimator: Any, oracle: Oracle, plan: Plan, first: int) -> list[Estimate]:
    """Returns the estimates of one step, along the draws from number `first` on."""
    oracle.plan = replace(plan, first=plan.first + first)
    return [*estimator.forwards(oracle, oracle.plan)]


def _widths(
    optimizer: ZerothOrder, oracle: Oracle, plan: Plan, own: Sequence[float], say: Say
) -> list[Width]:
    """Returns what is read at each eps by the estimator's own difference,
    along the same draws of the first batch."""
    spsa = Spsa(FEW, _stencil(optimizer.estimator))
    rows, shares = [], []
    for factor in WIDTHS:
        _set(plan, own, factor)
        (found,) = _ask(spsa, oracle, plan, 0)
        rows.append(found.coefficients[0].cpu())
        shares.append(max(swallowed(plan, group) for group in plan.groups))
        say(
            f"eps {own[0] * factor:.2g}: slopes of {rows[-1].square().mean().sqrt():.3g}, {shares[-1]:.0%} "
            "swallowed by rounding"
        )
    slopes = torch.stack(rows)
    size = slopes.square().mean(1).sqrt()
    change = (slopes[1:] - slopes[:-1]).square().mean(1).sqrt() / torch.maximum(size[1:], size[:-1])
    change = change.nan_to_num(math.inf, math.inf)
    both = [max(change[max(0, i - 1) : i + 1].tolist()) for i in range(len(WIDTHS))]
    return [Width(own[0] * f, float(s), c, share) for f, s, c, share in zip(WIDTHS, size, both, shares)]


def _stencil(estimator: Estimator) -> Stencil:
    return estimator.stencil if isinstance(estimator, Spsa) else CENTRAL


def _probes(
    optimizer: ZerothOrder,
    oracle: Oracle,
    plan: Plan,
    closures: Sequence[Callable[[], Any]],
    count: int,
    say: Say,
) -> list[Probe]:
    """Returns a probe for each step's worth of losses, over the closures in turn:
    `count` draws or more, two probes at least. Those in which the estimator settles are left out."""
    found: list[Probe] = []
    estimator, gain = optimizer.estimator, optimizer.rule.gain
    if estimator.gain is not None:  # c estimates a slope: the plain difference has its mean and less variance
        gain *= estimator.gain
        estimator = Spsa(estimator.queries, _stencil(estimator))
    queries = estimator.queries
    for step in itertools.count():
        oracle.closure = closures[step % len(closures)]
        parts = _ask(estimator, oracle, plan, FEW + step * queries)
        if step < estimator.settles:
            continue
        fall = math.fsum(
            float((e.coefficients[0] * e.slopes).sum()) / e.count for e in parts if e.slopes is not None
        )
        length = math.fsum(float(e.coefficients[0].square().sum()) / e.count**2 for e in parts) / len(parts)
        loss = math.fsum(float(e.losses.mean()) for e in parts) / len(parts)
        found.append(Probe(loss, gain * fall, gain**2 * length))
        say(f"probe {len(found)}: loss {loss:.4g}, a step of {gain * math.sqrt(length):.3g} lr")
        if len(found) >= 2 and len(found) * queries >= count:
            break
    return found


__all__ = ["Tuning", "Width", "tune"]
