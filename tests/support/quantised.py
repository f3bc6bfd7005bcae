"""Frozen bases of int8 numbers and scales, as quantisation libraries hold them, under trained adapters.

    Wrapped    a wrapper without memory of its own around two tensors, as torchao's weights
    Answering  a class that answers every torch function with the value that it stands for
    Moved      a layer that takes the scales from its weight in its first forward, as bitsandbytes' of 8 bits
    Repacked   a layer that packs its weight in its first forward, as bitsandbytes' of 4 bits on a CPU
    Buffered   a layer whose numbers are buffers, as those of GPTQ

Each stands for the same plain weight, so that a hand-written loop over plain tensors says what is right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import zokern
from zokern.modules import inside_of

aten = torch.ops.aten
COPIES = (aten.clone.default, aten._to_copy.default, aten.copy_.default)
WIDTH, RANK = 16, 2


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 numbers and a float32 scale for each row."""
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return (weight.detach() / scale).round().to(torch.int8), scale


class Wrapped(Tensor):
    numbers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers: Tensor, scale: Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    def __deepcopy__(self, memo):
        made = type(self)(self.numbers.clone(), self.scale.clone())
        return nn.Parameter(made, requires_grad=False)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        if func in COPIES:
            raise AssertionError("a frozen base was copied")
        args, kwargs = tree_map(
            lambda a: a.numbers * a.scale if isinstance(a, cls) else a, (args, kwargs or {})
        )
        return func(*args, **kwargs)


class Answering(Tensor):
    scale: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor):
        made = torch.Tensor._make_subclass(cls, numbers, False)
        made.scale = scale
        return made

    def __deepcopy__(self, memo):
        with torch._C.DisableTorchFunctionSubclass():
            made = type(self)(self.as_subclass(Tensor).clone(), self.scale.clone())
        return nn.Parameter(made, requires_grad=False)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.detach:
                return cls(args[0].as_subclass(Tensor), args[0].scale)
            if getattr(func, "__name__", "") not in ("requires_grad_", "__get__", "__set__"):
                args, kwargs = tree_map(
                    lambda a: a.as_subclass(Tensor) * a.scale if isinstance(a, cls) else a,
                    (args, kwargs or {}),
                )
            return func(*args, **(kwargs or {}))


class Packed(nn.Parameter):
    """A parameter with attributes, of which the memory alone is not the weight."""

    scale: Tensor | None

    def __new__(cls, numbers: Tensor, scale: Tensor | None):
        made = torch.Tensor._make_subclass(cls, numbers, False)
        made.scale = scale
        return made

    def __deepcopy__(self, memo):
        return type(self)(self.data.clone(), copy.deepcopy(self.scale))


class Held:
    """What a layer keeps beside its weight."""

    scale: Tensor | None = None
    is_packed = False


class Moved(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.state = Packed(*quantise(weight)), Held()

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.scale is not None:
            self.state.scale, self.weight.scale = self.weight.scale, None
        scale = 1.0 if self.state.scale is None else self.state.scale
        return F.linear(x, self.weight.data * scale)


class Repacked(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.state = Packed(*quantise(weight)), Held()

    def forward(self, x: Tensor) -> Tensor:
        if not self.state.is_packed:
            self.flip(True)
        return F.linear(x, self.weight.data.flip(1) * self.weight.scale)

    def flip(self, packed: bool) -> None:
        """Gives the weight the other layout; False: as a checkpoint does."""
        self.weight.data, self.state.is_packed = self.weight.data.flip(1), packed


class Buffered(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        for name, value in zip(("numbers", "scale"), quantise(weight)):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.numbers * self.scale)


class Drifting(nn.Module):
    """A wrong base: every forward writes to the numbers inside its weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(Wrapped(*quantise(weight)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.numbers.neg_()
        return F.linear(x, self.weight.numbers * self.weight.scale)


def with_weight(kind: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], nn.Module]:
    def make(weight: Tensor) -> nn.Module:
        layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        layer.weight = nn.Parameter(kind(*quantise(weight)), requires_grad=False)
        return layer

    return make


def plain(weight: Tensor) -> nn.Module:
    """The layer that all others stand for."""
    layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    numbers, scale = quantise(weight)
    layer.weight = nn.Parameter(numbers * scale, requires_grad=False)
    return layer


KINDS: dict[str, Callable[[Tensor], nn.Module]] = {
    "wrapped": with_weight(Wrapped), "answering": with_weight(Answering), "moved": Moved,
    "repacked": Repacked, "buffered": Buffered,
}  # fmt: skip


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter beside it."""

    def __init__(self, make: Callable[[Tensor], nn.Module]) -> None:
        super().__init__()
        self.base = make(nn.Linear(WIDTH, WIDTH, bias=False).weight)
        self.down, self.up = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def model_of(make: Callable[[Tensor], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        return nn.Sequential(Adapted(make), nn.Tanh(), Adapted(make))


def bits(model: nn.Module) -> list[Tensor]:
    """Copies of the memory of all that is frozen, parts of wrappers among them."""
    frozen = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    with torch._C.DisableTorchFunctionSubclass():
        parts = [part.as_subclass(Tensor) for t in frozen for part in inside_of(t)]
        return [part.contiguous().view(torch.uint8).clone() for part in parts]


def by_hand(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], step: int, lr: float, eps: float, seed: int
):
    """A step of MeZO without zokern's: losses under functional_call with perturbed clones, then the update.

    Returns (loss at + eps z, loss at - eps z)."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    z = {name: zokern.draw("normal", p.shape, seed=seed, who=name, step=step) for name, p in trained.items()}

    def read(a: float) -> float:
        with torch.no_grad():
            moved = {
                name: torch.add(p.double(), z[name].double(), alpha=a).float() for name, p in trained.items()
            }
            return float(loss(lambda *args, **kw: torch.func.functional_call(model, moved, args, kw)))

    up, down = read(eps), read(-eps)
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(p.double() - lr * (up - down) / (2 * eps) * z[name].double())
    return up, down
