"""Surroundings: what a step must leave as it found it, and what must not change under it.

The user's RNG streams (torch on every device in use, `random`, NumPy), train/eval flags, buffers and module tree are put back
after every reading of the loss. A buffer that a reading registers is removed again, and one that it deletes or replaces comes back:
what it was computed from was theta + eps z, and the next reading computes its own. Within a step every reading starts from the same
RNG state, drawn from (seed, step), so that all of them see the same dropout masks and no two steps do. Weights are watched through
their version counters.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from ..estimator import loss_value
from ..parameters import memory_of, storage_of
from .plan import Plan

BUFFER_BUDGET = 4 << 20  # bytes of buffers that a step snapshots; larger ones are only watched


class Surroundings:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        digest = hashlib.sha256(f"dropout {plan.seed} {plan.step}".encode()).digest()
        self.seed = int.from_bytes(digest[:8], "little")
        modules = list(dict.fromkeys(module for root in plan.roots for module in root.modules()))
        self.modes = [(module, module.training) for module in modules]
        # TorchScript (walk takes it) makes new Python objects at every look: only its modes can be compared
        modules = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
        self.slots = [(module, name, p) for module in modules for name, p in module._parameters.items()]
        self.registered = [(module, dict(module._buffers), set(module._non_persistent_buffers_set)) for module in modules]
        # a buffer on the memory of a trained weight moves with it in a walk
        weights = {storage_of(t) for group in plan.groups for t in group.tensors}
        self.buffers = [
            (module, name, b)
            for module, found, _ in self.registered
            for name, b in found.items()
            if b is not None and (b.layout != torch.strided or b.is_meta or storage_of(b) not in weights)
        ]
        self.children = [(module, dict(module._modules)) for module in modules]
        self.versions = [(name, t, t._version) for group in plan.groups for name, t in zip(group.names, group.tensors)]
        self.memory = memory_of(t for _, t, _ in self.versions)
        self.buffer_versions = [0 if b.is_inference() else b._version for _, _, b in self.buffers]
        self.saved: dict[int, torch.Tensor] = {}
        self.written: set[str] = set()  # buffers that a reading changed
        left = BUFFER_BUDGET
        for module, _, b in sorted(self.buffers, key=lambda item: item[2].numel() * item[2].element_size()):
            left -= b.numel() * b.element_size()
            # norms write their statistics below the version counters, so theirs are saved whatever the size
            if not b.is_meta and (left >= 0 or isinstance(module, nn.modules.batchnorm._NormBase)):
                self.saved[id(b)] = b.detach().clone()

    def read(self, closure: Callable[[], object], mode: AbstractContextManager | None = None) -> float:
        """One reading: the closure's loss as a float, under no_grad (and a mode that replaces weights), everything put back."""
        with self.session(mode is not None):
            return self.body(closure, mode)

    @staticmethod
    def body(closure: Callable[[], object], mode: AbstractContextManager | None = None) -> float:
        with torch.no_grad(), mode or nullcontext():
            value = closure()
        return loss_value(value)

    @contextmanager
    def session(self, eager: bool) -> Iterator[None]:
        """Around one reading, or several that run side by side: seeded streams before, everything put back and checked after."""
        streams = _save_rng()
        try:
            _seed_rng(self.seed)
            with _eager_compile(eager):
                yield
        finally:
            _load_rng(streams)
            self._put_back()
        self.check()

    def _put_back(self) -> None:
        for module, training in self.modes:
            if module.training != training:
                module.training = training
        for module, found, hidden in self.registered:
            if module._buffers or found:
                self._register_again(module, found, hidden)
        for module, name, buffer in self.buffers:
            if id(buffer) in self.saved and not torch.equal(buffer, self.saved[id(buffer)]):
                if not isinstance(module, nn.modules.batchnorm._NormBase):  # statistics that a loss in train mode does not read
                    self.written.add(name)
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(self.saved[id(buffer)])
        self.buffer_changed = [
            name
            for (_, name, b), version in zip(self.buffers, self.buffer_versions)
            if not b.is_inference() and b._version != version and id(b) not in self.saved
        ]
        self.buffer_versions = [0 if b.is_inference() else b._version for _, _, b in self.buffers]

    def _register_again(self, module: nn.Module, found: dict[str, torch.Tensor | None], hidden: set[str]) -> None:
        """The module's buffers as they were, in their order."""
        now = module._buffers
        if len(now) == len(found) and all([now.get(name, module) is buffer for name, buffer in found.items()]):
            return
        filled, before = ({name for name, buffer in some.items() if buffer is not None} for some in (now, found))
        self.written |= filled ^ before
        now.clear()
        now.update(found)
        module._non_persistent_buffers_set = set(hidden)

    def check(self) -> None:
        """Raise if the closure changed a weight, a module or a buffer that cannot be put back; the update has not begun."""
        now = memory_of(t for _, t, _ in self.versions)
        for (name, tensor, version), place, before in zip(self.versions, now, self.memory):
            if tensor._version != version or place != before:
                raise RuntimeError(f"the closure changed the weights of {name!r}: the loss of a step must only read them")
        for module, name, parameter in self.slots:
            if module._parameters.get(name) is not parameter:
                raise RuntimeError(
                    f"the closure replaced parameter {name!r} of {type(module).__name__}: "
                    "build the optimizer after the model has its final parameters"
                )
        for module, children in self.children:
            if module._modules != children:
                raise RuntimeError(
                    f"the closure changed the modules of {type(module).__name__}: the loss of a step must only read them"
                )
        if self.buffer_changed:
            raise RuntimeError(
                f"the closure changed buffers {self.buffer_changed}, too large for the {BUFFER_BUDGET >> 20} MB that a step "
                "snapshots: put their modules in eval mode"
            )

    def expect_writes(self) -> None:
        """Walk has just moved the weights itself."""
        self.versions = [(name, tensor, tensor._version) for name, tensor, _ in self.versions]


@contextmanager
def _eager_compile(active: bool) -> Iterator[None]:
    """Run torch.compile'd code as the Python it was compiled from: compiled graphs hold their own reads of the weights."""
    if not active or "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _save_rng() -> tuple:
    numpy = sys.modules.get("numpy")
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, random.getstate(), numpy.random.get_state() if numpy else None


def host_streams() -> tuple:
    """The states of `random` and NumPy, which are not kept per thread: what side by side readings must not advance."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy else None
    return random.getstate(), state and (state[1].tobytes(), *state[2:])


def device_streams() -> tuple[bytes, ...]:
    """The states of torch's generators, which every side of a pair has to start from."""
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]
    return tuple(state.numpy().tobytes() for state in states)


def _load_rng(state: tuple) -> None:
    cpu, cuda, python, numpy_state = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    if numpy_state is not None:
        sys.modules["numpy"].random.set_state(numpy_state)


def _seed_rng(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def check_structure(model: nn.Module, known: dict[str, torch.Tensor]) -> None:
    """Raise if a parameter of the model was replaced, removed or added for training since the optimizer saw it."""
    now = dict(model.named_parameters())
    for name, tensor in known.items():
        if now.get(name) is not tensor:
            what = "replaced" if name in now else "removed"
            raise RuntimeError(
                f"parameter {name!r} was {what} after the optimizer was built; build a new optimizer for the new model"
            )
    added = [name for name, p in now.items() if p.requires_grad and name not in known]
    if added:
        raise RuntimeError(
            f"parameters {added} were added after the optimizer was built; pass them to add_param_group, or freeze them"
        )
