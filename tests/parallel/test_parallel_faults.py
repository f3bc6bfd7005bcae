"""A rank that fails, or differs, stops all ranks in one step, with its name and with equal weights."""

from __future__ import annotations

import pytest
import ranks
import torch

import zokern
from zokern.parallel import Parallel, RankFailed, Ranks
from zokern.transport import checksum

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, FAULT, SIZE = 6, 3, 3


def run(
    trouble, size=SIZE, method="MeZO", options=lambda rank: {}, steps=STEPS, kind=ranks.Thread, **parallel
):
    """What each rank has after `trouble(rank, step, net, opt, closure)`, which returns the step's closure:
    (weights before each step, the exception that ended it or None, losses of each step)."""

    def work(rank, transport):
        net = ranks.net().eval()
        given = {"lr": 1e-3, "seed": 7, "evaluation": "master", **options(rank)}
        opt = ranks.METHODS[method](net, group=Parallel(transport, **parallel), **given)
        weights, losses = [], []
        for step in range(steps):
            part = rank if parallel.get("split") != "points" else 0
            closure = ranks.loss_of(net, ranks.batch(step, part))
            try:
                closure = trouble(rank, step, net, opt, closure)
                weights.append(ranks.bits(net))
                losses.append(zokern.step(opt, closure).losses)
            except Exception as problem:
                return [*weights, ranks.bits(net)], problem, losses
        return [*weights, ranks.bits(net)], None, losses

    return ranks.threads(size, work, kind)


def check_stopped(found, step: int, culprit: int, kind: type, *said: str) -> None:
    """All ranks ended in a step, with the weights that they had before it. The others name the culprit."""
    for rank, (weights, problem, losses) in enumerate(found):
        assert len(losses) == step and weights[-1] == weights[-2] == found[0][0][-1]
        assert isinstance(problem, kind if rank == culprit else RankFailed), problem
        if rank != culprit:
            assert all(word in str(problem) for word in said), problem


def at_fault(rank: int, step: int) -> bool:
    return (rank, step) == (1, FAULT)


def broken(number):
    """A closure that raises at its n-th reading of a step."""

    def trouble(rank, step, net, opt, closure):
        calls = []

        def wrapped():
            calls.append(0)
            if at_fault(rank, step) and len(calls) == number:
                raise ValueError("no such file: shard-17")
            return closure()

        return wrapped

    return trouble


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("split", ["batch", "points"])
def test_a_closure_that_raises_stops_all_ranks(number, split):
    """At its first reading and at its second; where points are divided a rank reads one or two of five."""
    method = {"batch": "MeZO", "points": "FZOO"}[split]
    found = run(broken(number), method=method, split=split)
    told = "rank 1 raised ValueError: no such file: shard-17. All 3 ranks stop. Their weights are equal"
    check_stopped(found, FAULT, 1, ValueError, f"step {FAULT}: ", told, "torchrun --max-restarts=N")
    assert any("This is rank 1; all 3 ranks stop." in note for note in found[1][1].__notes__)


def test_the_first_step_too():
    def trouble(rank, step, net, opt, closure):
        if rank == 2:
            losses = iter([closure().detach()] * 4)  # two points, and one of them with theta again
            return lambda: next(losses)  # ends in the reading that looks for parameters that are not read
        return closure

    found = run(trouble)
    for _, problem, losses in found:
        assert isinstance(problem, RuntimeError) and "StopIteration" in str(problem) and not losses
    assert all(weights[-1] == found[0][0][0] for weights, _, _ in found)


def test_two_ranks_that_raise_hear_of_each_other():
    def trouble(rank, step, net, opt, closure):
        def wrapped():
            if step == FAULT and rank > 0:
                raise ValueError(f"trouble of {rank}")
            return closure()

        return wrapped

    found = run(trouble)
    assert "rank 1 raised ValueError: trouble of 1; rank 2 raised ValueError: trouble of 2" in str(
        found[0][1]
    )
    assert "Others raised too: rank 2: ValueError: trouble of 2" in found[1][1].__notes__[-1]


def test_a_closure_that_goes_on_after_the_fault():
    """All ranks may catch the error and go on with the next batch; they stay equal."""

    def work(rank, transport):
        net = ranks.net().eval()
        opt = zokern.MeZO(net, lr=1e-3, seed=7, evaluation="master", group=Parallel(transport))
        for step in range(STEPS):
            closure = broken(1)(rank, step, net, opt, ranks.loss_of(net, ranks.batch(step, rank)))
            try:
                zokern.step(opt, closure)
            except (ValueError, RankFailed):
                pass
        return ranks.bits(net), opt.steps

    found = ranks.threads(SIZE, work)
    assert found[0] == found[1] == found[2] and found[0][1] == STEPS - 1


