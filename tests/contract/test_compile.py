"""torch.compile without graph breaks, the switch between operators and ATen, and the operators' own checks."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch._inductor import async_compile, compile_fx, metrics
from torch.library import opcheck

import normfused as nf
from normfused.activations import IDENTITY
from normfused.problem import Problem

from ..conftest import EMULATED
from ..support.cases import covering

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


FORMATS = {"layout": [torch.contiguous_format, torch.channels_last]}


@covering({"key": list(LAYERS), "name": NAMES, "compiler": ["aot_eager", "eager"], **FORMATS})
def test_fullgraph(key, name, compiler, layout):
    _compiled_like_eager(LAYERS[key], name, compiler, layout)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["batch, cumulative average", "group"])
def test_inductor(key, name):
    _compiled_like_eager(LAYERS[key], name, "inductor", torch.contiguous_format)


@pytest.mark.skipif(EMULATED, reason="of the torch backend")
def test_inductor_takes_centred_sums():
    """Eager mode shields ATen's channels_last kernel from a large mean; in compiled code nobody does."""
    torch._dynamo.reset()
    layer, x = nf.GroupNormAct(2, 4), (torch.randn(2, 4, 9, 7) + 1000).to(memory_format=torch.channels_last)
    want = torch.nn.functional.group_norm(x.double(), 2)
    assert float((torch.compile(layer, fullgraph=True)(x) - want).abs().max()) < 1e-3


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


# ------------------------------------------------------------------------------------------------- the switch
class Recorder:
    """A compiler that runs what Dynamo gives it and keeps it."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph

    def ours(self):
        """Operators of this package in the last graph and in the graphs it holds."""
        graphs = [m for m in self.graphs[-1].modules() if isinstance(m, fx.GraphModule)]
        return {str(n.target) for g in graphs for n in g.graph.nodes if n.op == "call_function" and "normfused" in str(n.target)}


def converted():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.SiLU())
    nf.fuse_norms(model)
    return model


# name -> layer, whether it takes a residual
SWITCHED = {
    "batch": (lambda: nf.BatchNormAct2d(4, act="relu"), True),
    "layer dim=1": (lambda: nf.LayerNormAct(4, dim=1, act="gelu"), False),
    "rule in PyTorch": (lambda: nf.BatchInstanceNormAct2d(4, act="relu"), True),
    "synchronized": (lambda: nf.SyncBatchNormAct(4, act="relu"), False),
    "converted": (converted, False),
}


def differentiated(layer, *inputs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    layer.zero_grad()
    y = layer(*leaves)
    y.square().sum().backward()
    return y.detach(), *(t.grad for t in leaves), *(p.grad for p in layer.parameters()), *layer.buffers()


def same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("make", "takes_residual"), SWITCHED.values(), ids=SWITCHED)
def test_the_mode_decides_what_a_graph_holds(make, takes_residual):
    """One compiled layer: each change of the mode compiles anew, none changes a number."""
    torch._dynamo.reset()
    layer = make()
    twin, seen = copy.deepcopy(layer), Recorder()
    compiled = torch.compile(twin, fullgraph=True, backend=seen)
    for compilations, mode in enumerate(("opaque", "decompose"), 1):
        inputs = [torch.randn(3, 4, 3, 2) for _ in range(1 + takes_residual)]
        with nf.compile_mode(mode):
            for _ in range(2):
                same(differentiated(compiled, *inputs), differentiated(layer, *inputs))
        assert len(seen.graphs) == compilations
        assert bool(seen.ours()) == (mode == "opaque")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_goes_by_the_backend(dtype):
    """Opaque where a backend of ours runs, on every version of torch: Dynamo's `is_exporting` is not believed."""
    x = torch.randn(3, 4, 3, 2).to(dtype)
    for name, mode in (("torch", "decompose"), ("cuda" if EMULATED else "reference", "opaque")):
        torch._dynamo.reset()
        layer, seen = nf.GroupNormAct(2, 4, act="silu", backend=name).to(dtype).eval(), Recorder()
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=seen)(x), layer(x))
        assert bool(seen.ours()) == (mode == "opaque")
        explanation = nf.explain(layer, x)
        assert explanation.compiled == mode and f"compiled: {mode}" in str(explanation)
    with nf.compile_mode("decompose"):
        assert nf.explain(layer, x).compiled == "decompose"
    assert nf.explain(nf.InputBias(4), x).compiled == "decompose"
    assert nf.explain(nf.GroupNormAct(2, 4, memory_efficient=True), torch.randn(3, 4, 3, 2)).compiled == "opaque"


