"""Underflow: whether rounding to 16 bits swallows a perturbation or an update, told from a sample of the
weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .backends import Batch, Noise
from .directions import Normal
from .group import Group
from .plan import Plan
from .warning import warn

SAMPLE = 512  # elements per tensor


def check_perturbation(plan: Plan, force: bool) -> None:
    """Refuse an eps below half an ulp of the 16-bit weights of a group; warn where a tenth of them stay where
    they are."""
    for group in plan.groups:
        if group.residuals is None and (members := _sampled(group)):
            _check_group(plan, group, members, force)


def _check_group(plan: Plan, group: Group, members: list[int], force: bool) -> None:
    share, factored = swallowed(plan, group, members), group.matrices is not None
    names = f"{group.names[members[0]]!r}" + (
        f" and {len(members) - 1} others of its group" if len(members) > 1 else ""
    )
    message = (
        f"eps = {group.eps} is below half an ulp for {share:.0%} of the 16-bit weights of {names}: "
        "their perturbation rounds to zero"
    )
    # products of a factored z are summed in float32, other uses are not
    if share > 0.5 and not force and not factored:
        raise ValueError(f"{message}: raise eps, train in float32, or pass force=True")
    if share > 0.1:
        warn(f"{message}: consider a larger eps or float32 weights")


def swallowed(plan: Plan, group: Group, members: list[int] | None = None) -> float:
    """Returns the share of a group's 16-bit weights that theta + eps z leaves as they are, from a sample; 0
    where it has none.

    members  positions of its 16-bit matrices; None: all of them"""
    members = _sampled(group) if members is None else members
    if not members or group.residuals is not None:
        return 0.0
    tensors = [heads(group.theta[i]).contiguous() for i in members]
    outs = [torch.empty_like(tensor) for tensor in tensors]
    spans = [group.spans[i]._replace(pitch=None) for i in members]  # the sample is flat
    factors = [group.scale(i) for i in members]
    scales = [None if given is None else heads(given).contiguous() for given in factors]
    # a factored z is not drawn yet: normals of the root mean square of its elements stand for it
    factored = group.matrices is not None
    scale = group.eps * (plan.factored.spread(group.matrices[members[0]]) if factored else 1.0)  # type: ignore[union-attr,index]
    direction = Normal() if factored else plan.direction
    batch = Batch(tensors, spans, scales=None if group.scales is None else scales)
    group.backend.perturb(batch, Noise(direction, plan.seed, [(plan.step, 0)]), [scale], [outs])
    sizes = [group.theta[i].numel() for i in members]
    same = [moving(out == tensor, given) for tensor, out, given in zip(tensors, outs, factors)]
    return sum(float(one.double().mean()) * size for one, size in zip(same, sizes)) / sum(sizes)


Share = tuple[Tensor, Callable[[float], str | None]]  # 0-d, on a device, and what is said of its value


def watch_update(plan: Plan) -> Callable[[], Share] | None:
    """Before the update: a function that tells, after it, which share of sampled 16-bit weights did not
    move."""
    if plan.rounding != "nearest" or (plan.step >= 10 and plan.step % 100) or plan.tape is not None:
        return None
    dense = [group for group in plan.groups if group.matrices is None]
    before = [(t, heads(t).clone(), factors) for group in dense for t, factors in (
        (group.theta[i], group.scale(i)) for i in _sampled(group))]  # fmt: skip
    if not before or not any(float(group.options["lr"]) for group in plan.groups):
        return None

    def after() -> Share:
        same = [moving(heads(now) == old, factors) for now, old, factors in before]
        device = same[0].device
        still = torch.stack([one.sum().to(device) for one in same]).sum()
        return still / sum(one.numel() for one in same), partial(_dead, plan.step)

    return after


def _dead(step: int, share: float) -> str | None:
    """Returns what is said of the weights that a first update left where they were."""
    if share <= 0.5 or step:
        return None
    return (
        f"rounding to nearest left {share:.0%} of the 16-bit weights where they were: the update is "
        "below half an ulp; use rounding='stochastic' or rounding='residual'"
    )


def _sampled(group: Group) -> list[int]:
    """Returns the positions of the 16-bit weights that are sampled: matrices."""
    return [i for i, t in enumerate(group.theta) if t.dtype != torch.float32 and t.dim() > 1 and t.numel()]


def moving(same: Tensor, factors: Tensor | None) -> Tensor:
    """Of a comparison of heads(): what belongs to elements whose z is not 0, or one False where there are
    none."""
    some = same if factors is None else same[heads(factors) != 0]
    return some if some.numel() else torch.zeros(1, dtype=torch.bool, device=same.device)


def heads(tensor: Tensor) -> Tensor:
    """The first SAMPLE elements, row-major, as a vector: a view, or of a tensor with gaps a copy of no more
    than a few rows."""
    part = tensor.detach() if tensor.dim() else tensor.detach().view(1)
    while part.dim() > 1 and part[0].numel() >= SAMPLE:
        part = part[0]
    rows = -(-SAMPLE // max(1, part[0].numel())) if part.dim() > 1 else SAMPLE
    return part[:rows].reshape(-1)[:SAMPLE]


__all__ = ["check_perturbation", "heads", "moving", "swallowed", "watch_update"]
