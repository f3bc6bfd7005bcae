"""transformers' Trainer with zeroth-order steps: its loop, schedules, logs, callbacks and checkpoints, and no
backward pass.

    trainer = ZerothOrderTrainer(model, args, train_dataset=data, zo=dict(method="SubZero", eps=1e-3, rank=8))
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .guards import EVERY
from .methods import METHODS
from .optimizer import ZerothOrder
from .result import StepResult, read
from .step import step, unwrapped

try:
    from transformers import Trainer
except ImportError as problem:
    raise ImportError(f"zokern.hf needs transformers: pip install 'zokern[hf]' ({problem})") from problem

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object

OURS = "zo['method'] is the optimizer: give its options in zo, and leave this argument out"
WHOLE = "a step needs the whole parameters in one process: leave it out"
REFUSED = {  # training arguments that have no meaning, or another one, without a backward pass
    "fp16": "its scaled losses are for a backward pass: take bf16=True, or load the model in float16",
    "deepspeed": WHOLE,
    "fsdp": WHOLE,
    "parallelism_config": WHOLE,
    "max_grad_norm": "there is no gradient to clip: bound c, zo=dict(estimator=zokern.Spsa(clip=...))",
    **dict.fromkeys(("optim", "optim_args", "optim_target_modules"), OURS),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), OURS),
}
CHECKPOINTING = {"gradient_checkpointing", "activation_checkpointing"}  # two names of one argument
FROM_ARGS = {"lr": "learning_rate", "weight_decay": "weight_decay"}


class ZerothOrderMixin(Base):
    """Has a subclass of Trainer take zeroth-order steps: class T(ZerothOrderMixin, trl.SFTTrainer): pass

    zo  options of the optimizer, by name. 'method' is the name of one of zokern's methods, or a function of
        (model, lr=, weight_decay=, seed=, ...) that returns a zokern optimizer; by default 'MeZO'. 'seed' is
        args.seed by default. The others, such as eps, rank and evaluation, go to the method. Without zo,
        optimizers=(opt, None) may hold a zokern optimizer of this model

    TrainingArguments has the rest: learning_rate, weight_decay, schedule, gradient_accumulation_steps, bf16,
    logs, evaluation and checkpoints. A resumed run has the bits of the run that saved and went on.

    One optimizer step of Trainer is one zokern.step. All its micro-batches are read at every point, and their
    losses are weighted as Trainer weights them. The weights have moved when on_pre_optimizer_step is called.
    The logs have these entries:

    loss                mean of StepResult.loss over the steps since the last log
    projected_gradient  root mean square of their coefficients; replaces 'grad_norm'
    skipped_steps       how many of them were skipped (StepResult.skipped)
    evaluation          StepResult.evaluation, when it is another one than in the log before

    gradient_checkpointing becomes False in the arguments, because nothing is kept for a backward pass. For a
    method that has one, as zokern.Hybrid has, call model.gradient_checkpointing_enable(). total_flos counts a
    backward pass all the same.

    Raises ValueError, before the Trainer is built, for training arguments that need a gradient or parts of
    parameters, for several GPUs of one process, and for several processes without zo=dict(group=...);
    TypeError, in train(), for another optimizer."""

    model: Any
    optimizer: Any

    def __init__(self, *given: Any, zo: Mapping[str, Any] | None = None, **options: Any) -> None:
        self.zo = dict(zo or {})
        _check_options(self.zo, options)
        _check_arguments(options.get("args", given[1] if len(given) > 1 else None), self.zo)
        self._parts: list[tuple[Any, Any]] = []  # micro-batches of the next step, with its number of items
        self._operations: dict[Any, int] = {}  # floating-point operations, by the sizes of inputs
        self._measured = Measured()
        super().__init__(*given, **options)

    def create_optimizer(self, *rest: Any) -> Any:
        """Returns the optimizer of zo, or the one that was given. Raises TypeError if it is not zokern's."""
        self._parts, self._operations = [], {}
        self.accelerator.clip_grad_norm_ = lambda *given, **options: None  # there are none to walk through
        if self.optimizer is None:
            self.optimizer = self._made()
        unwrapped(self.optimizer)
        return self.optimizer

    def _made(self) -> ZerothOrder:
        options = {"seed": self.args.seed, **self.zo}
        method, decay = options.pop("method", "MeZO"), self.args.weight_decay
        made = METHODS[method] if isinstance(method, str) else method
        optimizer = made(self.model, lr=self.args.learning_rate, weight_decay=decay, **options)
        if decay:  # Trainer does not decay biases and norms
            decayed = {*self.get_decay_parameter_names(self.model)}
            left = {id(p) for name, p in self.model.named_parameters() if name not in decayed}
            _split(optimizer, left, weight_decay=0.0)
        return optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Keeps a micro-batch; takes a step with the last one. Returns the loss of the step, float32 []."""
        self._parts.append((inputs, num_items_in_batch))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), dtype=torch.float32, device=self.args.device)
        parts, self._parts = self._parts, []
        forward = super().training_step

        def closure() -> Any:
            with _losses(self.accelerator) as losses:
                for inputs, items in parts:
                    forward(model, copy.copy(inputs), items)  # a copy: label smoothing pops the labels
            return sum(losses)

        optimizer = unwrapped(self.optimizer)
        result = step(optimizer, closure)
        optimizer.taken = True  # Trainer calls optimizer.step() as well
        self._measured.add(result)
        return _mean_loss(result).to(self.args.device, torch.float32)

    def floating_point_ops(self, inputs: Any) -> int:
        """Returns Trainer's count. It walks through the model for it: here once for inputs of one size."""
        sizes = tuple((name, getattr(value, "shape", None)) for name, value in inputs.items())
        if sizes not in self._operations:
            self._operations[sizes] = super().floating_point_ops(inputs)
        return self._operations[sizes]

    def log(self, logs: dict[str, Any], *rest: Any, **options: Any) -> None:
        """Logs what Trainer does, and what the steps since the last log have measured."""
        if "loss" in logs:
            logs.update(self._measured.take())
        super().log(logs, *rest, **options)


