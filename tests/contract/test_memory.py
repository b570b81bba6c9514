"""What autograd keeps: on the fused path x, the moments, and with a residual before the activation y or the residual; on the torch
backend never more than the torch.nn chain (norm, add, activation).

Bytes are counted with saved-tensor hooks, by storage. Parameters and buffers are not counted, inputs and y are, by name.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normfused as nf
from normfused import ops
from normfused.activations import ACTIVATIONS, Activation, module_of

from ..conftest import EMULATED

SHAPE = (2, 8, 12, 12)
# the path that saves x and the moments; the reference takes it on every machine
FUSED = "cuda" if EMULATED else "reference"
MODES = (None, "pre_act", "post_act")
NORMS = {
    "batch": (lambda **k: nf.BatchNormAct2d(8, **k), lambda: nn.BatchNorm2d(8)),
    "instance": (lambda **k: nf.InstanceNormAct2d(8, affine=True, **k), lambda: nn.InstanceNorm2d(8, affine=True)),
    "group": (lambda **k: nf.GroupNormAct(2, 8, **k), lambda: nn.GroupNorm(2, 8)),
    "layer": (lambda **k: nf.LayerNormAct(12, **k), lambda: nn.LayerNorm(12)),
    "layer dim=1": (lambda **k: nf.LayerNormAct(8, dim=1, **k), lambda: _Permuted(nn.LayerNorm(8))),
    "rms": (lambda **k: nf.RMSNormAct(12, **k), lambda: nn.RMSNorm(12)),
    "frn": (lambda **k: nf.FilterResponseNorm2d(8, tlu=False, **k), lambda: _PlainFRN()),
}


class _Permuted(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _PlainFRN(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(1, 8, 1, 1)), nn.Parameter(torch.zeros(1, 8, 1, 1))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean((2, 3), keepdim=True) + 1e-6) * self.weight + self.bias


def saved(call, x, r, module):
    """(bytes by name of the storages kept, y): 'x', 'r', 'y' or 'other'."""
    held = {}

    def pack(t):
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    for t in (*module.parameters(), *module.buffers()):
        held.pop(t.untyped_storage().data_ptr(), None)
    named = {}
    for name, t in (("x", x), ("r", r), ("y", y)):
        size = held.pop(t.untyped_storage().data_ptr(), None) if t is not None else None
        if size is not None:
            named[name] = size
    named["other"] = sum(held.values())
    return named, y


def tensors(dtype, layout=torch.contiguous_format):
    x, r = (torch.randn(SHAPE).to(dtype).to(memory_format=layout).requires_grad_() for _ in range(2))
    return x, r


def activation_module(name, norm):
    return module_of(name, 12 if norm in ("layer", "rms") else 8)


class _PlainTLU(nn.Module):
    """As it is written elsewhere; torch has none."""

    def __init__(self, norm):
        super().__init__()
        self.tau = nn.Parameter(torch.zeros(12) if norm in ("layer", "rms") else torch.zeros(1, 8, 1, 1))

    def forward(self, x):
        return torch.max(x, self.tau)


@pytest.mark.triton_surface
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("act", ["identity", "relu", "silu", "softplus", "prelu"])
@pytest.mark.parametrize("norm", NORMS)
def test_fused_saves_x_and_moments(norm, act, mode, request):
    _fused(norm, act, mode, "triton" if request.config.getoption("-m") == "triton_surface" else FUSED)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_fused_saves_x_and_moments_every_activation(norm, act, mode):
    _fused(norm, act, mode, FUSED)


def _fused(norm, act, mode, backend):
    layer = NORMS[norm][0](act=activation_module(act, norm), residual_mode=mode or "pre_act", backend=backend)
    x, r = tensors(torch.float32)
    named, _ = saved(lambda: layer(x, r if mode else None), x, r, layer)
    tensor_bytes = x.numel() * 4
    expected = {"x": tensor_bytes}
    mask = 0
    if mode == "pre_act" and act != "identity":
        activation = Activation(act, *ACTIVATIONS[act])
        # rows of 12 or 144 float32 are whole vectors; the Triton kernels of position sets have no mask
        if activation.has_two_slopes and (backend == "cuda" or (backend == "triton" and not norm.startswith(("layer", "rms")))):
            mask = tensor_bytes // 16  # a byte for every 16 of x
        else:
            expected["y" if backend != "cuda" and activation.derivative_from_y(torch.float32) else "r"] = tensor_bytes
    moments = named.pop("other") - mask
    assert named == expected
    # two float32 numbers a set; the smallest set has 8 elements
    assert 0 <= moments <= 2 * 4 * x.numel() // 8


@pytest.mark.parametrize("backend", [FUSED])
def test_pre_norm_saves_h(backend):
    layer = nf.RMSNormAct(12, residual_mode="pre_norm", backend=backend)
    x, r = tensors(torch.float32)
    named, (_, h) = saved_pair(layer, x, r)
    assert named == {"h": x.numel() * 4}
    assert h.shape == x.shape


def saved_pair(layer, x, r):
    held = {}

    def pack(t):
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pair = layer(x, r)
    named = {"h": held.pop(pair[1].untyped_storage().data_ptr())}
    for t in (x, r, pair[0]):
        if t.untyped_storage().data_ptr() in held:
            named["unexpected"] = 1
    return named, pair


@pytest.mark.parametrize("own_steps", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
def test_torch_backend_saves_no_more_than_the_chain(norm, mode, dtype, layout, own_steps, monkeypatch):
    if own_steps:
        monkeypatch.setattr(ops, "_FRN_ELEMENTS", 0)
        monkeypatch.setattr(ops, "_CHANNELS_LAST_ELEMENTS", 0)
    make, plain = NORMS[norm]
    for act in ACTIVATIONS:
        layer = make(act=activation_module(act, norm), residual_mode=mode or "pre_act", backend="torch").to(dtype)
        activation = _PlainTLU(norm) if act == "tlu" else activation_module(act, norm) or nn.Identity()
        chain, activation = plain().to(dtype), activation.to(dtype)

        def run_chain(x, r, chain=chain, activation=activation):
            z = chain(x)
            z = z + r if mode == "pre_act" else z
            y = activation(z)
            return y + r if mode == "post_act" else y

        x, r = tensors(dtype, layout)
        ours, _ = saved(lambda layer=layer, x=x, r=r: layer(x, r if mode else None), x, r, layer)
        x, r = tensors(dtype, layout)
        both = nn.ModuleList([chain, activation])
        theirs, _ = saved(lambda x=x, r=r, run_chain=run_chain: run_chain(x, r), x, r, both)
        # statistics in two float32 numbers a channel or set are noise beside the tensors
        slack = 2 * 4 * x.numel() // 8 + 64
        assert sum(ours.values()) <= sum(theirs.values()) + slack, f"{act}: {ours} against {theirs}"
