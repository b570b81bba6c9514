"""Networks without normalization: the epilogues against float64, the schedule's identities, the measured biases, the builder."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfused as nf
from normfused import functional as NF
from normfused import ops
from normfused.rescale import normal_init_
from normfused.rescalenet import RescaleBlock
from tests.support.check import DEVICE, HALF, OUTPUT, close, data, layout, parameter_tolerance
from tests.support.formulas import activation

SHAPE = (3, 6, 5, 3)


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(DEVICE)


# ------------------------------------------------------------------------------------------------------ epilogues
def _check_affine(
    backend: str, x: Tensor, act: str, scale: str | None, shift: bool, residual: bool | str, after: bool, expanded: bool = False
) -> None:
    """y and every gradient against the formula in float64; parameters of half types are float32."""
    dtype, of = x.dtype, torch.float32 if x.dtype in HALF else x.dtype
    channels = x.shape[1]
    tensors = {"x": x}
    if residual:
        tensors["residual"] = data(tuple(x.shape), dtype, seed=5)
    if residual == "learned":
        tensors["residual_scale"] = torch.full((1,), 0.6, dtype=of, device=DEVICE)
    if scale in ("one", "channel"):
        tensors["scale"] = 1 + 0.3 * _random(1 if scale == "one" else channels, seed=6, dtype=of)
    for name, wanted, seed in (("shift", shift, 7), ("shift_after", after, 8), ("act_param", act in ("prelu", "tlu"), 9)):
        if wanted:
            tensors[name] = 0.3 * _random(channels, seed=seed, dtype=of)
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    given: dict[str, Any] = {n: t for n, t in leaves.items() if n != "x"}
    if scale == "number":
        given["scale"] = 0.7
    given.setdefault("residual_scale", 0.6)
    numbers: Any = ("leaky_relu", {"negative_slope": 0.2}) if act == "leaky_relu" else act
    y = NF.affine_act(leaves["x"], act=numbers, backend=backend, **given)

    wide = {n: t.detach().to(torch.float64, copy=True).requires_grad_() for n, t in tensors.items()}

    def over(name: str, default: float) -> Any:
        return wide[name].reshape(1, -1, *[1] * (x.dim() - 2)) if name in wide else default

    z = over("scale", 0.7 if scale == "number" else 1.0) * wide["x"] + over("shift", 0.0)
    if residual:
        z = z + wide.get("residual_scale", 0.6) * wide["residual"]
    weight = over("act_param", 0.0) if "act_param" in wide else None
    want = activation(act, z, weight, {"negative_slope": 0.2, "alpha": 1.0}) + over("shift_after", 0.0)
    dy = (_random(1, seed=10).expand(x.shape) if expanded else _random(*x.shape, seed=10)).to(dtype)
    found = torch.autograd.grad(y, list(leaves.values()), dy)
    expected = torch.autograd.grad(want, list(wide.values()), dy.double())
    what = f"{act} scale={scale} shift={shift} residual={residual} after={after} {dtype}"
    assert y.dtype == dtype and y.stride() == (x if x.is_contiguous() or _channels_innermost(x) else x.contiguous()).stride()
    close(f"{what}: y", y, want, OUTPUT[dtype])
    for (name, t), got, wished in zip(leaves.items(), found, expected, strict=True):
        assert got.dtype == t.dtype
        limit = OUTPUT[dtype] if name in ("x", "residual") else parameter_tolerance(dtype, t.dtype)
        close(f"{what}: d{name}", got, wished, limit, scale=float(dy.abs().max()))


def _channels_innermost(x: Tensor) -> bool:
    return x.dim() > 2 and x.movedim(1, -1).is_contiguous()


# pairs of features; every activation with and without what is added
AFFINE = [
    # act, scale, shift, residual, after
    ("relu", "number", False, True, False), ("relu", "one", False, True, False), ("relu", None, False, False, True),
    ("relu", "channel", True, True, True), ("relu", None, True, False, True), ("identity", None, False, False, True),
    ("identity", "one", False, True, False), ("silu", "number", True, True, True), ("silu", "channel", False, False, True),
    ("leaky_relu", "one", True, True, False), ("leaky_relu", None, False, False, True), ("tlu", "one", False, True, True),
    ("prelu", "channel", True, True, False), ("sigmoid", None, False, False, False), ("elu", "number", False, True, False),
    ("relu", "number", True, "learned", False), ("silu", "one", False, "learned", True), ("identity", None, True, "learned", False),
    ("prelu", None, False, "learned", True), ("identity", "number", False, True, True),
]  # fmt: skip


@pytest.mark.triton_surface
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_affine_act(dtype: torch.dtype, backend: str) -> None:
    forms = itertools.cycle(("contiguous", "channels_last", "slice"))
    for i, case in enumerate(AFFINE):
        _check_affine(backend, layout(data(SHAPE, dtype), next(forms)), *case, expanded=i % 4 == 3)


# act, beta ("folded": none, "number", "learned"), which outputs have a gradient
PAIRS = [
    ("relu", "folded", "both"), ("relu", "learned", "both"), ("silu", "folded", "both"), ("identity", "number", "both"),
    ("leaky_relu", "number", "shifted"), ("tlu", "learned", "shifted"), ("relu", "folded", "y"), ("identity", "learned", "both"),
    ("elu", "learned", "both"), ("hardsigmoid", "folded", "both"),
]  # fmt: skip


@pytest.mark.triton_surface
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_two_outputs(dtype: torch.dtype, backend: str) -> None:
    """(y, y + next_bias), each rounded once, and the gradients of both joined before anything is rounded."""
    forms = itertools.cycle(("contiguous", "channels_last", "slice"))
    of = torch.float32 if dtype in HALF else dtype
    for act, beta, used in PAIRS:
        form = next(forms)
        tensors = {"x": layout(data(SHAPE, dtype), form), "branch": layout(data(SHAPE, dtype, seed=3), form)}
        tensors["next_bias"] = _random(6, seed=4, dtype=of)
        if beta == "learned":
            tensors["beta"] = torch.full((1,), 0.6, dtype=of, device=DEVICE)
        if act == "tlu":
            tensors["act_param"] = _random(6, seed=5, dtype=of)
        leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
        given: dict[str, Any] = {n: t for n, t in leaves.items() if n not in ("x", "branch")}
        if beta == "number":
            given["beta"] = 0.6
        pair = NF.rescaled_residual(leaves["x"], leaves["branch"], 0.8, act=act, backend=backend, **given)
        wide = {n: t.detach().to(torch.float64, copy=True).requires_grad_() for n, t in tensors.items()}
        over = {n: t.view(1, -1, 1, 1) for n, t in wide.items() if n in ("next_bias", "act_param")}
        z = 0.8 * wide["x"] + wide.get("beta", 1.0 if beta == "folded" else 0.6) * wide["branch"]
        y = activation(act, z, over.get("act_param"), {"negative_slope": 0.01, "alpha": 1.0})
        expected = (y, y + over["next_bias"])
        upstream = [_random(*SHAPE, seed=s).to(dtype) for s in (10, 11)]
        kept = {"both": (0, 1), "shifted": (1,), "y": (0,)}[used]
        ends = [upstream[i] for i in kept]
        found = torch.autograd.grad([pair[i] for i in kept], list(leaves.values()), ends, allow_unused=True)
        wanted = torch.autograd.grad([expected[i] for i in kept], list(wide.values()), [t.double() for t in ends], allow_unused=True)
        what = f"{act} {beta} {used} {form}"
        for got, want in zip(pair, expected, strict=True):
            assert got.dtype == dtype and got.stride() == pair[0].stride()
            close(what, got, want, OUTPUT[dtype])
        for (name, t), got, want in zip(leaves.items(), found, wanted, strict=True):
            assert (got is None) == (want is None), (what, name)
            if got is not None and want is not None:
                limit = OUTPUT[dtype] if name in ("x", "branch") else parameter_tolerance(dtype, t.dtype)
                close(f"{what}: d{name}", got, want, limit, scale=float(sum(end.abs().max() for end in ends)))


def test_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of the steps: one forward, one backward, and one that sums where a factor is trained."""
    launched: list[str] = []
    for step in ("apply", "grad_moments", "grad_apply"):
        run = getattr(ops, step)
        monkeypatch.setattr(ops, step, lambda *call, run=run, step=step: launched.append(step) or run(*call))
    x, branch = (torch.randn(SHAPE, requires_grad=True) for _ in range(2))
    bias, one = torch.randn(6, requires_grad=True), torch.ones(1, requires_grad=True)
    options: dict[str, Any] = {"backend": "reference"}
    for run, want in (
        (lambda: NF.rescaled_residual(x, branch, 0.9, next_bias=bias, **options), ["apply", "grad_apply"]),
        (lambda: NF.rescaled_residual(x, branch, 0.9, 0.5, next_bias=bias, **options), ["apply", "grad_apply"]),
        (lambda: NF.rescaled_residual(x, branch, 0.9, one, next_bias=bias, **options), ["apply", "grad_moments", "grad_apply"]),
        (lambda: (NF.act_bias(x, bias, **options),), ["apply", "grad_apply"]),
        (lambda: (NF.act_bias(x, bias, act="silu", **options),), ["apply", "grad_apply"]),
        (lambda: (NF.affine_act(x, residual=branch, **options),), ["apply"]),
        (lambda: (NF.affine_act(x, residual=branch, residual_scale=one, **options),), ["apply", "grad_moments", "grad_apply"]),
    ):
        launched.clear()
        sum(y.sum() for y in run()).backward()
        assert launched == want


