"""The torch face: a zeroth-order optimizer is a torch.optim.Optimizer with param groups, schedulers and a state_dict."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, directions, estimator, evaluation, parameters, saved
from .evaluation import Group, Plan, Reading
from .evaluation.owners import Owners
from .evaluation.surroundings import check_structure
from .factorized import Factorized
from .rule import Rule, Sgd, check_basis
from .step import StepResult, finite_number, run, whole_number
from .stream import check_seed
from .warning import warn

TINY = float(torch.finfo(torch.float32).tiny)  # the kernels take eps in float32, where less than this is nothing
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
        params = (
            getattr(params, "_orig_mod", params) if isinstance(params, nn.Module) else params
        )  # of torch.compile: names are its own
        self.model = params if isinstance(params, nn.Module) else None
        if self.model is not None and _resolve_evaluation(evaluation).name != "walk":
            parameters.check_model(self.model)
        self.seed = check_seed(seed)
        self.queries = whole_number("queries", queries, 1, 2**24 - 1)
        if rounding not in backends.ROUNDINGS:
            raise ValueError(f"rounding is {rounding!r}; expected one of {list(backends.ROUNDINGS)}")
        if normalize not in ("none", "std"):
            raise ValueError(f"normalize is {normalize!r}; expected 'none' or 'std'")
        if nonfinite not in ("raise", "ignore"):
            raise ValueError(f"nonfinite is {nonfinite!r}; expected 'raise' or 'ignore'")
        self.rounding, self.normalize = rounding, normalize
        self.evaluation = _resolve_evaluation(evaluation)
        self.backend = backend
        if backend is not None:
            backends.resolve(backend, torch.device("cpu"))
        factored = not isinstance(direction, str) and hasattr(direction, "draws")
        self.factored: directions.Factored | None = direction if factored else None  # type: ignore[assignment]
        self.direction = directions.resolve(direction.dense if factored else direction)  # type: ignore[union-attr,arg-type]
        self.rule: Rule = Sgd() if rule is None else rule
        if isinstance(self.rule, type) or not hasattr(self.rule, "update"):
            raise TypeError(f"rule is {rule!r}; expected None, zokern.Momentum(), zokern.Adam() or another Rule object")
        check_basis(self.rule, self.factored)
        self.defer = defer
        self.matrices: dict[int, directions.Matrix] = {}
        self._groups: list[Group] = []
        self.stencil = estimator.resolve(stencil)
        if not isinstance(maximize, bool):
            raise TypeError(f"maximize is {maximize!r}; expected True or False")
        self.maximize, self.force, self.nonfinite = maximize, force, nonfinite
        self.clip = None if clip is None else finite_number("clip", clip, above=0.0)
        self.paired_check = whole_number("paired_check", paired_check, 0)  # 0: never
        self.max_skips = whole_number("max_skips", max_skips, 0)  # 0: any number
        self.dead_limit = None if dead_limit is None else whole_number("dead_limit", dead_limit, 1)
        self.steps = self.skips = self.dead = 0
        self.ids, self.salted = parameters.ids(
            [name for name, _ in self.model.named_parameters()] if self.model is not None else []
        )
        self._lock = threading.Lock()
        self._owners = Owners()
        self._entries: list[list[parameters.Trained]] = []
        self._checked: dict[int, tuple] = {}  # by id of the tensor: where it lay and what it was when it was checked
        self._ties: list[
            tuple[Tensor, Tensor]
        ] = []  # tensor objects of the modules that are the elements of a trained one, and that one
        self._stale: dict[int, str] = {}  # by id: tensor objects of the modules that show some of a trained one's elements
        self._eps: list[float] | None = None  # of the groups, when the perturbation was last looked at
        self._written: dict[
            int, int
        ] = {}  # by id: version counters after the last update, where low bits belong to the weights
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
        return {**super().state_dict(), "zokern": saved.own_entry(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume: options, seed, step number, and what residuals and rules keep. Refuses, before anything has changed, another stream
        version, other parameter names, another recipe (method, rule, rounding, queries, stencil, rank, interval) and state of other shapes."""
        own = saved.check(self, state_dict)
        state_dict = {key: value for key, value in state_dict.items() if key != "zokern"}
        super().load_state_dict(state_dict)
        order = [p for group in self.param_groups for p in group["params"]]
        for index, values in state_dict["state"].items():  # torch casts state to the parameter's dtype
            for key, value in values.items():
                if isinstance(value, Tensor):
                    self.state[order[index]][key] = value.to(order[index].device, copy=True).contiguous()
        self.discard()
        self.matrices.clear()
        self._groups = []  # what waited belongs to the run that is left
        self._written = {}
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
            self.open()
            self.result = run(self, closure)
            self.steps += 1
        finally:
            self.close()
            if self.rounding == "residual":
                self._written = {id(t): t._version for group in self._groups for t in group.tensors}
            self._lock.release()
        return self.result.loss

    def plan(self) -> Plan:
        """The checked work of this step. Raises before anything is touched."""
        if self.steps >= 2**32:
            raise ValueError(f"step number {self.steps} does not fit the stream's 32 bits; continue with another seed")
        if self.model is not None:
            check_structure(self.model, self._known())
        roots = [self.model] if self.model is not None else self._owners.roots(self._known().values())
        groups: list[Group] = []
        aliases: dict[int, tuple[int, int]] = {}
        self._recheck(roots)
        for options, entries in zip(self.param_groups, self._entries):
            _check_options(options)
            by_device: dict[torch.device, list[parameters.Trained]] = {}
            for entry in entries:
                if entry.tensor.requires_grad:
                    by_device.setdefault(entry.tensor.device, []).append(entry)
            for device, everything in by_device.items():
                found = [self._matrix(entry) for entry in everything]
                dense = [entry for entry, matrix in zip(everything, found) if matrix is None]
                factored = [(entry, matrix) for entry, matrix in zip(everything, found) if matrix is not None]
                for members, matrices in ((dense, None), ([e for e, _ in factored], [m for _, m in factored])):
                    if not members:
                        continue
                    for i, entry in enumerate(members):
                        for tensor in (entry.tensor, *(alias for _, alias in entry.aliases)):
                            aliases[id(tensor)] = (len(groups), i)
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
            roots,
            aliases,
            self.factored,
        )
        if [group.names for group in self._groups] != [group.names for group in groups]:
            self.flush()  # what is trained has changed: the updates that wait belong to the old groups
        self._groups = groups
        for group in groups:
            group.check_waiting()
        for tensor, owner in self._ties:  # other tensor objects of the same elements see the same perturbation
            if id(owner) in aliases:
                aliases.setdefault(id(tensor), aliases[id(owner)])
        plan.stale.update({key: name for key, name in self._stale.items() if key not in aliases})
        if (eps := [group.eps for group in groups]) != self._eps:
            self._check_dead_perturbation(plan)
            self._eps = eps
        return plan

    def _recheck(self, roots: Sequence[nn.Module]) -> None:
        """Check what is new, or has moved or changed its dtype, shape or strides since it was checked (`p.data = ...`, `model.to(...)`)."""
        moved = False
        for options, entries in zip(self.param_groups, self._entries):
            if [id(p) for p in options["params"]] != [id(entry.tensor) for entry in entries]:
                raise RuntimeError(
                    "param_groups[...]['params'] was edited by hand; expected the parameters that the optimizer was given: use "
                    "add_param_group, freeze parameters with requires_grad_(False), or build a new optimizer"
                )
            for entry in entries:
                if not entry.tensor.requires_grad:
                    continue
                key, known = parameters.place_of(entry.tensor), self._checked.get(id(entry.tensor))
                if key == known:
                    continue
                parameters.check_parameter(entry.name, entry.tensor)
                if known is not None and known[2] != key[2]:
                    raise ValueError(
                        f"parameter {entry.name!r} had shape {list(known[2])} and has {list(key[2])} now; its elements' numbers, and what "
                        "is kept of them, belong to the old shape: build a new optimizer"
                    )
                moved, self._checked[id(entry.tensor)] = True, key
        if moved:
            parameters.check_overlap([(e.name, e.tensor) for entries in self._entries for e in entries])
            everyone = {e.name: e.tensor for entries in self._entries for e in entries}
            self._ties, self._stale = parameters.ties(everyone, roots)

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
        # weights that somebody else wrote since the last update are exact as they are: the old low bits are not theirs
        if "residual" not in state or self._written.get(id(tensor), tensor._version) != tensor._version:
            state["residual"] = torch.zeros(tensor.shape, dtype=torch.int16, device=tensor.device)
        return state["residual"]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an optimizer cannot be copied or pickled: it belongs to its parameters and their module; copy the model, build an optimizer "
            "for the copy, and load_state_dict(optimizer.state_dict())"
        )

    # Guards -------------------------------------------------------------------------------------------------------------

    def count(self, finite: bool, reading: Reading) -> None:
        """Skipped and dead steps in a row; raises when there are too many. The weights are still as they were."""
        losses = reading.losses
        if reading.unseen and self.result is None:
            names = ", ".join(reading.unseen[:3]) + (", ..." if len(reading.unseen) > 3 else "")
            warn(
                f"the loss did not read {len(reading.unseen)} trained parameters ({names}); they move along z all the same. A branch that "
                "is not used: freeze it with requires_grad_(False). Experts without tokens in this batch: nothing is wrong. Read where "
                "torch functions do not show it (TorchScript, a fused or exported graph, another thread): use evaluation='walk'"
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
        """About SAMPLE elements, the first in the stream's numbering, of every 16-bit tensor that is not a vector."""
        return [
            (i, t.detach().view(-1)[:SAMPLE] if t.is_contiguous() else t.detach()[: max(1, SAMPLE * t.shape[0] // t.numel())])
            for i, t in enumerate(group.tensors)
            if group.matrices is None and t.dtype != torch.float32 and t.dim() > 1 and t.numel()
        ]

    def _check_dead_perturbation(self, plan: Plan) -> None:
        """Refuse an eps below half an ulp of a group's weights: rounding would swallow the perturbation. On a sample, for every new eps."""
        for group in plan.groups:
            dead = total = 0.0
            pieces = self._pieces(plan, group)
            if not pieces or group.residuals is not None:
                continue
            outs = [torch.empty(piece.shape, dtype=piece.dtype, device=piece.device) for _, piece in pieces]
            tensors, spans = [piece for _, piece in pieces], [group.spans[i] for i, _ in pieces]
            group.backend.perturb(tensors, spans, plan.direction, plan.seed, plan.step, 0, [group.eps], [outs], None)
            for (i, piece), out in zip(pieces, outs):
                weight = group.tensors[i].numel()
                dead += float((out == piece).float().mean()) * weight
                total += weight
            share = dead / total if total else 0.0
            message = (
                f"a perturbation of eps = {group.eps} leaves {share:.0%} of the 16-bit weights where they are (half an ulp)"
            )
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
    if finite_number("eps", options["eps"], above=0.0) < TINY:
        raise ValueError(f"eps is {options['eps']!r}, which is 0 in float32; expected a finite number >= {TINY:.2g}")
    finite_number("weight_decay", options["weight_decay"], minimum=0.0)


__all__ = ["ZerothOrder"]
