"""An estimator of one's own, as docs/reference.md shows it: it trains, is saved, resumed and tuned."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from models import batch, next_token_loss, same_bits, tiny
from torch import Tensor, nn

import zokern

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = batch()
PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"


def documented() -> type[zokern.Estimator]:
    """The class of the page's example."""
    source = PAGE.read_text().split("```python\n")[1].split("\n\n\nopt = ")[0]
    names = {"torch": torch, "zokern": zokern}
    exec(compile(source, str(PAGE), "exec"), names)
    return names["OneSided"]  # type: ignore[return-value]


OneSided = documented()


class Running(OneSided):  # type: ignore[misc, valid-type]
    """Learns the mean of its slopes, by which it divides."""

    def __call__(self, oracle, plan):
        (estimate,) = super().__call__(oracle, plan)
        mean = 0.5 * self.state.get("mean", 1.0) + 0.5 * float(estimate.slopes.abs())
        self.state["mean"] = mean
        yield zokern.Estimate(
            estimate.draws, estimate.coefficients / mean, estimate.losses, slopes=estimate.slopes
        )


def loss(model: nn.Module) -> Tensor:
    return next_token_loss(model(IDS), IDS)


def steps(optimizer, model, count: int) -> None:
    for _ in range(count):
        zokern.step(optimizer, lambda: loss(model))


def check_own(make: type[zokern.Estimator]) -> None:
    """The run that resumes has the bits of the run that goes on; tuning leaves what was learned."""
    model, other = tiny(width=16), tiny(width=16)
    optimizer = zokern.MeZO(model, lr=1e-2, seed=1, estimator=make())
    before = float(loss(model).detach())
    steps(optimizer, model, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    found = zokern.tune(optimizer, lambda: loss(model))
    assert found.lr > 0 and found.fall > 0
    steps(optimizer, model, 3)
    other.load_state_dict(saved["model"])
    resumed = zokern.MeZO(other, lr=1e-2, estimator=make())
    resumed.load_state_dict(saved["optimizer"])
    steps(resumed, other, 3)
    assert all(map(same_bits, model.parameters(), other.parameters())), "the resumed run is another one"
    assert float(loss(model).detach()) < before


@pytest.mark.parametrize("make", [OneSided, Running])
def test_an_estimator_of_ones_own(make: type[zokern.Estimator]) -> None:
    check_own(make)


class Hidden(Running):
    """Keeps what it learns where no state_dict sees it."""

    def __call__(self, oracle, plan):
        self.state = vars(self).setdefault("_learned", {})
        yield from super().__call__(oracle, plan)
        self.state = {}


def test_check_rejects_an_estimator_that_hides_what_it_learns() -> None:
    with pytest.raises(AssertionError, match="is another one"):
        check_own(Hidden)


def test_each_object_has_a_state_of_its_own() -> None:
    one, other = Running(), Running()
    one.state["mean"] = 2.0
    assert other.state == {} and one.fresh().state == {} and one.state == {"mean": 2.0}
