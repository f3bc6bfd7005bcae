"""A run is its journal: MeZO on the device, and on the CPU the same weights from (seed, step, coefficients)
alone, to the same bits.

Also what a step promises besides: bare forwards before and after a step with lr = 0 are equal, because the
weights are not touched.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from guarded import equal
from torch import Tensor, nn

import zokern
from zokern import backends
from zokern.backends import Backend, Batch, Noise, Span, Terms
from zokern.directions import resolve

from .run import Run, judge

VOCABULARY = 97


class Norm(nn.LayerNorm):
    """A layer norm in its own dtype, whatever the model's is: many checkpoints keep theirs in float32."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.to(self.weight.dtype)).to(h.dtype)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.before, self.after = heads, Norm(width), Norm(width)
        self.attend, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.attend(self.before(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.after(h))))


class Transformer(nn.Module):
    """Small and complete: tied embeddings, norms, biases, attention; it needs nothing but torch."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(64, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(blocks)))
        self.norm, self.head = Norm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return F.cross_entropy(
            self.head(self.norm(self.blocks(h)))[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        )


@dataclass(frozen=True)
class Course:
    """One run: which dtype and options.

    norms  dtype of the norms; None: that of the others"""

    name: str
    dtype: torch.dtype
    options: dict
    norms: torch.dtype | None = None


LR, EPS = 1e-4, 1e-2
# Name, dtype, options of zokern.MeZO: a further form of a run is a line.
COURSES = (
    Course("float32", torch.float32, {}),
    Course("bfloat16, stochastic", torch.bfloat16, {"rounding": "stochastic"}),
    Course(
        "bfloat16, residual, 2 queries, decay",
        torch.bfloat16,
        {"rounding": "residual", "queries": 2, "weight_decay": 0.1},
    ),
    Course(
        "bfloat16 with norms of float32, residual", torch.bfloat16, {"rounding": "residual"}, torch.float32
    ),
    Course("float16, rademacher", torch.float16, {"rounding": "stochastic", "direction": "rademacher"}),
)


def model(width: int, blocks: int, dtype: torch.dtype, norms: torch.dtype | None = None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = Transformer(width, blocks).to(dtype)
    for module in made.modules():
        if isinstance(module, Norm):
            module.to(norms or dtype)
    return made


def check_course(
    course: Course, backend: str | Backend, device: str, steps: int, width: int, blocks: int
) -> None:
    """Raises AssertionError naming the first weight that the journal does not give."""
    there = model(width, blocks, course.dtype, course.norms)
    weights = {name: p.detach().clone() for name, p in there.named_parameters()}
    before = {name: w.clone() for name, w in weights.items()}
    there = copy.deepcopy(there).to(device)
    ids = torch.randint(0, VOCABULARY, (steps, 3, 33), generator=torch.Generator().manual_seed(9)).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = zokern.MeZO(there, lr=LR, eps=EPS, seed=77, backend=backend, **course.options)
        journal = [zokern.step(optimizer, lambda k=k: there(ids[k])) for k in range(steps)]
    right, direction = judge(), resolve(course.options.get("direction", "normal"))
    decay = 1.0 - LR * course.options.get("weight_decay", 0.0)
    rounding = course.options.get("rounding", "nearest")
    lows = (
        [torch.zeros(w.shape, dtype=torch.int16) for w in weights.values()]
        if rounding == "residual"
        else None
    )
    spans = [Span(optimizer.ids[name]) for name in weights]
    for entry in journal:
        draws = [(entry.step, k) for k in range(len(entry.coefficients))]
        amounts = torch.tensor([LR * (-c / len(draws)) for c in entry.coefficients])
        right.axpy_(
            Batch(list(weights.values()), spans, rounding, lows),
            Noise(direction, entry.seed, draws),
            Terms(amounts, decay),
        )
    moved = 0
    for name, parameter in there.named_parameters():
        equal(parameter, weights[name], f"{course.name}: {name} after {steps} steps")
        moved += int((weights[name] != before[name]).sum())
    assert moved and not any(entry.skipped for entry in journal), f"{course.name}: no step moved a weight"


def replay(run: Run, backend: str) -> None:
    """20 steps of each course."""
    if run.backend(backend) is None:
        return
    size = (4, 16, 1) if run.quick else (20, 128, 2)
    for course in COURSES:
        run.check(
            f"{backend}: MeZO replayed, {course.name}",
            lambda c=course: check_course(c, backends.get(backend), run.device, *size),
        )
