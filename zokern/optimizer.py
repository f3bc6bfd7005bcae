"""The torch face: a zeroth-order optimizer is a torch.optim.Optimizer with param groups, schedulers and a state_dict."""

from __future__ import annotations

import difflib
import inspect
import threading
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, checkpoint, directions, evaluation, parameters, underflow
from .checks import finite_number, whole_number
from .deferred import Deferred
from .estimator import SLOPES, Estimator, Spsa, Stencil
from .fingerprint import memory_of, versions_of
from .memory import START_ANEW
from .modules import Tree, same
from .plan import Group, Plan
from .prospect import Prospect
from .rule import Rule, Sgd, check_basis
from .step import StepResult, run
from .stream import check_seed
from .warning import warn

SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
OTHER_STATE = (
    "load it into an optimizer of the parameters that it was saved with, or start anew with `state_dict['state'].clear()`"
)
HINTS = {
    "momentum": "rule=zokern.Momentum(0.9)", "betas": "rule=zokern.Adam(betas=...)", "epsilon": "eps=...", "mu": "eps=...",
    "beta": "rule=zokern.Momentum(...)", "nesterov": "rule=zokern.Momentum(...)", "wd": "weight_decay=...",
    "clip": "estimator=zokern.Spsa(clip=...)", "normalize": "estimator=zokern.Spread(...)",
}  # fmt: skip


