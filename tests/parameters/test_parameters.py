"""Names: a wrapper never changes z, wherever it stands;
an attribute of the user's own that is called like a wrapper's does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from models import build
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.nn.parallel import DistributedDataParallel

import zokern
from zokern import parameters

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory) -> Iterator[None]:
    """A process group of one, without which DistributedDataParallel is not to be had."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this build of torch has no gloo: DistributedDataParallel cannot be built")
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make() -> nn.Module:
    return build(lambda: nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)))


class Held(nn.Module):
    """A user's model whose own attributes are called as wrappers call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.module = make()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class DataParallel(Held):
    """And whose class is called as one of torch's."""


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def inside(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def wrapped() -> nn.Module:
        net = make()
        net[0] = wrap(net[0])
        return net

    return wrapped


def layers(module: nn.Module, *wraps: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for wrap in wraps:
        module = wrap(module)
    return module


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "compile": lambda: compiled(make()),
    "ddp": lambda: DistributedDataParallel(make()),
    "data parallel": lambda: nn.DataParallel(make()),
    "checkpoint": lambda: checkpoint_wrapper(make()),
    "compile of ddp": lambda: layers(make(), DistributedDataParallel, compiled),
    "ddp of compile": lambda: layers(make(), compiled, DistributedDataParallel),
    "checkpoint inside": inside(checkpoint_wrapper),
    "offload inside": inside(offload_wrapper),
    "compile inside": inside(compiled),
    "checkpoint of compile inside": inside(lambda m: checkpoint_wrapper(compiled(m))),
    "ddp around checkpoint inside": lambda: DistributedDataParallel(inside(checkpoint_wrapper)()),
    "all at once": lambda: layers(inside(checkpoint_wrapper)(), compiled, nn.DataParallel, compiled),
}
GIVEN: dict[str, Callable[[nn.Module], object]] = {
    "module": lambda net: net,
    "pairs": lambda net: list(net.named_parameters()),
    "group": lambda net: [{"params": net}],
    "a group each": lambda net: [{"params": [pair]} for pair in net.named_parameters()],
}


def steps(net: nn.Module, optimizer, count: int = 2) -> list[tuple]:
    return [zokern.step(optimizer, lambda: net(X).square().mean()).losses for _ in range(count)]


def optimizer_of(net: nn.Module, given: str):
    """With one evaluation, which runs torch.compile's graphs: 'auto' takes it for these alone."""
    return zokern.MeZO(
        GIVEN[given](net), lr=1e-2, eps=1e-3, seed=5, rule=zokern.Momentum(), evaluation="master"
    )


def check_same_run(
    wrapped: Callable[[], nn.Module], given: str, bare: Callable[[], nn.Module] = make
) -> None:
    """The same z, so the same losses; and the state of either run goes on in the other one."""
    net, plain = wrapped(), bare()
    one = optimizer_of(net, given)
    other = optimizer_of(plain, given if given == "a group each" else "module")  # states have as many groups
    assert steps(net, one) == steps(plain, other), "another z"
    states = copy.deepcopy(one.state_dict()), copy.deepcopy(other.state_dict())
    one.load_state_dict(states[1])
    other.load_state_dict(states[0])
    assert steps(net, one) == steps(plain, other)
    one.load_state_dict(one.state_dict())


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_wrapper_changes_no_run(wrapper: str, given: str) -> None:
    check_same_run(WRAPPED[wrapper], given)


def test_what_accelerate_prepares_is_the_same_run() -> None:
    accelerate = pytest.importorskip("accelerate")
    prepare = accelerate.Accelerator(cpu=True).prepare
    for given in ("module", "pairs"):
        check_same_run(lambda: prepare(make()), given)


def as_given(module: nn.Module) -> dict[str, str]:
    return {name: name for name, _ in module.named_parameters()}


@pytest.mark.parametrize(("given", "wrong"), [
    ("module", {"plain_names": as_given, "inner": lambda module: module}),
    ("pairs", {"is_wrapped": lambda names: False}),
    ("module", {"plain_names": as_given, "plain": lambda name: name}),
])  # fmt: skip
def test_check_rejects_names_with_prefixes(given: str, wrong: dict[str, Callable]) -> None:
    with ExitStack() as stack:
        for module in (parameters, parameters.groups, parameters.names):  # wherever the name was imported
            stack.enter_context(
                patch.multiple(module, **{name: f for name, f in wrong.items() if hasattr(module, name)})
            )
        stack.enter_context(
            pytest.raises((AssertionError, ValueError), match="another z|names other parameters")
        )
        check_same_run(WRAPPED["ddp around checkpoint inside"], given)


# A user's own attributes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [Held, DataParallel])
def test_an_attribute_of_the_user_s_own_is_not_touched(own: type[nn.Module]) -> None:
    names = {name: name for name, _ in own().named_parameters()}
    assert parameters.plain_names(own()) == names and list(names)[0] == "module.0.weight"
    assert parameters.inner(model := own()) is model
    wrapped = DistributedDataParallel(own())
    assert parameters.plain_names(wrapped) == {f"module.{name}": name for name in names}
    for given in ("module", "pairs", "group"):
        check_same_run(lambda: DistributedDataParallel(own()), given, own)
    losses = [steps(net, optimizer_of(net, "module")) for net in (own(), make())]
    assert losses[0] != losses[1], "the attribute's name is part of the names"


def test_only_whole_parts_of_a_name_are_prefixes() -> None:
    assert parameters.plain("my_orig_mod.weight") == "my_orig_mod.weight"
    assert (
        parameters.plain("a._orig_mod._checkpoint_wrapped_module.b._fsdp_wrapped_module.weight")
        == "a.b.weight"
    )
    assert parameters.plain("_orig_mod.module.weight") == "module.weight"


# Inside a model, where only its tree knows ------------------------------------------------------------------


class Parts(nn.Module):
    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda module: module) -> None:
        super().__init__()
        self.module = make()
        self.body = wrap(nn.Sequential(nn.Linear(2, 2), wrap(nn.Linear(2, 2))))


