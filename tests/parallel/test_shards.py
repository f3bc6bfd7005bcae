"""Sharded parameters: the bits of one process for any sharding, and what is refused.

Four processes with gloo run all cases once (tests/support/sharded.py). Each test compares what they found
with the same training in this process.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sharded
import torch
from torch import Tensor, nn

import zokern
from zokern import shards
from zokern.backends import Span
from zokern.backends.reference import numbers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What rank 0 of four found in all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, sharded.__file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def alone() -> Callable[[str, str], dict[str, Any]]:
    """What one process finds, once for a method and a model."""
    known: dict[Any, dict[str, Any]] = {}

    def train(way: str, method: str) -> dict[str, Any]:
        kind = sharded.Layers if way in sharded.LAYERS else sharded.Gathered
        coarse = way in sharded.COARSE
        if (method, kind, coarse) not in known:
            known[method, kind, coarse] = sharded.reference(method, kind, coarse=coarse)
        return known[method, kind, coarse]

    return train


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Returns the names of tensors whose bits differ."""
    assert one.keys() == other.keys()
    return [
        name
        for name in one
        if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])
    ]


# Bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "method"), sharded.CASES)
def test_a_sharded_run_has_the_bits_of_one_process(way: str, method: str, found: Any, alone: Any) -> None:
    """Weights and states on every rank, and the losses: gathered weights are the same ones."""
    mine, right = found[way, method], alone(way, method)
    assert mine["losses"] == right["losses"]
    assert not different(mine["weights"], right["weights"]) and not different(mine["states"], right["states"])
    assert mine["ranks"] == 1 and mine["evaluation"] == "master"
    kind = sharded.Layers if way in sharded.LAYERS else sharded.Gathered
    start = dict(kind(sharded.METHODS[method][2]).named_parameters())
    assert len(different(mine["weights"], start)) == len(start)  # all of them moved


@pytest.mark.parametrize("name", sharded.OTHERS)
def test_every_method_has_the_bits_of_one_process(name: str, found: Any) -> None:
    mine, right = found[name], sharded.in_brief(name, sharded.Layers(), evaluation="master")
    assert mine["losses"] == right["losses"] and mine["ranks"] == 1
    assert not different(mine["weights"], right["weights"])
    assert different(mine["weights"], dict(sharded.Layers().named_parameters()))


@pytest.mark.parametrize("name", sharded.WRONG)
def test_wrong_versions_have_other_bits(name: str, found: Any, alone: Any) -> None:
    """The comparison above finds local numbers, a lost pitch and gathered weights that stay in place."""
    way, method, *_ = sharded.WRONG[name]
    mine = found[name]
    if name == "gathered weights stay":
        assert len(mine) == sharded.WORLD and all("replaced a trained parameter" in words for words in mine)
    else:
        assert different(mine["weights"], alone(way, method)["weights"])


@pytest.mark.parametrize("name", sharded.APART)
def test_ranks_that_differ_are_an_error_on_every_rank(name: str, found: Any) -> None:
    for rank, words in enumerate(found[name]):
        assert words.startswith(f"RuntimeError: rank {rank} has seed") and "all_reduce" in words


@pytest.mark.parametrize("way", ["column-wise", "row-wise"])
def test_tensor_parallel_runs_have_the_weights_of_equal_losses(way: str, found: Any) -> None:
    """Products of other shapes sum in another order, so that losses differ in their last bits."""
    mine, right = found[way], sharded.train_coarsely(sharded.Layers())
    assert mine["losses"] == right["losses"] and len(set(map(tuple, right["losses"]))) > 1
    assert not different(mine["weights"], right["weights"])
    apart = max(abs(a - b) / b for a, b in zip(mine["exact"], right["exact"]))
    print(f"largest relative difference of 50 losses, {way}: {apart:.2g}")
    assert apart < 1e-6


@pytest.mark.parametrize("way", ["fsdp 4", "row-wise"])
def test_a_step_sends_what_its_forwards_send(way: str, found: Any) -> None:
    """It copies the shards alone."""
    sent = found["sent", way]
    assert sent["step"] == sent["forwards"] > 0
    assert sent["copy"] == sent["shards"] < sum(p.nbytes for p in sharded.Layers().parameters())


def test_ranks_with_a_batch_each_may_average_the_loss(found: Any) -> None:
    assert found["averaged"]["ranks"] == 1 and len(set(found["averaged"]["losses"])) > 2


@pytest.mark.parametrize("way", ["hybrid", "fsdp 4"])
def test_ranks_with_a_batch_each_have_the_bits_of_one_process_with_all(way: str, found: Any) -> None:
    mine, right = found["grouped", way], sharded.grouped(sharded.Layers(), None)
    assert mine["ranks"] == 1 and mine["losses"] == right["losses"]
    assert different(mine["weights"], right["weights"]) == []


