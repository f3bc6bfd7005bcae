"""Tiny models whose weights matter to the loss: architectures of transformers, and plain torch ones.

Each maker returns a model and the keyword arguments of its call, or a model and a function that computes its
loss. Weights are seeded, matrices are scaled up from the small values of an initialisation, and no model has
200 000 of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, INNER, LAYERS, HEADS, LENGTH = 64, 32, 48, 2, 4, 10
Loss = Callable[[], Tensor]
Made = tuple[nn.Module, Loss]


def seeded(make: Callable[[], nn.Module], size: float = 0.3) -> nn.Module:
    """A model in eval mode, from a seed of its own, whose matrices have entries of at least this size."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(11)
        model = make().float().eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() < 2:
                    p.add_(0.1 * torch.randn(p.shape))
                elif 0 < float(p.std()) < size:
                    p.mul_(size / p.std())
    return model


def ids(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6))


def hub(config: str, model: str, **options: Any) -> Callable[[], nn.Module]:
    """A maker from the names of a configuration and a model of transformers."""

    def make() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return make


CLASSIC = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
               num_attention_heads=HEADS, max_position_embeddings=32)  # fmt: skip
MODERN = dict(CLASSIC, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(MODERN, num_experts_per_tok=2)
GEMMA = dict(MODERN, head_dim=8)
OLD = dict(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=32)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

# name -> (configuration, model, options): token numbers in, a language model's own loss out
CAUSAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", MODERN),
    "llama dynamic rope": ("LlamaConfig", "LlamaForCausalLM",
        dict(MODERN, max_position_embeddings=6, rope_parameters={
        "rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})),
    "llama tied": ("LlamaConfig", "LlamaForCausalLM", dict(MODERN, tie_word_embeddings=True)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", MODERN),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", dict(MODERN, head_dim=8)),
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(MODERN, sliding_window=4)),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", dict(EXPERTS, num_local_experts=4)),
    "qwen2 experts": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM",
        dict(EXPERTS, num_experts=4, moe_intermediate_size=16,
                      shared_expert_intermediate_size=24)),
    "olmo experts": ("OlmoeConfig", "OlmoeForCausalLM", dict(EXPERTS, num_experts=4)),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", GEMMA),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", dict(GEMMA, sliding_window=4)),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", dict(GEMMA, sliding_window=4)),
    "phi": ("PhiConfig", "PhiForCausalLM", MODERN),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", MODERN),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", MODERN),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", MODERN),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", MODERN),
    "cohere": ("CohereConfig", "CohereForCausalLM", dict(MODERN, logit_scale=1.0)),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", MODERN),
    "granite": ("GraniteConfig", "GraniteForCausalLM", MODERN),
    "gpt neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", CLASSIC),
    "opt": ("OPTConfig", "OPTForCausalLM",
        dict(vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_dim=INNER, dropout=0.0,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=32,
            word_embed_proj_dim=WIDTH)),
    "bloom": ("BloomConfig", "BloomForCausalLM",
        dict(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS)),
    "falcon": ("FalconConfig", "FalconForCausalLM",
        dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS,
               num_attention_heads=HEADS, bos_token_id=1, eos_token_id=2)),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", dict(OLD, bos_token_id=1, eos_token_id=2)),
    "gpt bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", dict(OLD, bos_token_id=1, eos_token_id=2)),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", dict(OLD, rotary_dim=4, bos_token_id=1, eos_token_id=2)),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM",
        dict(OLD, rotary_dim=4, n_ctx=32, bos_token_id=1, eos_token_id=2)),
    "mamba": ("MambaConfig", "MambaForCausalLM",
        dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS,
              state_size=4, use_mambapy=False)),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM",
        dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS,
             attention_hidden_size=WIDTH, intermediate_size=INNER, rescale_every=0)),
    "xlnet": ("XLNetConfig", "XLNetLMHeadModel",
        dict(vocab_size=VOCABULARY, d_model=WIDTH, n_layer=LAYERS, n_head=HEADS,
              d_inner=INNER)),
    "t5": ("T5Config", "T5ForConditionalGeneration",
        dict(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=INNER,
           num_layers=LAYERS, num_heads=HEADS, decoder_start_token_id=0)),
    "bart": ("BartConfig", "BartForConditionalGeneration",
        dict(vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=1,
             decoder_layers=1, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
             encoder_ffn_dim=INNER,
             decoder_ffn_dim=INNER, max_position_embeddings=32)),
    "bert": ("BertConfig", "BertForMaskedLM", dict(CLASSIC, **NO_DROPOUT)),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", dict(CLASSIC, **NO_DROPOUT)),
    "distilbert": ("DistilBertConfig", "DistilBertForMaskedLM",
        dict(vocab_size=VOCABULARY, dim=WIDTH, hidden_dim=INNER,
                   n_layers=LAYERS, n_heads=HEADS, max_position_embeddings=32)),
    "albert": ("AlbertConfig", "AlbertForMaskedLM", dict(CLASSIC, embedding_size=16)),
    "deberta v2": ("DebertaV2Config", "DebertaV2ForMaskedLM",
        dict(CLASSIC, relative_attention=True, position_buckets=4,
                   pos_att_type=["p2c", "c2p"])),
    "electra": ("ElectraConfig", "ElectraForMaskedLM", dict(CLASSIC, embedding_size=16)),
    "mpnet": ("MPNetConfig", "MPNetForMaskedLM", CLASSIC),
}  # fmt: skip


