"""Attention of all sides in one call: the values of a call for each side, and torch's function afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zokern.evaluation import attention

SIDES, BATCH, HEADS, LENGTH, WIDTH = 3, 2, 4, 6, 8
CASES: dict[str, dict] = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask of a length": {"attn_mask": torch.tril(torch.ones(LENGTH, LENGTH, dtype=torch.bool))},
    "mask of the batch": {
        "attn_mask": torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1))
    },
    "scale": {"scale": 0.3},
    "grouped": {"enable_gqa": True},
}


def call(q: Tensor, case: str) -> Tensor:
    options = CASES[case]
    keys = q[..., :2, :, :] if options.get("enable_gqa") else q
    return F.scaled_dot_product_attention(q, keys * 1.1, keys + 0.1, **options)


def calls(monkeypatch) -> list[int]:
    """Counts how often torch's function runs."""
    made, right = [], attention._attention

    def counted(*args, **kwargs):
        made.append(1)
        return right(*args, **kwargs)

    monkeypatch.setattr(attention, "_attention", counted)
    return made


def check(case: str, monkeypatch, run: Callable[[Tensor], Tensor]) -> None:
    made = calls(monkeypatch)
    q = torch.randn(SIDES, BATCH, HEADS, LENGTH, WIDTH)
    right = torch.stack([call(side, case) for side in q])
    made.clear()
    assert torch.equal(run(q), right)
    assert len(made) == 1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_one_call_has_the_values_of_each(case: str, monkeypatch) -> None:
    before = F.scaled_dot_product_attention

    def run(q: Tensor) -> Tensor:
        with attention.folding():
            return torch.vmap(lambda side: call(side, case))(q)

    check(case, monkeypatch, run)
    assert F.scaled_dot_product_attention is before


@pytest.mark.parametrize(
    "mask", [None, torch.randn(LENGTH, LENGTH, generator=torch.Generator().manual_seed(1))]
)
def test_autocast_is_applied(mask: Tensor | None) -> None:
    """Under torch.vmap as outside of it: operands of several dtypes are multiplied in the autocast one."""
    q = torch.randn(SIDES, BATCH, HEADS, LENGTH, WIDTH)
    v = torch.randn(SIDES, BATCH, HEADS, LENGTH, WIDTH).bfloat16()

    def run(q: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.scaled_dot_product_attention(q, q, v, mask)

    with attention.folding():
        found = torch.vmap(run)(q, v)
    assert (
        torch.equal(found, torch.stack([run(*side) for side in zip(q, v)])) and found.dtype == torch.bfloat16
    )


def test_check_rejects_sides_that_share_keys(monkeypatch) -> None:
    """A wrong folding: every side attends to the first one's keys."""

    def run(q: Tensor) -> Tensor:
        return torch.stack([attention._attention(side, q[0] * 1.1, q[0] + 0.1) for side in q])

    with pytest.raises(AssertionError):
        check("plain", monkeypatch, run)


def test_the_function_is_back_after_an_exception() -> None:
    before = F.scaled_dot_product_attention
    with pytest.raises(KeyError), attention.folding():
        assert F.scaled_dot_product_attention is attention.folded
        raise KeyError
    assert F.scaled_dot_product_attention is before


def test_outside_of_vmap_it_is_torch() -> None:
    q = torch.randn(BATCH, HEADS, LENGTH, WIDTH)
    assert torch.equal(attention.folded(q, q, q), F.scaled_dot_product_attention(q, q, q))
