"""A 3-D U-Net with InstanceNorm + LeakyReLU, as nnU-Net has them, on a real brain: torch.nn and normfused, contiguous and channels_last_3d.

The network learns where the MNI152 brain has grey and white matter from patches of its T1 image, at 2 mm. It is built once with torch.nn;
`normfused.fuse_norms` makes the fused copies. All copies start from the same weights, see the same patches and take turns step by step.
The back of the brain is held out. Prints one table, draws slices and curves (brain.png), and exits with 1 if the copies disagree.

The three images come with nilearn, installed alone (12 MB); it is not imported, and the files are read without further packages:

    pip install "normfused[demo]" && pip install --no-deps nilearn==0.14.1
    python examples/nnunet_channels_last.py --out demo-results
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# sets threads before torch is loaded, and says what is not installed
from train_digits import np, plt, smooth  # isort: skip

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import normfused as nf
from normfused.integrations.nnunet import to_channels_last

SEED, PATCH, BATCH, STEPS, RATE = 0, 32, 2, 100, 3e-3
FILES = tuple(f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz" for kind in ("t1", "gm", "wm"))
CLASSES = ("other", "grey matter", "white matter")
# largest relative difference of a gradient on the first batch, where rounding is all that may differ, and of Dice after training
GRADIENT, DICE = 1e-3, 0.03


# ---------------------------------------------------------------------------------------------------------------- data
def find_brain(given: Path | None) -> tuple[Path, ...]:
    """T1, grey and white matter: in --data, or inside the installed nilearn."""
    folder = given
    if folder is None:
        spec = importlib.util.find_spec("nilearn")
        if spec is None or spec.origin is None:
            sys.exit(
                "nnunet_channels_last: the brain comes with the package nilearn, which is not installed.\n"
                "  pip install --no-deps nilearn==0.14.1\n"
                f"or name a folder with {', '.join(FILES)}: --data FOLDER"
            )
        folder = Path(spec.origin).parent / "datasets" / "data"
    paths = tuple(folder / name for name in FILES)
    for path in paths:
        if not path.is_file():
            sys.exit(f"nnunet_channels_last: no file {path}")
    return paths


def read_nifti(path: Path) -> Tensor:
    """A gzipped NIfTI-1 volume of bytes (little endian), float32 (x, y, z), scaled as its header says."""
    raw = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(raw, "<i2", 8, 40).tolist()
    kind, magic = int(np.frombuffer(raw, "<i2", 1, 70)[0]), raw[344:347]
    if magic != b"n+1" or kind != 2 or sizes[0] != 3:
        sys.exit(f"nnunet_channels_last: {path} must be a NIfTI-1 volume of bytes, got magic {magic!r}, type {kind}, {sizes[0]} dimensions")
    offset, slope, intercept = np.frombuffer(raw, "<f4", 3, 108).tolist()
    voxels = np.frombuffer(raw, "u1", math.prod(sizes[1:4]), int(offset)).reshape(sizes[1:4], order="F")
    return torch.from_numpy(voxels.astype(np.float32)) * (slope or 1.0) + intercept


@dataclass
class Brain:
    """T1 (1, 1, x, y, z) with mean 0 and deviation 1 in the head, labels (x, y, z); y below ``held_out`` (the back) is for testing."""

    image: Tensor
    labels: Tensor
    held_out: int

    def patches(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """BATCH patches of PATCH^3 in front of the part that is held out."""
        images, labels = [], []
        for _ in range(BATCH):
            low = (0, self.held_out, 0)
            corner = [
                int(torch.randint(start, size - PATCH + 1, (), generator=generator))
                for start, size in zip(low, self.labels.shape, strict=True)
            ]
            x, y, z = (slice(c, c + PATCH) for c in corner)
            images.append(self.image[0, :, x, y, z])
            labels.append(self.labels[x, y, z])
        return torch.stack(images), torch.stack(labels)


def load_brain(paths: tuple[Path, ...], device: torch.device) -> Brain:
    """At half the resolution, cut to the brain and filled up to whole patches."""
    t1, grey, white = (F.avg_pool3d(read_nifti(path)[None], 2)[0] for path in paths)
    tissues = torch.stack([grey, white]) / max(float(grey.max()), float(white.max()))
    labels = torch.cat([1 - tissues.sum(0, keepdim=True), tissues]).argmax(0)
    inside = (t1 > 0).nonzero()
    box = tuple(slice(int(low), int(high) + 1) for low, high in zip(inside.amin(0), inside.amax(0), strict=True))
    t1, labels = t1[box], labels[box]
    head = t1[t1 > 0]
    t1 = (t1 - head.mean()) / head.std()
    missing = [-size % PATCH for size in t1.shape]
    edges = [e for m in reversed(missing) for e in (m // 2, m - m // 2)]
    image, labels = F.pad(t1, edges, value=float(t1.min())), F.pad(labels, edges)
    return Brain(image[None, None].to(device), labels.to(device), PATCH)


# ------------------------------------------------------------------------------------------------------------- network
def block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(2):
        layers += [
            # a bias would be taken off again by the norm: its gradient is rounding and nothing else
            nn.Conv3d(outside if i else inside, outside, 3, 1 if i else stride, 1, bias=False),
            nn.InstanceNorm3d(outside, affine=True),
            nn.LeakyReLU(0.01, inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Three stages of two convolutions, downwards by stride, upwards by transposed convolution: a plain nnU-Net in small."""

    def __init__(self, features: tuple[int, ...] = (8, 16, 32)) -> None:
        super().__init__()
        a, b, c = features
        self.down = nn.ModuleList([block(1, a), block(a, b, 2), block(b, c, 2)])
        self.up = nn.ModuleList([nn.ConvTranspose3d(c, b, 2, 2), nn.ConvTranspose3d(b, a, 2, 2)])
        self.merge = nn.ModuleList([block(2 * b, b), block(2 * a, a)])
        self.head = nn.Conv3d(a, len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        y: Tensor = self.head(x)
        return y


def loss_of(y: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy and soft Dice, nnU-Net's."""
    p, truth = y.softmax(1), F.one_hot(labels, len(CLASSES)).movedim(-1, 1)
    overlap = 2 * (p * truth).sum((0, 2, 3, 4)) / (p + truth).sum((0, 2, 3, 4)).clamp_min(1e-6)
    return F.cross_entropy(y, labels) - overlap.mean()


# ------------------------------------------------------------------------------------------------------------ training
@dataclass
class Run:
    """One copy of the network and what was recorded of it."""

    layers: str
    channels_last: bool
    model: nn.Module
    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    saved_bytes: int = 0
    dice: tuple[float, ...] = ()
    prediction: Tensor | None = None

    def __post_init__(self) -> None:
        if self.layers == "normfused":
            nf.fuse_norms(self.model)
        if self.channels_last:
            to_channels_last(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), RATE)

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = _now(images.device)
        self.optimizer.zero_grad()
        loss = loss_of(self.model(images), labels)
        loss.backward()
        if not self.losses:
            self.gradients = [p.grad.detach().clone() for p in self.model.parameters() if p.grad is not None]
        nn.utils.clip_grad_norm_(self.model.parameters(), 12)
        self.optimizer.step()
        self.times.append(_now(images.device) - start)
        self.losses.append(loss.item())

    def measure_saved(self, images: Tensor) -> None:
        """Bytes kept from the forward to the backward: unique storages, without parameters and the batch."""
        known = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers(), images)}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in known:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = self.model(images)
        del y
        self.saved_bytes = sum(kept.values())

    @torch.no_grad()
    def evaluate(self, brain: Brain) -> None:
        """Predicts patch by patch, as nnU-Net does; Dice of the part that was held out."""
        prediction = torch.zeros_like(brain.labels)
        for corner in np.ndindex(*(size // PATCH for size in brain.labels.shape)):
            x, y, z = (slice(c * PATCH, (c + 1) * PATCH) for c in corner)
            prediction[x, y, z] = self.model(brain.image[:, :, x, y, z]).argmax(1)[0]
        self.prediction = prediction.cpu()
        got, truth = prediction[:, : brain.held_out], brain.labels[:, : brain.held_out]
        self.dice = tuple(
            2 * int(((got == c) & (truth == c)).sum()) / max(1, int((got == c).sum()) + int((truth == c).sum()))
            for c in range(1, len(CLASSES))
        )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train(brain: Brain, steps: int, tick: Callable[[], None]) -> list[Run]:
    torch.manual_seed(SEED)
    first = UNet().to(brain.image.device)
    runs = [Run(layers, last, copy.deepcopy(first)) for last in (False, True) for layers in ("torch.nn", "normfused")]
    generator = torch.Generator().manual_seed(SEED)
    for i in range(steps):
        images, labels = brain.patches(generator)
        # who goes first changes, because the next finds the batch in cache
        for run in runs[i % len(runs) :] + runs[: i % len(runs)]:
            run.step(images, labels)
        tick()
    for run in runs:
        run.measure_saved(images)
        run.evaluate(brain)
    return runs


def disagreements(runs: list[Run]) -> list[str]:
    """What differs from the first run by more than rounding may. Training amplifies rounding: by how much, torch.nn's two layouts show."""

    def gap(run: Run) -> float:
        return max(abs(a - b) for a, b in zip(run.dice, runs[0].dice, strict=True))

    own = max(gap(run) for run in runs if run.layers == "torch.nn")
    found = []
    for run in runs[1:]:
        name = f"{run.layers}, {layout(run)}"
        scale = max(float(g.abs().max()) for g in runs[0].gradients)
        difference = max(float((a - b).abs().max()) for a, b in zip(run.gradients, runs[0].gradients, strict=True)) / scale
        if not difference <= GRADIENT:
            found.append(f"{name}: gradients of the first batch differ by {difference:.1e} (bound {GRADIENT:.0e})")
        if not gap(run) <= max(DICE, 2 * own):
            found.append(f"{name}: Dice differs by {gap(run):.3f} (bound {DICE}, or twice what torch.nn's layouts differ by, {own:.3f})")
    return found


# ------------------------------------------------------------------------------------------------------------- results
def layout(run: Run) -> str:
    return "channels_last_3d" if run.channels_last else "contiguous"


def table(runs: list[Run], device: torch.device) -> Table:
    made = Table(title=f"{BATCH} patches of {PATCH}^3, {len(runs[0].losses)} steps, {device}; Dice of grey and white matter held out")
    for name in ("layers", "layout"):
        made.add_column(name, no_wrap=True)
    for name in ("loss", *(c.split()[0] for c in CLASSES[1:]), "step ms", "saved MiB"):
        made.add_column(name, justify="right")
    for run in runs:
        last = statistics.mean(run.losses[-10:])
        step = 1e3 * statistics.median(run.times[len(run.times) // 5 :])
        made.add_row(
            run.layers, layout(run), f"{last:.4f}", *(f"{d:.3f}" for d in run.dice), f"{step:.1f}", f"{run.saved_bytes / 2**20:.2f}"
        )
    return made


def picture(runs: list[Run], brain: Brain, path: Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(15, 4.4), layout="constrained", width_ratios=[1, 1, 1, 1.5])
    z = brain.labels.shape[2] // 2
    assert runs[-1].prediction is not None
    slices = (brain.image[0, 0, :, :, z].cpu(), brain.labels[:, :, z].cpu(), runs[-1].prediction[:, :, z])
    names = ("T1", "grey and white matter", f"prediction ({runs[-1].layers}, {layout(runs[-1])})")
    for axis, values, name in zip(axes, slices, names, strict=False):
        axis.imshow(values.T.numpy(), cmap="gray", origin="lower")
        axis.axhline(brain.held_out - 0.5, color="tab:orange", linewidth=1)
        axis.set(title=name, xticks=[], yticks=[])
    axes[0].text(2, 2, "held out", color="tab:orange")
    for run, style in zip(runs, ("-", "--", "-.", ":"), strict=True):
        axes[3].plot(smooth(run.losses, min(10, len(run.losses))), style, label=f"{run.layers}, {layout(run)}")
    axes[3].set(xlabel="step", title="loss, running mean of 10")
    axes[3].grid(alpha=0.25, linewidth=0.5)
    axes[3].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder for brain.png (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder with the three images (default: nilearn's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each copy (default: %(default)s)")
    given = parser.parse_args(arguments)
    if given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")
    console = Console()
    device = torch.device(given.device)
    brain = load_brain(find_brain(given.data), device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training four copies", total=given.steps)
        runs = train(brain, given.steps, lambda: progress.advance(task))
    given.out.mkdir(parents=True, exist_ok=True)
    picture(runs, brain, given.out / "brain.png")
    console.print(table(runs, device))
    console.print(f"{given.out / 'brain.png'} written")
    failures = disagreements(runs)
    for failure in failures:
        console.print(f"[red]{failure}[/red]")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
