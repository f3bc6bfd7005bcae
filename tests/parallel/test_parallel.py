"""Ranks that share a step have the bits of one process, whatever carries their messages; wrong carriers do
not."""

from __future__ import annotations

import sys

import pytest
import ranks
import torch
from torch import Tensor, nn

import zokern
from zokern import parallel
from zokern.parallel import Parallel

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6


def shared(method, size, kind=ranks.Thread, split="batch", parts=(0, 1), **options):
    """What every rank has at the end."""

    def work(rank, transport):
        mine = [rank] if split == "batch" else parts
        group = Parallel(transport, split=split)
        return ranks.train(method, STEPS, lambda step: mine, group=group, **options)

    return ranks.threads(size, work, kind)


def check_equal(found, right) -> None:
    for one in found:
        assert not isinstance(one, Exception), one
        assert one == right


# The batch is shared ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ranks.METHODS)
def test_ranks_have_the_bits_of_one_process(method):
    """Three ranks of a micro-batch each, and one process with three."""
    check_equal(shared(method, 3), ranks.alone(method, STEPS, 3))


@pytest.mark.parametrize("evaluation", ["master", "scratch", "paired"])
def test_every_evaluation(evaluation):
    right = ranks.alone("MeZO", STEPS, 2, evaluation=evaluation)
    check_equal(shared("MeZO", 2, evaluation=evaluation), right)


def test_in_place_the_ranks_are_equal_to_each_other():
    """One process moves its weights for each micro-batch, and so rounds more often."""
    found = shared("MeZO", 2, evaluation="inplace")
    check_equal(found, found[0])


@pytest.mark.parametrize("kind", [ranks.OwnFirst, ranks.Deaf, ranks.Late, ranks.Flip])
def test_a_wrong_transport_is_rejected(kind):
    with pytest.raises(AssertionError):
        check_equal(shared("MeZO", 3, kind), ranks.alone("MeZO", STEPS, 3))


def test_several_micro_batches_a_rank():
    def work(rank, transport):
        return ranks.train("MeZO", STEPS, lambda step: [2 * rank, 2 * rank + 1], group=Parallel(transport))

    check_equal(ranks.threads(2, work), ranks.alone("MeZO", STEPS, 4))


def test_losses_that_do_not_fit_one_message():
    """40 queries of two losses."""
    options = {"queries": 40, "evaluation": "master"}
    check_equal(shared("MeZO", 2, **options), ranks.alone("MeZO", STEPS, 2, **options))


# Points are shared ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("method", ["MeZO", "FZOO", "KerZOO", "PGAP", "FGD", "MeZOGV"])
def test_points_are_divided(method, size):
    """The bits of one process, for more ranks than points too."""
    evaluation = "jvp" if method == "FGD" else "master"
    right = ranks.alone(method, STEPS, 2, evaluation=evaluation)
    check_equal(shared(method, size, split="points", evaluation=evaluation), right)


def test_points_are_divided_by_evaluation_scratch():
    right = ranks.alone("FZOO", STEPS, 2, evaluation="scratch")
    check_equal(shared("FZOO", 3, split="points", evaluation="scratch"), right)


def test_wrong_transports_are_rejected_where_points_are_divided():
    right = ranks.alone("FZOO", STEPS, 2, evaluation="master")
    for kind in (ranks.OwnFirst, ranks.Deaf, ranks.Late):
        with pytest.raises(AssertionError):
            check_equal(shared("FZOO", 3, kind, split="points", evaluation="master"), right)


def test_a_rank_reads_its_share_of_the_points():
    """Nine distinct points of a step on four ranks: 2, 2, 2 and 3 calls of the closure."""

    def work(rank, transport):
        net, calls = ranks.net(), []
        group = Parallel(transport, split="points")
        opt = zokern.FZOO(net, queries=8, evaluation="master", group=group, paired_check=0)
        x = ranks.batch(0, 0)
        for _ in range(3):
            calls.append(0)

            def closure():
                calls[-1] += 1
                return net(x).square().mean()

            zokern.step(opt, closure)
        return calls

    assert ranks.threads(4, work) == [[2] * 3, [2] * 3, [2] * 3, [3] * 3]


