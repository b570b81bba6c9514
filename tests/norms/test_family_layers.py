"""The layers of these norms as modules: checkpoints, statistics over steps, compile, export, copies, errors, and what belongs to each."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfused as nf
import normfused.functional as NF
from normfused import ops
from tests.conftest import EMULATED
from tests.support.cases import covering
from tests.support.check import DEVICE, data
from tests.support.family import EPS, whiten

NAMES = ["cuda"] if EMULATED else ["torch", "reference"]
LAYERS: dict[str, Any] = {
    "batch renorm": lambda **k: nf.BatchRenormAct2d(6, warmup_steps=1, r_max_step=4, d_max_step=3, **k),
    "batch instance": lambda **k: nf.BatchInstanceNormAct2d(6, **k),
    "switch": lambda **k: nf.SwitchNormAct2d(6, **k),
    "mean only": lambda **k: nf.MeanOnlyBatchNormAct2d(6, **k),
    "eval norm": lambda **k: nf.EvalNorm2d(6, batch_size=4, **k),
    "eval norm, estimated": lambda **k: nf.EvalNorm2d(6, estimate=True, **k),
    "newton": lambda **k: nf.IterNorm2d(6, 3, **k),
    "zca": lambda **k: nf.IterNorm2d(6, 2, method="zca", **k),
}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
SHAPE = (4, 6, 5, 3)


def step(layer: Any, x: Tensor, r: Tensor) -> list[Tensor]:
    leaf, shortcut = (t.detach().clone().requires_grad_() for t in (x, r))
    layer.zero_grad()
    y = layer(leaf, shortcut)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, shortcut.grad, *(p.grad for p in layer.parameters()), *(b.clone() for b in layer.buffers())]


def assert_like(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4)


# ------------------------------------------------------------------------------------------------------- compile, copies
@covering({"kind": list(LAYERS), "name": NAMES, "compiler": ["aot_eager", "aot_eager_decomp_partition"]})
def test_fullgraph(kind: str, name: str, compiler: str) -> None:
    """The second compiler computes again in the backward what it can, by then from statistics that have moved on."""
    make = LAYERS[kind]
    torch._dynamo.reset()
    layer = make(act="silu", backend=name)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend=compiler)
    for seed, training in ((0, True), (1, True), (2, False)):
        layer.train(training)
        twin.train(training)
        x, r = data(SHAPE, seed=seed), data(SHAPE, seed=seed + 9)
        want = step(layer, x, r)
        assert_like(step(compiled, x, r), want)


@layers
def test_export_is_made_of_aten_operators(make: Any) -> None:
    layer = make(act="relu").eval()
    x, r = data(SHAPE).cpu(), data(SHAPE, seed=1).cpu()
    program = torch.export.export(layer, (x, r))
    assert not [n for n in program.graph.nodes if "normfused" in str(n.target)]
    torch.testing.assert_close(program.module()(x, r), layer(x, r))


@layers
def test_copies_and_checkpoints(make: Any) -> None:
    """deepcopy, pickle, torch.save and the state dict give the same layer; half() and back keeps it working."""
    layer = make(act="prelu").to(DEVICE)
    x, r = data(SHAPE), data(SHAPE, seed=1)
    step(layer, x, r)
    other = make(act="prelu").to(DEVICE)
    other.load_state_dict(layer.state_dict())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False), other]
    for training in (True, False):
        want = step(layer.train(training), x, r)
        for twin in twins:
            for a, b in zip(step(twin.train(training), x, r), want, strict=True):
                assert torch.equal(a, b)
    half = copy.deepcopy(layer).half().train()
    y = half(x.half(), r.half())
    assert y.dtype == torch.float16
    assert torch.isfinite(y).all()
    assert all(b.dtype in (torch.float16, torch.int64) for b in half.buffers())
    assert "fused" in repr(layer)
    layer.reset_parameters()
    assert {n: t.tolist() for n, t in layer.state_dict().items() if n != "act.weight"} == {
        n: t.tolist() for n, t in make().state_dict().items()
    }


@pytest.mark.parametrize("kind", [nf.FilterResponseNorm2d, nf.FrozenBatchNormAct2d])
def test_copies_of_layers_without_statistics_of_the_batch(kind: Any) -> None:
    """As above; on meta and back; what is frozen has no parameters."""
    options: dict[str, Any] = {"learnable_eps": "channel"} if kind is nf.FilterResponseNorm2d else {"act": "silu"}
    layer = kind(6, **options)
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            t.uniform_(0.5, 1.5)
    x, other = data(SHAPE).cpu(), kind(6, **options)
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin(x), layer(x)) and torch.equal(twin.train(False)(x), layer(x))
        assert all(a is not b for a, b in zip(twin.state_dict().values(), layer.state_dict().values(), strict=True))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert copy.deepcopy(layer).to(dtype)(x.to(dtype)).dtype == dtype
    with torch.device("meta"):
        deferred = kind(6, **options)
    assert deferred(x.to("meta")).is_meta
    deferred = deferred.to_empty(device="cpu")
    deferred.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(deferred.state_dict().values(), kind(6, **options).state_dict().values(), strict=True))
    assert bool(list(layer.parameters())) == (kind is nf.FilterResponseNorm2d)


@layers
def test_empty_batch(make: Any, backend: str) -> None:
    """No samples, or samples of no positions; in training counted, and nothing else; the cumulative average too."""
    for training, shape, momentum in itertools.product((True, False), ((0, 6, 5, 3), (4, 6, 0, 3)), (0.1, None)):
        layer = make(momentum=momentum, backend=backend).to(DEVICE).train(training)
        before = copy.deepcopy(layer.state_dict())
        x = torch.empty(shape, device=DEVICE, requires_grad=True)
        y = layer(x)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == shape
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters() if p.grad is not None)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name] + (training and name == "num_batches_tracked")), name


@layers
def test_statistics_may_change_before_the_backward(make: Any) -> None:
    """A second forward, and a broadcast into the buffers."""
    for training in (True, False):
        layer = make(act="silu").to(DEVICE).train(training)
        x = data(SHAPE).requires_grad_()
        first = layer(x)
        (alone,) = torch.autograd.grad(first.square().sum(), x, retain_graph=True)
        layer.train()(2 * x.detach())
        for buffer in layer.buffers():
            buffer.copy_(torch.ones_like(buffer))
        (after,) = torch.autograd.grad(first.square().sum(), x)
        assert torch.equal(after, alone)


@layers
def test_a_composed_activation_and_autocast(make: Any) -> None:
    layer = make(act=torch.sin).to(DEVICE)
    x = data(SHAPE)
    torch.testing.assert_close(layer(x), make().to(DEVICE)(x).sin())
    if DEVICE == "cpu":
        plain = make()
        want = copy.deepcopy(plain)(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(plain(x), want)


def test_momentum_none_is_the_cumulative_average() -> None:
    batches = [data(SHAPE, seed=s) for s in range(4)]
    means = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    for layer in (
        nf.BatchRenormAct2d(6, momentum=None), nf.BatchInstanceNormAct2d(6, momentum=None), nf.SwitchNormAct2d(6, momentum=None),
        nf.MeanOnlyBatchNormAct2d(6, momentum=None), nf.EvalNorm2d(6, momentum=None, estimate=True), nf.IterNorm2d(6, momentum=None),
    ):  # fmt: skip
        layer.to(DEVICE)
        for b in batches:
            layer(b)
        torch.testing.assert_close(layer.running_mean.flatten(), means, atol=1e-5, rtol=1e-5)
        assert int(layer.num_batches_tracked) == 4


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dimensions(dims: int) -> None:
    shape = (4, 6, *[3] * dims)
    for stem in ("BatchRenormAct", "BatchInstanceNormAct", "SwitchNormAct", "MeanOnlyBatchNormAct", "EvalNorm", "IterNorm"):
        layer = getattr(nf, f"{stem}{dims}d")(6).to(DEVICE)
        assert layer(data(shape)).shape == shape
        if dims == 1 and stem != "BatchInstanceNormAct":
            assert layer(data((8, 6))).shape == (8, 6)
        with pytest.raises(ValueError, match="expected"):
            layer(data((4, 6, *[3] * (dims + 1))))


# ------------------------------------------------------------------------------------------------------- evaluation's passes
@pytest.mark.parametrize(
    "make",
    [
        lambda: nf.BatchRenormAct2d(6), lambda: nf.MeanOnlyBatchNormAct2d(6), lambda: nf.EvalNorm2d(6, alpha=0.0, beta=0.0),
        lambda: nf.BatchInstanceNormAct2d(6).requires_grad_(False), lambda: nf.IterNorm2d(6),
    ],
)  # fmt: skip
def test_evaluation_computes_no_moments_it_does_not_need(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make().to(DEVICE).eval()
    if EMULATED and not isinstance(layer, nf.IterNorm2d):
        layer.backend = "cuda"

    def refuse(*_: Any) -> Any:
        raise AssertionError("moments were computed")

    monkeypatch.setattr(ops, "slice_norm_act", refuse)
    x = data(SHAPE).requires_grad_()
    layer(x).sum().backward()


# ------------------------------------------------------------------------------------------------------- batch renorm
def test_batch_renorm_schedule() -> None:
    layer = nf.BatchRenormAct2d(6)

    def at(t: int) -> tuple[float, float]:
        layer.num_batches_tracked.fill_(t)
        return tuple(float(b) for b in layer.bounds())

    assert at(0) == at(5000) == (1.0, 0.0)
    assert at(15000) == pytest.approx((1 + 2 * 10000 / 35000, 2.5))
    assert at(25000) == pytest.approx((1 + 2 * 20000 / 35000, 5.0))
    assert at(40000) == at(10**6) == (3.0, 5.0)
    layer = nf.BatchRenormAct2d(6, warmup_steps=0, r_max_step=0, d_max_step=0, r_max=2.0, d_max=1.0)
    assert at(0) == (2.0, 1.0)
    layer = nf.BatchRenormAct2d(6, schedule=lambda t: (1.5, t * 0.5))
    assert at(3) == (1.5, 1.5)


def test_batch_renorm_averages_the_standard_deviation() -> None:
    """Half way from 1 to 3 is 2, not sqrt(5); plain batch norm while it warms up."""
    x = data((8, 6, 9, 9), torch.float64, mean=0)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), correction=0, keepdim=True) * (9 - 1e-5) ** 0.5
    layer = nf.BatchRenormAct2d(6, momentum=0.5).double().to(DEVICE)
    torch.testing.assert_close(layer(x), F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(layer.running_std, torch.full((6,), 2.0, dtype=torch.float64, device=DEVICE))


def test_from_batch_norm() -> None:
    bn = nf.BatchNormAct2d(6, eps=1e-3, act="relu").to(DEVICE)
    nn.init.uniform_(bn.weight)
    for seed in range(3):
        bn(data(SHAPE, seed=seed))
    bn.eval()
    x = data(SHAPE)
    for layer in (nf.BatchRenormAct2d.from_batch_norm(bn), nf.EvalNorm2d.from_batch_norm(bn)):
        assert not layer.training
        torch.testing.assert_close(layer(x), bn(x))
        assert int(layer.num_batches_tracked) == 3
        layer.weight.data.zero_()
    assert bn.weight.abs().max() > 0
    plain = nn.BatchNorm2d(6, dtype=torch.float64, momentum=0.3)
    layer = nf.EvalNorm2d.from_batch_norm(plain, batch_size=8, act="silu")
    assert layer.weight.dtype == torch.float64
    assert layer.momentum == 0.3
    assert float(layer.alpha) == 1 / 8
    renorm = nf.BatchRenormAct2d.from_batch_norm(plain, warmup_steps=0)
    torch.testing.assert_close(renorm.running_std, (plain.running_var + plain.eps).sqrt())
    for kind in (nf.BatchRenormAct2d, nf.EvalNorm2d):
        with pytest.raises(TypeError, match="must be given a batch norm layer, got GroupNorm"):
            kind.from_batch_norm(nn.GroupNorm(2, 6))
        with pytest.raises(ValueError, match="must keep running statistics"):
            kind.from_batch_norm(nn.BatchNorm2d(6, track_running_stats=False))


# ------------------------------------------------------------------------------------------------------- reference checkpoints
def test_reference_state_dicts() -> None:
    """Names and shapes as the reference implementations save them."""
    c = 6
    v = {n: torch.rand(c) for n in ("weight", "bias", "running_mean", "running_var", "running_std", "gate")}
    counter = {"num_batches_tracked": torch.tensor(7)}
    batch = {n: v[n] for n in ("weight", "bias", "running_mean", "running_var")}
    cases: list[tuple[nn.Module, dict[str, Tensor]]] = [
        (nf.BatchRenormAct2d(c), {n: v[n] for n in ("weight", "bias", "running_mean", "running_std")} | counter),
        (nf.BatchInstanceNormAct2d(c), batch | {"gate": v["gate"]} | counter),
        (nf.MeanOnlyBatchNormAct2d(c), {n: v[n] for n in ("bias", "running_mean")}),
        (nf.EvalNorm2d(c), batch | counter),
    ]
    for dims, kind in ((0, nf.SwitchNormAct1d), (2, nf.SwitchNormAct2d), (3, nf.SwitchNormAct3d)):
        k = 2 if dims == 0 else 3
        logits = {"mean_weight": torch.rand(k), "var_weight": torch.rand(k)}
        spread = {n: v[n].view(1, c, *[1] * dims) for n in ("weight", "bias")}
        running = {n: v[n].view(1, c, *[1] * min(dims, 1)) for n in ("running_mean", "running_var")}
        cases.append((kind(c), spread | running | logits))
    timm = {"weight": v["weight"], "bias": v["bias"], "tau": v["gate"]}
    cases += [(nf.FilterResponseNorm2d(c), timm), (nf.FilterResponseNorm2d(c), {n: t.view(1, c, 1, 1) for n, t in timm.items()})]
    cases.append(
        (nf.FilterResponseNorm2d(c, act="relu", learnable_eps=True), {n: v[n] for n in ("weight", "bias")} | {"eps_l": torch.rand(())})
    )
    cases.append((nf.InputBias(c), {"bias": v["bias"].view(1, c, 1, 1), "init_mean": v["gate"], "count": torch.tensor(1)}))
    cases.append((nf.FrozenBatchNormAct2d(c), dict(batch)))  # detectron2's and torchvision's
    spread = {n: v[n].view(1, c, 1, 1) for n in ("weight", "bias")}
    cases.append((nf.IterNorm2d(c, 3), spread | {"running_mean": torch.rand(2, 3, 1), "running_wm": torch.rand(2, 3, 3)}))
    for layer, state in cases:
        given = {n: t.clone() for n, t in state.items()}
        layer.load_state_dict(given)
        assert {n: t.shape for n, t in given.items()} == {n: t.shape for n, t in state.items()}
        for name, value in layer.state_dict().items():
            if name in state:
                assert torch.equal(value, state[name].reshape(value.shape)), name
        if not any(isinstance(layer, kind) for kind in (nf.EvalNorm2d, nf.InputBias)):  # and back, in our shapes, but for our counter
            assert set(layer.state_dict()) - {"num_batches_tracked"} == set(state) - {"num_batches_tracked"}
    with pytest.raises(RuntimeError, match="size mismatch"):
        nf.SwitchNormAct2d(c).load_state_dict({n: torch.rand(5) for n in nf.SwitchNormAct2d(c).state_dict()})


# ------------------------------------------------------------------------------------------------------- batch-instance
def test_gates() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nf.BatchInstanceNormAct2d(6), nf.BatchInstanceNormAct2d(6, affine=False))
    found = nf.gates(model)
    assert [id(g) for g in found] == [id(model[1].gate), id(model[2].gate)]
    assert all(g.bin_gate for g in nf.gates(copy.deepcopy(model)))
    groups = nf.gate_parameter_groups(model, lr=0.1)
    optimizer = torch.optim.SGD(groups, lr=1.0, weight_decay=0.5)
    others, own = optimizer.param_groups
    assert (others["lr"], others["weight_decay"], own["lr"], own["weight_decay"]) == (0.1, 0.5, 1.0, 0.0)
    assert len(others["params"]) + len(own["params"]) == len(list(model.parameters()))
    with torch.no_grad():
        found[0].copy_(torch.linspace(-1, 2, 6))
    nf.clamp_gates_(model)
    torch.testing.assert_close(found[0].detach(), torch.linspace(-1, 2, 6).clamp(0, 1))
    other = torch.tensor([3.0])
    nf.clamp_gates_([other])
    assert float(other) == 1
    nf.clamp_gates_(nn.ReLU())
    assert len(nf.gate_parameter_groups(nn.Conv2d(3, 6, 1), lr=0.1)) == 1
    layer = nf.BatchInstanceNormAct2d(6, track_running_stats=False).eval()
    torch.testing.assert_close(layer(data(SHAPE).cpu()), F.batch_norm(data(SHAPE).cpu(), None, None, training=True))


# ------------------------------------------------------------------------------------------------------- switchable
def test_switch_options() -> None:
    x = data(SHAPE, torch.float64)
    assert set(nf.SwitchNormAct2d(6, using_bn=False).state_dict()) == {"weight", "bias", "mean_weight", "var_weight"}
    assert nf.SwitchNormAct1d(6).using == ("ln", "bn")
    assert nf.SwitchNormAct1d(6, using=("in", "ln")).to(DEVICE)(data((4, 6, 9))).shape == (4, 6, 9)
    assert nf.SwitchNormAct2d(6, last_gamma=True).to(DEVICE).double()(x).abs().max() == 0
    layer = nf.SwitchNormAct2d(6).double().to(DEVICE)
    mean = sum(x.mean(d, keepdim=True) for d in ((2, 3), (1, 2, 3), (0, 2, 3))) / 3
    var = sum(x.var(d, correction=0, keepdim=True) for d in ((2, 3), (1, 2, 3), (0, 2, 3))) / 3
    torch.testing.assert_close(layer(x), (x - mean) / (var + EPS).sqrt())


def test_switch_batch_average() -> None:
    """The statistics of all batches as one, as sums of means and second moments give them."""
    layer = nf.SwitchNormAct2d(6, using_moving_average=False).double().to(DEVICE)
    batches = [data(SHAPE, torch.float64, seed=s) + s for s in range(4)]
    for b in batches:
        layer(b)
    together = torch.cat(batches)
    torch.testing.assert_close(layer.running_mean, together.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, together.var((0, 2, 3), correction=0))


# ------------------------------------------------------------------------------------------------------- mean-only
def _weight_normed(kind: str) -> tuple[nn.Module, Any]:
    conv: nn.Module = nn.ConvTranspose2d(3, 6, 3, bias=False) if kind == "transposed" else nn.Conv2d(3, 6, 3, bias=kind == "older")
    if kind == "older":
        with pytest.warns(FutureWarning):
            torch.nn.utils.weight_norm(conv)
        return conv, conv.weight_g
    conv = torch.nn.utils.parametrizations.weight_norm(conv, dim=1 if kind == "transposed" else 0)
    return conv, conv.parametrizations.weight.original0


@pytest.mark.parametrize("kind", ["parametrized", "older", "transposed"])
def test_data_dependent_init_and_folding(kind: str) -> None:
    torch.manual_seed(0)
    conv, g = _weight_normed(kind)
    model = nn.Sequential(conv, nf.MeanOnlyBatchNormAct2d(6, act="relu"), nn.Flatten(), nn.LazyLinear(4), nf.MeanOnlyBatchNormAct1d(4))
    x = data((8, 3, 7, 7)).cpu()
    model.eval()(x)
    model[3] = torch.nn.utils.parametrizations.weight_norm(model[3])
    before = g.detach().clone()
    with torch.no_grad():
        std = conv(x).std((0, 2, 3), correction=0)
    y = nf.data_dependent_init(model, x)
    assert not model.training
    torch.testing.assert_close(g.detach().flatten(), (before.flatten() / std))
    torch.testing.assert_close(conv(x).std((0, 2, 3), correction=0), torch.ones(6))
    torch.testing.assert_close(y, model.train()(x))
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(4), atol=1e-4, rtol=1e-4)
    model[1].bias.data.uniform_()
    model.eval()
    folded = nf.fold_mean_only_batch_norm(conv, model[1])
    torch.testing.assert_close(folded(x), model[:2](x), atol=1e-5, rtol=1e-5)
    assert isinstance(folded[0], type(conv)) or kind != "older"
    assert not [n for n, _ in folded.named_parameters() if "original" in n or "weight_g" in n]
    assert isinstance(nf.fold_mean_only_batch_norm(model[3], model[4]), nn.Linear)


def test_init_and_folding_say_what_is_wrong() -> None:
    x = data((4, 3, 7, 7)).cpu()
    with pytest.raises(ValueError, match="data_dependent_init: model must have a mean-only batch norm after"):
        nf.data_dependent_init(nn.Sequential(nn.Conv2d(3, 6, 3), nf.MeanOnlyBatchNormAct2d(6)), x)
    conv = torch.nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(3, 3, 3))
    with pytest.raises(ValueError, match="must be over dim=1"):
        nf.data_dependent_init(nn.Sequential(conv, nf.MeanOnlyBatchNormAct2d(3)), x)
    plain, norm = nn.Conv2d(3, 6, 3), nf.MeanOnlyBatchNormAct2d(6)
    with pytest.raises(TypeError, match="norm must be a mean-only batch norm, got BatchNorm2d"):
        nf.fold_mean_only_batch_norm(plain, nn.BatchNorm2d(6))
    with pytest.raises(TypeError, match="op must be a layer with a weight, got ReLU"):
        nf.fold_mean_only_batch_norm(nn.ReLU(), norm)
    with pytest.raises(ValueError, match="evaluation mode"):
        nf.fold_mean_only_batch_norm(plain, norm)
    with pytest.raises(ValueError, match="6 output features, got 5"):
        nf.fold_mean_only_batch_norm(nn.Conv2d(3, 5, 3).eval(), norm.eval())


# ------------------------------------------------------------------------------------------------------- EvalNorm
def test_eval_norm_records_the_batch_size() -> None:
    layer = nf.EvalNorm2d(6).to(DEVICE)
    twin = nn.BatchNorm2d(6).to(DEVICE)
    for n in (8, 8, 3):
        x = data((n, 6, 5, 3), seed=n)
        torch.testing.assert_close(layer(x), twin(x))
    assert float(layer.alpha) == float(layer.beta) == 1 / 8
    torch.testing.assert_close(layer.running_var, twin.running_var)
    layer.eval()
    torch.testing.assert_close(layer(x), NF.eval_norm_act(x, layer.running_mean, layer.running_var, alpha=1 / 8, beta=1 / 8))
    fixed = nf.EvalNorm2d(6, alpha=0.25).to(DEVICE)
    fixed(x)
    assert (float(fixed.alpha), float(fixed.beta)) == (0.25, pytest.approx(1 / 3))


def test_eval_norm_estimates_its_shares() -> None:
    """Independent samples of equal distribution: the least-squares share is about 1/N; and training is batch norm's, gradients too."""
    n = 4
    layer, plain = nf.EvalNorm2d(64, estimate=True, momentum=0.01).to(DEVICE), nn.BatchNorm2d(64, momentum=0.01).to(DEVICE)
    g = torch.Generator().manual_seed(0)
    for i in range(400):
        x = (torch.randn(n, 64, 2, 2, generator=g) + torch.randn(n, 64, 1, 1, generator=g)).to(DEVICE)
        if i in (0, 300):
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            y, want = layer(leaves[0]), plain(leaves[1])
            torch.testing.assert_close(y, want)
            grads = [torch.autograd.grad(out.square().sum(), leaf) for out, leaf in ((y, leaves[0]), (want, leaves[1]))]
            torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-3)
        else:
            with torch.no_grad():
                layer(x)
                plain(x)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert float(layer.alpha) == pytest.approx(1 / n, abs=0.05)
    assert float(layer.beta) == pytest.approx(1 / n, abs=0.1)
    assert {"alpha", "beta", "alpha_products", "alpha_squares"} <= set(layer.state_dict())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_eval_norm_estimates_by_its_equations(momentum: float | None, backend: str) -> None:
    """alpha = sum (mu_B - mu)(mu_nc - mu) / sum (mu_nc - mu)^2, both as moving averages; beta one step of SGD on sum (V_B - estimate)^2,
    its step divided by the squared slope; all of it by the running statistics from before the batch."""
    layer = nf.EvalNorm2d(6, momentum=momentum, estimate=True, backend=backend).double().to(DEVICE)
    mean, var, beta = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64), 0.0
    products = squares = 0.0
    for step in range(1, 4):
        x = data(SHAPE, torch.float64, seed=step, mean=0.5)
        layer(x)
        m, flat = 1 / step if momentum is None else momentum, x.cpu().flatten(2)
        own, own_var, both, biased = flat.mean(2), flat.var(2, correction=0), flat.mean((0, 2)), flat.var((0, 2), correction=0)
        products = (1 - m) * products + m * float(((both - mean) * (own - mean)).mean())
        squares = (1 - m) * squares + m * float(((own - mean) ** 2).mean())
        missed = biased - (beta * own_var + (1 - beta) * var + beta * (1 - beta) * (own - mean) ** 2)
        slope = own_var - var + (1 - 2 * beta) * (own - mean) ** 2
        beta = min(max(beta + m * float((missed * slope).sum() / slope.square().sum()), 0.0), 1.0)
        mean, var = (1 - m) * mean + m * both, (1 - m) * var + m * flat.var((0, 2))
        assert float(layer.alpha) == pytest.approx(min(max(products / squares, 0.0), 1.0), rel=1e-9)
        assert float(layer.beta) == pytest.approx(beta, rel=1e-9)
        torch.testing.assert_close(layer.running_var.cpu(), var)


