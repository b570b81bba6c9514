"""What a run shows while it goes on and at its end: by rich where it is installed and somebody is watching, else plain text."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .charts import label
from .comparison import Comparison, comparisons, faster, network_comparisons
from .operators import Event
from .results import MODES, OperatorRow, Results

COLUMNS = ("case", "pass", "provider", "vs eager", "us", "host us", "GB/s", "% copy", "launches", "peak MB", "saved MB", "error")
SUMMARY_COLUMNS = ("case", "eager us", "compile us", "normfused us", "vs eager", "vs compile", "fastest peer us", "% copy")
NETWORK_COLUMNS = (
    *("network", "input", "layout", "type", "mode", "execution", "norms", "step ms", "vs torch.nn", "samples/s", "peak MB", "saved MB"),
    *("compile s",),
)
_NAMES = {"case", "pass", "input", "layout", "type", "mode", "execution"}  # said once above a table where they are the same in all lines
_UNSTEADY = 0.1  # spread of the rounds in the middle case, from which times are not to be trusted


def _training_steps(results: Results) -> tuple[str, list[Comparison]]:
    """(pass, its comparisons): the whole training pass where it was timed, else what comes next to it."""
    training = [c for c in comparisons(results) if c.mode == MODES[0]]
    direction = max((c.direction for c in training), key=("backward", "forward", "forward_backward").index, default="")
    return direction, [c for c in training if c.direction == direction]


def headline(results: Results) -> str:
    """What normfused gains, in one line: over the longest training pass that was timed, and over networks with torch.nn's norms."""
    direction, passes = _training_steps(results)
    parts = []
    for name, ratios in (("eager", [c.speedup(c.eager) for c in passes]), ("torch.compile", [c.speedup(c.compiled) for c in passes])):
        known = [r for r in ratios if r is not None]
        if known:
            among = f" (median; worst {min(known):.2f}, best {max(known):.2f}, {len(known)} cases)" if len(known) > 1 else ""
            parts.append(f"{statistics.median(known):.2f} times as fast as {name}{among}")
    said = [f"normfused, {_spaced(direction)}: {' and '.join(parts)}"] if parts else []
    gains = [c.speedup for c in network_comparisons(results.networks) if c.speedup is not None]
    if gains:
        said.append(f"networks {_from_to(gains)} times as fast as with torch.nn's norms")
    return "; ".join(said) or "no figure of normfused beside another's"


def _from_to(values: Sequence[float]) -> str:
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least} to {most}"


def unsteady(results: Results) -> str | None:
    """A sentence where the rounds differ so much that something else must have been running."""
    spreads = [s for s in (*(r.spread for r in results.rows), *(n.spread for n in results.networks)) if s is not None]
    middle = statistics.median(spreads) if spreads else 0.0
    if middle < _UNSTEADY:
        return None
    return (
        f"The rounds differ by {middle:.0%} (interquartile, median over all figures): other programs may be running. "
        "Ratios suffer less than times, as providers take turns."
    )


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
                _figure(row.gbps, "{:.3g}"),
                _figure(row.pct_copy, "{:.0f}"),
                _figure(row.launches, "{}"),
                _figure(row.peak_bytes, "{:.2f}", 1e-6),
                _figure(row.saved_bytes, "{:.2f}", 1e-6),
                _figure(row.err_of_allowed, "{:.2f}"),
            )


def summary_cells(found: Iterable[Comparison]) -> Iterator[tuple[str, ...]]:
    """One line a case; wrong, failed and refused figures as that word."""
    for c in found:
        peer = c.fastest_peer
        yield (
            label(c.any),
            *(_time(c, row) for row in (c.eager, c.compiled, c.ours)),
            _figure(c.speedup(c.eager), "{:.2f}x"),
            _figure(c.speedup(c.compiled), "{:.2f}x"),
            "" if peer is None else f"{peer.provider} {_time(c, peer)}",
            _figure(None if c.ours is None else c.ours.pct_copy, "{:.0f}"),
        )


def _time(c: Comparison, row: OperatorRow | None) -> str:
    if row is None or row.status in ("refused", "absent"):
        return ""
    return _figure(c.time_us(row), "{:.1f}") or row.status


def network_cells(results: Results) -> Iterator[tuple[str, ...]]:
    """The lines of networks, torch.nn's above normfused's; failed ones with their reason in place of figures."""
    for pair in network_comparisons(results.networks):
        for r in (pair.theirs, pair.ours):
            if r is None:
                continue
            name = (r.network, "x".join(map(str, r.shape)), r.layout, r.dtype, r.mode, r.execution, r.norms)
            if r.status != "ok":
                yield (*name, f"{r.status}: {r.reason}", *[""] * (len(NETWORK_COLUMNS) - len(name) - 1))
                continue
            yield (
                *name,
                _figure(r.step_ms, "{:.2f}"),
                _figure(pair.speedup if r is pair.ours else None, "{:.2f}x"),
                _figure(r.images_per_s, "{:.1f}"),
                _figure(r.peak_bytes, "{:.1f}", 1e-6),
                _figure(r.saved_bytes, "{:.1f}", 1e-6),
                _figure(r.compile_s, "{:.1f}"),
            )


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

    def tables(self, results: Results, details: bool = False) -> None:
        """One line a case; every pass and provider where that is one case or ``details`` are asked for. Then the networks."""
        found = comparisons(results)
        direction, steps = _training_steps(results)
        if details or len({c.case for c in found}) == 1 or not steps:
            self._table("", COLUMNS, list(cells(found)))
            if found:
                self.say("GB/s: of the bytes that must move; % copy: of a copy's rate; error: 1 is the most that is allowed.")
        else:
            self._table(f"Training, {_spaced(direction)}, medians", SUMMARY_COLUMNS, list(summary_cells(steps)))
            for text in dict.fromkeys(
                f"{r.status}: {r.provider}, {label(r)}: {r.reason}" for r in results.rows if r.status in ("wrong", "failed")
            ):
                self.say(text)
        self._table("Networks, a step", NETWORK_COLUMNS, list(network_cells(results)))

    def _table(self, title: str, columns: Sequence[str], lines: list[tuple[str, ...]]) -> None:
        """Without columns that say nothing; names that are the same in all lines are said above."""
        if not lines:
            return
        same = {k for k, name in enumerate(columns) if name in _NAMES and len({row[k] for row in lines}) == 1}
        kept = [k for k in range(len(columns)) if k not in same and any(row[k] for row in lines)]
        self.say("\n" + ", ".join([*([title] if title else []), *(lines[0][k] for k in sorted(same))]))
        columns, lines = [columns[k] for k in kept], [tuple(row[k] for k in kept) for row in lines]
        names = sum(name in _NAMES or name == "network" for name in columns)
        # a name that is the one of the line before is not said again
        shown = [
            tuple("" if before and k < names and row[: k + 1] == before[: k + 1] else cell for k, cell in enumerate(row))
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
    if column.startswith("vs ") and cell:
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
