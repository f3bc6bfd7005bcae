"""transformers' Trainer with zeroth-order steps: the bits of a loop written by hand, its logs and its
checkpoints.

The loop here takes the batches that the Trainer's collator made, and counts tokens itself. A Trainer that
weighs micro-batches wrongly, forgets one, or moves twice has other bits.
"""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
import torch.nn.functional as F

import zokern

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'zokern[hf]'"
)
pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'zokern[hf]'")

from zokern.hf import ZerothOrderMixin, ZerothOrderTrainer  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]
LR, EPS, DECAY, STEPS = 1e-2, 1e-3, 0.1, 4
ROUNDED = 6e-5  # transformers 4 logs losses with four digits


def make(dropout: float = 0.1):
    """A GPT-2 with biases, norms, a tied embedding and dropout."""
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = transformers.GPT2Config(vocab_size=19, bos_token_id=1, eos_token_id=2, **shape, **rates)
        return transformers.GPT2LMHeadModel(config)


def rows(count: int = 22) -> list[dict]:
    """Rows of 7 tokens that count different numbers of them: the labels of the others are -100."""
    ids = torch.randint(3, 19, (count, 7), generator=torch.Generator().manual_seed(5))
    keep = torch.arange(7)[None] < 2 + torch.arange(count)[:, None] % 6
    labels = ids.masked_fill(~keep, -100)
    labels[:, 0] = -100
    return [{"input_ids": row, "labels": own} for row, own in zip(ids, labels)]


class Recorder:
    """A collator that remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[dict] = []

    def __call__(self, features):
        batch = {key: torch.stack([f[key] for f in features]) for key in features[0]}
        self.batches.append(copy.deepcopy(batch))
        return batch


@pytest.fixture(autouse=True)
def environment():
    """Arguments of transformers 4 leave bf16 and torch_compile in the environment, for the next ones."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def train(tmp_path):
    """train(zo, **arguments): a Trainer that has trained; `collate` has its batches."""

    def call(
        zo=None, cls=ZerothOrderTrainer, model=None, resume=None, data=None, run=True, keep=None, **given
    ):
        parts = {
            "callbacks",
            "eval_dataset",
            "optimizers",
            "optimizer_cls_and_kwargs",
            "compute_metrics",
        } & given.keys()
        own = {name: given.pop(name) for name in parts}
        options = dict(
            output_dir=str(keep or tmp_path / "out"), learning_rate=LR, max_steps=STEPS, report_to=[],
            per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True, use_cpu=True, seed=11,
            logging_steps=2,
        )  # fmt: skip
        collate = Recorder()
        trainer = cls(
            make() if model is None else model,
            transformers.TrainingArguments(**{**options, **given}),
            train_dataset=rows() if data is None else data,
            data_collator=collate,
            zo=zo,
            **own,
        )
        trainer.collate = collate
        if run:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return call


def next_tokens(logits, labels):
    """The sum over tokens of their cross entropy, and how many count."""
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    return F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum"), int((labels != -100).sum())


def updates(batches, parts=1) -> list[list[dict]]:
    """The micro-batches of each step. An epoch has 11: of 3 a step, its last step has 2."""
    epochs = [batches[i : i + 11] for i in range(0, len(batches), 11)]
    return [epoch[i : i + parts] for epoch in epochs for i in range(0, len(epoch), parts)]