# ------------------------------------------------------------------------------------------------------- whitening
def test_iter_norm_groups() -> None:
    assert nf.IterNorm2d(128).num_channels == 64
    assert nf.IterNorm2d(96).num_channels == 48
    assert nf.IterNorm2d(7).num_channels == 7
    layer = nf.IterNorm2d(6, 3, iterations=3).double().to(DEVICE)
    x = data((4, 6, 7, 7), torch.float64)
    torch.testing.assert_close(layer(x), whiten(x.cpu(), 3, "newton", 3)[0].to(DEVICE))


# ------------------------------------------------------------------------------------------------------- bad input
def c6(value: float = 1.0, n: int = 6) -> Tensor:
    return torch.full((n,), value)


X, ROW, ONE = torch.randn(4, 6, 3, 3), torch.randn(1, 6), torch.randn(4, 6, 1, 1)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "renorm, one value": (lambda: NF.batch_renorm_act(ROW, c6(), c6(), training=True), ValueError, "more than 1 value per channel"),
    "renorm, eps": (lambda: NF.batch_renorm_act(X, c6(), c6(), training=True, eps=0.0), ValueError, "eps must be positive in training"),
    "renorm, no statistics": (lambda: NF.batch_renorm_act(X, None, c6()), nf.ArgumentError, "got running_mean=None and"),
    "renorm, r_max": (lambda: NF.batch_renorm_act(X, c6(), c6(), r_max=0.5), ValueError, "r_max must be at least 1, got 0.5"),
    "renorm, d_max": (lambda: NF.batch_renorm_act(X, c6(), c6(), d_max=-1), ValueError, "d_max must be at least 0, got -1"),
    "renorm, bound": (lambda: NF.batch_renorm_act(X, c6(), c6(), r_max=c6()), nf.ShapeError, r"scalar tensor, got shape \(6,\)"),
    "renorm, std": (lambda: NF.batch_renorm_act(X, c6(), c6(n=5)), nf.ShapeError, r"running_std must have shape \(6,\).*got \(5,\)"),
    "renorm, counter": (lambda: NF.batch_renorm_act(X, c6(), c6(), training=True, momentum=None), ValueError, "needs num_batches_tracked"),
    "renorm, steps": (lambda: nf.BatchRenormAct2d(6, warmup_steps=50000), ValueError, "warmup_steps must be between 0 and.*got 50000"),
    "renorm, bounds": (lambda: nf.BatchRenormAct2d(6, r_max=0.0), ValueError, "r_max must be at least 1 .* got 0.0"),
    "bin, one position": (lambda: NF.batch_instance_norm_act(ONE, c6(), training=True), ValueError, "more than 1 spatial element"),
    "bin, one position in evaluation": (lambda: NF.batch_instance_norm_act(ONE, c6(), c6(), c6()), ValueError, "more than 1 spatial"),
    "bin, gate": (lambda: NF.batch_instance_norm_act(X, c6(n=3), training=True), nf.ShapeError, r"gate must have shape \(6,\)"),
    "bin, no gate": (lambda: NF.batch_instance_norm_act(X, None, training=True), TypeError, "gate must be a Tensor, got NoneType"),
    "bin, statistics": (lambda: NF.batch_instance_norm_act(X, c6()), nf.ArgumentError, "when training=False, got running_mean=None"),
    "bin, one statistic": (lambda: NF.batch_instance_norm_act(X, c6(), c6(), training=True), nf.ArgumentError, "running_var=None"),
    "switch, one value": (
        lambda: NF.switch_norm_act(ROW, c6(n=2), c6(n=2), training=True, using=("ln", "bn")), ValueError, "more than 1 value per channel",
    ),
    "switch, unbiased of one": (
        lambda: NF.switch_norm_act(ONE, c6(n=3), c6(n=3), training=True, unbiased_instance_var=True), ValueError, "more than 1 spatial",
    ),
    "switch, rows": (lambda: NF.switch_norm_act(ROW, c6(n=3), c6(n=3)), nf.ShapeError, "at least 3 dimensions to use 'in', got 2"),
    "switch, logits": (lambda: NF.switch_norm_act(X, c6(n=2), c6(n=3)), nf.ShapeError, r"mean_weight must have shape \(3,\).*got \(2,\)"),
    "switch, using": (lambda: nf.SwitchNormAct2d(6, using=("bn", "in")), ValueError, "in this order, got"),
    "switch, unknown": (lambda: NF.switch_norm_act(X, c6(n=1), c6(n=1), using=("gn",)), ValueError, "using must be some of"),
    "switch, statistics": (lambda: NF.switch_norm_act(X, c6(n=3), c6(n=3)), nf.ArgumentError, "when training=False, got running_mean=None"),
    "switch, average": (
        lambda: NF.switch_norm_act(X, c6(n=3), c6(n=3), c6(), c6(), training=True, using_moving_average=False), ValueError, "num_batches",
    ),
    "mean only, one value": (lambda: NF.mean_only_batch_norm_act(ROW, None, training=True), ValueError, "more than 1 value per channel"),
    "mean only, statistics": (lambda: NF.mean_only_batch_norm_act(X, None), nf.ArgumentError, "when training=False, got None"),
    "mean only, bias": (lambda: NF.mean_only_batch_norm_act(X, c6(), c6().double()), nf.DTypeError, "bias must be float32.*got float64"),
    "eval norm, share": (lambda: NF.eval_norm_act(X, c6(), c6(), alpha=1.5, beta=0.0), ValueError, r"alpha must lie in \[0, 1\], got 1.5"),
    "eval norm, shares": (lambda: NF.eval_norm_act(X, c6(), c6(), alpha=0.1, beta=c6()), nf.ShapeError, "beta must be a number or"),
    "eval norm, statistics": (lambda: NF.eval_norm_act(X, c6(), None, alpha=0.1, beta=0.1), nf.ArgumentError, "and running_var=None"),
    "eval norm, batch": (lambda: nf.EvalNorm2d(6, batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
    "eval norm, one value": (lambda: nf.EvalNorm1d(6, estimate=True)(ROW), ValueError, "more than 1 value per channel"),
    "whitening, one value": (lambda: NF.iter_norm_act(ROW, training=True), ValueError, "more than 1 value per channel"),
    "whitening, groups": (lambda: nf.IterNorm2d(6, 4), ValueError, "must divide the channels 6, got 4"),
    "whitening, method": (lambda: nf.IterNorm2d(6, method="pca"), ValueError, "method must be one of newton, zca, got 'pca'"),
    "whitening, iterations": (lambda: nf.IterNorm2d(6, iterations=0), ValueError, "iterations must be at least 1, got 0"),
    "whitening, matrix": (
        lambda: NF.iter_norm_act(X, torch.zeros(2, 3, 1), torch.zeros(1, 3, 3)), nf.ShapeError, r"running_wm must have shape \(2, 3, 3\)",
    ),
    "whitening, statistics": (lambda: NF.iter_norm_act(X), nf.ArgumentError, "when training=False, got running_mean=None"),
    "whitening, residual": (lambda: NF.iter_norm_act(X, training=True, residual=ONE), nf.ShapeError, "the input's shape"),
    "channels": (lambda: nf.SwitchNormAct2d(5)(X), nf.ShapeError, "5 channels.*got 6"),
    "type": (lambda: nf.BatchRenormAct2d(6)(X.long()), nf.DTypeError, "got int64"),
    "residual mode": (lambda: nf.MeanOnlyBatchNormAct2d(6, residual_mode="pre_norm"), ValueError, "got 'pre_norm'"),
    "residual": (lambda: nf.BatchInstanceNormAct2d(6)(X, ONE), nf.ShapeError, "the input's shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()


# ------------------------------------------------------------------------------------------------------- calls that raise
OWN = nf.define_norm(
    lambda mean, var, weight, seen: (weight * (var + EPS).rsqrt(), 0 * seen - mean * (var + EPS).rsqrt()), {"weight": 1.0}, {"seen": 0.0},
    lambda mean, var, seen: {"seen": seen + mean.mean(0)}, "Own",
)  # fmt: skip
EVERY: dict[str, Any] = LAYERS | {
    "batch": lambda **k: nf.BatchNormAct2d(6, **k),
    "instance": lambda **k: nf.InstanceNormAct2d(6, track_running_stats=True, momentum=None, **k),
    "frozen": lambda **k: nf.FrozenBatchNormAct2d(6, **k),
    "own": lambda **k: OWN(6, **k),
    "input bias": lambda **k: nf.InputBias(6, 3, act_last=True, **k),
}


def with_attribute(name: str, value: Any) -> Any:
    def change(layer: Any) -> None:
        assert hasattr(layer, name)
        setattr(layer, name, value)

    return change


def statistic_requires_grad(layer: Any) -> None:
    (layer.init_mean if isinstance(layer, nf.InputBias) else layer.running_mean).requires_grad_()


# what is done to the layer, its inputs, the error's type (torch's) and message; which layers it is no error for
FAILS: dict[str, tuple[Any, Any, type[Exception], str, tuple[str, ...]]] = {
    "backend": (with_attribute("backend", "tritn"), (X,), ValueError, "unknown backend 'tritn'; known: auto", ()),
    "activation": (with_attribute("act", nn.PReLU(4)), (X,), RuntimeError, r"must have 1 or 6 elements, got shape \(4,\)", ()),
    "residual": (None, (X, X[:2]), RuntimeError, r"\(4, 6, 3, 3\), got \(2, 6, 3, 3\)", ("input bias",)),
    "residual's type": (None, (X, X.double()), TypeError, "type float32, got float64", ("input bias",)),
    "residual's mode": (with_attribute("residual_mode", "mid"), (X,), ValueError, "pre_act, post_act, got 'mid'", ("input bias",)),
    "type": (None, (X.double(),), TypeError, "must be float64 to go with the input, got float32", ("own",)),
    "complex": (None, (X.to(torch.complex64),), TypeError, "float32 or float64, got complex64", ()),
    "device": (None, (X.to("meta"),), RuntimeError, "device meta, got cpu", ()),
    "channels": (None, (X[:, :5],), RuntimeError, "6.*5|5.*6", ("instance",)),
    "dimensions": (None, (X[0, 0],), ValueError, "expected 4D|expected 3D or 4D|6 channels", ("own", "input bias")),
    "eps": (with_attribute("eps", float("nan")), (X,), ValueError, "eps must be .*, got nan", ("own", "input bias", "mean only")),
    "eps's type": (with_attribute("eps", None), (X,), TypeError, "must be a number, got NoneType", ("own", "input bias", "mean only")),
    "momentum": (
        with_attribute("momentum", "0.1"), (X,), TypeError, "momentum must be a number or None, got str", ("own", "input bias", "frozen"),
    ),
    "statistic": (statistic_requires_grad, (X,), RuntimeError, "must be a buffer, .* got one with requires_grad=True", ("own",)),
    "one value": (None, (X[:1, :, :1, :1],), ValueError, "Expected more than 1 (value|spatial)", ("own", "input bias", "frozen")),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILS)
def test_a_call_that_raises_changes_nothing(case: str, backend: str) -> None:
    """No parameter, no statistic, no counter, whatever is wrong; after a step, so that there is something to change."""
    change, inputs, kind, message, fine = FAILS[case]
    for name, make in EVERY.items():
        if name in fine:
            continue
        layer = make(backend=backend)
        layer(torch.randn(SHAPE) + 1)
        if change is not None:
            change(layer)
        before = copy.deepcopy([*layer.parameters(), *layer.buffers()])
        with pytest.raises(kind, match=message):
            layer(*inputs)
        assert all(torch.equal(a, b) for a, b in zip((*layer.parameters(), *layer.buffers()), before, strict=True)), name


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_a_backend_that_cannot_run_changes_nothing(make: Any) -> None:
    layer = make(backend="triton")
    if nf.dispatch.unavailable("triton", "cpu", torch.float32) is None:
        pytest.skip("triton is interpreted here")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="cannot run"):
        layer(torch.randn(SHAPE))
    assert all(torch.equal(t, before[n]) for n, t in layer.state_dict().items())


def test_constructors_say_what_is_wrong() -> None:
    for make in EVERY.values():
        with pytest.raises(ValueError, match="unknown backend 'tritn'; known: auto"):
            make(backend="tritn")
        with pytest.raises(ValueError, match="unknown activation 'rleu'; known: identity"):
            make(act="rleu")
    kinds: tuple[Any, ...] = (nf.BatchRenormAct2d, nf.BatchInstanceNormAct2d, nf.SwitchNormAct2d, nf.EvalNorm2d, nf.IterNorm2d)
    for kind in (*kinds, nf.FilterResponseNorm2d, nf.FrozenBatchNormAct2d):
        for eps in (-1.0, float("nan")):
            with pytest.raises(ValueError, match=f"{kind.__name__}: eps must be non-negative, got {eps}"):
                kind(6, eps=eps)
        with pytest.raises(TypeError, match=f"{kind.__name__}: eps must be a number, got str"):
            kind(6, eps="1e-5")
    for kind in (*kinds, nf.MeanOnlyBatchNormAct2d, nf.FilterResponseNorm2d, nf.FrozenBatchNormAct2d, nf.InputBias):
        for device in ("gpu", "cuda:x"):
            with pytest.raises(RuntimeError):
                kind(6, device=device)
        for features in (6.0, "6"):
            with pytest.raises(TypeError):
                kind(features)
    with pytest.raises(ValueError, match="there must be at least 1 channel to whiten, got 0"):
        nf.IterNorm2d(0)
    with pytest.raises(TypeError, match="alpha must be a number, got str"):
        nf.EvalNorm2d(6, alpha="0.5")
    with pytest.raises(TypeError, match="custom_norm_act: parameter gain must be real, got complex64"):
        NF.custom_norm_act(X, lambda mean, var, gain: (gain, gain), {"gain": torch.ones(6, dtype=torch.complex64)})
