"""The model of the step benchmarks: the OPT shape of transformers' default OPTConfig, 125M weights, random."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def opt_125m(dtype: str):
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig()).to(DTYPES[dtype]).eval()


def loss_of(model, batch: int, length: int):
    ids = torch.randint(4, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))
    return lambda: model(input_ids=ids, labels=ids).loss
