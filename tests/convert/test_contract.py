"""What must not change in a conversion, and networks that are wrapped, scripted, quantized, lazy or parametrized."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normfused as nf
from normfused.convert import Row
from tests.convert.blocks import FunctionalBlock, TimmBlock, VisionBlock
from tests.convert.check import moved, near, run, same_after_conversion

X = torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def small(act: nn.Module | None = None) -> nn.Sequential:
    return moved(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act or nn.SiLU()))  # type: ignore[return-value]


def test_everything_of_a_module_stays() -> None:
    model = small()
    norm = model[1]
    norm.weight.requires_grad_(False)
    norm.eval()
    norm.qconfig, norm.momentum, norm.mine = "qconfig", None, [1]
    calls: list[str] = []
    norm.register_forward_pre_hook(lambda m, i: calls.append("pre"))
    norm._register_state_dict_hook(lambda m, state, prefix, meta: calls.append("saved"))
    norm.register_load_state_dict_post_hook(lambda m, keys: calls.append("loaded"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wanted = run(copy.deepcopy(model), (X,))
    nf.fuse_norms(model)
    assert model[1] is norm and type(norm) is nf.BatchNormAct2d and isinstance(norm, nn.BatchNorm2d)
    assert not norm.weight.requires_grad and not norm.training and model.training
    assert (norm.qconfig, norm.momentum, norm.mine) == ("qconfig", None, [1])
    calls.clear()
    near(run(model, (X,)), wanted)
    model.load_state_dict(model.state_dict())
    assert calls == ["pre", "saved", "loaded"]
    model(X).sum().backward()
    before = norm.bias.detach().clone()
    optimizer.step()
    assert not torch.equal(before, norm.bias) and "act=silu" in repr(model) and "fused into the norm before" in repr(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types_and_formats(dtype: torch.dtype) -> None:
    """Half networks with half or float32 norms, channels_last: as near to the network in float64 as roundings allow."""
    for half_norm in (True, False):
        model = VisionBlock(4).to(dtype).to(memory_format=torch.channels_last)
        if not half_norm:
            for m in model.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.float()
        fused = copy.deepcopy(model)
        nf.fuse_norms(fused)
        x = X.to(dtype).to(memory_format=torch.channels_last)
        exact = copy.deepcopy(model).double().eval()(x.double())
        got, wanted = fused.eval()(x.clone()), model.eval()(x.clone())
        assert got.dtype == dtype and got.stride() == wanted.stride()
        bound = (
            8 * torch.finfo(dtype).eps * float(exact.detach().abs().max())
        )  # three convolutions and three norms, half an eps each, and slack 2
        assert float((got.double() - exact).detach().abs().max()) <= bound
        assert [p.dtype for p in fused.parameters()] == [p.dtype for p in model.parameters()]


def test_meta_and_devices() -> None:
    with torch.device("meta"):
        model = nn.Sequential(VisionBlock(4), nn.GroupNorm(2, 4), nn.PReLU(4))
    nf.fuse_norms(model)
    assert model(torch.empty(2, 4, 5, 5, device="meta")).shape == (2, 4, 5, 5)
    model.to_empty(device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"} and model[1].act.weight is model[2].weight


def test_a_copy_on_request() -> None:
    model = small()
    report = nf.fuse_norms(model, inplace=False)
    assert type(model[1]) is nn.BatchNorm2d and type(report.model[1]) is nf.BatchNormAct2d
    near(run(report.model, (X,)), run(model, (X,)))


def test_parameters_of_activations_are_shared() -> None:
    """A PReLU's weight stays at its place and is the one the norm uses: loaded, replaced for a call, trained, cast."""
    model = small(nn.PReLU(4))
    nf.fuse_norms(model)
    assert "2.weight" in model.state_dict() and model[1].act.weight is model[2].weight
    model.load_state_dict({**model.state_dict(), "2.weight": torch.full((4,), 7.0)})
    assert float(model[1].act.weight[0]) == 7
    zero = {k: torch.zeros_like(v) if k == "2.weight" else v for k, v in model.named_parameters()}
    assert float(torch.func.functional_call(model, zero, (X,)).min()) == 0
    run(model, (X,)).sum().backward()
    assert float(model[2].weight.grad.abs().sum()) > 0
    assert model.float()[1].act.weight.dtype == torch.float32


def test_further_calls_add_what_was_left_out() -> None:
    model = small()
    assert not nf.fuse_norms(model, acts=None).fused
    assert [r.act for r in nf.fuse_norms(model).rows] == ["silu"]
    block = moved(FunctionalBlock(4))
    wanted = run(copy.deepcopy(block), (X,))
    nf.fuse_norms(block, residual=False)
    report = nf.fuse_norms(block)
    assert [(r.act, r.residual) for r in report.rows] == [("", False), ("relu", True), ("", False)]
    near(run(block, (X,)), wanted)
    nf.unfuse_norms(block)
    assert type(block) is FunctionalBlock and type(block.bn1) is nn.BatchNorm2d
    near(run(block, (X,)), run(block, (X,)))


def test_double_backward_and_one_class_for_equal_blocks() -> None:
    model = moved(nn.Sequential(TimmBlock(4), TimmBlock(4)))
    nf.fuse_norms(model)
    assert type(model[0]) is type(model[1]) is not TimmBlock and isinstance(model[0], TimmBlock)
    assert type(model[0]).__name__ == "TimmBlock" and "normfused" in type(model[0]).forward.__code__.co_filename
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    g.square().sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


# ------------------------------------------------------------------------------------------------- special networks
def note_of(model: nn.Module) -> str:
    report = nf.fuse_norms(model)
    assert report.converted == [] and len(report.skipped) == len(report.rows) == 1, report
    return report.rows[0].note


