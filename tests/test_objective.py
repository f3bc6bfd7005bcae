"""Objective and the stacked reading: one pass of the model over the rows of all sides gives the losses of separate readings, or is given up.

And evaluation 'auto', which chooses between paired and scratch.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from models import ARCHITECTURES, inputs, same_bits, snapshot
from mutant import mutant
from torch import nn

import zokern
from zokern.evaluation import auto, copies, objective, paired, stacked

STACKABLE = {"opt", "llama", "gpt2", "bert"}
METHODS: dict[str, Callable] = {
    "dense": lambda m, **o: zokern.MeZO(m, lr=1e-3, eps=1e-2, **o),
    "rademacher, one-sided": lambda m, **o: zokern.MeZO(m, lr=1e-3, eps=1e-2, direction="rademacher", stencil="forward", **o),
    "subspace": lambda m, **o: zokern.SubZero(m, lr=1e-3, eps=1e-2, rank=4, interval=2, **o),
    "lazy": lambda m, **o: zokern.LOZO(m, lr=1e-3, eps=1e-2, interval=2, **o),
}


def objective_of(architecture: str, model: nn.Module) -> zokern.Objective:
    batch = inputs(architecture)
    labels = batch.pop("labels")
    if architecture == "t5":
        batch["decoder_input_ids"] = labels

    def loss_fn(outputs, batch):
        return F.cross_entropy(outputs.logits.flatten(0, -2), labels.flatten())

    return zokern.Objective(model, batch, loss_fn)


def steps(architecture: str, method: str, evaluation, count: int = 3, queries: int = 2, dtype=torch.float32):
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture]().to(dtype).eval()
    optimizer = METHODS[method](model, evaluation=evaluation, queries=queries, seed=4)
    target = objective_of(architecture, model)
    return [zokern.step(optimizer, target) for _ in range(count)], optimizer, model


def check_losses(mine, right, bound: float) -> None:
    for a, b in zip(mine, right):
        for x, y in zip(a.losses, b.losses):
            assert all(abs(p - q) <= bound * max(1.0, abs(q)) for p, q in zip(x, y)), f"{x} against {y}"


CASES = [(a, m, True) for a in ARCHITECTURES for m in METHODS if a in ("opt", "gpt2") or m == "subspace"]


@pytest.mark.parametrize(("architecture", "method", "large"), [*CASES, ("opt", "dense", False), ("llama", "dense", False)])
def test_stacked_losses_are_those_of_scratch(architecture: str, method: str, large: bool) -> None:
    with patch.object(copies, "RESIDENT", 0 if large else copies.RESIDENT):
        mine, optimizer, model = steps(architecture, method, zokern.Paired())
        right, _, other = steps(architecture, method, "scratch")
    check_losses(mine, right, 1e-5)
    assert mine[-1].evaluation == "paired"
    assert ("stacked" in optimizer.evaluation.refused) == (architecture not in STACKABLE), optimizer.evaluation.refused


@pytest.mark.parametrize("method", ["dense", "rademacher, one-sided"])
@pytest.mark.parametrize("architecture", ["opt", "llama"])
def test_stacked_in_bfloat16(architecture: str, method: str) -> None:
    mine, optimizer, _ = steps(architecture, method, zokern.Paired(), dtype=torch.bfloat16)
    right, _, _ = steps(architecture, method, "scratch", dtype=torch.bfloat16)
    check_losses(mine, right, 0.02)
    assert not optimizer.evaluation.refused


class Vectors(nn.Module):
    """Every use of a vector that is done for all sides at once, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.norm, self.bare = nn.Embedding(9, 6), nn.LayerNorm(6, eps=0.1), nn.LayerNorm(6, bias=False)
        self.scale, self.shift, self.number = (nn.Parameter(torch.randn(size)) for size in (6, 6, 1))
        for vector in (self.norm.weight, self.norm.bias, self.bare.weight):
            nn.init.normal_(vector)

    def forward(self, ids):
        x = self.bare(self.norm(self.table(ids)) * self.scale)
        return torch.add(self.shift, (self.scale * x).transpose(1, 2).transpose(1, 2)) + self.number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_of_all_sides_in_one_call(dtype: torch.dtype) -> None:
    ids = torch.randint(0, 9, (3, 5), generator=torch.Generator().manual_seed(0))
    calls: list = []
    read = stacked.Stacked._vectors

    def seen(self, func, args, kwargs):
        result = read(self, func, args, kwargs)
        calls.append((func, result is not None))
        return result

    def losses(evaluation):
        model = Vectors().to(dtype)
        target = zokern.Objective(model, (ids,), lambda y, b: (y.float() * torch.linspace(-1, 2, 6)).square().mean())
        optimizer = zokern.MeZO(model, lr=0.0, eps=0.1, seed=3, queries=2, evaluation=evaluation)
        result = zokern.step(optimizer, target)
        assert not result.unseen
        return [result]

    right, bound = losses("scratch"), 1e-5 if dtype == torch.float32 else 0.02
    with patch.object(stacked.Stacked, "_vectors", seen):
        check_losses(losses(zokern.Paired(check=False)), right, bound)
    assert [done for func, done in calls if func is F.layer_norm] == [True, True]
    assert [done for func, done in calls if func is not F.layer_norm and func is not F.embedding] == [True, True, True, False]
    for true, false in (("side=side", "side=0"), ("stacks[-1]", "stacks[0]"), (', eps=names.get("eps", 1e-5)', "")):
        with patch.object(stacked.Stacked, "_vectors", mutant(stacked.Stacked, "_vectors", true, false)):
            with pytest.raises(AssertionError):
                check_losses(losses(zokern.Paired(check=False)), right, bound)


