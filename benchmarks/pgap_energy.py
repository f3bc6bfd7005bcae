"""Does P-GAP's probed basis hold more of the gradient than a random one? `python -m benchmarks.pgap_energy`

    energy(U, V) = ||U U^T G V V^T||_F^2 / ||G||_F^2

G is the true gradient, by back-propagation, of one batch of the demo's task. U and V are the leading r
singular vectors of a matrix' estimate (1/h) sum_i c_i z_i, with normals z_i of the stream. A random basis of
the same rank holds r^2 / (m n) of any G on average.

The first line is the method itself: zokern.PGAP at its published settings, with losses of the model and its
range finder. The sweep takes for c_i the derivative along z_i, the central difference for eps -> 0, and exact
singular vectors. The matrix' own part of c_i is <G, z_i>. The part of all other weights that are probed with
it is a normal number of variance ||G_others||_F^2, which is its distribution. So no forward is needed, and
any h can be tried. A probe that was accumulated over intervals is at best one more probe, at the same weights
and batch: the rows of a large h say what a momentum of probes could reach.

Weights are probed in three scopes: all of the model, the matrix' block alone, the matrix alone. The largest
singular value of G stands out of the noise from h_visible = sqrt(m n) ||G_scope||_F^2 / sigma_1^2 probes on
(Benaych-Georges and Nadakuditi 2012).
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import zokern
from examples import demo
from examples.demo.data import load_model, read_reviews, split
from examples.demo.training import Batches, Task
from zokern.directions.orthonormal import orthonormal
from zokern.estimator import Oracle
from zokern.training.words import LabelWords

from .report import Report
from .study.seeds import of_values

LAYERS, KINDS = (0, 14, 29), ("self_attn.q_proj", "self_attn.v_proj")
PROBES, RANKS, SCOPES = (10, 30, 100, 300, 1000, 3000), (8, 32, 128), ("model", "block", "matrix")
BATCH, SEEDS, CHUNK = 8, 5, 50


@dataclass(frozen=True)
class Truth:
    """The gradient of a matrix, and the squared length of the gradient of each scope that it is in."""

    name: str
    gradient: Tensor  # float64 (m, n)
    squares: dict[str, float]

    @property
    def visible(self) -> dict[str, float]:
        """Returns h_visible of each scope."""
        top = float(torch.linalg.matrix_norm(self.gradient, 2))
        return {
            scope: math.sqrt(self.gradient.numel()) * square / top**2
            for scope, square in self.squares.items()
        }

    def energy(self, u: Tensor, v: Tensor) -> float:
        return float(
            (u.double().mT @ self.gradient @ v.double()).square().sum() / self.gradient.square().sum()
        )


def truths(model: nn.Module, task: Task) -> dict[str, Truth]:
    """Returns the gradients of the matrices that are looked at, by back-propagation."""
    task().backward()
    squares = {
        name: float(p.grad.double().square().sum())
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    found = {}
    for layer in LAYERS:
        block = f"model.layers.{layer}."
        for kind in KINDS:
            name = f"{block}{kind}.weight"
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            inside = sum(square for other, square in squares.items() if other.startswith(block))
            scopes = {"model": sum(squares.values()), "block": inside, "matrix": squares[name]}
            found[name] = Truth(name, gradient.double().clone(), scopes)
    model.zero_grad()
    return found


def leading(estimate: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns the leading singular vectors (m, rank) and (n, rank),
    the first one first, from the smaller product."""
    wide = estimate.shape[0] <= estimate.shape[1]
    x = estimate if wide else estimate.mT
    u = torch.linalg.eigh(x @ x.mT)[1].flip(1)[:, :rank]
    v = nn.functional.normalize(x.mT @ u, dim=0)
    return (u, v) if wide else (v, u)


def estimates(
    truth: Truth, seed: int, probes: Sequence[int], scopes: Sequence[str]
) -> dict[tuple[str, int], Tensor]:
    """Returns (1/h) sum_i c_i z_i for each scope and h, float64 (m, n);
    a larger h goes on from a smaller one."""
    shape, flat = truth.gradient.shape, truth.gradient.flatten().float()
    own = truth.squares["matrix"]
    others = torch.tensor([math.sqrt(max(0.0, truth.squares[scope] - own)) for scope in scopes])
    beside = torch.randn(max(probes), len(scopes), generator=torch.Generator().manual_seed(seed)) * others
    total, found, done = torch.zeros(len(scopes), flat.numel()), {}, 0
    for stop in probes:
        while done < stop:
            here = range(done, min(stop, done + CHUNK))
            z = torch.stack(
                [
                    zokern.draw("normal", (flat.numel(),), seed=seed, who=truth.name, step=0, draw=k)
                    for k in here
                ]
            )
            total += ((z @ flat)[:, None] + beside[here.start : here.stop]).mT @ z
            done = here.stop
        found.update(
            {(scope, stop): (total[j] / stop).view(shape).double() for j, scope in enumerate(scopes)}
        )
    return found


def random_basis(truth: Truth, seed: int, rank: int) -> tuple[Tensor, Tensor]:
    """Returns orthonormal normals, as zokern.SubZero draws them."""
    drawn = [
        zokern.draw("normal", (side, rank), seed=seed, who=truth.name, step=1, draw=k)
        for k, side in enumerate(truth.gradient.shape)
    ]
    u, v = (orthonormal([x])[0] for x in drawn)
    return u, v


