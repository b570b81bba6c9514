"""Batch renorm, batch-instance, switchable and mean-only norm, EvalNorm, whitening: against float64, by equations, limits, invariants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import normfused.functional as NF
from tests.support.cases import pairwise
from tests.support.check import DEVICE, HALF, OUTPUT, close, data, layout, parameter_tolerance
from tests.support.family import BY_NAME, EPS, MEMBERS, Member, channels, switch_member, whiten, whiten_member
from tests.support.formulas import ACT_NUMBERS, activation

members = pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.name)
trained = pytest.mark.parametrize("member", [m for m in MEMBERS if m.training], ids=lambda m: m.name)
F64 = torch.float64


def made(member: Member, c: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(parameters that require gradients, buffers) in ``dtype``."""
    learned = {n: t.to(dtype).to(DEVICE).requires_grad_() for n, t in member.learned(c).items()}
    return learned, {n: t.to(dtype).to(DEVICE) for n, t in member.kept(c).items()}


def doubled(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v.detach().to("cpu", F64, copy=True).requires_grad_(v.requires_grad) for n, v in t.items()}


def slopes(x: Tensor, z: Tensor) -> Tensor:
    """p of z = p*x + b in every (n, c); 1 where there are not two values to see it by."""
    x, flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2), z.reshape(*z.shape[:2], -1)
    apart = x - x.mean(2, keepdim=True)
    square = apart.square().sum(2)
    p = torch.where(square > 0, (apart * flat).sum(2) / square, 1.0)
    return p.view(*p.shape, *[1] * (z.dim() - 2))


def check(
    member: Member, x: Tensor, training: bool, backend: str | None, act: str = "identity", mode: str | None = None,
    parameter_dtype: torch.dtype | None = None, tolerance: float | None = None, parameters: float | None = None,
) -> None:  # fmt: skip
    """y, the gradient of everything, and the buffers after a training step; ``parameters``: another tolerance for their gradients."""
    dtype = x.dtype
    learned, kept = made(member, x.shape[1], parameter_dtype or dtype)
    wide = doubled(learned) | doubled(kept)
    x = x.detach().requires_grad_()
    generator = torch.Generator().manual_seed(5)
    r, dy = (torch.randn(x.shape, generator=generator, dtype=F64).to(dtype).to(DEVICE) for _ in range(2))
    r.requires_grad_()
    x64, r64 = (t.detach().cpu().double().requires_grad_() for t in (x, r))
    options = {"residual": r, "residual_mode": mode} if mode else {}
    named: Any = (act, ACT_NUMBERS[act]) if act in ACT_NUMBERS else act
    y = member.call(x, learned | kept, training, act=named, backend=backend, **options)

    z = member.oracle(x64, wide, training)
    z = z + r64 if mode == "pre_act" else z
    y64 = activation(act, z)
    y64 = y64 + r64 if mode == "post_act" else y64
    tolerance = OUTPUT[dtype] if tolerance is None else tolerance
    assert y.dtype == dtype
    assert y.shape == x.shape
    close("y", y.cpu(), y64, tolerance)
    for name, want in (member.after(x64.detach(), {n: t.detach() for n, t in wide.items()}) if training else {}).items():
        close(name, kept[name].cpu(), want, max(1e-5 if dtype != F64 else 1e-12, OUTPUT[kept[name].dtype]))
    inputs = {"x": x, **({"r": r} if mode else {}), **learned}
    inputs64 = [{"x": x64, "r": r64, **wide}[n] for n in inputs]
    found = torch.autograd.grad(y, list(inputs.values()), dy)
    wanted = torch.autograd.grad(y64, inputs64, dy.double().cpu())
    # dx cancels where a set is small: it is held against the term that dz alone gives
    zl = z.detach().requires_grad_()
    (dz,) = torch.autograd.grad(activation(act, zl), zl, dy.double().cpu())
    scale = float((slopes(x64.detach(), z.detach() - (r64.detach() if mode == "pre_act" else 0)) * dz).abs().max())
    for (name, grad), want in zip(zip(inputs, found, strict=True), wanted, strict=True):
        assert grad.dtype == inputs[name].dtype
        if name in ("x", "r"):
            close(f"d{name}", grad.cpu(), want, tolerance, scale=scale if name == "x" else 0.0)
        else:
            limit = parameter_tolerance(dtype, inputs[name].dtype) if parameters is None else parameters
            limit *= 10 if name in member.loose and inputs[name].dtype not in HALF else 1
            # the gradients of channels may cancel to nothing, that of one channel any: compared with the terms of the sum
            terms = math.sqrt(x.numel() / x.shape[1]) if name in member.loose else float(x.shape[1] == 1)
            close(f"d{name}", grad.cpu(), want, limit, scale=terms)
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        assert y.stride() == x.stride()
        assert found[0].stride() == x.stride()


