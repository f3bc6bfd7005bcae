"""Numbers of a step in device memory: the weights of an estimate's draws, and amounts of a point."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property, lru_cache

import torch
from torch import Tensor

from .backends import Projected


class Weights(Sequence[float]):
    """The weights w_k of an estimate's draws: the descent direction is sum_k w_k z_k.

    They lie on the tensors' device, as project() made them. A rule that takes `projected` reads nothing. One
    that takes them as numbers, by index or in a loop, waits for the device once.

    projected  see Projected
    lr, decay  with which its amounts and its control were made"""

    def __init__(self, projected: Projected, lr: float, decay: float) -> None:
        self.projected, self.lr, self.decay = projected, lr, decay

    @classmethod
    def of(cls, values: Sequence[float], lr: float, decay: float, device: torch.device) -> Weights:
        """Returns weights with the amounts and the control of an lr and a decay; nothing is read."""
        if isinstance(values, Weights) and (values.lr, values.decay) == (lr, decay):
            return values
        known = values.projected if isinstance(values, Weights) else None
        weights = (
            torch.tensor([*values], dtype=torch.float64, device=device) if known is None else known.weights
        )
        numbers = torch.cat([weights.new_full((1,), decay), weights * lr]).float()
        finite = torch.isfinite(numbers).all()
        if known is not None:
            finite = finite & (known.control[2] == 1.0)
        unmoved = torch.zeros_like(numbers)
        unmoved[0] = 1.0
        numbers = torch.where(finite, numbers, unmoved)
        control = torch.stack([numbers[0], (numbers != unmoved).any().float(), finite.float()])
        return cls(Projected(weights, weights, numbers[1:], control), lr, decay)

    @property
    def moves_nothing(self) -> bool:
        """Whether the host knows that nothing moves: lr is 0, and there is no weight decay."""
        return self.lr == 0.0 and self.decay == 1.0

    @property
    def is_finite(self) -> bool:
        """Whether the numbers of the step are finite in float32. The host waits for them."""
        return bool(self.projected.control[2] == 1.0)

    @cached_property
    def rounded(self) -> Tensor:
        """The weights as float32 [K]: what kernels and small spaces multiply draws by."""
        return self.projected.weights.float()

    @cached_property
    def moves(self) -> Tensor:
        """The control of a rule whose weights move where all coefficients are 0, by its moments: go is
        finite."""
        decay, _, finite = self.projected.control.unbind(0)
        return torch.stack((decay, finite, finite))

    def only(self, finite: Tensor) -> Weights:
        """Returns the same weights, which move nothing where `finite` is false, as of a skipped step."""
        weights, amounts, control = self.projected.weights, self.projected.amounts, self.projected.control
        unmoved = torch.zeros_like(control)
        unmoved[0] = 1.0
        projected = Projected(
            self.projected.coefficients,
            torch.where(finite, weights, 0.0),
            torch.where(finite, amounts, 0.0),
            torch.where(finite, control, unmoved),
        )
        return Weights(projected, self.lr, self.decay)

    def where(self, finite: float, skipped: float) -> Tensor:
        """Returns one of two numbers, float64 []: the first, or the second in a step that is not finite."""
        one, other = constant((finite, skipped), torch.float64, self.projected.control.device).unbind(0)
        return torch.where(self.projected.control[2] == 1.0, one, other)

    def control(self, amounts: Tensor) -> Tensor:
        """Returns the control of a launch that adds other amounts than those of the weights, float32."""
        decay, _, finite = self.projected.control.unbind(0)
        return torch.stack((decay, finite * ((decay != 1.0) | (amounts != 0.0).any()), finite))

    def kept(self, decay: float) -> float:
        """Returns the decay of weights with deferred updates: 1 in a step that is not finite.

        Deferred updates decay on the host, so a decay of other than 1 waits for the device."""
        return decay if decay == 1.0 or self.is_finite else 1.0

    def gate(self, moves: Sequence[Tensor]) -> list[Tensor]:
        """Returns moves in a small space, 0 in a step that is not finite."""
        return list(torch._foreach_mul(list(moves), self.projected.control[2]))

    @cached_property
    def values(self) -> list[float]:
        """The weights as numbers of the host."""
        return self.projected.weights.tolist()

    def __len__(self) -> int:
        return self.projected.weights.shape[0]

    def __getitem__(self, index):
        return self.values[index]


class Amount:
    """A number of a point that lies in device memory, float64 []. It is equal to itself alone: nothing is
    read."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __mul__(self, other: float) -> Amount:
        return Amount(self.value * other)

    def __add__(self, other: float | Amount) -> Amount:
        return Amount(self.value + (other.value if isinstance(other, Amount) else other))

    def __sub__(self, other: float | Amount) -> Amount:
        return self + other * -1.0

    def __rsub__(self, other: float) -> Amount:
        return self * -1.0 + other

    __radd__ = __add__

    def __repr__(self) -> str:
        """The number, which ranks compare: it waits for the device."""
        return repr(float(self.value))


def scalar(amount: float | Amount) -> float | Tensor:
    """Returns what tensors are multiplied by: a number of the host, or float32 [] in device memory."""
    return amount.value.float() if isinstance(amount, Amount) else amount


def stacked(numbers: Sequence[float | Tensor], like: Tensor) -> Tensor:
    """Returns numbers of the host and of device memory as one vector of the kind of `like`; none is read."""
    each = [n.to(like) if isinstance(n, Tensor) else like.new_full((), n) for n in numbers]
    return torch.stack(each)


def upload(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns numbers of the host as a vector on a device. It waits for nothing.

    Raises RuntimeError while a CUDA graph is captured: each replay would read what the host has then."""
    host = torch.tensor(values, dtype=dtype, device="cpu")
    if device.type != "cuda":
        return host.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"numbers of the host, {tuple(values)!r:.80}, would be uploaded in a capture")
    return host.pin_memory().to(device, non_blocking=True)


@cache
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns numbers that never change as a vector on a device, uploaded once, kept, and only read."""
    return upload(values, dtype, device)


@lru_cache(maxsize=64)
def cached_upload(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns numbers that seldom change, as an lr: what was uploaded cached_upload is found again.

    The result is only read."""
    return upload(values, dtype, device)


def on_device(weights: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Returns weights as float32 [K] on a device, and the control of those that project() made."""
    if isinstance(weights, Weights):
        return weights.rounded, weights.projected.control
    return cached_upload(tuple(weights), torch.float32, device), None


__all__ = ["Amount", "Weights", "constant", "cached_upload", "on_device", "scalar", "stacked", "upload"]