class Counted(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, **batch):
        self.calls += 1
        return self.inner(**batch)


def test_the_model_runs_once_for_all_sides() -> None:
    torch.manual_seed(0)
    model = Counted(ARCHITECTURES["opt"]().eval())
    optimizer = zokern.SubZero(model, queries=3, evaluation=zokern.Paired(check=False), rank=4)
    target = objective_of("opt", model)
    zokern.step(optimizer, target)
    assert model.calls == 1
    zokern.step(optimizer, lambda: target())  # an ordinary closure: once a side
    assert model.calls == 1 + 6


def shifted(outputs, batch):
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def with_labels(withhold) -> tuple:
    torch.manual_seed(0)
    model = ARCHITECTURES["llama"]().eval()
    ids = inputs("llama")["input_ids"]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    optimizer = zokern.SubZero(Counted(model), rank=4, queries=2, evaluation=zokern.Paired())
    return optimizer, zokern.Objective(optimizer.model, batch, shifted, withhold=withhold)


@pytest.mark.parametrize("withhold", ["labels", ("labels",)])
def test_labels_are_kept_from_the_model(withhold, recwarn) -> None:
    """A transformers model that is not given them has no loss of its own: one call of it reads all four sides."""
    optimizer, target = with_labels(withhold)
    zokern.step(optimizer, target)
    assert optimizer.evaluation.refused == {} and not recwarn.list
    before = optimizer.model.calls
    result = zokern.step(optimizer, target)
    assert optimizer.model.calls == before + 1
    model = ARCHITECTURES["llama"]().eval()
    model.load_state_dict(optimizer.model.inner.state_dict())
    loss = float(model(**target.batch).loss)
    assert abs(result.loss - loss) < 0.02 * loss  # the labels are shifted as transformers shifts them


def test_a_model_with_a_loss_of_its_own_is_not_stacked_with_a_warning() -> None:
    optimizer, target = with_labels(())
    with pytest.warns(RuntimeWarning, match="read side by side .*loss of its own.*withhold='labels'") as caught:
        for _ in range(2):
            assert zokern.step(optimizer, target).evaluation == "paired"
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.parametrize("batch", [{"input_ids": torch.zeros(1, 2)}, (torch.zeros(1, 2),)])
def test_only_keys_of_the_batch_are_withheld(batch) -> None:
    with pytest.raises(ValueError, match=r"withhold names \['label'\]; expected keys of a mapping"):
        zokern.Objective(nn.Identity(), batch, shifted, withhold="label")


