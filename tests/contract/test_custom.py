"""Norms from rules written in PyTorch (route slices): against differentiable composites in float64, on every backend."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import normfused as nf
from normfused import functional as nF


def batch_instance_rule(mean, var, weight, bias, gate, eps=1e-5):
    """Batch-instance norm (Nam & Kim 2018)."""
    batch_mean = mean.mean(0)
    batch_var = var.mean(0) + (mean - batch_mean).square().mean(0)
    batch, instance = gate * (batch_var + eps).rsqrt(), (1 - gate) * (var + eps).rsqrt()
    scale = weight * (batch + instance)
    return scale, bias - weight * (batch * batch_mean + instance * mean)


def batch_instance(x, weight, bias, gate, eps=1e-5):
    """The same in two branches over the whole tensor."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    spatial = tuple(range(2, x.dim()))
    over_batch = (x - x.mean((0, *spatial), keepdim=True)) / (x.var((0, *spatial), correction=0, keepdim=True) + eps).sqrt()
    over_instance = (x - x.mean(spatial, keepdim=True)) / (x.var(spatial, correction=0, keepdim=True) + eps).sqrt()
    gate = gate.view(shape)
    return weight.view(shape) * (gate * over_batch + (1 - gate) * over_instance) + bias.view(shape)


def batch_renorm_rule(mean, var, weight, bias, running_mean, running_std, training, eps=1e-5, r_max=3.0, d_max=5.0):
    """Batch Renorm (Ioffe 2017): r and d are constants of the backward."""
    if not training:
        scale = weight / running_std
        return scale, bias - scale * running_mean
    batch_mean = mean.mean(0)
    std = (var.mean(0) + (mean - batch_mean).square().mean(0) + eps).sqrt()
    r = (std / running_std).clamp(1 / r_max, r_max).detach()
    d = ((batch_mean - running_mean) / running_std).clamp(-d_max, d_max).detach()
    scale = weight * r / std
    return scale, bias + weight * d - scale * batch_mean


def batch_renorm_update(mean, var, running_mean, running_std, momentum=0.01, eps=1e-5):
    batch_mean = mean.mean(0)
    std = (var.mean(0) + (mean - batch_mean).square().mean(0) + eps).sqrt()
    return {
        "running_mean": running_mean + momentum * (batch_mean - running_mean),
        "running_std": running_std + momentum * (std - running_std),
    }


BatchInstanceNorm = nf.define_norm(batch_instance_rule, parameters={"weight": 1.0, "bias": 0.0, "gate": 1.0})
BatchRenorm = nf.define_norm(
    batch_renorm_rule,
    parameters={"weight": 1.0, "bias": 0.0},
    buffers={"running_mean": 0.0, "running_std": 1.0},
    update=batch_renorm_update,
)


def inputs(dtype=torch.float64, shape=(3, 4, 5, 3)):
    generator = torch.Generator().manual_seed(0)
    x, r = (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1 for _ in range(2))
    w, b, g = (torch.rand(shape[1], generator=generator, dtype=torch.float64) for _ in range(3))
    return [t.to(dtype) for t in (x, r, w, b, g)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("mode", [None, "pre_act", "post_act"])
@pytest.mark.parametrize("act", ["identity", "relu", "silu", "softplus", "prelu"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-10)])
def test_against_the_two_branches(backend, layout, mode, act, dtype, bound):
    x, r, w, b, g = inputs(dtype)
    x, r = (t.to(memory_format=layout) for t in (x, r))
    slope = torch.tensor([0.3], dtype=dtype)

    def run(f, kind):
        leaves = [t.to(kind).requires_grad_() for t in (x, r, w, b, g)]
        y = f(*leaves)
        dy = torch.linspace(-1, 1, y.numel()).to(dtype).to(kind).view(y.shape)
        return y.detach(), torch.autograd.grad(y, leaves, dy, allow_unused=True)

    def ours(x, r, w, b, g):
        return nF.custom_norm_act(
            x,
            batch_instance_rule,
            {"weight": w, "bias": b, "gate": g},
            act=act,
            act_param=slope.to(x.dtype) if act == "prelu" else None,
            residual=r if mode else None,
            residual_mode=mode or "pre_act",
            backend=backend,
        )

    def theirs(x, r, w, b, g):
        z = batch_instance(x, w, b, g)
        z = z + r if mode == "pre_act" else z
        y = {
            "identity": lambda: z,
            "relu": lambda: z.relu(),
            "silu": lambda: nn.functional.silu(z),
            "softplus": lambda: nn.functional.softplus(z),
            "prelu": lambda: nn.functional.prelu(z, slope.to(z.dtype)),
        }[act]()
        return y + r if mode == "post_act" else y

    y, gradients = run(ours, dtype)
    y_want, wanted = run(theirs, torch.float64)
    assert y.stride() == x.stride()
    assert gradients[0].stride() == x.stride()
    # one rounding of each; parameters' gradients are rounded to the half type too, and the gate's is a difference of two sums
    for what, got, want in zip(("y", "dx", "dr", "dw", "db", "dgate"), (y, *gradients), (y_want, *wanted), strict=True):
        if want is None:
            assert got is None
            continue
        allowed = 10 * bound if what == "dgate" else bound
        error = float((got.double() - want).abs().max() / want.abs().max())
        assert error <= allowed, f"{what}: {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("act", ["silu", "softplus"])
