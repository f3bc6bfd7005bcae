"""The lr of parameters that are not matrices, in methods whose matrices move by steps of another length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutant import replaced
from torch import Tensor, nn

import zokern
from zokern.rule import Rule

pytestmark = pytest.mark.usefixtures("one_thread")

LR, DENSE = 1e-2, 1e-5
MADE: dict[str, Callable[..., Any]] = {
    "ZOMuon": zokern.ZOMuon,
    "ZOMOPI": lambda *of, **options: zokern.ZOMOPI(*of, leading=2, **options),
    "SubZeroPlus": zokern.SubZeroPlus,
}


def moves(name: str, groups: Callable[[dict[str, nn.Parameter]], Any], **options: Any) -> dict[str, Tensor]:
    """Returns how far two matrices and two vectors move in two steps."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"w": (8, 6), "b": (8,), "v": (6, 7), "c": (7,)}
    params = {n: nn.Parameter(torch.randn(shape, generator=generator)) for n, shape in shapes.items()}
    start = {n: p.detach().clone() for n, p in params.items()}
    given = {"lr": LR, "dense_lr": DENSE, "rank": 4, "queries": 3, "norm": "unit", "evaluation": "master"}
    optimizer = MADE[name](groups(params), **{**given, **options})
    for _ in range(2):
        zokern.step(optimizer, lambda: torch.stack([p.double().sin().sum() for p in params.values()]).sum())
    optimizer.flush()
    return {n: p.detach() - start[n] for n, p in params.items()}


def check_lrs(name: str) -> None:
    """Of a group of vectors its own lr, else dense_lr; in proportion where matrices are in the group too."""

    def told(found: dict[str, Tensor], n: str, times: float) -> None:
        ratio = float(found[n].norm() / alone[n].norm())
        assert abs(ratio - times) < 2e-2 * times, f"{n} moves {ratio} times as far, not {times}"

    alone = moves(name, lambda p: [*p.items()])
    split = moves(
        name,
        lambda p: [
            {"params": [("w", p["w"]), ("v", p["v"])]},
            {"params": [("b", p["b"])], "lr": 3 * DENSE},
            {"params": [("c", p["c"])], "weight_decay": 0.0},
        ],
    )
    told(split, "b", 3.0)
    told(split, "c", 1.0)
    mixed = moves(
        name,
        lambda p: [
            {"params": [("w", p["w"]), ("b", p["b"])], "lr": LR / 2},
            {"params": [("v", p["v"]), ("c", p["c"])]},
        ],
    )
    told(mixed, "b", 0.5)
    told(mixed, "c", 1.0)


@pytest.mark.parametrize("name", MADE)
def test_a_group_of_vectors_has_its_own_lr(name: str) -> None:
    check_lrs(name)


@pytest.mark.parametrize("share", [lambda rule: rule.share, lambda rule: 1.0, lambda rule: 2 * rule.share])
def test_a_rule_that_moves_them_by_another_lr_is_rejected(share: Callable[[Rule], float]) -> None:
    own = replaced(Rule, "share_of", lambda right, self, group: share(self))
    with own, pytest.raises(AssertionError, match="b moves .* times as far"):
        check_lrs("ZOMuon")


@pytest.mark.parametrize("name", MADE)
def test_a_resumed_run_has_it(name: str) -> None:
    """`share` is in param_groups, and so in the state."""
    w, b = nn.Parameter(torch.ones(8, 6)), nn.Parameter(torch.ones(8))
    make = lambda: MADE[name](  # noqa: E731
        [{"params": [("w", w)]}, {"params": [("b", b)], "lr": DENSE}], lr=LR, dense_lr=DENSE, rank=4
    )
    optimizer, other = make(), make()
    other.param_groups[1].pop("share")
    other.load_state_dict(optimizer.state_dict())
    assert [group.get("share") for group in other.param_groups] == [None, 1.0]
    optimizer.add_param_group({"params": [("c", nn.Parameter(torch.ones(3)))], "lr": DENSE})
    assert optimizer.param_groups[2]["share"] == 1.0


def check_lr_of_0(name: str) -> None:
    """An optimizer made with it moves nothing, and refuses another one before it reads a loss; one that got
    it later goes on."""
    w, b = nn.Parameter(torch.ones(8, 6)), nn.Parameter(torch.ones(8))
    calls = [0]

    def closure() -> Tensor:
        calls[0] += 1
        return w.double().sin().sum() + b.double().sin().sum()

    optimizer = MADE[name]([("w", w), ("b", b)], lr=0.0, dense_lr=DENSE, rank=4, evaluation="master")
    zokern.step(optimizer, closure)
    optimizer.param_groups[0]["lr"], calls[0] = LR, 0
    with pytest.raises(ValueError, match="lr is 0.01 in the group of 'b', and was 0 when"):
        zokern.step(optimizer, closure)
    assert not calls[0] and w.eq(1.0).all() and b.eq(1.0).all()
    later = MADE[name]([("w", w), ("b", b)], lr=LR, dense_lr=DENSE, rank=4, evaluation="master")
    for lr in (0.0, LR):
        assert b.eq(1.0).all()
        later.param_groups[0]["lr"] = lr
        zokern.step(later, closure)
    assert not b.eq(1.0).any()


@pytest.mark.parametrize("name", MADE)
def test_an_lr_of_0_leaves_no_parameter_behind(name: str) -> None:
    check_lr_of_0(name)
    with pytest.raises(ValueError, match="dense_lr is -1.0"):
        moves(name, lambda p: [*p.items()], dense_lr=-1.0)


def test_a_share_of_0_is_rejected() -> None:
    with (
        replaced(Rule, "share_of", lambda right, self, group: self.share or 0.0),
        pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"),
    ):
        check_lr_of_0("ZOMuon")


def check_lengths(**options: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(256, 256), torch.randn(8, 256)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = zokern.SubZeroPlus(model, queries=9, evaluation="master", paired_check=None, **options)
    zokern.step(optimizer, lambda: model(x).square().mean())
    optimizer.flush()
    w, b = (float((p.detach() - start[n]).square().mean().sqrt()) for n, p in model.named_parameters())
    assert 0.2 < b / w < 5.0, f"a bias moves by {b}, and the matrix by {w}"


def test_a_bias_moves_about_as_far_as_a_matrix() -> None:
    """At the published lr too, of norm='unit', where a matrix moves by lr r / sqrt(m n)."""
    check_lengths(lr=1e-2, norm="unit")
    check_lengths()
    with pytest.raises(AssertionError, match=r"a bias moves by 0\.0\d+, and the matrix by 0\.000"):
        check_lengths(lr=1e-2, norm="unit", dense_lr=1e-2)
