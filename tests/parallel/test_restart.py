"""torchrun's agent starts killed ranks again, and they go on to the bits of the unbroken run; messages are
small."""

from __future__ import annotations

import pytest
import rank_work
import torch

from benchmarks import faults
from benchmarks import ranks as messages

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="this build of torch has no gloo: no processes to run",
    ),
]


def test_two_kills_two_clean_stops_and_two_resumes():
    found = faults.run(2, 2, say=lambda line: None)
    assert found.holds and found.kills == 2 and found.final == 2, found


@pytest.mark.parametrize("wrong", [rank_work.forgets_state, rank_work.starts_anew])
def test_a_run_that_resumes_wrongly_is_noticed(wrong):
    found = faults.run(1, 2, load=wrong, say=lambda line: None)
    assert not found.holds and found.final == 0 and found.clean == 1, found


def test_a_step_sends_less_than_a_kilobyte_whatever_the_size(capfd):
    """At the transport; what the process writes to its sockets is counted too."""
    messages.main(["--methods", "MeZO", "FZOO", "--widths", "16", "256"])
    rows = [line.split("|")[1:-1] for line in capfd.readouterr().out.splitlines() if line.startswith("| ")][
        2:
    ]
    assert [row[0].strip() for row in rows] == ["MeZO", "MeZO", "FZOO", "FZOO"]
    for row in rows:
        weights, handed, written = map(float, row[1:])
        assert weights > 500 and handed == 256 and written < 1000