class Leaky(nn.Module):
    """Rows that are not independent, or a loss of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.layer, self.norm = kind, nn.Linear(8, 300), nn.BatchNorm1d(300)
        self.norm.eval()

    def forward(self, x):
        y = self.layer(x)
        if self.kind == "mean over the batch":
            y = y - y.mean(0, keepdim=True)
        if self.kind == "order":
            y = y.flip(0)
        if self.kind == "dropout":
            y = F.dropout(y, 0.5, training=True)
        if self.kind == "its own loss":
            return {"loss": y.square().mean(), "logits": y}
        if self.kind == "one number":
            return {"logits": y, "penalty": y.square().mean()}
        return {"logits": y}


def loss_of(outputs, batch):
    if "loss" in outputs:
        return outputs["loss"]
    weight = torch.linspace(0.5, 2.0, outputs["logits"].shape[0]).unsqueeze(1)
    return (outputs["logits"] * weight).square().mean() + outputs.get("penalty", 0.0)


@pytest.mark.parametrize("kind", ["mean over the batch", "order", "dropout", "its own loss", "one number"])
def test_a_model_that_mixes_rows_is_not_stacked(kind: str) -> None:
    """The first step notices, and the losses are those of scratch; without the comparison they would not be."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))

    def run(evaluation):
        model = Leaky(kind)
        optimizer = zokern.MeZO(model, lr=0.0, eps=1e-2, seed=1, evaluation=evaluation)
        return [zokern.step(optimizer, zokern.Objective(model, (x,), loss_of)) for _ in range(2)], optimizer

    (right, _), (mine, optimizer) = run("scratch"), run(zokern.Paired())
    check_losses(mine, right, 1e-6)
    assert "stacked" in optimizer.evaluation.refused and optimizer.evaluation.alone is None
    if kind not in ("its own loss", "dropout"):  # which are noticed without it
        with pytest.raises(AssertionError):
            check_losses(run(zokern.Paired(check=False))[0], right, 1e-6)


