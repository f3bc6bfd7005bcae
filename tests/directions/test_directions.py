"""What holds for every factored direction: a step moves along the z that it measured, lr = 0 moves nothing,
and who computes changes no bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from models import batch, build, changed, next_token_loss, same_bits, snapshot, tiny
from recipes import GRADIENTS, METHODS, ONE_EACH, SLOPES
from torch import Tensor, nn

import zokern
from zokern import device_numbers
from zokern.directions import Aligned, Diagonal, Lazy, Subspace, lowrank, orthonormal
from zokern.stream import BASIS, draw_word

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = batch()


def given_alone() -> dict:
    """Options for losses that are given one after the other:
    each is read once, and no two readings are compared."""
    return {"evaluation": zokern.Scratch(check=False), "paired_check": None}


# Measured and moved along -----------------------------------------------------------------------------------


def sides(tensor: Tensor) -> tuple[Tensor, ...]:
    """What a closure computed: at one point, or at all points of a step, which torch.vmap maps."""
    functorch = torch._C._functorch
    if not functorch.is_batchedtensor(tensor):
        return (tensor,)
    return functorch.get_unwrapped(tensor).movedim(functorch.maybe_get_bdim(tensor), 0).unbind(0)


def cosines(make: Callable, steps: int = 5, **options) -> list[float]:
    """Per step, the smallest cosine over matrices between the
    z that the closure saw and the change of the weights."""
    model = tiny(width=16)
    evaluation = options.pop("evaluation", zokern.Paired)
    options["evaluation"] = evaluation() if evaluation is zokern.InPlace else evaluation(check=False)
    optimizer = make(model, seed=4, weight_decay=0.0, paired_check=None, **options)
    found = []
    for _ in range(steps):
        seen: list[dict[str, Tensor]] = []

        def closure(seen: list = seen) -> Tensor:
            found = {name: sides(p + 0) for name, p in model.named_parameters()}
            seen.extend(dict(zip(found, each)) for each in zip(*found.values()))
            return next_token_loss(model(IDS), IDS)

        optimizer.flush()
        before = snapshot(model)
        result = zokern.step(optimizer, closure)
        optimizer.flush()
        ahead, behind = seen[-2:]
        c = result.coefficients[0]
        pairs = [
            (ahead[n] - behind[n], (before[n] - p) / c) for n, p in model.named_parameters() if p.dim() > 1
        ]
        found.append(
            min(
                F.cosine_similarity(a.flatten().double(), b.detach().flatten().double(), 0).item()
                for a, b in pairs
            )
        )
    return found


PARTS = {name: METHODS[name](tiny()) for name in METHODS}
# One draw, whose coefficient is the slope, and a rule without a memory.
LINEAR = [
    name
    for name, o in PARTS.items()
    if type(o.estimator) is zokern.Spsa and o.estimator.queries == 1 and o.rule.name == "sgd"
]


@pytest.mark.parametrize(
    "options",
    [{}, {"evaluation": zokern.Scratch}, {"evaluation": zokern.InPlace}, {"defer": False}],
    ids=["paired", "scratch", "inplace", "immediate"],
)
@pytest.mark.parametrize("name", LINEAR)
def test_step_moves_along_what_it_measured(name: str, options: dict) -> None:
    """Steps 0 and 3 draw a new basis."""
    found = cosines(METHODS[name], eps=1e-2, **options)
    assert min(found) > 0.9999, found


@pytest.mark.parametrize("name", ["lozo_m", "tezo_m", "tezo_adam"])
def test_first_step_of_a_rule_with_memory_moves_along_what_it_measured(name: str) -> None:
    """Nothing is remembered yet; Adam divides by the spread, so only signs agree there."""
    found = cosines(METHODS[name], steps=1, eps=1e-2)
    assert min(found) > (0.5 if name == "tezo_adam" else 0.9999), found


class Sequential(Lazy):
    """LOZO's reference: the perturbation of a step that draws V
    cuts V and then U from the step's stream, its update U alone."""

    renewed = False

    def refresh(self, matrices, source, step: int) -> None:
        super().refresh(matrices, source, step)
        self.renewed = True

    def draws(self, matrices, source, step: int, draw: int) -> list[Tensor]:
        stream, drawn = torch.Generator().manual_seed(step), []
        for m in matrices:
            if self.renewed:
                m.right = torch.randn(m.columns, m.rank, generator=stream)
            drawn.append(torch.randn(m.rows, m.rank, generator=stream))
        self.renewed = False
        return drawn


