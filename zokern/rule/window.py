"""Rules ``window_momentum`` and ``window_adam``: moments made anew in every step from the last estimates, and
never stored.

    g_0, g_1, ...: a parameter's estimates, the newest first, g_j = sum_k weights[k] z_k of its update

    theta <- decay theta + lr sum_{j < n} a_j g_j                                          momentum: a_j =
    beta^j, or their shares theta <- decay theta + lr scale sum_j beta1^j g_j / (sqrt(sum_j beta2^j g_j^2) +
    eps)  adam (AdaMeZO, arXiv 2605.00650)

A z is a function of its names, so a window holds names and numbers: (step, draw word, weight), 16 bytes a
draw, and no byte a weight. The price is time: a step makes the z of n updates again. A linear rule is one
call of axpy_. A rule with squares runs the verb update_ over the window, on moments of PIECE elements at a
time, and then once on the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import Batch, Noise, Span, Update
from ..checks import finite_number, flag, whole_number, within
from ..device_numbers import Weights, stacked, upload
from ..estimator.base import ONES
from ..fingerprint import announce
from ..group import Group
from ..plan import Plan
from .adam import LARGEST, SMALLEST, pair
from .base import Rule
from .dense import PIECE
from .state import START_ANEW
from .waiting import is_nothing

Past = list[list[Any]]  # an update: [step, draw word, weight] of each of its draws; see Plan.at_hand
EMPTY: list[Past] = []


class _Window(Rule):
    """What both rules share: a parameter's window is in the optimizer's state, under `window`, the oldest
    update first.

    A skipped step adds nothing on a CPU. On a GPU the host does not know of it, and it takes a place with the
    weight 0. A parameter that is frozen for a while goes on from the updates that it had."""

    dense, plain, captures = True, True, False
    length: int

    def update(
        self, plan: Plan, group: Group, weights: Sequence[float], lr: float, decay: float, states: Any,
        defer: bool
    ) -> Tensor | int:  # fmt: skip
        weights = Weights.of(weights, lr, decay, group.theta[0].device)
        count: Tensor | int = 0
        if not plan.knows(weights.projected.weights) or weights.is_finite:
            for part, window in self.windows(plan, group, weights, states):
                count = count + self.move(plan, part, window, weights)
        return count

    def move(self, plan: Plan, group: Group, window: Sequence[Past], weights: Weights) -> Tensor | int:
        """Writes tensors that have one window."""
        raise NotImplementedError

    def windows(
        self, plan: Plan, group: Group, weights: Weights, states: Any
    ) -> Iterator[tuple[Group, list[Past]]]:
        """Adds this update to every window; yields the tensors that have the same one, oldest update
        first."""
        each = plan.at_hand(weights.projected.weights)
        new = [[step, word, weight] for (step, word), weight in zip(plan.draws(), each)]
        keys: dict[int, tuple] = {id(EMPTY): ()}
        found: dict[tuple, tuple[list[int], list[Past]]] = {}
        for i, (name, tensor) in enumerate(zip(group.names, group.tensors)):
            old = states[tensor].get("window", EMPTY)
            if id(old) not in keys:
                keys[id(old)] = _checked(old, name)
            members, window = found.setdefault(keys[id(old)], ([], [*old, new][-self.length :]))
            members.append(i)
            # a new list: a state_dict that was taken before holds the old one
            states[tensor]["window"] = window
        for members, window in found.values():
            yield group if len(members) == len(group.tensors) else group.only(members), window


def _checked(window: Any, name: str) -> tuple:
    """Returns a window as a tuple; ValueError for one that holds anything but updates."""
    if not isinstance(window, list) or not all(
        isinstance(past, list) and all(map(_is_term, past)) for past in window
    ):
        raise ValueError(
            f"state 'window' of parameter {name!r} is {window!r:.80}; expected a list of updates, each a "
            "list of [step, draw word, weight]: "
            f"{START_ANEW}"
        )
    return tuple(tuple(map(tuple, past)) for past in window)


def _is_term(term: Any) -> bool:
    """Whether this is [step, draw word, weight]: two words of 32 bits and a finite float."""
    named = (
        isinstance(term, list)
        and len(term) == 3
        and all(type(word) is int and 0 <= word < 2**32 for word in term[:2])
    )
    return named and (isinstance(term[2], Tensor) or isinstance(term[2], float) and math.isfinite(term[2]))


def _draws(window: Sequence[Past]) -> list[tuple[int, int]]:
    return [(step, word) for past in window for step, word, _ in past]


class WindowMomentum(_Window):
    """Moves the weights along an average of the last n estimates, none of which is stored: their draws
    are made again.

        theta <- decay theta + lr sum_{j < n} a_j g_j,   g_j: the parameter's estimate of j updates ago

    beta     0.9 by default, 0 <= beta < 1
    length   n, updates that are remembered: 10. The rest of an endless sum would have the share beta^n:
             35 % here
    average  True: a_j = beta^j / sum_i beta^i, and lr keeps its meaning. False: a_j = beta^j, Polyak's
             heavy ball while the window fills

    Keeps `window`, 16 bytes a draw of n updates for the whole run, where zokern.Momentum keeps 4 bytes a
    weight. A step makes n times the z of a step of SGD, in one pass over the weights. A skipped step adds
    nothing; on a GPU it takes a place with the weight 0. It goes with a dense z alone; for a low-rank one
    take zokern.Momentum, whose moments are small there.
    Raises ValueError for arguments out of range. Polyak 1964; arXiv 2605.00650, 2026 (the window)."""

    name, gated = "window_momentum", True

    def __init__(self, beta: float = 0.9, length: int = 10, average: bool = True) -> None:
        self.beta = within("beta", beta, 0.0, 1.0, "0 <= beta < 1")
        self.length, self.average = whole_number("length", length), flag("average", average)

    @property
    def gain(self) -> float:  # type: ignore[override]
        """sum_j a_j of a full window."""
        return math.fsum(self.shares(self.length))

    def shares(self, count: int) -> list[float]:
        """Returns a_j of the updates of a window, the oldest first."""
        powers = [self.beta**j for j in reversed(range(count))]
        whole = math.fsum(powers) if self.average else 1.0
        return [power / whole for power in powers]

    def move(self, plan: Plan, group: Group, window: Sequence[Past], weights: Weights) -> Tensor | int:
        shares = self.shares(len(window))
        amounts = [
            weights.lr * share * weight for share, past in zip(shares, window) for _, _, weight in past
        ]
        return _added(plan, group, _draws(window), amounts, weights)


class WindowAdam(_Window):
    """Moves every weight by Adam's quotient of the last n estimates, none of which is stored (AdaMeZO).

        theta <- decay theta + lr scale M / (sqrt(V) + eps)
        M = sum_j beta1^j g_j,   V = sum_j beta2^j g_j^2,   over the last n updates

    betas   (0.7, 0.9), each 0 <= beta < 1. The sums have neither a factor 1 - beta nor a bias correction,
            as published
    eps     1e-5, in units of g, loss per weight, outside the root
    length  n, updates that are remembered: 10
    scale   100, as published: a step moves every weight by about 55 lr
    warmup  True, as published: SGD, theta <- decay theta + lr g_0, until a window is full. False: the
            sums over what there is

    Keeps `window`, 16 bytes a draw of n updates for the whole run, where zokern.Adam keeps 8 bytes a
    weight. It takes 12 MB while it writes. A step makes n times the z of a step of SGD. A skipped step
    adds nothing; on a GPU it takes a place with the weight 0. It goes with a dense z alone.
    Raises ValueError for arguments out of range. AdaMeZO, arXiv 2605.00650, 2026."""

    name, gated = "window_adam", True

    def __init__(
        self,
        betas: tuple[float, float] = (0.7, 0.9),
        eps: float = 1e-5,
        length: int = 10,
        scale: float = 100.0,
        warmup: bool = True,
    ) -> None:
        self.betas, self.length = pair(betas), whole_number("length", length)
        self.eps = within("adam_eps", eps, SMALLEST, LARGEST, "a number above 0, finite in float32")
        self.scale, self.warmup = finite_number("scale", scale, above=0.0), flag("warmup", warmup)

    @property
    def lr(self) -> float:  # type: ignore[override]
        """Of an optimizer that is given none: a step is as long as Adam's."""
        return ONES / self.scale

    def scalars(self, lr: float, decay: float = 1.0) -> tuple[float, ...]:
        """The numbers of zokern.update_ with rule 'adam'."""
        beta1, beta2 = self.betas
        return decay, self.scale * lr, beta1, 1.0, beta2, 1.0, 0.0, 1.0, self.eps

    def move(self, plan: Plan, group: Group, window: Sequence[Past], weights: Weights) -> Tensor | int:
        lr, decay = weights.lr, weights.decay
        count: Tensor | int = 0
        if self.warmup and len(window) < self.length:
            amounts = [lr * weight for _, _, weight in window[-1]]
            return _added(plan, group, plan.draws(), amounts, weights)
        if not is_nothing([lr], decay):
            tables = self._tables(plan, group, window, lr, decay)
            for pieces in _pieces(group, plan.rounding == "residual"):
                count = count + _moved(plan, group, pieces, tables, weights.projected.control)
            announce(group.theta)
        return count

    def _tables(
        self, plan: Plan, group: Group, window: Sequence[Past], lr: float, decay: float
    ) -> list[Table]:
        """Returns what the verb is told of every update; of those before the last with lr 0."""
        found = []
        for past in window:
            numbers = self.scalars(lr, decay) if past is window[-1] else self.scalars(0.0)
            both = [_table(x, group) for x in ([w for _, _, w in past], numbers)]
            found.append((Noise(plan.direction, plan.seed, _draws([past])), both[0], both[1]))
        return found