# Micro-batches in one process -------------------------------------------------------------------------------


def losses_of(method, closures, net, evaluation, **options) -> Tensor:
    opt = ranks.METHODS[method](net, lr=0.0, seed=7, evaluation=evaluation, paired_check=0, **options)
    return torch.tensor(zokern.step(opt, closures).losses, dtype=torch.float64)


def check_mean(method, evaluation) -> None:
    net = ranks.net().eval()
    parts = [ranks.loss_of(net, ranks.batch(0, part)) for part in range(3)]
    one, two, three = (losses_of(method, part, net, evaluation) for part in parts)
    assert torch.equal(losses_of(method, parts, net, evaluation), (one + two + three) / 3)


# DiZO and P-GAP read losses before those of the step, and then draw by what these say
CASES = [(method, "master") for method in ranks.METHODS if method not in ("FGD", "DiZO", "PGAP")]
CASES += [("MeZO", "scratch"), ("MeZO", "paired"), ("FGD", "jvp")]


@pytest.mark.parametrize("method, evaluation", CASES)
def test_losses_are_the_mean_of_micro_batches(method, evaluation):
    check_mean(method, evaluation)


class Last(parallel.Together):
    """Wrong: reads the last micro-batch alone."""

    def losses(self, plan, points, closure):
        return super().losses(plan, points, parallel.parts_of(closure)[-1])


class Sum(parallel.Together):
    """Wrong: a sum in place of a mean."""

    def losses(self, plan, points, closure):
        return super().losses(plan, points, closure) * len(parallel.parts_of(closure))


class Single(parallel.Together):
    """Wrong: a mean in float32."""

    def losses(self, plan, points, closure):
        return super().losses(plan, points, closure).float().double()


@pytest.mark.parametrize("wrong", [Last, Sum, Single])
def test_a_wrong_mean_is_rejected(wrong, monkeypatch):
    monkeypatch.setattr(sys.modules["zokern.step"], "Together", wrong)
    with pytest.raises(AssertionError):
        check_mean("MeZO", "master")


def test_one_closure_in_a_list_is_that_closure():
    one = ranks.train("MeZO", STEPS, lambda step: [0])
    net = ranks.net()
    opt = zokern.MeZO(net, lr=1e-3, seed=7)
    for step in range(STEPS):
        zokern.step(opt, ranks.loss_of(net, ranks.batch(step, 0)))
    assert ranks.bits(net) == one[0]


def test_micro_batches_have_dropout_masks_of_their_own():
    """In train mode two equal closures have different losses; in eval mode equal ones."""
    net = ranks.net()
    seen: list[float] = []

    def closure():
        loss = net(ranks.batch(0, 0)).square().mean()
        seen.append(float(loss))
        return loss

    for mode, different in ((True, 2), (False, 1)):
        net.train(mode)
        seen.clear()
        zokern.step(zokern.MeZO(net, lr=0.0, evaluation="master", paired_check=0), [closure, closure])
        assert len(set(seen[0::2])) == different and len(seen) == 4


def test_micro_batches_in_a_graph():
    """A captured step on a CPU has the bits of zokern.step."""
    found = []
    for captured in (False, True):
        net = ranks.net().eval()
        opt = zokern.MeZO(net, lr=1e-3, seed=7, evaluation="master")
        parts = [ranks.loss_of(net, ranks.batch(0, part)) for part in range(3)]
        call = zokern.graph(opt, parts) if captured else lambda opt=opt, parts=parts: zokern.step(opt, parts)
        losses = [call().losses for _ in range(6)]
        found.append((ranks.bits(net), losses))
    assert found[0] == found[1]