def test_affine_act_of_other_shapes(backend: str) -> None:
    for shape in ((4, 6), (1, 1, 1, 1), (2, 6, 7), (2, 3, 2, 3, 2)):
        for case in (AFFINE[0], AFFINE[1], AFFINE[2], AFFINE[7]):
            _check_affine(backend, data(shape, torch.float16), *case)
    empty = torch.empty(0, 6, 2, 2, requires_grad=True, device=DEVICE)
    bias = torch.ones(6, requires_grad=True, device=DEVICE)
    y = NF.act_bias(empty, bias, backend=backend)
    y.sum().backward()
    assert y.shape == empty.shape and bias.grad is not None and not bias.grad.any()


def test_the_mask_is_of_the_pre_activation(backend: str) -> None:
    """relu(t) + b > b fails where t is below b's last digit, and b + t rounds to b for t just below zero too."""
    t = torch.tensor([1e-12, -1e-12, 0.0, 3.0], device=DEVICE).view(1, 1, 4).requires_grad_()
    y = NF.act_bias(t, torch.ones(1, device=DEVICE), backend=backend)
    assert y.flatten().tolist() == [1.0, 1.0, 1.0, 4.0]
    (dt,) = torch.autograd.grad(y.sum(), t)
    assert dt.flatten().tolist() == [1.0, 0.0, 0.0, 1.0]
    x = torch.zeros_like(t).requires_grad_()
    y, shifted = NF.rescaled_residual(x, t, 0.5, 0.5, next_bias=torch.ones(1, device=DEVICE), backend=backend)
    dx, dt = torch.autograd.grad(y.sum() + shifted.sum(), (x, t))
    assert dx.flatten().tolist() == dt.flatten().tolist() == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("act", ["relu", "silu", "tlu"])
