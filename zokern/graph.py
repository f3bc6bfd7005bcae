"""A step that is captured once and replayed for every batch: `zokern.graph`.

On a GPU the launches of the whole step, with the user's own forwards, are one CUDA graph. The host writes the
few numbers that change (lr, weight decay, the step's number) to device memory, and starts it. On a CPU the
same step runs with the same device numbers and without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .backends import Noise
from .checks import says
from .directions import Aligned
from .fingerprint import memory_of
from .modules import refill, same
from .parallel import micro_batches
from .result import Numbers, StepResult
from .rule import Adam
from .step import run, unwrapped

EAGER = 2  # steps that choose the evaluation, upload tables and make the rule's state
EVERY = 500  # steps, after which one runs without the graph: evaluations are compared anew there


class Tape:
    """What a captured step does on the host before each replay.

    Numbers of the stream are named by the step. Kernels were given the number of the captured step, and add
    the clock, which counts the steps since.

    start  the number of the captured step;  now  that of the step under way"""

    def __init__(self, start: int) -> None:
        self.start = self.now = start
        self.clocks: dict[torch.device, Tensor] = {}
        self.given: list[tuple[Callable[[], Sequence[float]], Tensor]] = []
        self.actions: list[Callable[[], None]] = []
        self.place = 0  # of the next number, where a CPU runs the step anew
        self.again = False  # whether it does

    def noise(self, noise: Noise, device: torch.device) -> Noise:
        """Returns the same random numbers, named from the captured step on."""
        if device not in self.clocks:
            self.clocks[device] = torch.zeros(1, dtype=torch.int64, device=device)
        past = self.now - self.start
        draws = [((step - past) & 0xFFFFFFFF, word) for step, word in noise.draws]
        return noise._replace(draws=draws, clock=self.clocks[device])

    def numbers(
        self, make: Callable[[], Sequence[float]], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Returns device memory for numbers of the host, which each replay finds renewed."""
        if self.again:
            self.place += 1
            return self.given[self.place - 1][1]
        memory = torch.tensor([*make()], dtype=dtype, device=device)
        self.given.append((make, memory))
        return memory

    def act(self, action: Callable[[], None]) -> None:
        """Does something on the host, now and before each replay."""
        if not self.again:
            action()
            self.actions.append(action)

    def renew(self, step: int) -> None:
        """Writes clocks and numbers of a step to device memory. Nothing waits for the device."""
        self.now, self.place, self.again = step, 0, True
        for action in self.actions:
            action()
        for clock in self.clocks.values():
            clock.fill_(step - self.start)
        for make, memory in self.given:
            fresh = torch.tensor([*make()], dtype=memory.dtype, device="cpu")
            memory.copy_(fresh.pin_memory() if memory.is_cuda else fresh, non_blocking=True)