def by_hand(steps, model=None, method=zokern.MeZO, autocast=False, **options):
    """The loop: a step for every list of batches, while lr falls along a line.

    Returns the model, the optimizer and the losses."""
    model = (make() if model is None else model).train()
    opt = method(model, lr=LR, eps=EPS, seed=11, **options)
    losses = []
    for step, batch in zip(range(STEPS), steps):
        for group in opt.param_groups:
            group["lr"] = LR * (STEPS - step) / STEPS

        def closure(batch=batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                read = [model(input_ids=part["input_ids"]).logits for part in batch]
            sums = [next_tokens(logits, part["labels"]) for logits, part in zip(read, batch)]
            total = sum(count for _, count in sums)
            return sum(loss / total for loss, _ in sums)

        losses.append(zokern.step(opt, closure).loss)
    return model, opt, losses


def equal(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def moved(model) -> bool:
    return not any(torch.equal(p, q) for p, q in zip(model.parameters(), make().parameters()))


# A run ------------------------------------------------------------------------------------------------------


def check_run(train, parts=3, cls=ZerothOrderTrainer, zo=None, **given) -> None:
    """Equal bits, and the loop's losses in the logs."""
    zo = {"eps": EPS, "evaluation": "master", **(zo or {})}
    trainer = train(zo, cls, gradient_accumulation_steps=parts, **given)
    options = {key: value for key, value in zo.items() if key not in ("eps", "method")}
    method = getattr(zokern, zo.get("method", "MeZO"))
    model, opt, losses = by_hand(updates(trainer.collate.batches, parts), method=method, **options)
    assert equal(trainer.model, model) and moved(trainer.model)
    assert trainer.optimizer.optimizer.steps == STEPS == opt.steps
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([sum(losses[i : i + 2]) / 2 for i in range(0, STEPS, 2)], abs=ROUNDED)
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize(
    "parts, zo",
    [
        (1, {}),
        (3, {}),
        (3, {"evaluation": "auto"}),
        (1, {"method": "SubZero", "rank": 2}),
        (3, {"method": "ZOAdam"}),
    ],
)
def test_a_run_has_the_bits_of_the_loop(train, parts, zo):
    check_run(train, parts, zo=zo)


class MeanOfMeans(ZerothOrderTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs, None)


class LastPart(ZerothOrderTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        self._parts = []
        return super().training_step(model, inputs, num_items_in_batch)


class StepPerPart(ZerothOrderTrainer):
    def training_step(self, *given):
        self.accelerator.gradient_state._set_sync_gradients(True)
        return super().training_step(*given)


class Twice(ZerothOrderTrainer):
    def training_step(self, *given):
        loss = super().training_step(*given)
        if self.accelerator.sync_gradients:
            self._parts = [given[1:]] * 2
            super().training_step(*given)
        return loss


class EvalMode(ZerothOrderTrainer):
    def compute_loss(self, model, *given, **options):
        return super().compute_loss(model.eval(), *given, **options)


class Constant(ZerothOrderTrainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, 1.0)
        return self.lr_scheduler


@pytest.mark.parametrize("wrong", [MeanOfMeans, LastPart, StepPerPart, Twice, EvalMode, Constant])
def test_a_wrong_trainer_is_rejected(train, wrong):
    with pytest.raises(AssertionError):
        check_run(train, cls=wrong)


def test_bf16_is_autocast_around_the_model(train):
    trainer = train({"eps": EPS, "evaluation": "master"}, bf16=True)
    steps = updates(trainer.collate.batches)
    model, _, _ = by_hand(steps, autocast=True, evaluation="master")
    assert equal(trainer.model, model)
    assert not equal(trainer.model, by_hand(steps, evaluation="master")[0])


@pytest.mark.parametrize(
    "argument", [{"gradient_checkpointing": True}, {"torch_compile": True, "torch_compile_backend": "eager"}]
)
@pytest.mark.parametrize("evaluation", ["master", "paired"])
def test_an_argument_changes_no_bit(train, argument, evaluation):
    zo = {"eps": EPS, "evaluation": evaluation}
    trainer = train(zo, **argument)
    assert equal(trainer.model, train(zo).model) and moved(trainer.model)
    assert trainer.optimizer.optimizer.result.evaluation == evaluation


def smooth(logits, labels, epsilon):
    """(1 - epsilon) times the sum of the cross entropy, plus epsilon times that of a uniform target."""
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    logs = logits.float().log_softmax(-1)[labels != -100]
    right = -logs.gather(1, labels[labels != -100][:, None]).sum()
    return ((1 - epsilon) * right + epsilon * -logs.mean(1).sum()), len(logs)


def test_label_smoothing_pops_from_a_copy(train):
    trainer = train({"eps": EPS, "evaluation": "master"}, label_smoothing_factor=0.5, max_steps=1)
    (batch,), model = updates(trainer.collate.batches)[0], make().train()
    opt, (ids, labels) = zokern.MeZO(model, lr=LR, eps=EPS, seed=11, evaluation="master"), batch.values()

    def closure():
        loss, count = smooth(model(input_ids=ids).logits, labels, 0.5)
        return loss / count

    result, own = zokern.step(opt, closure), trainer.optimizer.optimizer.result
    assert own.losses[0] == pytest.approx(result.losses[0], rel=1e-6)
    plain = zokern.step(opt, lambda: model(input_ids=ids, labels=labels).loss)
    assert own.losses[0] != pytest.approx(plain.losses[0], rel=1e-3)


def test_a_loss_that_pops_is_harmless(train):
    class Popping(ZerothOrderTrainer):
        def _prepare_inputs(self, inputs):
            return inputs  # no copy of its own

        def compute_loss(self, model, inputs, **options):
            labels = inputs.pop("labels")
            logits = model(input_ids=inputs.pop("input_ids")).logits
            total, count = next_tokens(logits, labels)
            return total / count

    assert train({"eps": EPS}, Popping).state.global_step == STEPS


# Weight decay, other methods --------------------------------------------------------------------------------


def is_exempt(name: str) -> bool:
    return name.endswith("bias") or "ln_" in name


def grouped(model, **options):
    """MeZO of two groups, as Trainer splits parameters."""
    named = [*model.named_parameters()]
    groups = [
        {"params": [(n, p) for n, p in named if not is_exempt(n)], "weight_decay": DECAY},
        {"params": [(n, p) for n, p in named if is_exempt(n)], "weight_decay": 0.0},
    ]
    return zokern.MeZO(groups, **options)


def check_decay(train, cls=ZerothOrderTrainer) -> None:
    trainer = train({"eps": EPS, "evaluation": "master"}, cls, weight_decay=DECAY)
    model, _, _ = by_hand(updates(trainer.collate.batches), method=grouped, evaluation="master")
    assert equal(trainer.model, model)


def test_weight_decay_leaves_biases_and_norms(train):
    check_decay(train)


@pytest.mark.parametrize(
    "names", [set(), {"transformer.wte.weight"}, {n for n, _ in make().named_parameters()}]
)
def test_a_wrong_decay_is_rejected(train, names):
    class Wrong(ZerothOrderTrainer):
        def get_decay_parameter_names(self, model):
            return list(names)

    with pytest.raises(AssertionError):
        check_decay(train, Wrong)


def test_weight_decay_keeps_updates_deferred(train):
    zo = {"method": "SubZero", "rank": 2, "eps": EPS}
    trainer = train(zo, weight_decay=DECAY)
    assert trainer.optimizer.optimizer.pending
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [DECAY, 0.0]


def test_a_method_with_a_backward_pass(train):
    head = dict(first_order=["transformer.ln_f"], optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    trainer = train({"method": "Hybrid", "eps": EPS, **head}, weight_decay=DECAY)
    result = trainer.optimizer.optimizer.result
    assert math.isfinite(result.first_order_loss) and moved(trainer.model)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_forward_gradients(train):
    model = make()
    model.set_attn_implementation("eager")
    trainer = train({"method": "FGD"}, model=model, max_steps=2)
    assert trainer.optimizer.optimizer.result.evaluation == "jvp"
    assert any(trainer.optimizer.optimizer.result.coefficients) and moved(trainer.model)


def test_an_optimizer_that_was_given(train):
    model = make()
    opt = zokern.LOZO(model, lr=LR, eps=EPS, seed=11)
    trainer = train(None, model=model, optimizers=(opt, None))
    other = train({"method": zokern.LOZO, "eps": EPS})
    assert trainer.optimizer.optimizer is opt and equal(model, other.model)


def adapt():
    """The model without dropout, with LoRA."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return peft.get_peft_model(make(0.0), config)


def test_adapters(train):
    adapted = adapt()
    trainer = train({"eps": 1e-2, "method": "SubZero", "rank": 2}, model=adapted, weight_decay=DECAY)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    plain = dict(make(0.0).named_parameters())
    for name, p in adapted.named_parameters():
        here = name.replace("base_model.model.", "").replace(".base_layer", "")
        assert "lora_" in name or torch.equal(p, plain[here])
    assert all(bool(p.any()) for name, p in adapted.named_parameters() if "lora_B" in name)
    assert trainer.optimizer.optimizer.steps == STEPS


# Checkpoints ------------------------------------------------------------------------------------------------


class Forgets(zokern.MeZO):
    """A resumed run begins at step 0 again."""

    def load_state_dict(self, state_dict):
        super().load_state_dict({**state_dict, "zokern": {**state_dict["zokern"], "step": 0}})


def check_resume(train, tmp_path, stop=2, build=make, **given) -> None:
    """Stops at a step and goes on, with the bits and logs of the run that was not stopped."""
    options = dict(save_strategy="steps", save_steps=stop, logging_steps=1, **given)
    whole = train(keep=tmp_path / "whole", model=build(), **options)
    resumed = train(
        model=build(),
        keep=tmp_path / "resumed",
        resume=str(tmp_path / "whole" / f"checkpoint-{stop}"),
        **options,
    )
    assert equal(whole.model, resumed.model) and not equal(whole.model, build())
    assert resumed.optimizer.optimizer.steps == STEPS and len(resumed.collate.batches) > 0

    def steps(trainer):
        kept = ("loss", "learning_rate", "projected_gradient", "eval_loss", "step")
        entries = [entry for entry in trainer.state.log_history if "train_loss" not in entry]
        return [{key: entry[key] for key in kept if key in entry} for entry in entries]

    assert steps(whole) == steps(resumed)


@pytest.mark.parametrize(
    "zo, given",
    [
        ({"method": "ZOAdam"}, {"gradient_accumulation_steps": 3}),
        ({"method": "SubZero", "rank": 2, "interval": 4}, {"eval_strategy": "steps", "eval_steps": 2}),
        ({"method": "LOZO", "momentum": 0.9}, {"weight_decay": DECAY, "lr_scheduler_type": "cosine"}),
        ({"method": "FZOO"}, {"bf16": True, "warmup_steps": 2}),
        ({"method": "Hybrid", "first_order": ["transformer.ln_f"]}, {"stop": 3}),
    ],
    ids=lambda value: value.get("method"),
)
def test_a_resumed_run_has_the_same_bits(train, tmp_path, zo, given):
    check_resume(train, tmp_path, zo={"eps": EPS, **zo}, eval_dataset=rows(4), **given)


def test_resumed_adapters_have_the_same_bits(train, tmp_path):
    check_resume(train, tmp_path, build=adapt, zo={"method": "SubZero", "rank": 2, "eps": 1e-2})


def test_a_wrong_resume_is_rejected(train, tmp_path):
    check_resume(train, tmp_path, zo={"eps": EPS})
    with pytest.raises(AssertionError):
        check_resume(train, tmp_path, zo={"eps": EPS, "method": Forgets})


def test_a_checkpoint_of_another_method_is_refused(train, tmp_path):
    train({"eps": EPS}, keep=tmp_path, save_strategy="steps", save_steps=3)
    with pytest.raises(ValueError, match="rule='sgd' and this optimizer has 'adam'"):
        train({"eps": EPS, "method": "ZOAdam"}, resume=str(tmp_path / "checkpoint-3"))


# Logs, evaluation, callbacks --------------------------------------------------------------------------------


class Keeps(transformers.TrainerCallback):
    """Keeps the record of every step."""

    def __init__(self) -> None:
        self.results: list = []
        self.calls: list[str] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **rest):
        self.calls.append("before")
        self.results.append(optimizer.optimizer.result)

    def on_step_end(self, args, state, control, **rest):
        self.calls.append("end")


class NotFinite(ZerothOrderTrainer):
    """Its second and third step have no finite loss."""

    def compute_loss(self, *given, **options):
        loss = super().compute_loss(*given, **options)
        return loss * math.nan if self.state.global_step in (1, 2) else loss


@pytest.mark.parametrize("every", [None, 100])
@pytest.mark.parametrize("cls, skipped", [(ZerothOrderTrainer, [0, 0]), (NotFinite, [1, 1])])
def test_logs(train, every, cls, skipped):
    """every=100: no guard reads the numbers before the log does."""
    keeps = Keeps()
    trainer = train({"eps": EPS, "queries": 2, "every": every}, cls, callbacks=[keeps])
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and not any("grad_norm" in entry for entry in logs)
    assert [entry["skipped_steps"] for entry in logs] == skipped
    assert [entry.get("evaluation") for entry in logs] == ["paired", None]
    for number, entry in enumerate(logs):
        results = [r for r in keeps.results[2 * number : 2 * number + 2] if not r.skipped]
        squares = [c * c for result in results for c in result.coefficients]
        assert len(squares) == 2 * len(results) > 0
        assert entry["projected_gradient"] == pytest.approx(math.sqrt(sum(squares) / len(squares)))
        if len(results) == 2:
            assert entry["loss"] == pytest.approx(sum(r.loss for r in results) / 2, abs=ROUNDED)
    assert keeps.calls == ["before", "end"] * STEPS


class Reads(ZerothOrderTrainer):
    def training_step(self, *given):
        super().training_step(*given)
        return torch.tensor(self.optimizer.optimizer.result.loss)


@pytest.mark.parametrize("cls, count", [(ZerothOrderTrainer, 0), (Reads, 3)])
def test_a_loss_is_not_read_before_it_is_asked_for(train, monkeypatch, cls, count):
    """logging_nan_inf_filter=False: Trainer itself then waits for nothing."""
    reads, read = [], zokern.result.read
    monkeypatch.setattr(zokern.result, "read", lambda several: reads.append(read(several)))
    silent = dict(logging_nan_inf_filter=False, logging_strategy="no", max_steps=3)
    train({"eps": EPS, "every": 100}, cls, **silent)
    assert len(reads) == count


def test_many_steps_without_a_log_keep_few_records(train):
    from zokern import hf

    measured, results = hf.Measured(), []
    trainer = train({"eps": EPS}, max_steps=1)
    for _ in range(3 * hf.EVERY):
        measured.add(trainer.optimizer.optimizer.result)
        results.append(len(measured.results))
    assert max(results) <= hf.EVERY
    c = trainer.optimizer.optimizer.result.coefficients[0]
    assert measured.take()["projected_gradient"] == pytest.approx(abs(c)) and measured.take() == {}


def test_evaluation_and_early_stopping(train):
    held_out = rows(5)
    trainer = train(
        {"eps": EPS},
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        callbacks=[transformers.EarlyStoppingCallback(2)],
    )
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(found) == trainer.state.global_step <= STEPS
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(found), rel=1e-6)
    batch = {key: torch.stack([row[key] for row in held_out]) for key in held_out[0]}
    with torch.no_grad():
        total, count = next_tokens(trainer.model(input_ids=batch["input_ids"]).logits, batch["labels"])
    trainer.args.per_device_eval_batch_size = 5
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(total) / count, rel=1e-5)


def test_another_trainer_takes_the_mixin(train):
    class Own(transformers.Trainer):
        def compute_loss(self, model, inputs, **options):
            return model(**inputs).loss * 2

    class Mixed(ZerothOrderMixin, Own):
        pass

    doubled = train({"eps": EPS}, Mixed, max_steps=1).optimizer.optimizer.result.losses[0]
    assert doubled == pytest.approx(
        [2 * loss for loss in train({"eps": EPS}, max_steps=1).optimizer.optimizer.result.losses[0]], rel=1e-3
    )


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, words",
    [
        ({"fp16": True}, "fp16 is True; its scaled losses"),
        ({"optim": "sgd"}, r"optim is .*(?i:sgd).*; zo\['method'\] is the optimizer"),
        ({"optim_args": "a=1"}, "optim_args is a=1; zo"),
        ({"adam_beta1": 0.8}, "adam_beta1 is 0.8; zo"),
        ({"max_grad_norm": 0.5}, "max_grad_norm is 0.5; there is no gradient to clip"),
    ],
)
def test_an_argument_without_meaning_is_refused(train, given, words):
    with pytest.raises(ValueError, match=words):
        train({"eps": EPS}, run=False, **given)


@pytest.mark.parametrize(
    "given", [{"max_grad_norm": 0.0}, {"optim": transformers.TrainingArguments.default_optim}]
)
def test_a_default_is_accepted(train, given):
    assert train({"eps": EPS}, max_steps=1, **given).state.global_step == 1


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("deepspeed", {"a": 1}, "deepspeed is {'a': 1}; a step needs the whole"),
        ("fsdp", "full_shard", "fsdp is full_shard; a step needs the whole"),
        ("parallelism_config", "two", "parallelism_config is two; a step needs the whole"),
        ("n_gpu", 2, "n_gpu is 2: Trainer would copy the model"),
        (
            "world_size",
            2,
            "world_size is 2, and zo has no group: each process would move along its own losses",
        ),
    ],
)
def test_several_devices_are_refused(tmp_path, monkeypatch, name, value, words):
    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with monkeypatch.context() as patch:
        patch.setattr(transformers.TrainingArguments, name, property(lambda self: value, lambda *_: None))
        with pytest.raises(ValueError, match=words):
            ZerothOrderTrainer(make(), args)
        with pytest.raises(ValueError, match=words):
            ZerothOrderTrainer(model=make(), args=args)
        if name == "world_size":  # the method knows what to do with it
            assert ZerothOrderTrainer(make(), args, zo={"group": "auto"}).zo == {"group": "auto"}
    ZerothOrderTrainer(make(), args)


@pytest.mark.parametrize(
    "zo, words",
    [
        ({"lr": 1e-3}, r"zo has lr = 0.001; give TrainingArguments\(learning_rate=0.001\)"),
        ({"weight_decay": 0.1}, r"give TrainingArguments\(weight_decay=0.1\)"),
        ({"method": "Subzero"}, "zo\\['method'\\] is 'Subzero'; .* did you mean 'SubZero'"),
        ({"method": 3}, "zo\\['method'\\] is 3; expected a function"),
    ],
)
def test_a_wrong_option_is_refused(train, zo, words):
    with pytest.raises(ValueError, match=words):
        train(zo, run=False)


def test_an_unknown_option_is_the_method_s_error(train):
    with pytest.raises(TypeError, match="MeZO has no option 'momentum'"):
        train({"momentum": 0.9})


def test_zo_beside_an_optimizer_is_refused(train):
    model = make()
    with pytest.raises(ValueError, match="beside an optimizer"):
        train({"eps": EPS}, model=model, optimizers=(zokern.MeZO(model), None))


def test_the_class_of_an_optimizer_is_refused(train):
    with pytest.raises(ValueError, match=r"give zo=dict\(method=..., ...\)"):
        train(None, run=False, optimizer_cls_and_kwargs=(zokern.MeZO, {"lr": LR}))


def test_another_optimizer_is_refused(train):
    model = make()
    with pytest.raises(TypeError, match="optimizer is SGD; expected a zokern optimizer"):
        train(None, model=model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))


def test_a_step_of_a_trainer_of_its_own_is_no_silent_nothing(train):
    class Own(ZerothOrderTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, inputs)
            loss.backward()
            return loss.detach()

    with pytest.raises(TypeError, match="needs a closure"):
        train({"eps": EPS}, Own)
