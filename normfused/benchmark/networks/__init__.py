"""Stand-in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..results import NetworkRow

NETWORKS: dict[str, Any] = {"resnet50": "ResNet-50"}


def absent(device: str) -> dict[str, str]:
    return {"unet": "stand-in"}


def run(names: Sequence[str], *, device: str, on_row: Callable[[NetworkRow], None], **options: Any) -> list[NetworkRow]:
    rows = []
    for name in names:
        row = NetworkRow(
            name, options.get("batch") or 1, (1, 3, 8, 8), "contiguous", "float32", "training", "normfused", "eager", step_ms=1.0
        )
        on_row(row)
        rows.append(row)
    return rows