class Graph:
    """A step on inputs that stay in place. See `graph`.

    captures  how often the step was made ready to be captured"""

    def __init__(self, optimizer: Any, closure: Any) -> None:
        self.optimizer, self.closure = unwrapped(optimizer), micro_batches(closure)
        _check(self.optimizer)
        self.captures = 0
        self._seen: Any = None  # what the last step relied on
        self._held: list[Any] = []  # the objects that it left
        self._steps = 0
        self._tape: Tape | None = None
        self._graph: Any = None
        self._result: StepResult | None = None
        self._flat: Tensor | None = None

    def __call__(self) -> StepResult:
        """Runs one step on what the inputs hold now, and returns its record.

        Raises what zokern.step raises, and RuntimeError where the step cannot be captured."""
        optimizer, self._steps = self.optimizer, self._steps + 1
        seen, before = _relied_on(optimizer), self._seen
        # a step that finds something new makes bases, tables and state: none of these belongs on a tape
        is_new = seen != before or not same(_held(optimizer), self._held)
        self._seen = seen
        try:
            if self._steps <= EAGER or self._steps % EVERY == 0 or is_new:
                self._tape = None
                optimizer.step(self.closure, reads=False)
                return optimizer.result
            with optimizer.readings():
                self._step()
                optimizer.drawn = True
        finally:
            self._held = _held(optimizer)
        optimizer.count(optimizer.result)
        return optimizer.result

    def _step(self) -> None:
        """Runs the step from a tape, which is made where there is none."""
        optimizer, tape = self.optimizer, self._tape
        kept = _State(optimizer) if self._graph is None or tape is None else None
        try:
            if tape is None:
                # the numbers that a capture needs are in memory after it
                self._tape, self._graph = Tape(optimizer.steps), None
                self.captures += 1
                self._run(self._tape)
            else:
                tape.renew(optimizer.steps)
                self._replay(tape)
        except BaseException:
            self._tape = None  # it has a part of the step's numbers
            if kept is not None and not optimizer.drawn:
                kept.restore()
            raise

    def _replay(self, tape: Tape) -> None:
        """Runs the step with the numbers of now: as a graph, which is captured first, where there are any."""
        if self._graph is None:
            self._graph = _new_graph(self.optimizer.work.groups[0].theta[0].device)
            if self._graph is None:
                self._run(tape)
                return
            self._accept(drop=True)  # not in the capture, whose work is done in every replay
            self._capture(tape)
        else:
            self._accept(drop=True)
        self._graph.replay()
        self._accept()
        assert self._result is not None and self._flat is not None
        # the next replay writes over the numbers
        numbers: Numbers = self._result.numbers.of(self._flat.clone())
        self.optimizer.result = self._result.at(self.optimizer.steps, numbers)

    def _accept(self, drop: bool = False) -> None:
        """Takes the weights as they are; drop: without the low bits of those that others wrote."""
        optimizer = self.optimizer
        if drop:
            optimizer.low_bits.drop(optimizer.work.groups)
        for group in optimizer.work.groups:
            optimizer.low_bits.accept(group.tensors)

    def _capture(self, tape: Tape) -> None:
        """Records the launches of a step. Nothing runs."""
        kept = _State(self.optimizer)
        try:
            with _recording(self._graph):
                self._run(tape)
                kept.put_back()
        except RuntimeError as problem:
            raise RuntimeError(
                f"the step cannot be captured: {problem}. A captured closure reads no value, moves nothing "
                "between devices and calls no .item(); "
                "zokern.step(optimizer, closure) runs it without a graph"
            ) from problem
        finally:
            self.optimizer.drawn = False
            self._accept()

    def _run(self, tape: Tape) -> None:
        """Runs the step with its numbers in device memory."""
        optimizer = self.optimizer
        optimizer.tape = tape
        try:
            optimizer.result = self._result = run(optimizer, self.closure)
            if self._graph is not None:
                self._flat = self._result.numbers.packed()
        finally:
            optimizer.tape = None


def _new_graph(device: torch.device) -> Any:
    """Returns an empty graph; None where a device has none."""
    return torch.cuda.CUDAGraph() if device.type == "cuda" else None


def _recording(graph: Any) -> AbstractContextManager:
    """Returns a context whose launches are recorded and not run."""
    torch.cuda.synchronize()
    return torch.cuda.graph(graph, capture_error_mode="thread_local")


class _State:
    """What a rule keeps of each parameter, at one moment."""

    def __init__(self, optimizer: Any) -> None:
        self.kept = [(state, dict(state)) for state in optimizer.state.values()]

    def put_back(self) -> None:
        """Copies what was made anew to where it was, so that a replay finds it there."""
        for state, before in self.kept:
            if new := {*state} - {*before}:
                raise RuntimeError(f"it made the state {sorted(new)} of a parameter anew")
            for key, value in before.items():
                if isinstance(value, Tensor) and state[key] is not value:
                    value.copy_(state[key])
                    state[key] = value

    def restore(self) -> None:
        """Gives each parameter what it had, after a step that failed."""
        for state, before in self.kept:
            refill(state, before)


