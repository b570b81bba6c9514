"""Inputs, error measures, and the comparison of one call, forward and backward, with its oracle.

Errors are relative to the largest reference value; of dx to the largest |p*dz|, since dx itself cancels where a set is small.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .formulas import Arguments, Kind

DEVICE = os.environ.get("NORMFUSED_TEST_DEVICE", "cpu")
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALF)

# one rounding of the output for half types; float32 as specified; float64 well above its floor
OUTPUT = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def parameter_tolerance(x: torch.dtype, parameter: torch.dtype) -> float:
    """float32 gradients beside half data are accumulated in float32 from half inputs."""
    if parameter in HALF:
        return OUTPUT[parameter]
    return 1e-4 if x in HALF else OUTPUT[x]


def error(actual: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """max|actual - expected| / max(|expected|, scale); infinite for NaN that is not expected."""
    a, e = actual.detach().double(), expected.detach().double()
    assert a.shape == e.shape, f"shape {tuple(a.shape)}, expected {tuple(e.shape)}"
    if a.numel() == 0:
        return 0.0
    if not torch.isfinite(a).all():
        return float("inf")
    top = max(float(e.abs().max()), scale)
    worst = float((a - e).abs().max())
    return worst / top if top else (0.0 if worst == 0 else float("inf"))


def close(what: str, actual: Tensor, expected: Tensor, tolerance: float, scale: float = 0.0) -> None:
    found = error(actual, expected, scale)
    assert found <= tolerance, f"{what}: error {found:.3g} above {tolerance:.3g} (relative to the largest reference value)"


def layout(x: Tensor, name: str) -> Tensor:
    """x's numbers (``expanded``, ``overlapping``: some of them) in another memory layout."""
    if name == "contiguous":
        return x.contiguous()
    if name == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if name == "slice":  # a window of a larger tensor, every other column
        big = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype, device=x.device)
        big[..., 1::2] = x
        return big[..., 1::2]
    if name == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if name == "expanded":
        return x[:1].expand(x.shape)
    if name == "expanded_last":
        return x[..., :1].expand(x.shape)
    if name == "overlapping":  # rows that share elements with the next row
        strides, step = [], 1
        for size in reversed(x.shape):
            strides.append(step)
            step += max(size - 1, 1)
        flat = x.contiguous().view(-1)
        return flat.as_strided(x.shape, tuple(reversed(strides)))
    raise AssertionError(name)


