"""Names of parameters, and the ids that decide their z."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from torch import nn

from ..stream import parameter_id
from .wrappers import wrapped

_PREFIX = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def plain(name: str) -> str:
    """Returns a parameter's name in the module without wrappers. This name decides its z.

    Where DistributedDataParallel stands does not show in one name; plain_names asks the module."""
    return _PREFIX.sub("", name)


def is_wrapped(names: Collection[str]) -> bool:
    """Tells whether names are those of a model inside DistributedDataParallel.

    Then every one starts with ``module.``."""
    return bool(names) and all([plain(name).startswith("module.") for name in names])


def plain_names(module: nn.Module) -> dict[str, str]:
    """Returns the plain name for each name of ``module.named_parameters()``.

    The attributes in which wrappers hold modules are no part of it."""
    inside = {
        f"{path}.{attribute}" if path else attribute
        for path, part in module.named_modules()
        if (attribute := wrapped(part)) is not None
    }

    def without(name: str) -> str:
        parts = name.split(".")
        return ".".join([part for end, part in enumerate(parts, 1) if ".".join(parts[:end]) not in inside])

    # a wrapper around it all may take its prefix off its own named_parameters(), and not off named_modules()
    in_full = nn.Module.named_parameters(module)
    return {name: without(full) for (name, _), (full, _) in zip(module.named_parameters(), in_full)}


def ids(names: Iterable[str], taken: dict[str, int] | None = None) -> tuple[dict[str, int], dict[str, str]]:
    """Returns ids of parameter names, and the collisions: name -> the salted name that gave its id.

    Two names share a 32-bit id once in about n^2 / 2^33 models of n tensors. Names are resolved in sorted
    order, those that are ``taken`` among them, so the outcome depends on the set of names and not on their
    order, on the groups that they came in, or on what is frozen. Raises ValueError where a taken name would
    have had another id, had the new ones been known: z of a run must not change on its way.
    """
    taken = taken or {}
    found: dict[str, int] = {}
    used: set[int] = set()
    salted: dict[str, str] = {}
    for name in sorted({*names, *taken}):
        salt, who = 0, parameter_id(plain(name))
        while who in used:
            salt += 1
            salted[name] = f"{name}#{salt}"
            who = parameter_id(plain(salted[name]))
        if taken.get(name, who) != who:
            rival = next(other for other, number in found.items() if number == taken[name])
            raise ValueError(
                f"the name {rival!r} has the 32-bit id of {name!r}, which was there before it and would have "
                "drawn another z beside it; give both to the optimizer when it is built (in any order, in "
                "one group or several), or rename one of them"
            )
        found[name] = who
        used.add(who)
    return found, {name: other for name, other in salted.items() if name not in taken}
