"""Work: the parameters that an optimizer trains, by name, and the groups of tensors that a step works on."""

from __future__ import annotations

from itertools import chain, zip_longest
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, parameters, shards
from ..estimator import Estimator
from ..fingerprint import Held
from ..group import Group
from ..modules import Tree, same
from ..parameters import Trained
from ..rule import START_ANEW, Keeps, Rule, check_state
from . import checkpoint
from .bases import Bases
from .deferred import Deferred
from .low_bits import LowBits


class Work:
    """What an optimizer was given, found again before every step.

    model    the module, inside its wrappers; None where parameters were given
    names    plain names of the module's parameters
    ids      the id of every name
    entries  the trained parameters of each parameter group, with the tensors that are tied to them
    params   their tensors alone
    tree     the modules that a step leaves as they are
    groups   of the last plan;  scopes  parts of it (Plan.scopes)"""

    def __init__(self, params: Any, backend: str | backends.Backend | None) -> None:
        self.backend = backend
        self.model = parameters.inner(params) if isinstance(params, nn.Module) else None
        self.names: dict[str, str] = {}
        if self.model is not None:
            self.names = {**parameters.plain_names(params), **parameters.plain_names(self.model)}
            parameters.check_flat(params)
            shards.reshard(self.model.modules())
        self.given = parameters.named_groups(params, self.names)
        parameters.check_trained(self.given)
        names = [name for group in self.given for name, _ in group["params"]]
        self.ids, _ = parameters.ids([*self.names.values(), *names])
        self.tree = Tree([self.model] if self.model is not None else [], is_open=self.model is None)
        self.entries: list[list[Trained]] = []
        self.params: list[list[Tensor]] = []
        self.groups: list[Group] = []
        self.scopes: dict = {}
        # of the modules, not given to the optimizer; found once for a tree
        self._others: list[Tensor] | None = None
        self.sharded = False  # whether some entries are DTensors
        self._flags: list[bool] = []  # which entries are trained
        self._active: list[Trained] = []  # those that are
        self._all: list[Tensor] = []  # their tensors, with all aliases
        self._seen: Held | None = None  # the same memory, as the groups were built from it
        self._kept: list[Any] = []  # the optimizer's state that was checked; int: a sound counter

    def parts(
        self, bases: Bases, low_bits: LowBits, deferred: Deferred, rule: Rule, estimator: Estimator
    ) -> None:
        """Takes what belongs to parameters: bases, low bits, deferred updates, and parts with state."""
        self.bases, self.low_bits, self.deferred, self.rule, self.estimator = (
            bases,
            low_bits,
            deferred,
            rule,
            estimator,
        )

    def named(self, param_group: dict[str, Any]) -> dict[str, Any]:
        """Returns a parameter group as (name, parameter) pairs; without names it continues the numbering
        param.N."""
        (group,) = parameters.named_groups([param_group], self.names)
        names_of = (
            {id(p): self.names[n] for n, p in self.model.named_parameters()} if self.model is not None else {}
        )
        known = sum(len(entries) for entries in self.entries)
        if known and all(name == f"param.{i}" for i, (name, _) in enumerate(group["params"])):
            group["params"] = [
                (names_of.get(id(p), f"param.{known + i}"), p) for i, (_, p) in enumerate(group["params"])
            ]
        return group

    def add(self, group: dict[str, Any]) -> list[Trained]:
        """Returns the entries of a named group, which is not trained before append(). Raises ValueError for
        names that are taken."""
        names = [name for name, _ in group["params"]]
        taken = set(self.known())
        if len(set(names)) != len(names) or taken & set(names):
            raise ValueError(
                "parameter names are not unique: "
                f"{sorted(n for n in names if names.count(n) > 1 or n in taken)}"
            )
        self.ids, _ = parameters.ids(names, self.ids)
        entries = parameters.trained(group["params"], self.ids)
        parameters.check_overlap([(e.name, e.tensor) for known in [*self.entries, entries] for e in known])
        return entries

    def append(self, entries: list[Trained]) -> None:
        """Trains the entries of a group."""
        self.sharded = self.sharded or any(shards.is_sharded(entry.tensor) for entry in entries)
        self.entries.append(entries)
        self.params.append([entry.tensor for entry in entries])
        self._others = None
        if not {id(entry.tensor) for entry in entries} <= {*map(id, self.tree.slots)}:
            # a module of its own, which its first forward shows
            self.tree = Tree(self.tree.roots, is_open=True)

    def known(self) -> dict[str, Tensor]:
        """Returns every name that was given, with the tensor object that it stood for."""
        entries = [entry for group in self.entries for entry in group]
        return {name: tensor for e in entries for name, tensor in ((e.name, e.tensor), *e.aliases)}

    def forget(self) -> None:
        """Forgets groups and bases: another state was loaded."""
        self.bases.matrices.clear()
        self.groups, self._seen, self.low_bits.written = [], None, {}
        self.deferred.groups = []

    def adopt(self) -> None:
        """After a step: keeps the modules that its first readings found, as they are now."""
        if self.tree.found:
            self.tree, self._others = Tree([*self.tree.roots, *self.tree.found]), None

    # Before a step ------------------------------------------------------------------------------------------

    def check_tree(self) -> None:
        """Raises if a parameter of the modules was replaced, removed, added or thawed since the optimizer saw
        it."""
        tree = self.tree
        if self._others is None:
            given = set(map(id, self.known().values()))
            self._others = [
                p for held in tree.parameters for p in held.values() if p is not None and id(p) not in given
            ]
        thawed = self.model is not None and any(p.requires_grad for p in self._others)
        if tree.state().stands and not thawed:
            return
        known = {id(t): name for name, t in self.known().items()}
        now = {id(p): name for root in tree.roots for name, p in root.named_parameters()}
        before = {id(p) for p in tree.slots if id(p) in known}
        for number in before - now.keys():
            name = known[number]
            here = next(
                (full for full in now.values() if parameters.plain(full) == name or full.endswith(name)), None
            )
            raise RuntimeError(
                f"parameter {name!r} was {'removed' if here is None else 'replaced'} after the optimizer was "
                "built; build a new optimizer "
                "for the new model"
            )
        model = self.model if self.model is not None else nn.Module()
        if added := [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in known]:
            raise RuntimeError(
                f"parameters {added} were added after the optimizer was built; pass them to add_param_group, "
                "or freeze them"
            )
        self.tree, self._others = Tree(tree.roots, is_open=tree.is_open), None

    def check_groups(self, param_groups: list[dict[str, Any]]) -> None:
        """Raises if the lists of param_groups were edited: what the optimizer trains, it was given through
        add_param_group."""
        for i, (group, given) in enumerate(zip_longest(param_groups, self.params, fillvalue=())):
            params = group["params"] if group else []
            if not same(params, given):
                raise RuntimeError(
                    f"param_groups[{i}]['params'] has {len(params)} parameters that are not the "
                    f"{len(given)} given to the optimizer: "
                    "the list was edited; put it back and use add_param_group, freeze with "
                    "requires_grad_(False), or build a new "
                    "optimizer"
                )

    def build(self, param_groups: list[dict[str, Any]], states: Any) -> None:
        """Makes the groups of a step, once for a list of tensors: again when one was moved, frozen, cast or
        added."""
        flags = list(map(attrgetter("requires_grad"), chain.from_iterable(self.params)))
        if flags != self._flags:
            entries = [entry for group in self.entries for entry in group]
            self._flags, self._seen = flags, None
            self._active = [entry for entry, trained in zip(entries, flags) if trained]
            self._all = [t for entry in self._active for t in (entry.tensor, *(t for _, t in entry.aliases))]
        here = list(map(shards.local, self._all)) if self.sharded else self._all
        values = chain.from_iterable(map(dict.values, states.values()))
        kept = [int if type(value) is int and value >= 0 else value for value in values]
        is_new = self._seen is None or not self._seen.by(here)
        if is_new:
            self._seen = None
            self._check_memory()
        if is_new or not same(kept, self._kept):
            for entry in self._active:
                if state := states.get(entry.tensor):
                    self.check_state(entry, state, START_ANEW)
            is_new = is_new or self.low_bits.is_on  # groups hold the low bits
            self._kept = kept
        if is_new:
            self.groups = self._made(param_groups)
            self.deferred.regroup(self.groups)
            self._seen, self.scopes = Held(here), {}

    def _check_memory(self) -> None:
        for entry in self._active:
            parameters.check_parameter(entry.name, entry.tensor)
            parameters.check_tie(entry)
            self.deferred.check(entry.tensor)
            self.bases.forget_changed(entry)
        parameters.check_overlap([(e.name, e.tensor) for group in self.entries for e in group])

    def check_state(self, entry: Trained, state: Any, way_out: str, loading: bool = False) -> None:
        """Raises ValueError for state that kernels would read past its end."""
        shape = tuple(shards.block(entry.name, entry.tensor).memory.shape)
        check_state(
            entry,
            state,
            self.rule.name,
            self.rule.keeps(shape, self.bases.draw_shape(entry)),
            way_out,
            loading,
        )
        own = Keeps(self.estimator.keeps(shape), False)
        check_state(entry, state, self.rule.name, own, way_out, loading)

    def _of_elements(self, entry: Trained) -> dict[str, tuple[int, ...]]:
        """Returns what is kept of each element of a parameter, name -> shape of the block that is here."""
        shape = tuple(shards.block(entry.name, entry.tensor).memory.shape)
        kept = dict(self.estimator.keeps(shape))
        if self.bases.draw_shape(entry) is None:
            kept |= self.rule.keeps(shape, None).tensors
        return kept

    def start(self, states: Any) -> None:
        """Gives sharded parameters the state of a rule that begins with zeros, into which a checkpoint of
        torch.distributed loads."""
        entries = [entry for group in self.entries for entry in group if entry.tensor.requires_grad]
        for entry in entries if self.sharded else ():
            self.low_bits.of([entry.tensor])
            keeps = self.rule.keeps(entry.tensor.shape, None)
            known = states.get(entry.tensor, {})
            if keeps.counted and "updates" not in known and self.bases.draw_shape(entry) is None:
                device = entry.tensor.device
                shapes = self._of_elements(entry)
                zeros = {
                    key: torch.zeros(shape, dtype=torch.float32, device=device)
                    for key, shape in shapes.items()
                }
                states[entry.tensor].update(zeros, updates=0)

    def shard(self, state_dict: dict[str, Any], held: list[tuple[Trained, dict]]) -> dict[str, Any]:
        """Returns a state_dict whose tensors of elements are sharded as their parameters. The first group has
        the entry 'zokern' too: there torch.distributed.checkpoint keeps it."""
        found = [shards.saved(e.tensor, kept, {"residual", *self._of_elements(e)}) for e, kept in held]
        groups = [dict(group) for group in state_dict["param_groups"]]
        kept = {entry.name: sorted(values) for entry, values in held}
        groups[0]["zokern"] = checkpoint.packed({**state_dict["zokern"], "kept": kept})
        return {**state_dict, "state": dict(zip(state_dict["state"], found)), "param_groups": groups}

    def unshard(self, state_dict: dict[str, Any], held: list[tuple[Trained, dict]]) -> dict[str, Any]:
        """Returns a state_dict with the blocks that are here; see shard."""
        found = [shards.loaded(entry.name, entry.tensor, kept) for entry, kept in held]
        groups = [dict(group) for group in state_dict["param_groups"]]
        packs = [group.pop("zokern") for group in groups if "zokern" in group]
        own = checkpoint.unpacked(packs[0]) if packs else {}
        here = {entry.name: values for entry, values in held}
        for name, keys in own.pop("kept", {}).items():
            if lacks := sorted({*keys} - {*here.get(name, ())}):
                raise ValueError(
                    f"state of parameter {name!r} lacks {lacks}, which the run that saved it had: "
                    "torch.distributed.checkpoint loads what an optimizer has already. Take a step with lr=0 "
                    "before get_optimizer_state_dict, or load the state_dict that this process saved"
                )
        found_here = dict(zip(state_dict["state"], found))
        return {"zokern": own, **state_dict, "state": found_here, "param_groups": groups}

    def _made(self, param_groups: list[dict[str, Any]]) -> list[Group]:
        """Returns a group for each parameter group, device and kind of direction: one launch per verb."""
        groups: list[Group] = []
        for options, entries in zip(param_groups, self.entries):
            kinds: dict[tuple[torch.device, bool], list[Trained]] = {}
            active = [entry for entry in entries if entry.tensor.requires_grad]
            for device in dict.fromkeys(entry.tensor.device for entry in active):
                kinds |= {(device, False): [], (device, True): []}  # dense first
            for entry in active:
                kinds[entry.tensor.device, self.bases.of(entry) is not None].append(entry)
            groups += [self._group(options, *kind, members) for kind, members in kinds.items() if members]
        return groups

    def _group(
        self, options: dict[str, Any], device: torch.device, is_lowrank: bool, entries: list[Trained]
    ) -> Group:
        tensors = [entry.tensor for entry in entries]
        blocks = [shards.block(entry.name, entry.tensor) for entry in entries]
        theta = backends.TensorList.lasting([block.memory for block in blocks])
        return Group(
            names=[entry.name for entry in entries],
            tensors=tensors,
            spans=backends.SpanList([backends.Span(e.who, *block[1:]) for e, block in zip(entries, blocks)]),
            residuals=self.low_bits.of(tensors),
            eps=float(options["eps"]),
            options=options,
            backend=backends.resolve(self.backend, device),
            matrices=[m for entry in entries if (m := self.bases.of(entry)) is not None]
            if is_lowrank
            else None,
            theta=theta,
            objects=[[entry.tensor, *(t for _, t in entry.aliases)] for entry in entries],
        )


__all__ = ["Work"]