def test_norms_that_stay_and_why() -> None:
    assert "run one batch first" in note_of(nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU()))
    assert "parametrized" in note_of(nn.Sequential(parametrizations.weight_norm(nn.GroupNorm(2, 4), dim=0)))
    assert "TorchScript" in note_of(torch.jit.script(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())))
    assert "momentum=None" in note_of(nn.Sequential(nn.InstanceNorm2d(4, momentum=None, track_running_stats=True)))
    assert "already" in note_of(nn.Sequential(nf.BatchNormAct2d(4, act="relu")))
    patched = nn.BatchNorm2d(4)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    assert "replaced on the object" in note_of(nn.Sequential(patched))
    lazy = nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU())
    lazy(torch.randn(2, 4, 3, 3))
    assert len(nf.fuse_norms(lazy).fused) == 1


def test_quantization_modules_are_left() -> None:
    from torch.ao.nn.intrinsic import qat
    from torch.ao.quantization import get_default_qat_qconfig

    model = nn.Sequential(qat.ConvBn2d(4, 4, 1, qconfig=get_default_qat_qconfig("fbgemm")))
    assert "quantization" in note_of(model)
    quantized = nn.Sequential(torch.ao.nn.quantized.BatchNorm2d(4))
    assert "subclass" in note_of(quantized) or "quantization" in note_of(quantized)


def test_compiled_and_wrapped_models() -> None:
    model = moved(TimmBlock(4)).eval()
    wanted = run(model, (X,))
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    near(run(compiled, (X,)), wanted)
    report = nf.fuse_norms(compiled)
    assert "Fuse before compiling" in report.notes[0] and [r.name for r in report.rows] == ["_orig_mod.bn1", "_orig_mod.bn2"]
    assert [r.act for r in report.rows] == ["relu", "relu"]
    near(run(compiled, (X,)), wanted)
    nf.unfuse_norms(compiled)
    near(run(compiled, (X,)), wanted)


def test_distributed_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = moved(TimmBlock(4))
        ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        report = nf.fuse_norms(ddp)
        assert [(r.name, r.act) for r in report.rows] == [("module.bn1", "relu"), ("module.bn2", "relu")]
        for m in (model, ddp):
            run(m, (X,)).square().mean().backward()
        near([p.grad for p in ddp.parameters()], [p.grad for p in model.parameters()])
    finally:
        torch.distributed.destroy_process_group()


def test_swa_and_weight_decay_lists_find_the_norms() -> None:
    from torch.optim.swa_utils import AveragedModel, update_bn

    model = small()
    nf.fuse_norms(model)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    update_bn([X, X], averaged)
    assert type(averaged.module[1]) is nf.BatchNormAct2d and int(averaged.module[1].num_batches_tracked) == 2


# ------------------------------------------------------------------------------------------------- report and errors
def test_report_with_and_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    report = nf.fuse_norms(nn.Sequential(TimmBlock(4), nn.BatchNorm2d(4), nn.Softmax(1)))
    assert report.rows[1] == Row("0.bn2", "BatchNorm2d", "BatchNormAct2d", "relu", True)
    text = str(report)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    for shown in (text, str(report)):
        assert all(
            part in shown
            for part in ("0.bn2", "BatchNormAct2d", "relu", "yes", "3 of 3 norms converted, 2 with their activation, 1 of these")
        )
    assert "━" in text and "━" not in str(report)
    assert str(nf.fuse_norms(nn.Linear(2, 2))) == "fuse_norms(Linear): no norms found"


def test_errors_say_what_must_hold() -> None:
    model = small()
    for options, message in (
        ({"kinds": ["batch"]}, "kinds must be among bn, in, gn, ln, rms, frn, got"),
        ({"kinds": "bn"}, "kinds must be among"),
        ({"acts": "relu"}, "acts must be 'auto', None or a list of names, got 'relu'"),
        ({"acts": ["swoosh"]}, "acts must be among"),
        ({"backend": "gpu"}, "unknown backend 'gpu'"),
    ):
        with pytest.raises(ValueError, match=f"fuse_norms: {message}"):
            nf.fuse_norms(model, **options)  # type: ignore[arg-type]
    for function in (nf.fuse_norms, nf.unfuse_norms):
        with pytest.raises(TypeError, match="model must be a Module, got int"):
            function(3)  # type: ignore[arg-type]
    nf.fuse_norms(model)
    model[1].act = nn.Tanh()
    with pytest.raises(ValueError, match=r"the activation of 1 must be the one it was fused with, got Tanh\(\)"):
        nf.unfuse_norms(model)
    assert type(model[1]) is nf.BatchNormAct2d


def test_the_backend_is_handed_on() -> None:
    model = small()
    nf.fuse_norms(model, backend="reference")
    assert nf.explain(model[1], X).backend == "reference"
    assert not same_after_conversion(moved(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4, dtype=torch.float64), exported=False).rows


def test_a_residual_of_another_kind() -> None:
    """The add of a converted block falls back to what was written where the shapes or types do not fit, hooks and errors included."""

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor, r: Any) -> Tensor:
            return torch.relu(self.norm(x) + r)

    model = moved(Adds())
    plain = copy.deepcopy(model)
    nf.fuse_norms(model)
    for r in (X, 2, X[:, :1], X[0, 0, 0, 0], X.float(), X.expand_as(X)):
        near(model(X, r), plain(X, r))
    for m in (model, plain):
        with pytest.raises(RuntimeError, match="must match the size"):
            m(X, X[:, :, :2])
