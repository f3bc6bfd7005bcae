"""Launches of Triton kernels past the binder of Triton's JIT, which takes longer than the rest of a call.

`kernel[grid](...)` binds the arguments to a signature, asks each what the compiler may rely on, and finds the
compiled kernel by a text of all answers. A launch is asked for again with other numbers and the same answers.
So the answers are the key here, and what was compiled is run directly, through the two public forms that
Triton 3.6 to 3.9 share: `kernel[grid](...)` returns what was compiled, and `compiled[grid](...)` launches it.
Where one of them is missing, as in the interpreter, each launch is an ordinary call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .device_tables import Launch, Upload, on, stream_of

# by id of a kernel, which they hold: positions of parameters that the compiler is told of
_told: dict[int, tuple[Any, list[int]]] = {}


def run(
    kernel: Any, blocks: int, launch: Launch, upload: Upload, which: tuple[int, ...],
    arguments: tuple[Any, ...], constants: dict[str, Any], options: dict[str, Any],
) -> None:  # fmt: skip
    """Runs a kernel on the current stream of a launch's device.

    which      parts of the table, which are the first arguments
    arguments  those that follow: tensors, whole numbers of 32 bits, floats, tuples and None
    constants  the others, by name, in the same order at every call
    """
    if id(kernel) not in _told:
        told = [i for i, p in enumerate(getattr(kernel, "params", ())) if not p.do_not_specialize]
        _told[id(kernel)] = kernel, told
    skip, end = len(which), len(which) + len(arguments)
    name = (
        id(kernel), blocks, *constants.values(), *[value is None for value in arguments],
        *[_answer(arguments[i - skip]) for i in _told[id(kernel)][1] if skip <= i < end],
    )  # fmt: skip
    found = launch.memo.get(name)
    with on(launch.device):
        if found:
            places = [upload.places[i] for i in which]
            values = [v.data_ptr() if isinstance(v, Tensor) else v for v in arguments]
            runner, tail = found
            try:
                return runner(*places, *values, *tail, stream=stream_of(launch.device))
            except TypeError:  # this Triton takes other arguments, and says so before it launches
                launch.memo[name] = found = False
        tables = [upload.part(launch, i) for i in which]
        compiled = kernel[(blocks,)](*tables, *arguments, **constants, **options)
        if found is None:
            launch.memo[name] = _runner(kernel, compiled, blocks, end, constants)


def _answer(value: Any) -> Any:
    """Returns what Triton's compiler relies on of a value: is it 1, a multiple of 16?"""
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return (value == 1, value % 16 == 0) if isinstance(value, int) else None


def _runner(kernel: Any, compiled: Any, blocks: int, count: int, constants: dict[str, Any]) -> Any:
    """Returns what launches a compiled kernel, and the constants in its order; False if nothing does."""
    names = getattr(kernel, "arg_names", ())
    if not hasattr(type(compiled), "__getitem__") or getattr(kernel, "pre_run_hooks", None):
        return False
    return compiled[(blocks, 1, 1)], tuple([constants[name] for name in names[count:]])


__all__ = ["run"]