FACTORS: dict[str, Any] = {
    "member": [m.name for m in MEMBERS],
    "dtype": [torch.float32, F64, torch.bfloat16, torch.float16],
    "layout": ["contiguous", "channels_last", "slice", "overlapping"],
    "act": ["identity", "relu", "silu", "softplus"],
    "mode": [None, "pre_act", "post_act"],
    "training": [True, False],
    "shape": [(3, 6, 5, 3), (2, 6, 3, 3, 2), (5, 6, 9), (7, 6), (1, 6, 4, 4), (3, 6, 1, 1), (4, 12, 7, 7)],
    "half_parameters": [False, True],
}


def allowed(row: dict[str, Any]) -> bool:
    member, shape = BY_NAME[row["member"]], row["shape"]
    s = math.prod(shape[2:])
    if row["training"] not in member.modes or len(shape) < member.least_dim or (row["layout"] == "channels_last" and len(shape) == 2):
        return False
    if s == 1 and row["layout"] == "overlapping":
        return False
    if s == 1 and (member.name == "batch instance" or ("unbiased" in member.name and len(shape) > 2)):
        return False
    if row["half_parameters"] and row["dtype"] not in HALF:
        return False
    # few columns leave a covariance whose inverse root float32 cannot know
    return not (member.name.startswith("whiten") and row["training"] and (shape[0] * s < 27 or row["layout"] == "overlapping"))


ROWS = pairwise(FACTORS, allowed)


def run(row: dict[str, Any], backend: str) -> None:
    dtype = row["dtype"]
    kind = dtype if row["half_parameters"] or dtype not in HALF else torch.float32
    x = layout(data(row["shape"], dtype, mean=1.0), row["layout"])
    check(BY_NAME[row["member"]], x, row["training"], backend, row["act"], row["mode"], kind)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(v) for v in row.values()))
def test_pairs(row: dict[str, Any], backend: str) -> None:
    run(row, backend)


# N, C, S of 1, 2 and odd, of whole maps, and of more channels than positions
SHAPES = [(1, 1, 2), (2, 3, 3), (1, 12, 14, 14), (5, 1, 7, 7), (2, 64, 3, 3), (5, 64, 2), (2, 3, 56, 56), (5, 3, 1, 1), (2, 1, 3, 3, 1)]


def of_channels(member: Member, c: int) -> Member:
    """Whitening in groups that divide these channels."""
    d = max(size for size in (1, 2, 3) if c % size == 0)
    return whiten_member(member.name.split()[1], d) if member.name.startswith("whiten") else member


@members
def test_shapes(member: Member, backend: str) -> None:
    for i, shape in enumerate(SHAPES):
        own = of_channels(member, shape[1])
        for training in member.modes:
            row = {"training": training, "shape": shape, "layout": "contiguous", "dtype": torch.float32, "half_parameters": False}
            if not allowed({"member": member.name, **row}):
                continue
            x = layout(data(shape, torch.float32, mean=1.0), ("contiguous", "channels_last")[i % 2])
            check(own, x, training, backend, "silu")


@members
def test_any_gradient_alone(member: Member, backend: str) -> None:
    """Of every tensor the gradient that it has beside the others, whichever of them are wanted; and none of the others."""
    for training in member.modes:
        learned, kept = made(member, 6, F64)
        tensors = {"x": data((3, 6, 4, 2), F64), "residual": data((3, 6, 4, 2), F64, seed=3), **learned}

        def gradients(wanted: set[str], training=training, kept=kept, tensors=tensors) -> dict[str, Tensor | None]:
            leaves = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in tensors.items()}
            own = {n: t.clone() for n, t in kept.items()} | {n: t for n, t in leaves.items() if n not in ("x", "residual")}
            y = member.call(leaves["x"], own, training, act="silu", backend=backend, residual=leaves["residual"])
            y.square().sum().backward()
            return {n: t.grad for n, t in leaves.items()}

        together = gradients(set(tensors))
        for wanted in [{name} for name in tensors] + [set(tensors) - {name} for name in tensors]:
            for name, grad in gradients(wanted).items():
                assert (grad is not None) == (name in wanted)
                if grad is not None:
                    same(grad, together[name])