def test_second_derivatives(act: str, backend: str) -> None:
    def leaf(*shape: int, seed: int) -> Tensor:
        return _random(*shape, seed=seed, dtype=torch.float64).requires_grad_()

    # a multiplier away from 0, where nothing but ReLU's own kink could lie
    x, branch, beta, bias = leaf(2, 2, 3, seed=1), leaf(2, 2, 3, seed=2), leaf(1, seed=3), leaf(2, seed=4)
    tau = leaf(2, seed=5) if act == "tlu" else None

    def run(x: Tensor, branch: Tensor, beta: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"act": act, "act_param": tau, "backend": backend}
        pair = NF.rescaled_residual(x, branch, 0.8, beta, next_bias=bias, **options)
        one = NF.affine_act(x, beta, residual=branch, residual_scale=beta.square(), shift_after=bias, **options)
        return (*pair, one, NF.act_bias(x, bias, **options), NF.rescaled_residual(x, branch, 0.8, **options))

    assert torch.autograd.gradcheck(run, (x, branch, beta, bias))
    assert torch.autograd.gradgradcheck(run, (x, branch, beta, bias))


def test_what_is_saved() -> None:
    """A folded block keeps its output, which the next convolution keeps anyway, and nothing else; a bias alone keeps nothing."""
    x, branch = (torch.randn(SHAPE, requires_grad=True) for _ in range(2))
    bias = torch.zeros(6, requires_grad=True)

    def saved(run: Callable[[], Tensor]) -> list[int]:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
            y = run()
        return sorted(0 if t.data_ptr() == y.data_ptr() else t.numel() for t in kept if t.numel() >= x.numel())

    for name in ("torch", "reference"):
        assert saved(lambda name=name: NF.rescaled_residual(x, branch, 0.9, backend=name)) == [0]  # type: ignore[misc]
        assert saved(lambda name=name: NF.affine_act(x, None, bias, backend=name)) == []  # type: ignore[misc]
        assert saved(lambda name=name: NF.act_bias(x, bias, backend=name)) == [x.numel()]  # type: ignore[misc]


