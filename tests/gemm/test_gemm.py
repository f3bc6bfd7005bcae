"""Products with factored weights: results larger than the caches in blocks, and matrices with so many rows of
x that W + z is made in tiles."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock, patch

import models
import pytest
import torch
from recipes import METHODS
from torch import Tensor, nn

import zokern
from zokern import backends, devices, gemm
from zokern.backends import Noise, Sides, Span, Thin, Weight
from zokern.backends.reference import Reference
from zokern.directions import resolve
from zokern.gemm import library, lowrank

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.recorder import Recorder  # noqa: E402

NORMAL = resolve("normal")

COLUMNS, WIDTH, RANK = 1300, 40, 5
pytestmark = pytest.mark.usefixtures("by_tiles")


# A result in blocks of its columns --------------------------------------------------------------------------


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).float()


def check_blocks(
    counts: list[int], bias: bool, join: bool, transposed: bool = False, rank: int = RANK
) -> None:
    """factored_linear of three sides, the first without thin products, against float64;
    the result spans several blocks."""
    weight, xs = numbers(COLUMNS, WIDTH) * 0.3, [numbers(count, WIDTH) for count in counts]
    first, last, middles = numbers(rank, WIDTH), numbers(COLUMNS, rank), numbers(2, rank, rank)
    biases = [numbers(COLUMNS) if bias else None for _ in xs]
    thins = [Thin([1, 2], first, middles, last)]
    given = weight.t().contiguous() if transposed else weight
    kept = given.clone()
    with (
        patch.object(lowrank, "CACHED", 1 << 8),
        patch.object(lowrank, "JOIN", 1 << 20 if join else 0),
        patch.object(library, "chooses", lambda x, weight: False),
    ):
        matrix, sides = Weight(given, Span(0), transposed, 0.9), Sides(xs, biases, thins=thins)
        y = gemm.factored_linear(backends.resolve(None, torch.device("cpu")), matrix, sides)
    assert torch.equal(given, kept) and y.shape == (sum(counts), COLUMNS)
    for j, (x, out) in enumerate(zip(xs, y.split(counts))):
        expected = x.double() @ weight.double().t() * 0.9
        if j:
            expected += x.double() @ first.double().t() @ middles[j - 1].double() @ last.double().t()
        if biases[j] is not None:
            expected += biases[j].double()
        assert (out.double() - expected).abs().max() < 2e-4


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "transposed"])
@pytest.mark.parametrize("join", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("counts", [[7, 7, 7], [3, 9, 6]], ids=["even", "uneven"])
def test_a_result_in_blocks(counts: list[int], bias: bool, join: bool, transposed: bool) -> None:
    check_blocks(counts, bias, join, transposed)


@pytest.mark.parametrize("counts", [[7, 7, 7], [3, 9, 6]], ids=["even", "uneven"])
def test_biases_of_more_sides_than_ranks(counts: list[int]) -> None:
    """They are added to the result, and not columns of the thin products."""
    check_blocks(counts, True, True, rank=1)


def with_thins(sides: Sides, change: Callable[[Thin], Thin]) -> Sides:
    return sides._replace(thins=[change(thin) for thin in sides.thins])


# A mistake of factored_linear, in what it is given or in what it returns.
WRONG: dict[str, Callable] = {
    "columns of the first block": lambda right, *given: (lambda y: y[:, torch.arange(COLUMNS) % 650])(
        right(*given)
    ),
    "a column left out": lambda right, *given: (lambda y: torch.cat([y[:, :-1], 0 * y[:, -1:]], 1))(
        right(*given)
    ),
    "the middle of another side": lambda right, backend, w, sides: right(
        backend, w, with_thins(sides, lambda thin: thin._replace(middles=thin.middles.flip(0)))
    ),
    "the thin products of the sides before": lambda right, backend, w, sides: right(
        backend, w, with_thins(sides, lambda thin: thin._replace(sides=[j - 1 for j in thin.sides]))
    ),
    "the first side's bias": lambda right, backend, w, sides: right(
        backend, w, sides._replace(biases=sides.biases[:1] * len(sides.biases))
    ),
    "no decay": lambda right, backend, w, sides: right(backend, w._replace(shrink=1.0), sides),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("rank", [RANK, 1])
def test_wrong_products_are_rejected(wrong: str, rank: int) -> None:
    right = gemm.factored_linear
    for join in (True, False):
        with (
            patch.object(gemm, "factored_linear", lambda *given: WRONG[wrong](right, *given)),
            pytest.raises(AssertionError),
        ):
            check_blocks([7, 7, 7], True, join, rank=rank)


# W + z in tiles ---------------------------------------------------------------------------------------------


def losses(method: str, long: bool, evaluation: str, **options) -> list[tuple[float, ...]]:
    """A short run, read with every matrix in tiles or none; updates wait in it, with decay."""
    model, inputs = models.build(models.ARCHITECTURES["opt"], torch.float32), models.inputs("opt")
    chosen = models.at_use({"scratch": zokern.Scratch, "paired": zokern.Paired}[evaluation](check=False))
    optimizer = METHODS[method](
        model, lr=3e-3, eps=1e-2, weight_decay=0.5, seed=3, evaluation=chosen, **options
    )
    with (
        warnings.catch_warnings(),
        patch.object(gemm, "is_long", lambda xs, weight: long),
        patch.object(devices, "CPU", devices.CPU._replace(tile=600)),
        patch.object(gemm, "tiled_linear", Mock(wraps=gemm.tiled_linear)) as tiled,
    ):
        warnings.filterwarnings("ignore", "the loss did not read|the padding row|zokern runs its reference")
        found = [zokern.step(optimizer, lambda: model(**inputs).loss).losses[0]]
        tiled.reset_mock()  # the probes of a first step are dense, and those are always read in tiles
        found += [zokern.step(optimizer, lambda: model(**inputs).loss).losses[0] for _ in range(2)]
    assert bool(tiled.call_count) == long
    return found


def check_tiles(method: str, evaluation: str = "scratch", **options) -> None:
    for one, two in zip(
        losses(method, True, evaluation, **options), losses(method, False, evaluation, **options)
    ):
        assert max(abs(a - b) / abs(a) for a, b in zip(one, two)) < 4e-6, (one, two)
        assert abs((one[0] - one[1]) - (two[0] - two[1])) < 0.02 * abs(two[0] - two[1]), (one, two)


@pytest.mark.parametrize("evaluation", ["scratch", "paired"])
@pytest.mark.parametrize("method", ["subzero", "lozo", "tezo", "pgap"])
def test_tiles_give_the_losses_of_thin_products(method: str, evaluation: str) -> None:
    check_tiles(method, evaluation)


@pytest.mark.parametrize("method", ["subzero", "fzoo"])
def test_tiles_of_the_reference_backend(method: str) -> None:
    """Its writes to a tile, unlike those of a kernel, are seen by torch: they are no writes to the copies
    that lie beside it."""
    for one, two in zip(
        losses(method, True, "scratch", backend="reference"), losses(method, True, "scratch")
    ):
        assert max(abs(a - b) / abs(a) for a, b in zip(one, two)) < 4e-6, (one, two)


class FirstTile(Reference):
    """Every tile has the factor of the first."""

    def lowrank_(self, batch, factors, noise=None, outs=None):
        if outs is not None:
            factors = factors._replace(lefts=[left.roll(1, 0) for left in factors.lefts])
        return super().lowrank_(batch, factors, noise, outs)


class NoDecay(Reference):
    """Tiles lack the decay that waits."""

    def lowrank_(self, batch, factors, noise=None, outs=None):
        return super().lowrank_(batch, factors if outs is None else factors._replace(decay=1.0), noise, outs)


@pytest.mark.parametrize("wrong", [FirstTile, NoDecay])
def test_wrong_tiles_are_rejected(wrong: type) -> None:
    with pytest.raises(AssertionError):
        check_tiles("subzero", backend=wrong())


def test_which_matrices_are_long() -> None:
    weight = torch.zeros(60, 30)  # 2 m n / (m + n) = 40 rows
    assert gemm.is_long([torch.zeros(41, 30), torch.zeros(3, 14, 30)], weight)
    assert not gemm.is_long([torch.zeros(40, 30)], weight)
    assert not gemm.is_long([torch.zeros(41, 30), torch.zeros(4, 30)], weight)
    assert not gemm.is_long([torch.zeros(90, 30, dtype=torch.bfloat16)], weight.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not gemm.is_long([torch.zeros(90, 30)], weight)


class Limited(Reference):
    """As the GPU's backends: thin products of up to some number of columns."""

    most_rank = 8

    def lowrank_(self, batch, factors, *rest, **options):
        assert max(right.shape[1] for right in factors.rights) <= self.most_rank
        return super().lowrank_(batch, factors, *rest, **options)