@members
def test_gradient_arrives_in_any_layout(member: Member, backend: str) -> None:
    """dy expanded from a sum, transposed or strided, x in either format, and a residual in the other."""
    for form, other in (("contiguous", "channels_last"), ("channels_last", "contiguous")):
        for training in member.modes:
            learned, kept = made(member, 6, F64)
            x = layout(data((3, 6, 4, 2), F64), form).requires_grad_()
            r = layout(data((3, 6, 4, 2), F64, seed=3), other).requires_grad_()
            inputs = [x, r, *learned.values()]
            own = learned | {n: t.clone() for n, t in kept.items()}
            y = member.call(x, own, training, act="silu", backend=backend, residual=r)
            for name in ("expanded", "expanded_last", "transposed", "slice"):
                dy = layout(data((3, 6, 4, 2), F64, seed=7), name)
                want = torch.autograd.grad(y, inputs, dy.clone(memory_format=torch.contiguous_format), retain_graph=True)
                for a, b in zip(torch.autograd.grad(y, inputs, dy, retain_graph=True), want, strict=True):
                    same(a, b)
            (summed,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
            same(summed, torch.autograd.grad(y, x, torch.ones_like(y))[0])


@members
def test_halves_of_any_size(member: Member, backend: str) -> None:
    """Squares of float16 would overflow from 256 on and vanish below 2e-4; the batch is made to fit its own scale."""
    for size in (300.0, 1e-3):
        x = (data((3, 6, 5, 4), F64, mean=1.0) * size).half()
        learned, kept = made(member, 6, torch.float32)
        kept = {n: t * size if n in ("running_mean", "running_std") else t * size**2 if n == "running_var" else t for n, t in kept.items()}
        want = member.oracle(x.double().cpu(), doubled(learned) | doubled(kept), member.training)
        y = member.call(x, learned | kept, member.training, backend=backend)
        close("y", y.cpu(), want, OUTPUT[torch.float16])
        assert all(t.isfinite().all() for t in kept.values())


@pytest.mark.triton_surface
@members
def test_in_short(member: Member, backend: str) -> None:
    """Of every norm a few, so that they also run through Triton's interpreter."""
    for dtype, form, act, mode in ((torch.float32, "contiguous", "silu", None), (torch.bfloat16, "channels_last", "relu", "pre_act")):
        for training in member.modes:
            check(member, layout(data((3, 6, 5, 3), dtype, mean=1.0), form), training, backend, act, mode, torch.float32)


def test_the_reference_layer_of_rows(backend: str) -> None:
    """Switchable norm of (N, C) as the reference implementation computes it: unbiased over channels and over samples."""
    member = switch_member(("ln", "bn"), unbiased=True)
    for training in (True, False):
        check(member, data((7, 6), F64, mean=1.0), training, backend, "silu")
        check(member, data((7, 6), torch.bfloat16, mean=1.0), training, backend, "relu", "post_act", torch.float32)
    kept = {n: t.to(DEVICE) for n, t in member.kept(6).items()}
    x, before = data((7, 6), F64), kept["running_var"].clone()
    member.call(x, {n: t.to(DEVICE) for n, t in member.learned(6).items()} | kept, True, backend=backend)
    same(kept["running_var"], 0.9 * before + 0.1 * x.var(0))


@pytest.mark.parametrize("iterations", [1, 5, 7])
def test_whitening_of_an_ill_conditioned_covariance(iterations: int, backend: str) -> None:
    """Condition 10^4, d = 8, float32: after T steps the formula's y, of partial whitening, and dx. The iteration itself in float32 is off
    by 5e-6 with T = 5 and by 4e-3 with T = 7."""
    mix = torch.linalg.qr(data((8, 8), F64, mean=0))[0] * torch.logspace(0, -2, 8, dtype=F64, device=DEVICE)
    x64 = torch.einsum("dk,nks->nds", mix, data((6, 8, 40), F64, mean=0))
    x, dz = x64.float().requires_grad_(), data((6, 8, 40), seed=4, mean=0)
    y = NF.iter_norm_act(x, training=True, num_channels=8, iterations=iterations, eps=1e-12, backend=backend)
    leaf = x.detach().double().cpu().requires_grad_()
    want = whiten(leaf, 8, "newton", iterations, 1e-12)[0]
    close("y", y.cpu(), want, 1e-6)
    (dx,), (wanted,) = torch.autograd.grad(y, x, dz), torch.autograd.grad(want, leaf, dz.double().cpu())
    close("dx", dx.cpu(), wanted, 1e-5)


# ------------------------------------------------------------------------------------------------------- derivatives
@pytest.mark.parametrize(("act", "mode"), [("identity", None), ("silu", "pre_act")])
@members
def test_once_and_twice(member: Member, act: str, mode: str | None, backend: str) -> None:
    for training in member.modes:
        x = data((2, 6, 3, 1), F64, mean=0.5).requires_grad_()
        r = data((2, 6, 3, 1), F64, seed=3).requires_grad_()
        learned, kept = made(member, 6, F64)

        def f(x: Tensor, r: Tensor, *values: Tensor, training=training, learned=learned, kept=kept) -> Tensor:
            own = {n: t.clone() for n, t in kept.items()}
            options = {"residual": r, "residual_mode": mode} if mode else {}
            return member.call(x, dict(zip(learned, values, strict=True)) | own, training, act=act, backend=backend, **options)

        if member.name == "batch renorm" and training:
            continue  # r and d are constants of the derivative and not of the function: see the test of its equations
        g, inputs = (f, (x, r, *learned.values())) if mode else (lambda x, *v, f=f: f(x, x, *v), (x, *learned.values()))
        assert gradcheck(g, inputs, fast_mode=mode is None)
        assert gradgradcheck(g, inputs, fast_mode=True)


def test_batch_renorm_twice(backend: str) -> None:
    """Its second derivative is the oracle's, whose r and d are detached."""
    member = BY_NAME["batch renorm"]
    learned, kept = made(member, 4, F64)
    x = data((3, 4, 3, 2), F64).requires_grad_()
    inputs = [x, *learned.values()]
    ours = member.call(x, learned | kept, True, act="silu", backend=backend)
    theirs = F.silu(member.oracle(x, learned | made(member, 4, F64)[1], True))
    for y in (ours, theirs):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        penalty = torch.autograd.grad(dx.square().sum(), inputs)
        wanted = penalty if y is ours else wanted  # noqa: F821
    for got, want in zip(wanted, penalty, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want)


@trained
def test_functorch(member: Member) -> None:
    learned, kept = made(member, 6, F64)
    learned = {n: t.detach() for n, t in learned.items()}
    x = data((2, 6, 3, 2), F64)

    def f(x: Tensor) -> Tensor:
        return member.call(x, learned | kept, False, act="silu")

    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(f(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: f(x).square().sum())(x), want)
    batch = torch.stack([x, 2 * x + 1])
    torch.testing.assert_close(torch.func.vmap(f)(batch), torch.stack([f(t) for t in batch]))
    tangent = torch.randn_like(x)
    _, forward = torch.func.jvp(f, (x,), (tangent,))
    torch.testing.assert_close(forward, torch.tensordot(torch.autograd.functional.jacobian(f, x), tangent, dims=4))


# ------------------------------------------------------------------------------------------------------- closed forms
def sums(x: Tensor, dz: Tensor) -> dict[str, Tensor]:
    """The slices' moments and own-mean sums, (N, C, 1)."""
    mean = x.mean(2, keepdim=True)
    xc = x - mean
    return {"mu": mean, "v": (xc * xc).mean(2, keepdim=True), "S1": dz.sum(2, keepdim=True), "S2": (dz * xc).sum(2, keepdim=True), "xc": xc}


def closed_form(name: str, x: Tensor, dz: Tensor, t: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
    """The equations of the backward: dx = p*dz + q*(x - mean of the slice) + r, and the parameters' gradients."""
    n, c, s = x.shape
    m = n * s
    q_ = sums(x, dz)
    mu, v, S1, S2, xc = (q_[k] for k in ("mu", "v", "S1", "S2", "xc"))
    gamma = t["weight"].view(1, c, 1) if "weight" in t else torch.ones(1, c, 1, dtype=F64)
    mu_c = mu.mean(0, keepdim=True)
    v_c = v.mean(0, keepdim=True) + (mu - mu_c).square().mean(0, keepdim=True)
    S1c = S1.sum(0, keepdim=True)
    Tc = (S2 + (mu - mu_c) * S1).sum(0, keepdim=True)
    dbias = S1c.flatten()
    if name == "mean only":
        return {"dx": dz - S1c / m, "bias": dbias}
    if name == "batch renorm":
        rho = (v_c + EPS).rsqrt()
        r = (1 / rho / t["running_std"].view(1, c, 1)).clamp(1 / 1.5, 1.5)
        d = ((mu_c - t["running_mean"].view(1, c, 1)) / t["running_std"].view(1, c, 1)).clamp(-0.7, 0.7)
        q = -gamma * r * rho**3 * Tc / m
        return {
            "dx": gamma * r * rho * dz + q * xc - gamma * r * rho * S1c / m + q * (mu - mu_c),
            "weight": (r * rho * Tc + d * S1c).flatten(), "bias": dbias,
        }  # fmt: skip
    if name == "batch instance":
        gate, rho_i = t["gate"].view(1, c, 1), (v + EPS).rsqrt()
        mean, var = (mu_c, v_c) if training else (t["running_mean"].view(1, c, 1), t["running_var"].view(1, c, 1))
        rho_b = (var + EPS).rsqrt()
        TB, TI = (rho_b * (S2 + (mu - mean) * S1)).sum(0, keepdim=True), rho_i * S2
        a = gamma * (gate * rho_b + (1 - gate) * rho_i)
        q = -gamma * (1 - gate) * rho_i**2 * TI / s
        r = -gamma * (1 - gate) * rho_i * S1 / s
        if training:
            q = q - gamma * gate * rho_b**2 * TB / m
            r = r - gamma * gate * rho_b * S1c / m - gamma * gate * rho_b**2 * TB / m * (mu - mu_c)
        total = TI.sum(0, keepdim=True)
        return {
            "dx": a * dz + q * xc + r, "weight": (gate * TB + (1 - gate) * total).flatten(), "bias": dbias,
            "gate": (gamma * (TB - total)).flatten(),
        }  # fmt: skip
    if name.startswith("switch"):
        kappa = s / (s - 1) if "unbiased" in name else 1.0
        w, w_ = t["mean_weight"].softmax(0), t["var_weight"].softmax(0)
        mu_n = mu.mean(1, keepdim=True)
        v_n = kappa * v.mean(1, keepdim=True) + (mu - mu_n).square().mean(1, keepdim=True)
        v_b = kappa * v.mean(0, keepdim=True) + (mu - mu_c).square().mean(0, keepdim=True)
        mu_b = mu_c
        if not training:
            mu_b, v_b = t["running_mean"].view(1, c, 1), t["running_var"].view(1, c, 1)
        mean = w[0] * mu + w[1] * mu_n + w[2] * mu_b
        V = w_[0] * kappa * v + w_[1] * v_n + w_[2] * v_b
        rho = (V + EPS).rsqrt()
        T = S2 + (mu - mean) * S1
        gm, gV = -gamma * rho * S1, -0.5 * gamma * rho**3 * T
        last = float(training)

        def per(g: Tensor, dim: int) -> Tensor:
            return g.mean(dim, keepdim=True)

        q = (2 / s) * kappa * (w_[0] * gV + w_[1] * per(gV, 1) + last * w_[2] * per(gV, 0))
        r = (w[0] * gm + w[1] * per(gm, 1) + last * w[2] * per(gm, 0)) / s
        r = r + (2 / s) * (w_[1] * per(gV, 1) * (mu - mu_n) + last * w_[2] * per(gV, 0) * (mu - mu_c))
        return {
            "dx": gamma * rho * dz + q * xc + r, "weight": (rho * T).sum(0).flatten(), "bias": dbias,
            "mean_weight": torch.stack([w[k] * (gm * (k_ - mean)).sum() for k, k_ in enumerate((mu, mu_n, mu_b))]),
            "var_weight": torch.stack([w_[k] * (gV * (k_ - V)).sum() for k, k_ in enumerate((kappa * v, v_n, v_b))]),
        }  # fmt: skip
    assert name == "eval norm"
    alpha, beta = 0.3, 0.2
    delta = mu - t["running_mean"].view(1, c, 1)
    V = beta * v + (1 - beta) * t["running_var"].view(1, c, 1) + beta * (1 - beta) * delta**2
    rho = (V + EPS).rsqrt()
    T = S2 + (1 - alpha) * delta * S1
    gm, gV = -gamma * rho * S1, -0.5 * gamma * rho**3 * T
    dx = gamma * rho * dz + 2 * beta * gV / s * xc + (alpha * gm + 2 * beta * (1 - beta) * delta * gV) / s
    return {"dx": dx, "weight": (rho * T).sum(0).flatten(), "bias": dbias}


EQUATIONS = ["mean only", "batch renorm", "batch instance", "switch in+ln+bn", "switch in+ln+bn unbiased", "eval norm"]


@pytest.mark.parametrize("name", EQUATIONS)
def test_equations_of_the_backward(name: str, backend: str) -> None:
    member = BY_NAME[name]
    for training in member.modes:
        if name in ("mean only", "batch renorm") and not training:
            continue
        learned, kept = made(member, 6, F64)
        x, dz = data((4, 6, 20), F64).requires_grad_(), data((4, 6, 20), F64, seed=8)
        want = closed_form(name, x.detach().cpu(), dz.cpu(), doubled(learned) | doubled(kept), training)
        y = member.call(x, learned | kept, training, backend=backend)
        found = dict(zip(("dx", *learned), torch.autograd.grad(y, [x, *learned.values()], dz), strict=True))
        for key, value in want.items():
            torch.testing.assert_close(found[key].cpu(), value.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["newton", "zca"])
def test_equations_of_whitening(method: str, backend: str) -> None:
    member, d = BY_NAME["whiten newton 3" if method == "newton" else "whiten zca 2"], 3 if method == "newton" else 2
    learned, kept = made(member, 6, F64)
    x, dz = data((4, 6, 20), F64).requires_grad_(), data((4, 6, 20), F64, seed=8)
    y = member.call(x, learned | kept, True, backend=backend)
    (dx,) = torch.autograd.grad(y, x, dz)
    upstream = (dz * channels(learned["weight"].detach(), dz)).movedim(1, 0).flatten(1).cpu()
    for k, (rows, g) in enumerate(zip(x.detach().cpu().movedim(1, 0).flatten(1).split(d), upstream.split(d), strict=True)):
        m = rows.shape[1]
        xc = rows - rows.mean(1, keepdim=True)
        cov = xc @ xc.T / m + EPS * torch.eye(d, dtype=F64)
        D, w = g @ xc.T, whiten(x.detach().cpu(), d, method)[2][k]
        if method == "zca":
            values, u = torch.linalg.eigh(cov)
            root = values.sqrt()
            K = -1 / (root[:, None] * root[None] * (root[:, None] + root[None]))
            dcov = u @ (K * (u.T @ ((D + D.T) / 2) @ u)) @ u.T
        else:
            t = 1 / torch.trace(cov)
            scaled, ps = t * cov, [torch.eye(d, dtype=F64)]
            for _ in range(5):
                ps.append(1.5 * ps[-1] - 0.5 * ps[-1] @ ps[-1] @ ps[-1] @ scaled)
            dp, dscaled = t.sqrt() * D, torch.zeros(d, d, dtype=F64)
            for q in reversed(ps[:-1]):
                r = dp @ scaled.T
                dscaled = dscaled - 0.5 * (q @ q @ q).T @ dp
                dp = 1.5 * dp - 0.5 * (r @ (q @ q).T + q.T @ r @ q.T + (q @ q).T @ r)
            dt = (dscaled * cov).sum() + (D * ps[-1]).sum() / (2 * t.sqrt())
            dcov = t * dscaled - dt * t**2 * torch.eye(d, dtype=F64)
        want = w.T @ (g - g.mean(1, keepdim=True)) + (dcov + dcov.T) @ xc / m
        found = dx.cpu().movedim(1, 0).flatten(1)[k * d : (k + 1) * d]
        torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-9)


# ------------------------------------------------------------------------------------------------------- limiting cases
X = data((4, 6, 5, 3), F64)
RUNNING = {"running_mean": torch.linspace(-1, 1, 6, dtype=F64), "running_var": torch.linspace(0.5, 2, 6, dtype=F64)}
PLAIN = {"batch": F.batch_norm(X, None, None, training=True, eps=EPS), "instance": F.instance_norm(X, eps=EPS)}


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def running() -> dict[str, Tensor]:
    return {n: t.clone() for n, t in RUNNING.items()}


@pytest.mark.triton_surface
def test_limits_of_batch_renorm(backend: str) -> None:
    mean, std = running()["running_mean"], running()["running_var"].sqrt()
    same(NF.batch_renorm_act(X, mean.clone(), std.clone(), training=True, r_max=1.0, d_max=0.0, backend=backend), PLAIN["batch"])
    own, own_std = X.mean((0, 2, 3)), (X.var((0, 2, 3), correction=0) + EPS).sqrt()
    same(NF.batch_renorm_act(X, own, own_std, training=True, backend=backend), PLAIN["batch"])
    free = NF.batch_renorm_act(X, mean.clone(), std.clone(), training=True, r_max=1e9, d_max=1e9, backend=backend)
    same(free, (X - channels(mean, X)) / channels(std, X))
    same(free, NF.batch_renorm_act(X, mean, std, backend=backend))


@pytest.mark.triton_surface
def test_limits_of_batch_instance(backend: str) -> None:
    for gate, want in ((1.0, "batch"), (0.0, "instance")):
        same(NF.batch_instance_norm_act(X, torch.full((6,), gate).double(), training=True, backend=backend), PLAIN[want])
    evaluated = F.batch_norm(X, *running().values(), eps=EPS)
    for gate in (torch.ones(6, dtype=F64), torch.ones(6, dtype=F64, requires_grad=True)):
        same(NF.batch_instance_norm_act(X, gate, *running().values(), backend=backend), evaluated)


@pytest.mark.triton_surface
def test_limits_of_switch(backend: str) -> None:
    layer_norm = F.layer_norm(X, X.shape[1:], eps=EPS)
    for k, want in enumerate((PLAIN["instance"], layer_norm, PLAIN["batch"])):
        logits = torch.full((3,), -200.0, dtype=F64)
        logits[k] = 200
        same(NF.switch_norm_act(X, logits, logits, *running().values(), training=True, backend=backend), want)
    flat = X[..., 0, 0]
    for k, want in enumerate((F.layer_norm(flat, (6,), eps=EPS), F.batch_norm(flat, None, None, training=True, eps=EPS))):
        logits = torch.full((2,), -200.0, dtype=F64)
        logits[k] = 200
        same(NF.switch_norm_act(flat, logits, logits, *running().values(), training=True, using=("ln", "bn"), backend=backend), want)


@pytest.mark.triton_surface
def test_limits_of_eval_norm(backend: str) -> None:
    for alpha, beta in ((0.0, 0.0), (torch.tensor(0.0), torch.tensor(0.0))):
        same(NF.eval_norm_act(X, **running(), alpha=alpha, beta=beta, backend=backend), F.batch_norm(X, *running().values(), eps=EPS))
    same(NF.eval_norm_act(X, **running(), alpha=1.0, beta=1.0, backend=backend), PLAIN["instance"])
    # leave-one-out statistics and 1/N: exactly the batch's
    n = X.shape[0]
    for i in range(n):
        others = X[[j for j in range(n) if j != i]]
        mean, var = others.mean((0, 2, 3)), others.var((0, 2, 3), correction=0)
        same(NF.eval_norm_act(X[i : i + 1], mean, var, alpha=1 / n, beta=1 / n, backend=backend), PLAIN["batch"][i : i + 1])


@pytest.mark.triton_surface
def test_limits_of_mean_only_and_whitening(backend: str) -> None:
    centred = X - X.mean((0, 2, 3), keepdim=True)
    same(NF.mean_only_batch_norm_act(X, None, training=True, backend=backend), centred)
    same(NF.mean_only_batch_norm_act(X, running()["running_mean"], backend=backend), X - channels(RUNNING["running_mean"], X))
    for method in ("newton", "zca"):
        y = NF.iter_norm_act(X, training=True, num_channels=1, method=method, backend=backend)
        same(y, PLAIN["batch"])
    y = NF.iter_norm_act(X, training=True, num_channels=3, method="zca", backend=backend)
    for rows, w in zip(y.movedim(1, 0).flatten(1).split(3), whiten(X, 3, "zca")[2], strict=True):
        same(rows @ rows.T / rows.shape[1], torch.eye(3, dtype=F64) - EPS * w @ w)


def test_whitening_of_equal_eigenvalues_is_finite(backend: str) -> None:
    """The inverse root's derivative is finite where eigh's is not."""
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=F64).view(4, 2, 1).repeat(1, 1, 3).requires_grad_()

    def f(x: Tensor) -> Tensor:
        return NF.iter_norm_act(x, training=True, num_channels=2, method="zca", eps=0.1, backend=backend)

    assert gradcheck(f, x)
    assert gradgradcheck(f, x)


