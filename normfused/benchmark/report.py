"""``python -m normfused bench report [FILES] [--out FOLDER]``: results files as pages that people read, with what went badly as well.

``performance.md`` has goals, headline figures, networks, bytes and everything in which normfused is slower or wrong;
``performance-full.md`` every measurement. The same files give the same bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from .. import _build
from . import charts, traffic
from .cases import HEADLINE, MATRIX
from .comparison import Comparison, comparisons, faster, headline, is_ours, network_comparisons
from .results import OperatorRow, Results, by, folder_name, is_results
from .targets import TARGETS, judge

__all__ = ["COMMAND", "OUTSIDE", "default_files", "lines", "main", "results_folder", "shown", "write"]

COMMAND = "python -m normfused bench report"
_FIRST = f"<!-- Written by `{COMMAND}`. Do not edit: run it again. -->"
OUTSIDE = Path("normfused-bench")  # results, where there is no checkout to keep them
_PASSES = {"forward": "fwd", "backward": "bwd", "forward_backward": "fwd + bwd"}
_ALL_CASES = "all-speedup"  # in the names of charts that belong beside every measurement
_FOLDED = 12  # rows of a table that is shown unfolded


@dataclass(frozen=True)
class _Section:
    """One results file and its charts."""

    results: Results
    pictures: list[Path]
    no_pictures: dict[str, str]

    @property
    def on_gpu(self) -> bool:
        return bool(self.results.header.get("device") == "cuda")

    @property
    def name(self) -> str:
        return str(self.results.header.get("machine", "unknown machine")) + ("" if self.on_gpu else " (CPU)")


def default_files() -> list[Path]:
    """The newest file of every device, by the date in its header: of a checkout's ``bench/results``, else of ``normfused-bench`` here."""
    newest: dict[Path, tuple[str, Path]] = {}
    for path in sorted(results_folder().glob("*/*.json")):
        if not is_results(path):  # other commands keep theirs in the same folders
            continue
        date = str(Results.load(path).header.get("date", ""))
        if path.parent not in newest or newest[path.parent] <= (date, path):
            newest[path.parent] = (date, path)
    return [path for _, path in newest.values()]


def write(files: list[Path], docs: Path, pictures: Path) -> list[Path]:
    """Writes ``performance.md`` and ``performance-full.md`` into ``docs`` and PNG charts into ``pictures``; both folders are made.

    Args:
        files: results files, one for each device; without any the page says that nothing was measured.

    Returns:
        What was written, pages first.

    Raises:
        ValueError: a file that is no results file, with its name.
    """
    sections = []
    for path in files:
        results = Results.load(path)
        drawn, reasons = charts.drawn(results, pictures, f"{folder_name(str(results.header.get('machine', 'unknown')))}-")
        sections.append(_Section(results, drawn, reasons))
    sections.sort(key=lambda s: (not s.on_gpu, s.name))
    docs.mkdir(parents=True, exist_ok=True)
    pages = {docs / "performance.md": _page(sections, docs), docs / "performance-full.md": _full_page(sections, docs)}
    for path, lines in pages.items():
        path.write_text("\n".join(lines).rstrip() + "\n")
    return [*pages, *(p for s in sections for p in s.pictures)]


# -------------------------------------------------------------------------------------------------------------------- pages
def _page(sections: Sequence[_Section], docs: Path) -> Iterator[str]:
    yield from (_FIRST, "", "# Performance", "")
    if not any(s.on_gpu for s in sections):
        yield "**No figure here is from a GPU:** the library has not been measured on one yet." + (
            " What follows was measured on a CPU, where the layers run ATen's kernels; it says nothing of the CUDA kernels."
            if sections
            else " Nothing was measured on a CPU either."
        )
        yield ""
    links = [("every measurement", "performance-full.md"), ("bytes, routes and host costs by arithmetic and emulation", "traffic.md")]
    there = [f"[{text}]({name})" for text, name in links if name == "performance-full.md" or (docs / name).exists()]
    yield from (f"See also: {'; '.join(there)}.", "")
    yield from ("## Goals", "")
    yield "Copy rate: of a device-to-device copy in the same process, bytes read and written. T: bytes of x. Anchors: published figures of"
    yield "others. Goals are about bfloat16 in training; *met in part*: what was measured meets it, and something was not measured."
    yield ""
    on_gpu = [s for s in sections if s.on_gpu]
    yield from _goals(on_gpu)
    for section in sections:
        yield from _section(section, docs)
    yield from _bytes(on_gpu)


