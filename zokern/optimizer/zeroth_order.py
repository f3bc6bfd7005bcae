"""The torch face: a zeroth-order optimizer is a torch.optim.Optimizer with param groups, schedulers and a
state_dict."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from .. import backends, directions, parameters, shards, underflow
from .. import evaluation as evaluations
from ..estimator import Estimate, Estimator, Oracle, Stencil
from ..parallel import Ranks
from ..plan import Plan, Run
from ..result import StepResult, read
from ..rule import Rule, check_basis, check_scaled
from ..step import run
from ..stream import check_seed
from . import checkpoint, options
from .bases import Bases
from .deferred import Deferred
from .low_bits import LowBits
from .scaling import Scaling
from .work import Work

OTHER_STATE = (
    "load it into an optimizer of the parameters that it was saved with, "
    "or start anew with `state_dict['state'].clear()`"
)


class ZerothOrder(torch.optim.Optimizer):
    """Joins the parts of a method into a torch.optim.Optimizer; every method is a subclass.

    The arguments are told in zokern.MeZO. `param_groups`, `state` and `defaults` are those of torch, and
    schedulers of torch change lr, eps and weight_decay. `result` is the record of the last step.

    guards  options that stop a run: paired_check, max_skips, dead_limit, nonfinite, force, maximize, every

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    result: StepResult | None = None  # of the last step
    drawn = False  # whether the step under way has used its number
    _prepared = False  # whether it has checked what was written before it
    tape: Any = None  # of a captured step under way (graph.py)
    taken = False  # whether a loop's own step() follows a step that zokern.step has taken (hf.py)

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
        evaluation: str | evaluations.Evaluation = "auto",
        backend: str | backends.Backend | None = None,
        direction: str | directions.Direction | directions.LowRank | directions.Scaled = "normal",
        rule: Rule | None = None,
        defer: bool | None = None,
        stencil: str | Stencil | None = None,
        estimator: Estimator | None = None,
        group: Any = None,
        **guards: Any,
    ) -> None:
        self.guards = options.guards_of(type(self), guards)
        self.evaluation = evaluations.resolve(evaluation)
        if isinstance(params, nn.Module) and self.evaluation.stands_in:
            parameters.check_model(params)
        self.run = Run(check_seed(seed), rounding)
        self.estimator = options.estimator_of(estimator, queries, stencil)
        options.check_launches(rounding, backend)
        self.factored, self.scaled, self.direction = directions.parts(direction)
        self.rule = options.rule_of(rule)
        check_basis(self.rule, self.factored)
        check_scaled(self.rule, self.scaled)
        me = weakref.ref(self)  # without a cycle an optimizer's memory goes with its last reference
        self.ranks = Ranks(group, lambda: checkpoint.identity(me()))
        self._unseen: list[tuple[StepResult, list[float]]] = []  # by the guards; with their lr
        self._eps: list[float] = []  # of the groups whose perturbation was found to survive rounding
        self._lock = threading.Lock()
        self._several = isinstance(params, nn.Module) and parameters.is_parallel(params)
        self.work = Work(params, backend)
        lr = options.default_lr(self.rule, self.estimator) if lr is None else lr
        super().__init__(self.work.given, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        self.bases = Bases(self.factored, self.rule, self.state)
        self.low_bits = LowBits(rounding == "residual", self.state)
        self.scaling = Scaling(self.scaled, self.state)
        self.deferred = Deferred(self.run, self.bases, self.low_bits, self._lock, defer)
        self.work.parts(self.bases, self.low_bits, self.deferred, self.rule, self.estimator)
        if self.work.sharded:
            shards.check(self)
        if self.factored is not None and self.work.model is not None:
            self.deferred.watch(self.work.model, params)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.run.seed

    @property
    def steps(self) -> int:
        """The number of the next step."""
        return self.run.step

    @property
    def rounding(self) -> str:
        """How 16-bit weights are rounded in an update."""
        return self.run.rounding

    @property
    def model(self) -> nn.Module | None:
        """The module that was given, inside its wrappers."""
        return self.work.model

    @property
    def matrices(self) -> dict[int, directions.Matrix]:
        """What is kept of each low-rank parameter, by its id."""
        return self.bases.matrices

    @property
    def ids(self) -> dict[str, int]:
        """The id of every parameter name, which names its z."""
        return self.work.ids

    # Groups and state ---------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch; a group without names continues the numbering param.N.

        Raises ValueError, with the parameter's name, for what cannot be trained."""
        group = self.work.named(param_group)
        options.check_group({**self.defaults, **group})
        entries = self.work.add(group)
        options.keep_lr(group, [entry.tensor for entry in entries], self.rule, self.factored)
        group["params"] = [(entry.name, entry.tensor) for entry in entries]
        super().add_param_group(group)
        self.work.append(entries)

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's state_dict plus ``zokern``: stream version, seed and step, so that a resumed run
        draws the same z.

        Writes deferred updates (see flush). A run that resumes from it has the bits of the run that saved and
        went on."""
        self.flush()
        self.look()  # the counters of skipped and dead steps belong to the state
        state_dict = {**super().state_dict(), "zokern": checkpoint.own_entry(self)}
        seen: dict[int, float] = {}
        state_dict["state"] = {
            number: {key: checkpoint.on_host(value, seen) for key, value in kept.items()}
            for number, kept in state_dict["state"].items()
        }
        return self.work.shard(state_dict, self._held(state_dict)) if self.work.sharded else state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes: takes options, seed, step number, and what residuals, rules and other parts keep.

        Raises ValueError, before anything has changed, for another stream version, other parameter names,
        another recipe (method, rule, estimator, rounding, ...) and state of other shapes."""
        if self.work.sharded:
            state_dict = self.work.unshard(state_dict, self._held(state_dict))
        own = checkpoint.check(self, state_dict)
        held = self._held(state_dict)
        for entry, values in held:
            self.work.check_state(entry, values, OTHER_STATE, loading=True)
        state_dict = {key: value for key, value in state_dict.items() if key != "zokern"}
        super().load_state_dict(state_dict)
        for entry, values in held:  # torch casts state to the parameter's dtype
            for key, value in values.items():
                if isinstance(value, Tensor):
                    here = value.to(entry.tensor.device, copy=True, memory_format=torch.contiguous_format)
                    self.state[entry.tensor][key] = here
        self.discard()
        self.bases.states = self.low_bits.states = self.scaling.states = self.state  # torch made a new one
        self.work.forget()
        self.run.seed, self.run.step = own["seed"], own["step"]
        self.guards.skips, self.guards.dead = own["skips"], own["dead"]
        checkpoint.load_parts(self, own)

    def _held(self, state_dict: dict[str, Any]) -> list[tuple[parameters.Trained, dict[str, Any]]]:
        """The entries that a state_dict holds state of, with that state."""
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        entries = dict(zip(numbers, (entry for group in self.work.entries for entry in group)))
        unknown = [number for number in state_dict["state"] if number not in entries]
        if unknown:
            raise ValueError(
                f"state_dict has state of parameters number {unknown}; expected numbers among {numbers}"
            )
        return [(entries[number], values) for number, values in state_dict["state"].items()]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Neither copied nor pickled: torch's way would lose the module, its hooks, deferred updates and the
        names that decide z."""
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: it belongs to the parameters that it "
            "trains; copy the model, build "
            "another optimizer for the copy and load_state_dict(optimizer.state_dict()) into it"
        )

    # One step -----------------------------------------------------------------------------------------------

    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, first_order: Callable[[], Any] | None = None,
        reads: bool = True
    ) -> float | None:  # fmt: skip
        """Runs one step and returns the mean of its losses, as torch's optimizers do.

        closure, first_order  as for zokern.step, which returns the whole record
        reads                 False: return None, and do not wait for the losses

        Without a closure it moves nothing while every lr is 0, because torch.distributed.checkpoint has an
        optimizer make its state so. Raises TypeError without one otherwise, and what zokern.step raises."""
        if closure is None:
            taken, self.taken = self.taken, False
            if taken or all(float(group["lr"]) == 0.0 for group in self.param_groups):
                if not taken:
                    self.work.start(self.state)
                return None
            raise TypeError(
                "step() needs a closure that computes the loss: it is read at more than one point"
            )
        observed = (
            self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()
        )  # fmt: skip
        take = self._observed if observed else self._step
        return take(closure, first_order=first_order, reads=reads)

    step.hooked = True  # type: ignore[attr-defined]  # torch's wrapper takes as long as a launch

    def _step(
        self, closure: Callable[[], Any], first_order: Callable[[], Any] | None = None, reads: bool = True
    ) -> float | None:
        with self.readings():
            self.result = run(self, closure, first_order)
            self.work.adopt()
            self.drawn = True
        return self.result.loss if reads else None

    _observed = torch.optim.Optimizer.profile_hook_step(_step)

    @contextmanager
    def readings(self) -> Iterator[None]:
        """Inside, this thread alone reads losses, and modules take no deferred updates. Raises RuntimeError
        inside another one."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "step in progress: a step was started inside the closure of another, or in a second thread"
            )
        self.drawn = self._prepared = False
        try:
            self.deferred.open(self.work.tree)
            yield
        finally:
            self.run.step += self.drawn  # the only place where the number advances
            if self._prepared:
                self.deferred.accept()
            self.deferred.close(self.work.tree)
            self._lock.release()

    def plan(self) -> Plan:
        """Returns the checked work of this step. Raises before anything is touched."""
        work = self.work
        if self.steps >= 2**32:
            raise ValueError(
                f"step number {self.steps} does not fit the stream's 32 bits; continue with another seed"
            )
        self.ranks.check(self)
        if self._several:
            self.ranks.check_spread()
        if work.sharded:
            shards.check(self)
            shards.reshard(work.tree.modules)
        work.check_tree()
        work.check_groups(self.param_groups)
        for given in self.param_groups:
            options.check_group(given)
        work.build(self.param_groups, self.state)
        for group in work.groups:
            group.eps = float(group.options["eps"])
            if self.rule.share is None and group.matrices is None:
                self.rule.share_of(group)
        if not work.groups:
            raise ValueError("no parameter requires a gradient any more: nothing to train in this step")
        # parts that a step does not name are forgotten: they hold lists of tensors
        earlier, work.scopes = work.scopes, {}
        plan = Plan(
            work.groups, self.direction, self.seed, self.steps, self.rounding, work.tree, self.factored,
            scopes=work.scopes, earlier=earlier, maximize=self.guards.maximize, tape=self.tape,
            sharded=work.sharded,
        )  # fmt: skip
        self.scaling.renew(plan)
        for group in work.groups:
            group.check_waiting()
        if [group.eps for group in work.groups] != self._eps:
            self._eps = []  # after a refusal it is looked at again
            if self.estimator.perturbs:
                underflow.check_perturbation(plan, self.guards.force)
            self._eps = [group.eps for group in work.groups]
        self._prepared = True
        return plan

    def prepare(self, plan: Plan, oracle: Oracle) -> None:
        """Readies what losses are read of: low bits, updates of old bases, this step's bases, the rule."""
        self.low_bits.drop(plan.groups)
        self.deferred.settle(plan)
        self.bases.renew(plan, oracle)
        if self.rule.prepare is not None:
            self.rule.prepare(plan, oracle, self.state)

    def learn(self, plan: Plan, estimate: Estimate, finite: Tensor) -> None:
        """Gives a direction with factors what an estimate says, before the weights move along it."""
        self.scaling.learn(plan, estimate, finite)

    def defers(self) -> bool:
        """Whether this step's updates of low-rank directions are deferred."""
        return self.deferred.defers(self.steps, self.evaluation)

    def gated(self) -> bool:
        """Whether the weights move, or stay, by what the device knows: the host need not know that a step is
        finite."""
        # a subclass may take numbers, so that a rule says it of itself alone
        return "gated" in vars(type(self.rule)) and self.rule.gated

    def count(self, result: StepResult) -> None:
        """Has the guards look at a step's numbers: at once on a CPU, and on a GPU at those of several steps
        together."""
        if result.unseen and self.result is None:
            self.guards.name_unseen(result.unseen)
        self._unseen.append((result, [float(group["lr"]) for group in self.param_groups]))
        # ranks read losses on the host in every step
        on_host = self.ranks.transport is not None or all(g.theta[0].is_cpu for g in self.work.groups)
        if len(self._unseen) >= self.guards.looks(on_host):
            self.look()

    def look(self) -> None:
        """Has the guards look at all steps that they have not seen, which waits for the device.

        Raises RuntimeError where a guard stops the run; it names the step."""
        steps, self._unseen = self._unseen, []
        read([result.numbers for result, _ in steps])
        for result, lrs in steps:
            self.ranks.note(result.step, (result.losses, result.coefficients, result.skipped, lrs))
            self.guards.see(result, lrs)

    # Deferred updates ---------------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether updates are deferred: the weights lack them until flush(). Then EMA, p.norm() and other
        code that reads weights directly sees old weights; module forwards and state_dict() flush by
        themselves."""
        return self.deferred.pending

    def flush(self) -> None:
        """Writes the deferred updates of low-rank directions into the weights: W <- W + U C V^T, one
        rounding.

        A forward (outside a step), state_dict and load_state_dict of the module and of every module in it do
        this by themselves, and so does the end of the optimizer. Reading a parameter directly, or a pickle of
        the module, does not. A flush adds a rounding of W: a run that was flushed, or saved, within an
        interval is equal to rounding to one that was not, and has the bits of one that resumed from there.
        Raises RuntimeError if the weights were written in between, or inside evaluating()."""
        self.deferred.flush()

    def discard(self) -> None:
        """Forgets the deferred updates: the run goes on from the weights as they are now, loaded or edited by
        hand."""
        self.deferred.discard()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the weights have the deferred updates; at the end they are put back, so the run goes on to
        the same bits.

        Unlike flush(), which splits an interval's one rounding in two. Takes a copy of the weights
        meanwhile."""
        if not self.pending:
            yield
            return
        with self.deferred.shown(self.plan()):
            yield


__all__ = ["ZerothOrder"]