def published(
    model: nn.Module, task: Task, found: dict[str, Truth], seeds: int, rank: int, probes: int
) -> list[list[float]]:
    """Returns [energy over random's mean] of each seed and matrix for the method itself:
    its losses, its range finder."""
    ratios = []
    for seed in range(seeds):
        optimizer = zokern.PGAP(model, rank=rank, probes=probes, seed=seed, evaluation="master")
        plan = optimizer.plan()
        optimizer.factored.measure(Oracle(optimizer.evaluation, plan, task), plan)
        group = next(group for group in plan.groups if group.matrices is not None)
        matrices = [matrix for matrix in group.matrices or () if matrix.name in found]
        optimizer.factored.refresh(matrices, group.source(seed), 0)
        ratios.append(
            [found[m.name].energy(m.left, m.right) * m.rows * m.columns / m.rank**2 for m in matrices]
        )
    return ratios


def shown(values: Sequence[float]) -> str:
    """Returns the mean over seeds and half of its 95 % interval (Student), and whether it leaves out 1."""
    mean = of_values(values)
    verdict = " **better**" if mean.low > 1.0 else " worse" if mean.high < 1.0 else ""
    return f"{mean.value:.2f} ± {mean.high - mean.value:.2f}{verdict}"


def sweep(
    found: dict[str, Truth], seeds: int, probes: Sequence[int]
) -> dict[tuple[str, int, int], list[float]]:
    """Returns, by scope, h and rank, a number for each seed: energy over that of a random basis on average,
    the mean over the matrices."""
    table: dict[tuple[str, int, int], list[float]] = {}
    for seed in range(seeds):
        each: dict[tuple[str, int, int], list[float]] = {}
        for truth in found.values():
            bases = {
                key: leading(estimate, max(RANKS))
                for key, estimate in estimates(truth, seed, probes, SCOPES).items()
            }
            for (scope, h), (u, v) in {
                **bases,
                ("random basis", 0): random_basis(truth, seed, max(RANKS)),
            }.items():
                for rank in RANKS:
                    held = truth.energy(u[:, :rank], v[:, :rank]) * truth.gradient.numel() / rank**2
                    each.setdefault((scope, h, rank), []).append(held)
        for key, ratios in each.items():
            table.setdefault(key, []).append(statistics.fmean(ratios))
        print(f"seed {seed}: {time.strftime('%H:%M:%S')}", flush=True)
    return table


def lines(
    found: dict[str, Truth], table: dict, direct: list[list[float]], options: argparse.Namespace
) -> list[str]:
    """Returns the tables."""
    rank, probes = options.rank, options.probes
    means = [statistics.fmean(ratios) for ratios in direct]
    text = [
        f"zokern.PGAP itself, h = {probes}, rank {rank}, all weights probed by losses of the model, "
        f"{len(direct)} seeds: energy over r^2 / (m n) is {shown(means)} (mean over the matrices; interval "
        "over seeds, 95 %).",
        "",
        "| probed together | h | " + " | ".join(f"rank {r}" for r in RANKS) + " |",
        "|---|---|" + "---|" * len(RANKS),
    ]
    for scope, h in dict.fromkeys((scope, h) for scope, h, _ in table):
        cells = [shown(table[scope, h, r]) for r in RANKS]
        text.append(f"| {scope} | {h or ''} | " + " | ".join(cells) + " |")
    text += [
        "",
        "| matrix | shape | h_visible: " + " | ".join(SCOPES) + " |",
        "|---|---|" + "---|" * len(SCOPES),
    ]
    for truth in found.values():
        m, n = truth.gradient.shape
        text.append(
            f"| {truth.name} | {m} x {n} | "
            + " | ".join(f"{truth.visible[scope]:.2g}" for scope in SCOPES)
            + " |"
        )
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and writes the page."""
    parse = argparse.ArgumentParser(
        prog="python -m benchmarks.pgap_energy", description=(__doc__ or "").partition("\n\n")[0]
    )
    parse.add_argument("--seeds", type=int, default=SEEDS)
    parse.add_argument("--most", type=int, choices=PROBES, default=PROBES[-1], help="largest h of the sweep")
    parse.add_argument("--rank", type=int, default=128, help="of the method itself")
    parse.add_argument("--probes", type=int, default=10, help="of the method itself")
    parse.add_argument("--threads", type=int, default=1)
    options = parse.parse_args(argv)
    report, began = Report(quick=False), time.monotonic()  # whose folder is named after the machine's threads
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model()
    words = LabelWords(tokenizer, demo.TEMPLATE, demo.WORDS)
    every = read_reviews()
    rows = split([row for row, n in zip(every, words.lengths(every)) if demo.LEAST <= n <= demo.MOST], 100)
    task = Task(model, words, Batches(rows.train, BATCH, 0).next())
    found = truths(model, task)
    direct = published(model, task, found, options.seeds, options.rank, options.probes)
    print(f"the method itself: {time.monotonic() - began:.0f} s", flush=True)
    table = sweep(found, options.seeds, [h for h in PROBES if h <= options.most])
    text = lines(found, table, direct, options)
    print("\n".join(text))
    about = report.machine
    page = [
        f"# P-GAP's basis against a random one: {about['cpu']}, {about['isa']}",
        "",
        f"`python -m benchmarks.pgap_energy --seeds {options.seeds} --most {options.most} --threads "
        f"{options.threads}`, {about['date']}, commit {about['commit']}: torch {about['torch']}, "
        f"{about['cores']} cores, load average {about['load']}, {time.monotonic() - began:.0f} s.",
        f"SmolLM2-135M, a batch of {BATCH} of the demo's sentences; matrices {', '.join(KINDS)} of layers "
        f"{', '.join(map(str, LAYERS))}.",
        "Cells are the energy of G in the basis over r^2 / (m n), what a random basis holds on average: the "
        "mean over the matrices, with a",
        f"95 % interval over seeds. 1 is a random basis. Of {len(table)} cells about "
        f"{0.025 * len(table):.0f} are called better by chance, as in",
        "the row of the random basis itself.",
        "",
        *text,
    ]
    folder = report.folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pgap_energy.md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
