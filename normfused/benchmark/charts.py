"""Pictures of a results file, with matplotlib (extra ``bench``). Colours are Okabe and Ito's, which colour-blind readers tell apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil, isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cases import Case
from .comparison import COMPILE, EAGER, Comparison, comparisons, headline, network_comparisons
from .results import OperatorRow, Results, by

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "drawn", "itemsize", "label", "label_of"]

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, YELLOW = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442"
GREY = "#7F7F7F"
_COLOURS = {EAGER: GREY, COMPILE: ORANGE, "normfused": BLUE}
_WIDTH = 9.0  # inches: text of 9 points stays readable at the width of a page
_MOST_CASES = 24  # of one picture
_DPI = 110


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes the charts that the rows suffice for; see `drawn` for the reasons of the others."""
    return drawn(results, folder)[0]


def drawn(results: Results, folder: Path, prefix: str = "") -> tuple[list[Path], dict[str, str]]:
    """Writes ``<prefix><chart>.png`` into ``folder``, which is made.

    Returns:
        The files in a fixed order, and for every chart that was not drawn the reason.
    """
    try:
        import matplotlib
    except ImportError:
        return [], {"charts": "matplotlib is not installed: pip install matplotlib"}
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "figure.titlesize": 11}
    files, reasons = [], {}
    with matplotlib.rc_context(style):
        for name, chart in _charts(results):
            figure = chart()
            if isinstance(figure, str):
                reasons[name] = figure
                continue
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{prefix}{name}.png"
            FigureCanvasAgg(figure)
            figure.savefig(path, dpi=_DPI, metadata={"Software": None})  # the same rows, the same bytes
            files.append(path)
    return files, reasons


def _charts(results: Results) -> Iterator[tuple[str, Callable[[], Figure | str]]]:
    found = comparisons(results)
    most = headline(found)
    yield from _speedups(results, "speedup", "headline cases", most)
    yield "bandwidth", lambda: _bandwidth(results, found)
    yield "memory", lambda: _memory(results, most)
    yield "networks", lambda: _networks(results)
    yield "error", lambda: _error(results)
    steps = [c for c in found if c.mode == "training" and c.direction == "forward_backward"]
    if len(steps) > len(most):
        yield from _speedups(results, "all-speedup", "all cases", steps)


def _speedups(results: Results, name: str, text: str, chosen: list[Comparison]) -> Iterator[tuple[str, Callable[[], Figure | str]]]:
    """One picture, or several of about the same length."""
    chosen = [c for c in chosen if _factors(c)]
    pages = max(1, ceil(len(chosen) / _MOST_CASES))
    size = ceil(len(chosen) / pages)
    for page in range(pages):
        part = chosen[page * size : (page + 1) * size]
        title = f"forward + backward, training, {text}" + (f" ({page + 1} of {pages})" if pages > 1 else "")
        suffix = f"-{page + 1}" if page else ""
        yield f"{name}{suffix}", lambda part=part, title=title: _speedup(results, part, title)  # type: ignore[misc]


# -------------------------------------------------------------------------------------------------------------------- pieces
def label(row: OperatorRow) -> str:
    """A case in few words: ``BN+add+ReLU 32x256x56x56 NHWC``; the type where it is not bfloat16."""
    return _words(row.norm, row.act, row.residual, row.shape, row.layout, row.dtype)


def label_of(case: Case) -> str:
    return _words(case.norm, case.act, case.residual, case.shape, case.layout, str(case.dtype).removeprefix("torch."))


def _words(norm: str, act: str, residual: str | None, shape: tuple[int, ...], layout: str, dtype: str) -> str:
    words = {"batch": "BN", "group": "GN", "instance": "IN", "layer": "LN", "rms": "RMS", "frn": "FRN", "batch_instance": "BIN"}
    words |= {"batch_renorm": "BRN", "switchable": "SN", "mean_only": "mean-only BN", "eval": "EvalNorm", "whitening": "IterNorm"}
    acts = {"relu": "ReLU", "silu": "SiLU", "gelu": "GELU", "leaky_relu": "LeakyReLU", "tlu": "TLU"}
    parts = [words.get(norm, norm)]
    if residual == "pre_norm":
        parts.insert(0, "add")
    elif residual:
        parts.append("add")
    if act != "identity":
        parts.append(acts.get(act, act))
    maps = {"contiguous": " NCHW", "channels_last": " NHWC"}[layout] if len(shape) > 2 else ""
    kind = {"bfloat16": "", "float16": " fp16", "float32": " fp32", "float64": " fp64"}.get(dtype, f" {dtype}")
    return f"{'+'.join(parts)} {'x'.join(map(str, shape))}{maps}{kind}"


