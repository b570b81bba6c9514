"""torch.compile without graph breaks, torch.export, and the operators' own checks."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch.library import opcheck

import normfused as nf

from ..conftest import EMULATED

NAMES = ["cuda"] if EMULATED else ["torch", "reference"]
LAYERS = {
    "batch, cumulative average": lambda: nf.BatchNormAct2d(4, momentum=None, act="relu"),
    "batch, prelu": lambda: nf.BatchNormAct2d(4, act="prelu"),
    "instance, tracked": lambda: nf.InstanceNormAct2d(4, track_running_stats=True, affine=True, act="leaky_relu"),
    "group": lambda: nf.GroupNormAct(2, 4, act="silu"),
    "layer": lambda: nf.LayerNormAct(2, act="gelu"),
    "layer dim=1": lambda: nf.LayerNormAct(4, dim=1),
    "rms": lambda: nf.RMSNormAct((3, 2), act="tanh"),
    "frn": lambda: nf.FilterResponseNorm2d(4, learnable_eps=True),
}


def step(layer, x, r):
    leaf, shortcut = (t.detach().clone().requires_grad_() for t in (x, r))
    layer.zero_grad()
    y = layer(leaf, shortcut)
    y.square().sum().backward()
    return y.detach(), leaf.grad, shortcut.grad, *(p.grad for p in layer.parameters()), *layer.buffers()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_fullgraph(make, name, compiler, layout):
    _compiled_like_eager(make, name, compiler, layout)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["batch, cumulative average", "group"])
def test_inductor(key, name):
    _compiled_like_eager(LAYERS[key], name, "inductor", torch.contiguous_format)


def _compiled_like_eager(make, name, compiler, layout):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = make()
    layer.backend = name
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend=compiler)
    for _ in range(2):
        x, r = (torch.randn(3, 4, 3, 2).to(memory_format=layout) for _ in range(2))
        wanted, got = step(layer, x, r), step(compiled, x, r)
        assert got[0].stride() == wanted[0].stride()
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_dynamic_shapes(name):
    torch._dynamo.reset()
    layer = nf.GroupNormAct(2, 4, act="silu", backend=name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (3, 5, 8):
        x = torch.randn(size, 4, size + 1, 2)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_export_is_made_of_aten_operators(make):
    layer = make().eval()
    x, r = torch.randn(3, 4, 3, 2), torch.randn(3, 4, 3, 2)
    program = torch.export.export(layer, (x, r))
    assert not [n for n in program.graph.nodes if "normfused" in str(n.target)]
    torch.testing.assert_close(program.module()(x, r), layer(x, r))


STATIC = {
    "batch": ("channel", "standard", 1, True, 1e-5, None),
    "frozen": ("channel", "standard", 1, False, 1e-5, 0.1),
    "group": ("sample_group", "standard", 2, True, 1e-5, 0.1),
    "frn": ("sample_group", "rms", 4, True, 1e-5, 0.1),
    "layer": ("position", "standard", 1, True, 1e-5, 0.1),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("act", ["silu", "prelu", "relu"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("norm", "mode"), [*((n, m) for n in STATIC for m in (None, "pre_act")), ("layer", "pre_norm")])
def test_opcheck_whole_norms(norm, name, act, mode, layout):
    x, r = (torch.randn(3, 4, 3, 2).to(memory_format=layout) for _ in range(2))
    w, b, slope = torch.rand(4), torch.rand(4), torch.rand(4) if act == "prelu" else None
    eps_weight = torch.rand(4) if norm == "frn" else None
    running = (torch.zeros(4), torch.ones(4), torch.tensor(0)) if norm in ("batch", "frozen") else (None, None, None)
    static = (*STATIC[norm], act, 0.0, 0.0, mode, name)
    arguments = (x, r if mode else None, w, b, slope, eps_weight, *running, *static)
    opcheck(torch.ops.normfused.norm_act.default, arguments)
    y, mean, rstd, h = torch.ops.normfused.norm_act(*arguments)
    z_source = {"relu": h if name == "cuda" else y, "silu": r, "prelu": r}[act] if mode == "pre_act" else None
    gradient = (
        torch.randn_like(y),
        h if mode == "pre_norm" else None,
        h if mode == "pre_norm" else x,
        z_source,
        w,
        b,
        slope,
        eps_weight,
        mean,
        rstd,
    )
    for needs in ((True, mode == "pre_act", True), (True, False, False)):
        opcheck(torch.ops.normfused.norm_act_backward.default, (*gradient, *static, *needs))


@pytest.mark.parametrize("mode", [None, "pre_act"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_steps(name, mode):
    x, r = torch.randn(3, 4, 3, 2), torch.randn(3, 4, 3, 2)
    scale, shift, slope = torch.rand(3, 4), torch.rand(3, 4), torch.rand(4)
    static = ("prelu", 0.0, 0.0, mode, name)
    opcheck(torch.ops.normfused.moments.default, (x, name))
    mean, _ = torch.ops.normfused.moments(x, name)
    opcheck(torch.ops.normfused.apply.default, (x, r if mode else None, scale, shift, slope, *static))
    source, factor = (r, torch.rand(1)) if mode else (None, None)
    for need_y in (True, False):  # with a second output, and with it alone
        opcheck(torch.ops.normfused.apply.default, (x, source, scale, shift, slope, *static, factor, torch.rand(3, 4), need_y))
    gradient = (torch.randn_like(x), x, source, mean, scale, shift, slope)
    opcheck(torch.ops.normfused.grad_moments.default, (*gradient, *static))
    opcheck(torch.ops.normfused.grad_moments.default, (*gradient, *static, factor, torch.randn_like(x), None if mode else r))
    for needs in ((True, mode is not None), (True, False)):
        last = (scale, torch.rand(3, 4), torch.rand(3, 4), *static, *needs)
        opcheck(torch.ops.normfused.grad_apply.default, (*gradient, *last))
        opcheck(torch.ops.normfused.grad_apply.default, (*gradient, *last, factor, torch.randn_like(x)))
    for message, call in (
        (
            "residual_scale needs residual_mode 'pre_act', got None",
            (x, None, scale, shift, slope, "relu", 0.0, 0.0, None, name, scale[0, :1]),
        ),
        ("residual_scale must have one value, got shape (3, 4)", (x, r, scale, shift, slope, "relu", 0.0, 0.0, "pre_act", name, scale)),
        (
            "shift_after must be given where y is not needed",
            (x, r, scale, shift, slope, "relu", 0.0, 0.0, "pre_act", name, None, None, False),
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(f"apply: {message}")):
            torch.ops.normfused.apply(*call)