# ------------------------------------------------------------------------------------------------------- invariants
@pytest.mark.triton_surface
@trained
def test_dx_sums_to_nothing(member: Member, backend: str) -> None:
    """What shifts a channel (of switchable norm: everything) shifts no output."""
    learned, kept = made(member, 6, torch.float32)
    x = data((5, 6, 7, 7)).requires_grad_()
    y = member.call(x, learned | kept, True, act="silu", backend=backend)
    dx, *gradients = torch.autograd.grad(y.square().sum(), [x, *learned.values()])
    total = dx.double().sum((0, 2, 3))
    if member.name.startswith("switch"):
        total = total.sum()
        for name, g in zip(learned, gradients, strict=True):
            if name.endswith("_weight"):
                assert abs(float(g.sum())) <= 1e-4 * float(g.abs().max())
    assert float(total.abs().max()) <= 1e-5 * float(dx.abs().sum((0, 2, 3)).max())


# ------------------------------------------------------------------------------------------------------- numbers at their worst
@pytest.mark.triton_surface
@members
def test_large_means(member: Member, backend: str) -> None:
    """100 deviations: 1e-5, of ATen, whose means may be off by their last digit, 7.6e-6, twice that; 3e-5 for gradients that sum what this
    does to every term. 1000: y within 1e-3, where E[x^2] - E[x]^2 gives 7e-2."""
    for form in ("contiguous", "channels_last"):
        for training in member.modes:
            if not training and member.name != "eval norm":
                continue
            x = layout(data((4, 6, 8, 6), mean=0) + 100.0, form)
            check(member, x, training, backend, "softplus", tolerance=2e-5 if backend == "torch" else 1e-5, parameters=3e-5)
            x = layout(data((4, 6, 8, 6), mean=0) + 1000.0, form)
            learned, kept = made(member, 6, torch.float32)
            with torch.no_grad():
                y = member.call(x, learned | kept, training, backend=backend)
                want = member.oracle(x.double().cpu(), doubled(learned) | doubled(made(member, 6, torch.float32)[1]), training)
            close("y", y.cpu(), want, 1e-3)