def test_composed_activations_and_explain() -> None:
    x, bias = torch.randn(SHAPE), torch.randn(6)
    torch.testing.assert_close(NF.act_bias(x, bias, act=torch.sin), x.sin() + bias.view(-1, 1, 1))
    torch.testing.assert_close(NF.affine_act(x, 0.5, act=nn.CELU(), residual=x), F.celu(1.5 * x))
    report = nf.explain(nf.InputBias(6, act="relu"), x)
    assert report.path == "fused" and report.rule == "affine"


@pytest.mark.parametrize("act", ["identity", "relu"])
def test_outputs_are_memory_of_their_own(act: str, backend: str) -> None:
    x = torch.full(SHAPE, 2.0, device=DEVICE)
    NF.affine_act(x, act=act, backend=backend).fill_(7)
    assert (x == 2).all()


def test_errors() -> None:
    x = torch.randn(SHAPE)
    for message, call in {
        "act_bias: bias must have shape (6,)": lambda: NF.act_bias(x, torch.zeros(5)),
        "affine_act: scale must have shape (6,)": lambda: NF.affine_act(x, torch.ones(4)),
        "affine_act: residual_scale must have one value, got shape (2,)": lambda: NF.affine_act(
            x, residual=x, residual_scale=torch.ones(2)
        ),
        "rescaled_residual: branch must have the input's shape": lambda: NF.rescaled_residual(x, x[:1], 0.5),
        "rescaled_residual: branch must have the input's type float32, got float64": lambda: NF.rescaled_residual(x, x.double(), 0.5),
        "rescaled_residual: branch must be a Tensor, got float": lambda: NF.rescaled_residual(x, 0.5, 0.5),
        "rescaled_residual: alpha must be a number, got str": lambda: NF.rescaled_residual(x, x, "a"),
        "rescaled_residual: beta must be a number or a tensor of one value, got str": lambda: NF.rescaled_residual(x, x, 0.5, "b"),
        "rescaled_residual: beta must have one value, got shape (6,)": lambda: NF.rescaled_residual(x, x, 0.5, torch.ones(6)),
        "rescaled_residual: next_bias must have shape (6,)": lambda: NF.rescaled_residual(x, x, 0.5, next_bias=torch.ones(3)),
        "InputBias: input must have 6 channels": lambda: nf.InputBias(6)(x[:, :4]),
        "InputBias: batches must be non-negative, got -1": lambda: nf.InputBias(6, -1),
        "RescaledResidual: index must be from 0 to num_blocks - 1 = 3, got 4": lambda: nf.RescaledResidual(4, 4),
        "rescale_schedule: c must be positive": lambda: nf.rescale_schedule(3, c=0.5),
        "rescale_schedule: num_blocks must be at least 1, got 0": lambda: nf.rescale_schedule(0),
        "rescale_init_: drop must be in [0, 1), got 1": lambda: nf.rescale_init_([nn.Linear(2, 2)], 0, 1, drop=1),
        "rescale_init_: layers must hold": lambda: nf.rescale_init_([], 0, 1),
        "rescalenet: kind must be one of basic, bottleneck, got 'wide'": lambda: nf.rescalenet(kind="wide"),
        "rescalenet: stem must be 'imagenet' or 'small', got 'big'": lambda: nf.rescalenet(stem="big"),
        "rescalenet: layers must hold the number of blocks": lambda: nf.rescalenet([2, 0]),
        "rescalenet: layers must hold the number of blocks of each stage, at least 1, got 18": lambda: nf.rescalenet(18),
    }.items():
        with pytest.raises((ValueError, TypeError, nf.DTypeError)) as caught:
            call()
        assert message in str(caught.value)
    with pytest.raises(TypeError, match=r"rescale_init_: layers must be convolutions .* got ReLU"):
        nf.rescale_init_([nn.ReLU()], 0, 1)