def test_modes_are_known_and_put_back(monkeypatch):
    assert nf.get_compile_mode() == "auto"
    with pytest.raises(ValueError, match="set_compile_mode: mode must be one of auto, opaque, decompose, got 'fused'"):
        nf.set_compile_mode("fused")
    with pytest.raises(RuntimeError, match="inside"), nf.compile_mode("opaque"):
        assert nf.get_compile_mode() == "opaque"
        raise RuntimeError("inside")
    assert nf.get_compile_mode() == "auto"
    monkeypatch.setattr(nf.compiling, "_mode", "fused")  # as from the environment
    with pytest.raises(ValueError, match="NORMFUSED_COMPILE_MODE: mode must be one of"):
        nf.explain(nf.BatchNormAct2d(4), torch.randn(2, 4, 3, 3))


FRESH = """
import torch, normfused as nf
assert nf.get_compile_mode() == "opaque"
layer = nf.BatchNormAct2d(4, act="relu", backend={backend!r})
y = torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3))
y.sum().backward()
assert layer.weight.grad is not None
"""


def test_first_use_of_the_library_is_in_compiled_code():
    """Nothing is imported or loaded inside a compiled region; the environment selects the mode."""
    code = FRESH.format(backend="cuda" if EMULATED else "reference")
    environment, root = os.environ | {"NORMFUSED_COMPILE_MODE": "opaque"}, Path(nf.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_backend_that_cannot_run_says_so_in_compiled_code():
    torch._dynamo.reset()
    layer = nf.BatchNormAct2d(4, backend="triton")
    x = torch.randn(2, 4, 3, 3)
    with pytest.raises(Exception, match="backend 'triton' was asked for and cannot run"):
        torch.compile(layer, fullgraph=True, backend=Recorder())(x)


STATIC = {
    "batch": ("channel", "standard", 1, True, 1e-5, None),
    "frozen": ("channel", "standard", 1, False, 1e-5, 0.1),
    "group": ("sample_group", "standard", 2, True, 1e-5, 0.1),
    "frn": ("sample_group", "rms", 4, True, 1e-5, 0.1),
    "layer": ("position", "standard", 1, True, 1e-5, 0.1),
}


@covering(
    {"norm": list(STATIC), "mode": [None, "pre_act", "pre_norm"], "name": NAMES, "act": ["silu", "prelu", "relu"], **FORMATS},
    lambda row: row["mode"] != "pre_norm" or row["norm"] == "layer",
)
def test_opcheck_whole_norms(norm, name, act, mode, layout):
    x, r = (torch.randn(3, 4, 3, 2).to(memory_format=layout) for _ in range(2))
    w, b, slope = torch.rand(4), torch.rand(4), torch.rand(4) if act == "prelu" else None
    rule_weight = torch.rand(4) if norm == "frn" else None
    running = (torch.zeros(4), torch.ones(4), torch.tensor(0)) if norm in ("batch", "frozen") else (None, None, None)
    static = (*STATIC[norm], act, 0.0, 0.0, mode, name)
    arguments = (x, r if mode else None, w, b, slope, rule_weight, *running, *static)
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
        rule_weight,
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


# ------------------------------------------------------------------------------- what Inductor makes of a decomposed norm
@dataclass
class Work:
    """What Inductor generated: kernels and the bytes they read and write, forward and backward, and bytes kept in between."""

    kernels: list[int]
    bytes: list[int]
    saved: int
    mutated_other_than_buffers: int = 0


def work_of(network, *inputs):
    """Of a training step. Kernels are generated, not compiled: calling them does nothing."""
    work = Work([], [], 0)
    known = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    kept = {}

    def compiled(graph, example_inputs, **options):
        metrics.reset()
        done = compile_fx.compile_fx_inner(graph, example_inputs, **options)
        work.kernels.append(metrics.generated_kernel_count)
        work.bytes.append(metrics.num_bytes_accessed)
        work.mutated_other_than_buffers += len(set(done.mutated_input_idxs) - set(options["static_input_idxs"]))
        return done

    def keep(t):
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    torch._dynamo.reset()
    run = torch.compile(network, fullgraph=True, dynamic=False, backend=partial(compile_fx.compile_fx, inner_compile=compiled))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = run(*(t.clone().requires_grad_() for t in inputs))
    work.saved = sum(kept.values())
    y.sum().backward()
    return work


@pytest.fixture
def generated_only(monkeypatch):
    """Inductor without its C++ compiler and its cache, counting bytes."""
    log = compile_fx.inductor_metrics_log
    monkeypatch.setattr(async_compile.AsyncCompile, "cpp_pybinding", lambda *arguments, **options: lambda *tensors: None)
    monkeypatch.setattr(log, "disabled", False)
    monkeypatch.setattr(log, "isEnabledFor", lambda level: True)  # what counting the bytes goes by
    monkeypatch.setattr(log, "info", lambda *message: None)
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


class Residual(nn.Module):
    """relu(bn(x) + r)."""

    def __init__(self, channels):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x, r):
        return torch.relu(self.bn(x) + r)