class Examples(nn.Module):
    """The loss of each row is summed by itself: on some processors a product x @ w has other last bits with
    other numbers of rows."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 12))

    def forward(self, x):
        return (x * self.w).sum(1).square()


def test_examples_of_micro_batches_and_of_ranks():
    """DP-ZO clips every example: those of micro-batches of different sizes, and of ranks, are one batch."""
    sizes = (2, 5, 3)

    def train(parts, **options):
        net = Examples()
        opt = zokern.DPZO(net, lr=1e-3, seed=7, evaluation="master", **options)
        for step in range(3):
            xs = [torch.cat([ranks.batch(step, p)] * 2)[: sizes[p]] for p in parts]
            whole = [torch.cat(xs)] if options.get("group") is None and len(parts) == 3 else xs
            result = zokern.step(opt, [lambda x=x: net(x) for x in whole])
        return ranks.bits(net), result.coefficients

    right = train(range(3))
    assert right == ranks.threads(1, lambda rank, _: train((0, 1, 2), group=None))[0]
    found = ranks.threads(3, lambda rank, transport: train([rank], group=Parallel(transport)))
    check_equal(found, right)
    found = ranks.threads(3, lambda _, transport: train((0, 1, 2), group=Parallel(transport, split="points")))
    check_equal(found, right)


def test_first_order_of_micro_batches_is_that_of_their_mean():
    """Addax back-propagates the mean loss."""
    found = []
    for listed in (True, False):
        net = ranks.net().eval()
        parts = [ranks.loss_of(net, ranks.batch(0, part)) for part in range(2)]
        opt = zokern.Addax(net, lr=1e-2, alpha=0.0, seed=7, evaluation="master")
        zokern.step(opt, parts if listed else lambda parts=parts: (parts[0]() + parts[1]()) / 2)
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)
    assert not torch.equal(found[0], torch.cat([p.detach().flatten() for p in ranks.net().parameters()]))


def test_tuning_reads_the_losses_of_all_ranks():
    """Every rank finds the eps and the lr of the mean loss, and goes on to the first step."""

    def tuned(parts, **options):
        net = ranks.net().eval()
        opt = zokern.MeZO(net, seed=7, evaluation="master", **options)
        closures = [ranks.loss_of(net, ranks.batch(0, part)) for part in parts]
        mean = lambda: sum(closure() for closure in closures) / len(closures)  # noqa: E731
        found = zokern.tune(opt, mean, probes=4)
        found.apply(opt)
        zokern.step(opt, closures)
        return found.eps, found.lr, found.loss

    eps, lr, loss = tuned([0, 1])
    found = ranks.threads(2, lambda rank, transport: tuned([rank], group=Parallel(transport)))
    assert found[0] == found[1] and found[0][0] == eps
    assert found[0][1:] == pytest.approx((lr, loss), rel=1e-6) and tuned([0])[2] != pytest.approx(loss)


# Arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "closure, said",
    [([], "closure is list"), ([3], "closure is list"), (3, "closure is int 3"), ("f", "str")],
)
def test_a_wrong_closure(closure, said):
    with pytest.raises(TypeError, match=said):
        zokern.step(zokern.MeZO(ranks.net()), closure)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"group": None}, "group is None; expected 'auto'"),
        ({"group": "all"}, "group is 'all'"),
        ({"split": "queries"}, "split is 'queries'; expected one of"),
        ({"check": 0}, "check is 0; expected None or an integer, from 1"),
    ],
)
def test_wrong_options(options, said):
    with pytest.raises(ValueError, match=said):
        Parallel(**options)


def test_what_several_ranks_cannot_do_is_refused():
    def work(rank, transport):
        net, closure = ranks.net(), ranks.loss_of(ranks.net(), ranks.batch(0, 0))
        points = Parallel(transport, split="points")
        cases = [
            (
                zokern.Addax(net, group=Parallel(transport)),
                zokern.step,
                "estimator is Mixed, which back-prop",
            ),
            (zokern.MeZO(net, evaluation="inplace", group=points), zokern.step, "with split='points'"),
            (zokern.MeZO(net, group=points), zokern.graph, "group of 2 ranks, whose losses pass"),
        ]
        for opt, call, said in cases:
            with pytest.raises(ValueError, match=said):
                call(opt, closure)
        return "refused"

    assert ranks.threads(2, work) == ["refused"] * 2


def test_a_group_of_one_is_no_group():
    assert ranks.train("MeZO", STEPS, lambda step: [0], group="auto") == ranks.alone("MeZO", STEPS, 1)
