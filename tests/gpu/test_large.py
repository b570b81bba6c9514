"""More than 2^31 elements. Sets do not know of each other, so the first and the last, and those around the 2^31st element, are checked
against float64 formulas of those sets alone."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import Tensor

from normfused import functional as nF

GIB = 2**30
BOUND = 2**-7  # of bf16's output and gradients, relative to the largest value


def _needs(device: torch.device, numel: int, tensors: int) -> None:
    """x, dy, y and dx, and what is checked of them in float64."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    wanted = tensors * 2 * numel + 20 * GIB
    if free < wanted:
        pytest.skip(f"needs {wanted / GIB:.0f} GiB of free GPU memory, there are {free / GIB:.0f}")


def _data(shape: tuple[int, ...], device: torch.device, nhwc: bool) -> tuple[Tensor, Tensor]:
    assert prod(shape) > 2**31
    _needs(device, prod(shape), 5)
    generator = torch.Generator(device).manual_seed(0)
    order = (shape[0], *shape[2:], shape[1]) if nhwc else shape

    def one() -> Tensor:
        values = torch.empty(order, dtype=torch.bfloat16, device=device)
        flat = values.view(-1)
        for part in flat.split(2**28):  # generators count to 2^31 or beyond, but this needs no trust
            part.normal_(generator=generator)
        return values.movedim(-1, 1) if nhwc else values

    x = one()
    return (x.add_(1)).requires_grad_(), one()


def _check(got: Tensor, want: Tensor, what: str) -> None:
    error = float((got.double() - want).abs().max() / want.abs().max())
    assert error <= BOUND, f"{what}: {error}"


def _sets(number: int) -> list[int]:
    return sorted({0, number // 2 - 1, number // 2, number - 1})


def _compare(
    y: Tensor, dx: Tensor, x: Tensor, dy: Tensor, part: Callable[[Tensor], Tensor], formula: Callable[[Tensor], Tensor], what: str
):
    leaf = part(x.detach()).double().requires_grad_()
    want = formula(leaf)
    (gradient,) = torch.autograd.grad(want, leaf, part(dy).double())
    _check(part(y.detach()), want.detach(), f"y of {what}")
    _check(part(dx), gradient, f"dx of {what}")


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("backend", ["cuda"])
def test_batch_norm(layout: str, backend: str, gpu: torch.device) -> None:
    N, C, side = 2, 64, 4100
    x, dy = _data((N, C, side, side), gpu, layout == "nhwc")
    w, b = (torch.rand(C, device=gpu).add_(0.5).requires_grad_() for _ in range(2))
    y = nF.batch_norm_act(x, None, None, w, b, True, act="silu", backend=backend)
    dx, dw, db = torch.autograd.grad(y, (x, w, b), dy)
    assert y.stride() == x.stride() == dx.stride()
    for c in _sets(C):

        def formula(t: Tensor, c: int = c) -> Tensor:
            z = (t - t.mean()) * (t.var(correction=0) + 1e-5).rsqrt() * w[c].double() + b[c].double()
            return z * z.sigmoid()

        _compare(y, dx, x, dy, lambda t, c=c: t[:, c], formula, f"channel {c}")
    assert all(bool(g.isfinite().all()) for g in (dw, db))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_group_norm(layout: str, gpu: torch.device) -> None:
    N, C, side, groups = 2, 32, 5800, 8
    x, dy = _data((N, C, side, side), gpu, layout == "nhwc")
    w, b = (torch.rand(C, device=gpu).add_(0.5).requires_grad_() for _ in range(2))
    y = nF.group_norm_act(x, groups, w, b, act="silu", backend="cuda")
    (dx,) = torch.autograd.grad(y, x, dy)
    D = C // groups
    for index in _sets(N * groups):
        n, g = divmod(index, groups)
        channels = slice(g * D, (g + 1) * D)

        def formula(t: Tensor, channels: slice = channels) -> Tensor:
            z = (t - t.mean()) * (t.var(correction=0) + 1e-5).rsqrt()
            z = z * w[channels].double().view(-1, 1, 1) + b[channels].double().view(-1, 1, 1)
            return z * z.sigmoid()

        _compare(y, dx, x, dy, lambda t, n=n, c=channels: t[n, c], formula, f"sample {n}, group {g}")


@pytest.mark.parametrize("rows", [2**19 + 3, 2**31 // 96 + 5])
def test_layer_norm(rows: int, gpu: torch.device) -> None:
    C = 4096 if rows < 2**20 else 96
    x, dy = _data((rows, C), gpu, False)
    w, b = (torch.rand(C, device=gpu).add_(0.5).requires_grad_() for _ in range(2))
    y = nF.layer_norm_act(x, C, w, b, act="gelu", backend="cuda")
    dx, dw, db = torch.autograd.grad(y, (x, w, b), dy)

    def formula(t: Tensor) -> Tensor:
        z = (t - t.mean(-1, keepdim=True)) * (t.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
        return torch.nn.functional.gelu(z * w.double() + b.double())

    for start in (0, 2**31 // C - 50, rows - 100):
        _compare(y, dx, x, dy, lambda t, s=start: t[s : s + 100], formula, f"rows from {start}")
    assert all(bool(g.isfinite().all()) for g in (dw, db))


def test_channels_of_maps(gpu: torch.device) -> None:
    N, C, side = 8, 64, 2050
    x, dy = _data((N, C, side, side), gpu, False)
    w = torch.rand(C, device=gpu).add_(0.5).requires_grad_()
    y = nF.rms_norm_act(x, C, w, dim=1, backend="cuda")
    dx, dw = torch.autograd.grad(y, (x, w), dy)

    def formula(t: Tensor) -> Tensor:  # of rows of one sample: (C, rows, side)
        return t * (t.square().mean(0, keepdim=True) + eps).rsqrt() * w.double().view(-1, 1, 1)

    eps = torch.finfo(torch.float32).eps  # the default: that of the type that the norm is computed in
    for n, start in ((0, 0), (N - 1, side - 20)):
        _compare(y, dx, x, dy, lambda t, n=n, s=start: t[n, :, s : s + 20], formula, f"sample {n}, rows from {start}")
    assert bool(dw.isfinite().all())