LAYOUTS = ("contiguous", "channels_last", "slice", "transposed", "expanded", "overlapping")


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, mean: float = 3.0, seed: int = 0) -> Tensor:
    """Normal numbers of unit deviation, each channel around its own mean of size ``mean``."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    if len(shape) > 1:
        centre = mean * torch.linspace(-1, 1, shape[1], dtype=torch.float64) if mean else torch.zeros(shape[1], dtype=torch.float64)
        x = x + centre.view(1, -1, *[1] * (len(shape) - 2))
    return x.to(dtype).to(DEVICE)


def arguments(
    kind: Kind,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    act: str = "identity",
    mode: str | None = None,
    affine: bool = True,
    residual_layout: str = "contiguous",
    shared_act_weight: bool = False,
) -> Arguments:
    """Random parameters, residual and buffers for a call; all that can require gradients do."""
    g = torch.Generator().manual_seed(1)
    of = parameter_dtype or dtype
    features = kind.features(shape)
    size = 1
    for f in features:
        size *= f

    def numbers(*s: int, scale: float = 1.0, offset: float = 0.0, kind_of: torch.dtype = of) -> Tensor:
        t = torch.randn(*s, generator=g, dtype=torch.float64) * scale + offset
        return t.to(kind_of).to(DEVICE)

    a = Arguments(act=act, mode=mode)
    if affine:
        a.weight = numbers(*features, scale=0.5, offset=1.0).requires_grad_()
        a.bias = numbers(*features, scale=0.5).requires_grad_() if kind.bias else None
    if act == "prelu":
        a.act_weight = numbers(1 if shared_act_weight else size, scale=0.2, offset=0.3).requires_grad_()
    if act == "tlu":
        a.act_weight = numbers(1 if shared_act_weight else size, scale=0.5, offset=-0.3).requires_grad_()
    if kind.learned_eps:
        n = shape[1] if kind.learned_eps == "channel" else 1
        # both signs: eps is added as |eps_l|
        signs = torch.tensor([1.0 if i % 2 == 0 else -1.0 for i in range(n)])
        a.eps_l = (numbers(n, scale=0.1).abs().cpu() * signs + 0.02 * signs).to(of).to(DEVICE).requires_grad_()
    if mode is not None:
        a.residual = layout(numbers(*shape, kind_of=dtype), residual_layout).requires_grad_()
    if kind.buffers:
        a.running_mean = numbers(*features)
        a.running_var = numbers(*features).abs() + 0.5
    return a


def compare(
    kind: Kind,
    x: Tensor,
    a: Arguments,
    backend: str | None,
    *,
    dy: Tensor | None = None,
    tolerance: float | None = None,
    parameters: float | None = None,
    need_x: bool = True,
    **call: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run ``kind`` and its oracle on the same numbers; y, h, dx and every gradient must agree. Returns (y, dx)."""
    dtype = x.dtype
    tolerance = OUTPUT[dtype] if tolerance is None else tolerance
    x = x.detach().requires_grad_(need_x)
    out = kind.call(x, a, backend, **call)
    y, h = out if a.mode == "pre_norm" else (out, None)

    x64 = x.detach().to(torch.float64, copy=True).requires_grad_(need_x)
    a64 = a.wide()
    y64, h64, z64, p64 = kind.oracle(x64, a64, dtype)
    what = f"{kind.name} {dtype} act={a.act} mode={a.mode}"
    assert y.dtype == dtype and y.shape == x.shape
    close(f"{what}: y", y, y64, tolerance)
    if h is not None:
        close(f"{what}: h", h, h64, tolerance)

    if dy is None:
        dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype).to(x.device)
    inputs = {"x": x, **a.named()}
    inputs = {n: t for n, t in inputs.items() if t.requires_grad}
    if not inputs:
        assert not y.requires_grad
        return y, None
    wide = {"x": x64, **a64.named()}
    outputs, ups = [y], [dy]
    outputs64, ups64 = [y64], [dy.double()]
    if h is not None and h64.requires_grad:
        dh = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype).to(x.device)
        outputs, ups, outputs64, ups64 = [y, h], [dy, dh], [y64, h64], [dy.double(), dh.double()]
    found = dict(zip(inputs, torch.autograd.grad(outputs, list(inputs.values()), ups, allow_unused=True), strict=True))
    with torch.no_grad():
        zl = z64.detach().requires_grad_()
    w64 = kind.broadcast(a64.act_weight, tuple(x.shape))
    with torch.enable_grad():
        (dz,) = torch.autograd.grad(activation_of(a, zl, w64), zl, dy.double())
    expected = torch.autograd.grad(outputs64, [wide[n] for n in inputs], ups64, allow_unused=True)
    for (name, grad), want in zip(found.items(), expected, strict=True):
        assert grad is not None and want is not None, f"{what}: gradient of {name} is missing"
        assert grad.dtype == inputs[name].dtype, f"{what}: gradient of {name} has type {grad.dtype}"
        if name == "x" or (name == "residual" and a.mode == "pre_norm"):
            close(f"{what}: d{name}", grad, want, tolerance, scale=float((p64 * dz).abs().max()))
        elif name == "residual":
            close(f"{what}: d{name}", grad, want, tolerance)
        else:
            limit = parameter_tolerance(dtype, inputs[name].dtype) if parameters is None else parameters
            close(f"{what}: d{name}", grad, want, limit)
    return y.detach(), found.get("x")


def activation_of(a: Arguments, z: Tensor, weight: Tensor | None) -> Tensor:
    from .formulas import activation

    return activation(a.act, z, None if weight is None else weight.detach())
