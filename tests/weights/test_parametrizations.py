"""Layers and models against torch's own parametrizations: numbers, state dicts both ways, and what training loops do with them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as theirs
from torch.nn.utils import parametrize

import normfused
from normfused import parametrizations as ours

from .conftest import DEVICE

KINDS = ["weight_norm", "spectral_norm"]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(8, 4, 4, 2),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(4 * 14 * 14, 5),
    ]
    return nn.Sequential(*layers).to(DEVICE)


def normalised(kind: str, package: Any, whole: bool = False) -> nn.Sequential:
    model = network()
    for i in (0, 2, 5):
        torch.manual_seed(i)
        getattr(package, kind)(model[i])
    return getattr(ours, f"{kind}_model")(model) if whole else model


def batch(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 8, 8, device=DEVICE)


def same(a: Tensor, b: Tensor, relative: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=relative * float(b.detach().abs().max()))


# ------------------------------------------------------------------------------------------------------- as torch's
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_trains_as_torch(kind: str, whole: bool, backend: str) -> None:
    """Three steps of SGD from the same seed, then evaluation, buffers included."""
    mine, other = normalised(kind, ours, whole), normalised(kind, theirs)
    assert [(k, v.shape, v.dtype) for k, v in mine.state_dict().items()] == [(k, v.shape, v.dtype) for k, v in other.state_dict().items()]
    for a, b in zip(mine.state_dict().values(), other.state_dict().values(), strict=True):
        same(a, b)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (mine, other)]
    for _ in range(3):
        x = batch()
        for model, optimizer in zip((mine, other), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(mine.state_dict().values(), other.state_dict().values(), strict=True):
        same(a, b, 1e-4)
    x = batch()
    same(mine.eval()(x), other.eval()(x), 1e-4)
    before = {k: v.clone() for k, v in mine.state_dict().items()}
    with torch.no_grad():
        mine(x)
    assert all(torch.equal(v, before[k]) for k, v in mine.state_dict().items())


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_both_ways(kind: str, whole: bool) -> None:
    for source, target in ((theirs, ours), (ours, theirs)):
        one, other = normalised(kind, source).eval(), normalised(kind, target, whole and target is ours).eval()
        with torch.no_grad():
            for t in one.state_dict().values():
                t.add_(torch.randn_like(t) * 0.01)
        other.load_state_dict(one.state_dict())
        x = batch()
        same(other(x), one(x))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_older_checkpoints(kind: str, whole: bool) -> None:
    old = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for i in (0, 2, 5):
            getattr(nn.utils, kind)(old[i])
    old(batch())
    new = normalised(kind, ours, whole)
    new.load_state_dict(old.state_dict())
    x = batch()
    same(new.eval()(x), old.eval()(x))
    # a network around it, and the rest of a checkpoint, are left as they are
    outer = nn.ModuleDict({"d": new})
    outer.load_state_dict({f"d.{k}": v for k, v in old.state_dict().items()})
    with pytest.raises(ValueError, match=f"older hooks, got '0' with one; call torch.nn.utils.remove_{kind} first"):
        getattr(ours, f"{kind}_model")(old)


@pytest.mark.parametrize("kind", KINDS)
def test_takes_over_torch_layers(kind: str, backend: str) -> None:
    model, reference = normalised(kind, theirs), normalised(kind, theirs)
    parameters = [*model.parameters()]
    getattr(ours, f"{kind}_model")(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    x = batch()
    same(model(x), reference(x))
    for a, b in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        same(a, b)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, None])
def test_dimensions_of_weight_norm(dim: int | None, backend: str) -> None:
    for make in (lambda: nn.Conv1d(4, 6, 3), lambda: nn.ConvTranspose1d(4, 6, 3), lambda: nn.Embedding(7, 3)):
        if dim == 2 and isinstance(make(), nn.Embedding):
            continue
        torch.manual_seed(0)
        mine = ours.weight_norm(make().to(DEVICE), dim=dim)
        torch.manual_seed(0)
        other = theirs.weight_norm(make().to(DEVICE), dim=dim)  # type: ignore[arg-type]
        assert mine.parametrizations.weight.original0.shape == other.parametrizations.weight.original0.shape
        same(mine.weight, other.weight)


LAYERS = [
    lambda: nn.ConvTranspose1d(4, 6, 3),
    lambda: nn.ConvTranspose3d(2, 3, 2),
    lambda: nn.Embedding(7, 3),
    lambda: nn.Bilinear(3, 4, 5),
]


@pytest.mark.parametrize("make", LAYERS)
def test_matrices_of_spectral_norm(make: Callable[[], nn.Module], backend: str) -> None:
    for options in ({}, {"dim": -1}, {"n_power_iterations": 3}):
        found = []
        for package in (ours, theirs):
            torch.manual_seed(0)
            layer = package.spectral_norm(make().to(DEVICE), **options)
            found.append((layer.weight, layer.parametrizations.weight[0]._u, layer.parametrizations.weight[0]._v))
        for a, b in zip(*found, strict=True):
            same(a, b)


def test_largest_singular_value(backend: str) -> None:
    layer = nn.Linear(20, 30, device=DEVICE, dtype=torch.float64)
    with torch.no_grad():
        left, _, right = torch.linalg.svd(layer.weight, full_matrices=False)
        layer.weight.copy_(left * torch.linspace(3, 1, 20, device=DEVICE, dtype=torch.float64) @ right)
    ours.spectral_norm(layer, n_power_iterations=5)
    for _ in range(100):  # the second singular value is 0.965 of the first
        layer.weight  # noqa: B018
    torch.testing.assert_close(torch.linalg.matrix_norm(layer.weight, 2), torch.ones((), dtype=torch.float64, device=DEVICE))


def test_vectors_and_other_parameters(backend: str) -> None:
    layer = ours.spectral_norm(nn.LayerNorm(6, device=DEVICE))
    torch.testing.assert_close(layer.weight.norm(), torch.ones((), device=DEVICE))
    assert not list(layer.buffers())
    lstm = nn.LSTM(4, 5)
    expected = lstm.weight_hh_l0.detach().clone()
    same(ours.weight_norm(lstm, "weight_hh_l0").weight_hh_l0, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_further_parametrizations_and_hooks(kind: str) -> None:
    """The shorter way to the weight is torch's where somebody else takes part."""

    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    layer = getattr(ours, kind)(nn.Linear(6, 4)).eval().to(DEVICE)
    expected = layer.weight.detach().clone()
    seen: list[Tensor] = []
    handle = layer.parametrizations.weight[0].register_forward_hook(lambda module, args, output: seen.append(output))
    same(layer.weight, expected)
    assert len(seen) == 1
    handle.remove()
    parametrize.register_parametrization(layer, "weight", Twice(), unsafe=True)
    same(layer.weight, 2 * expected)
    same(copy.deepcopy(layer).weight, 2 * expected)
    parametrize.remove_parametrizations(layer, "weight")
    same(layer.weight, 2 * expected)


