"""A file of options for `python -m zokern train`: flags win over it, and unknown entries are named."""

from __future__ import annotations

import pytest

from zokern.training.options import parse


@pytest.mark.parametrize(
    "name, text",
    [
        ("run.json", '{"steps": 7, "words": {"bad": "terrible", "1": "great"}, "held-out": 0, "set": '
         '[["rank", 4], "kind=x"], "quiet": true, "resume": false, "eval_file": null}'),
        ("run.toml", 'steps = 7\nheld-out = 0\nset = ["rank=4", "kind=x"]\nquiet = true\n'
         '[words]\nbad = "terrible"\n1 = "great"\n'),
    ],
)  # fmt: skip
def test_flags_win_over_a_file(tmp_path, name, text):
    if name.endswith("toml"):
        pytest.importorskip("tomllib", reason="Python reads TOML from 3.11 on")
    (tmp_path / name).write_text(text)
    given = ["--config", str(tmp_path / name), "--model", "m", "--data", "d.csv", "--output", "o"]
    options = parse([*given, "--template", "{} x", "--steps", "9"], None)
    assert options.steps == 9 and options.held_out == 0.0 and options.quiet and not options.resume
    assert options.words == ["bad=terrible", "1=great"] and options.set == [("rank", 4), ("kind", "x")]
    assert parse([*given, "--template", "{} x"], None).steps == 7


def test_an_unknown_entry_of_a_file_lists_the_known_ones(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"stpes": 7}')
    with pytest.raises(SystemExit):
        parse(["--config", str(tmp_path / "run.json")], None)
    assert "run.json has 'stpes'; expected some of batch-size" in capsys.readouterr().err
