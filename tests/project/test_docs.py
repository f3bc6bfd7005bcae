"""The documents are true: their Python runs, the files, targets and commands they name exist, and no line
names one machine.

A Python block of a document is run, in order, with `model` and `loader` (a small one) and `torch` and
`zokern` at hand, unless the line above it is `<!-- not run: the reason -->`. So is an indented block, or one
without a language, that is Python and names zokern. Below `<!-- needs: package, ... -->` a block is left out
where a package is missing, and the test is reported as skipped. Sentences and lines have a length that is
counted here.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import re
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from prose import mean_words
from torch import nn

import zokern
from zokern.cli import COMMANDS, main
from zokern.evaluation import EVALUATIONS
from zokern.guards import Guards
from zokern.optimizer import ZerothOrder

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")] if path.is_file())
FOLDERS = "zokern|csrc|triton_kernels|tests|benchmarks|docs|examples"
MADE_LATER = re.compile(
    r"zokern/_build\.py|benchmarks/results/.*|build/.*|dist/.*|\.venv/?.*"
)  # by a build or a run, not by git
BLOCK = re.compile(
    r"^(?P<above>[^\n]*\n)?```(?P<language>[^\n]*)\n(?P<source>.*?)^```[^\n]*$"
    r"|\n\n(?P<indented>(?: {4}[^\n]*\n)+)(?=\n|\Z)",
    re.M | re.S,
)
FILE = re.compile(r"[\w.-]+\.(?:py|h|cpp|cu|def|md|json|csv|png|toml|txt|in)")
MACHINE = re.compile("/" + r"(?:work|root|home/\w+|opt/\w+|Users/\w+)/")


class Output(dict):
    """A mapping with attributes, as transformers' outputs are."""

    __getattr__ = dict.__getitem__


class Tiny(nn.Module):
    """As a transformers model is called: batch by keyword,
    an object with a loss back where there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(17, 8), nn.Linear(8, 17)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embed(input_ids))
        if labels is None:
            return Output(logits=logits)
        return Output(logits=logits, loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def python_blocks(text: str) -> list[tuple[int, str, list[str]]]:
    """Line number, source and packages of every Python block that is to be run."""
    found = []
    for match in BLOCK.finditer(text):
        above, source = match["above"] or "", textwrap.dedent(match["source"] or match["indented"])
        if match["language"] != "python" and not (not match["language"] and is_program(source)):
            continue
        if not re.match(r"<!-- not run: \S.* -->", above):
            needs = re.match(r"<!-- needs: (\w+(?:, \w+)*) -->", above)
            start = match.start("source" if match["source"] else "indented")
            found.append((text[:start].count("\n") + 1, source, needs[1].split(", ") if needs else []))
    return found


def is_program(source: str) -> bool:
    """Whether a block is Python that uses zokern: not a formula, a command or a listing."""
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return "zokern." in source


def run_blocks(text: str) -> tuple[dict, list[str]]:
    """The names that the blocks have left, and the blocks that were left out."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 17, (3, 2, 5))
    names = {
        "torch": torch,
        "zokern": zokern,
        "model": Tiny(),
        "loader": [{"input_ids": t, "labels": t} for t in tokens],
    }
    left_out = []
    for line, source, needs in python_blocks(text):
        if missing := [name for name in needs if importlib.util.find_spec(name) is None]:
            left_out.append(f"line {line} needs {', '.join(missing)}")
        else:
            exec(compile("\n" * (line - 1) + source, "document", "exec"), names)
    return names, left_out


def code(text: str) -> list[str]:
    """What a document sets in typewriter: fenced lines and `spans`."""
    fences = re.findall(r"^```.*?\n(.*?)^```", text, re.M | re.S)
    return [*fences, *re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))]


