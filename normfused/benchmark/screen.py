"""What a run shows while it goes on and at its end: by rich where it is installed and somebody is watching, else plain text."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .comparison import Comparison, comparisons, faster, network_comparisons
from .operators import Event
from .results import MODES, NetworkRow, Results

COLUMNS = ("case", "pass", "provider", "vs eager", "us", "host us", "GB/s", "% copy", "launches", "peak MB", "saved MB", "error")
NETWORK_COLUMNS = ("network", "batch", "norms", "execution", "mode", "step ms", "images/s", "peak MB", "saved MB", "compile s")


def headline(results: Results) -> str:
    """What normfused gains, in one line: over the longest training pass that was timed, and of every network's step."""
    training = [c for c in comparisons(results) if c.mode == MODES[0]]
    # the whole pass where it was timed, else what comes next to it
    direction = max((c.direction for c in training), key=("backward", "forward", "forward_backward").index, default="")
    passes = [c for c in training if c.direction == direction]
    parts = []
    for name, ratios in (("eager", [c.speedup(c.eager) for c in passes]), ("torch.compile", [c.speedup(c.compiled) for c in passes])):
        known = [r for r in ratios if r is not None]
        if known:
            middle = statistics.median(known)
            parts.append(f"{middle:.2f} times as fast as {name} (worst {min(known):.2f}, best {max(known):.2f}, {len(known)} cases)")
    said = [f"normfused, {_spaced(direction)}, median: {' and '.join(parts)}"] if parts else []
    for pair in network_comparisons(results.networks):
        if pair.speedup is not None and pair.ours is not None:
            row = pair.ours
            said.append(f"{row.network} batch {row.batch} {row.layout} {row.mode} {row.execution}: {pair.speedup:.2f}x with it")
    return "; ".join(said) or "no figure of normfused beside another's"


def _spaced(direction: str) -> str:
    return direction.replace("_", " + ")


def cells(found: Iterable[Comparison]) -> Iterator[tuple[str, ...]]:
    """The table's lines: absent and refused rows left out, wrong and failed ones with their reason in place of figures."""
    for c in found:
        base = c.time_us(c.eager)
        for row in c.rows.values():
            us, name = c.time_us(row), (c.case, f"{c.mode} {_spaced(c.direction)}", row.provider)
            if row.status in ("refused", "absent"):
                continue
            if us is None:
                yield (*name, f"{row.status}: {row.reason}", *[""] * (len(COLUMNS) - 4))
                continue
            yield (
                *name,
                _figure(faster(us, base), "{:.2f}x"),
                f"{us:.1f}",
                _figure(None if row.device_us is None else row.host_us, "{:.1f}"),
                _figure(row.gbps, "{:.0f}"),
                _figure(row.pct_copy, "{:.0f}"),
                _figure(row.launches, "{}"),
                _figure(row.peak_bytes, "{:.2f}", 1e-6),
                _figure(row.saved_bytes, "{:.2f}", 1e-6),
                _figure(row.err_of_allowed, "{:.2f}"),
            )


def network_cells(rows: Iterable[NetworkRow]) -> Iterator[tuple[str, ...]]:
    for r in rows:
        name = (r.network, str(r.batch), r.norms, r.execution, r.mode)
        if r.status != "ok":
            yield (*name, f"{r.status}: {r.reason}", *[""] * (len(NETWORK_COLUMNS) - 6))
            continue
        figures = (_figure(r.step_ms, "{:.2f}"), _figure(r.images_per_s, "{:.1f}"), _figure(r.peak_bytes, "{:.1f}", 1e-6))
        yield (*name, *figures, _figure(r.saved_bytes, "{:.1f}", 1e-6), _figure(r.compile_s, "{:.1f}"))


def _figure(value: float | None, pattern: str, unit: float | None = None) -> str:
    return "" if value is None else pattern.format(value if unit is None else value * unit)


class Screen:
    """Lines, a progress bar and tables."""

    def __init__(self) -> None:
        self.console: Any = None
        if sys.stdout.isatty():
            try:
                from rich.console import Console
            except ImportError:
                return
            self.console = Console(highlight=False)

    def say(self, text: str) -> None:
        if self.console is None:
            print(text, flush=True)
        else:
            self.console.print(text, markup=False)

    @contextmanager
    def progress(self, device: str) -> Iterator[Callable[[Event], None]]:
        """What `operators.run` reports its events to."""

        def lines(event: Event) -> None:
            if event.kind == "start":
                self.say(f"About {_duration(event.seconds_left)} for {event.text}; the guess gets better with every case.")
            elif event.kind == "done":
                self.say(line(event, device))

        if self.console is None:
            yield lines
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]} left, {task.description}"))
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("", total=None, left="?")

            def on_event(event: Event) -> None:
                lines(event)
                bar.update(task, description=event.text)
                if event.seconds_left is not None:
                    bar.update(task, completed=event.done, total=event.total, left=_duration(event.seconds_left))

            yield on_event

    def tables(self, results: Results) -> None:
        for columns, lines in ((COLUMNS, cells(comparisons(results))), (NETWORK_COLUMNS, network_cells(results.networks))):
            self._table(columns, list(lines))

    def _table(self, columns: Sequence[str], lines: list[tuple[str, ...]]) -> None:
        if not lines:
            return
        # a name that is the one of the line before is not said again
        shown = [
            tuple("" if before and k < 2 and row[: k + 1] == before[: k + 1] else cell for k, cell in enumerate(row))
            for before, row in zip([None, *lines], lines, strict=False)
        ]
        if self.console is None:
            # a reason runs on over the empty columns behind it
            widths = [max(len(row[k]) for row in [columns, *shown] if ": " not in row[k]) for k in range(len(columns))]
            for row in [columns, *shown]:
                print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, header_style="bold", pad_edge=False, box=None)
        for row in shown:
            table.add_row(*(Text(cell, style=_style(column, cell)) for column, cell in zip(columns, row, strict=True)))
        self.console.print(table)


def _style(column: str, cell: str) -> str:
    if ": " in cell:
        return "red"
    if column == "vs eager" and cell:
        ratio = float(cell.removesuffix("x"))
        return "green" if ratio >= 1.05 else "yellow" if ratio < 0.95 else ""
    return ""


def line(event: Event, device: str) -> str:
    """A case that is done: how far the run is, and every provider's speed-up over eager in the last training pass."""
    found = [c for c in comparisons(Results({"device": device}, list(event.rows))) if c.mode == event.rows[0].mode]
    parts = []
    for c in found[-1:]:
        for row in c.rows.values():
            ratio = faster(c.time_us(row), c.time_us(c.eager))
            if row.status in ("wrong", "failed"):
                parts.append(f"{row.provider} {row.status}")
            elif ratio is not None and row is not c.eager:
                parts.append(f"{row.provider} {ratio:.2f}x")
    return f"[{event.done}/{event.total}, {_duration(event.seconds_left)} left] {event.text}" + (f"; {', '.join(parts)}" if parts else "")


def _duration(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
