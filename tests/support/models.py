"""Small models that the tests share. Weights come from a seed of their own,
so every test sees the same ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 37


class Tiny(nn.Module):
    """Every kind of use in a few hundred weights:
    lookup, norm, products with and without bias, a parameter used by hand."""

    def __init__(self, width: int = 12, dropout: float = 0.0, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(3 * width, width, bias=False)
        self.gain = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        h = h + self.down(self.dropout(F.gelu(self.up(self.norm(h)))))
        return self.head(h * self.gain)


def tiny(dtype: torch.dtype = torch.float32, **options) -> Tiny:
    return build(lambda: Tiny(**options), dtype)


def build(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32):
    """A model with seeded weights; the caller's random stream does not move."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        return make().to(dtype)


def batch(rows: int = 3, length: int = 5, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(7))


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, by name."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def changed(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Names of the parameters and buffers of which a bit differs from the snapshot."""
    now = dict([*model.named_parameters(), *model.named_buffers()])
    assert now.keys() == before.keys()
    return [name for name, t in now.items() if not same_bits(t, before[name])]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bit for bit: NaN equals itself and -0.0 differs from 0.0."""
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


def at_use(evaluation, budget: int = 1 << 16):
    """The evaluation with a budget that does not hold the model: its matrices are copied, or z beside them
    made, at their use."""
    evaluation.budget = budget
    evaluation.begin()
    return evaluation


# Architectures of transformers, from configurations small enough for a few milliseconds a forward -----------

WIDTH, HEADS, LAYERS = 32, 4, 2


def opt(attention: str = "sdpa"):
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64, hidden_size=WIDTH, ffn_dim=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            dropout=0.0, max_position_embeddings=32, word_embed_proj_dim=WIDTH, attn_implementation=attention,
        )
    )  # fmt: skip


def llama(attention: str = "sdpa"):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=2, max_position_embeddings=32,
            attn_implementation=attention,
        )
    )  # fmt: skip


def gpt2(attention: str = "sdpa"):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=32, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation=attention,
        )
    )  # fmt: skip


def bert(attention: str = "sdpa"):
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, max_position_embeddings=32, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, num_labels=3, attn_implementation=attention,
        )
    )  # fmt: skip


def mixtral(attention: str = "sdpa"):
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
            max_position_embeddings=32, attn_implementation=attention,
        )
    )  # fmt: skip


def t5(attention: str = "eager"):
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=LAYERS, num_heads=HEADS,
            dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


ARCHITECTURES = {"opt": opt, "llama": llama, "gpt2": gpt2, "bert": bert, "mixtral": mixtral, "t5": t5}


def inputs(architecture: str) -> dict[str, Tensor]:
    """A batch of token numbers with labels, as keyword arguments."""
    ids = batch(3, 9, 64).clamp(min=1)
    labels = torch.tensor([0, 2, 1]) if architecture == "bert" else ids
    return {"input_ids": ids, "labels": labels}


def lora() -> tuple[nn.Module, Callable]:
    """Adapters away from B = 0, where a step would not see A."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    model = build(lambda: peft.get_peft_model(llama(), config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.linspace(-0.2, 0.2, p.numel()).view_as(p))
    given = inputs("llama")
    return model, lambda: model(**given).loss


def refuse(model: nn.Module, call: Callable, error, *words: str) -> None:
    """The call raises, says every word, and no bit of the model has changed."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        call()
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert changed(model, before) == []
