"""Wrappers that hold a module inside: torch.compile, DistributedDataParallel and others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Wrappers: the class that torch.nn.Module.named_parameters meets,
# and the attribute that holds the module inside.
WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "ActivationWrapper": "_checkpoint_wrapped_module",  # checkpoint_wrapper, offload_wrapper
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}


def wrapped(module: nn.Module) -> str | None:
    """Returns the attribute in which a wrapper of torch's holds the module inside; None: no wrapper.

    The class decides, so an attribute of the user's own that is called ``module`` is not taken for one."""
    for cls in type(module).__mro__:
        if (attribute := WRAPPERS.get(cls.__name__)) is not None and cls.__module__.partition(".")[
            0
        ] == "torch":
            return attribute if module._modules.get(attribute) is not None else None
    return None


def inner(module: nn.Module) -> nn.Module:
    """Returns the module inside wrappers that call it as it is, in any order.

    DataParallel on several devices calls replicas, and FullyShardedDataParallel holds flat parameters: they
    stay, for check_model."""
    while (attribute := wrapped(module)) is not None and not _hides(module):
        module = module._modules[attribute]  # type: ignore[assignment]
    return module


def _hides(wrapper: nn.Module) -> bool:
    """Tells whether a wrapper's forward reads other tensors than the parameters of the module inside."""
    if isinstance(wrapper, nn.DataParallel):
        return len(getattr(wrapper, "device_ids", None) or ()) > 1
    return any(cls.__name__ == "FullyShardedDataParallel" for cls in type(wrapper).__mro__)


def is_compiled(module: nn.Module) -> bool:
    """Tells whether a module's forward is torch.compile's: a wrapper, or after module.compile()."""
    return wrapped(module) == "_orig_mod" or getattr(module, "_compiled_call_impl", None) is not None


def is_spread(module: nn.Module) -> bool:
    """Tells whether a module is DistributedDataParallel's wrapper."""
    return any(cls.__name__ == "DistributedDataParallel" for cls in type(module).__mro__)


def is_parallel(model: nn.Module) -> bool:
    """Tells whether a module, or one inside it, is wrapped for data parallelism over several processes."""
    return any(map(is_spread, model.modules()))


@contextmanager
def spread_modules(act: Callable[[nn.Module], None]) -> Iterator[None]:
    """Inside, calls act(module) before each forward of DistributedDataParallel."""
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: act(module) if is_spread(module) else None
    )
    try:
        yield
    finally:
        hook.remove()


def processes() -> int:
    """Returns how many processes torch.distributed runs."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if running else 1


def check_flat(model: nn.Module) -> None:
    """Refuses FullyShardedDataParallel, whose parameters are pieces of flat ones that have no names."""
    for name, module in model.named_modules():
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__):
            where = f"module {name!r}" if name else "the model"
            raise TypeError(
                f"{where} is FullyShardedDataParallel; its flat parameters hide the weights: use "
                "torch.distributed.fsdp.fully_shard, or train the wrapped module"
            )


def check_model(model: nn.Module) -> None:
    """Refuses wrappers under which a perturbation would be lost without a sign."""
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{where} is a TorchScript module, whose interpreter reads weights where no perturbation can "
                "reach; pass the eager module, or use evaluation='master'"
            )
        if isinstance(module, nn.DataParallel) and _hides(module):
            raise TypeError(
                f"{where} is DataParallel on devices {module.device_ids}, whose replicas would not see the "
                "perturbation: train the wrapped module, or give DataParallel one device"
            )
