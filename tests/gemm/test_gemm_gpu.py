"""Which products a GPU's kernel computes: by rows, shapes and ranks, on tensors without values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zokern import backends
from zokern.backends import Sides, Span, Thin, Weight, reference, triton, triton_linear
from zokern.backends.validation import Validator
from zokern.gemm import fused, fuses


class Kernel(triton_linear.Products):
    """Stands for backend triton, which is off here."""

    name = "triton"


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def chosen(rows: int, m: int = 64, n: int = 48, dtype: torch.dtype = torch.bfloat16, **given) -> bool:
    """Whether two sides of so many rows each are the kernel's."""
    return fuses(Kernel(), [empty(rows, n, dtype=dtype)] * 2, empty(m, n, dtype=dtype), **given)


def test_few_rows_of_whole_units() -> None:
    assert chosen(1) and chosen(128) and not chosen(129)
    assert chosen(32, dtype=torch.float32) and not chosen(33, dtype=torch.float32)
    assert not chosen(1, n=44)  # rows of W do not begin with a unit
    assert chosen(1, rank=32) and not chosen(1, rank=33) and not chosen(1, rank=8, dtype=torch.float32)
    assert chosen(1, room=0)


def test_transposed() -> None:
    weight = empty(48, 64)
    assert fuses(Kernel(), [empty(3, 48)], weight, True) and not fuses(Kernel(), [empty(3, 64)], weight, True)
    assert not fuses(Kernel(), [empty(3, 48)], empty(48, 60), True)


def test_backend_cuda_multiplies_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    device, kernel = torch.device("cuda"), Kernel()

    class Cuda:
        name = "cuda"

    monkeypatch.setattr(backends, "get", lambda name: kernel)
    monkeypatch.setattr(backends, "why_off", lambda name: None)
    assert fused.own(Cuda(), device) is kernel  # type: ignore[arg-type]
    assert fused.own(kernel, device) is kernel  # type: ignore[arg-type]
    assert fused._own(Cuda(), torch.device("cpu")) is None  # type: ignore[arg-type]
    assert fused._own(reference.Reference(), device) is None
    monkeypatch.setattr(backends, "why_off", lambda name: "no Triton")
    assert fused._own(Cuda(), device) is None  # type: ignore[arg-type]


def test_parts_fill_a_device_within_the_room() -> None:
    """Columns are divided while programs are few, rows of x are few, and the sums of parts have room."""
    parts = triton_linear._parts_of
    assert parts([16, 16], 2048, 2048, None) == 8  # 256 columns each
    assert parts([128, 128], 2048, 2048, None) == 2  # 1024 columns each
    assert parts([16, 16], 1 << 17, 4096, None) == 1
    assert parts([16, 16], 2048, 2048, 4 * 32 * 2048 * 3) == 3 and parts([16, 16], 2048, 2048, 0) == 1
    for counts in ([1], [16, 16], [128, 128]):
        for m in (8, 64, 100, 2048, 1 << 16):
            most = Kernel().linear_bytes(counts)
            taken = parts(counts, m, 1 << 16, None)
            assert taken == 1 or 4 * taken * sum(counts) * m <= most
    assert Kernel().linear_bytes([16, 16], 1000) == 1000
    assert triton.Triton.linear is triton_linear.Products.linear


@pytest.fixture
def kernel() -> Kernel:
    found = Kernel()
    found.valid = Validator("triton", "cpu")
    return found


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(xs=[torch.zeros(3, 15)]), r"an x is .*\[3, 15\].*expected \[3, 16\]"),
        (dict(biases=[torch.zeros(9)]), r"a bias is .*\[9\].*expected \[8\]"),
        (
            dict(thins=[Thin([0], torch.zeros(2, 15), torch.zeros(1, 2, 2), torch.zeros(8, 2))]),
            "a first factor",
        ),
        (dict(thins=[Thin([0], torch.zeros(2, 16), torch.zeros(2, 2, 2), torch.zeros(8, 2))]), "middles"),
        (
            dict(thins=[Thin([0], torch.zeros(2, 16), torch.zeros(1, 2, 2), torch.zeros(7, 2))]),
            "a last factor",
        ),
        (dict(thins=[Thin([0], torch.zeros(33, 16), torch.zeros(1, 33, 2), torch.zeros(8, 2))]), "rank 33"),
        (dict(xs=[torch.zeros(3, 16).bfloat16()]), "xs"),
    ],
)
def test_wrong_operands_are_refused(kernel: Kernel, change: dict, complaint: str) -> None:
    sides = Sides([torch.zeros(3, 16)], [None])._replace(**change)
    with pytest.raises(ValueError, match=complaint):
        kernel.linear(Weight(torch.zeros(8, 16), Span(1)), sides)


@pytest.mark.parametrize("out", [torch.zeros(3, 7), torch.zeros(8, 3).t(), torch.zeros(3, 8).bfloat16()])
def test_wrong_outs_are_refused(kernel: Kernel, out: Tensor) -> None:
    with pytest.raises(ValueError, match=r"an out is .*expected contiguous torch.float32\[3, 8\]"):
        kernel.linear(
            Weight(torch.zeros(8, 16), Span(1)), Sides([torch.zeros(3, 16)], [None]), None, None, [out]
        )


def test_no_rows(kernel: Kernel) -> None:
    """Nothing is launched for sides without rows, or a W without rows."""
    (y,) = kernel.linear(Weight(torch.zeros(8, 16), Span(1)), Sides([torch.zeros(0, 16)], [None]))
    (z,) = kernel.linear(Weight(torch.zeros(0, 16), Span(1)), Sides([torch.zeros(3, 16)], [None]))
    assert y.shape == (0, 8) and z.shape == (3, 0)
