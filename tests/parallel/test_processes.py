"""Ranks in processes of their own, under gloo: equal bits, wrappers, and ranks that are killed."""

from __future__ import annotations

import pytest
import rank_work
import ranks
import torch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="this build of torch has no gloo: no processes to run",
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What four ranks found."""
    answers = ranks.processes(4, rank_work.equal_bits, tmp_path_factory.mktemp("four"))
    assert all(isinstance(answer, dict) for answer in answers), answers
    return answers


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("method", rank_work.EQUAL)
def test_ranks_have_the_bits_of_one_process_with_as_many_closures(found, method, size):
    """20 steps; weights and losses, bit for bit."""
    right = ranks.alone(method, rank_work.STEPS, size)
    assert all(found[rank][size, method] == right for rank in range(size))
    assert right != ranks.alone(method, rank_work.STEPS, size + 1)


def test_a_wrapped_model_is_the_same_run(found):
    right = ranks.alone("MeZO", 6, 4)
    assert all(answer["ddp"] == right for answer in found)


def test_points_are_divided_between_processes(found):
    right = ranks.train("FZOO", 6, lambda step: [0], evaluation="master")
    assert all(answer["points"] == right for answer in found)


def test_a_rank_without_points_holds_nobody_up(found):
    """Buffers of a wrapped model are not sent around in a step: four ranks read two points."""
    right = found[0]["buffers"][0]
    assert all(answer["buffers"] == [right, right] for answer in found)


def test_a_rank_that_hangs_is_met_at_the_timeout(found):
    """After two seconds; nothing was written on either rank."""
    for step, kept, said in (answer["hangs"] for answer in found[:2]):
        assert step == 2 and kept and "within the group's timeout (init_process_group(timeout=...))" in said


def test_a_process_outside_of_the_group(found):
    assert all("this process does not belong to" in answer["outside"] for answer in found[2:])


def test_a_wrapped_model_without_a_group_is_an_error(found):
    for answer in found:
        assert len(answer["alone"]) == 2
        for said in answer["alone"]:
            assert "4 processes run, and group is None" in said and "group='auto'" in said


def test_trainer(tmp_path):
    """Ranks are alike, and near one process that reads both batches as micro-batches of a step: that one sums
    their losses in float32. Half of the batches is another run."""
    pytest.importorskip("transformers")
    (first, said), (second, _) = ranks.processes(2, rank_work.trainers, tmp_path, str(tmp_path))
    assert first == second
    both, half = (rank_work.trained(str(tmp_path / "one"), parts=n) for n in (2, 1))
    assert first[0] == pytest.approx(both[0], rel=1e-4) != half[0]
    assert first[1] == pytest.approx(both[1], abs=1e-4) != half[1]
    assert "group" in said


def test_accelerate(tmp_path):
    """prepare() wraps the model after the optimizer was built; the loader gives each rank its batches."""
    pytest.importorskip("accelerate")
    model = ranks.net()
    opt = ranks.METHODS["SubZero"](model, lr=1e-3, seed=7)
    for step in range(4):
        parts = [ranks.loss_of(model, ranks.batch(0, 2 * step + rank)) for rank in range(2)]
        ranks.zokern.step(opt, parts)
    opt.flush()
    right = ("DistributedDataParallel", 4, ranks.bits(model))
    assert ranks.processes(2, rank_work.prepared, tmp_path) == [right] * 2


def test_a_killed_rank_is_met_by_the_others(tmp_path):
    """Both survivors stop in the step of the kill, say what to do, and have equal weights."""
    answers = ranks.processes(3, rank_work.killed, tmp_path, 1, 4, left=2)
    assert answers[1] is None
    for step, said, kept, bits in (answers[0], answers[2]):
        assert step == 4 and kept and bits == answers[0][3]
        assert "a rank has ended, or did not answer" in said and "torchrun --max-restarts=N" in said
