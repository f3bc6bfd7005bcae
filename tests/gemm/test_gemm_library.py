"""The CPU's choice of a product: the same numbers to rounding,
and torch's own wherever another would be wrong."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from zokern.gemm import library

pytestmark = pytest.mark.skipif(
    not library._has("_linear_pointwise"), reason="this torch has no oneDNN product"
)


@pytest.fixture
def every_way():
    """The choice of a processor of another maker, without 16-bit instructions, wherever the suite runs."""
    with (
        patch.object(library, "has_onednn", lambda: True),
        patch.object(library, "has_half", lambda dtype: False),
    ):
        yield


def case(rows: int, m: int, k: int, dtype: torch.dtype, transposed: bool, bias: bool):
    generator = torch.Generator().manual_seed(rows * 7919 + m + k)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    weight = draw(k, m).t() if transposed else draw(m, k)
    return draw(2, rows, k), weight, draw(m) if bias else None


# 1: one rounding of the exact sum; the sum of 1024 products itself is a fifth of that off, at most
LIMIT = 1.25


def error(found: torch.Tensor, x, weight, bias) -> float:
    """Largest error in units of the rounding of a sum of k products, and of the result's dtype."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    unit = size * 2.0**-21 + exact.abs() * (
        torch.finfo(found.dtype).eps / 2 if found.dtype != torch.float32 else 0.0
    )
    return float(((found.double() - exact).abs() / unit).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, m, k", [(1, 5, 3), (4, 769, 257), (64, 33, 768), (128, 1025, 1024)])
@pytest.mark.parametrize("transposed, bias", [(False, True), (True, False)])
def test_equal_to_rounding(every_way, dtype, rows, m, k, transposed, bias) -> None:
    x, weight, b = case(rows, m, k, dtype, transposed, bias)
    found = library.linear(x, weight, b)
    assert found.shape == (2, rows, m) and found.dtype == dtype
    assert error(found, x, weight, b) < LIMIT


WRONG = {
    "rounded_factors": lambda x, w, b: library._widened(x, w.to(torch.float8_e4m3fn).to(w.dtype), b),
    "bias_in_the_first_block": lambda x, w, b: F.linear(
        x, w, torch.cat([b[:256], torch.zeros_like(b[256:])])
    ),
    "rounded_twice": lambda x, w, b: F.linear(x.float(), w.float()).to(x.dtype) + b,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_product_is_rejected(every_way, name: str) -> None:
    x, weight, b = case(64, 1025, 512, torch.bfloat16, False, True)
    assert error(WRONG[name](x, weight, b), x, weight, b) > LIMIT


def test_blocks_cover_the_matrix(every_way) -> None:
    """More than one block of rows, the last one short, and the choice really taken."""
    x, weight, b = case(16, 700, 1024, torch.bfloat16, False, True)
    assert weight.numel() > 2 * library.BLOCK and library.chooses(x, weight)
    with patch.object(library, "BLOCK", 1 << 30):
        whole = library.linear(x, weight, b)
    assert torch.allclose(library.linear(x, weight, b).float(), whole.float(), rtol=2**-7, atol=1e-3)


def test_left_to_torch(every_way) -> None:
    x, weight, _ = case(4, 8, 6, torch.float32, False, False)
    assert library.chooses(x, weight)
    assert not library.chooses(x.double(), weight.double())
    assert not library.chooses(x.expand(200, 2, 4, 6), weight)  # many rows
    assert not library.chooses(x[:, :0], weight) and not library.chooses(x[0, 0], weight)
    assert not library.chooses(x[..., :5], weight)  # shapes that do not fit: torch raises
    with pytest.raises(RuntimeError, match="shape"):
        library.linear(x[..., :5], weight)
    with torch.autocast("cpu"):
        assert not library.chooses(x, weight)
    assert not library.chooses(x.clone().requires_grad_(), weight)  # oneDNN's product has no derivative
    small = x.bfloat16()
    assert library.chooses(small, weight.bfloat16()) and not library.chooses(small[:, :1], weight.bfloat16())
    grown = x.clone().requires_grad_()
    library.linear(grown, weight).sum().backward()
    assert grown.grad is not None


def test_the_choice_is_the_processor_s(monkeypatch) -> None:
    for maker, mkl, expected in (
        ("AuthenticAMD", True, True),
        ("GenuineIntel", True, False),
        ("", True, False),
        ("AuthenticAMD", False, False),
    ):
        monkeypatch.setattr(library, "maker", lambda maker=maker: maker)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda mkl=mkl: mkl)
        assert library.has_onednn.__wrapped__() is expected
