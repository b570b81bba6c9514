"""``python -m bench.slab_plans``: which blocks hold a set of the benchmark's layers, and the bytes and time that follow. No GPU needed.

Asks the plan (csrc/kernels/plan.h) through whichever library is built, the emulation included, and writes docs/slabs.md, which
tests/cuda/test_plan.py holds it to.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from normfused.activations import parse
from normfused.backends.cuda import _load
from normfused.problem import BATCH_INSTANCE, CHANNEL, NCHW, NHWC, POSITION, PRE_ACT, SAMPLE_GROUP, STANDARD, Problem

PAGE = Path(__file__).resolve().parents[1] / "docs" / "slabs.md"
H200 = {
    "processors": 132,
    "shared_bytes_per_block": 232448,
    "shared_bytes_per_processor": 233472,
    "threads_per_processor": 2048,
    "largest_cluster": 8,
    "spare_processors": 0,
}
COPY = 4.3e12  # bytes a second, read and written, reported for an H200; not measured by this project


@dataclass(frozen=True)
class Layer:
    name: str
    scope: str
    N: int
    C: int
    S: int
    groups: int = 1
    layout: str = NCHW
    residual: str | None = None
    rule: str = STANDARD

    @property
    def sets(self) -> int:
        return {CHANNEL: self.C, SAMPLE_GROUP: self.N * self.groups, POSITION: self.N * self.S}[self.scope]

    @property
    def tensor_bytes(self) -> int:
        return 2 * self.N * self.C * self.S

    def held_bytes(self, slice_: int) -> int:
        """Of what an owner holds at a time: a set, or in NHWC the sets of a slice of columns."""
        if self.layout == NCHW or self.scope == POSITION:
            return self.tensor_bytes // self.sets
        return 2 * min(slice_, self.C) * (self.N if self.scope == CHANNEL else 1) * self.S

    def problem(self) -> Problem:
        return Problem(
            self.scope, self.rule, self.N, self.C, self.S, self.groups, self.layout, torch.bfloat16, torch.device("cpu"), 1e-5, 0.1, True,
            parse("relu"), self.residual,
        )  # fmt: skip


LAYERS = [
    *(Layer(f"BN, ResNet-50 b32, {c}@{s}²", CHANNEL, 32, c, s * s) for c, s in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))),
    *(
        Layer(f"BN, ResNet-50 b256, {c}@{s}²", CHANNEL, 256, c, s * s)
        for c, s in ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))
    ),
    *(Layer(f"BN, EfficientNet-B0 b128, {c}@{s}²", CHANNEL, 128, c, s * s) for c, s in ((96, 112), (144, 56))),
    Layer("BN 8x64x32x32", CHANNEL, 8, 64, 1024),
    Layer("BN 4x128x1024²", CHANNEL, 4, 128, 2**20),
    *(Layer(f"GN, SD 1.5 b{b}, 320@64²", SAMPLE_GROUP, b, 320, 4096, 32) for b in (1, 8)),
    Layer("GN, SD 1.5 b1, 1280@8²", SAMPLE_GROUP, 1, 1280, 64, 32),
    Layer("GN, SDXL b4, 320@128²", SAMPLE_GROUP, 4, 320, 128 * 128, 32),
    *(Layer(f"GN, SDXL VAE b1, {c}@{s}²", SAMPLE_GROUP, 1, c, s * s, 32) for c, s in ((512, 512), (256, 1024), (128, 1024))),
    Layer("GN, HunyuanVideo VAE 128@20x256²", SAMPLE_GROUP, 1, 128, 20 * 256 * 256, 32),
    Layer("GN, LTX-2 512@16x180x320", SAMPLE_GROUP, 1, 512, 16 * 180 * 320, 32),
    Layer("GN, Mask R-CNN b2, 256@200x336", SAMPLE_GROUP, 2, 256, 200 * 336, 32),
    *(Layer(f"IN, nnU-Net b2, {c}@{s}³", SAMPLE_GROUP, 2, c, s**3, c) for c, s in ((32, 128), (64, 64), (128, 32), (320, 8))),
    Layer("IN, CycleGAN b1, 64@256²", SAMPLE_GROUP, 1, 64, 256 * 256, 64),
    Layer("IN 4x64x512²", SAMPLE_GROUP, 4, 64, 512 * 512, 64),
    Layer("LN over (C, H, W), 8x256x56²", SAMPLE_GROUP, 8, 256, 56 * 56, 1),
    Layer("LN over C of ConvNeXt-T b128, 96@56²", POSITION, 128, 96, 56 * 56),
    *(
        Layer(f"BIN, {n}x{c}x{s}²", CHANNEL, n, c, s * s, rule=BATCH_INSTANCE)
        for n, c, s in ((1, 64, 256), (16, 256, 64), (32, 256, 56), (32, 2048, 7), (256, 256, 56))
    ),
    Layer("RMS 16384x4096", POSITION, 16384, 4096, 1),
    Layer("LN 1024x12288", POSITION, 1024, 12288, 1),
]
LAYERS_NHWC = [
    *(replace(layer, layout=NHWC) for layer in LAYERS if layer.scope != POSITION),
    *(
        Layer(f"BN+add+ReLU, ResNet-50 b{b}, {c}@{s}²", CHANNEL, b, c, s * s, layout=NHWC, residual=PRE_ACT)
        for b in (32, 256)
        for c, s in ((256, 56), (512, 28), (1024, 14), (2048, 7))
    ),
]


def owner(plan: dict[str, Any]) -> str:
    if plan["route"] != "single_pass":
        return "none (two passes)"
    if plan["owner"] == "cluster":
        return f"cluster of {plan['chunks']}"
    if plan["owner"] == "group":
        return f"{plan['chunks']} blocks, {plan['groups']} at a time"
    return "a block"


def row(library: _load.Library, layer: Layer) -> list[str]:
    cells = [layer.name, f"{layer.tensor_bytes / 1e6:.4g}"]
    masked = layer.residual is not None
    for step, inputs, outputs in (("norm_act", 1, 1 + masked), ("norm_act_backward", 2, 1 + masked)):
        plan = library.describe(layer.problem(), step, 7, H200)
        assert plan is not None
        held, times = layer.held_bytes(plan["slice"]), plan["reads_of_x"]
        # the residual is read once forward, a bit an element of mask is written; backward reads it as often as x, and writes dresidual
        asked = inputs * times + outputs + masked * (1 if inputs == 1 else times) / 16
        asked *= layer.tensor_bytes
        if layer.layout == NHWC:
            cells.append(f"{2 * min(plan['slice'], layer.C)}")
        cells += [f"{held / 1e6:.3g}", owner(plan), f"{max(0.0, 2 - times) * held / 1e6:.3g}", f"{times:.3g}"]
        cells += [f"{asked / 1e6:.4g}", f"{1e6 * asked / COPY:.4g}"]
    return cells


def table(library: _load.Library, layers: list[Layer]) -> list[str]:
    slices = ["slice"] if layers[0].layout == NHWC else []
    columns = [*slices, "held", "by", "R", "reads", "MB", "us"]
    head = [f"layer, {layers[0].layout.upper()}", "T", *(f"{d}: {c}" for d in ("forward", "backward") for c in columns)]
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row(library, layer)) + " |" for layer in layers),
    ]


def page(library: _load.Library) -> str:
    lines = [
        "# Which blocks hold a set",
        "",
        "Written by `python -m bench.slab_plans`: the plan of csrc/kernels/plan.h for an H200 (132 processors, 227 KB of shared memory",
        "a block), bfloat16, ReLU. **Arithmetic, not a measurement.** T: MB of x. Held: MB of what one block, cluster or group of",
        "blocks holds at a time, a set, or in NHWC the sets of a slice of channels. R: MB of it that stay on chip, of each input. Reads:",
        "how often each input is asked for, 2 - R/held. MB: all that is asked for and written, where the least is 2T forward and",
        f"3T backward (add+ReLU: 3T + T/16 and 4T + T/16). us: those bytes at {COPY / 1e12:g} TB/s, a copy rate that others report of",
        "an H200.",
        "",
        *table(library, LAYERS),
        "",
        "A group of blocks is launched cooperatively, two blocks to a processor, so that some groups load while others wait or store.",
        "`normfused.set_spare_processors(n)` leaves n processors to kernels that run beside them. What a device cannot hold together is",
        "read again by the groups, or, where less than a fifth of it would stay, takes a launch per pass.",
        "",
        "## channels_last",
        "",
        "A slice is the bytes of channels of a position that go to one owner: whole lines of 128 bytes where at least two such slices",
        "find room on the device at a time, else 64 bytes; with groups a multiple of a group's channels. All positions of the slice (and",
        "samples, in batch norm) are held together.",
        "",
        *table(library, LAYERS_NHWC),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PAGE)
    out = parser.parse_args().out
    library = _load.library()
    if library is None or library.module is None:
        print(f"slab_plans needs a compiled library: {_load.reason() or 'it was built without pybind11'}", file=sys.stderr)
        return 1
    out.write_text(page(library))
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
