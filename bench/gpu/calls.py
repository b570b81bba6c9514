"""``python -m bench.gpu.calls``: a few small calls that together launch every kernel, for compute-sanitizer and for a first look.

Each runs forward and backward in the CUDA backend and is compared with the torch backend in the same type, so that a kernel which
writes nothing is not taken for a clean one. tests/gpu has the proof that no kernel is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import normfused as nf
from normfused import dispatch
from normfused.backends.cuda import _load

ROUTES = {None: -1, "single_pass": 0, "two_pass": 1, "cluster": 2, "group": 3}
KERNELS = {
    *("moments", "apply", "single_pass", "grad_moments", "grad_apply", "grad_single_pass", "settle", "grad_settle", "settle_sets"),
    *("grad_settle_sets", "grad_columns", "grad_parameters", "average_running", "count_batch"),
}
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NHWC = "nhwc"


def _plain_rule(mean: Tensor, var: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Instance norm, as a user's own rule."""
    scale = weight * (var + 1e-5).rsqrt()
    return scale, -mean * scale


Plain = nf.define_norm(_plain_rule, parameters={"weight": 1.0})


@dataclass(frozen=True)
class Call:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dtype: torch.dtype = BF16
    layout: str = "nchw"
    residual: bool = False
    route: str | None = None


# Shapes with tails, rows that start inside a vector, and whole vectors
CALLS = [
    Call(
        "batch, on chip, cumulative",
        lambda: nf.BatchNormAct2d(6, act="relu", momentum=None),
        (3, 6, 9, 5),
        residual=True,
        route="single_pass",
    ),
    Call("batch, a launch per pass", lambda: nf.BatchNormAct2d(6, act="relu"), (3, 6, 33, 31), residual=True, route="two_pass"),
    Call("batch, channels last, on chip", lambda: nf.BatchNormAct2d(24, act="silu"), (2, 24, 8, 8), FP16, NHWC, True, "single_pass"),
    Call("batch, channels last, a launch per pass", lambda: nf.BatchNormAct2d(6, act="gelu"), (2, 6, 33, 31), FP32, NHWC, route="two_pass"),
    Call("batch, by a cluster", lambda: nf.BatchNormAct2d(6, act="relu"), (8, 6, 33, 31), residual=True, route="cluster"),
    Call("batch, by blocks together", lambda: nf.BatchNormAct2d(6, act="relu"), (8, 6, 33, 31), residual=True, route="group"),
    Call("group, by a cluster", lambda: nf.GroupNormAct(2, 6, act="silu"), (2, 6, 65, 63), route="cluster"),
    Call("group, by blocks together", lambda: nf.GroupNormAct(2, 6, act="silu"), (2, 6, 65, 63), FP32, route="group"),
    Call("instance, few sets", lambda: nf.InstanceNormAct2d(2, act="relu", affine=True), (1, 2, 256, 256)),
    Call("group, on chip", lambda: nf.GroupNormAct(2, 6, act="silu"), (3, 6, 9, 5), route="single_pass"),
    Call("group, a launch per pass", lambda: nf.GroupNormAct(2, 6, act="silu"), (2, 6, 33, 31), route="two_pass"),
    Call("group, channels last", lambda: nf.GroupNormAct(2, 24, act="silu"), (3, 24, 8, 8), BF16, NHWC),
    Call("group wider than a block, channels last", lambda: nf.GroupNormAct(1, 9000, act="relu"), (2, 9000, 3, 1), BF16, NHWC),
    Call(
        "instance, cumulative",
        lambda: nf.InstanceNormAct2d(6, act="leaky_relu", affine=True, track_running_stats=True, momentum=None),
        (3, 6, 9, 5),
        FP32,
    ),
    Call("filter response, channels last", lambda: nf.FilterResponseNorm2d(6), (3, 6, 9, 5), BF16, NHWC, route="two_pass"),
    Call("layer, rows", lambda: nf.LayerNormAct(771, act="gelu"), (19, 771)),
    Call("layer, rows whose gradients fit no block", lambda: nf.LayerNormAct(24008), (5, 24008)),
    Call("rms, channels of maps", lambda: nf.RMSNormAct(6, dim=1, act="silu"), (3, 6, 9, 5), FP64),
    Call("rms, pre-norm residual", lambda: nf.RMSNormAct(512, residual_mode="pre_norm"), (70, 512), residual=True),
    Call("a rule in PyTorch", lambda: Plain(6, act="prelu"), (3, 6, 33, 31), FP16),
    Call("a rule in PyTorch, channels last", lambda: Plain(6, act="relu"), (3, 6, 9, 5), FP32, NHWC, residual=True),
]


@contextmanager
def forced(route: str | None) -> Iterator[None]:
    loaded = _load.library()
    assert loaded is not None, _load.reason()
    force = ctypes.CDLL(str(loaded.path)).normfused_force_route
    force(ROUTES[route])
    try:
        yield
    finally:
        force(-1)


def run(call: Call, backend: str, device: str) -> list[Tensor]:
    """y and every gradient."""
    torch.manual_seed(0)
    layer = call.make().to(device, FP64 if call.dtype == FP64 else FP32)
    layer.backend = backend  # type: ignore[assignment]
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.rand(p.shape) + 0.5)

    def one() -> Tensor:
        t = torch.randn(call.shape).to(call.dtype)
        return (t.movedim(1, -1).contiguous().movedim(-1, 1) if call.layout == NHWC else t).to(device)

    inputs = [one().requires_grad_() for _ in range(1 + call.residual)]
    dy = one()
    with forced(call.route if backend == "cuda" else None):
        out = layer(*inputs)
        y = out[0] if isinstance(out, tuple) else out
        return [y.detach(), *torch.autograd.grad(y, [*inputs, *layer.parameters()], dy)]


def error(call: Call, device: str) -> float:
    """Of the CUDA backend beside the torch backend, relative to what their type's roundings may make of it."""
    got, want = run(call, "cuda", device), run(call, "torch", device)
    allowed = {FP64: 1e-10, FP32: 1e-4}.get(call.dtype, 8 * torch.finfo(call.dtype).eps)
    return max(float((g.double() - w.double()).abs().max() / w.double().abs().max()) for g, w in zip(got, want, strict=True)) / allowed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu" if os.environ.get("NORMFUSED_EMULATE") == "1" else "cuda")
    device = parser.parse_args().device
    reason = dispatch.unavailable("cuda", device, torch.float32)
    if reason is not None:
        print(f"headline: {reason}")
        return 1
    wrong = []
    for call in CALLS:
        found = error(call, device)
        print(f"{call.name}: error {found:.3f} of the allowed", flush=True)
        if not found <= 1:
            wrong.append(call.name)
    print(f"headline: {len(CALLS)} calls, " + (f"wrong: {', '.join(wrong)}" if wrong else "all right"))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