def _title(results: Results, text: str) -> str:
    h = results.header
    kind = "" if h.get("device") == "cuda" else " (CPU)"
    return f"{text}\n{h.get('machine', 'unknown machine')}{kind}, torch {h.get('torch', '?')}, {str(h.get('date', '?'))[:10]}"


def _figure(*grid: int, height: float, **options: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots(*grid, squeeze=False, **options)


def _family(provider: str) -> str | None:
    """Whose colour it has: eager, compile, normfused; None for the peers."""
    return next((name for name in _COLOURS if provider == name or provider.startswith((f"{name}-", f"{name}."))), None)


def _factors(c: Comparison) -> dict[str, float]:
    given = {"eager": c.speedup(c.eager), "torch.compile": c.speedup(c.compiled)}
    return {name: value for name, value in given.items() if value is not None}


def _plain(axis: Any, subs: tuple[int, ...] | None = None) -> None:
    """Numbers, not powers, at ticks of a logarithmic axis; ``subs``: at these multiples of powers of 10."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if subs is not None:
        axis.set_major_locator(LogLocator(subs=subs, numticks=30))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1e4 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


# -------------------------------------------------------------------------------------------------------------------- charts
def _speedup(results: Results, chosen: list[Comparison], text: str) -> Figure | str:
    from matplotlib.patches import Patch

    if not chosen:
        return "no training step was timed by normfused and by eager or torch.compile"
    figure, axes = _figure(1, 1, height=1.6 + 0.36 * len(chosen))
    axis: Axes = axes[0][0]
    thick = 0.38
    values = [v for c in chosen for v in _factors(c).values()]
    axis.set_xscale("log", base=2)
    low, high = min(0.5, *values) / 1.25, max(2.0, *values) * 1.25
    axis.set_xlim(low, high)
    for k, (name, colour) in enumerate((("eager", GREY), ("torch.compile", ORANGE))):
        places = [i + (k - 0.5) * thick for i, c in enumerate(chosen) if name in _factors(c)]
        given = [_factors(c)[name] for c in chosen if name in _factors(c)]
        bars = axis.barh(places, [v - 1 for v in given], thick * 0.92, left=1, color=colour)
        for bar, value in zip(bars, given, strict=True):
            if value < 1:
                bar.set(hatch="////", edgecolor=VERMILLION)
            # on the side the bar points to
            shift, side = ((3, 0), "left") if value >= 1 else ((-3, 0), "right")
            axis.annotate(
                f"{value:.2f}", (value, bar.get_y() + bar.get_height() / 2), shift, textcoords="offset points", ha=side, va="center", size=7
            )
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(chosen)), [label(c.any) for c in chosen])
    axis.set_ylim(len(chosen) - 0.4, -0.6)
    families = [c.any.family or c.any.norm for c in chosen]
    starts = [i for i in range(1, len(families)) if families[i] != families[i - 1]]
    for i in starts:
        axis.axhline(i - 0.5, color="black", linewidth=0.4, alpha=0.4)
    if any(c.any.family for c in chosen) and len(set(families)) > 1:
        for i in [0, *starts]:
            axis.annotate(
                families[i], (1, i - 0.45), (2, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="top", size=7
            )
    _plain(axis.xaxis)
    axis.set_xlabel("times as fast (right of 1: normfused is faster)")
    figure.suptitle(_title(results, f"normfused against eager and torch.compile: {text}"))
    shown = [Patch(color=GREY, label="over eager"), Patch(color=ORANGE, label="over torch.compile")]
    shown += [Patch(facecolor="white", edgecolor=VERMILLION, hatch="////", label="slower")] if min(values) < 1 else []
    figure.legend(handles=shown, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _bandwidth(results: Results, found: list[Comparison]) -> Figure | str:
    passes = [d for d in ("forward", "backward", "forward_backward") if any(c.direction == d for c in found)][:2]
    points: dict[str, dict[str, list[tuple[float, float]]]] = {d: {} for d in passes}
    for c in found:
        if c.direction not in points or c.mode != "training":
            continue
        for name, row in ((EAGER, c.eager), (COMPILE, c.compiled), ("normfused", c.ours)):
            if row is not None and row.status == "ok" and row.gbps:
                size = prod(row.shape) * itemsize(row.dtype) / 1e6
                points[c.direction].setdefault(name, []).append((size, row.gbps))
    passes = [d for d in passes if points[d]]
    if not passes:
        return "no row has a rate (GB/s)"
    figure, axes = _figure(1, len(passes), height=4.2, sharey=True)
    copy = results.header.get("copy_gbps")
    for axis, direction in zip(axes[0], passes, strict=True):
        for (name, colour), marker in zip(_COLOURS.items(), "sDo", strict=True):
            here = points[direction].get(name)
            if here:
                shown = "torch.compile" if name == COMPILE else name
                axis.scatter(*zip(*here, strict=True), s=18, marker=marker, color=colour, alpha=0.75, linewidths=0, label=shown)
        if copy:
            axis.axhline(copy, color=VERMILLION, linewidth=1.2, linestyle="--", label=f"copy, {copy:,.0f} GB/s")
        axis.set(xscale="log", yscale="log", xlabel="size of x (MB)", title=direction.replace("_", " + "))
        axis.grid(alpha=0.3, linewidth=0.5)
        _plain(axis.xaxis)
        _plain(axis.yaxis, (1, 2, 5))
    axes[0][0].set_ylabel("bytes that must move / time (GB/s)")
    figure.suptitle(_title(results, "Rate by size of the tensor, training"))
    handles = {text: handle for axis in axes[0] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def itemsize(dtype: str) -> int:
    return {"float64": 8, "float32": 4}.get(dtype, 2)


def _memory(results: Results, chosen: list[Comparison]) -> Figure | str:
    quantities = {"saved_bytes": "saved for the backward", "peak_bytes": "peak above what was there"}

    def of(c: Comparison, quantity: str) -> dict[str, float]:
        size = prod(c.any.shape) * itemsize(c.any.dtype)
        rows = {EAGER: c.eager, COMPILE: c.compiled, "normfused": c.ours}
        given = {name: None if row is None else getattr(row, quantity) for name, row in rows.items()}
        return {name: value / size for name, value in given.items() if value is not None}

    shown = [q for q in quantities if any(of(c, q) for c in chosen)]
    chosen = [c for c in chosen if any(of(c, q) for q in shown)]
    # what differs is the kind, not the size: one case for each chain and type
    kinds = {(c.any.norm, c.any.act, c.any.residual, c.any.layout, c.any.dtype): c for c in reversed(chosen)}
    chosen = list(reversed(kinds.values()))[: 2 * _MOST_CASES]
    if not chosen:
        return "no row has saved or peak bytes"
    figure, axes = _figure(1, len(shown), height=1.6 + 0.42 * len(chosen), sharey=True)
    thick = 0.26
    for axis, quantity in zip(axes[0], shown, strict=True):
        for k, (name, colour) in enumerate(_COLOURS.items()):
            here = [(i + (k - 1) * thick, of(c, quantity)[name]) for i, c in enumerate(chosen) if name in of(c, quantity)]
            if here:
                places, values = zip(*here, strict=True)
                bars = axis.barh(places, values, thick * 0.92, color=colour, label="torch.compile" if name == COMPILE else name)
                axis.bar_label(bars, [f"{v:.2f}" for v in values], size=6.5, padding=2)
        axis.set(xlabel="in units of x", title=quantities[quantity])
        axis.margins(x=0.12)
        axis.set_yticks(range(len(chosen)), [label(c.any) for c in chosen])
        axis.set_ylim(len(chosen) - 0.4, -0.6)
    figure.suptitle(_title(results, "Memory of one operation, forward + backward"))
    handles = {text: handle for axis in axes[0] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _networks(results: Results) -> Figure | str:
    pairs = [c for c in network_comparisons(results.networks) if any(r is not None and r.images_per_s for r in (c.theirs, c.ours))]
    if not pairs:
        return "no network was timed"
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for c in pairs:
        groups.setdefault(c.key[:5], []).append(c)
    across = min(3, len(groups))
    down = ceil(len(groups) / across)
    figure, axes = _figure(down, across, height=1.3 + 2.4 * down)
    places = [axes[i // across][i % across] for i in range(down * across)]
    for axis, (key, members) in zip(places, groups.items(), strict=False):
        for i, c in enumerate(members):
            for k, (row, colour, name) in enumerate(((c.theirs, GREY, "torch.nn"), (c.ours, BLUE, "normfused"))):
                if row is not None and row.images_per_s:
                    bars = axis.bar(i + (k - 0.5) * 0.38, row.images_per_s, 0.36, color=colour, label=name)
                    axis.bar_label(bars, [f"{row.images_per_s:.4g}"], size=7, padding=1)
                elif row is not None:
                    axis.annotate(row.status, (i + (k - 0.5) * 0.38, 0), (0, 3), textcoords="offset points", ha="center", size=7)
        network, batch, layout, dtype, mode = key
        memory = {"channels_last": "NHWC", "channels_last_3d": "NDHWC", "contiguous": "contiguous"}.get(layout, layout)
        axis.set_title(f"{network}, batch {batch}\n{memory}, {dtype}, {mode}", fontsize=8.5)
        axis.set_xticks(range(len(members)), [c.key[5] for c in members])
        axis.set_xlim(-0.6, len(members) - 0.4)
        axis.margins(y=0.15)
    for axis in places[len(groups) :]:
        axis.set_visible(False)
    for row_of in axes:
        row_of[0].set_ylabel("samples/s")
    figure.suptitle(_title(results, "Whole networks: samples a second"))
    handles = {text: handle for axis in places for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _error(results: Results) -> Figure | str:
    rows = [r for r in results.rows if r.err_of_allowed is not None]
    if not rows:
        return "no row has an error"
    kinds = by(rows, "dtype")
    order = [EAGER, COMPILE, "normfused", None]  # peers last
    providers = sorted({r.provider for r in rows}, key=lambda p: (order.index(_family(p)), p))
    figure, axes = _figure(1, len(kinds), height=1.5 + 0.3 * len(providers), sharey=True)
    smallest = 1e-6
    for axis, ((dtype,), members) in zip(axes[0], kinds.items(), strict=True):
        for place, provider in enumerate(providers):
            # one dot a case: its passes share the check. What is not finite is drawn at the right edge
            errors = {(r.case, r.mode): r.err_of_allowed for r in members if r.provider == provider}
            shown = [max(e, smallest) if e is not None and isfinite(e) else 1e3 for e in errors.values()]
            colour = _COLOURS.get(_family(provider) or "", PURPLE)
            height = [place + 0.5 * ((i * 0.618) % 1 - 0.5) for i in range(len(shown))]
            axis.scatter(shown, height, s=12, color=colour, alpha=0.65, linewidths=0)
        axis.axvline(1, color=VERMILLION, linestyle="--", linewidth=1.2, label="allowed")
        axis.set(xscale="log", title=dtype)
        axis.set_xlim(left=min(1e-3, axis.get_xlim()[0]))
        _plain(axis.xaxis)
        axis.set_yticks(range(len(providers)), providers)
        axis.set_ylim(len(providers) - 0.4, -0.6)
        axis.grid(axis="x", alpha=0.3, linewidth=0.5)
    figure.supxlabel("largest error of y and gradients against float64, in units of what the type allows", fontsize=9)
    figure.suptitle(_title(results, "Accuracy: one dot a case (right of the line: wrong)"))
    return figure
