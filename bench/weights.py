"""``python -m bench.weights``: weight norm and spectral norm of all layers of a network, against torch's parametrizations.

A step computes every weight, as a forward does, and the gradients of the parameters from given gradients of the weights. Providers take
turns; the table has medians by the wall clock, on a GPU (``--device cuda``) until the device is done.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as theirs

from normfused import parametrizations as ours
from normfused.benchmark.timing import take_turns, wall_us

Layers = list[Callable[[], nn.Module]]


def resnet50() -> Layers:
    """Its 53 convolutions and the classifier."""
    layers: Layers = [partial(nn.Conv2d, 3, 64, 7, bias=False)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers += [partial(nn.Conv2d, channels, width, 1), partial(nn.Conv2d, width, width, 3), partial(nn.Conv2d, width, 4 * width, 1)]
            if block == 0:
                layers.append(partial(nn.Conv2d, channels, 4 * width, 1))
            channels = 4 * width
    return [*layers, partial(nn.Linear, 2048, 1000)]


def discriminator() -> Layers:
    """The SNGAN's for 32x32 images (Miyato et al. 2018, table 3)."""
    sizes = [(3, 64, 3), (64, 64, 4), (64, 128, 3), (128, 128, 4), (128, 256, 3), (256, 256, 4), (256, 512, 3)]
    return [*(partial(nn.Conv2d, i, o, k) for i, o, k in sizes), partial(nn.Linear, 512 * 4 * 4, 1)]


def vocoder() -> Layers:
    """The generator of HiFi-GAN V3 (Kong et al. 2020): small one-dimensional convolutions."""
    layers: Layers = [partial(nn.Conv1d, 80, 256, 7)]
    channels = 256
    for kernel in (16, 16, 8):
        layers.append(partial(nn.ConvTranspose1d, channels, channels // 2, kernel))
        channels //= 2
        layers += [partial(nn.Conv1d, channels, channels, k) for k in (3, 5, 7) for _ in range(2)]
    return [*layers, partial(nn.Conv1d, channels, 1, 7)]


NETWORKS = {"resnet50": resnet50, "sngan discriminator": discriminator, "hifi-gan v3 generator": vocoder}


class Weights(nn.ModuleList):
    def forward(self) -> list[Tensor]:
        return [layer.weight for layer in self]  # type: ignore[misc]


def prepare(kind: str, layers: Layers, who: str, device: str, dtype: torch.dtype) -> tuple[Weights, list[Tensor]]:
    torch.manual_seed(0)
    model = Weights([make() for make in layers]).to(device, dtype)
    gradients = [torch.randn_like(w) for w in model()]
    for layer in model:
        getattr(theirs if who == "torch" else ours, kind)(layer)
    if who == "all at once":
        getattr(ours, f"{kind}_model")(model)
    return model, gradients


def step(model: Weights, gradients: list[Tensor]) -> None:
    for p in model.parameters():
        p.grad = None
    torch.autograd.backward(model(), gradients)
    if gradients[0].is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dtype = getattr(torch, given.dtype)
    print(f"torch {torch.__version__}, {given.device}, {given.dtype}, {given.threads} threads; forward and backward of all weights, us\n")
    print("| norm | network | layers | parameters | torch | normfused, by layer | all at once | torch / all at once |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in ("weight_norm", "spectral_norm"):
        for name, layers_of in NETWORKS.items():
            layers = layers_of()
            made = {who: prepare(kind, layers, who, given.device, dtype) for who in ("torch", "by layer", "all at once")}
            times = take_turns({who: partial(wall_us, partial(step, *m), 1) for who, m in made.items()}, given.rounds)
            medians = [statistics.median(times[who]) for who in made]
            ratio = statistics.median(a / b for a, b in zip(times["torch"], times["all at once"], strict=True))
            count = sum(g.numel() for g in made["torch"][1])
            cells = [kind, name, str(len(layers)), f"{count / 1e6:.1f} M", *(f"{m:.0f}" for m in medians), f"{ratio:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