# name -> torch's network, ours
PAIRS = {
    "batch + relu": (lambda: nn.Sequential(nn.BatchNorm2d(16), nn.ReLU()), lambda: nf.BatchNormAct2d(16, act="relu")),
    "batch + add + relu": (lambda: Residual(16), lambda: nf.BatchNormAct2d(16, act="relu")),
    "group + silu": (lambda: nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU()), lambda: nf.GroupNormAct(4, 16, act="silu")),
}


@pytest.mark.skipif(EMULATED, reason="of the torch backend")
@pytest.mark.parametrize(("theirs", "ours"), PAIRS.values(), ids=PAIRS)
def test_inductor_makes_no_more_of_ours_than_of_torch(theirs, ours, generated_only):
    network = theirs()
    inputs = torch.randn(2 if isinstance(network, Residual) else 1, 4, 16, 24, 24).unbind()
    wanted, got = work_of(network, *inputs), work_of(ours(), *inputs)
    assert len(got.kernels) == len(wanted.kernels) == 2
    assert got.kernels <= wanted.kernels and got.saved <= wanted.saved
    assert all(a <= b for a, b in zip(got.bytes, wanted.bytes, strict=True)), (got, wanted)
    assert got.mutated_other_than_buffers == 0


@pytest.mark.parametrize("mode", ["opaque", "decompose"])
def test_nothing_keeps_a_compiled_step_out_of_a_cuda_graph(mode, generated_only):
    """CUDA graph trees skip graphs that write into inputs other than parameters and buffers; the host is never asked (fullgraph)."""
    layer = nf.BatchNormAct2d(16, momentum=None, act="relu", backend="cuda" if EMULATED else "reference")
    with nf.compile_mode(mode):
        assert work_of(layer, *torch.randn(2, 4, 16, 24, 24)).mutated_other_than_buffers == 0


def test_a_problem_can_be_made_in_compiled_code():
    """Dynamo of torch 2.11 wraps the defaults of a dataclass that it meets, and knows no objects there."""
    defaults = [f.default for f in fields(Problem) if f.default is not MISSING]
    assert all(isinstance(value, (type(None), bool, int, float, str)) for value in defaults), defaults
    assert Problem("channel", "standard", 1, 1, 1, 1, "nchw", torch.float32, torch.device("cpu")).act == IDENTITY
