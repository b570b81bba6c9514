"""``python -m bench.report RESULTS.json``: ratios to eager as a table, a bar chart, and with --trim a copy without raw rounds."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, which colour-blind readers can tell apart
COLOURS = ["#56B4E9", "#E69F00", "#D55E00", "#CC79A7", "#009E73"]


def by_case(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """(case, direction) -> provider -> extra_info."""
    table: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for entry in results["benchmarks"]:
        info = entry["extra_info"]
        table[info["case"], info["direction"]][info["provider"]] = info
    return dict(table)


def print_table(results: dict[str, Any]) -> None:
    table = by_case(results)
    providers = sorted({p for row in table.values() for p in row} - {"eager"})
    print("| case | direction | eager us | " + " | ".join(f"{p} / eager" for p in providers) + " | saved MB: eager, normfused |")
    print("|---|---|---|" + "---|" * (len(providers) + 1))
    for (case, direction), row in table.items():
        if "eager" not in row:
            continue
        base = row["eager"]["median_us"]
        cells = [f"{row[p]['median_us'] / base:.2f}" if p in row else "" for p in providers]
        kept = [row[p]["saved_bytes"] for p in ("eager", *(q for q in providers if q.startswith("normfused"))) if p in row]
        saved = ", ".join(f"{k / 1e6:.2f}" for k in kept if k is not None)
        print(f"| {case} | {direction} | {base:.0f} | " + " | ".join(cells) + f" | {saved} |")


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = {case: row for (case, direction), row in by_case(results).items() if direction == "forward_backward" and "eager" in row}
    # each has its own colour, whichever of them are there
    known = ("compile", "timm", "normfused-torch", "normfused-triton", "normfused-cuda")
    colours = dict(zip(known, COLOURS, strict=False))
    providers = [p for p in known if any(p in r for r in table.values())]
    height = 0.8 / max(len(providers), 1)
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.42 * len(table)), layout="constrained")
    for k, provider in enumerate(providers):
        places = [i + (k - (len(providers) - 1) / 2) * height for i, r in enumerate(table.values()) if provider in r]
        values = [r[provider]["median_us"] / r["eager"]["median_us"] for r in table.values() if provider in r]
        bars = axis.barh(places, values, height * 0.92, label=provider, color=colours[provider])
        for label in axis.bar_label(bars, [f"{v:.2f}" for v in values], fontsize=7, padding=2):
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axis.axvline(1, color="black", linewidth=1, label="eager = 1", zorder=1)
    axis.margins(y=0.01)
    axis.set_yticks(range(len(table)), [c.replace("-float32", "") for c in table])
    axis.invert_yaxis()
    machine = results["machine_info"]
    place = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    axis.set(
        xlabel="time / eager, forward + backward (lower is better)",
        title=f"Median time against the eager chain\n{place}, torch {machine['torch']}",
    )
    figure.legend(loc="outside lower center", ncols=1 + len(providers), frameon=False)
    figure.savefig(path, dpi=110)


def trimmed(results: dict[str, Any]) -> dict[str, Any]:
    """Without the raw rounds, and with fewer digits."""
    kept = ("min", "median", "iqr", "rounds", "iterations")
    for entry in results["benchmarks"]:
        entry["stats"] = {k: entry["stats"][k] for k in kept}
        entry["extra_info"] = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in entry["extra_info"].items()}
        for key in ("options", "params", "param", "fullname"):
            entry.pop(key, None)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--png", type=Path, help="write a bar chart")
    parser.add_argument("--trim", type=Path, help="write the results without raw rounds")
    given = parser.parse_args()
    results = json.loads(given.results.read_text())
    print_table(results)
    if given.png:
        draw(results, given.png)
    if given.trim:
        given.trim.write_text(json.dumps(trimmed(results), indent=1) + "\n")


if __name__ == "__main__":
    main()
