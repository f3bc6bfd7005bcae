"""The torch face: a zeroth-order optimizer is a torch.optim.Optimizer with param groups, schedulers and a state_dict."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, directions, estimator, evaluation, parameters
from .evaluation import Group, Plan, Reading
from .evaluation.surroundings import check_structure
from .factorized import Factorized
from .rule import Rule, Sgd, check_basis
from .step import StepResult, finite_number, run
from .stream import VERSION, check_seed
from .warning import warn

SAMPLE = 512  # elements per tensor in the samples that detect dead perturbations and dead updates


class ZerothOrder(Factorized, torch.optim.Optimizer):
    """What all methods share: names and ids, the plan of a step, counters, state. Methods are files in zokern/methods."""

    result: StepResult | None = None  # of the last step

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        eps: float,
        weight_decay: float = 0.0,
        queries: int = 1,
        seed: int = 0,
        rounding: str = "nearest",
        evaluation: str | evaluation.Evaluation = "scratch",
        backend: str | backends.Backend | None = None,
        direction: str | directions.Direction | directions.Factored = "normal",
        rule: Rule | None = None,
        defer: bool | None = None,
        stencil: str | estimator.Stencil = "central",
        maximize: bool = False,
        clip: float | None = None,
        normalize: str = "none",
        paired_check: int = 0,
        max_skips: int = 10,
        dead_limit: int | None = 20,
        nonfinite: str = "raise",
        force: bool = False,
    ) -> None:
        self.model = params if isinstance(params, nn.Module) else None
        if self.model is not None and _resolve_evaluation(evaluation).name != "walk":
            parameters.check_model(self.model)
        self.seed = check_seed(seed)
        self.queries = queries
        if not isinstance(queries, int) or isinstance(queries, bool) or not 1 <= queries < 2**24:
            raise ValueError(f"queries is {queries!r}; expected an integer, 1 <= queries < 2**24")
        if rounding not in backends.ROUNDINGS:
            raise ValueError(f"rounding is {rounding!r}; expected one of {list(backends.ROUNDINGS)}")
        if normalize not in ("none", "std"):
            raise ValueError(f"normalize is {normalize!r}; expected 'none' or 'std'")
        if nonfinite not in ("raise", "ignore"):
            raise ValueError(f"nonfinite is {nonfinite!r}; expected 'raise' or 'ignore'")
        self.rounding, self.normalize = rounding, normalize
        self.evaluation = _resolve_evaluation(evaluation)
        self.backend = backend
        if isinstance(backend, str):
            backends.get(backend)
        factored = not isinstance(direction, str) and hasattr(direction, "draws")
        self.factored: directions.Factored | None = direction if factored else None  # type: ignore[assignment]
        self.direction = directions.resolve(direction.dense if factored else direction)  # type: ignore[union-attr,arg-type]
        self.rule: Rule = Sgd() if rule is None else rule
        check_basis(self.rule, self.factored)
        self.defer = defer
        self.matrices: dict[int, directions.Matrix] = {}
        self._groups: list[Group] = []
        self.stencil = estimator.resolve(stencil)
        self.maximize, self.force, self.nonfinite = bool(maximize), force, nonfinite
        self.clip = None if clip is None else finite_number("clip", clip, above=0.0)
        self.paired_check, self.max_skips, self.dead_limit = paired_check, max_skips, dead_limit
        self.steps = self.skips = self.dead = 0
        self.ids, self.salted = parameters.ids(
            [name for name, _ in self.model.named_parameters()] if self.model is not None else []
        )
        self._lock = threading.Lock()
        self._entries: list[list[parameters.Trained]] = []
        self._checked: set[int] = set()
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        groups = parameters.named_groups(params)
        if not any(group["params"] for group in groups):
            raise ValueError("params holds no trainable parameter; set requires_grad on what is to be trained")
        super().__init__(groups, defaults)
        if self.factored is not None and self.model is not None:
            self.watch(self.model)

    # Groups and state ---------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; a group without names continues the numbering param.N. Refuses what cannot be trained, by name."""
        (group,) = parameters.named_groups([param_group])
        names_of = {id(p): name for name, p in self.model.named_parameters()} if self.model is not None else {}
        known = sum(len(entries) for entries in self._entries)
        if known and all(name == f"param.{i}" for i, (name, _) in enumerate(group["params"])):
            group["params"] = [(names_of.get(id(p), f"param.{known + i}"), p) for i, (_, p) in enumerate(group["params"])]
        _check_options({**self.defaults, **group})
        names = [name for name, _ in group["params"]]
        taken = set(self._known())
        if len(set(names)) != len(names) or taken & set(names):
            raise ValueError(f"parameter names are not unique: {sorted(n for n in names if names.count(n) > 1 or n in taken)}")
        self.ids, salted = parameters.ids(names, self.ids)
        self.salted.update(salted)
        entries = parameters.trained(group["params"], self.ids)
        parameters.check_overlap([(e.name, e.tensor) for known in [*self._entries, entries] for e in known])
        group["params"] = [(entry.name, entry.tensor) for entry in entries]
        super().add_param_group(group)
        self._entries.append(entries)

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict plus ``zokern``: stream version, seed and step, so that a resumed run draws the same z.

        Writes what waits (see flush): a run that resumes from it has the bits of the run that saved and went on."""
        self.flush()
        state = super().state_dict()
        state["zokern"] = {
            "stream": VERSION, "seed": self.seed, "step": self.steps, "skips": self.skips, "dead": self.dead,
            "evaluation": getattr(self.evaluation, "choice", None),
        }  # fmt: skip
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume: options, seed, step number and residuals. Refuses another stream version and other parameter names."""
        state_dict = dict(state_dict)
        own = state_dict.pop("zokern", None)
        if own is None:
            raise ValueError("state_dict has no entry 'zokern'; expected the state_dict of a zokern optimizer")
        if own["stream"] != VERSION:
            raise ValueError(f"state_dict was written with stream version {own['stream']}; this zokern draws version {VERSION}")
        saved = [name for group in state_dict["param_groups"] for name in group.get("param_names", [])]
        here = [name for group in self.param_groups for name in group["param_names"]]
        if saved != here:
            missing, extra = sorted(set(saved) - set(here)), sorted(set(here) - set(saved))
            raise ValueError(
                f"state_dict names other parameters: missing here {missing}, not in it {extra}, or in another order"
            )
        super().load_state_dict(state_dict)
        order = [p for group in self.param_groups for p in group["params"]]
        for index, values in state_dict["state"].items():  # torch casts state to the parameter's dtype
            for key, value in values.items():
                if isinstance(value, Tensor):
                    self.state[order[index]][key] = value.to(order[index].device, copy=True)
        self.matrices.clear()
        self._groups = []  # what waited belongs to the run that is left
        self.seed, self.steps, self.skips, self.dead = own["seed"], own["step"], own["skips"], own["dead"]
        if hasattr(self.evaluation, "choice"):
            self.evaluation.choice = own.get("evaluation")

    # One step -----------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """One step; returns the mean loss. zokern.step(optimizer, closure) returns the whole record."""
        if closure is None:
            raise TypeError("step() needs a closure that computes the loss: it is read at more than one point")
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("step in progress: a step was started inside the closure of another, or in a second thread")
        try:
            self.result = run(self, closure)
            self.steps += 1
        finally:
            self._lock.release()
        return self.result.loss

    def plan(self) -> Plan:
        """The checked work of this step. Raises before anything is touched."""
        if self.steps >= 2**32:
            raise ValueError(f"step number {self.steps} does not fit the stream's 32 bits; continue with another seed")
        if self.model is not None:
            check_structure(self.model, self._known())
        groups: list[Group] = []
        aliases: dict[int, tuple[int, int]] = {}
        for options, entries in zip(self.param_groups, self._entries):
            _check_options(options)
            by_device: dict[torch.device, list[parameters.Trained]] = {}
            for entry in entries:
                if entry.tensor.requires_grad:
                    by_device.setdefault(entry.tensor.device, []).append(entry)
            for device, everything in by_device.items():
                for entry in everything:
                    if id(entry.tensor) not in self._checked:
                        parameters.check_parameter(entry.name, entry.tensor)
                        self._checked.add(id(entry.tensor))
                found = [self._matrix(entry) for entry in everything]
                dense = [entry for entry, matrix in zip(everything, found) if matrix is None]
                factored = [(entry, matrix) for entry, matrix in zip(everything, found) if matrix is not None]
                for members, matrices in ((dense, None), ([e for e, _ in factored], [m for _, m in factored])):
                    if not members:
                        continue
                    for i, entry in enumerate(members):
                        aliases[id(entry.tensor)] = (len(groups), i)
                    groups.append(
                        Group(
                            [e.name for e in members],
                            [e.tensor for e in members],
                            [backends.Span(e.who) for e in members],
                            [self._residual(e.tensor) for e in members] if self.rounding == "residual" else None,
                            float(options["eps"]),
                            options,
                            backends.resolve(self.backend, device),
                            matrices,
                        )
                    )
        if not groups:
            raise ValueError("no parameter requires a gradient any more: nothing to train in this step")
        plan = Plan(
            groups,
            self.direction,
            self.stencil,
            self.queries,
            self.seed,
            self.steps,
            self.rounding,
            self.model,
            aliases,
            self.factored,
        )
        if [group.names for group in self._groups] != [group.names for group in groups]:
            self.flush()  # what is trained has changed: the updates that wait belong to the old groups
        self._groups = groups
        self._tie(plan)
        if self.result is None:
            self._check_dead_perturbation(plan)
        return plan

    def _known(self) -> dict[str, Tensor]:
        """Every name that the optimizer was given, with the tensor object that it stood for."""
        entries = [entry for group in self._entries for entry in group]
        return {name: tensor for e in entries for name, tensor in ((e.name, e.tensor), *e.aliases)}

    def _residual(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.bfloat16:
            if tensor.dtype == torch.float16:
                raise ValueError("rounding='residual' needs bfloat16 or float32 parameters; float16: use rounding='stochastic'")
            return torch.empty(0, dtype=torch.int16)  # never read: float32 has no low bits to keep
        state = self.state[tensor]
        if "residual" not in state:
            state["residual"] = torch.zeros(tensor.shape, dtype=torch.int16, device=tensor.device)
        return state["residual"]

    def _tie(self, plan: Plan) -> None:
        """Other tensor objects of the model that are the same elements see the same perturbation."""
        if self.model is None:
            return
        views = {
            parameters.view_of(t): (g, i)
            for g, group in enumerate(plan.groups)
            for i, t in enumerate(group.tensors)
            if t.numel()
        }
        for _, tensor in self.model.named_parameters(remove_duplicate=False):
            if (
                id(tensor) not in plan.aliases
                and tensor.numel()
                and (where := views.get(parameters.view_of(tensor))) is not None
            ):
                plan.aliases[id(tensor)] = where

    # Guards -------------------------------------------------------------------------------------------------------------

    def count(self, finite: bool, reading: Reading) -> None:
        """Skipped and dead steps in a row; raises when there are too many. The weights are still as they were."""
        losses = reading.losses
        if reading.unseen and self.result is None:
            names = ", ".join(reading.unseen[:3]) + (", ..." if len(reading.unseen) > 3 else "")
            warn(
                f"the loss did not read {len(reading.unseen)} trained parameters ({names}); they move along z all the same: freeze "
                "them, unless later batches use them (experts of a mixture do)"
            )
        self.skips = 0 if finite else self.skips + 1
        if self.max_skips and self.skips >= self.max_skips:
            self.steps += 1
            raise RuntimeError(
                f"{self.skips} steps in a row had a loss or coefficient that is inf or NaN (last losses {losses}); no weight changed "
                "in them: lower lr, check the data, or compute the loss in float32"
            )
        same = finite and all(len(set(sides)) == 1 for sides in losses)
        self.dead = self.dead + 1 if same else 0
        if self.dead == 3:
            warn(
                "the losses on both sides were equal 3 steps in a row: the perturbation may not reach the loss (eps too small?)"
            )
        if self.dead_limit is not None and self.dead >= self.dead_limit:
            raise RuntimeError(
                f"the losses on both sides were equal {self.dead} steps in a row (last losses {losses}): the perturbation does not "
                "reach the loss; raise eps, give the optimizer the model that the closure runs, or pass dead_limit=None for a "
                "coarse objective"
            )

    def _pieces(self, plan: Plan, group: Group) -> list[tuple[int, Tensor]]:
        return [
            (i, t.detach().view(-1)[:SAMPLE])
            for i, t in enumerate(group.tensors)
            if group.matrices is None and t.dtype != torch.float32 and t.dim() > 1 and t.numel() and t.is_contiguous()
        ]

    def _check_dead_perturbation(self, plan: Plan) -> None:
        """Refuse an eps below half an ulp of the weights: rounding would swallow the perturbation. On a sample, once."""
        dead = total = 0.0
        for group in plan.groups:
            pieces = self._pieces(plan, group)
            if not pieces or group.residuals is not None:
                continue
            outs = [torch.empty_like(piece) for _, piece in pieces]
            tensors, spans = [piece for _, piece in pieces], [group.spans[i] for i, _ in pieces]
            group.backend.perturb(tensors, spans, plan.direction, plan.seed, plan.step, 0, [group.eps], [outs], None)
            for (i, piece), out in zip(pieces, outs):
                weight = group.tensors[i].numel()
                dead += float((out == piece).float().mean()) * weight
                total += weight
        share = dead / total if total else 0.0
        message = f"a perturbation of eps = {plan.groups[0].eps} leaves {share:.0%} of the 16-bit weights where they are (half an ulp)"
        if share > 0.5 and not self.force:
            raise ValueError(f"{message}: raise eps, train in float32, or pass force=True")
        if share > 0.1:
            warn(f"{message}: consider a larger eps or float32 weights")

    def sample(self, plan: Plan) -> Callable[[], float | None] | None:
        """Before the update: a function that tells, after it, which share of sampled 16-bit weights did not move."""
        if plan.rounding != "nearest" or (plan.step >= 10 and plan.step % 100):
            return None
        before = [(piece, piece.clone()) for group in plan.groups for _, piece in self._pieces(plan, group)]
        if not before or not any(float(group.options["lr"]) for group in plan.groups):
            return None

        def after() -> float:
            still = sum(int((now == old).sum()) for now, old in before) / sum(old.numel() for _, old in before)
            if still > 0.5 and plan.step == 0:
                warn(
                    f"rounding to nearest left {still:.0%} of the 16-bit weights where they were: the update is below half an ulp; "
                    "use rounding='stochastic' or rounding='residual'"
                )
            return still

        return after


def _resolve_evaluation(chosen):
    return evaluation.resolve(chosen)


def _check_options(options: dict[str, Any]) -> None:
    """lr, eps and weight decay of a group, checked at every step because schedulers and users write them."""
    lr = finite_number("lr", options["lr"])
    if lr < 0:
        raise ValueError(f"lr is {options['lr']!r}; expected lr >= 0 (to ascend, pass maximize=True)")
    finite_number("eps", options["eps"], above=0.0)
    finite_number("weight_decay", options["weight_decay"], minimum=0.0)


__all__ = ["ZerothOrder"]
