"""torch.export and ONNX: networks of all layers become standard operators with the same results."""

from __future__ import annotations

import copy
import importlib.util
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import normfused as nf

C = 8
# every public layer, the residual modes and every activation between them
LAYERS = {
    "batch": lambda: nf.BatchNormAct2d(C, act="relu"),
    "group": lambda: nf.GroupNormAct(2, C, act="silu"),
    "instance": lambda: nf.InstanceNormAct2d(C, affine=True, act=("leaky_relu", {"negative_slope": 0.2})),
    "instance, tracked": lambda: nf.InstanceNormAct2d(C, track_running_stats=True, act="hardswish"),
    "layer": lambda: nf.LayerNormAct(5, act="gelu"),
    "layer dim=1": lambda: nf.LayerNormAct(C, dim=1, act="gelu_tanh", residual_mode="post_act"),
    "layer, sum first": lambda: nf.LayerNormAct(C, dim=1, residual_mode="pre_norm"),
    "rms": lambda: nf.RMSNormAct((6, 5), act="tanh"),
    "rms dim=1": lambda: nf.RMSNormAct(C, dim=1, act="prelu", residual_mode="post_act"),
    "filter response": lambda: nf.FilterResponseNorm2d(C, learnable_eps=True),
    "synchronized": lambda: nf.SyncBatchNormAct(C, act="elu"),
    "renorm": lambda: nf.BatchRenormAct2d(C, act="relu6"),
    "batch-instance": lambda: nf.BatchInstanceNormAct2d(C, act="mish"),
    "switchable": lambda: nf.SwitchNormAct2d(C, act="softplus"),
    "mean-only": lambda: nf.MeanOnlyBatchNormAct2d(C, act="sigmoid"),
    "eval": lambda: nf.EvalNorm2d(C, act="hardsigmoid"),
    "whitening": lambda: nf.IterNorm2d(C, act="leaky_relu"),
    "frozen": lambda: nf.FrozenBatchNormAct2d(C, act="relu"),
    "batch, from y": lambda: nf.BatchNormAct2d(C, act="leaky_relu", memory_efficient=True),
    "input bias": lambda: nf.InputBias(C, act="relu"),
    "rescaled": lambda: nf.RescaledResidual(1, 4),
}
WITHOUT_RESIDUAL = ("batch, from y", "input bias")
IN_ONNX = ("batch", "group", "instance", "layer dim=1", "layer, sum first", "rms", "filter response", "switchable", "eval", "whitening")


class Network(nn.Module):
    """The layers one after the other, each with the network's input as its residual if it takes one."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LAYERS[name]() for name in names)
        self.takes_residual = [name not in WITHOUT_RESIDUAL for name in names]

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer, takes_residual in zip(self.layers, self.takes_residual, strict=True):
            y = layer(y, x) if takes_residual else layer(y)
            if isinstance(y, tuple):
                y = y[0] + y[1]
        return y


TRACED = [name for name in LAYERS if name not in ("input bias", "rescaled")]


@pytest.mark.parametrize("name", TRACED)
def test_tracers_whose_sizes_are_no_ints(name: str) -> None:
    """A symbolic make_fx and torch.jit.trace (TensorBoard's add_graph, counters of operations), replayed at another batch size."""
    layer = LAYERS[name]().eval()
    inputs = [torch.randn(2, C, 6, 5) for _ in range(1 if name in WITHOUT_RESIDUAL else 2)]
    larger = [torch.cat([x, x + 1]) for x in inputs]
    state = {name: t.detach() for name, t in (*layer.named_parameters(), *layer.named_buffers())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jit is deprecated, and says which branches it cannot see
        traced = torch.jit.trace(layer, tuple(inputs), check_trace=False)  # its second look is without gradients, where other paths run
    graph = make_fx(lambda s, *given: functional_call(layer, s, given), tracing_mode="symbolic")(state, *inputs)
    torch.testing.assert_close(traced(*larger), layer(*larger))
    torch.testing.assert_close(graph(state, *larger), layer(*larger))


def network(names: tuple[str, ...]) -> Network:
    """With statistics and parameters that are not those of the start."""
    made = Network(names)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.rand_like(parameter) / 4)
        made(torch.randn(4, C, 6, 5))
    return made


def operators(program: torch.export.ExportedProgram) -> set[str]:
    """Namespaces of all operators that are called, and names of those that call a graph."""
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [n.target for graph in graphs for n in graph.nodes if n.op == "call_function"]
    return {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)} | {
        t.name() for t in targets if isinstance(t, torch._ops.HigherOrderOperator)
    }


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_exported_programs_are_made_of_aten_operators(training: bool, strict: bool) -> None:
    """Every layer; in training with the running statistics, whatever the mode of compiled code is."""
    model = network(tuple(LAYERS)).train(training)
    x = torch.randn(3, C, 6, 5)
    with nf.compile_mode("opaque"):
        program = torch.export.export(model, (x,), strict=strict)
    assert operators(program) - {"wrap_with_set_grad_enabled"} == {"aten"}  # torch's form of no_grad, gone in inference
    assert operators(program.run_decompositions()) == {"aten"}
    exported, eager = program.module(), copy.deepcopy(model)
    torch.testing.assert_close(exported(x), eager(x))
    buffers = dict(eager.named_buffers())
    for name, got in exported.named_buffers():  # a program keeps those that it uses
        torch.testing.assert_close(got, buffers[name], msg=lambda m, name=name: f"{name}: {m}")


def test_onnx_gives_the_same_in_onnxruntime() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    import onnxruntime

    model = network(IN_ONNX).eval()
    x = torch.randn(3, C, 6, 5)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    assert {node.domain for node in program.model.graph.all_nodes()} == {""}  # ONNX's own operators
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-5)