def test_the_blocks_of_the_page_run(mesh: Any) -> None:
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = sharded.Layers()

        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(loss=self.layers(x).square().mean())

    names = {"torch": torch, "zokern": zokern, "model": Scored(), "loader": [{"x": sharded.X}] * 2}
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/shards.md").read_text(), re.M | re.S)
    for source in blocks:
        exec(compile(source, "docs/shards.md", "exec"), names)
    assert len(blocks) == 2 and names["opt"].steps == 2  # of the second block


# Saving -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "method"), [("hybrid", "Adam"), ("fsdp 2", "LOZO"), ("fsdp 2", "residual")])
def test_a_distributed_checkpoint_goes_on_in_another_sharding(
    way: str, method: str, found: Any, alone: Any
) -> None:
    """Saved by 'fsdp 4' after three steps, with get_state_dict and set_state_dict."""
    check_resumed(found["resumed", way, method], alone(way, method))


@pytest.mark.parametrize("method", ["Adam", "residual"])
def test_every_rank_may_save_its_own_state(method: str, found: Any, alone: Any) -> None:
    check_resumed(found["kept", method], alone("mesh", method))


def check_resumed(mine: dict[str, Any], right: dict[str, Any]) -> None:
    assert mine["losses"] == right["losses"][-len(mine["losses"]) :]
    assert not different(mine["weights"], right["weights"]) and not different(mine["states"], right["states"])


# Blocks -----------------------------------------------------------------------------------------------------


class Held:
    """Stands for a DTensor: the elements [start, stop) of each dimension of a whole tensor."""

    device_mesh, full_tensor, requires_grad = "a mesh", None, True

    def __init__(self, whole: Tensor, cuts: Any, placements: Any = ()) -> None:
        self.shape, self.placements = whole.shape, placements
        self.held = whole[tuple(slice(*cut) for cut in cuts)].contiguous()
        self.offsets = [start for start, _ in cuts]

    def to_local(self) -> Tensor:
        return self.held

    def __create_chunk_list__(self) -> Any:
        return [SimpleNamespace(offsets=self.offsets, sizes=self.held.shape)]