# ------------------------------------------------------------------------------------------------------- schedule
@pytest.mark.parametrize(("num_blocks", "c", "first"), [(16, None, 0), (16, 15, 1), (7, 3.5, 0), (1, None, 0), (4, 10, 1)])
def test_schedule(num_blocks: int, c: float | None, first: int) -> None:
    pairs = nf.rescale_schedule(num_blocks, c=c, first=first)
    constant, last = num_blocks if c is None else c, first + num_blocks - 1
    for k, (alpha, beta) in enumerate(pairs):
        assert math.isclose(alpha**2 + beta**2, 1)
        weight = beta * math.prod(a for a, _ in pairs[k + 1 :])
        assert math.isclose(weight, 1 / math.sqrt(last + constant))
    assert math.isclose(math.prod(a for a, _ in pairs), math.sqrt((first - 1 + constant) / (last + constant)), abs_tol=1e-15)


def test_both_numberings_agree() -> None:
    for ours, papers in zip(nf.rescale_schedule(16), nf.rescale_schedule(16, c=15, first=1), strict=True):
        assert ours == pytest.approx(papers)
    layer = nf.RescaledResidual(3, 16)
    assert math.isclose(layer.alpha, nf.RescaledResidual(4, 16, c=15).alpha) and layer.alpha == nf.rescale_schedule(16)[3][0]
    assert layer.branch_scale == 0.25


