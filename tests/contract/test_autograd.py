"""Derivatives: once and twice against finite differences, forward mode, functorch, and never a silent zero."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import normfused as nf
from normfused import functional as nF

from ..conftest import BACKENDS
from ..support.cases import covering


def leaves(*shapes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


NORMS = {
    "batch": lambda x, w, b, **k: nF.batch_norm_act(x, None, None, w, b, True, **k),
    "batch frozen": lambda x, w, b, **k: nF.batch_norm_act(x, torch.full((4,), 0.3).double(), torch.full((4,), 1.7).double(), w, b, **k),
    "instance": lambda x, w, b, **k: nF.instance_norm_act(x, None, None, w, b, **k),
    "group": lambda x, w, b, **k: nF.group_norm_act(x, 2, w, b, **k),
    "layer": lambda x, w, b, **k: nF.layer_norm_act(x.movedim(1, -1), 4, w, b, **k),
    "layer dim=1": lambda x, w, b, **k: nF.layer_norm_act(x, 4, w, b, dim=1, **k),
    "rms dim=1": lambda x, w, b, **k: nF.rms_norm_act(x, 4, w, 1e-3, dim=1, **k) + b.view(1, -1, 1, 1),
    "frn": lambda x, w, b, **k: nF.filter_response_norm(x, w, b, **k),
}


RESIDUAL_MODES = [None, "pre_act", "post_act"]
SMOOTH = ["identity", "silu", "elu", "softplus", "leaky_relu"]


@covering({"norm": list(NORMS), "act": SMOOTH, "mode": RESIDUAL_MODES, "backend": BACKENDS}, indirect=["backend"])
def test_once_and_twice(norm, act, mode, backend):
    x, r, w, b = leaves((2, 4, 2, 2), (2, 4, 2, 2), 4, 4)
    residual_last = norm == "layer"

    def f(x, r, w, b):
        r = r.movedim(1, -1) if residual_last else r
        return NORMS[norm](x, w, b, act=act, residual=r if mode else None, residual_mode=mode or "pre_act", backend=backend)

    if mode is None:
        inputs, g = (x, w, b), lambda x, w, b: f(x, None if not residual_last else x, w, b)
    else:
        inputs, g = (x, r, w, b), f
    assert gradcheck(g, inputs)
    assert gradgradcheck(g, inputs)


@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (3, 4)], ids=["S=4", "S=1"])
@pytest.mark.parametrize("learned", [None, (1,), (4,)], ids=["fixed", "scalar", "channel"])
def test_frn_tlu_and_learned_eps(learned, shape, backend):
    x, w, b, tau = leaves(shape, 4, 4, 4)
    eps_l = [] if learned is None else [torch.linspace(-0.4, 0.5, learned[0], dtype=torch.float64).requires_grad_()]

    def f(x, w, b, tau, *eps_l):
        return nF.filter_response_norm(x, w, b, tau, 0.1, eps_l=eps_l[0] if eps_l else None, backend=backend)

    assert gradcheck(f, (x, w, b, tau, *eps_l))
    assert gradgradcheck(f, (x, w, b, tau, *eps_l))


PRE_NORM = {
    "layer": lambda x, w, r, **k: nF.layer_norm_act(x, 4, w, residual=r, residual_mode="pre_norm", act="tanh", **k),
    "rms": lambda x, w, r, **k: nF.rms_norm_act(x, 4, w, residual=r, residual_mode="pre_norm", **k),
}


@pytest.mark.parametrize("make", PRE_NORM.values(), ids=PRE_NORM)
def test_pre_norm_returns_two_differentiable_outputs(make, backend):
    x, r, w = leaves((3, 4), (3, 4), 4)

    def f(x, r, w):
        return make(x, w, r, backend=backend)

    assert gradcheck(f, (x, r, w))
    assert gradgradcheck(f, (x, r, w))
    # each output alone, too
    for index in (0, 1):
        assert gradgradcheck(lambda x, r, w, index=index: f(x, r, w)[index], (x, r, w))


def test_a_parameter_that_x_depends_on_is_not_counted_twice(backend):
    (w,) = leaves(4)
    x = torch.randn(2, 4, 3, dtype=torch.float64)

    def f(w):
        return nF.group_norm_act((x * w.view(1, 4, 1)).sin(), 2, w, w * w, act="silu", backend=backend)

    assert gradcheck(f, (w,))
    assert gradgradcheck(f, (w,))


def test_gradient_penalty_is_not_silently_zero(backend):
    """WGAN-GP: the gradient of |dy/dx|^2 with respect to the weights."""
    torch.manual_seed(0)
    layer = nf.InstanceNormAct2d(4, affine=True, act="leaky_relu", backend=backend).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    penalty = torch.autograd.grad(dx.square().sum(), list(layer.parameters()))
    plain = torch.nn.InstanceNorm2d(4, affine=True).double()
    (dx,) = torch.autograd.grad(torch.nn.functional.leaky_relu(plain(x)).square().sum(), x, create_graph=True)
    wanted = torch.autograd.grad(dx.square().sum(), list(plain.parameters()))
    for got, want in zip(penalty, wanted, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("norm", NORMS)
def test_forward_mode_and_functorch(norm, backend):
    x, w, b = (t.detach() for t in leaves((2, 4, 2, 2), 4, 4))

    def f(x):
        return NORMS[norm](x, w, b, act="silu", backend=backend)

    tangent = torch.randn_like(x)
    value, forward = torch.func.jvp(f, (x,), (tangent,))
    jacobian = torch.autograd.functional.jacobian(f, x)
    torch.testing.assert_close(forward, torch.tensordot(jacobian, tangent, dims=4))
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(f(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: f(x).square().sum())(x), want)
    batch = torch.stack([x, 2 * x + 1])
    torch.testing.assert_close(torch.func.vmap(f)(batch), torch.stack([f(t) for t in batch]))
    torch.testing.assert_close(value, f(x))


def test_running_statistics_may_change_between_forward_and_backward(backend):
    """What DDP does when a discriminator runs twice: the buffers are broadcast into, before the backward."""
    layer = nf.BatchNormAct2d(4, act="relu", backend=backend)
    x = torch.randn(3, 4, 2, 2, requires_grad=True)
    first = layer(x)
    (alone,) = torch.autograd.grad(first.square().sum(), x, retain_graph=True)
    layer(2 * x)
    for buffer in layer.buffers():
        buffer.copy_(torch.ones_like(buffer))
    (after,) = torch.autograd.grad(first.square().sum(), x)
    assert torch.equal(after, alone)


@pytest.mark.parametrize("subset", [(0,), (1,), (2,), (3,), (1, 2)], ids=str)
def test_only_what_requires_grad(subset, backend):
    tensors = [t.detach() for t in leaves((2, 4, 2, 2), (2, 4, 2, 2), 4, 4)]

    def gradients(needed):
        own = [t.clone().requires_grad_(i in needed) for i, t in enumerate(tensors)]
        x, r, w, b = own
        nF.group_norm_act(x, 2, w, b, act="silu", residual=r, backend=backend).square().sum().backward()
        return [t.grad for t in own]

    every = gradients(range(4))
    for i, grad in enumerate(gradients(subset)):
        assert (grad is not None) == (i in subset)
        if grad is not None:
            torch.testing.assert_close(grad, every[i])


def test_backward_twice_through_one_graph(backend):
    x = torch.randn(2, 4, 3, requires_grad=True)
    y = nF.instance_norm_act(x, act="gelu", backend=backend).square().sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)
