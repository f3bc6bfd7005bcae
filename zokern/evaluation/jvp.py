"""Evaluation ``jvp``: the derivative of the loss along z, in forward mode, beside the loss of theta.

    slope_k = <gradient, z_k> = d/dt L(theta + t z_k) at t = 0

Every trained parameter is a dual number while a loss is read: its value is theta, its tangent is z. torch's
forward mode carries both through the model, and an activation is freed with its tangent where the next one is
made. Nothing is stored for a backward pass.

The derivative is autograd's: what stops a gradient (detach(), .data, .item()) stops a tangent. Fused
attention has no forward mode, so F.scaled_dot_product_attention takes its unfused form. An operation without
a forward formula is refused by name.

Memory: z of every trained parameter in the parameter's dtype, while a slope is read; attention scores, which
fused kernels do not keep. In 16 bits z is rounded to nearest on its way to the tangent, and the update uses
it in float32.

Baydin et al. 2022, "Gradients without Backpropagation" (arXiv 2202.08587).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..backends import Batch, Outer
from ..group import Group, ends_of
from ..plan import Plan
from .base import THETA, WAY_OUT, Record, Refused
from .isolation import Isolation
from .loss import loss_tensor
from .master import Master

ALONE = f"a method that reads losses alone needs no derivative: with zokern.MeZO, {WAY_OUT}"
INSTEAD = (
    "load the model with attn_implementation='eager' where it is attention, with "
    f"experts_implementation='eager' where it is experts, or give an autograd.Function a jvp(); {ALONE}"
)


class Jvp(Master):
    """Reads the derivative of the loss along z in forward mode; losses at other points are read as
    zokern.Master reads them.

        slope_k = <gradient, z_k>,   in units of loss per weight

    rounding  of perturbed 16-bit weights, where losses are read as by zokern.Master: 'nearest' or
              'stochastic'

    It takes z of every trained parameter in the parameter's dtype, and a tangent beside each activation
    that is alive. Nothing is kept for a backward pass.
    Raises ValueError for another rounding. A step raises zokern.Refused for an operation without a
    forward formula, and for a loss without a derivative. Baydin et al. 2022 (arXiv 2202.08587)."""

    name = "jvp"

    def slopes(
        self, plan: Plan, words: Sequence[int], closure: Callable[[], object]
    ) -> tuple[Tensor, Tensor]:
        """Returns the losses of theta and the slopes along z of the draw words; see Differentiates.slopes."""
        if plan.sharded:
            raise Refused(
                "evaluation 'jvp' sets tangents of whole parameters, and here some are sharded (DTensor): "
                "use what reads losses alone, zokern.Spsa() or zokern.tune(evaluation=zokern.Master()), or "
                "leave the model unsharded"
            )
        isolation, self.held = Isolation(plan), 0
        deferred = self.holding(plan, [THETA]) if plan.deferred else nullcontext(lambda side: False)
        with isolation.session(eager=True), deferred as move:
            if move(0):
                isolation.weights.written()
            found = [
                isolation.run(lambda: _dual_loss(closure), self._along(plan, word, isolation))
                for word in words
            ]
        self.record = Record(self.name, scratch_bytes=self.held)
        losses, slopes = torch.stack(found).unbind(1)
        return losses, slopes

    @contextmanager
    def _along(self, plan: Plan, word: int, isolation: Isolation) -> Iterator[None]:
        """Inside, the tangent of every trained parameter is its z."""
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            held = 0
            for group in plan.groups:
                tangents = [_tangent(t, objects) for t, objects in zip(group.theta, group.objects)]
                _fill(plan, group, word, tangents)
                for tangent, (_, *aliases) in zip(tangents, group.objects):
                    for alias in aliases:
                        _attached(alias, alias.detach(), tangent)
                held += sum(t.nbytes * len(objects) for t, objects in zip(tangents, group.objects))
            self.held = max(self.held, held)
            isolation.weights.written()
            isolation.weights.watch()
            with _Watch():
                yield


def _attached(parameter: Tensor, value: Tensor, tangent: Tensor) -> Tensor:
    """Makes a parameter a dual number of its own value. Returns the memory of its tangent, a copy."""
    parameter.copy_(forward_ad.make_dual(value, tangent))
    return forward_ad.unpack_dual(parameter).tangent


def _tangent(theta: Tensor, objects: Sequence[Tensor]) -> Tensor:
    """Returns zeros that are the tangent of a parameter, with its strides."""
    return _attached(
        objects[0], theta, torch.zeros((), dtype=theta.dtype, device=theta.device).expand_as(theta)
    )


def _fill(plan: Plan, group: Group, word: int, tangents: Sequence[Tensor]) -> None:
    """tangents <- z of a group, in one launch."""
    if group.matrices is None:
        outs = [
            t if t.is_contiguous() else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tangents
        ]
        batch = Batch(outs, group.spans, scales=group.scales)
        group.backend.draw(batch, plan.noise([plan.named(word)]))
        for tangent, out in zip(tangents, outs):
            if tangent is not out:
                tangent.copy_(out)
        return
    lefts, rights = zip(*ends_of(group.matrices, group.draws(plan, word), group.backend))
    noise = plan.noise([plan.named(word)], None)
    group.backend.lowrank_(Batch(tangents, group.spans), Outer(lefts, rights, [1.0] * len(lefts)), noise)


def _dual_loss(closure: Callable[[], object]) -> Tensor:
    """Returns (loss, slope), float64 [2]. Raises Refused where forward mode cannot follow the closure."""
    try:
        value, slope = forward_ad.unpack_dual(loss_tensor(closure()))
    except (RuntimeError, NotImplementedError) as problem:
        said = str(problem)
        if isinstance(problem, Refused) or not any(
            words in said for words in ("forward AD", "forward mode", "jvp")
        ):
            raise
        raise Refused(
            f"forward mode cannot follow the closure ({said.splitlines()[0]}): {INSTEAD}"
        ) from problem
    if slope is None:
        raise Refused(
            "the loss has no derivative by a trained parameter: the closure returned a Python number, an "
            "integer or a detached tensor, runs another model, or the step stands in torch.inference_mode(); "
            f"return the loss as a tensor. {ALONE}"
        )
    return torch.stack([value, slope])


class _Watch(TorchFunctionMode):
    """Raises Refused at operators of other libraries that drop tangents: torch says nothing of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if getattr(func, "namespace", "aten") not in ("aten", "prim", "prims") and _is_dual((args, kwargs)):
            if any(t.is_floating_point() for t in _tensors(found)) and not _is_dual(found):
                raise Refused(
                    f"forward mode cannot follow the closure (operator {func} drops the derivative): "
                    f"{INSTEAD}"
                )
        return found


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _is_dual(values: Any) -> bool:
    return any(
        forward_ad.unpack_dual(value).tangent is not None
        for value in _tensors(values)
        if value.is_floating_point()
    )


__all__ = ["Jvp"]