class Dropping(nn.Module):
    """In 16 bits the comparison of a first step does not see a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.a, self.drop, self.head = (
            nn.Embedding(64, 320),
            nn.Linear(320, 320),
            nn.Dropout(0.1),
            nn.Linear(320, 64),
        )

    def forward(self, ids):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.head(self.drop(torch.relu(self.a(self.rows(ids)))))


def check_masks(training: tuple[bool, ...]) -> None:
    ids = torch.randint(0, 64, (16, 8), generator=torch.Generator().manual_seed(0))
    found = []
    for evaluation in ("scratch", "paired"):
        torch.manual_seed(0)
        model = Dropping()
        optimizer = zokern.SubZero(model, lr=0.0, seed=1, evaluation=evaluation)
        target = zokern.Objective(model, (ids,), lambda y, b: F.cross_entropy(y.float().flatten(0, 1), b[0].flatten()))
        found.append([])
        for flag in training:
            model.train(flag)
            found[-1].append(zokern.step(optimizer, target))
        assert evaluation == "scratch" or "random" in optimizer.evaluation.refused["stacked"]
    check_losses(found[1], found[0], 2e-3)


@pytest.mark.parametrize("training", [(True, True), (False, True, True)])
def test_sides_of_a_stack_see_the_same_masks(training: tuple[bool, ...]) -> None:
    """Also where the first step was read without dropout, and whatever the dtype."""
    check_masks(training)


def test_masks_of_their_own_are_rejected() -> None:
    with patch.object(paired, "device_streams", lambda: ()), pytest.raises((AssertionError, KeyError)):
        check_masks((True, True))


@pytest.mark.parametrize("way", ["objective", "closure"])
def test_other_modes_are_compared_again(way: str) -> None:
    """A model that mixes rows in train mode only, as batch normalisation does."""
    model = Leaky("none")
    model.forward = lambda x: {"logits": model.layer(x) - model.training * model.layer(x).mean(0)}
    optimizer = zokern.MeZO(model, lr=0.0, eps=1e-2, evaluation=zokern.Paired())
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    target = zokern.Objective(model, (x,), loss_of)
    closure = target if way == "objective" else lambda: target()
    for flag, refused in ((False, False), (True, way == "objective")):
        model.train(flag)
        model.norm.eval()
        zokern.step(optimizer, closure)
        assert ("stacked" in optimizer.evaluation.refused) == refused


def test_the_record_names_what_a_stack_reads_apart() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.wide, self.by_hand = (
                nn.Embedding(300, 300),
                nn.Conv1d(300, 300, 3),
                nn.Parameter(torch.randn(300, 300) * 0.05),
            )

        def forward(self, ids):
            return self.wide(self.rows(ids).mT).mT @ self.by_hand

    torch.manual_seed(0)
    model, ids = Apart(), torch.arange(16).view(2, 8)
    target = zokern.Objective(model, (ids,), lambda y, _: y.square().mean())
    found = [zokern.step(zokern.MeZO(model, lr=0.0, evaluation="paired"), closure) for closure in (target, lambda: target())]
    assert found[0].unpaired == found[1].unpaired == ("by_hand", "rows.weight", "wide.weight")


def test_wrong_sides_are_rejected() -> None:
    """Outputs handed to the wrong side, and copies of the wrong side, differ from scratch by more than the bound."""
    right, _, _ = steps("opt", "dense", "scratch", queries=1)

    def swapped(outputs, rows, sides, side):
        return objective.part(outputs, rows, sides, sides - 1 - side)

    with patch.object(stacked, "part", swapped), pytest.raises(AssertionError):
        check_losses(steps("opt", "dense", zokern.Paired(check=False), queries=1)[0], right, 1e-5)
    with patch.object(stacked, "part", swapped):  # and with the comparison nothing wrong is used
        check_losses(steps("opt", "dense", zokern.Paired(), queries=1)[0], right, 1e-5)


def test_exceptions_leave_no_trace() -> None:
    model = ARCHITECTURES["opt"]().eval()
    before = snapshot(model)
    optimizer = zokern.MeZO(model, evaluation=zokern.Paired(check=False))
    target = objective_of("opt", model)

    def fails(outputs, batch):
        raise KeyboardInterrupt

    state, grad = torch.get_rng_state(), torch.is_grad_enabled()
    with pytest.raises(KeyboardInterrupt):
        zokern.step(optimizer, zokern.Objective(model, target.batch, fails))
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled() == grad
    assert all(same_bits(p, before[name]) for name, p in model.named_parameters())


def test_batches_keep_their_structure() -> None:
    a, b = torch.arange(6).view(3, 2), torch.tensor(5.0)
    for batch in ({"x": a, "y": (b, [a])}, (a, b), [a]):
        twice = objective.repeated(batch, 3, 2)
        assert type(twice) is type(batch)
        for side in range(2):
            one = objective.tensors(objective.part(twice, 3, 2, side))
            assert all(torch.equal(p, q) for p, q in zip(one, objective.tensors(batch)))
    assert zokern.Objective(nn.Identity(), {"n": b, "x": a}, lambda o, b: o).rows() == 3


# Auto -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "chosen"), [(2, "paired"), (auto.ROWS + 1, "scratch")])
def test_auto_chooses_by_rows(rows: int, chosen: str) -> None:
    model = nn.Linear(300, 300)
    x = torch.randn(rows, 300, generator=torch.Generator().manual_seed(0))
    optimizer = zokern.MeZO(model, lr=0.0, evaluation="auto", seed=2)
    results = [zokern.step(optimizer, lambda: model(x).square().mean()) for _ in range(3)]
    assert [r.evaluation for r in results] == ["scratch", chosen, chosen]
    other = zokern.MeZO(model, lr=0.0, evaluation="scratch", seed=2)
    check_losses(results, [zokern.step(other, lambda: model(x).square().mean()) for _ in range(3)], 1e-6)


def test_auto_without_greenlet_is_scratch() -> None:
    with patch.object(auto.meeting, "greenlet", None):
        model = nn.Linear(3, 3)
        optimizer = zokern.MeZO(model, evaluation="auto")
        assert zokern.step(optimizer, lambda: model(torch.ones(2, 3)).square().mean()).evaluation == "scratch"


@pytest.mark.parametrize("rows, expected", [(256, "paired"), (257, "scratch")])
@pytest.mark.parametrize("name", ["SubZero", "PGAP", "LOZO"])
def test_auto_goes_by_factored_rows(name: str, rows: int, expected: str) -> None:
    """P-GAP's probes are dense, and no measure for its steps."""
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    options = {"probes": 2, "rank": 4} if name == "PGAP" else {"rank": 4}
    optimizer = getattr(zokern, name)(model, lr=0.0, **options)
    x = torch.ones(rows, 300)
    records = [zokern.step(optimizer, lambda: model(x).square().mean()).evaluation for _ in range(2)]
    assert records == ["scratch", expected]


def test_probes_hold_no_more_sides_than_a_step() -> None:
    """Activations of two sides live at once, however many probes there are."""
    inside, most = [0], [0]

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(300, 300), nn.Linear(300, 300)

        def forward(self, x):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            y = self.b(self.a(x))
            inside[0] -= 1
            return y

    model, x = Watched(), torch.ones(2, 300)
    optimizer = zokern.PGAP(model, rank=4, probes=5, interval=2, evaluation=zokern.Paired(check=False))
    for _ in range(3):
        zokern.step(optimizer, lambda: model(x).square().mean())
    assert most[0] == 2