def _table(numbers: Sequence[float | Tensor], group: Group) -> Tensor:
    """Returns numbers as float32 on the group's device."""
    device = group.theta[0].device
    if any(isinstance(number, Tensor) for number in numbers):
        return stacked(numbers, torch.empty(0, dtype=torch.float32, device=device))
    return upload(numbers, torch.float32, device)  # type: ignore[arg-type]


def _added(
    plan: Plan, group: Group, draws: list[tuple[int, int]], amounts: Sequence[Any], weights: Weights
) -> Tensor | int:
    """theta <- decay theta + sum_k amounts[k] z_k, in a step that is finite."""
    if any(isinstance(amount, Tensor) for amount in amounts):
        table = _table(amounts, group)
        control = weights.control(table)
        return group.axpy_(plan.noise(draws), table, 1.0, plan.rounding, control)
    if is_nothing(amounts, weights.decay):
        return 0
    return group.axpy_(plan.noise(draws), amounts, weights.decay, plan.rounding)


Table = tuple[Noise, Tensor, Tensor]  # draws, their weights, the scalars of the rule
Piece = tuple[Tensor, Span, Tensor | None]


def _pieces(group: Group, residual: bool) -> Iterator[list[Piece]]:
    """Yields parts of a group's tensors with their low bits, PIECE elements together; of a tensor with
    gaps some rows, one at least."""
    held: list[Piece] = []
    for i, theta in enumerate(group.theta):
        flat = theta.view(-1) if theta.is_contiguous() else theta
        bits = group.residuals[i] if residual and group.residuals is not None else None
        width = flat[0].numel() if flat.numel() else 1
        most = max(1, PIECE // width)
        for start in range(0, len(flat) if flat.numel() else 0, most):
            rows, span = flat[start : start + most], group.spans[i]
            if held and sum(t.numel() for t, *_ in held) + rows.numel() > PIECE:
                yield held
                held = []
            low = bits if bits is None or not bits.numel() else bits.view(flat.shape)[start : start + most]
            held.append((rows, span._replace(first=span.first + start * width), low))
    if held:
        yield held


def _moved(plan: Plan, group: Group, pieces: list[Piece], tables: Sequence[Table], control: Tensor) -> Tensor:
    """Runs the rule over the window, on moments from zero and zeros in the place of the weights, and last on
    the weights, where the step is finite."""
    tensors, spans, low = (
        [piece[0] for piece in pieces],
        [piece[1] for piece in pieces],
        [piece[2] for piece in pieces],
    )
    blanks, *moments = [
        [torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in tensors] for _ in range(3)
    ]
    for noise, weights, scalars in tables[:-1]:
        group.backend.update_(Batch(blanks, spans), noise, Update(weights, "adam", scalars, moments))
    noise, weights, scalars = tables[-1]
    real = Batch(tensors, spans, plan.rounding, low if low[0] is not None else None)  # type: ignore[arg-type]
    return group.backend.update_(real, noise, Update(weights, "adam", scalars, moments, control))


__all__ = ["WindowAdam", "WindowMomentum"]