def test_nan_on_one_rank_skips_the_step_on_all():
    def trouble(rank, step, net, opt, closure):
        return (lambda: closure() * float("nan")) if at_fault(rank, step) else closure

    for weights, problem, losses in (found := run(trouble)):
        assert problem is None and len(losses) == STEPS and weights == found[0][0]
        assert weights[FAULT + 1] == weights[FAULT] and weights[FAULT + 2] != weights[FAULT]


# Ranks that differ ------------------------------------------------------------------------------------------


def same(rank, step, net, opt, closure):
    return closure


@pytest.mark.parametrize("size", [2, 3])
def test_points_of_other_batches_are_noticed(size):
    """With split='points' all ranks are to read one batch."""

    def trouble(rank, step, net, opt, closure):
        return ranks.loss_of(net, ranks.batch(step, rank))

    for _, problem, losses in run(trouble, size, split="points"):
        assert "with split='points' every rank reads the same batch" in str(problem) and not losses


class Wide:
    """A width that is another one on each rank."""

    def __init__(self, rank):
        self.rank = rank

    def __call__(self, step):
        return 1.0 if step < FAULT else 1.0 + self.rank


STARTS = {
    "lr": (
        lambda rank: {"lr": 0.1 if rank == 1 else 0.2},
        "rank 1: lr of group 0 is 0.1, and on rank 0 it is 0.2",
    ),
    "eps": (lambda rank: {"eps": 1e-3 * (1 + (rank == 2))}, "rank 2: eps of group 0 is 0.002"),
    "seed": (lambda rank: {"seed": 7 + (rank == 0)}, "rank 0: seed is 8, and on rank 1 it is 7"),
    "rule": (
        lambda rank: {"rule": zokern.Momentum(0.9 if rank == 1 else 0.8)},
        "rank 1: rule.beta is 0.9, and on rank 0 it is 0.8",
    ),
    "guards": (lambda rank: {"max_skips": 3 + rank % 2}, "rank 1: max_skips is 4, and on rank 0 it is 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", STARTS)
def test_other_options_are_named_before_a_weight_moves(name):
    options, said = STARTS[name]
    found = run(same, options=options)
    for weights, problem, losses in found:
        assert isinstance(problem, RankFailed) and said in str(problem) and not losses
        assert weights[-1] == weights[0]


def test_other_weights_are_named_before_a_weight_moves():
    def trouble(rank, step, net, opt, closure):
        if rank == 2 and step == 0:
            with torch.no_grad():
                net.two.weight[1, 1] += 1e-6
        return closure

    for weights, problem, losses in run(trouble):
        assert isinstance(problem, RankFailed) and not losses and weights[-1] == weights[0]
        assert "rank 2: checksum of the weights of 'two.weight' is" in str(problem)
        assert "torch.distributed.broadcast(p.data, 0)" in str(problem)


def test_another_lr_later_is_found_before_it_is_used():
    def trouble(rank, step, net, opt, closure):
        if at_fault(rank, step):
            opt.param_groups[0]["lr"] = 5e-3
        return closure

    check_stopped(run(trouble), FAULT, 1, RankFailed, "rank 1: lr of group 0 is 0.005", "it is 0.001")


def test_other_points_are_found_before_they_are_used():
    found = run(same, options=lambda rank: {"estimator": zokern.Kernel(1, width=Wide(rank))})
    for weights, problem, losses in found:
        assert isinstance(problem, RankFailed) and len(losses) == FAULT, problem
        assert "what a question asks for is" in str(problem) and weights[-1] == found[0][0][-1]


def test_other_numbers_of_micro_batches():
    def trouble(rank, step, net, opt, closure):
        return [closure] * (2 if at_fault(rank, step) else 1)

    said = "the ranks have other numbers of micro-batches: 1 on rank 0, 2 on rank 1, 1 on rank 2"
    check_stopped(run(trouble), FAULT, 1, RankFailed, said, "as many closures on every rank")


def test_a_rank_that_loads_another_state():
    saved = {}

    def trouble(rank, step, net, opt, closure):
        if rank == 1 and step == 1:
            saved.update(opt.state_dict())
        if at_fault(rank, step):
            opt.load_state_dict(saved)
        return closure

    check_stopped(
        run(trouble), FAULT, 1, RankFailed, "other step numbers: 3 on rank 0, 1 on rank 1, 3 on rank 2"
    )


def test_weights_that_drift_are_found_at_the_next_comparison():
    """An edit on one rank after step 1 is found before step 4 writes; `check` is 4."""

    def trouble(rank, step, net, opt, closure):
        if (rank, step) == (1, 2):
            with torch.no_grad():
                net.one.bias[0] += 1e-3
        return closure

    found = run(trouble, check=4)
    for _, problem, losses in found:
        assert isinstance(problem, RankFailed) and len(losses) == 4
        assert "rank 1: checksum of the weights of 'one.bias' is" in str(problem)
    assert all(problem is None for _, problem, _ in run(trouble, check=None))


class Deviant(zokern.Spsa):
    """Wrong: an estimator that says another thing on one rank, once."""

    rank = 0

    def estimate(self, plan, losses, differences):
        factor = 1.001 if at_fault(self.rank, plan.step) else 1.0
        return super().estimate(plan, losses, differences * factor)


def test_coefficients_that_differ_are_found_in_the_next_step():
    def options(rank):
        estimator = Deviant()
        estimator._rank = rank
        type(estimator).rank = property(lambda self: self._rank)
        return {"estimator": estimator}

    for _, problem, losses in run(same, options=options):
        assert isinstance(problem, RankFailed) and len(losses) == FAULT + 1
        assert "the checksum of all coefficients is" in str(problem) or "checksum of the weights" in str(
            problem
        )


def test_a_checksum_that_is_not_carried_is_noticed(monkeypatch):
    """Without the checksum of coefficients the test above fails: the ranks go on."""
    monkeypatch.setattr(Ranks, "note", lambda self, step, numbers: None)
    with pytest.raises(AssertionError):
        test_coefficients_that_differ_are_found_in_the_next_step()


def test_deferred_updates_that_one_rank_wrote():
    """state_dict() on rank 0 alone writes its deferred updates, with one rounding more."""

    def trouble(rank, step, net, opt, closure):
        if rank == 0 and step == FAULT:
            opt.state_dict()
        return closure

    found = run(trouble, method="SubZero", options=lambda rank: {"evaluation": "paired"})
    for _, problem, losses in found:
        assert isinstance(problem, RankFailed) and len(losses) == FAULT
        assert "deferred updates (1: waiting, 0: written): 0 on rank 0, 1 on rank 1" in str(problem)

    def everywhere(rank, step, net, opt, closure):
        opt.state_dict()
        if rank == 0:
            with opt.evaluating():
                net(ranks.batch(0, 0))
        return closure

    found = run(everywhere, method="SubZero", options=lambda rank: {"evaluation": "paired"})
    assert all(problem is None and weights == found[0][0] for weights, problem, _ in found)


class Breaks(zokern.Sgd):
    """Wrong: a rule that raises after it has written."""

    def __init__(self, rank):
        super().__init__()
        self._rank = rank

    def update(self, plan, *rest):
        found = super().update(plan, *rest)
        if at_fault(self._rank, plan.step):
            raise OSError("device lost")
        return found


class Halts(zokern.Spsa):
    """Wrong: an estimator that raises when it has the losses of all ranks, and the others write."""

    def __init__(self, rank):
        super().__init__()
        self._rank = rank

    def estimate(self, plan, losses, differences):
        if at_fault(self._rank, plan.step):
            raise OSError("device lost")
        return super().estimate(plan, losses, differences)


@pytest.mark.parametrize(
    "options",
    [
        lambda rank: {"rule": Breaks(rank)},
        lambda rank: {"estimator": Halts(rank)},
        lambda rank: {"estimator": zokern.Blockwise(Halts(rank), block="module")},
    ],
)
def test_a_rank_that_fails_as_others_write_does_not_claim_equal_weights(options):
    found = run(same, options=options)
    assert isinstance(found[1][1], OSError)
    for rank in (0, 2):
        assert "rank 1 raised OSError: device lost" in str(found[rank][1])
        assert "may differ from those of the others" in str(found[rank][1])
        assert "Their weights are equal" not in str(found[rank][1])


# Checksums --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int16, torch.int64])
def test_a_checksum_sees_every_element(dtype):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(40, 50, generator=generator).mul(100).to(dtype)
    before = checksum(tensor)
    assert before == checksum(tensor.clone()) == checksum(tensor.t().contiguous().t())
    for place in range(0, tensor.numel(), 37):
        changed = tensor.clone()
        bits = changed.view(-1)[place : place + 1].view(torch.uint8)
        bits[0] ^= 1
        assert checksum(changed) != before
    swapped = tensor.clone()
    swapped[0], swapped[1] = tensor[1], tensor[0]
    assert checksum(swapped) != before


def test_a_checksum_of_many_pieces(monkeypatch):
    tensor = torch.arange(1000, dtype=torch.int32)
    monkeypatch.setattr("zokern.transport.PIECE", 64)
    before = checksum(tensor)
    moved = torch.cat([tensor[64:128], tensor[:64], tensor[128:]])
    assert checksum(moved) != before == checksum(tensor.clone())
