"""Reports of users as a table of cases: each makes a small model and a closure, always the same ones.

A name begins with the report's number; relatives of a report, that nobody has sent, stand beside it.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import importlib
import io
import itertools
import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from readings import clones
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zokern


class Setup(NamedTuple):
    """What a case trains and reads. `each` is called before a step. `look` is the same after it."""

    params: Any
    loss: Callable[[], Any]
    each: Callable[[int], Any] = lambda step: None
    look: Callable[[], Any] = lambda: None


@dataclass
class Case:
    """A report. Losses and their differences are right to `tol` of the differences and `ulps` of the losses.

    exact    compare losses too, and not only their differences
    refused  also 'master' and 'auto' may refuse it, in words that match this
    must     every evaluation refuses it
    """

    name: str
    make: Callable[[], Setup]
    method: str = "MeZO"
    options: dict[str, Any] = field(default_factory=dict)
    eps: float = 1e-2
    lr: float = 0.0
    tol: float = 0.02
    ulps: float = 32.0
    exact: bool = True
    refused: str | None = None
    must: bool = False
    around: Callable[[], Any] = contextlib.nullcontext


CASES: list[Case] = []


def case(name: str, **options: Any) -> Callable:
    """Put a maker of setups in the table: under one name or, with `over`, under one for each key."""
    over = options.pop("over", None)

    def add(make: Callable[..., Setup]) -> Callable[..., Setup]:
        makers = (
            {name: make}
            if over is None
            else {f"{name} {k}": functools.partial(make, v) for k, v in over.items()}
        )
        CASES.extend(Case(title, maker, **options) for title, maker in makers.items())
        return make

    return add


def built(one: Case) -> Setup:
    """The case from its own seed; nobody else's streams move."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return one.make()