def _section(section: _Section, docs: Path) -> Iterator[str]:
    results = section.results
    found = comparisons(results)
    yield from (f"## {section.name}", "")
    yield from _table(("", ""), _facts(results.header))
    yield from _method(section)
    yield from ("### Headline", "")
    most = headline(found)
    if most:
        yield "Training step of one operation, forward and backward. Over: how many times as fast normfused is, below 1 it is slower."
        yield "Memory in units of x."
        yield ""
        yield from _table(_OPERATOR_HEAD, [_operator(c) for c in most])
    else:
        yield from ("No training step was measured.", "")
    yield from ("### Networks", "")
    yield from _networks(results)
    yield from ("### Where normfused is slower, larger or wrong", "")
    yield from _negative(results, found)
    yield from ("### Not here", "")
    yield from _not_here(section)
    top = [p for p in section.pictures if _ALL_CASES not in p.stem]
    if top:
        yield from ("### Charts", "")
        yield from _pictures(top, docs)


def _full_page(sections: Sequence[_Section], docs: Path) -> Iterator[str]:
    yield from (_FIRST, "", "# Every measurement", "", "Back to [performance](performance.md), which says how it was measured.", "")
    if not sections:
        yield from ("Nothing was measured.", "")
    for section in sections:
        yield from (f"## {section.name}", "")
        families: dict[str, list[Comparison]] = {}
        for c in comparisons(section.results):
            families.setdefault(c.any.family or c.any.norm, []).append(c)
        for family, members in families.items():
            yield from _folded(f"{family}: {len(members)} measurements", _table(_FULL_HEAD, [_full(c) for c in members]))
        yield from _pictures([p for p in section.pictures if _ALL_CASES in p.stem], docs)


# -------------------------------------------------------------------------------------------------------------------- pieces
def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Without columns in which no row has anything."""
    listed = list(rows)
    kept = [k for k in range(len(head)) if not listed or any(row[k] != "–" for row in listed)]
    yield f"| {' | '.join(head[k] for k in kept)} |"
    yield "|---" * len(kept) + "|"
    for row in listed:
        yield "| " + " | ".join(row[k].replace("|", "\\|").replace("\n", " ") for k in kept) + " |"
    yield ""


def _folded(title: str, lines: Iterable[str]) -> Iterator[str]:
    yield from (f"<details><summary>{title}</summary>", "", *lines, "</details>", "")


def _pictures(files: Iterable[Path], docs: Path) -> Iterator[str]:
    for path in files:
        yield from (f"![{path.stem}]({Path(os.path.relpath(path, docs)).as_posix()})", "")


def _number(value: float | None, unit: str = "", digits: int = 3) -> str:
    """Three digits, thousands whole; an en dash where there is no figure."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
    return text + unit


def _factor(value: float | None) -> str:
    """Two decimals; below 1, where normfused is slower, bold, and never rounded to 1 or 0."""
    if value is None:
        return "–"
    if value >= 1:
        return f"{value:.2f}"
    return f"**{value:.2f}**" if 0.1 <= value < 0.995 else f"**{value:.2g}**" if value < 0.1 else f"**{value:.4f}**"


def _us(c: Comparison, row: OperatorRow | None) -> str:
    if row is None or (row.status == "refused" and not is_ours(row.provider)):  # peers' refusals are listed with their reasons
        return "–"
    return row.status if row.status != "ok" else _number(c.time_us(row))


def _of(row: OperatorRow | None, field: str, unit: float = 1) -> float | None:
    value: float | None = getattr(row, field, None)
    return None if value is None else value / unit


def _of_x(row: OperatorRow | None, field: str) -> str:
    size = _of(row, field)
    return "–" if row is None or size is None else f"{size / (prod(row.shape) * charts.itemsize(row.dtype)):.2f}"


def _name_and_us(c: Comparison, row: OperatorRow | None) -> str:
    return "–" if row is None else f"{row.provider} {_us(c, row)}"


_OPERATOR_HEAD = (
    *("case", "eager us", "compile us", "normfused us", "over eager", "over compile", "fastest peer us", "GB/s", "% of copy", "launches"),
    *("saved eager", "saved", "peak eager", "peak"),
)


def _operator(c: Comparison) -> list[str]:
    ours, eager = c.ours, c.eager
    return [
        charts.label(c.any),
        _us(c, eager),
        _us(c, c.compiled),
        _us(c, ours),
        _factor(c.speedup(eager)),
        _factor(c.speedup(c.compiled)),
        _name_and_us(c, c.fastest_peer),
        _number(_of(ours, "gbps")),
        _number(_of(ours, "pct_copy")),
        _number(_of(ours, "launches")),
        _of_x(eager, "saved_bytes"),
        _of_x(ours, "saved_bytes"),
        _of_x(eager, "peak_bytes"),
        _of_x(ours, "peak_bytes"),
    ]