# ----------------------------------------------------------------------------------------------------- the layers
def test_residual_and_its_multiplier(backend: str) -> None:
    """dx = alpha*dz, dF = (m/sqrt c)*dz, dm = sum(dz*F)/sqrt c; folded into a weight it is the same function of all of them."""
    torch.manual_seed(0)
    layer = nf.RescaledResidual(2, 5, backend=backend).to(DEVICE)
    conv = nn.Conv2d(6, 6, 3, padding=1, bias=False).to(DEVICE)
    with torch.no_grad():
        layer.multiplier.fill_(1.3)
    x, h, dy = (data(SHAPE, seed=s).requires_grad_(s < 3) for s in (1, 2, 3))
    alpha, beta = math.sqrt(6 / 7), 1.3 / math.sqrt(5)
    branch = conv(h).detach().requires_grad_()
    z = alpha * x.double() + beta * branch.double()
    y = layer(x, branch)
    close("y", y, z.relu(), 1e-5)
    dz = dy.double() * (z > 0)
    dx, dbranch, dm = torch.autograd.grad(y, (x, branch, layer.multiplier), dy)
    close("dx", dx, alpha * dz, 1e-5)
    close("dF", dbranch, beta * dz, 1e-5)
    close("dm", dm, (dz * branch).sum().view(1) / math.sqrt(5), 1e-5)
    parameters = (x, h, layer.multiplier, conv.weight)
    apart = torch.autograd.grad(layer(x, conv(h)), parameters, dy)
    folded = layer(x, F.conv2d(h, layer.fold(conv.weight), padding=1), folded=True)
    close("folded y", folded, z.relu(), 1e-5)
    for a, b in zip(torch.autograd.grad(folded, parameters, dy), apart, strict=True):
        close("folded gradient", a, b, 1e-5)


@pytest.mark.parametrize(("act", "act_last"), [(None, False), ("relu", False), ("relu", True)])
@pytest.mark.parametrize("batches", [1, 3])
def test_input_bias_is_measured(batches: int, act: str | None, act_last: bool, backend: str) -> None:
    """b_eff = b - average of the first T batches' channel means, each batch being in the average that it sees; 0.01 b meanwhile."""
    layer = nf.InputBias(6, batches, act, act_last=act_last, backend=backend).to(DEVICE)
    with torch.no_grad():
        layer.bias.copy_(_random(6, seed=1))
    b, means = layer.bias.detach().double().view(-1, 1, 1), []
    before: Callable[[Tensor], Tensor] = torch.relu if act and not act_last else lambda t: t
    after: Callable[[Tensor], Tensor] = torch.relu if act_last else lambda t: t
    for step in range(batches + 2):
        x = data(SHAPE, seed=step) + step
        y = layer(x)
        t = before(x.double())
        if step < batches:
            means.append(t.mean((0, 2, 3)).view(-1, 1, 1))
        mean = torch.stack(means).mean(0)
        close(f"step {step}", y, after(t + (0.01 if step < batches else 1) * b - mean), 1e-5)
        layer.zero_grad()
        (db,) = torch.autograd.grad(y.sum(), layer.bias)
        share = (after(t + (0.01 if step < batches else 1) * b - mean) > 0) if act_last else torch.ones_like(t)
        close(f"db {step}", db, (0.01 if step < batches else 1) * share.double().sum((0, 2, 3)), 1e-5)
    assert int(layer.count) == batches
    close("init_mean", layer.init_mean, mean.flatten(), 1e-6)
    layer.eval()(x + 5)
    assert int(layer.count) == batches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_blocks_under_autocast(dtype: torch.dtype) -> None:
    """Convolutions in bfloat16, parameters in float32: an identity shortcut keeps its type, and all gradients are there."""
    torch.manual_seed(0)
    for block, shape, out in (
        (RescaleBlock("bottleneck", 8, 4, 1, 3, stride=2), (2, 16, 3, 3), torch.bfloat16),
        (RescaleBlock("basic", 8, 8, 1, 3), (2, 8, 6, 6), dtype),
    ):
        x = torch.randn(2, 8, 6, 6, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(x)
        assert y.dtype == out and y.shape == shape
        y.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())


def test_input_bias_in_evaluation_measures_nothing() -> None:
    layer = nf.InputBias(6).eval()
    x = torch.randn(SHAPE)
    assert torch.equal(layer(x), x) and int(layer.count) == 0
    layer.train()(torch.empty(0, 6, 2, 2))
    assert int(layer.count) == 0, "an empty batch has no mean"


