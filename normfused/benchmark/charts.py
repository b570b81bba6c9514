"""Stand-in."""

from __future__ import annotations

from pathlib import Path

from .results import Results


def draw(results: Results, folder: Path) -> list[Path]:
    return []