_FULL_HEAD = (
    *("case", "mode", "pass", "eager us", "compile us", "normfused us", "warm us", "host us", "spread", "over eager", "over compile"),
    *("others us", "GB/s", "% of copy", "launches", "peak MB", "saved MB", "error", "of allowed", "by", "note"),
)


def _full(c: Comparison) -> list[str]:
    ours = c.ours
    others = [r for name, r in c.rows.items() if r not in (c.eager, c.compiled, ours) and r.status not in ("absent", "refused")]
    return [
        charts.label(c.any),
        c.mode,
        _PASSES.get(c.direction, c.direction),
        _us(c, c.eager),
        _us(c, c.compiled),
        _us(c, ours),
        _number(_of(ours, "device_warm_us")),
        _number(_of(ours, "host_us")),
        _number(_of(ours, "spread"), digits=2),
        _factor(c.speedup(c.eager)),
        _factor(c.speedup(c.compiled)),
        ", ".join(_name_and_us(c, r) for r in others) or "–",
        _number(_of(ours, "gbps")),
        _number(_of(ours, "pct_copy")),
        _number(_of(ours, "launches")),
        _number(_of(ours, "peak_bytes", 1e6)),
        _number(_of(ours, "saved_bytes", 1e6)),
        _number(_of(ours, "max_err"), digits=2),
        _number(_of(ours, "err_of_allowed"), digits=2),
        "–" if ours is None else ours.provider.removeprefix("normfused-") + (f", {ours.route}" if ours.route else ""),
        (ours.note if ours is not None and ours.note else "–"),
    ]


# ------------------------------------------------------------------------------------------------------------------ sections
def _facts(header: dict[str, Any]) -> Iterator[tuple[str, str]]:
    known = {
        "machine": "machine",
        "cpu": "CPU",
        "cores": "cores",
        "threads": "threads",
        "driver": "driver",
        "cuda": "CUDA",
        "cudnn": "cuDNN",
        "capability": "compute capability",
        "date": "date",
    }
    for key, text in known.items():
        if header.get(key) is not None and not (key == "cpu" and header.get("cpu") == header.get("machine")):
            yield text, str(header[key])
    versions = header.get("versions") or {key: header[key] for key in ("torch", "normfused") if key in header}
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    if header.get("commit"):
        yield "commit", str(header["commit"]) + (" with changes that are not in it" if header.get("dirty") else "")
    if header.get("copy_gbps"):
        yield "copy rate", f"{header['copy_gbps']:,.0f} GB/s"
    for key in ("clocks_before", "clocks_after"):
        if header.get(key):
            yield key.replace("_", " "), ", ".join(f"{name} {value}" for name, value in header[key].items())
    if header.get("options"):
        listed = {name: " ".join(map(str, v)) if isinstance(v, list) else v for name, v in header["options"].items()}
        yield "options", "; ".join(f"{name}: {value}" for name, value in listed.items())


def _method(section: _Section) -> Iterator[str]:
    yield "All providers run in one process and take turns; a figure is the median of their rounds, on random data."
    if section.on_gpu:
        yield "Times are the device's, of CUDA-graph replays or between events, over tensors that rotate through more memory than the L2"
        yield "cache holds (warm: the same tensors again and again); the host's time is separate."
    else:
        yield "Times are the wall clock's, tensors are what the caches make of them, and small ones use one thread."
    yield "Outputs and all gradients of a provider are first checked against float64, and one that is wrong gets no time."
    yield "GB/s are the bytes that must move over the time, % of copy the same of the copy rate measured in this process."
    yield "Of torch.compile the fastest mode is shown, of normfused the backend that a user gets."
    yield ""


def _goals(on_gpu: Sequence[_Section]) -> Iterator[str]:
    if not on_gpu:
        rows = [(t.name, t.goal, t.number, t.anchor, judge(t, None).measured) for t in TARGETS]
        yield from _table(("", "goal", "number", "anchor", "measured"), rows)
    for section in on_gpu:
        yield from (f"On {section.name}:", "")
        verdicts = [(t, judge(t, section.results)) for t in TARGETS]
        rows_of = [(t.name, t.goal, t.number, t.anchor, v.measured, f"**{v.verdict}**") for t, v in verdicts]
        yield from _table(("", "goal", "number", "anchor", "measured", "verdict"), rows_of)


