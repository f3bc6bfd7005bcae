"""Where `python -m benchmarks.predict` leaves its figures, and `make gpu` finds them."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PAGE, FIGURES = "predicted.md", "predicted.json"


def read(folder: Path = RESULTS) -> dict[str, float]:
    """Returns what is predicted, by the keys that `make gpu` measures; nothing where nothing was written."""
    path = folder / FIGURES
    return json.loads(path.read_text())["figures"] if path.exists() else {}
