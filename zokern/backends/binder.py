"""Launches of Triton kernels past the binder of Triton's JIT, which takes longer than the rest of a call.

`kernel[grid](...)` binds the arguments to a signature, asks each what the compiler may rely on, and finds the
compiled kernel by a text of all answers. A launch is asked for again with other numbers and the same answers.
So the answers are the key here, and what was compiled is run directly, through the two public forms that
Triton 3.6 to 3.9 share: `kernel[grid](...)` returns what was compiled, and `compiled[grid](...)` launches it.
Where one of them is missing, as in the interpreter, each launch is an ordinary call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .device_tables import Launch, Upload, on, stream_of

# by id of a kernel, which they hold: positions of the arguments that the compiler is told of
_told: dict[int, tuple[Any, list[int]]] = {}


class _Direct(NamedTuple):
    """What launches a compiled kernel.

    run        takes all arguments in order
    pointers   positions of tensors, whose addresses it takes
    constants  the last arguments
    """

    run: Callable[..., None]
    pointers: list[int]
    constants: tuple[Any, ...]


def run(
    kernel: Any, blocks: int, launch: Launch, upload: Upload, which: tuple[int, ...],
    arguments: tuple[Any, ...], constants: dict[str, Any], options: dict[str, Any],
) -> None:  # fmt: skip
    """Runs a kernel on the current stream of a launch's device.

    which      parts of the table, which are the first arguments; the same at every call, as are the types
    arguments  those that follow: tensors, whole numbers of 32 bits, floats, tuples and None
    constants  the others, by name, in the same order at every call
    """
    told = _told.get(id(kernel)) or _tell(kernel, len(which), arguments)
    name = (
        id(kernel), blocks, *constants.values(), *[value is None for value in arguments],
        *[_answer(arguments[i]) for i in told[1]],
    )  # fmt: skip
    found = launch.memo.get(name)
    with on(launch.device):
        if found:
            values = [upload.places[i] for i in which]
            values += arguments
            for i in found.pointers:
                values[i] = values[i].data_ptr()
            try:
                return found.run(*values, *found.constants, stream=stream_of(launch.device))
            except TypeError:  # this Triton takes other arguments, and says so before it launches
                launch.memo[name] = found = False
        tables = [upload.part(launch, i) for i in which]
        compiled = kernel[(blocks,)](*tables, *arguments, **constants, **options)
        if found is None:
            launch.memo[name] = _direct(kernel, compiled, blocks, len(which), arguments, constants)


def _tell(kernel: Any, skip: int, arguments: tuple[Any, ...]) -> tuple[Any, list[int]]:
    asked = zip(getattr(kernel, "params", ())[skip:], arguments)
    told = [i for i, (p, v) in enumerate(asked) if not p.do_not_specialize and not isinstance(v, float)]
    _told[id(kernel)] = kernel, told
    return _told[id(kernel)]


def _answer(value: Any) -> Any:
    """Returns what Triton's compiler relies on of a value: is it 1, a multiple of 16?"""
    if isinstance(value, int):
        return (value == 1, value % 16 == 0)
    return None if value is None else value.data_ptr() % 16 == 0


def _direct(
    kernel: Any, compiled: Any, blocks: int, skip: int, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> _Direct | bool:
    """Returns what launches a compiled kernel, False if nothing does."""
    names = getattr(kernel, "arg_names", ())
    if not hasattr(type(compiled), "__getitem__") or getattr(kernel, "pre_run_hooks", None):
        return False
    pointers = [skip + i for i, value in enumerate(arguments) if isinstance(value, Tensor)]
    last = tuple([constants[name] for name in names[skip + len(arguments) :]])
    return _Direct(compiled[(blocks, 1, 1)], pointers, last)


__all__ = ["run"]
