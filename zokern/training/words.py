"""Classification by label words: a causal language model answers with the next token after a template.

The row stands in the template, and the next-token logits at its end are kept for one word of each label.
softmax over these is the answer, and cross-entropy its loss (Malladi et al. 2023). No new head is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

GAP = "{}"  # where the row's text goes


def padded(found: Sequence[Sequence[int]], pad: int, left: bool) -> dict[str, Tensor]:
    """Returns input_ids and attention_mask, int64 [rows, longest]: token ids, with `pad` on one side."""
    width = max(map(len, found))
    fill = [[pad] * (width - len(ids)) for ids in found]
    ids = [[*f, *own] if left else [*own, *f] for own, f in zip(found, fill)]
    mask = [
        [0] * len(f) + [1] * len(own) if left else [1] * len(own) + [0] * len(f)
        for own, f in zip(found, fill)
    ]
    tensor = lambda values: torch.tensor(values, dtype=torch.int64, device="cpu")  # noqa: E731
    return {"input_ids": tensor(ids), "attention_mask": tensor(mask)}


class LabelWords:
    """Turns rows to inputs, and inputs to one logit per label.

    tokenizer  of transformers, with a padding token
    template   holds {} for the row's text and ends where the word follows
    words      one token each, in the order of the labels 0, 1, ...
    limit      tokens that a row may have, template included; what is too long loses the end of its text.
               None: no limit

    Raises ValueError for a word of several tokens, and for a limit that the template alone exceeds."""

    def __init__(
        self, tokenizer: Any, template: str, words: Sequence[str], limit: int | None = None
    ) -> None:  # fmt: skip
        tokens = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        for word, ids in zip(words, tokens):
            if len(ids) != 1:
                raise ValueError(
                    f"label word {word!r} is {len(ids)} tokens; expected one, whose logit stands for the "
                    "label"
                )
        self.tokenizer, self.template, self.limit = tokenizer, template, limit
        self.ids = torch.tensor([ids[0] for ids in tokens], dtype=torch.int64, device="cpu")
        end = template.partition(GAP)[2]
        self.end = len(tokenizer(end, add_special_tokens=False)["input_ids"]) if end else 0
        if limit is not None and limit <= self.end + 1:
            raise ValueError(
                f"a row may have {limit} tokens, and the end of the template has {self.end}; allow more"
            )

    def tokens(self, rows: Sequence[Any]) -> list[list[int]]:
        """Returns the token ids of each row in its template; the template's end is kept where one is cut."""
        texts = [self.template.replace(GAP, row.text) for row in rows]
        found = self.tokenizer(texts)["input_ids"]
        if self.limit is None:
            return found
        return [
            ids if len(ids) <= self.limit else ids[: self.limit - self.end] + ids[len(ids) - self.end :]
            for ids in found
        ]

    def lengths(self, rows: Sequence[Any]) -> list[int]:
        """Returns the number of tokens of each row, template included."""
        return [len(ids) for ids in self.tokens(rows)]

    def batch(self, rows: Sequence[Any]) -> tuple[dict[str, Tensor], Tensor]:
        """Returns (inputs, labels), int64. Padded on the left: the position to read is then the last one of
        every row."""
        found = self.tokens(rows)
        inputs = padded(found, self.tokenizer.pad_token_id, left=True)
        return inputs, torch.tensor([row.label for row in rows], dtype=torch.int64, device="cpu")

    def logits(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Returns float32 [rows, labels]: next-token logits of the label words."""
        logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
        return logits.index_select(-1, self.ids.to(logits.device)).float()