def test_input_bias_as_a_module() -> None:
    layer = nf.InputBias(6, 2, "relu")
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {"bias": (6,), "init_mean": (6,), "count": ()}
    for _ in range(2):
        layer(torch.randn(SHAPE))
    x = torch.randn(SHAPE)
    loaded = nf.InputBias(6, 2, "relu")
    loaded.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(twin(x), layer(x)) and torch.equal(twin.init_mean, layer.init_mean)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.count.dtype == torch.int64 and half(x.bfloat16()).dtype == torch.bfloat16
    with torch.device("meta"):
        deferred = nf.InputBias(6, act="relu")
    assert deferred(torch.empty(SHAPE, device="meta")).is_meta
    deferred = deferred.to_empty(device="cpu")
    deferred.reset_parameters()
    assert torch.equal(deferred.eval()(x), x.relu())
    assert "6, batches=2, act=relu" in repr(layer) and "3, 16, act=relu" in repr(nf.RescaledResidual(3, 16))


def test_compiled_steps_measure_the_same() -> None:
    """Also past T, where a compiled step still has the measurement in it, and infinities must not reach the mean."""
    torch._dynamo.reset()
    for batches in (1, 2):
        layer = nf.InputBias(6, batches, "relu")
        twin = copy.deepcopy(layer)
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        for step in range(4):
            x = torch.randn(SHAPE) + step
            if step == 3:
                x[0, 0, 0, 0] = torch.inf
            torch.testing.assert_close(compiled(x), layer(x))
        torch.testing.assert_close(twin.init_mean, layer.init_mean)
        assert twin.init_mean.isfinite().all() and int(twin.count) == batches