@pytest.mark.parametrize("name, rank", [("PGAP", 8), ("SubZero", 8), ("LOZO", 7)])
def test_columns_beyond_a_backend_s_most_are_several_products(name: str, rank: int) -> None:
    """In 16 bits a bias is a column beside those of the rank, and updates that wait are more of them."""
    found = []
    for backend in ("reference", Limited()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 300), nn.Linear(300, 32)).bfloat16()
        options = {"evaluation": "paired", "force": True} | ({"probes": 2} if name == "PGAP" else {})
        optimizer = getattr(zokern, name)(
            model, lr=1e-3, eps=1e-2, rank=rank, interval=9, backend=backend, **options
        )
        x = torch.linspace(-1, 1, 64).view(2, 32).bfloat16()
        found.append(
            [
                zokern.step(optimizer, lambda m=model, x=x: m(x).float().square().mean()).losses[0]
                for _ in range(3)
            ]
        )
    for right, mine in zip(*found):
        assert mine == pytest.approx(right, rel=1e-2)


# Sketches ---------------------------------------------------------------------------------------------------


def sketched(coeffs: list[float], device: str = "meta", transposed: bool = False) -> Recorder:
    """The launches of a sketch of a matrix of 2^27 numbers."""
    recorder, shape = Recorder(), (1 << 13, 1 << 14)
    omega = torch.empty(shape[0 if transposed else 1], 4, device=device)
    noise = Noise(NORMAL, 1, [(0, k) for k in range(len(coeffs))])
    made = gemm.sketch_of(recorder, noise, coeffs, Span(1), shape, omega, transposed)
    assert tuple(made.shape) == (shape[1 if transposed else 0], 4)
    return recorder