def missing_paths(text: str, folder: Path = ROOT) -> list[str]:
    """Files and folders that a document names and that are not there."""
    named = {path.rstrip(".,:") for path in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*", text)}
    missing = {path for path in named if not MADE_LATER.fullmatch(path) and not (ROOT / path).exists()}
    for span in code(text):
        places = (
            [ROOT.glob(span), *((ROOT / top).rglob(span) for top in FOLDERS.split("|"))]
            if FILE.fullmatch(span)
            else []
        )
        if places and not any(path for found in places for path in found):
            missing.add(span)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target and not (folder / target).exists():
            missing.add(target)
    return sorted(missing)


def missing_commands(text: str) -> list[str]:
    """`make x` and `python -m zokern x` that do not exist."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    shown = "\n".join(code(text))
    missing = [
        f"make {name}" for name in re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b", shown) if name not in targets
    ]
    return missing + [
        f"zokern {name}" for name in re.findall(r"-m zokern ([a-z]+)\b", shown) if name not in COMMANDS
    ]


def machine_paths(text: str) -> list[str]:
    return [
        f"{number}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE.search(line)
    ]


# Words and lines --------------------------------------------------------------------------------------------


def long_lines(text: str) -> list[int]:
    """Numbers of the lines of more than 110 columns,
    but for rows of tables and links, which cannot be broken."""
    lines = enumerate(text.splitlines(), 1)
    return [
        n for n, line in lines if len(line) > 110 and not re.match(r"\s*\||\s*!?\[[^]]*\]\([^)]*\)\S*$", line)
    ]


def sources() -> list[Path]:
    """What git holds or would hold."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout: the list of sources is git's")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def test_the_readme_opens_with_python_that_runs():
    assert python_blocks((ROOT / "README.md").read_text())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_document(document, tmp_path, monkeypatch):
    text = document.read_text()
    assert missing_paths(text, document.parent) == []
    assert missing_commands(text) == []
    monkeypatch.chdir(tmp_path)
    _, left_out = run_blocks(text)
    if left_out:
        pytest.skip(f"every other block has been run: {'; '.join(left_out)}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_lines_of_a_document(document):
    assert long_lines(document.read_text()) == []


def check_lines(root: Path) -> None:
    """Kernels have at most 110 columns; ruff holds Python to as many (E501)."""
    kernels = [path for path in root.glob("csrc/**/*") if path.is_file()]
    found = {
        str(path.relative_to(root)): wide
        for path in [*kernels, *root.glob("triton_kernels/*.py")]
        if (wide := [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110])
    }
    assert kernels and found == {}


def test_the_lines_of_kernels():
    check_lines(ROOT)


@pytest.mark.parametrize("name", ["csrc/update.cu", "csrc/zo/stream.h", "triton_kernels/update.py"])
def test_a_long_line_of_a_kernel_is_rejected(name, tmp_path):
    for other in ("csrc/update.cu", name):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_text("// " + "x" * 107 + "\n")
    check_lines(tmp_path)
    (tmp_path / name).write_text("// a line\n// " + "x" * 108 + "\n")
    with pytest.raises(AssertionError, match=rf"{name}.*\[2\]"):
        check_lines(tmp_path)


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=lambda path: path.name
)
def test_the_sentences_of_a_document(document):
    """18 words or fewer on average."""
    assert mean_words(document.read_text()) <= 18


LONG = "This sentence has nine words and is not long. " + "word " * 40 + "and its end."


@pytest.mark.parametrize(
    "text, mean",
    [
        ("One two three. Four five!", 2.5),
        ("One `two three four`\nfive (six). Seven.", 2.5),
        ("- one two\n- three four five six", 3.0),
        (
            "# A heading of many words\n\n"
            "| a | table |\n"
            "|---|---|\n\n"
            "    c = a formula\n\n"
            "One two 0.5 et al. 2024 six.",
            7.0,
        ),
        ("```\na fence. of code.\n```\n<!-- a comment. -->\nOne two.", 2.0),
        ("1. one\n   two\n2. three", 1.5),
    ],
)
def test_words_are_counted(text, mean):
    assert mean_words(text) == mean


def test_long_sentences_and_lines_are_rejected():
    assert mean_words(LONG) > 18 and mean_words(LONG.replace("word word", "word. Word")) < 18
    wide = "x" * 111
    links = f"[{wide}](there)\n![{wide}](there)\nsee [{wide}](there)"
    assert long_lines(f"short\n{wide}\n| {wide} |\n{links}\n{wide[1:]}") == [2, 6]


def test_a_block_without_its_package_is_reported():
    text = "<!-- needs: torch, no_such_package -->\n```python\nassert False\n```\n"
    assert run_blocks(text)[1] == ["line 3 needs no_such_package"]
    with pytest.raises(AssertionError):  # it is run where the packages are there
        run_blocks(text.replace(", no_such_package", ""))
    with pytest.raises(AssertionError):  # a list without names leaves nothing out
        run_blocks(text.replace("torch, no_such_package", ""))


def test_the_objective_of_the_documents_is_read_in_one_call(recwarn):
    names, _ = run_blocks((ROOT / "docs/factored.md").read_text())
    assert names["opt"].result.evaluation == "paired" and not recwarn.list


def test_the_cost_of_the_stream_is_the_benchmark_s():
    """docs/stream.md quotes nanoseconds an element: those of the results page that it names, in its order."""
    section = (ROOT / "docs/stream.md").read_text().split("## What it costs")[1].split("\n## ")[0]
    page = (ROOT / re.search(r"benchmarks/results/\S+\.md", section)[0]).read_text()
    lines = [
        f"{case} {kind} n=67108864" for case in ("axpy_ normal K=1", "w += c") for kind in ("fp32", "bf16")
    ]
    printed = [re.search(rf"^\| {re.escape(line)} \|[^|]*\| ([\d.]+) \|", page, re.M)[1] for line in lines]
    assert re.findall(r"\d\.\d+", section) == printed


