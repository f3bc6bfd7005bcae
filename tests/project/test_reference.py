"""The API reference is complete: docs/reference.md lists every public name, and each docstring says what it
must. docs/docstrings.py takes docstrings apart, for the site and here.

    all            a verb in the present tense first; every argument; what is raised; sentences of 18 words
    verbs          shapes and dtypes, what is returned, what is read or written, a source
    rules          what they keep, a source
    estimators, directions   a source
    methods        every argument, what is raised (the rest: test_method_pages.py)
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest
from prose import sentences, words

import zokern

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SOURCE = re.compile(r"\b(19|20)\d\d\b|\barXiv\b")
UNIT = re.compile(r"\b(units?|weights?|loss(es)?|per|bytes)\b")
WITH_UNITS = {"eps", "lr", "clip", "scale", "scales", "coeffs", "noise", "clip_norm", "budget", "reach"}
DIALECT = re.compile(r"\b(whoever|somebody|nobody|what waits)\b", re.I)
NUMBERS = {"__version__", "THETA"}


def _load(path: Path):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


docstrings = _load(DOCS / "docstrings.py")


def listed(reference: str, methods: str) -> list[str]:
    """The public names of both pages, in their order."""
    named = re.findall(r"^\.\. (?:auto\w+|py:data):: zokern\.(\w+)(?:\(\))?$", reference, re.M)
    return named + re.findall(r"^## (\w+)$", methods, re.M)


def check_listed(reference: str, methods: str) -> None:
    assert sorted(listed(reference, methods)) == sorted(zokern.__all__)


def kind(exported) -> str:
    """The folder of zokern/ that holds it."""
    return exported.__module__.split(".")[1]


def parameters(exported) -> list[str]:
    """The arguments that a docstring has to tell: none of exceptions and of what a user does not build."""
    if exported in (zokern.StepResult, zokern.Tuning, zokern.Refused, zokern.RankFailed, zokern.Oracle):
        return []
    return [name for name, p in inspect.signature(exported).parameters.items() if p.kind is not p.VAR_KEYWORD]


def told(blocks) -> dict[str, str]:
    """The meaning of every argument."""
    return {
        name: " ".join(block.lines) for block in blocks if block.kind == "argument" for name in block.names
    }


def flaws(name: str, exported) -> list[str]:
    """What a docstring lacks."""
    text = vars(exported).get("__doc__") if isinstance(exported, type) else exported.__doc__
    if not text:
        return ["has no docstring"]
    text = inspect.cleandoc(text)
    blocks = docstrings.blocks(text.splitlines())
    meanings, expected, room = told(blocks), parameters(exported), kind(exported)
    if room == "methods":  # the first paragraph is a formula; what all methods take is told once
        blocks = blocks[1:]
        if exported is not zokern.MeZO:
            expected = [each for each in expected if each in meanings or each not in SHARED]
    prose = [" ".join(block.lines) for block in blocks if block.kind == "text"]
    plain = " ".join([*prose, *meanings.values()])
    found = [f"does not tell argument {each}" for each in expected if each not in meanings]
    found += [
        f"gives no unit of {each}"
        for each in expected
        if each in WITH_UNITS & meanings.keys() and not UNIT.search(meanings[each])
    ]
    must = {"what is raised": bool(re.search(r"\bRaises [A-Z]", plain)) or not expected}
    if room != "methods":
        must["a verb first"] = bool(re.match(r"[A-Z][a-z]+s\b", text))
    if room in ("ops", "rule", "estimator", "directions"):
        must["a source"] = bool(SOURCE.search(plain))
    if room == "ops":
        must["a dtype"] = bool(re.search(r"\b(float32|int64)\b", plain))
        must["a shape"] = bool(re.search(r"\bshape|\[\w+\]|\(m, n\)|\(m, r\)", plain))
        must["what is returned"] = "Returns" in plain
        must["what is written"] = bool(re.search(r"[Ww]rites|written|in place|only read", plain))
    if room == "rule":
        must["what it keeps"] = bool(re.search(r"\b[Kk]eeps?\b", plain))
    found += [f"does not say {what}" for what, said in must.items() if not said]
    found += [f"says {word!r}" for word in DIALECT.findall(plain)]
    lengths = [words(one) for one in sentences("\n\n".join([*prose, *meanings.values()]))]
    if sum(lengths) > 18 * len(lengths):
        found.append(f"has {sum(lengths) / len(lengths):.1f} words a sentence")
    if max(lengths, default=0) > 40:
        found.append(f"has a sentence of {max(lengths)} words")
    return found


def check_words(texts: dict[str, str]) -> None:
    """The words of DIALECT are in no file, not in comments and private docstrings either."""
    found = {name: DIALECT.findall(text) for name, text in texts.items()}
    assert not any(found.values()), {name: words for name, words in found.items() if words}


def test_words_of_every_file() -> None:
    rooms = ("zokern", "triton_kernels", "csrc", "examples", "docs")
    kinds = {".py", ".md", ".h", ".cpp", ".cu", ".def"}
    files = [f for room in rooms for f in (ROOT / room).rglob("*") if f.suffix in kinds]
    assert len(files) > 200
    check_words({str(f.relative_to(ROOT)): f.read_text() for f in files})


def test_a_word_of_the_dialect_is_rejected() -> None:
    with pytest.raises(AssertionError, match="a.py.*What waits"):
        check_words({"a.py": "# What waits is written first", "b.py": "# Deferred updates are written"})


SHARED = told(docstrings.blocks(inspect.cleandoc(zokern.MeZO.__doc__).splitlines()))
EXPORTED = [name for name in zokern.__all__ if name not in NUMBERS]


def test_every_public_name_is_in_the_reference():
    check_listed((DOCS / "reference.md").read_text(), (DOCS / "methods.md").read_text())


@pytest.mark.parametrize(
    "change",
    [
        (".. autoclass:: zokern.Adam\n", ""),
        (".. autofunction:: zokern.step\n", ".. autofunction:: zokern.stride\n"),
        (".. autoclass:: zokern.Adam\n", ".. autoclass:: zokern.Adam\n" * 2),
    ],
    ids=["missing", "another name", "twice"],
)
def test_a_wrong_list_is_rejected(change):
    reference, methods = ((DOCS / name).read_text() for name in ("reference.md", "methods.md"))
    assert change[0] in reference
    with pytest.raises(AssertionError):
        check_listed(reference.replace(*change), methods)
    with pytest.raises(AssertionError):
        check_listed(reference, methods.replace("## MeZO\n", ""))


@pytest.mark.parametrize("name", EXPORTED)
def test_a_docstring_says_what_it_must(name):
    assert flaws(name, getattr(zokern, name)) == []


class Right(zokern.Spsa):
    """Estimates the gradient along the longest of several draws.

        g = c z

    queries  draws a step, of which the longest is taken
    clip     bound on |c|, in units of loss per weight

    Raises ValueError for arguments out of range. Spall 1992."""

    def __init__(self, queries: int = 1, clip: float | None = None) -> None:
        super().__init__(queries, clip=clip)


class Untold(Right):
    """Estimates the gradient along the longest of several draws.

    queries  draws a step
    clip     bound on |c|, in units of loss per weight

    Raises ValueError for arguments out of range. Spall 1992."""

    def __init__(self, queries: int = 1, clip: float | None = None, stretch: float = 1.0) -> None:
        super().__init__(queries, clip)
        self.stretch = stretch


class WithoutUnit(Right):
    """Estimates the gradient. Raises ValueError for arguments out of range. Spall 1992.

    queries  draws a step
    clip     bound on |c|"""


class Noun(Right):
    """An estimator of the gradient. Raises ValueError for arguments out of range. Spall 1992.

    queries, clip  as for zokern.Spsa; clip in units of loss per weight"""


class Silent(Right):
    """Estimates the gradient.

    queries, clip  as for zokern.Spsa; clip in units of loss per weight"""


class Dialect(Right):
    """Estimates the gradient for whoever asks. Raises ValueError for arguments out of range. Spall 1992.

    queries, clip  as for zokern.Spsa; clip in units of loss per weight"""


class Winding(Right):
    """Estimates the gradient and then it does one more thing and then it does one more thing and then it does
    one more thing and then it does one more thing and then it does one more thing and then it is done.

    queries, clip  as for zokern.Spsa; clip in units of loss per weight

    Raises ValueError for arguments out of range. Spall 1992."""


class Undocumented(Right):
    pass


class Keeper(zokern.Sgd):
    """Moves the weights along the estimate. Malladi et al. 2023."""


def verb(tensor):
    """Computes a verb. Raises ValueError for another tensor.

    tensor  a tensor"""


verb.__module__ = zokern.axpy_.__module__
for made in (Right, Untold, WithoutUnit, Noun, Silent, Dialect, Winding, Undocumented):
    made.__module__ = zokern.Spsa.__module__
Keeper.__module__ = zokern.Sgd.__module__


@pytest.mark.parametrize(
    "exported, complaints",
    [
        (Right, []),
        (Untold, ["does not tell argument stretch"]),
        (WithoutUnit, ["gives no unit of clip"]),
        (Noun, ["does not say a verb first"]),
        (Silent, ["does not say what is raised", "does not say a source"]),
        (Dialect, ["says 'whoever'"]),
        (Winding, ["has a sentence of 43 words"]),
        (Undocumented, ["has no docstring"]),
        (Keeper, ["does not say what it keeps"]),
        (
            verb,
            [
                f"does not say {what}"
                for what in ("a source", "a dtype", "a shape", "what is returned", "what is written")
            ],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_docstring_that_lacks_something_is_rejected(exported, complaints):
    assert flaws("wrong", exported) == complaints


def test_a_docstring_is_taken_apart():
    """Arguments with their lines, formulas, and paragraphs; and its markup."""
    lines = "eps   a *unit*,\n      or two;  lr, wd  per zokern.step\nReturns x_."
    text = f"Moves x.\n\n    x <- x + lr_ g\n\n{lines}"
    found = docstrings.blocks(text.splitlines())
    assert [(block.kind, block.names) for block in found] == [
        ("text", ()),
        ("formula", ()),
        ("argument", ("eps",)),
        ("argument", ("lr", "wd")),
        ("text", ()),
    ]
    made = "\n".join(docstrings.restructured(text.splitlines(), ["eps", "lr"]))
    assert ":param eps: a \\*unit\\*, or two" in made and ":ivar wd: per :py:obj:`zokern.step`" in made
    assert "::\n\n        x <- x + lr_ g\n" in made and "Returns x\\_." in made
