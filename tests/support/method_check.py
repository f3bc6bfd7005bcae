"""A method's steps against its formula in float64: losses, coefficients and weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from models import batch, next_token_loss, same_bits, snapshot, tiny
from paper import Paper, Read, Slope, script
from recipes import METHODS, ROWS, Formula
from torch import Tensor, nn
from torch.func import functional_call

import zokern

IDS = batch()
# 2^-24 of the size of what is summed: ranks of 3, a few queries, and factors that are rounded themselves
ROUNDINGS = 40


def examples_of(call: Callable, ids: Tensor = IDS) -> Tensor:
    """The loss of each row."""
    logits = call(ids)
    return (
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        .view(len(ids), -1)
        .mean(1)
    )


def loss_of(call: Callable, ids: Tensor = IDS) -> Tensor:
    return examples_of(call, ids).mean()


def check_resume(
    make: Callable[[nn.Module], Any], steps: int, after: int, build: Callable[[], nn.Module] | None = None,
    closure: Callable[[nn.Module], Callable[[], Tensor]] | None = None,
    again: Callable[[nn.Module], Any] | None = None,
) -> None:  # fmt: skip
    """A run that is saved and loaded after some steps ends with the bits of one that is not;
    AssertionError for others.

    again  makes the optimizer that the state is loaded into; None: make"""
    ends = []
    for resumed in (False, True):
        model = build() if build else tiny(torch.bfloat16)
        optimizer = make(model)
        for step in range(steps):
            if step == after and resumed:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = (again or make)(model)
                optimizer.load_state_dict(state)
            zokern.step(
                optimizer, closure(model) if closure else lambda model=model: next_token_loss(model(IDS), IDS)
            )
        ends.append(snapshot(model))
    assert all(same_bits(ends[0][n], ends[1][n]) for n in ends[0])


def check_stencil(stencil: zokern.Stencil) -> None:
    """A difference at n offsets is exact for polynomials of degree n - 1; AssertionError for others.

    The formula takes the weights from the method, and cannot tell whether these are the ones meant."""
    for power in range(len(stencil.offsets)):
        moment = math.fsum(w * o**power for w, o in zip(stencil.weights, stencil.offsets))
        assert math.isclose(moment, float(power == 1), abs_tol=1e-9), (
            f"stencil {stencil.name!r}: sum of weights * offsets^{power} is {moment:.3g}"
        )


def check_method(
    name: str, steps: int = 5, weight_decay: float = 0.0, width: int = 16, seed: int = 5, **options
) -> None:
    """Steps of a float32 model against the method on paper; AssertionError when anything differs."""
    model = tiny(width=width)
    double = copy.deepcopy(model).double()
    optimizer = (METHODS | ROWS)[name](model, weight_decay=weight_decay, seed=seed, **options)
    if (stencil := getattr(optimizer.estimator, "stencil", None)) is not None:
        check_stencil(stencil)
    formula, loss = Formula.of(optimizer, model), examples_of if name in ROWS else loss_of
    formula.loss = lambda weights: loss_of(lambda ids: functional_call(double, weights, (ids,)))
    if options.get("evaluation") == "inplace":  # weights go out and come back
        formula.size = {n: size + 4 * optimizer.param_groups[0]["eps"] for n, size in formula.size.items()}
    spreads = []
    for step in range(steps):
        result = zokern.step(optimizer, lambda: loss(model))
        alone = all(len(sides) == 1 for sides in result.losses)  # slopes are no differences of losses
        spreads.append(math.inf if alone else max(max(sides) - min(sides) for sides in result.losses))
        group = optimizer.param_groups[0]  # as they are in this step: a method may have a schedule
        count = sum(t.numel() for t in formula.theta.values())
        began = 0 if optimizer.factored is None else formula.basis_step(step)
        paper = Paper(step, seed, group["eps"], group["lr"], count, began, formula.memory)
        check_step(formula, result, paper, double, weight_decay)
        with optimizer.evaluating():
            now = {n: (p + 0).double() for n, p in model.named_parameters()}
        for n, want in formula.theta.items():
            ratio = ((now[n] - want).abs() / (ROUNDINGS * 2.0**-24 * formula.size[n] + 1e-12)).max().item()
            assert ratio <= 1.0, f"step {step}: {n} is {ratio:.3g} times the bound away from the formula"
    assert sorted(spreads)[steps // 2] > 3e-5, "sides too close together to be told apart"


def check_step(
    formula: Formula, result: zokern.StepResult, paper: Paper, double: nn.Module, weight_decay: float
) -> None:
    """What a step read and found, in the order in which the estimator asks on paper;
    moves the formula's weights."""
    losses = iter([loss for sides in result.losses for loss in sides])
    named, answer = iter(zip(result.draws, result.coefficients)), None
    asks = script(formula.optimizer.estimator, paper, tuple(formula.theta))
    while (asked := asks.send(answer) if answer is not None else next(asks, None)) is not None:
        if isinstance(asked, Slope):
            want, got = float(formula.loss(formula.theta)), next(losses)
            assert abs(got - want) <= 1e-6 * want, f"step {paper.step}, theta: {got} against {want}"
            answer = formula.slope(asked.draw, asked.scope)
            continue
        if isinstance(asked, Read):
            weights = formula.moved(asked.terms, paper.eps, asked.scope, paper.step, asked.anchored)
            with torch.no_grad():
                rows = examples_of(
                    lambda ids, weights=weights: functional_call(double, weights, (ids,))
                ).tolist()
            want = math.fsum(rows) / len(rows)
            got = next(losses) if asked.recorded else want
            assert abs(got - want) <= 1e-6 * want, f"step {paper.step}, {asked.terms}: {got} against {want}"
            answer = rows if asked.rows else got
            continue
        found = [next(named) for _ in asked.draws]
        assert [draw for draw, _ in found] == asked.draws, (
            f"step {paper.step}: coefficient of {found}, not of {asked.draws}"
        )
        for (_, got), want in zip(found, asked.coefficients):
            near = math.isclose(got, want, rel_tol=asked.apart[0], abs_tol=asked.apart[1])
            assert near, f"step {paper.step}: coefficient {got} against {want}"
        formula.update(asked, [c for _, c in found], paper.lr, weight_decay)
        answer = None
    assert next(losses, None) is None and next(named, None) is None, (
        f"step {paper.step}: a coefficient or a loss more than on paper"
    )