def test_one_sequential_stream_is_rejected() -> None:
    """By the steps that draw a new V, and by them alone."""

    def make(model: nn.Module, **options):
        with patch.object(zokern.methods.lozo, "Lazy", Sequential):
            return METHODS["lozo"](model, **options)

    # as the references do: the update draws once more
    def again(group: zokern.group.Group, plan, query: int) -> list[torch.Tensor]:
        return plan.factored.draws(group.matrices, group.source(plan.seed), plan.step, plan.draw(query))

    with patch.object(zokern.group.Group, "draws", again):
        found = cosines(make, eps=1e-2)
    assert all(abs(found[step]) < 0.9 for step in (0, 3)), found
    assert all(found[step] > 0.9999 for step in (1, 2, 4)), found


# lr = 0 -----------------------------------------------------------------------------------------------------


def check_rest(name: str, dtype: torch.dtype, **options) -> None:
    model = tiny(dtype, width=16)
    before = snapshot(model)
    optimizer = METHODS[name](
        model, **{"seed": 1, "weight_decay": 0.1, "eps": 1e-2, "force": True, **options, "lr": 0.0}
    )
    for _ in range(7):
        zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS))
    assert changed(model, before) == []
    optimizer.flush()
    assert changed(model, before) == []


@pytest.mark.filterwarnings("ignore:a perturbation of eps")
@pytest.mark.parametrize("defer", [True, False], ids=["deferred", "immediate"])
@pytest.mark.parametrize("evaluation", ["scratch", "paired"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ONE_EACH)
def test_lr_zero_changes_no_bit(name: str, dtype: torch.dtype, evaluation: str, defer: bool) -> None:
    """Over two changes of the basis."""
    check_rest(name, dtype, evaluation=evaluation, defer=defer)


def test_a_write_at_rest_is_rejected() -> None:
    """The check sees an update that ignores lr."""
    right = zokern.group.Group.write

    def write(self, *rest):
        for matrix in self.matrices:
            if matrix.pending is not None:
                matrix.pending = matrix.pending + 1e-3
        return right(self, *rest)

    # or nothing would be deposited, and nothing written
    moves = patch.object(device_numbers.Weights, "moves_nothing", False)
    with moves, patch.object(zokern.group.Group, "write", write), pytest.raises(AssertionError):
        check_rest("lozo", torch.float32)


# Threads and shards -----------------------------------------------------------------------------------------

SHAPES = [(130, 70), (64, 200), (33, 33), (257,), (90, 12)]


def run(name: str, threads: int, losses: Sequence[float], **options) -> tuple[dict[str, Tensor], dict]:
    """Weights and bases after steps whose losses are given, so that they alone do not depend on threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = build(lambda: nn.ParameterList([nn.Parameter(torch.randn(shape) * 0.1) for shape in SHAPES]))
        decay = {} if name == "zoconservative" else {"weight_decay": 0.1}  # which it refuses
        optimizer = METHODS[name](model, seed=7, **decay, **given_alone(), **options)
        numbers = iter(losses)
        for _ in range(5):
            zokern.step(optimizer, lambda: (sum((p + 0).sum() for p in model) * 0).item() + next(numbers))
        bases = {m.name: (m.left, m.right, m.pending) for m in optimizer.matrices.values()}
        optimizer.flush()
        return snapshot(model), bases
    finally:
        torch.set_num_threads(before)


LOSSES = torch.rand(200, generator=torch.Generator().manual_seed(3)).tolist()


def check_threads(name: str, **options) -> None:
    (one, first), (two, second) = (run(name, threads, LOSSES, **options) for threads in (1, 2))
    assert not all(
        same_bits(one[n], w)
        for n, w in snapshot(
            build(lambda: nn.ParameterList([nn.Parameter(torch.randn(s) * 0.1) for s in SHAPES]))
        ).items()
    )
    assert all(same_bits(one[n], two[n]) for n in one), "weights depend on the number of threads"
    for n in first:
        for a, b in zip(first[n], second[n]):
            assert (a is None and b is None) or same_bits(a, b), (
                f"{n}: factors depend on the number of threads"
            )


@pytest.mark.parametrize("defer", [True, False], ids=["deferred", "immediate"])
# whose products are torch's
@pytest.mark.parametrize("name", [name for name in METHODS if name not in GRADIENTS])
def test_threads_change_no_bit(name: str, defer: bool) -> None:
    check_threads(name, defer=defer)


def test_stochastic_rounding_is_the_same_for_any_thread_count() -> None:
    check_threads("lozo", rounding="stochastic")


def test_a_sum_by_threads_is_rejected() -> None:
    """Sums in another order for another thread count are noticed:
    here one order is the reverse of the other."""
    right = orthonormal.tree_sum

    def by_threads(x: Tensor) -> Tensor:
        return right(x.float() if torch.get_num_threads() == 1 else x.flip(-2).float()).double()

    with patch.object(orthonormal, "tree_sum", by_threads), pytest.raises(AssertionError, match="threads"):
        check_threads("subzero")


def shards_of(whole: Tensor, count: int, by_rows: bool) -> list[tuple[int, Tensor]]:
    """(number of the first element, contiguous piece) of equal parts: of the rows, or of the elements
    whatever the rows are."""
    flat = whole.reshape(-1)
    if by_rows:
        pieces = whole.tensor_split(count)
    else:
        cut = -(-flat.numel() // count) + 1  # inside a row
        pieces = flat.split(cut)
    found, first = [], 0
    for piece in pieces:
        found.append((first, piece.clone()))
        first += piece.numel()
    assert first == flat.numel()
    return found


def check_shards(
    name: str,
    count: int,
    by_rows: bool,
    shift: int = 0,
    rounding: str = "nearest",
    dtype: torch.dtype = torch.float32,
) -> None:
    """An interval's write of each matrix, from the factors that wait in the run,
    done by shards that know their place."""
    model = build(
        lambda: nn.ParameterList([nn.Parameter(torch.randn(shape) * 0.1) for shape in SHAPES]), dtype
    )
    optimizer = METHODS[name](
        model, seed=7, weight_decay=0.1, defer=True, rounding=rounding, force=True, **given_alone()
    )
    numbers = iter(LOSSES)
    for _ in range(2):
        zokern.step(optimizer, lambda: (sum((p + 0).float().sum() for p in model) * 0).item() + next(numbers))
    before = snapshot(model)
    waiting = {m.name: (m.left, m.pending.clone(), m.right, m.shrink) for m in optimizer.matrices.values()}
    optimizer.flush()
    assert waiting and all((pending != 0).any() for _, pending, _, _ in waiting.values())
    for n, (left, pending, right, shrink) in waiting.items():
        factors = (
            {"left": pending, "right": right}
            if left is None
            else {"left": left, "core": pending, "right": right}
        )
        for first, piece in shards_of(before[n], count, by_rows):
            zokern.lowrank_(
                piece,
                **factors,
                decay=shrink,
                who=n,
                seed=7,
                step=1,
                first=max(0, first - shift),
                rounding=rounding,
            )
            whole = model[int(n)].detach().reshape(-1)[first : first + piece.numel()]
            assert same_bits(piece.reshape(-1), whole), f"{n}: the shard from element {first} on differs"


@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "elements"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", ["subzero", "subzero_all", "lozo", "lozo_m", "tezo", "tezo_m", "pgap"])
def test_shards_change_no_bit(name: str, count: int, by_rows: bool) -> None:
    check_shards(name, count, by_rows)


@pytest.mark.filterwarnings("ignore:a perturbation of eps")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_shards_of_16_bit_weights(rounding: str) -> None:
    check_shards("subzero", 4, False, rounding=rounding, dtype=torch.bfloat16)


def test_a_shard_at_the_wrong_place_is_rejected() -> None:
    with pytest.raises(AssertionError, match="differs"):
        check_shards("subzero", 4, False, shift=1)


# Orthonormal columns ----------------------------------------------------------------------------------------


def check_orthonormal(function: Callable[[list[Tensor]], list[Tensor]]) -> None:
    shapes = [(5, 5), (64, 3), (1, 1), (301, 8), (64, 3), (1030, 2)]
    xs = [
        zokern.draw("normal", shape, seed=3, who=f"x{i}", step=0, draw=draw_word(0, BASIS))
        for i, shape in enumerate(shapes)
    ]
    for x, q in zip(xs, function(xs)):
        exact, r = torch.linalg.qr(x.double())
        assert q.dtype == torch.float32 and q.is_contiguous() and q.shape == x.shape
        assert (q.double() - exact * r.diagonal().sign()).abs().max() < 1e-6, (
            f"{tuple(x.shape)}: not Q with a positive diagonal of R"
        )
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found.append(function([zokern.draw("normal", (40000, 4), seed=3, who="x", step=0)])[0])
        finally:
            torch.set_num_threads(before)
    assert same_bits(*found), "threads change its bits"
    alone = function([xs[1]])[0]
    assert same_bits(alone, function(xs)[1]), "company changes its bits"
    # Haar: every column is uniform on the sphere,
    # whose coordinates have mean 0, square 1/m and fourth power 3 / (m (m + 2))
    m, count = 6, 4000
    qs = torch.stack(function(list(zokern.draw("normal", (count, m, m), seed=5, who="h", step=0)))).double()
    for power, expected, spread in (
        (1, 0.0, 1 / m),
        (2, 1 / m, 3 / m**2),
        (4, 3 / (m * (m + 2)), 105 / m**4),
    ):
        mean = (qs**power).mean(0)
        assert (mean - expected).abs().max() < 5 * (spread / count) ** 0.5, (
            f"moment {power}: {mean} against {expected}"
        )
    assert (qs.det().sign().mean()).abs() < 5 / count**0.5, (
        "reflections and rotations are not equally frequent"
    )


def test_orthonormal() -> None:
    check_orthonormal(orthonormal.orthonormal)


def rotation(q: Tensor) -> Tensor:
    return torch.cat([q[:, :1] * q.det().sign(), q[:, 1:]], 1)


WRONG_Q: dict[str, Callable] = {
    "lapack_signs": lambda xs: [torch.linalg.qr(x)[0].contiguous() for x in xs],
    "columns_in_reverse": lambda xs: [q.flip(1).contiguous() for q in orthonormal.orthonormal(xs)],
    "columns_only_scaled": lambda xs: [x / x.norm(dim=0) for x in xs],
    "float32_gram": lambda xs: [x @ torch.linalg.inv(torch.linalg.cholesky(x.mT @ x).mT) for x in xs],
    "rotations_only": lambda xs: [rotation(q) if q.shape == (6,
        6) else q for q in orthonormal.orthonormal(xs)],
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_Q)
def test_check_rejects_wrong_orthonormal(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_orthonormal(WRONG_Q[wrong])


# The caller's modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluation", ["scratch", "paired"])
@pytest.mark.parametrize(
    "name", [name for name in METHODS if name != "blockmezo" and name not in SLOPES]
)  # a block's losses drown in rounding to 16 bits
def test_autocast_around_a_step_is_autocast_in_its_closure(name: str, evaluation: str) -> None:
    """A step's own arithmetic is float32 whatever mode the loop is in:
    the same bits, also where bases change."""
    ends = []
    for outside in (False, True):
        model = tiny(width=16)
        optimizer = METHODS[name](model, seed=3, eps=2e-2, evaluation=evaluation)
        for _ in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):

                def closure(model: nn.Module = model) -> Tensor:
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        return next_token_loss(model(IDS), IDS)

                result = zokern.step(optimizer, closure)
        optimizer.flush()
        ends.append((result.losses, snapshot(model)))
    assert ends[0][0] == ends[1][0]
    assert all(same_bits(ends[1][1][n], t) for n, t in ends[0][1].items())


class Adapted(nn.Module):
    """A frozen body in bfloat16 with a trained float32 adapter beside its products."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny(torch.bfloat16, width=16).requires_grad_(False)
        self.adapter = build(lambda: nn.Linear(16, 16))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.body.embed(ids)
        h = h + self.body.down(F.gelu(self.body.up(self.body.norm(h))))
        return self.body.head(h + self.adapter(h.float()).bfloat16())


def coarse_run(evaluation, autocast: bool, eps: float = 1e-2) -> None:
    """Steps of losses that pass through 16 bits while every trained weight is float32."""
    model = build(lambda: tiny(width=16) if autocast else Adapted())

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return next_token_loss(model(IDS), IDS)

    optimizer = zokern.MeZO(model, seed=3, eps=eps, lr=1e-3, evaluation=evaluation)
    assert all(not zokern.step(optimizer, closure).skipped for _ in range(3))


@pytest.mark.parametrize("evaluation", ["auto", "paired", "scratch"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "frozen bfloat16"])
def test_rounding_to_16_bits_is_no_misreading(evaluation: str, autocast: bool) -> None:
    """Each evaluation rounds elsewhere, so losses differ by far more than float32 does;
    nothing is refused for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coarse_run(evaluation, autocast)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "frozen bfloat16"])
def test_a_misreading_beside_rounding_is_refused(autocast: bool) -> None:
    class Short(zokern.Paired):
        def read(self, plan, points, closure, isolation):
            return super().read(plan, [point.scaled(0.1) for point in points], closure, isolation)

    with pytest.raises(zokern.Refused, match="cannot follow"):
        coarse_run(Short(), autocast, eps=5e-2)


def test_no_draw_is_kept_between_steps() -> None:
    model = tiny(width=16)
    optimizer = METHODS["lozo"](model, seed=1, queries=2)
    zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS))
    assert optimizer.work.groups and not any(group.drawn for group in optimizer.work.groups)


# One length -------------------------------------------------------------------------------------------------

LENGTHS: dict[str, Callable[..., Any]] = {
    "subspace": partial(Subspace, 4, reshape="none"), "lazy": partial(Lazy, 4),
    "diagonal": partial(Diagonal, 4), "aligned": partial(Aligned, 4),
    "orthonormal diagonal": partial(lowrank.LowRank, lowrank.Kept("orthonormal"),
        lowrank.Drawn(diagonal=True), lowrank.Kept("orthonormal"), rank=4),
    "normal core": partial(lowrank.LowRank, lowrank.Kept(), lowrank.Drawn(), lowrank.Kept(), rank=4),
    "one orthonormal": partial(lowrank.LowRank, lowrank.Drawn(), None, lowrank.Kept("orthonormal"), rank=4),
}  # fmt: skip


def mean_square(direction: Any, draws: int = 60, names: int = 20) -> float:
    """E||z||_F^2 / (m n) of matrices of 24 x 30, over draws and bases."""

    def source(matrices, shapes, step, draw):
        return [
            zokern.draw("normal", shape, seed=2, who=m.name, step=step, draw=draw)
            for m, shape in zip(matrices, shapes)
        ]

    matrices = [lowrank.Matrix(f"w{i}", i, 24, 30, 4, torch.device("cpu")) for i in range(names)]
    direction.refresh(matrices, source, 0)
    total = 0.0
    for step in range(draws):
        for matrix, middle in zip(matrices, direction.draws(matrices, source, step, 0)):
            left = middle if matrix.left is None else matrix.left @ middle
            total += float((left @ matrix.right.T).double().square().sum())
    return total / (draws * names * 24 * 30)


def check_length(direction: Any) -> None:
    assert mean_square(direction) == pytest.approx(1.0, rel=0.15)
    assert direction.spread(lowrank.Matrix("w", 0, 24, 30, 4, torch.device("cpu"))) == pytest.approx(1.0)


@pytest.mark.parametrize("name", LENGTHS)
def test_every_direction_has_the_length_of_a_dense_one(name: str) -> None:
    """By default; with norm='unit' an element's root mean square is what `spread` says, and another one."""
    check_length(LENGTHS[name]())
    unit = LENGTHS[name](norm="unit")
    spread = unit.spread(lowrank.Matrix("w", 0, 24, 30, 4, torch.device("cpu")))
    assert mean_square(unit) == pytest.approx(spread**2, rel=0.15)
    with pytest.raises(AssertionError):
        check_length(unit)
    with pytest.raises(ValueError, match="norm is 'paper'; expected one of"):
        LENGTHS[name](norm="paper")


FULL, ADAPTERS = [(512, 2048), (256, 256), (128, 4096)], [(4, 2048), (4096, 16), (64, 1024)]


def check_reshape(direction: zokern.directions.LowRank) -> None:
    """Adapters are factored as near-square views, and full weights as they are, at any rank."""
    for shape in FULL:
        assert direction.shape(torch.empty(shape, device="meta")) == shape, f"{shape} is a full weight"
    for shape in [shape for shape in ADAPTERS if min(shape) <= 4 * direction.rank]:
        assert min(direction.shape(torch.empty(shape, device="meta"))) > min(shape), f"{shape} is an adapter"


@pytest.mark.parametrize("rank", [8, 16, 128])
def test_full_weights_keep_their_shape(rank: int) -> None:
    check_reshape(zokern.SubZeroPlus(torch.nn.Linear(2, 2), rank=rank).factored)
    check_reshape(zokern.SubZero(torch.nn.Linear(2, 2), rank=rank).factored)


@pytest.mark.parametrize("reshape, said", [("all", "full weight"), ("none", "an adapter")])
def test_another_reshape_is_rejected(reshape: str, said: str) -> None:
    class ByRank(zokern.directions.Subspace):
        def shape(self, tensor: Tensor) -> Any:
            near = min(tensor.shape) <= 4 * self.rank
            return zokern.directions.lowrank.near_square(tensor.numel()) if near else tuple(tensor.shape)

    with pytest.raises(AssertionError, match=said):
        check_reshape(zokern.directions.Subspace(128, reshape=reshape))
    with pytest.raises(AssertionError, match=r"\(512, 2048\) is a full weight"):
        check_reshape(ByRank(128))