WRAPS = {
    "ddp": DistributedDataParallel,
    "data parallel": nn.DataParallel,
    "compile": compiled,
    "checkpoint": checkpoint_wrapper,
}


@pytest.mark.parametrize("around", [None, *WRAPS])
@pytest.mark.parametrize("wrap", WRAPS)
def test_plain_names_by_the_tree(wrap: str, around: str | None) -> None:
    """Wrappers inside a model, also where one stands around it all."""
    model = Parts(WRAPS[wrap])
    model = model if around is None else WRAPS[around](model)
    names = parameters.plain_names(model)
    assert list(names) == [name for name, _ in model.named_parameters()]
    assert list(names.values()) == [name for name, _ in Parts().named_parameters()]
    (group,) = parameters.named_groups(model, names)
    pairs = list(model.named_parameters())
    given = [model, pairs, [{"params": model}], [{"params": [pair]} for pair in pairs]]
    for source in given:
        groups = parameters.named_groups(source, names)
        assert [name for group in groups for name, _ in group["params"]] == list(names.values())
        again = [pair for group in groups for pair in parameters.named_groups([group], names)[0]["params"]]
        assert again == [pair for group in groups for pair in group["params"]], (
            "a name that was decided is decided again"
        )


def test_names_of_a_later_group_are_the_tree_s() -> None:
    """All of them start with ``module.``, which is the model's own."""
    model = Parts(DistributedDataParallel)
    later = [("module.0.weight", model.module[0].weight)]
    (group,) = parameters.named_groups([{"params": later}], parameters.plain_names(model))
    assert group["params"] == later
    model.requires_grad_(False).body.module[0].requires_grad_(True)
    optimizer = zokern.MeZO(model, lr=0.1)
    optimizer.add_param_group({"params": later})
    assert optimizer.param_groups[1]["param_names"] == ["module.0.weight"]


# Refusals ---------------------------------------------------------------------------------------------------


def test_replicas_are_refused_and_one_device_is_not() -> None:
    model = nn.DataParallel(make())
    parameters.check_model(model)
    model.device_ids = [0, 1]
    assert parameters.inner(model) is model
    for found in (model, nn.Sequential(model)):
        with pytest.raises(TypeError, match=r"DataParallel on devices \[0, 1\].*train the wrapped module"):
            parameters.check_model(found)
    assert list(parameters.plain_names(model).values()) == list(parameters.plain_names(make()))


@pytest.mark.parametrize("given", ["module", "pairs", "tensors", "groups"])
def test_a_model_of_frozen_parameters_is_refused_when_the_optimizer_is_built(given: str) -> None:
    model = make().requires_grad_(False)
    source = {
        "module": model, "pairs": model.named_parameters(), "tensors": model.parameters(),
        "groups": [{"params": model.parameters()}],
    }[given]  # fmt: skip
    with pytest.raises(ValueError, match="no trainable parameter; set requires_grad"):
        if given == "groups":
            parameters.check_trained(parameters.named_groups(source))
        else:
            zokern.MeZO(source, lr=0.1)


def test_sharded_parameters_are_taken() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    sharded = nn.Parameter(distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (1,)), [Replicate()]))
    assert zokern.MeZO([("w", sharded)], lr=0.1).param_groups[0]["params"] == [sharded]
    model = make()
    model[0].weight = nn.Parameter(sharded.detach(), requires_grad=False)  # frozen ones are left alone
    assert zokern.MeZO(model, lr=0.1).param_groups[0]["param_names"] == ["0.bias", "2.weight", "2.bias"]