@trained
def test_constant_channels(member: Member, backend: str) -> None:
    learned, kept = made(member, 6, torch.float32)
    x = torch.full((3, 6, 4, 4), 3.3).to(DEVICE).requires_grad_()
    y = member.call(x, learned | kept, True, backend=backend)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.isfinite(y).all()
    assert torch.isfinite(dx).all()
    if member.name.startswith(("batch", "mean", "switch")) and member.name != "batch renorm":
        assert float((y - channels(learned["bias"], y)).abs().max()) < 316 * 3.3 * 2e-6


def reached(member: Member, training: bool) -> Tensor:
    """Which (n, c) of (3, 6) share statistics with (0, 2)."""
    found = torch.zeros(3, 6, dtype=torch.bool, device=DEVICE)
    found[0, 2] = True
    if member.name.startswith("switch"):  # all of these mix "ln" in
        found[0] = True
    if member.name.startswith("whiten"):
        d = int(member.name[-1])
        found[:: 1 if training else 3, 2 // d * d : 2 // d * d + d] = True
    elif training and ("bn" in member.name or not member.name.startswith("switch")):
        found[:, 2] = True
    return found


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@members
def test_nan_stays_in_its_sets(member: Member, bad: float, backend: str) -> None:
    """Nothing that shares no statistics with the element sees it; all that does is NaN (of an infinity: not finite), also behind relu,
    and so are the channel's running statistics."""
    for training in member.modes:
        learned, kept = made(member, 6, torch.float32)
        act = "relu" if bad != bad else "identity"
        clean = member.call(data((3, 6, 4, 4)), learned | {n: t.clone() for n, t in kept.items()}, training, act=act, backend=backend)
        x = data((3, 6, 4, 4))
        x[0, 2, 1, 1] = bad
        y = member.call(x, learned | kept, training, act=act, backend=backend)
        found = reached(member, training)
        torch.testing.assert_close(y[~found], clean[~found])
        if training or member.name.startswith(("eval", "batch instance", "switch")):  # given statistics are of no element
            assert not (y[found].isnan() if bad != bad else ~y[found].isfinite()).logical_not().any()
        updated = member.after(data((3, 6, 4, 4)).double().cpu(), doubled(learned) | doubled(kept)) if training else {}
        for name in updated:
            hit = ~kept[name].isfinite().flatten(1 if kept[name].dim() > 1 else 0)
            hit = hit.any(1) if hit.dim() > 1 else hit
            assert hit.nonzero().flatten().tolist() == [2 * len(hit) // 6], name


def test_switch_weights_under_a_common_offset(backend: str) -> None:
    """Gradients of the mean's weights are sums of differences of means: an offset of 10^4 costs them nothing (1e-4 found); as a
    difference of two sums they would lose 3e-2."""
    member = switch_member()
    learned, kept = made(member, 6, torch.float32)
    x = (data((4, 6, 8, 6), mean=1.0) + 1e4).requires_grad_()
    dy = data((4, 6, 8, 6), seed=4)
    y = member.call(x, learned | kept, True, backend=backend)
    (got,) = torch.autograd.grad(y, learned["mean_weight"], dy)
    wide = doubled(learned) | doubled(made(member, 6, torch.float32)[1])
    (want,) = torch.autograd.grad(member.oracle(x.detach().double().cpu(), wide, True), wide["mean_weight"], dy.double().cpu())
    close("dmean_weight", got.cpu(), want, 1e-3)


def test_affine_is_optional(backend: str) -> None:
    for member in MEMBERS:
        learned, kept = made(member, 6, F64)
        names = [n for n in learned if n in ("weight", "bias")]
        given = {n: t for n, t in learned.items() if n not in names}
        neutral = doubled(learned) | {n: torch.full((6,), float(n == "weight"), dtype=F64) for n in names}
        y = member.call(X, given | kept, member.modes[0], backend=backend)
        want = member.oracle(X, neutral | doubled(made(member, 6, F64)[1]), member.modes[0])
        same(y, want)