def causal(name: str) -> Made:
    config, kind, options = CAUSAL[name]
    model, tokens = seeded(hub(config, kind, **options)), ids()
    return model, lambda: model(input_ids=tokens, labels=tokens).loss


def vit() -> Made:
    sizes = {k: v for k, v in CLASSIC.items() if k not in ("vocab_size", "max_position_embeddings")}
    options = dict(sizes, image_size=8, patch_size=4, num_labels=5)
    model, pixels = seeded(hub("ViTConfig", "ViTForImageClassification", **options)), normal(3, 3, 8, 8)
    return model, lambda: model(pixel_values=pixels, labels=torch.tensor([0, 3, 1])).loss


def clip() -> Made:
    sizes = {k: v for k, v in CLASSIC.items() if k not in ("vocab_size", "max_position_embeddings")}
    text = dict(sizes, vocab_size=VOCABULARY, max_position_embeddings=32, eos_token_id=2, projection_dim=16)
    vision = dict(sizes, image_size=8, patch_size=4, projection_dim=16)
    model = seeded(hub("CLIPConfig", "CLIPModel", text_config=text, vision_config=vision, projection_dim=16))
    tokens, pixels = ids(3), normal(3, 3, 8, 8)
    return model, lambda: model(input_ids=tokens, pixel_values=pixels, return_loss=True).loss


def whisper() -> Made:
    options = dict(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=WIDTH, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER, max_source_positions=8, max_target_positions=16, decoder_start_token_id=1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = seeded(hub("WhisperConfig", "WhisperForConditionalGeneration", **options))
    sound = normal(2, 8, 16)
    tokens = ids()
    return model, lambda: model(input_features=sound, labels=tokens).loss


def wav2vec2() -> Made:
    options = dict(vocab_size=16, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS,
        intermediate_size=INNER, conv_dim=(8, 8),
                   conv_stride=(4, 2), conv_kernel=(8, 3), num_conv_pos_embeddings=4,
                   num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
                   feat_extract_norm="layer", do_stable_layer_norm=True, apply_spec_augment=False,
                   layerdrop=0.0)  # fmt: skip
    model, sound = seeded(hub("Wav2Vec2Config", "Wav2Vec2ForCTC", **options)), normal(2, 160)
    labels = torch.randint(1, 16, (2, 4), generator=torch.Generator().manual_seed(5))
    return model, lambda: model(input_values=sound, labels=labels).loss


# Plain torch ------------------------------------------------------------------------------------------------


class Words(nn.Module):
    """An embedding, a body over a sequence, and a head."""

    def __init__(self, body: nn.Module, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(VOCABULARY, WIDTH), body, nn.Linear(WIDTH, VOCABULARY)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out = self.body(self.embed(tokens))
        return self.head(out[0] if isinstance(out, tuple) else out)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x)[0]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.inner, x, use_reentrant=False)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


class Experts(nn.Module):
    """Each token takes its best expert, chosen by index: shapes depend on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weight, best = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = (best == i).nonzero().flatten()
            out = out.index_add(0, rows, expert(flat[rows]) * weight[rows, None])
        return x + out.view_as(x)


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.product, self.act = nn.Bilinear(WIDTH, WIDTH, WIDTH), nn.PReLU(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.product(x, x).mT).mT


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, groups=2), nn.GroupNorm(3, 12), nn.SiLU(), nn.Flatten(), nn.Linear(48, 5),
    )  # fmt: skip


def symmetric() -> nn.Module:
    body = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(body, "weight", Symmetric())
    return body


BODIES: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(WIDTH, WIDTH, 2, batch_first=True),
    "gru": lambda: nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True),
    "rnn": lambda: nn.RNN(WIDTH, WIDTH, batch_first=True),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, 0.0, batch_first=True), 2
    ),
    "attention": SelfAttention,
    "weight norm": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(WIDTH, INNER)), nn.Tanh(), nn.Linear(INNER, WIDTH)
    ),
    "parametrize": symmetric,
    "checkpointed": Checkpointed,
    "experts": Experts,
    "bilinear": Squared,
}


def words(body: Callable[[], nn.Module], tied: bool = False) -> Made:
    model, tokens = seeded(lambda: Words(body(), tied)), ids(3)
    return model, lambda: F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def pixels(train: bool) -> Made:
    model, x = seeded(convolution).train(train), normal(6, 3, 8, 8)
    return model, lambda: F.cross_entropy(model(x), torch.arange(6) % 5)


def bag() -> Made:
    model = seeded(
        lambda: nn.Sequential(nn.EmbeddingBag(VOCABULARY, WIDTH, mode="mean"), nn.Tanh(), nn.Linear(WIDTH, 5))
    )
    tokens = ids(6)
    return model, lambda: F.cross_entropy(model(tokens), torch.arange(6) % 5)


ARCHITECTURES: dict[str, Callable[[], Made]] = {
    **{name: (lambda name=name: causal(name)) for name in CAUSAL},
    "vit": vit,
    "clip": clip,
    "whisper": whisper,
    "wav2vec2": wav2vec2,
    **{f"torch {name}": (lambda body=body: words(body)) for name, body in BODIES.items()},
    "torch tied": lambda: words(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), tied=True),
    "torch convolution": lambda: pixels(False),
    "torch convolution in train mode": lambda: pixels(True),
    "torch bag": bag,
}