@pytest.mark.parametrize("mode", ["compile", "export", "vmap"])
def test_blocks_can_be_seen_through(mode: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = RescaleBlock("basic", 4, 4, 1, 3)
    x = torch.randn(2, 4, 5, 5)
    block(x)
    block.eval()
    want = block(x)
    if mode == "export":
        program = torch.export.export(block, (x,))
        assert not [n for n in program.graph.nodes if "normfused" in str(n.target)]
        torch.testing.assert_close(program.module()(x), want)
    elif mode == "vmap":
        torch.testing.assert_close(torch.func.vmap(lambda t: block(t[None])[0])(x), want)
    else:
        compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled(leaf).square().sum().backward()
        block(other).square().sum().backward()
        torch.testing.assert_close(leaf.grad, other.grad)


# ---------------------------------------------------------------------------------------------------- the network
def test_network(backend: str) -> None:
    for kind, stem, shape in (("basic", "small", (2, 1, 15, 15)), ("bottleneck", "imagenet", (2, 3, 33, 33))):
        torch.manual_seed(0)
        net = nf.rescalenet(
            (1, 2), kind, stem=stem, width=8, num_classes=5, in_channels=shape[1], drop_conv=0.1, backend=backend
        ).to(DEVICE)  # fmt: skip
        y = net(_random(*shape, seed=1).to(memory_format=torch.channels_last))
        assert y.shape == (2, 5)
        y.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        twin = copy.deepcopy(net)
        twin.load_state_dict(net.state_dict())
        x = _random(*shape, seed=2)
        assert torch.equal(twin.eval()(x), net.eval()(x))


def test_networks_of_torchvisions_shapes() -> None:
    """The numbers of convolution weights are those of torchvision's ResNet-18 and -50."""
    for make, convolutions in ((nf.rescalenet18, 11_166_912), (nf.rescalenet50, 23_454_912)):
        with torch.device("meta"):
            net = make()
        assert sum(p.numel() for p in net.parameters() if p.dim() == 4) == convolutions
        assert net(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1000)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    net = nf.rescalenet((1, 1, 1), "bottleneck", width=64, drop_conv=0.2, stem="small", in_channels=64)
    blocks = [m for m in net.modules() if isinstance(m, RescaleBlock)]

    def deviation(weight: Tensor) -> float:
        return float(weight.detach().std()) * math.sqrt(math.prod(weight.shape[1:]))

    for k, block in enumerate(blocks):
        want = math.sqrt(2) * (3 / (3 + k)) ** (1 / 6) * (math.sqrt(0.8) if k else 1)
        for conv in block.convs:  # at least 4096 weights: 1.1 % is the deviation of the sample's own
            assert deviation(conv.weight) == pytest.approx(want, rel=0.05)
        assert deviation(block.shortcut[-1].weight) == pytest.approx(1, rel=0.05)
    assert deviation(net.conv1.weight) == pytest.approx(math.sqrt(2), rel=0.05)
    assert deviation(net.fc.weight) == pytest.approx(1, rel=0.05)
    layer = nn.Conv2d(64, 64, 3, groups=4)
    normal_init_(layer, 2.0)
    assert deviation(layer.weight) == pytest.approx(math.sqrt(2), rel=0.05) and not layer.bias.any()


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_blocks_add_the_next_bias(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of blocks is the blocks one by one, in fewer operations; hooks and the first batches see every module's own call."""
    torch.manual_seed(0)
    net = nf.rescalenet((2, 1), kind, stem="small", width=4, in_channels=3, num_classes=2, backend=backend).to(DEVICE)
    x, calls = _random(2, 3, 6, 6, seed=1), []
    monkeypatch.setattr(nf.InputBias, "forward", lambda *a, run=nf.InputBias.forward: calls.append(a[0]) or run(*a))
    net(x)
    measured = len(calls)
    assert len(set(calls)) == measured == sum(isinstance(m, nf.InputBias) for m in net.modules()), "all are measured"
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nf.InputBias):
                m.bias.normal_()

    def run() -> tuple[Tensor, ...]:
        calls.clear()
        y = net(x)
        return (y, *torch.autograd.grad(y.square().sum(), list(net.parameters())))

    chained = run()
    assert len(calls) == measured - 3  # two first biases of blocks that follow one, and the last before the pooling
    seen: list[Any] = []
    handle = net.stages[0][1].register_forward_hook(lambda m, given, y: seen.append((given, y)))
    watched = run()
    assert len(calls) == measured - 1 and len(seen) == 1 and len(seen[0][0]) == 1 and isinstance(seen[0][1], Tensor)
    handle.remove()
    handle = net.stages.register_forward_hook(lambda m, given, y: None)
    apart = run()
    assert len(calls) == measured
    handle.remove()
    for got, want in itertools.chain(zip(chained, apart, strict=True), zip(watched, apart, strict=True)):
        close("chained", got, want, 1e-5)


def test_parameter_groups() -> None:
    net = nf.rescalenet((1, 1), width=8, num_classes=3)
    decayed, spared = nf.rescale_parameter_groups(net, 1e-4)
    assert decayed["weight_decay"] == 1e-4 and spared["weight_decay"] == 0
    assert {id(p) for g in (decayed, spared) for p in g["params"]} == {id(p) for p in net.parameters()}
    assert all(p.dim() > 1 for p in decayed["params"]) and all(p.dim() == 1 for p in spared["params"])


def test_a_bias_before_is_a_bias_after_through_a_1x1_convolution() -> None:
    conv, x, b = nn.Conv2d(6, 4, 1, bias=False).double(), torch.randn(SHAPE, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    after = conv(x) + (conv.weight.flatten(1) @ b).view(-1, 1, 1)
    torch.testing.assert_close(conv(NF.affine_act(x, None, b)), after)


def test_training_without_norms() -> None:
    """A few steps of a network of 8 blocks on a task it can learn: bounded activations and a falling loss."""
    torch.manual_seed(0)
    net = nf.rescalenet((4, 4), stem="small", width=8, in_channels=1, num_classes=2)
    optimizer = torch.optim.SGD(nf.rescale_parameter_groups(net, 1e-4), 0.05, momentum=0.9)
    losses = []
    for _ in range(25):
        labels = torch.randint(2, (32,))
        x = torch.randn(32, 1, 8, 8) + labels.view(-1, 1, 1, 1)
        loss = F.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 3 and sum(losses[-5:]) / 5 < 0.35