def _networks(results: Results) -> Iterator[str]:
    if not results.networks:
        yield from ("No network was measured.", "")
        return
    rows = []
    for c in network_comparisons(results.networks):
        network, batch, layout, dtype, mode, execution = c.key
        cells = [f"{network}, batch {batch}", layout, dtype, mode, execution]
        for row in (c.theirs, c.ours):
            if row is None or row.status != "ok":
                cells += ["–" if row is None else row.status, "–", "–"]
            else:
                peak = None if row.peak_bytes is None else row.peak_bytes / 1e9
                cells += [_number(row.step_ms), _number(row.images_per_s), _number(peak)]
        by_whom = "–" if c.ours is None else f"{c.ours.backend or '–'}, {_number(c.ours.replaced)} layers"
        notes = "; ".join(t for r in (c.theirs, c.ours) if r is not None for t in (r.reason, r.note) if t)
        rows.append([*cells, _factor(c.speedup), by_whom, notes or "–"])
    head = ("network", "layout", "type", "mode", "execution", "torch.nn ms", "samples/s", "peak GB", "normfused ms", "samples/s", "peak GB")
    yield from _table((*head, "over torch.nn", "by", "note"), rows)


def _negative(results: Results, found: Sequence[Comparison]) -> Iterator[str]:
    """Every backend of normfused against eager and torch.compile; nothing that belongs here may be left out."""
    before = False
    for title, head, rows in (
        ("Wrong, failed or refused", ("case", "mode", "pass", "provider", "status", "reason"), list(_not_right(results))),
        ("Slower than eager or torch.compile", ("case", "mode", "pass", "provider", "over eager", "over compile"), _slower(found)),
        ("More memory than eager", ("case", "mode", "pass", "provider", "what", "of eager's"), list(_larger(found))),
        ("Networks that are slower or need more memory", ("network", "execution", "what", "torch.nn", "normfused"), list(_worse(results))),
    ):
        if not rows:
            continue
        before = True
        lines = _table(head, rows)
        if len(rows) > _FOLDED:
            yield from _folded(f"{title}: {len(rows)}", lines)
        else:
            yield from (f"**{title}: {len(rows)}**", "", *lines)
    if not before:
        yield from ("Nothing of what was measured.", "")


def _not_right(results: Results) -> Iterator[list[str]]:
    for row in results.rows:
        if is_ours(row.provider) and row.status in ("wrong", "failed", "refused"):
            name = _PASSES.get(row.direction, row.direction)
            yield [charts.label(row), row.mode, name, row.provider, row.status, row.reason or "–"]
    for n in results.networks:
        if is_ours(n.norms) and n.status != "ok":
            yield [f"{n.network}, batch {n.batch}", n.mode, n.execution, n.norms, n.status, n.reason or "–"]


def _slower(found: Sequence[Comparison]) -> list[list[str]]:
    rows = []
    for c in found:
        for name, row in c.rows.items():
            if not is_ours(name):
                continue
            factors = [faster(c.time_us(row), c.time_us(other)) for other in (c.eager, c.compiled)]
            known = [f for f in factors if f is not None]
            if known and min(known) < 1:
                cells = [charts.label(row), c.mode, _PASSES.get(c.direction, c.direction), name, *map(_factor, factors)]
                rows.append((min(known), cells))
    return [cells for _, cells in sorted(rows, key=lambda r: r[0])]


def _larger(found: Sequence[Comparison]) -> Iterator[list[str]]:
    for c in found:
        for name, row in c.rows.items():
            if not is_ours(name) or c.eager is None:
                continue
            for field, text in (("saved_bytes", "saved"), ("peak_bytes", "peak")):
                new, old = getattr(row, field), getattr(c.eager, field)
                # moments and the granules of the allocator are no news
                if new is not None and old is not None and new > 1.02 * old + 4096:
                    factor = f"{new / old:.2f}x" if old else f"{new:,} bytes, eager none"
                    yield [charts.label(row), c.mode, _PASSES.get(c.direction, c.direction), name, text, factor]


def _worse(results: Results) -> Iterator[list[str]]:
    for c in network_comparisons(results.networks):
        if c.ours is None or c.theirs is None:
            continue
        network, batch, layout, dtype, mode, execution = c.key
        for field, unit, scale in (("step_ms", " ms", 1.0), ("peak_bytes", " GB", 1e9)):
            new, old = getattr(c.ours, field), getattr(c.theirs, field)
            if new is not None and old is not None and new > old:
                name = f"{network}, batch {batch}, {layout}, {dtype}, {mode}"
                yield [name, execution, "step" if unit == " ms" else "peak", _number(old / scale, unit, 4), _number(new / scale, unit, 4)]