def line(*sizes: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def square(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: net(x).float().square().mean()


# K1: the point that is theta itself, and what torch keeps of it ---------------------------------------------


def encoder() -> Setup:
    net = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 2
    ).eval()
    x, pad = torch.randn(4, 10, 32), torch.arange(10) >= torch.tensor([10, 8, 7, 5])[:, None]
    return Setup(net, lambda: net(x, src_key_padding_mask=pad).square().mean())


# torch's fast path writes zeros into the padding. Without it the loss is another, of nearly the same slope.
for stencil in ("central", "forward"):
    CASES.append(Case(
        f"m01 fast path {stencil}", encoder, "MeZO", dict(stencil=stencil, seed=1), 1e-3, tol=0.3, ulps=200,
        exact=False,
    ))  # fmt: skip
CASES.append(
    Case("m01 fast path FZOO", encoder, "FZOO", dict(queries=4), 1e-3, tol=0.3, ulps=200, exact=False)
)


@case("m03 autocast around the step", method="FZOO", options=dict(queries=4, seed=1), lr=1e-2, tol=0.1,
    ulps=2.0**15,
      around=lambda: torch.autocast("cpu", dtype=torch.bfloat16))  # fmt: skip
def autocast_around() -> Setup:
    net, x, y = line(16, 32, 4), torch.randn(8, 16) * 3, torch.randint(0, 4, (8,))
    return Setup(net, lambda: F.cross_entropy(net(x).float(), y))


@case("m03 the user writes weights under autocast", options=dict(stencil="forward"), eps=5e-2, tol=0.1,
    ulps=2.0**15,
      around=lambda: torch.autocast("cpu", dtype=torch.bfloat16))  # fmt: skip
def autocast_written() -> Setup:
    net, x, y = line(16, 32, 4), torch.randn(8, 16) * 3, torch.randint(0, 4, (8,))
    start = clones(net)

    def each(step: int) -> None:
        for name, p in net.named_parameters():
            p.data.copy_(start[name] * (1 + 0.5 * step))

    return Setup(net, lambda: F.cross_entropy(net(x).float(), y), each)


@case("m03 autocast inside the closure", options=dict(queries=2), eps=5e-2, tol=0.1, ulps=2.0**15)
def autocast_inside() -> Setup:
    net, x, y = line(16, 32, 4), torch.randn(8, 16) * 3, torch.randint(0, 4, (8,))

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(net(x).float(), y)

    return Setup(net, loss)


# K2: what a module keeps of theta + eps z -------------------------------------------------------------------


class Keeps(nn.Linear):
    """A layer that keeps its normalised weight in one of many places, while it is in eval mode."""

    def __init__(self, place: str) -> None:
        super().__init__(8, 8)
        self.place, self.holder, self.table = place, Holder(), {}
        self.rows: list[Tensor] = []
        if place == "buffer":
            self.register_buffer("unit", torch.zeros(8, 8), persistent=False)
            self.ready = False
        elif place == "attribute":
            self.unit = None

    def kept(self) -> Tensor | None:
        if self.place == "holder":
            return self.holder.value
        if self.place == "dictionary":
            return self.table.get("unit")
        if self.place == "list":
            return self.rows[0] if self.rows else None
        if self.place == "buffer":
            return self.unit if self.ready else None
        return getattr(self, "unit", None)

    def keep(self, unit: Tensor) -> None:
        if self.place == "holder":
            self.holder.value = unit
        elif self.place == "dictionary":
            self.table["unit"] = unit
        elif self.place == "list":
            self.rows.append(unit)
        elif self.place == "buffer":
            self.unit.copy_(unit)
            self.ready = True
        elif self.place == "setattr":
            object.__setattr__(self, "unit", unit)
        else:
            self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        unit = self.kept()
        if self.training or unit is None:
            unit = F.normalize(self.weight, dim=1)
            self.keep(unit)
        return F.linear(x, unit, self.bias)


class Holder:
    value: Tensor | None = None


# A container keeps its identity while its content changes. A refusal that names it is right too.
PLACES = ("attribute", "absent attribute", "setattr", "buffer")
INSIDE = ("holder", "dictionary", "list")


def keeps(place: str) -> Setup:
    net, x = nn.Sequential(Keeps(place), nn.Tanh(), Keeps(place), nn.Linear(8, 1)).eval(), torch.randn(4, 8)
    return Setup(net, square(net, x))


case("m04 cached weight:", over={p: p for p in PLACES}, refused="unit|ready")(keeps)
case("m04 cached weight:", over={p: p for p in INSIDE}, refused="holder|table|rows|unit|Keeps|repeat")(keeps)


@case("m04 cached property", refused="unit")
def cached_property() -> Setup:
    class Lazily(nn.Linear):
        @functools.cached_property
        def unit(self) -> Tensor:
            return F.normalize(self.weight, dim=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.unit, self.bias)

    net, x = nn.Sequential(Lazily(8, 8), nn.Tanh(), Lazily(8, 1)), torch.randn(4, 8)
    return Setup(net, square(net, x))


@case("m04 a scale from the first batch", refused="fresh|scale")
def first_batch() -> Setup:
    class ActNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fresh = True
            self.register_buffer("scale", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            if self.fresh:
                self.scale.copy_(1 / (x.std(0) + 0.1))
                self.fresh = False
            return x * self.scale

    net = nn.Sequential(nn.Linear(8, 8), ActNorm(), nn.Linear(8, 8), ActNorm(), nn.Linear(8, 1))
    x = torch.randn(6, 8)
    return Setup(net, lambda: net(x).tanh().square().mean())


KEYS: dict[str, Callable[[Tensor], Any]] = {
    "address and version": lambda w: (w.data_ptr(), w._version),
    "version": lambda w: w._version,
    "identity and version": lambda w: (id(w), w._version),
    "sum": lambda w: float(w.double().sum()),
}


@case("m07 cache by", over=KEYS)
def cache_by_key(key: Callable[[Tensor], Any]) -> Setup:
    net, x, cache = nn.Linear(8, 8), torch.randn(4, 8), {}

    def loss() -> Tensor:
        k = key(net.weight)
        if k not in cache:
            cache[k] = net.weight.t().contiguous()
        return (x @ cache[k] + net.bias).square().mean()

    return Setup(net, loss)


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    net = LlamaForCausalLM(
        LlamaConfig(**{**sizes, "num_key_value_heads": 4, "max_position_embeddings": 64, **options})
    )
    for name, p in net.named_parameters():
        p.data.mul_(5.0 if "proj" in name else 20.0 if p.dim() > 1 else 1.0)
    return net.eval()


@case("m09 dynamic rope", eps=1e-3, ulps=64, over={"new": False, "used": True})
def dynamic_rope(used: bool) -> Setup:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    net, ids = llama(max_position_embeddings=16, rope_parameters=rope), torch.randint(0, 64, (2, 40))
    if used:
        with torch.no_grad():
            net(input_ids=ids, labels=ids)
    return Setup(net, lambda: net(input_ids=ids, labels=ids).loss)


@case("m09 frequencies grow with the text", eps=1e-3, ulps=64)
def growing_text() -> Setup:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    net, text = llama(max_position_embeddings=16, rope_parameters=rope), torch.randint(0, 64, (2, 48))
    now = {"ids": text[:, :12]}

    def each(step: int) -> None:
        now["ids"] = text[:, : 12 + 16 * step]

    return Setup(net, lambda: net(input_ids=now["ids"], labels=now["ids"]).loss, each)


@case("m09 a mask that grows with the text")
def growing_mask() -> Setup:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.size = nn.Linear(8, 8), 0
            self.register_buffer("mask", torch.zeros(0, 0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] > self.size:
                self.size = x.shape[1]
                self.register_buffer("mask", torch.ones(self.size, self.size).tril(), persistent=False)
            return self.mix(self.mask[: x.shape[1], : x.shape[1]] @ x)

    net, x, now = Masked(), torch.randn(2, 9, 8), {"length": 3}
    return Setup(
        net, lambda: net(x[:, : now["length"]]).square().mean(), lambda step: now.update(length=3 + 3 * step)
    )


# K7: closures that do not repeat ----------------------------------------------------------------------------

repeats = functools.partial(case, refused="repeat|same weights", must=True)


def denoising(draw: Callable[[], Tensor]) -> Setup:
    net, x = line(9, 16, 8), torch.randn(8, 8)

    def loss() -> Tensor:
        e = draw()
        return (net(torch.cat([x + e, x[:, :1]], 1)) - e).square().mean()

    return Setup(net, loss)


def streams() -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """Sources of noise that a closure owns, each made anew."""

    def torch_stream() -> Callable[[], Tensor]:
        g = torch.Generator().manual_seed(0)
        return lambda: torch.randn(8, 8, generator=g)

    def numpy_stream() -> Callable[[], Tensor]:
        g = np.random.default_rng(0)
        return lambda: torch.tensor(g.normal(size=(8, 8)), dtype=torch.float32)

    def python_stream() -> Callable[[], Tensor]:
        g = random.Random(0)
        return lambda: torch.full((8, 8), g.random())

    def batches() -> Callable[[], Tensor]:
        it = iter(torch.linspace(0, 1, 500))
        return lambda: next(it).expand(8, 8)

    def count() -> Callable[[], Tensor]:
        calls = itertools.count(1)
        return lambda: torch.full((8, 8), float(next(calls)))

    return {f.__name__: f for f in (torch_stream, numpy_stream, python_stream, batches, count)}


@repeats("m12 K7 3 own stream:", over=streams())
def own_stream(make: Callable[[], Callable[[], Tensor]]) -> Setup:
    return denoising(make())


def in_place() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "div_": lambda x: x.div_(2),
        "index": lambda x: x[:, :1].add_(1) * x,
        "copy_": lambda x: x.copy_(x * 0.9),
    }


@repeats("m13 batch in place:", over=in_place())
def batch_in_place(change: Callable[[Tensor], Tensor]) -> Setup:
    net, x = nn.Linear(8, 1), torch.randn(4, 8)
    return Setup(net, lambda: net(change(x)).square().mean())


def prefix(how: str) -> Setup:
    net, a, b = llama(), torch.randint(0, 64, (2, 12)), torch.randint(0, 64, (2, 8))
    with torch.no_grad():
        cache = net(a, use_cache=True).past_key_values

    def loss() -> Tensor:
        if how == "whole text":
            out = net(torch.cat([a, b], 1))
        else:
            out = net(b, past_key_values=cache if how == "the cache itself" else copy.deepcopy(cache))
        return F.cross_entropy(out.logits[:, -8:-1].flatten(0, 1), b[:, 1:].flatten())

    return Setup(net, loss)


case("m14", over={n: n for n in ("whole text", "copy of the cache")}, eps=1e-3, ulps=64)(prefix)
repeats("m14", over={"the cache itself": "the cache itself"}, eps=1e-3)(prefix)


@repeats("m14 a memory of batches")
def memory_bank() -> Setup:
    net, x, bank = nn.Linear(8, 8), torch.randn(4, 8), [torch.zeros(4, 8)]

    def loss() -> Tensor:
        out = net(x)
        bank.append(x * len(bank))
        return (out @ torch.cat(bank[-3:]).T).square().mean()

    return Setup(net, loss)


# K3: what is global to the process or the thread ------------------------------------------------------------


@contextlib.contextmanager
def swapped(get: Callable[[], Any], put: Callable[[Any], Any], value: Any):
    old = get()
    put(value)
    try:
        yield
    finally:
        put(old)


LOG = logging.getLogger("zokern.test_reports")
LOCAL, STACK = threading.local(), ["bottom"]
LOCAL.depth = 0
DECIMAL = importlib.import_module("decimal")
VARIABLE = importlib.import_module("contextvars").ContextVar("where", default="outside")


@contextlib.contextmanager
def deeper():
    LOCAL.depth += 1
    STACK.append(f"level {LOCAL.depth}")
    mine = STACK[-1]
    yield
    if STACK.pop() != mine:
        raise AssertionError("contexts were left in another order than they were entered")
    LOCAL.depth -= 1


@contextlib.contextmanager
def named():
    token = VARIABLE.set("inside")
    yield
    VARIABLE.reset(token)


def contexts() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """A context manager, and a look at what it changes."""
    sdp = torch.nn.attention
    env = lambda: os.environ.get("ZOKERN_TEST_REPORTS")  # noqa: E731
    return {
        "sdpa_kernel": (lambda: sdp.sdpa_kernel(sdp.SDPBackend.MATH), torch.backends.cuda.flash_sdp_enabled),
        "catch_warnings": (lambda: warnings.catch_warnings(action="ignore") if sys.version_info >= (3, 11)
                           else warnings.catch_warnings(), lambda: list(warnings.filters)),
        "default dtype": (lambda: swapped(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
                          torch.get_default_dtype),
        "default device": (lambda: torch.device("cpu"), lambda: torch.get_default_device()),
        "mkldnn": (lambda: torch.backends.mkldnn.flags(enabled=False), lambda: torch.backends.mkldnn.enabled),
        "stdout": (lambda: contextlib.redirect_stdout(io.StringIO()), lambda: id(sys.stdout)),
        "autocast": (lambda: torch.autocast("cpu", enabled=False), lambda: torch.is_autocast_enabled("cpu")),
        "enable_grad": (torch.enable_grad, torch.is_grad_enabled),
        "inference_mode": (torch.inference_mode, torch.is_inference_mode_enabled),
        "deterministic": (
            lambda: swapped(
                torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
            torch.are_deterministic_algorithms_enabled),
        "matmul precision": (
            lambda: swapped(
                torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
            torch.get_float32_matmul_precision),
        "fork_rng": (lambda: torch.random.fork_rng(devices=[]), lambda: torch.get_rng_state().tolist()),
        "detect_anomaly": (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
        "saved tensors": (lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
            lambda: None),
        "numpy errors": (lambda: np.errstate(all="ignore"), np.geterr),
        "log level": (lambda: swapped(lambda: LOG.level, LOG.setLevel, logging.ERROR), lambda: LOG.level),
        "environment": (
            lambda: swapped(env, lambda v: os.environ.pop("ZOKERN_TEST_REPORTS", None) if v is None
                            else os.environ.update(ZOKERN_TEST_REPORTS=v), "1"),
            env),
        "recursion limit": (lambda: swapped(sys.getrecursionlimit, sys.setrecursionlimit, 5000),
            sys.getrecursionlimit),
        "decimal": (DECIMAL.localcontext, lambda: id(DECIMAL.getcontext())),
        "context variable": (named, VARIABLE.get),
        "thread's own stack": (deeper, lambda: (LOCAL.depth, *STACK)),
    }  # fmt: skip


def in_context(layers: int, what: tuple[Callable[[], Any], Callable[[], Any]]) -> Setup:
    context, look = what
    net, x = line(*[300] * (layers + 1)), torch.randn(4, 300)

    def loss() -> Tensor:
        with context():
            return net(x).float().square().mean().detach()

    return Setup(net, loss, look=look)


for layers in (1, 2):  # with greenlets, an odd number of large matrices hid what an even one showed
    case(
        f"m15 {layers} in", over=contexts(), method="SubZero", options=dict(reshape="none"), eps=1e-3, ulps=64
    )(functools.partial(in_context, layers))


@case("m15 a module's own depth", refused="depth")
def depth() -> Setup:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.depth = line(300, 300), 0

        def forward(self, x: Tensor) -> Tensor:
            self.depth += 1
            out = self.body(x) * self.depth
            self.depth -= 1
            return out

    net, x = Deep(), torch.randn(4, 300)
    return Setup(net, square(net, x), look=lambda: net.depth)


LOCKS = {f.__name__: f for f in (threading.Lock, threading.RLock, threading.Semaphore, threading.Condition)}


@case("m16", over=LOCKS, method="SubZero", options=dict(reshape="none"), eps=1e-3, ulps=64)
def locked(make: Callable[[], Any]) -> Setup:
    lock, net, x = make(), nn.Linear(300, 300), torch.randn(4, 300)

    def loss() -> Tensor:
        if not lock.acquire(timeout=0.5):
            raise AssertionError("the lock is held by the same step")
        try:
            return net(x).square().mean()
        finally:
            lock.release()

    return Setup(net, loss)


# K4, D1: the rows of a batch --------------------------------------------------------------------------------


class ByBatch(nn.Module):
    """One norm for the whole batch."""

    def __init__(self, scale: float = 20.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x / x.norm()


@case("m18 rows mix in 16 bits", options=dict(queries=4), tol=0.2, ulps=2.0**13)
def rows_mix_in_16_bits() -> Setup:
    net = nn.Sequential(nn.Linear(64, 1100), ByBatch(200.0), nn.Tanh(), nn.Linear(1100, 2)).bfloat16()
    x, y = torch.randn(32, 64).bfloat16(), torch.randint(0, 2, (32,))
    return Setup(net, zokern.Objective(net, x, lambda out, _: F.cross_entropy(out.float(), y)))


@case(
    "m18 rows mix",
    options=dict(queries=2),
    over={"by a norm": ByBatch, "by batch statistics": lambda: nn.BatchNorm1d(32)},
)
def rows_mix(layer: Callable[[], nn.Module]) -> Setup:
    net = nn.Sequential(nn.Linear(16, 32), layer(), nn.Tanh(), nn.Linear(32, 2))
    x, y = torch.randn(8, 16), torch.randint(0, 2, (8,))
    return Setup(net, zokern.Objective(net, x, lambda out, _: F.cross_entropy(out, y)))


@case(
    "K4 rows mix from the second batch on", options=dict(queries=2), over={"mode": "mode", "length": "length"}
)
def rows_mix_later(by: str) -> Setup:
    class Later(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mixes = self.training if by == "mode" else x.shape[0] > 4
            return 4 * x / x.norm() if mixes else x / 2

    net = nn.Sequential(nn.Linear(16, 32), Later(), nn.Tanh(), nn.Linear(32, 2)).eval()
    x, now = torch.randn(16, 16), {}

    def each(step: int) -> None:
        now["x"] = x[: 4 + 4 * step] if by == "length" else x
        net.train(by == "mode" and step > 0)

    each(0)
    return Setup(net, lambda: zokern.Objective(net, now["x"], lambda out, _: out.square().mean())(), each)


class Shelf(nn.Module):
    """A forward that leaves an activation on the module and reads it back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(300, 10)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = torch.tanh(self.a(x))
        return self.o(torch.tanh(self.b(x)) + self.kept)


def shelf(dtype: torch.dtype) -> Setup:
    net, x, y = Shelf().to(dtype), torch.randn(16, 300).to(dtype), torch.randint(0, 10, (16,))
    return Setup(net, lambda: F.cross_entropy(8 * net(x).float(), y), look=lambda: "kept" in vars(net))


case("m19 shelf in 16 bits", eps=1e-2, tol=0.1, ulps=2.0**13)(functools.partial(shelf, torch.bfloat16))
case("m19 shelf", eps=1e-3, ulps=64)(functools.partial(shelf, torch.float32))


class Positions(nn.Module):
    """Words and positions added, as in nanoGPT. The positions are no rows of the batch."""

    def __init__(self, length: int, width: int = 96) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(80, width), nn.Embedding(length, width)
        self.mid, self.out = nn.Linear(width, width), nn.Linear(width, 80)
        self.length = length

    def forward(self, idx: Tensor, position: Tensor | None = None) -> Tensor:
        p = self.wpe(torch.arange(self.length) if position is None else position)
        return self.out(torch.tanh(self.mid(self.wte(idx) + p)))


def batch_of(order: str, idx: Tensor, length: int) -> Any:
    position = {"(1, T)": torch.arange(length)[None], "(T,)": torch.arange(length)}
    return {"position": position[order], "idx": idx} if order in position else {"idx": idx}


@case("D1 positions", method="MeZO", eps=1e-3, ulps=64, over={o: o for o in ("inside", "(1, T)", "(T,)")})
@case("D1 SubZero positions", method="SubZero", options=dict(reshape="none", seed=2), eps=3e-3, ulps=64,
      over={o: o for o in ("inside", "(1, T)", "(T,)")})  # fmt: skip
def positions(order: str) -> Setup:
    net, idx = Positions(64), torch.randint(0, 80, (4, 64))
    batch = batch_of(order, idx, 64)
    return Setup(
        net,
        zokern.Objective(net, batch, lambda out, b: F.cross_entropy(out.flatten(0, 1), b["idx"].flatten())),
    )


TABLES: dict[str, Callable[[Tensor, nn.Linear, Tensor], Tensor]] = {
    "a table through a layer": lambda h, layer, table: torch.tanh(h @ layer(table).T),
    "a table that is added": lambda h, layer, table: layer(h) @ table.T + table.sum(1),
    "a mean of a table": lambda h, layer, table: layer(h) * layer(table).mean(0),
    "a block of rows": lambda h, layer, table: layer(h[: h.shape[0] // 2]) * layer(table).mean(0),
}


@case("D1", method="SubZero", options=dict(reshape="none"), over=TABLES, eps=3e-3, ulps=64)
@case("D1 MeZO", options=dict(seed=1), over=TABLES, eps=3e-3, ulps=64)
def table(use: Callable[[Tensor, nn.Linear, Tensor], Tensor]) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.layer = nn.Linear(64, 300), nn.Linear(300, 300)
            self.table = nn.Parameter(torch.randn(10, 300))

        def forward(self, x: Tensor) -> Tensor:
            return use(torch.tanh(self.a(x)), self.layer, self.table)

    net, x = Net(), torch.randn(8, 64)
    return Setup(net, zokern.Objective(net, x, lambda out, _: out.square().mean()))


# K5: Python that torch calls while one of its functions runs ------------------------------------------------


class Act(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, w):
        ctx.save_for_backward(t, w)
        return (t * w).tanh()

    @staticmethod
    def backward(ctx, g):
        t, w = ctx.saved_tensors
        return g * w / (t * w).cosh() ** 2, None


def kept_on_disk(t: Tensor, w: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda s: s.numpy().copy(), torch.from_numpy):
        return (t * w).tanh()


def hooked(t: Tensor, w: Tensor) -> Tensor:
    out = (t * 1.3).tanh()
    out.register_hook(lambda g: g * w)
    return out


GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda t, w: (t * w).tanh(),
    "checkpoint": lambda t, w: checkpoint(lambda u: (u * w).tanh(), t, use_reentrant=False),
    "own Function": Act.apply,
    "saved tensors hooks": kept_on_disk,
    "gradient hook": hooked,
}


@case("m25 gradient by inputs:", over=GRADIENTS)
def gradient_by_inputs(f: Callable[[Tensor, Tensor], Tensor]) -> Setup:
    w, x = nn.Parameter(torch.rand(8) + 0.5), torch.randn(4, 8)

    def loss() -> Tensor:
        with torch.enable_grad():
            t = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(f(t, w).sum(), t)
        return (g + 0 * w.detach()).square().mean()

    return Setup([("w", w)], loss)


FUNCTIONAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad": lambda t, w: torch.func.grad(lambda u: (u * w).tanh().sum())(t),
    "jvp": lambda t, w: torch.func.jvp(lambda u: (u * w).tanh(), (t,), (torch.ones_like(t),))[1],
    "jacobian": lambda t, w: torch.autograd.functional.jacobian(lambda u: (u * w).tanh().sum(0), t).sum(
        (0, 1)
    ),
    "vmap": lambda t, w: torch.vmap(lambda row: (row * w).tanh())(t),
}


@case("m25 torch.func by inputs:", over=FUNCTIONAL)
def functional_by_inputs(f: Callable[[Tensor, Tensor], Tensor]) -> Setup:
    w, x = nn.Parameter(torch.rand(8) + 0.5), torch.randn(4, 8)
    return Setup([("w", w)], lambda: f(x, w).square().mean())


def captured() -> dict[str, Callable[..., Tensor]]:
    from torch.nn.attention.flex_attention import flex_attention

    def distance(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        return ((a - b) * w).square().sum(-1)

    return {
        "flex_attention": lambda q, k, v, w, b: flex_attention(
            q, k, v, score_mod=lambda s, n, h, i, j: s + b[i - j + 15]
        ),
        "vmap over the parameter": lambda q, k, v, w, b: (
            torch.vmap(lambda r: (q * r).sum())(w).tanh() + b[:16]
        ),
        "grad by the parameter": lambda q, k, v, w, b: (
            torch.func.grad(lambda t: (q * t).tanh().sum())(w) + b[:16]
        ),
        "jacrev by the parameter": lambda q, k, v, w, b: (
            torch.func.jacrev(lambda t: (q[0, 0] * t).tanh().sum(0))(w).sum(0) + b[:16]
        ),
        "distance function": lambda q, k, v, w, b: (
            F.triplet_margin_with_distance_loss(
                q, k, v, distance_function=lambda s, t: distance(s, t, w), reduction="none"
            )
            + b[0]
        ),
    }


@case("m26", over=captured())
def captured_use(f: Callable[..., Tensor]) -> Setup:
    q, k, v = (torch.randn(1, 2, 16, 16) for _ in range(3))
    b, w = nn.Parameter(torch.randn(31) * 0.3), nn.Parameter(torch.rand(16) + 0.5)
    u = torch.linspace(0.5, 2, 16)
    return Setup([("bias", b), ("w", w)], lambda: (f(q, k, v, w, b) * u).square().mean() + 0 * w.sum())


# K6: a parameter that leaves torch's sight, and is also read in it ------------------------------------------

Pair = collections.namedtuple("Pair", "first second")


@torch.jit.script
def scripted(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return h @ w.t()


def sparse(w: Tensor) -> Tensor:
    return w.to_sparse().to_dense()


LEAVES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda w: w,
    "Parameter": lambda w: nn.Parameter(w),
    "as_subclass": lambda w: w.as_subclass(torch.Tensor),
    "torch.Tensor": lambda w: torch.Tensor(w),
    "dlpack": lambda w: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(w.detach())),
    "named tuple": lambda w: torch.stack(Pair(w, w))[0],
    "nested tensor": lambda w: torch.nested.nested_tensor([w]).to_padded_tensor(0)[0],
    "data": lambda w: w.data,
    "detach": lambda w: w.detach(),
    "numpy": lambda w: torch.from_numpy(w.detach().numpy()),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "deepcopy": lambda w: copy.deepcopy(w),
    "as_tensor": lambda w: torch.as_tensor(w),
    "asarray": lambda w: torch.tensor(np.asarray(w.detach())),
    "list of rows": lambda w: torch.stack(list(w)),
    "save and load": lambda w: reloaded(w),
    "sparse": sparse,
    "set_": lambda w: torch.empty(0).set_(w.detach()),
    "as_strided": lambda w: torch.as_strided(w, (20, 8), (8, 1)),
    "storage": lambda w: torch.empty(0).set_(w.untyped_storage(), w.storage_offset(), (20, 8)),
}


def reloaded(w: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(w.detach(), file)
    return torch.load(io.BytesIO(file.getvalue()))


@case("m27 tied, as", over=LEAVES)
def leaves(f: Callable[[Tensor], Tensor]) -> Setup:
    w, ids = nn.Parameter(torch.randn(20, 8) * 0.5), torch.randint(0, 20, (6,))
    return Setup(
        [("w", w)], lambda: F.cross_entropy(F.linear(torch.tanh(F.embedding(ids, w)), f(w)), ids.flip(0))
    )


@case("m27 tied, in a scripted function")
def leaves_scripted() -> Setup:
    w, ids = nn.Parameter(torch.randn(20, 8) * 0.5), torch.randint(0, 20, (6,))
    return Setup(
        [("w", w)], lambda: F.cross_entropy(scripted(torch.tanh(F.embedding(ids, w)), w), ids.flip(0))
    )


@case(
    "m27 a TorchScript module",
    over={"scripted": torch.jit.script, "traced": lambda n: torch.jit.trace(n, torch.ones(4, 8))},
)
def script_module(convert: Callable[[nn.Module], nn.Module]) -> Setup:
    net, x = line(8, 8, 1), torch.randn(4, 8)
    whole = nn.ModuleDict({"a": convert(net), "b": nn.Linear(8, 1)})
    return Setup(whole, lambda: (whole["a"](x) * whole["b"](x)).square().mean())


# K10, K12, K13: buffers, flags that write, modules that touch themselves ------------------------------------

WRITES = r"writ|chang|in.?place|max_norm"


def layers() -> dict[str, Callable[[], nn.Module]]:
    return {
        "Embedding": lambda: nn.Embedding(50, 8, max_norm=1.0),
        "EmbeddingBag": lambda: nn.EmbeddingBag(50, 8, mode="sum", max_norm=1.0),
    }


@case("m28 max_norm", over=layers(), refused=WRITES)
def max_norm(make: Callable[[], nn.Module]) -> Setup:
    ids, net, u = torch.randint(0, 50, (6, 4)), make(), torch.linspace(0.5, 2, 8)
    return Setup(net, lambda: (net(ids) * u).tanh().square().mean())


@case(
    "m28 inplace",
    over={"relu": F.relu, "leaky_relu": F.leaky_relu, "elu": F.elu, "dropout": F.dropout},
    refused=WRITES,
)
def inplace_flag(f: Callable[..., Tensor]) -> Setup:
    w, x = nn.Parameter(torch.randn(8, 8)), torch.randn(4, 8)
    options = dict(inplace=True) if f is not F.dropout else dict(inplace=True, p=0.0)
    return Setup([("w", w)], lambda: (x @ f(w, **options)).square().mean())


@case("K10 batch statistics in train mode",
    over={"BatchNorm": lambda: nn.BatchNorm1d(8), "InstanceNorm": lambda: nn.Sequential(
      nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten())})  # fmt: skip
def statistics(layer: Callable[[], nn.Module]) -> Setup:
    net, x = nn.Sequential(nn.Linear(16, 8), layer(), nn.Tanh(), nn.Linear(8, 1)), torch.randn(12, 16) * 3 + 5
    return Setup(net, square(net, x), look=lambda: [b.tolist() for b in net.buffers()])


@case(
    "K10 spectral norm",
    over={"parametrization": nn.utils.parametrizations.spectral_norm, "hook": nn.utils.spectral_norm},
)
def spectral(norm: Callable[[nn.Module], nn.Module]) -> Setup:
    net, x = nn.Sequential(norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 1)), torch.randn(4, 8)
    return Setup(net, square(net, x), look=lambda: [b.tolist() for b in net.buffers()])


@case("m37 offloaded frozen weights")
def offloaded() -> Setup:
    accelerate = pytest.importorskip("accelerate", reason="the report is about accelerate's hooks")
    net = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(4, 8)
    accelerate.cpu_offload(net[0], execution_device="cpu")
    return Setup(net, square(net, x))


SELF: dict[str, Callable[[nn.Linear, Tensor], Any]] = {
    "to(dtype)": lambda layer, x: layer.to(x.dtype),
    "to(device)": lambda layer, x: layer.to(x.device),
    "float()": lambda layer, x: layer.float(),
    "cpu()": lambda layer, x: layer.cpu(),
    "train and eval": lambda layer, x: layer.eval().train(),
    "share_memory": lambda layer, x: layer.requires_grad_(True),
}


@case("m38 a module that casts itself:", over=SELF)
def router(cast: Callable[[nn.Linear, Tensor], Any]) -> Setup:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.classifier = cast(self.classifier, x)
            return self.classifier(x)

    net, x = Router(), torch.randn(4, 8)
    return Setup(net, square(net, x))


@case("K13 a frozen weight that is loaded at each forward")
def frozen_loaded() -> Setup:
    net = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(4, 8)
    disk = net[0].weight.detach().clone()

    def load(module: nn.Module, _: Any) -> None:
        module.weight = nn.Parameter(disk.clone(), requires_grad=False)

    net[0].register_forward_pre_hook(load)
    return Setup(net, square(net, x))


@case("m42 a model that rescales its weights", refused=WRITES + "|rescale", eps=3e-3, ulps=64)
def rescaled() -> Setup:
    from transformers import RwkvConfig, RwkvForCausalLM

    sizes = dict(
        vocab_size=100, hidden_size=32, num_hidden_layers=4, rescale_every=2, attention_hidden_size=32
    )
    net = RwkvForCausalLM(RwkvConfig(**sizes, intermediate_size=64)).eval()
    ids = torch.randint(0, 100, (2, 9))
    return Setup(net, lambda: net(input_ids=ids, labels=ids).loss)


# K11 and the names of z -------------------------------------------------------------------------------------


@case("K11 a child that is called as a wrapper's is")
def called_module() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = nn.Linear(8, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.module(x)))

    net, x = Net(), torch.randn(4, 8)
    return Setup(net, square(net, x))