class ZerothOrderTrainer(ZerothOrderMixin, Trainer):
    """transformers' Trainer with zeroth-order steps; ZerothOrderMixin has the options and the logs.

    args = transformers.TrainingArguments("out", learning_rate=2e-5, max_steps=1000)
    trainer = ZerothOrderTrainer(model, args, train_dataset=data, zo=dict(method="MeZO", eps=1e-3))
    trainer.train()"""


class Measured:
    """What the steps since the last log have measured."""

    def __init__(self) -> None:
        self.results: list[StepResult] = []
        self.evaluation = ""  # of the last log
        self._clear()

    def _clear(self) -> None:
        self.squares, self.draws, self.skipped = 0.0, 0, 0

    def add(self, result: StepResult) -> None:
        """Keeps a step. Its numbers are read with those of other steps, because that waits for a GPU."""
        self.results.append(result)
        if len(self.results) > EVERY:
            self._read(self.results[:-1])

    def _read(self, results: list[StepResult]) -> None:
        read([result.numbers for result in results])
        for result in results:
            self.skipped += result.skipped
            if not result.skipped:
                self.squares += math.fsum(c * c for c in result.coefficients)
                self.draws += len(result.coefficients)
        self.results = self.results[len(results) :]

    def take(self) -> dict[str, Any]:
        """Returns the entries of a log, and starts anew."""
        if not self.results:
            return {}
        latest = self.results[-1].evaluation
        self._read(self.results)
        found: dict[str, Any] = {"skipped_steps": self.skipped}
        if self.draws:
            found["projected_gradient"] = math.sqrt(self.squares / self.draws)
        if latest != self.evaluation:
            found["evaluation"] = self.evaluation = latest
        self._clear()
        return found


@contextmanager
def _losses(accelerator: Any) -> Iterator[list[Tensor]]:
    """Inside, accelerator.backward(loss) keeps the loss and does nothing else."""
    losses: list[Tensor] = []
    accelerator.backward = lambda loss, **options: losses.append(loss)
    try:
        yield losses
    finally:
        del accelerator.backward


def _mean_loss(result: StepResult) -> Tensor:
    """Returns StepResult.loss where it lies: on the device, until the numbers of the step are read."""
    losses = [part.losses.reshape(-1) for part in result.numbers.parts]
    return (
        torch.cat(losses).mean() if losses else torch.tensor(result.loss, dtype=torch.float32, device="cpu")
    )


def _split(optimizer: ZerothOrder, ids: Collection[int], **options: Any) -> None:
    """Moves parameters, before the first step, from the only group to another one with these options."""
    (group,), (entries,) = optimizer.param_groups, optimizer.work.entries
    kept: list[dict[str, Any]] = [{**group}, {**group, **options}]
    sides = [[i for i, e in enumerate(entries) if (id(e.tensor) in ids) == moved] for moved in (False, True)]
    for side, own in zip(sides, kept):
        own |= {key: [group[key][i] for i in side] for key in ("params", "param_names")}
    found = [(own, [entries[i] for i in side]) for side, own in zip(sides, kept) if side]
    optimizer.param_groups[:] = [own for own, _ in found]
    optimizer.work.entries[:] = [own for _, own in found]
    optimizer.work.params[:] = [[entry.tensor for entry in own] for _, own in found]


def _check_options(zo: dict[str, Any], options: dict[str, Any]) -> None:
    """Raises ValueError for another optimizer, for what the training arguments say, and for no method."""
    if zo and (options.get("optimizers") or (None,))[0] is not None:
        raise ValueError(f"zo is {zo!r:.80} beside an optimizer; expected one of the two")
    if (other := options.get("optimizer_cls_and_kwargs")) is not None:
        raise ValueError(f"optimizer_cls_and_kwargs is {other!r:.80}; give zo=dict(method=..., ...)")
    for name, theirs in FROM_ARGS.items():
        if name in zo:
            raise ValueError(f"zo has {name} = {zo[name]!r}; give TrainingArguments({theirs}={zo[name]!r})")
    method = zo.get("method", "MeZO")
    if not callable(method) and method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"zo['method'] is {method!r}; expected a function or one of {list(METHODS)}{hint}")


def _check_arguments(args: Any, zo: dict[str, Any]) -> None:
    """Raises ValueError for training arguments that a step without a backward pass cannot follow."""
    if args is None:
        return
    for name in CHECKPOINTING & vars(args).keys():
        setattr(args, name, False)
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name, way_out in REFUSED.items():
        value = getattr(args, name, None)
        if value and value != defaults.get(name):
            raise ValueError(f"{name} is {value!s:.80}; {way_out}")
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu is {args.n_gpu}: Trainer would copy the model to all of them; start with "
            "CUDA_VISIBLE_DEVICES=0"
        )
    if args.world_size > 1 and "group" not in zo:
        raise ValueError(
            f"world_size is {args.world_size}, and zo has no group: each process would move along its own "
            "losses; give zo=dict(group='auto', ...), or start one process"
        )


__all__ = ["ZerothOrderMixin", "ZerothOrderTrainer"]
