"""The models of the step benchmarks: shapes of published ones, with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _build(name: str) -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM, Qwen2Config, Qwen2ForCausalLM

    if name == "OPT-125M":  # transformers' default
        return OPTForCausalLM(OPTConfig())
    if name == "OPT-350M":  # norms after the blocks, embeddings narrower than the model
        return OPTForCausalLM(
            OPTConfig(
                hidden_size=1024, num_hidden_layers=24, ffn_dim=4096, num_attention_heads=16,
                word_embed_proj_dim=512, do_layer_norm_before=False
            )
        )  # fmt: skip
    if name == "Qwen2-0.5B":
        return Qwen2ForCausalLM(
            Qwen2Config(
                hidden_size=896, num_hidden_layers=24, intermediate_size=4864, num_attention_heads=14,
                num_key_value_heads=2, tie_word_embeddings=True, vocab_size=151936,
            )
        )  # fmt: skip
    if name == "OPT-tiny":  # for the quick mode
        return OPTForCausalLM(
            OPTConfig(
                hidden_size=128, num_hidden_layers=2, ffn_dim=512, num_attention_heads=4, vocab_size=4096
            )
        )
    if name == "Llama-narrow":  # host time: many layers of next to no arithmetic
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=64,
                intermediate_size=172,
                num_hidden_layers=28,
                num_attention_heads=4,
                vocab_size=512,
            )
        )
    if name == "OPT-1.3B":
        return OPTForCausalLM(
            OPTConfig(hidden_size=2048, num_hidden_layers=24, ffn_dim=8192, num_attention_heads=32)
        )
    if name == "OPT-13B":
        return OPTForCausalLM(
            OPTConfig(hidden_size=5120, num_hidden_layers=40, ffn_dim=20480, num_attention_heads=40)
        )
    if name == "Llama-1B":  # the shapes of Llama-3.2-1B
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True,
            )
        )  # fmt: skip
    if name == "Llama-7B":
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig())  # transformers' default
    raise ValueError(
        f"no model {name!r}; expected OPT-125M, OPT-350M, Qwen2-0.5B, OPT-tiny, Llama-narrow, OPT-1.3B, "
        "Llama-1B, Llama-7B or OPT-13B"
    )


def model(name: str, dtype: str) -> nn.Module:
    torch.manual_seed(0)
    return _build(name).to(DTYPES[dtype]).eval()


def on_device(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """The same, made where it is used: its weights are drawn there and pass through no other memory."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return _build(name).eval()
    finally:
        torch.set_default_dtype(before)


def opt_125m(dtype: str) -> nn.Module:
    return model("OPT-125M", dtype)


def same_weights(module: nn.Module) -> nn.Module:
    """A second module over the same parameters: hooks of an optimizer sit on its own module only."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def loss_of(model, batch: int, length: int):
    ids = _ids(model, batch, length)
    # one example, for estimators that want the loss of each
    return lambda: model(input_ids=ids, labels=ids).loss.reshape(1)


def loss_on_meta(model, batch: int, length: int):
    """Returns the same for a model on the meta device, with a mask: without one, transformers looks at
    values."""
    ids = torch.empty(batch, length, dtype=torch.int64, device="meta")
    mask = torch.empty(batch, 1, length, length, dtype=model.dtype, device="meta")

    def loss() -> Tensor:
        output = model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).reshape(1)

    return loss


def _ids(model, batch: int, length: int):
    ids = torch.randint(
        4, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1)
    )
    return ids.to(model.device)


def rating_of(module: Any, length: int, generated: int) -> Callable[[], Tensor]:
    """Returns a closure that generates greedily after a prompt and rates the result:
    the share of even tokens."""
    limits = {"max_new_tokens": generated, "min_new_tokens": generated, "do_sample": False, "pad_token_id": 1}
    ids = _ids(module, 1, length)
    mask = torch.ones_like(ids)

    def rating() -> Tensor:
        made = module.generate(input_ids=ids, attention_mask=mask, **limits)[:, length:]
        assert made.shape[1] == generated
        return (made % 2 == 0).double().mean()

    return rating