@pytest.mark.parametrize("mode", ["pre_act", "post_act"])
def test_gradients_twice(backend, act, mode):
    x, r, w, b, g = (t.requires_grad_() for t in inputs(shape=(2, 2, 3, 1)))

    def f(x, r, w, b, g):
        parameters = {"weight": w, "bias": b, "gate": g}
        return nF.custom_norm_act(x, batch_instance_rule, parameters, act=act, residual=r, residual_mode=mode, backend=backend)

    assert gradcheck(f, (x, r, w, b, g))
    assert gradgradcheck(f, (x, r, w, b, g))


@pytest.mark.triton_surface
def test_batch_renorm_layer(backend):
    """Buffers, an update after the step, training and evaluation, options, and the state dict."""
    layer = BatchRenorm(4, act="relu", backend=backend, r_max=2.0).double()
    assert "r_max=2.0" in repr(layer)
    x, *_ = inputs()
    running_mean, running_std = torch.zeros(4).double(), torch.ones(4).double()
    for _ in range(3):
        mean, std = x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + 1e-5).sqrt()
        r, d = (std / running_std).clamp(0.5, 2.0), ((mean - running_mean) / running_std).clamp(-5, 5)
        shape = (1, 4, 1, 1)
        want = ((x - mean.view(shape)) / std.view(shape) * r.view(shape) + d.view(shape)).relu()
        torch.testing.assert_close(layer(x), want)
        running_mean, running_std = running_mean + 0.01 * (mean - running_mean), running_std + 0.01 * (std - running_std)
        torch.testing.assert_close(layer.running_mean, running_mean)
        torch.testing.assert_close(layer.running_std, running_std)
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    want = ((x - running_mean.view(shape)) / running_std.view(shape)).relu()
    torch.testing.assert_close(layer(x), want)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


def test_update_does_not_reach_a_pending_backward():
    """Two forwards before a backward: the first one's buffers are the ones it was computed with."""
    layer = BatchRenorm(4, backend="reference").double()
    x, *_ = inputs()
    leaf = x.clone().requires_grad_()
    twin = copy.deepcopy(layer)
    (alone,) = torch.autograd.grad(twin(leaf).square().sum(), leaf)
    first = layer(leaf)
    layer(x * 5)
    (together,) = torch.autograd.grad(first.square().sum(), leaf)
    torch.testing.assert_close(together, alone)


@pytest.mark.triton_surface
def test_a_rule_without_moments_or_parameters(backend):
    """Constants and coefficients that do not depend on x: dx is the scale alone."""
    x, *_ = inputs()
    leaf = x.clone().requires_grad_()
    y = nF.custom_norm_act(leaf, lambda mean, var: (torch.tensor(2.0), torch.tensor(1.0)), backend=backend)
    torch.testing.assert_close(y, 2 * x + 1)
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    torch.testing.assert_close(dx, torch.full_like(x, 2.0))


def test_compile_and_transforms():
    layer = BatchInstanceNorm(4, act="silu").double()
    x, r, *_ = inputs()
    want = layer(x, r)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, r), want)
    torch.testing.assert_close(torch.func.vmap(layer, in_dims=0)(torch.stack([x, 2 * x]))[0], layer(x))


def test_empty_batch():
    layer = BatchInstanceNorm(4)
    y = layer(torch.empty(0, 4, 3, 3))
    assert y.shape == (0, 4, 3, 3)
    y.sum().backward()
    assert torch.equal(layer.gate.grad, torch.zeros(4))


def test_errors():
    with pytest.raises(TypeError, match=r"no argument for \['missing'\]"):
        nf.define_norm(batch_instance_rule, parameters={"missing": 1.0})
    with pytest.raises(TypeError, match="unexpected keyword arguments"):
        BatchInstanceNorm(4, epsilon=1e-3)
    layer = BatchInstanceNorm(4)
    with pytest.raises(nf.ShapeError, match=r"4 channels.*got 5"):
        layer(torch.randn(2, 5, 3, 3))
    with pytest.raises(nf.DTypeError, match="int64"):
        layer(torch.ones(2, 4, 3, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="pre_act, post_act, got 'pre_norm'"):
        BatchInstanceNorm(4, residual_mode="pre_norm")
    with pytest.raises(TypeError, match="gate must be a Tensor"):
        nF.custom_norm_act(torch.randn(2, 4, 3), batch_instance_rule, {"weight": torch.ones(4), "bias": torch.ones(4), "gate": 1.0})