def graph(optimizer: Any, closure: Any) -> Graph:
    """Returns a callable that runs zokern.step(optimizer, closure), captured in one CUDA graph.

    optimizer  a zokern optimizer
    closure    computes the loss from tensors that stay in place. The caller copies each batch into them,
               as for torch.cuda.make_graphed_callables: inputs.copy_(batch). A list are micro-batches, as
               for zokern.step

    Each call is one step. The first three or four run as they are. The next one is captured: both
    readings, the projected gradient, the update. From then on the host writes lr, weight decay and the
    step's number to device memory and starts the graph: schedulers go on as before. A step runs as it is
    where memory, flags, eps, a basis or the optimizer's state have changed, and every 500th does. The
    step is then captured again. On a CPU no graph is made, and the same code runs. Bits are those of
    zokern.step, which may run steps in between. After an exception weights, state and step number are as
    before, and the step can be taken again.

    Numbers of a result are read when they are asked for, and guards look at several steps together.

    Raises TypeError for what is no optimizer or no closure. Raises ValueError, with the way out, where a
    method chooses its draws by values of the losses or by numbers of the host, back-propagates, defers
    updates, or reads by another evaluation than 'master', 'paired' or 'auto'. A model with dropout in
    train mode, and several GPUs, are not supported."""
    return Graph(optimizer, closure)


def _check(optimizer: Any) -> None:
    """Refuses what cannot be captured."""
    name, estimator, rule = type(optimizer).__name__, optimizer.estimator, optimizer.rule
    way_out = "zokern.step(optimizer, closure) runs it without a graph"
    if optimizer.ranks.transport is not None:
        raise ValueError(
            f"optimizer is {name} with a group of {optimizer.ranks.transport.size} ranks, whose losses pass "
            f"through the host in every step; {way_out}"
        )
    if not says(estimator, "captures"):
        raise ValueError(
            f"optimizer is {name} with estimator {type(estimator).__name__}, whose points depend on losses "
            f"or on numbers of the host in every step; {way_out}"
        )
    if not optimizer.gated():
        raise ValueError(
            f"optimizer is {name} with rule {type(rule).__name__}, which takes numbers to the host; {way_out}"
        )
    plain = rule.base is rule.prepare is None
    if not (plain if rule.captures is None else rule.captures):
        raise ValueError(
            f"optimizer is {name} with rule {type(rule).__name__}, which does something on the host in "
            f"every step; {way_out}"
        )
    if isinstance(optimizer.factored, Aligned) and optimizer.factored.steps is not None:
        raise ValueError(
            f"optimizer is {name} with direction {optimizer.factored.name!r}, whose delta falls from step to "
            f"step; build it with steps=None, or {way_out}"
        )
    if optimizer.evaluation.name not in ("master", "paired", "auto"):
        raise ValueError(
            f"evaluation is {optimizer.evaluation.name!r}; "
            f"expected 'master', 'paired' or 'auto', or {way_out}"
        )
    if optimizer.factored is not None and isinstance(rule, Adam) and not rule.core:
        raise ValueError(
            f"optimizer is {name} with rule Adam, which gives lr to the launches of a matrix by value; "
            f"{way_out}"
        )
    if optimizer.factored is not None and optimizer.deferred.wanted is not False:
        raise ValueError(
            f"optimizer is {name}, which may defer its updates; build it with defer=False, or {way_out}"
        )
    if optimizer.work.model is not None:
        for module in optimizer.work.model.modules():
            if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.training and module.p:
                raise ValueError(
                    f"{type(module).__name__} is in train mode, and both readings need the same mask; call "
                    f"model.eval(), or {way_out}"
                )


def _relied_on(optimizer: Any) -> Any:
    """Returns what a captured step took from the host and does not write anew."""
    tensors = [entry.tensor for group in optimizer.work.entries for entry in group]
    options = [
        (g["eps"], float(g["lr"]) == 0.0, float(g["weight_decay"]) == 0.0) for g in optimizer.param_groups
    ]
    factored = optimizer.factored
    # a direction that draws U and V in every step has no basis that a step relies on
    basis = None if factored is None or factored.joins else factored.basis_step(optimizer.steps)
    scales = None if optimizer.scaled is None else optimizer.scaled.born(optimizer.steps)
    flags = [module.training for module in optimizer.work.tree.modules]
    trained = [tensor.requires_grad for tensor in tensors]
    groups = [id(group) for group in optimizer.param_groups]
    choice = [*getattr(optimizer.evaluation, "order", ())][:1]
    return memory_of(tensors), trained, options, basis, scales, flags, groups, choice


def _held(optimizer: Any) -> list[Any]:
    """Returns the objects whose memory a captured step reads and writes beside the weights: a step without
    the graph, and load_state_dict, may put others in their place."""
    states = [*optimizer.state.values()]
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return [optimizer.work.groups, *states, *tensors]


__all__ = ["Graph", "graph"]