def _not_here(section: _Section) -> Iterator[str]:
    results = section.results
    rows = [(name, reason) for name, reason in sorted(results.absent.items())]
    others = [row for row in results.rows if not is_ours(row.provider) and row.status in ("wrong", "failed", "refused")]
    for (provider, status, reason), group in by(others, "provider", "status", "reason").items():
        rows.append((f"{provider}: {status} in {len({row.case for row in group})} cases", reason))
    rows += [(f"chart: {name}", reason) for name, reason in section.no_pictures.items()]
    if results.not_run:
        rows.append((f"{len(results.not_run)} cases", "time did not suffice: " + ", ".join(results.not_run)))
    if rows:
        yield from _table(("provider, network, chart or case", "why"), rows)
    else:
        yield from ("Nothing is missing.", "")


def _bytes(on_gpu: Sequence[_Section]) -> Iterator[str]:
    yield from ("## Bytes", "")
    yield "In units of T, the bytes of x, bfloat16 in training, the headline cases. *must move*: every input once, every output"
    yield "once; *eager*: the passes of torch.nn's chain, modelled; *asked for*: by the route that the CUDA backend plans for an H200;"
    yield "*counted*: what the same kernels, emulated on the case scaled down, did ask for; *in sectors*: of 32 bytes. A dash: unknown."
    yield ""
    counted = traffic.table()["cases"]
    measured = [(s.name, {(c.case, c.direction): c for c in comparisons(s.results) if c.mode == "training"}) for s in on_gpu]
    rows = []
    for case in (case for case in MATRIX if case.tier == HEADLINE):
        for direction in ("forward", "backward"):
            entry = counted.get(case.name, {}).get(f"training {direction}")
            eager = traffic.eager_bytes(case, direction)
            of_t = [None if b is None else b / case.tensor_bytes for b in (traffic.floor_bytes(case, direction), eager)]
            route, asked = "–", None
            if entry is not None:
                route = entry["route"]
                asked = traffic.route_bytes(case, direction, "training", route, entry["reads"]) / case.tensor_bytes
            cells = [charts.label_of(case), direction, *(_number(v, digits=4) for v in of_t), route, _number(asked, digits=4)]
            cells += [_number(entry[key], digits=4) if entry else "–" for key in ("asked", "sectors")]
            for _, found in measured:
                ours = getattr(found.get((case.name, direction)), "ours", None)
                if ours is None or not ours.gbps:
                    cells.append("not measured")
                else:  # another device may take another route
                    cells.append(_number(ours.gbps) + ("" if ours.route in (None, route) else f" ({ours.route})"))
            rows.append(cells if measured else [*cells, "not measured"])
    head = ("case", "pass", "must move", "eager", "route", "asked for", "counted", "in sectors")
    full_head = (*head, *(f"GB/s, {s.name}" for s in on_gpu)) if on_gpu else (*head, "GB/s, GPU")
    yield from _folded(f"the headline cases: {len(rows)} passes", _table(full_head, rows))


# ------------------------------------------------------------------------------------------------------------------- command
def results_folder() -> Path:
    """With a folder for every device."""
    root = _build.checkout()
    return OUTSIDE if root is None else root / "bench" / "results"


def shown(path: Path) -> Path:
    """From the current folder, where it lies in it."""
    absolute = path.resolve()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute


def lines(written: list[Path]) -> list[str]:
    """What `write` returned, in words."""
    pictures = [path for path in written if path.suffix == ".png"]
    where = f"{len(pictures)} in {shown(pictures[0].parent)}" if pictures else "none; the page says why"
    return [*(f"Report: {shown(path)}" for path in written if path not in pictures), f"Pictures: {where}"]


def main(arguments: list[str] | None = None) -> int:
    """The command; 0, or 2 with one sentence if a file cannot be read."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Writes performance.md, performance-full.md and charts from results files.")
    parser.add_argument("files", nargs="*", type=Path, help="default: the newest of every device in bench/results or normfused-bench")
    parser.add_argument("--out", type=Path, help="default: docs/ in a checkout, else the current folder")
    given = parser.parse_args(arguments)
    root = _build.checkout()
    out = given.out or (Path.cwd() if root is None else root / "docs")
    try:
        files = given.files or default_files()
        if not files and root is None:  # a checkout's page says that nothing was measured
            raise ValueError(f"no results in {results_folder()}: give files, or measure with python -m normfused bench")
        written = write(files, out, out / "pictures")
    except OSError as error:
        print(f"report: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(written)))
    return 0
