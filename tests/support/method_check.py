"""A method's steps against its formula in float64: losses, coefficients and weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from models import batch, tiny
from recipes import METHODS, Formula
from torch import Tensor
from torch.func import functional_call

import zokern

IDS = batch()
ROUNDINGS = 40  # 2^-24 of the size of what is summed: ranks of 3, a few queries, and factors that are rounded themselves


def loss_of(call: Callable, ids: Tensor = IDS) -> Tensor:
    logits = call(ids)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def check_method(name: str, steps: int = 5, weight_decay: float = 0.0, width: int = 16, seed: int = 5, **options) -> None:
    """Steps of a float32 model against the method on paper; AssertionError when anything differs."""
    model = tiny(width=width)
    double = copy.deepcopy(model).double()
    optimizer = METHODS[name](model, weight_decay=weight_decay, seed=seed, **options)
    formula = Formula.of(optimizer, model)
    group = optimizer.param_groups[0]
    if options.get("evaluation") == "inplace":  # weights go out and come back
        formula.size = {n: size + 4 * group["eps"] for n, size in formula.size.items()}
    for step in range(steps):
        result = zokern.step(optimizer, lambda: loss_of(model))
        group = optimizer.param_groups[0]
        for query, sides in enumerate(result.losses):
            with torch.no_grad():
                points = formula.points(step, query, group["eps"])
                assert len(points) == len(sides), f"step {step}: {len(sides)} losses, not {len(points)}"
                for i, (weights, got) in enumerate(zip(points, sides)):
                    want = float(loss_of(lambda ids, weights=weights: functional_call(double, weights, (ids,))))
                    assert abs(got - want) <= 1e-6 * want, f"step {step}, query {query}, side {i}: {got} against {want}"
        assert max(max(sides) - min(sides) for sides in result.losses) > 3e-5, "sides too close together to be told apart"
        for got, want in zip(result.coefficients, formula.coefficients(result.losses, group["eps"], step)):
            assert math.isclose(got, want, rel_tol=1e-6), f"step {step}: coefficient {got} against {want}"
        formula.update(result.coefficients, step, group["lr"], weight_decay)
        with optimizer.evaluating():
            now = {n: (p + 0).double() for n, p in model.named_parameters()}
        for n, want in formula.theta.items():
            ratio = ((now[n] - want).abs() / (ROUNDINGS * 2.0**-24 * formula.size[n] + 1e-12)).max().item()
            assert ratio <= 1.0, f"step {step}: {n} is {ratio:.3g} times the bound away from the formula"
