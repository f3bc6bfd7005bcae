"""Substitution: while the closure runs, every use of a trained parameter sees a perturbed copy instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from .copies import Copies
from .uses import CONVERSIONS, DATA_ATTRIBUTES, EXPORTS, FRESH, HANDLERS, METADATA, NORMS, PRODUCTS, VIEWS, writes


class Substitution(TorchFunctionMode):
    """Looks at every call into torch and puts copies in the place of trained parameters."""

    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self.copies = copies

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        table = self.copies.table
        for value in args:
            if id(value) in table or (type(value) in (list, tuple) and any(id(v) in table for v in value)):
                break
        else:
            if not kwargs or not any(
                id(v) in table or (type(v) in (list, tuple) and any(id(u) in table for u in v)) for v in kwargs.values()
            ):
                if self.copies.views:
                    return self._on_view(func, args, kwargs)
                return func(*args, **kwargs)
        return self._substitute(func, args, kwargs)

    def _substitute(self, func, args: tuple, kwargs: dict[str, Any]):
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__"):
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if name != "__get__" and attribute in ("data", "real", "imag"):
                self.copies.refuse_write(args[0], f"{attribute} = ...")
            if attribute not in DATA_ATTRIBUTES:
                return func(*args, **kwargs)
        elif name in METADATA:
            return func(*args, **kwargs)
        if self.copies.plan.stale:
            self.copies.refuse_stale([*args, *kwargs.values()])
        for target in _written(name, args, kwargs):
            if id(target) in self.copies.table:
                self.copies.refuse_write(target, name)
        handler = HANDLERS.get(func)
        taped = is_taped(self.copies.table, args, kwargs)
        try:
            if handler is not None and not taped and (result := handler(self.copies, func, args, kwargs)) is not NotImplemented:
                return result
            # the result of a fresh function cannot alias its arguments, so the copies may lie in the arena, where no tape keeps them
            keep = func in FRESH and not taped
            cast = self._upcast(func, args, kwargs)
            others = cast is not None and not self._mixes(func, args, kwargs)  # whether they are widened too
            swapped = tuple([self._swap(a, keep, cast, others) for a in args])
            result = func(*swapped, **{k: self._swap(v, keep, cast, others) for k, v in kwargs.items()})
        finally:
            self.copies.release()
        if cast is not None and isinstance(result, Tensor) and result.is_floating_point():
            return result.clone() if any(result is s for s in swapped) else result.to(cast)
        if func not in FRESH and (name in VIEWS or name == "__get__" or any(result is s for s in swapped)):
            self._watch(result)
        return result

    def _watch(self, result: Any) -> None:
        """A view, or the pieces of a split."""
        for view in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(view, Tensor):
                self.copies.watch(view)

    def _swap(self, value, keep: bool, cast: torch.dtype | None, others: bool):
        if id(value) in self.copies.table:
            return self.copies.copy(value, keep, cast)
        if type(value) in (list, tuple) and any(id(v) in self.copies.table for v in value):
            return type(value)(self._swap(v, keep, cast, others) for v in value)
        if others and cast is not None and cast.itemsize < 4 and isinstance(value, Tensor) and value.dtype == cast:
            return value.float()
        return value

    def _upcast(self, func, args: tuple, kwargs: dict) -> torch.dtype | None:
        """The dtype of the result, where a norm, an elementwise product or a conversion is done in float32 for its small weight's sake."""
        if func not in NORMS and func not in PRODUCTS and func not in CONVERSIONS:
            return None
        values = [*args, *kwargs.values()]
        if not any(map(self._is_wide, values)):
            return None
        if func in CONVERSIONS:
            like = func(args[0].new_empty(0), *args[1:], **kwargs)
            return like.dtype if isinstance(like, Tensor) and like.dtype.itemsize > 2 and like.is_floating_point() else None
        kinds = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}
        if len(kinds) > 1 and func in PRODUCTS and len(args) == 2:
            return torch.result_type(*args)
        return kinds.pop() if len(kinds) == 1 else None

    def _is_wide(self, value: Any) -> bool:
        """Whether this is a small 16-bit parameter, whose copy is float32."""
        key = self.copies.table.get(id(value))
        copy = None if key is None else self.copies.resident[self.copies.side].get(key)
        return copy is not None and copy.dtype != value.dtype

    def _mixes(self, func, args: tuple, kwargs: dict) -> bool:
        """Whether torch itself does this in float32 and rounds once: a layer norm of 16 bits with float32 vectors, on the CPU."""
        if func is not F.layer_norm and func is not torch.layer_norm:
            return False
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        return tensors[0].is_cpu and all(map(self._is_wide, tensors[1:]))

    def _on_view(self, func, args: tuple, kwargs: dict[str, Any]):
        """A call while there are views of copies: views of those are watched too, writes to them are refused."""
        name = getattr(func, "__name__", "")
        if any(map(self._is_view, _written(name, args, kwargs))):
            raise RuntimeError(
                f"the closure writes to a view of a trained parameter ({name}): the loss of a step must only read the weights; "
                "the step was abandoned and no weight has changed"
            )
        if not args or not self._is_view(args[0]):
            return func(*args, **kwargs)
        if name in EXPORTS:
            return func(args[0].clone(), *args[1:], **kwargs)
        if name == "__iter__":
            rows = args[0].unbind(0)
            self._watch(rows)
            return iter(rows)
        result = func(*args, **kwargs)
        if name in VIEWS or name == "__get__":
            self._watch(result)
        return result

    def _is_view(self, value: Any) -> bool:
        reference = self.copies.views.get(id(value))
        return reference is not None and reference() is value


def is_taped(table: dict[int, tuple[int, int]], args: Sequence, kwargs: dict[str, Any]) -> bool:
    """Whether autograd follows the call for something else than trained parameters: a closure that differentiates by its inputs."""
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if not torch.is_grad_enabled():
        return False
    values = [v for value in (*args, *kwargs.values()) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return any(isinstance(v, Tensor) and v.requires_grad and id(v) not in table for v in values)


def _written(name: str, args: tuple, kwargs: dict[str, Any]) -> list:
    """What a call writes to: out=, and the first argument of an in-place function, whatever it is called and also as a list."""
    targets = [kwargs.get("out")]
    if writes(name):
        targets += [*args[:1], *(kwargs.get(key) for key in ("tensor", "input", "self"))]
    return [t for target in targets if target is not None for t in (target if isinstance(target, (list, tuple)) else [target])]