SHAPES: list[tuple[int, ...]] = [(), (5,), (3, 4), (1, 4), (4, 1), (3, 1, 4), (2, 3, 4), (2, 2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_block_has_its_numbers_or_is_refused(shape: tuple[int, ...]) -> None:
    """All blocks of small tensors: their numbers are those of the whole, or no span has them."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    sides = [[(a, b) for a in range(n + 1) for b in range(a, n + 1)] for n in shape]
    taken = refused = 0
    for cuts in itertools.product(*sides):
        held = Held(whole, cuts)
        try:
            memory, first, pitch = shards.block("w", held)  # type: ignore[arg-type]
        except ValueError as problem:
            assert "'w'" in str(problem) and "Shard(0)" in str(problem)
            rows = held.held.flatten().diff()
            assert len(set(rows[rows != 1].tolist())) > 1  # gaps of more than one length
            refused += 1
            continue
        taken += 1
        right = held.held.flatten()
        assert torch.equal(memory.flatten(), right)
        assert not right.numel() or torch.equal(numbers(memory, Span(1, first, pitch)), right)
    assert taken and (refused > 0) == (len([n for n in shape if n > 1]) > 2)


# Refused ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A mesh of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    store = tmp_path_factory.mktemp("one") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "paired": (lambda m: zokern.MeZO(m, evaluation="paired"), "evaluation is 'paired'.*'master'"),
    "scratch": (lambda m: zokern.MeZO(m, evaluation="scratch"), "evaluation is 'scratch'.*'master'"),
    "jvp": (lambda m: zokern.FGD(m, evaluation="jvp"), "evaluation is 'jvp'.*'master'"),
    "a mask": (lambda m: zokern.SparseMeZO(m), "direction is 'masked'.*'normal'"),
    "curvature": (lambda m: zokern.HiZOO(m), "direction is 'curved'.*'normal'"),
    "norms of layers": (lambda m: zokern.DiZO(m), "rule is 'projected'.*zokern.Sgd"),
    "a window": (lambda m: zokern.AdaMeZO(m), "rule is 'window_adam'.*zokern.Sgd"),
    "a quotient of factors": (lambda m: zokern.TeZO(m, rule=zokern.Adam()), "rule is 'adam'.*zokern.Sgd"),
    "gradients": (lambda m: zokern.Addax(m), "estimator is 'Mixed'.*zokern.Spsa"),
    "norms of draws": (
        lambda m: zokern.MeZO(m, estimator=zokern.Kernel(clip_norm=1.0)),
        "estimator is 'Kernel'.*zokern.Spsa",
    ),
    "points of its own": (
        lambda m: zokern.MeZO(m, group=zokern.Parallel(Two(), split="points")),
        "split is 'points'.*zokern.Parallel",
    ),
    "a rule that does not say": (lambda m: zokern.MeZO(m, rule=Own()), "rule is 'own'"),
}  # fmt: skip


class Two:
    """A transport that says it has two ranks."""

    rank, size, sent = 0, 2, 0

    def gather(self, message: Tensor) -> Tensor:
        raise AssertionError("it was used")

    def name(self, rank: int) -> str:
        return f"rank {rank}"


class Own(zokern.Sgd):
    """A rule of a user's, which was written for whole parameters."""

    name = "own"


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_whole_parameters_is_refused_by_name(name: str, mesh: Any) -> None:
    make, words = REFUSED[name]
    model = sharded.fsdp(mesh, torch.float32)
    before = [p.to_local().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"{words}.*leave the model unsharded"):
        make(model)
    assert all(torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before))
    make(sharded.Layers())  # which one process takes


def test_derivatives_and_captures_are_refused(mesh: Any) -> None:
    model = sharded.fsdp(mesh, torch.float32)
    with pytest.raises(RuntimeError, match="tangents of whole parameters.*Spsa"):
        zokern.step(zokern.FGD(model), sharded.closure(model))
    opt = zokern.MeZO(model)
    opt.tape = object()
    with pytest.raises(ValueError, match="captured in a graph.*zokern.step"):
        zokern.step(opt, sharded.closure(model))


def test_flat_parameters_are_refused(mesh: Any) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for given in (lambda m: m, lambda m: m.parameters()):
        model = FullyShardedDataParallel(sharded.Layers(), device_id=torch.device("cpu"))
        with pytest.raises(TypeError, match="fully_shard"):
            zokern.MeZO(given(model), evaluation="master")


def test_sums_that_are_not_made_are_refused(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Partial

    model = sharded.Layers()
    model[0].bias = nn.Parameter(DTensor.from_local(torch.zeros(8), mesh, [Partial()]))
    with pytest.raises(ValueError, match="'0.bias' has placements.*redistribute"):
        zokern.MeZO(model)


@pytest.mark.parametrize("evaluation", ["inplace", "master"])
@pytest.mark.parametrize("given", ["module", "pairs"])
def test_gathered_weights_that_an_earlier_forward_left_are_not_read(
    given: str, evaluation: str, mesh: Any
) -> None:
    """fully_shard keeps those of the root in place. Pairs do not say which module has them."""
    model, alone = sharded.fsdp(mesh, torch.float32), sharded.Layers()
    params = model if given == "module" else list(model.named_parameters())
    opt = sharded.built("Adam", params, evaluation=evaluation)
    with torch.no_grad():
        model(sharded.X)
    mine = sharded.train("Adam", model, opt=opt)
    right = sharded.train("Adam", alone, evaluation=evaluation)
    assert mine["losses"] == right["losses"] and not different(mine["weights"], right["weights"])


def test_eps_and_lr_are_found_for_shards(mesh: Any) -> None:
    found = []
    for model in (sharded.fsdp(mesh, torch.float32), sharded.Layers()):
        read = [sharded.closure(model)]
        found.append(zokern.tune(sharded.built("MeZO", model), read, evaluation=zokern.Master()))
    assert (found[0].lr, found[0].eps) == (found[1].lr, found[1].eps)


def test_a_checkpoint_that_lacks_state_is_refused(mesh: Any) -> None:
    """torch.distributed.checkpoint leaves out what an optimizer has not made yet."""
    first = sharded.fsdp(mesh, torch.float32)
    opt = sharded.built("LOZO", first)
    zokern.step(opt, sharded.closure(first))
    saved = opt.state_dict()
    saved["state"] = {number: {} for number in saved["state"]}
    with pytest.raises(ValueError, match="lacks .'momentum'.*lr=0"):
        sharded.built("LOZO", sharded.fsdp(mesh, torch.float32)).load_state_dict(saved)


def test_state_of_another_sharding_is_refused(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard

    def run(where: Any) -> Any:
        model = sharded.placed(mesh, torch.float32, a=[where], b=[where])
        opt = sharded.built("Adam", model)
        zokern.step(opt, sharded.closure(model))
        return opt

    with pytest.raises(ValueError, match="state 'first' of parameter 'a' has placements.*checkpoint"):
        run(Shard(0)).load_state_dict(run(Replicate()).state_dict())