def rows(text: str, head: str) -> list[list[str]]:
    """The cells of the table whose first line begins so."""
    table = re.search(rf"^{re.escape(head)}.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)[1]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]


def check_results(readme: str, speed: str) -> None:
    """A column of the README's table is a row of docs/speed.md."""
    columns = [list(column) for column in zip(*rows(readme, "| tokens | MeZO |"))]
    names = ("MeZO at its default (`paired`)", "SubZero", "LOZO", "P-GAP, rank 128", "TeZO", "FZOO")
    measured = {name: figures for name, *figures in rows(speed, "| step | 1 x 4 tokens |")}
    assert columns[1:7] == [measured[name] for name in names]
    eager = next(
        cells[1] for cells in rows(speed, "| what (commit") if cells[0].startswith("the eager loop's step")
    )
    assert columns[7] == eager.split(" / ")


def test_the_results_of_the_readme_are_those_of_the_speed_page():
    readme, speed = ((ROOT / name).read_text() for name in ("README.md", "docs/speed.md"))
    check_results(readme, speed)
    for figure in ("0.54", "2.8x"):
        with pytest.raises(AssertionError):
            check_results(readme.replace(f"| {figure} |", "| 0.11 |"), speed)


@pytest.mark.parametrize("name", [name for name in zokern.__all__ if callable(getattr(zokern, name))])
def test_what_is_exported_has_a_docstring_of_its_own(name):
    exported = getattr(zokern, name)
    assert vars(exported)["__doc__"] if isinstance(exported, type) else exported.__doc__


def test_every_option_and_evaluation_is_documented():
    """Those that all methods share, in the docstring of MeZO, to which the others refer."""
    names = [
        *inspect.signature(ZerothOrder).parameters,
        *(option.name for option in dataclasses.fields(Guards)),
        *EVALUATIONS,
    ]
    names.remove("guards")  # which are those of Guards
    assert [name for name in names if not re.search(rf"\b{name}\b", zokern.MeZO.__doc__)] == []


def test_no_file_names_one_machine():
    found = {}
    for path in sources():
        try:
            lines = machine_paths(path.read_text())
        except UnicodeDecodeError:
            continue
        if lines:
            found[str(path.relative_to(ROOT))] = lines
    assert found == {}


def test_the_command_line_says_its_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"zokern {zokern.__version__}\n"


def test_every_target_of_make_help_exists():
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split()
    assert sorted(phony) == sorted(re.findall(r"^([a-z-]+):", text, re.M))


@pytest.mark.parametrize(
    "check, wrong, complaint",
    [
        (missing_paths, "see zokern/nowhere.py.", "zokern/nowhere.py"),
        (missing_paths, "see `nowhere.h`", "nowhere.h"),
        (missing_paths, "see [the page](docs-nowhere.md)", "docs-nowhere.md"),
        (missing_commands, "run `make coffee`", "make coffee"),
        (missing_commands, "run `make test-coffee`", "make test-coffee"),
        (missing_commands, "```\nOMP_NUM_THREADS=1 python -m zokern fly\n```", "zokern fly"),
        (machine_paths, "cd " + "/" + "work/main", "1: cd " + "/" + "work/main"),
    ],
)
def test_a_wrong_document_is_rejected(check, wrong, complaint):
    assert check(wrong) == [complaint]


def test_a_block_that_fails_is_noticed():
    run_blocks("```python\nloss = model(**loader[0]).loss\n```\n")
    with pytest.raises(AssertionError):
        run_blocks("text\n\n```python\nassert zokern is None\n```\n")
    with pytest.raises(AssertionError):  # every block counts, not only the last
        run_blocks("```python\nassert zokern is None\n```\n\ntext\n\n```python\nassert zokern\n```\n")
    for block in ("text\n\n    assert zokern.MeZO is None\n", "```\nassert zokern.MeZO is None\n```\n"):
        with pytest.raises(AssertionError):  # a block that is not marked as Python
            run_blocks(block)
    run_blocks("text\n\n    theta <- zokern.step lr z\n\n```\nmake x  # zokern.MeZO\n```\n")
    run_blocks("<!-- not run: needs a GPU -->\n```python\nassert zokern is None\n```\n")
    with pytest.raises(AssertionError):  # an exemption without a reason is none
        run_blocks("<!-- not run: -->\n```python\nassert zokern is None\n```\n")
