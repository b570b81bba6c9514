"""What a conversion did, for every norm, as a table."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_COLUMNS = ("name", "was", "now", "activation", "residual", "note")


@dataclass
class Row:
    """One norm: its name in the model, class before and after, the activation it applies now, and whether it takes the residual.

    ``note`` says why it stays (``now`` is empty) or why the activation or the add after it does.
    """

    name: str
    was: str
    now: str = ""
    act: str = ""
    residual: bool = False
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        return self.name, self.was, self.now or "stays", self.act or "-", "yes" if self.residual else "-", self.note


@dataclass
class FusionReport:
    """What `fuse_norms` or `unfuse_norms` did; ``print`` it. ``model`` is the converted model, ``notes`` concern all of it."""

    title: str
    model: nn.Module
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def converted(self) -> list[Row]:
        """Norms that are of another class now."""
        return [r for r in self.rows if r.now]

    @property
    def fused(self) -> list[Row]:
        """Norms that apply an activation, with it or with the residual."""
        return [r for r in self.rows if r.now and r.act]

    @property
    def skipped(self) -> list[Row]:
        """Norms that stay as they were; ``note`` says why."""
        return [r for r in self.rows if not r.now]

    def summary(self) -> str:
        """One line."""
        if not self.rows:
            return f"{self.title}: no norms found"
        with_residual = sum(r.residual for r in self.converted)
        return (
            f"{self.title}: {len(self.converted)} of {len(self.rows)} norms converted, {len(self.fused)} with their activation,"
            f" {with_residual} of these with the residual add"
        )

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError:
            return self._plain()
        out = io.StringIO()
        # as wide as it needs to be where nobody wraps it
        Console(file=out, width=max(100, *(sum(w) for w in [self._widths()])) + 3 * len(_COLUMNS) + 1, color_system=None).print(self)
        return out.getvalue().rstrip()

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(*_COLUMNS)
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row.cells()), style=None if row.now else "dim")
        return Group(*([table] if self.rows else []), *(Text(note) for note in self.notes), Text(self.summary()))

    def _widths(self) -> list[int]:
        lines = [_COLUMNS, *(row.cells() for row in self.rows)]
        return [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]

    def _plain(self) -> str:
        widths = self._widths()
        lines = [_COLUMNS, tuple("-" * w for w in widths), *(row.cells() for row in self.rows)] if self.rows else []
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*text, *self.notes, self.summary()])
