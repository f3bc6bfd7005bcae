"""The torch face: a zeroth-order optimizer is a torch.optim.Optimizer with param groups, schedulers and a state_dict."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, directions, estimator, evaluation, parameters, saved, underflow
from .evaluation import Group, Plan, Reading
from .evaluation.owners import Owners
from .evaluation.surroundings import check_structure
from .factorized import Factorized
from .memory import Memory
from .rule import Rule, Sgd, check_basis
from .step import StepResult, finite_number, run, whole_number
from .stream import check_seed
from .warning import warn

SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
OTHER_STATE = (
    "load it into an optimizer of the parameters that it was saved with, or start anew with `state_dict['state'].clear()`"
)


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
        paired_check: int | None = 0,
        max_skips: int | None = 10,
        dead_limit: int | None = 20,
        nonfinite: str = "raise",
        force: bool = False,
    ) -> None:
        self.model = parameters.inner(params) if isinstance(params, nn.Module) else None
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
        for name, flag in (("maximize", maximize), ("force", force)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} is {flag!r}; expected True or False")
        self.maximize, self.force, self.nonfinite = maximize, force, nonfinite
        self.clip = None if clip is None else finite_number("clip", clip, above=0.0)
        self.paired_check = _check_count("paired_check", paired_check, 0, "no check")
        self.max_skips = _check_count("max_skips", max_skips, 0, "no limit")
        self.dead_limit = _check_count("dead_limit", dead_limit, 1, "no limit")
        self.steps = self.skips = self.dead = 0
        self.ids, self.salted = parameters.ids(
            [name for name, _ in self.model.named_parameters()] if self.model is not None else []
        )
        self._lock = threading.Lock()
        self._owners = Owners()
        self._entries: list[list[parameters.Trained]] = []
        self.memory = Memory()
        self._ties: list[
            tuple[Tensor, Tensor]
        ] = []  # tensor objects of the modules on the elements of a trained one, and that one
        self._stale: dict[int, str] = {}  # by id: tensor objects of the modules that show some of a trained one's elements
        self._eps: list[float] = []  # of the groups whose perturbation was found to survive rounding
        self._written: dict[int, int] = {}  # by id: version counters after the last update, which low bits belong to
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        groups = parameters.named_groups(params)
        if not any(group["params"] for group in groups):
            raise ValueError("params holds no trainable parameter; set requires_grad on what is to be trained")
        super().__init__(groups, defaults)
        if self.factored is not None and self.model is not None:
            self.watch(self.model, params)

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
        held = self._held(state_dict)
        for entry, values in held:
            self._check_state(entry, values, OTHER_STATE, loading=True)
        state_dict = {key: value for key, value in state_dict.items() if key != "zokern"}
        super().load_state_dict(state_dict)
        for entry, values in held:  # torch casts state to the parameter's dtype
            for key, value in values.items():
                if isinstance(value, Tensor):
                    here = value.to(entry.tensor.device, copy=True, memory_format=torch.contiguous_format)
                    self.state[entry.tensor][key] = here
        self.discard()
        self.matrices.clear()
        self._groups = []  # what waited belongs to the run that is left
        self._written = {}
        self.seed, self.steps, self.skips, self.dead = own["seed"], own["step"], own["skips"], own["dead"]
        if hasattr(self.evaluation, "choice"):
            self.evaluation.choice = own.get("evaluation")

    def _held(self, state_dict: dict[str, Any]) -> list[tuple[parameters.Trained, dict[str, Any]]]:
        """The entries that a state_dict holds state of, with that state."""
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        entries = dict(zip(numbers, (entry for group in self._entries for entry in group)))
        unknown = [number for number in state_dict["state"] if number not in entries]
        if unknown:
            raise ValueError(f"state_dict has state of parameters number {unknown}; expected numbers among {numbers}")
        return [(entries[number], values) for number, values in state_dict["state"].items()]

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
        self._check_groups()
        for options in self.param_groups:
            _check_options(options)
        active = [[entry for entry in entries if entry.tensor.requires_grad] for entries in self._entries]
        if self._check_memory([entry for entries in active for entry in entries]):
            everyone = {entry.name: entry.tensor for entries in self._entries for entry in entries}
            self._ties, self._stale = parameters.ties(everyone, roots)
        for options, entries in zip(self.param_groups, active):
            by_device: dict[torch.device, list[parameters.Trained]] = {}
            for entry in entries:
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
        if [group.eps for group in groups] != self._eps:
            self._eps = []  # after a refusal it is looked at again
            underflow.check_perturbation(plan, self.force)
            self._eps = [group.eps for group in groups]
        return plan

    def _check_groups(self) -> None:
        """Raise if somebody edited the lists of param_groups: what the optimizer trains, it was given through add_param_group."""
        for i, (group, entries) in enumerate(zip_longest(self.param_groups, self._entries, fillvalue=())):
            params = group["params"] if group else []
            if len(params) != len(entries) or not all(p is entry.tensor for p, entry in zip(params, entries)):
                raise RuntimeError(
                    f"param_groups[{i}]['params'] has {len(params)} parameters that are not the {len(entries)} given to the optimizer: "
                    "the list was edited; put it back and use add_param_group, freeze with requires_grad_(False), or build a new "
                    "optimizer"
                )

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
        """Neither copied nor pickled: torch's way would lose the module, its hooks, waiting updates and the names that decide z."""
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: it belongs to the parameters that it trains; copy the model, build "
            "another optimizer for the copy and load_state_dict(optimizer.state_dict()) into it"
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


def _resolve_evaluation(chosen):
    return evaluation.resolve(chosen)


def _check_options(options: dict[str, Any]) -> None:
    """lr, eps and weight decay of a group, checked at every step because schedulers and users write them."""
    for name in ("lr", "eps", "weight_decay"):
        _check_scalar(name, options[name])
    lr = finite_number("lr", options["lr"])
    if lr < 0:
        raise ValueError(f"lr is {options['lr']!r}; expected lr >= 0 (to ascend, pass maximize=True)")
    eps = finite_number("eps", options["eps"], above=0.0)
    if not SMALLEST <= eps <= LARGEST:
        raise ValueError(f"eps is {options['eps']!r}; expected a finite number > 0 that float32 holds: 2**-126 <= eps < 2**128")
    finite_number("weight_decay", options["weight_decay"], minimum=0.0)


def _check_scalar(name: str, value: Any) -> None:
    """Refuse what float() has no word for: tensors of several elements, and integers beyond a float."""
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex() or value.is_meta):
        raise ValueError(f"{name} is {value!r}; expected a finite number")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{name} is {value!r:.40}; expected a finite number below 2**128")


def _check_count(name: str, value: Any, least: int, none: str) -> int | None:
    """An integer from `least` on, or None, which means `none`."""
    return None if value is None else whole_number(name, value, least, none=none)


__all__ = ["ZerothOrder"]