@pytest.mark.parametrize("transposed", [False, True])
def test_a_sketch_on_a_gpu_has_large_tiles(transposed: bool) -> None:
    """Two launches for 2^27 numbers, and one z is drawn into its tile: nothing is cleared, nothing added."""
    one, two = sketched([1.0], transposed=transposed), sketched([0.5, 2.0], transposed=transposed)
    assert [(call.verb, call.elements) for call in one.calls] == [("draw", 1 << 26)] * 2
    assert [(call.verb, call.elements) for call in two.calls] == [("axpy_", 1 << 26)] * 2
    with patch.object(devices, "GPU", devices.CPU):
        assert sketched([1.0]).count("draw") == 128


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_drawn_sketch_is_the_added_one(backend: str) -> None:
    """To the bit: 1 z added to 0 is z."""
    if backends.why_off(backend) is not None:
        pytest.skip(str(backends.why_off(backend)))
    omega, noise = torch.randn(40, 3), Noise(NORMAL, 9, [(4, 2)])
    drawn, added = (
        gemm.sketch_of(
            backends.get(backend), noise._replace(draws=noise.draws[:1] * len(coeffs)), coeffs, Span(3, 5),
            (30, 40), omega, tile=500
        )
        for coeffs in ([1.0], [1.0, 0.0])
    )  # fmt: skip
    assert torch.equal(drawn, added)
    other = gemm.sketch_of(backends.get(backend), noise, [0.5], Span(3, 5), (30, 40), omega, tile=500)
    assert torch.allclose(other, drawn / 2) and not torch.equal(other, drawn)