def test_spectral_norm_of_a_weight_norm() -> None:
    """Layer by layer and as a model; the other way round g and v would have no place."""
    models = []
    for package, suffix in ((theirs, ""), (ours, ""), (ours, "_model")):
        model = network()
        for kind in KINDS:
            torch.manual_seed(1)
            for part in [model] if suffix else [model[i] for i in (0, 2, 5)]:
                getattr(package, kind + suffix)(part)
        models.append(model)
    x = batch()
    for _ in range(2):
        expected, *found = [model(x) for model in models]
        for y in found:
            same(y, expected)
    (models[0](x).sum() + models[1](x).sum() + models[2](x).sum()).backward()
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        for p in parameters[1:]:
            same(p.grad, parameters[0].grad)
    for take in (ours.weight_norm_model, lambda m: ours.weight_norm(m[0])):
        model = ours.spectral_norm_model(network())
        with pytest.raises(ValueError, match="'weight' must be a plain parameter, .* got one with SpectralNorm; apply weight_norm first"):
            take(model)


# ------------------------------------------------------------------------------------------------------------ the model
class Counted:
    """How many tensors each call of the backend was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[int] = []
        for name in KINDS:
            before = getattr(normfused.weights, name)
            monkeypatch.setattr(normfused.weights, name, lambda of, before=before: (self.calls.append(len(of)), before(of))[1])
        one = normfused.weights.Weighted
        monkeypatch.setattr(normfused.weights, "weight_norm_of", lambda *of: normfused.weights.weight_norm([one(*of)])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_for_all_layers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    model = getattr(ours, f"{kind}_model")(network())
    counted.calls.clear()
    model(batch()).sum().backward()
    assert counted.calls == [3]
    counted.calls.clear()
    model[5](torch.randn(1, 4 * 14 * 14, device=DEVICE))  # a layer by itself
    assert counted.calls == [1]
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 8, 8))  # fails on the way: nothing must be left behind
    assert all(p[0]._ready is None for m in model.modules() if parametrize.is_parametrized(m) for p in m.parametrizations.values())


def test_removal() -> None:
    for kind in KINDS:
        model = getattr(ours, f"{kind}_model")(network())
        x = batch()
        expected = model.eval()(x)
        assert getattr(ours, f"remove_{kind}")(model) is model
        assert [*model.state_dict()] == [*network().state_dict()] or {*model.state_dict()} == {*network().state_dict()}
        assert not model._forward_hooks and not model._forward_pre_hooks and not model._forward_hooks_always_called
        assert type(model[0]) is nn.Conv2d
        same(model(x), expected)
        with pytest.raises(ValueError, match=f"remove_{kind}: model must have layers to remove it from"):
            getattr(ours, f"remove_{kind}")(model)
        # by torch's function, one layer of a model whose other layers stay
        model = getattr(ours, f"{kind}_model")(network()).eval()
        expected = model(x)
        parametrize.remove_parametrizations(model[2], "weight")
        same(model(x), expected)


def test_shared_parameters_stay_shared() -> None:
    for kind in KINDS:
        model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
        model[2].weight = model[0].weight
        getattr(ours, f"{kind}_model")(model)
        assert len([*model.parameters()]) == (4 if kind == "weight_norm" else 2)
        model(torch.randn(3, 6)).square().sum().backward()
        same(model.eval()[0].weight, model[2].weight, 1e-2)
        getattr(ours, f"remove_{kind}")(model)
        assert model[2].weight is model[0].weight and model[3].weight is not model[0].weight
    # one module in two places takes part once
    layer = nn.Linear(6, 6)
    model = ours.spectral_norm_model(nn.Sequential(layer, layer))
    u = layer.parametrizations.weight[0]._u.clone()
    model(torch.randn(2, 6))
    assert not torch.equal(u, layer.parametrizations.weight[0]._u)


@pytest.mark.parametrize("kind", KINDS)
def test_gan_step(kind: str, backend: str) -> None:
    """D(real) and D(fake) before one backward, and a gradient penalty, against torch's."""
    mine, other = normalised(kind, ours, True).double(), normalised(kind, theirs).double()
    mine.load_state_dict(other.state_dict())
    real, fake = batch(4).double(), batch(4).double().requires_grad_()
    gradients = []
    for model in (mine, other):
        score = model(fake)
        (slope,) = torch.autograd.grad(score.sum(), fake, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        (score.mean() - model(real).mean() + 10 * penalty).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        same(a, b, 1e-9)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_modes(kind: str) -> None:
    model = getattr(ours, f"{kind}_model")(network())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(2.0)
    x = batch()
    copied.eval()
    model.eval()
    expected = model(x)
    copied(x)
    same(model(x), expected)
    for half in (torch.bfloat16, torch.float16):
        mixed = copy.deepcopy(model)
        mixed[5].to(half)
        assert mixed[5].weight.dtype == half and mixed[0].weight.dtype == torch.float32
        assert mixed.to(half)(x.to(half)).dtype == half
    with torch.inference_mode():
        same(model(x), expected)
    # gradients wanted inside of a model that is called without
    inner = nn.Module()
    inner.layer = nn.Linear(4, 4)  # type: ignore[assignment]

    def forward(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return inner.layer(x)

    inner.forward = forward  # type: ignore[method-assign]
    getattr(ours, f"{kind}_model")(inner)
    with torch.no_grad():
        assert inner(torch.randn(2, 4)).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_compile_and_transforms(kind: str) -> None:
    model = getattr(ours, f"{kind}_model")(network())
    x = batch()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    expected, found = model(x), compiled(x)
    same(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    for a, b in zip(compiled.parameters(), model.parameters(), strict=True):
        same(a.grad, b.grad)
    model.eval()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    model.zero_grad()
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        same(gradients[name], p.grad)  # type: ignore[arg-type]
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, along = torch.func.jvp(loss, (parameters,), (tangents,))
    same(along, sum((gradients[name] * t).sum() for name, t in tangents.items()), 1e-3)  # type: ignore[arg-type]


def test_distributed() -> None:
    """DDP broadcasts buffers before each forward, into those that an earlier graph has used."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = ours.spectral_norm_model(network())
        parallel, alone = nn.parallel.DistributedDataParallel(copy.deepcopy(model)), model
        x = batch()
        for m in (parallel, alone):
            (m(x).mean() - m(2 * x).mean()).backward()
        for a, b in zip(parallel.parameters(), alone.parameters(), strict=True):
            same(a.grad, b.grad)  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_the_norm_alone(kind: str, backend: str) -> None:
    model = getattr(ours, f"{kind}_model")(network()).eval()
    expected = model[5].weight
    (slope,) = torch.autograd.grad(expected.square().sum(), [*model[5].parametrizations.parameters()][-1], create_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(model[5].weight, expected) and model(batch()).dtype == torch.bfloat16
        again = torch.autograd.grad(model[5].weight.square().sum(), [*model[5].parametrizations.parameters()][-1], create_graph=True)[0]
        same(again, slope)


@pytest.mark.parametrize("kind", KINDS)
def test_several_devices_and_export(kind: str) -> None:
    model = getattr(ours, f"{kind}_model")(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta")))
    with pytest.raises((RuntimeError, NotImplementedError)):  # of the second layer: it cannot multiply tensors of two devices
        model(torch.randn(2, 4))
    assert model[0].weight.device.type == "cpu" and model[1].weight.device.type == "meta"
    exported = torch.export.export(model[:1].eval(), (torch.randn(2, 4),))
    x = torch.randn(2, 4)
    same(exported.module()(x), model[:1](x))


# --------------------------------------------------------------------------------------------- initialization from data
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_init_from_data(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    ours.weight_norm(model[2], dim=1)
    ours.weight_norm_model(model)
    x = batch(16).to(dtype) * 3 + 1
    directions = [m.parametrizations.weight.original1.detach().clone() for m in (model[0], model[2], model[5])]
    returned = ours.init_weight_norm(model, x)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    seen = x
    for layer in model:
        seen = layer(seen)
        if parametrize.is_parametrized(layer):
            across = [d for d in range(seen.dim()) if d != 1]
            var, mean = torch.var_mean(seen, across, correction=0)
            assert float(mean.detach().abs().max()) < tolerance and float((var - 1).detach().abs().max()) < 10 * tolerance
    same(returned, model(x), 10 * tolerance)
    for m, direction in zip((model[0], model[2], model[5]), directions, strict=True):
        assert torch.equal(m.parametrizations.weight.original1, direction)


def test_init_of_layers_without_bias_and_dead_channels() -> None:
    model = ours.weight_norm_model(nn.Sequential(nn.Conv1d(3, 4, 3, bias=False), nn.Linear(6, 2)))
    with torch.no_grad():
        model[0].parametrizations.weight.original0[1] = 0
    out = ours.init_weight_norm(model, torch.randn(5, 3, 8))
    assert out.isfinite().all() and model[0].parametrizations.weight.original0[1].item() == 0
    with pytest.raises(ValueError, match="g must have a value for each of the 6 output channels"):
        ours.init_weight_norm(ours.weight_norm_model(nn.Sequential(nn.ConvTranspose1d(4, 6, 3))), torch.randn(2, 4, 5))
    with pytest.raises(ValueError, match="model must have weight-normalised linear layers or convolutions, got Linear"):
        ours.init_weight_norm(nn.Linear(2, 2), torch.randn(2, 2))


# ---------------------------------------------------------------------------------------------------------------- errors
def test_errors() -> None:
    for function in (ours.weight_norm, ours.spectral_norm):
        name = function.__name__
        with pytest.raises(ValueError, match=f"{name}: Linear must have a parameter 'kernel', got NoneType"):
            function(nn.Linear(2, 2), "kernel")
        with pytest.raises(ValueError, match=f"{name}: 'weight' must be initialized by a first forward"):
            function(nn.LazyLinear(2))
        with pytest.raises(ValueError, match=f"{name}: 'weight' must be float16, bfloat16, float32 or float64, got torch.complex64"):
            function(nn.Linear(2, 2, dtype=torch.complex64))
        with pytest.raises(IndexError, match=r"Dimension out of range \(expected to be in range of \[-2, 1\], but got 2\)"):
            function(nn.Linear(2, 2), dim=2)
        layer = nn.Linear(2, 2)
        with pytest.raises(IndexError):
            function(layer, dim=-3)
        assert not parametrize.is_parametrized(layer)
    with pytest.raises(ValueError, match="n_power_iterations must be at least 1, got 0"):
        ours.spectral_norm(nn.Linear(2, 2), n_power_iterations=0)
    for kind in KINDS:
        with pytest.raises(ValueError, match=f"{kind}_model: model must have linear layers or convolutions, .* got none in Sequential"):
            getattr(ours, f"{kind}_model")(nn.Sequential(nn.ReLU()))
    chosen = ours.spectral_norm_model(network(), select=lambda path, module: path == "5")
    assert [*map(parametrize.is_parametrized, chosen)] == [False] * 5 + [True]