class ZerothOrder(Deferred, torch.optim.Optimizer):
    """What all methods share: names and ids, the plan of a step, counters, state. Methods are files in zokern/methods."""

    result: StepResult | None = None  # of the last step

    def __init__(
        self,
        params: Any,
        *,
        lr: float | None,
        eps: float,
        weight_decay: float = 0.0,
        queries: int | None = None,
        seed: int = 0,
        rounding: str = "nearest",
        evaluation: str | evaluation.Evaluation = "auto",
        backend: str | backends.Backend | None = None,
        direction: str | directions.Direction | directions.LowRank = "normal",
        rule: Rule | None = None,
        defer: bool | None = None,
        stencil: str | Stencil | None = None,
        estimator: Estimator | None = None,
        maximize: bool = False,
        paired_check: int | str | None = "first",
        max_skips: int | None = 10,
        dead_limit: int | None = 20,
        nonfinite: str = "raise",
        force: bool = False,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise _unknown(type(self), next(iter(unknown)))
        self.model = parameters.inner(params) if isinstance(params, nn.Module) else None
        self.evaluation = _resolve_evaluation(evaluation)
        if self.model is not None and self.evaluation.name in ("paired", "scratch"):
            parameters.check_model(params)
        self.seed = check_seed(seed)
        self.estimator = _estimator(estimator, queries, stencil)
        if rounding not in backends.ROUNDINGS:
            raise ValueError(f"rounding is {rounding!r}; expected one of {list(backends.ROUNDINGS)}")
        if nonfinite not in ("raise", "ignore"):
            raise ValueError(f"nonfinite is {nonfinite!r}; expected 'raise' or 'ignore'")
        self.rounding = rounding
        self.backend = backend
        if backend is not None:
            backends.resolve(backend, torch.device("cpu"))
        self.factored = direction if isinstance(direction, directions.LowRank) else None
        self.direction = directions.resolve(direction.dense if isinstance(direction, directions.LowRank) else direction)
        self.rule: Rule = Sgd() if rule is None else rule
        if isinstance(self.rule, type) or not hasattr(self.rule, "update"):
            raise TypeError(f"rule is {rule!r}; expected None, zokern.Momentum(), zokern.Adam() or another Rule object")
        check_basis(self.rule, self.factored)
        if defer is not None and not isinstance(defer, bool):
            raise ValueError(f"defer is {defer!r}; expected True, False or None")
        self.defer = defer
        self.matrices: dict[int, directions.Matrix] = {}
        for name, flag in (("maximize", maximize), ("force", force)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} is {flag!r}; expected True or False")
        self.maximize, self.force, self.nonfinite = maximize, force, nonfinite
        if isinstance(paired_check, str) and paired_check != "first":
            raise ValueError(
                f"paired_check is {paired_check!r}; expected 'first', or an integer, at least 0, or None for no check"
            )
        self.paired_check = (
            paired_check if isinstance(paired_check, str) else _check_count("paired_check", paired_check, 0, "no check")
        )
        self.max_skips = _check_count("max_skips", max_skips, 0, "no limit")
        self.dead_limit = _check_count("dead_limit", dead_limit, 1, "no limit")
        self.steps = self.skips = self.dead = 0
        self.drawn = False  # whether the step under way has used its number
        self._names = parameters.plain_names(self.model) if self.model is not None else {}
        if self.model is not None:
            self._names = {**parameters.plain_names(params), **self._names}
        self._lock = threading.Lock()
        self._tree = Tree([self.model] if self.model is not None else [], is_open=self.model is None)
        self._others: list[Tensor] | None = None  # of the modules, not given to the optimizer; found once for a tree
        self._several = _spread(params)
        self._entries: list[list[parameters.Trained]] = []
        self._groups: list[Group] = []  # of the last plan
        self._scopes: dict = {}  # parts of it
        self._flags: list[bool] = []  # which entries are trained
        self._active: list[parameters.Trained] = []  # those that are
        self._all: list[Tensor] = []  # their tensors, with all aliases
        self._key: tuple | None = None  # the memory that the groups were built from
        self._kept: list[Any] = []  # tensors of the optimizer's state that were checked
        self._eps: list[float] = []  # of the groups whose perturbation was found to survive rounding
        self._written: dict[int, int] = {}  # by id: version counters after the last update, which low bits belong to
        self._prospect = Prospect()
        self._losses, self._start, self._mean, self._best = 0, 0.0, 0.0, 0.0  # of this process: how the loss goes
        if lr is None:  # a rule whose steps have one length, whatever the slope, knows its own
            lr = getattr(self.rule, "lr", None) or getattr(self.estimator, "lr", SLOPES)
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        groups = parameters.named_groups(params, self._names)
        parameters.check_trained(groups)
        given = [name for group in groups for name, _ in group["params"]]
        self.ids, self.salted = parameters.ids([*self._names.values(), *given])
        super().__init__(groups, defaults)
        if self.factored is not None and self.model is not None:
            self.watch(self.model, params)

    # Groups and state ---------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; a group without names continues the numbering param.N. Refuses what cannot be trained, by name."""
        (group,) = parameters.named_groups([param_group], self._names)
        names_of = {id(p): self._names[n] for n, p in self.model.named_parameters()} if self.model is not None else {}
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
        self._others = None
        if not {id(entry.tensor) for entry in entries} <= {*map(id, self._tree.slots)}:
            self._tree = Tree(self._tree.roots, is_open=True)  # a module of its own, which its first forward shows

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict plus ``zokern``: stream version, seed and step, so that a resumed run draws the same z.

        Writes deferred updates (see flush): a run that resumes from it has the bits of the run that saved and went on."""
        self.flush()
        return {**super().state_dict(), "zokern": checkpoint.own_entry(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume: options, seed, step number, and what residuals and rules keep. Refuses, before anything has changed, another stream
        version, other parameter names, another recipe (method, rule, rounding, queries, stencil, rank, interval) and state of other shapes."""
        own = checkpoint.check(self, state_dict)
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
        self._groups, self._key, self._written = [], None, {}
        self.seed, self.steps, self.skips, self.dead = own["seed"], own["step"], own["skips"], own["dead"]
        checkpoint.load_parts(self, own)
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

    def step(self, closure: Callable[[], Any] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns the mean loss. zokern.step(optimizer, closure) returns the whole record.

        Without a closure it does nothing while every lr is 0: torch.distributed.checkpoint probes an optimizer so."""
        if closure is None:
            if all(float(group["lr"]) == 0.0 for group in self.param_groups):
                return None
            raise TypeError("step() needs a closure that computes the loss: it is read at more than one point")
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("step in progress: a step was started inside the closure of another, or in a second thread")
        planned = False
        try:
            self.drawn = False
            self.open()
            self._prepared = False
            self.result = run(self, closure)
            if self._tree.found:  # as they are now: what is replaced in them before the next step is noticed there
                self._tree, self._others = Tree([*self._tree.roots, *self._tree.found]), None
            self.drawn = True
        finally:
            planned = self._prepared
            self.steps += self.drawn  # the only place where the number advances
            if planned:
                self.accept()
            self.close()
            self._lock.release()
        return self.result.loss

    _prepared = False  # whether the step under way has checked what was written before it

    def plan(self) -> Plan:
        """Returns the checked work of this step. Raises before anything is touched."""
        if self.steps >= 2**32:
            raise ValueError(f"step number {self.steps} does not fit the stream's 32 bits; continue with another seed")
        if self._several and parameters.processes() > 1:
            raise RuntimeError(
                f"the model is wrapped in DistributedDataParallel and {parameters.processes()} processes run: each would move along its own "
                "losses, and the weights would drift apart. Give the optimizer model.module, and average the loss over the processes "
                "inside the closure (torch.distributed.all_reduce)"
            )
        self._check_tree()
        self._check_groups()
        for options in self.param_groups:
            _check_options(options)
        self._build()
        for group in self._groups:
            group.eps = float(group.options["eps"])
        if not self._groups:
            raise ValueError("no parameter requires a gradient any more: nothing to train in this step")
        plan = Plan(
            self._groups,
            self.direction,
            self.seed,
            self.steps,
            self.rounding,
            self._tree,
            self.factored,
            scopes=self._scopes,
        )
        for group in self._groups:
            group.check_waiting()
        if [group.eps for group in self._groups] != self._eps:
            self._eps = []  # after a refusal it is looked at again
            underflow.check_perturbation(plan, self.force)
            self._eps = [group.eps for group in self._groups]
        self._prepared = True
        return plan

    def _check_tree(self) -> None:
        """Raises if a parameter of the modules was replaced, removed, added or thawed since the optimizer saw it."""
        tree = self._tree
        if self._others is None:
            given = set(map(id, self._known().values()))
            self._others = [p for held in tree.parameters for p in held.values() if p is not None and id(p) not in given]
        thawed = self.model is not None and any(p.requires_grad for p in self._others)
        if tree.state().stands and not thawed:
            return
        known = {id(t): name for name, t in self._known().items()}
        now = {id(p): name for root in tree.roots for name, p in root.named_parameters()}
        names = {name: number for number, name in now.items()}
        before = {id(p) for p in tree.slots if id(p) in known}
        for number in before - now.keys():
            name = known[number]
            here = next((full for full in names if parameters.plain(full) == name or full.endswith(name)), None)
            raise RuntimeError(
                f"parameter {name!r} was {'removed' if here is None else 'replaced'} after the optimizer was built; build a new optimizer "
                "for the new model"
            )
        model = self.model if self.model is not None else nn.Module()
        if added := [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in known]:
            raise RuntimeError(
                f"parameters {added} were added after the optimizer was built; pass them to add_param_group, or freeze them"
            )
        self._tree, self._others = Tree(tree.roots, is_open=tree.is_open), None

    def _build(self) -> None:
        """Makes the groups of a step, once for a list of tensors: again when one was moved, frozen, cast or added."""
        entries = [entry for group in self._entries for entry in group]
        flags = [entry.tensor.requires_grad for entry in entries]
        if flags != self._flags:
            self._flags, self._key = flags, None
            self._active = [entry for entry, trained in zip(entries, flags) if trained]
            self._all = [t for entry in self._active for t in (entry.tensor, *(t for _, t in entry.aliases))]
        try:
            key = memory_of(self._all)
        except RuntimeError:  # a tensor without an address, which the check below names
            key = None
        kept = list(chain.from_iterable(map(dict.values, self.state.values())))
        is_new = key is None or key != self._key
        if is_new:
            self._key = None
            for entry in self._active:
                parameters.check_parameter(entry.name, entry.tensor)
                parameters.check_tie(entry)
                self._check_matrix(entry)
            parameters.check_overlap([(entry.name, entry.tensor) for entry in entries])
        if is_new or not same(kept, self._kept):
            for entry in self._active:
                if state := self.state.get(entry.tensor):
                    self._check_state(entry, state, START_ANEW)
            is_new = is_new or self.rounding == "residual"  # groups hold the low bits
            self._kept = kept
        if is_new:
            self.leave(self._groups)
            self._groups = self._made([[e for e in group if e.tensor.requires_grad] for group in self._entries])
            self._key, self._scopes = key, {}

    def _made(self, active: list[list[parameters.Trained]]) -> list[Group]:
        groups: list[Group] = []
        for options, entries in zip(self.param_groups, active):
            by_device: dict[torch.device, list[parameters.Trained]] = {}
            for entry in entries:
                by_device.setdefault(entry.tensor.device, []).append(entry)
            for device, here in by_device.items():
                found = [(entry, self._matrix(entry)) for entry in here]
                dense = [entry for entry, matrix in found if matrix is None]
                factored = [(entry, matrix) for entry, matrix in found if matrix is not None]
                for members, matrices in ((dense, None), ([e for e, _ in factored], [m for _, m in factored])):
                    if members:
                        groups.append(
                            Group(
                                [e.name for e in members],
                                [e.tensor for e in members],
                                backends.SpanList([backends.Span(e.who) for e in members]),
                                [self._residual(e.tensor) for e in members] if self.rounding == "residual" else None,
                                float(options["eps"]),
                                options,
                                backends.resolve(self.backend, device),
                                matrices,
                                objects=[[e.tensor, *(t for _, t in e.aliases)] for e in members],
                            )
                        )
        return groups

    def _check_groups(self) -> None:
        """Raises if the lists of param_groups were edited: what the optimizer trains, it was given through add_param_group."""
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

    # Low bits of 16-bit weights -------------------------------------------------------------------------------------------

    def _residual(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.bfloat16:
            if tensor.dtype == torch.float16:
                raise ValueError("rounding='residual' needs bfloat16 or float32 parameters; float16: use rounding='stochastic'")
            return torch.empty(0, dtype=torch.int16, device="cpu")  # never read: float32 has no low bits to keep
        state = self.state[tensor]
        if "residual" not in state:
            state["residual"] = torch.zeros(tensor.shape, dtype=torch.int16, device=tensor.device)
        return state["residual"]

    def drop_low_bits(self) -> None:
        """Clears the low bits of weights that others wrote since the last update: those are exact as they are."""
        if self.rounding != "residual":
            return
        for group in self._groups:
            for tensor, low in zip(group.tensors, group.residuals or ()):
                if self._written.get(id(tensor), tensor._version) != tensor._version:
                    low.zero_()

    def accept(self, also: Sequence[Tensor] = ()) -> None:
        """Takes the weights as this optimizer left them: deferred updates and low bits belong to them.

        also  tensors that it wrote and trains no more"""
        for group in self._groups:
            for tensor, matrix in zip(group.tensors, group.matrices or ()):
                if matrix.pending is not None:
                    matrix.version = tensor._version
            if self.rounding == "residual":
                self._written.update(zip(map(id, group.tensors), versions_of(group.tensors)))
        if self.rounding == "residual":
            self._written.update(zip(map(id, also), versions_of(also)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Neither copied nor pickled: torch's way would lose the module, its hooks, deferred updates and the names that decide z."""
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: it belongs to the parameters that it trains; copy the model, build "
            "another optimizer for the copy and load_state_dict(optimizer.state_dict()) into it"
        )

    # Guards -------------------------------------------------------------------------------------------------------------

    def count(self, finite: bool, result: StepResult) -> None:
        """Counts skipped and dead steps in a row; raises when there are too many. The weights are still as they were."""
        losses = result.losses
        if result.unseen and self.result is None:
            names = ", ".join(result.unseen[:3]) + (", ..." if len(result.unseen) > 3 else "")
            warn(
                f"the loss did not read {len(result.unseen)} trained parameters ({names}); they move along z all the same. A branch that "
                "is not used: freeze it with requires_grad_(False). Experts without tokens in this batch: nothing is wrong"
            )
        self.skips = 0 if finite else self.skips + 1
        if self.max_skips and self.skips >= self.max_skips:
            self.drawn = True
            raise RuntimeError(
                f"{self.skips} steps in a row had a loss or coefficient that is inf or NaN (last losses {losses}); no weight changed "
                "in them: lower lr, check the data, or compute the loss in float32"
            )
        same = finite and all(len(set(sides)) == 1 for sides in losses)
        self.dead = self.dead + 1 if same else 0
        grown = self._watch_loss(result.loss) if finite else False
        self._prospect.see(result, float(self.param_groups[0]["lr"]))
        if self.dead == 3:
            cause = "lr too large: the loss has grown since the start" if grown else "eps too small?"
            warn(f"the losses on both sides were equal 3 steps in a row: the perturbation may not reach the loss ({cause})")
        if self.dead_limit is not None and self.dead >= self.dead_limit:
            raise RuntimeError(
                f"the losses on both sides were equal {self.dead} steps in a row (last losses {losses}): the perturbation does not "
                "reach the loss; raise eps, give the optimizer the model that the closure runs, or pass dead_limit=None for a "
                "coarse objective"
            )

    def _watch_loss(self, loss: float) -> bool:
        """Warns once when the loss has grown to three times its first, and its best running mean; returns whether it has."""
        if self._losses == 0:
            self._start = self._mean = self._best = loss
        self._losses += 1
        self._mean += 0.2 * (loss - self._mean)
        grown = not self.maximize and self._best > 0.0 and loss > 3.0 * max(self._best, self._start)
        self._best = min(self._best, self._mean)
        if grown and not self._warned:
            self._warned = True
            lr = ", ".join(str(float(group["lr"])) for group in self.param_groups)
            warn(
                f"the loss has grown from {self._start:.4g} to {loss:.4g} within {self._losses} steps: lr = {lr} may be too large"
            )
        return grown

    _warned = False


def _spread(params: Any) -> bool:
    """Whether a module, or one inside it, is wrapped for data parallelism over several processes."""
    if not isinstance(params, nn.Module):
        return False
    return any(cls.__name__ == "DistributedDataParallel" for module in params.modules() for cls in type(module).__mro__)


def _estimator(given: Estimator | None, queries: int | None, stencil: str | Stencil | None) -> Estimator:
    """Returns the estimator; without one, SPSA with the queries and the stencil."""
    if given is None:
        return Spsa(1 if queries is None else queries, "central" if stencil is None else stencil)
    for name, value in (("queries", queries), ("stencil", stencil)):
        if value is not None:
            raise ValueError(
                f"{name} is {value!r} beside an estimator; give it to the estimator: zokern.Spsa({name}={value!r})"
            )
    if isinstance(given, type) or not callable(given) or not hasattr(given, "queries"):
        raise TypeError(f"estimator is {given!r}; expected None, zokern.Spsa() or another Estimator object")
    return given


def _unknown(cls: type, option: str) -> TypeError:
    """An error that names the class that the user called, and what is near."""
    options = [
        name
        for owner in cls.__mro__
        if issubclass(owner, ZerothOrder)
        for name, p in inspect.signature(owner.__init__).parameters.items()
        if name != "self" and p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    known = sorted(set(options))
    near = difflib.get_close_matches(option, known, 1)
    hint = HINTS.get(option) or (f"{near[0]}=..." if near else "")
    return TypeError(
        f"{cls.__name__} has no option {option!r}"
        + (f"; did you mean {hint}?" if hint else ";")
        + f" The options are {', '.join(known)}"
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
    decay = finite_number("weight_decay", options["weight_decay"], minimum=0.0)
    if lr * decay > 1.0:
        raise ValueError(
            f"weight_decay is {decay!r} and lr is {lr!r}; expected lr * weight_decay of at most 1, beyond which weights change their sign "
            "in every step"
        )


def _check_scalar(name: str, value: Any) -> None:
    """Refuse what float() has no word for: tensors of several elements, and integers beyond a float."""
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex() or value.is_meta):
        raise ValueError(f"{name} is {value!r}; expected a finite number")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{name} is {value!r:.40}; expected a finite number below 2**128")


def _check_count(name: str, value: Any, least: int, none: str) -> int | None:
    """An integer from `least` on, or None, which means `none`."""
    return (
        None
        if value is None
        else whole_number(name, value, least, expected=f"an integer, at least {least}, or None for {none}")
    )


__all__ = ["ZerothOrder"]
