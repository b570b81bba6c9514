"""memory_efficient=True: y is kept, not x; gradients against float64; what is refused, and how drifting weights show.

float32 and float64 keep the suite's tolerances. Of half types the rounding of y is bounded element by element: with the unit roundoff u,
y's relative error u and, of leaky_relu, another u for z = y/slope and for dz, the rebuilt x_hat is off by at most
e = u*(roundings of z)*|z/gamma| + u*|x_hat|, and dx = p*(dz - mean dz - x_hat*mean(dz*x_hat)) by what that makes of it.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

import normfused as nf
from normfused import functional as nF
from normfused.rebuild import too_near_zero
from tests.support.check import DEVICE, HALF, arguments, compare, data, layout
from tests.support.formulas import ACT_NUMBERS, BY_NAME, KINDS, Kind

from .test_memory import saved

ROUNDED = [kind for kind in KINDS if kind.rms is False or kind.dims != "group"]  # all but FRN
every_kind = pytest.mark.parametrize("kind", ROUNDED, ids=lambda k: k.name)


def numbers(kind: Kind, dtype: torch.dtype, act: str, mode: str | None = None):
    """Arguments whose weights are of both signs and none near 0."""
    a = arguments(kind, kind.shape, dtype, torch.float32 if dtype in HALF else dtype, act=act, mode=mode)
    with torch.no_grad():
        a.weight.copy_(torch.where(a.weight.abs() < 0.3, -0.3, a.weight))
        a.weight.view(-1)[0] *= -1
    return a


@pytest.mark.triton_surface
@every_kind
def test_gradients(kind: Kind, backend: str) -> None:
    for dtype, act, mode in itertools.product((torch.float32, torch.float64), ("identity", "leaky_relu"), (None, "pre_norm")):
        if mode is None or kind.pre_norm:
            form = "channels_last" if act == "identity" else "slice"
            compare(kind, layout(data(kind.shape, dtype), form), numbers(kind, dtype, act, mode), backend, memory_efficient=True)
    compare(kind, data(kind.shape), numbers(kind, torch.float32, "leaky_relu"), backend, memory_efficient=True, need_x=False)
    compare(kind, data(kind.shape), arguments(kind, kind.shape, affine=False), backend, memory_efficient=True)


def test_softplus(backend: str) -> None:
    kind = BY_NAME["group_3"]
    for dtype in (torch.float32, torch.float64):
        a, x = numbers(kind, dtype, "softplus"), data(kind.shape, dtype).requires_grad_()
        found, wanted = (
            torch.autograd.grad(
                nF.group_norm_act(x, 3, a.weight, a.bias, act="softplus", backend=backend, memory_efficient=keeps).sin().sum(),
                (x, a.weight, a.bias),
            )
            for keeps in (True, False)
        )
        for f, w in zip(found, wanted, strict=True):
            torch.testing.assert_close(f, w, rtol=1e-5, atol=1e-5 * float(w.abs().max()))


def mean_of_set(kind: Kind, t: torch.Tensor) -> torch.Tensor:
    if kind.dims == "group":
        groups = kind.groups or t.shape[1]
        grouped = t.reshape(t.shape[0], groups, -1)
        return grouped.mean(2, keepdim=True).expand_as(grouped).reshape(t.shape)
    over = {"channel": (0, *range(2, t.dim())), "channels": (1,), "rows": tuple(range(t.dim() - kind.trailing, t.dim()))}[kind.dims]
    return t.mean(over, keepdim=True).expand_as(t)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@every_kind
def test_half_types_within_the_rounding_of_y(kind: Kind, dtype: torch.dtype, backend: str) -> None:
    u = torch.finfo(dtype).eps / 2
    for act in ("identity", "leaky_relu"):
        a, x = numbers(kind, dtype, act), data(kind.shape, dtype).requires_grad_()
        dy = torch.randn(kind.shape, dtype=torch.float64).to(dtype).to(DEVICE)
        y = kind.call(x, a, backend, memory_efficient=True)
        parameters = [t for t in (a.weight, a.bias) if t is not None]
        dx, dweight, *dbias = torch.autograd.grad(y, [x, *parameters], dy)

        x64, a64 = x.detach().double().requires_grad_(), a.wide()
        _, _, z, p = kind.oracle(x64, a64)
        z = z.detach()
        hat = kind.normalized(x64, a64)[0].detach()
        gamma = kind.broadcast(a64.weight, kind.shape).detach().expand_as(hat)
        slope = torch.ones_like(z) if act == "identity" else torch.where(z > 0, 1.0, ACT_NUMBERS[act]["negative_slope"])
        dz = dy.double() * slope
        roundings = torch.where(slope == 1, 1.0, 2.0)
        e = u * (roundings * (z / gamma).abs() + hat.abs())
        d = u * (roundings - 1) * dz.abs()
        recentred = torch.zeros_like(hat)  # how far the statistics of the rebuilt tensor, which the torch backend takes anew, are off
        if backend == "torch" and not kind.frozen:
            recentred = mean_of_set(kind, hat.abs() * e)
            e = e + hat.abs() * recentred + (0 if kind.rms else mean_of_set(kind, e))
        if kind.frozen:
            exact, bound = p * dz, p.abs() * d
        else:
            g = gamma * dz  # p*dz times the set's deviation
            m, s = mean_of_set(kind, g), mean_of_set(kind, g * hat)
            m = torch.zeros_like(m) if kind.rms else m
            exact = (p / gamma) * (g - m - hat * s)
            slip = gamma.abs() * d
            inner = slip + mean_of_set(kind, slip) + e * s.abs() + (hat.abs() + e) * mean_of_set(kind, g.abs() * e + hat.abs() * slip)
            bound = (p / gamma).abs() * inner + recentred * exact.abs()
        # half a percent for products of roundings and float32's own; an element of dx is rounded to `dtype` last
        bound = 1.005 * (bound + u * exact.abs()) + 1e-5 * (p * dz).abs().max()
        worst = ((dx.double() - exact).abs() / bound).max()
        assert worst <= 1, f"{kind.name} {act}: dx is off by {float(worst):.2f} of what the rounding of y explains"
        terms = dz.abs() * e + d * hat.abs()
        dims = list(range(z.dim() - kind.trailing)) if kind.dims == "rows" else [0, *range(2, z.dim())]
        for got, want, slack in ((dweight, dz * hat, terms), *((b, dz, d) for b in dbias)):
            limit = 1.005 * slack.sum(dims) + 1e-5 * want.abs().sum(dims)
            assert bool(((got.double() - want.sum(dims)).abs() <= limit).all())


LAYERS = {
    "batch": lambda **k: nf.BatchNormAct2d(8, **k),
    "batch frozen": lambda **k: nf.BatchNormAct2d(8, **k).eval(),
    "instance": lambda **k: nf.InstanceNormAct2d(8, affine=True, **k),
    "group": lambda **k: nf.GroupNormAct(2, 8, **k),
    "layer": lambda **k: nf.LayerNormAct(12, **k),
    "layer dim=1": lambda **k: nf.LayerNormAct(8, dim=1, **k),
    "rms": lambda **k: nf.RMSNormAct(12, **k),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
def test_saves_y_alone(name: str, backend: str) -> None:
    for dtype, act in itertools.product((torch.float32, torch.bfloat16), (None, "leaky_relu")):
        layer = LAYERS[name](act=act, backend=backend, memory_efficient=True).to(DEVICE)
        x = torch.randn(2, 8, 12, 12, device=DEVICE, dtype=dtype, requires_grad=True)
        named, y = saved(lambda layer=layer, x=x: layer(x), x, None, layer)
        moments = named.pop("other")
        assert named == {"y": x.numel() * x.element_size()}
        assert moments <= 4 * x.numel() // 8  # one float32 number a set of 8 elements or more
        y.sum().backward()


def test_pre_norm_keeps_the_normalized_tensor_and_not_the_stream(backend: str) -> None:
    layer = nf.RMSNormAct(12, residual_mode="pre_norm", backend=backend, memory_efficient=True).to(DEVICE)
    x, r = (torch.randn(2, 8, 12, 12, device=DEVICE, requires_grad=True) for _ in range(2))
    outputs = []
    named, _ = saved(lambda: outputs.extend(layer(x, r)) or outputs[0], x, r, layer)
    assert named.pop("other") <= 4 * x.numel() // 12 and named == {"y": x.numel() * 4}


@pytest.mark.parametrize(
    "act",
    [
        *("relu", "relu6", "prelu", "elu", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "mish", "tlu"),
        *(("leaky_relu", {"negative_slope": slope}) for slope in (0.0, -0.5)),
        ("softplus", {"threshold": 4}),
    ],
    ids=str,
)
def test_other_activations_are_refused_by_name(act) -> None:
    word = act if isinstance(act, str) else act[0]
    with pytest.raises(ValueError, match=rf"GroupNormAct: memory_efficient=True must find x from y.*got {word}"):
        nf.GroupNormAct(2, 8, act=act, memory_efficient=True)
    weight = torch.tensor([0.2]) if word in ("prelu", "tlu") else None
    with pytest.raises(ValueError, match=rf"group_norm_act: memory_efficient=True must find x from y.*got {word}.* in float32"):
        nF.group_norm_act(torch.randn(2, 8, 3), 2, act=act, act_param=weight, memory_efficient=True)


def test_what_else_is_refused() -> None:
    x = torch.randn(2, 8, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"softplus allow, got softplus\(.*\) in float16"):
        nf.GroupNormAct(2, 8, act="softplus", memory_efficient=True)(x.half())
    for mode in ("pre_act", "post_act"):
        layer = nf.BatchNormAct1d(8, residual_mode=mode, memory_efficient=True)
        with pytest.raises(ValueError, match=f"find x from y alone, got a residual in mode '{mode}'"):
            layer(x, x)
        assert layer.num_batches_tracked == 0
        layer(x).sum().backward()
    with pytest.raises(RuntimeError, match="keeps no x to differentiate a second time, got a backward with create_graph=True"):
        torch.autograd.grad(nf.GroupNormAct(2, 8, memory_efficient=True)(x).square().sum(), x, create_graph=True)


@every_layer
def test_a_weight_near_zero_raises_by_the_layers_name_at_the_first_training_forward(name: str) -> None:
    layer = LAYERS[name](act="leaky_relu", memory_efficient=True).train()
    with torch.no_grad():
        layer.weight.view(-1)[3] = 0.0
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(2, 8, 12, 12)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{type(layer).__name__}\(.*memory_efficient.*got weight 0.* in channel 3 \(and 0 more of"):
            layer(x)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items()) and layer.near_zero == 0
    with torch.no_grad():  # nothing is kept
        layer(x)
    layer.eval()(x)


def test_later_drift_is_counted_and_shown() -> None:
    layer = nf.BatchNormAct2d(8, memory_efficient=True)
    x = torch.randn(2, 8, 3, 3)
    layer(x)
    assert "weights too near 0 to rebuild x: 0 so far" in str(nf.explain(layer, x))
    nn.init.zeros_(layer.weight[:2].data)
    for _ in range(3):
        layer(x)
    assert layer.near_zero == 6
    layer.eval()
    report = nf.explain(layer, x)
    assert report.near_zero == 6 and report.path == "rebuilt" and "6 so far" in str(report) and "cannot be relied on" in str(report)
    assert nf.explain(nf.BatchNormAct2d(8), x).near_zero is None
    assert "in place of x, y included: " in str(report) and "beside x and parameters: " in str(nf.explain(nf.BatchNormAct2d(8), x))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_the_limit_is_that_of_the_rebuilt_input(dtype: torch.dtype) -> None:
    """x_hat from the rounded y: within 1/32 and its own rounding for every weight that is let through, and worse soon below."""
    weight = torch.logspace(-12, 1, 200, dtype=torch.float64).repeat(5)
    bias = torch.tensor([0.0, 1e-6, 1e-2, 1.0, -30.0], dtype=torch.float64).repeat_interleave(200)
    hat = torch.linspace(-3, 3, 101, dtype=torch.float64).unsqueeze(1)
    y = (weight * hat + bias).to(dtype).double()
    found = (y - bias) / weight
    u, near = torch.finfo(dtype).eps / 2, too_near_zero(weight, bias, dtype)
    assert 0 < int(near.sum()) < 1000
    error = ((found - hat).abs() - u * hat.abs()).max(0).values
    assert float(error[~near].max()) <= 1 / 32
    assert float(error[near & (weight < 0.1 * 32 * u * bias.abs())].min()) > 1 / 32


@pytest.mark.parametrize("compiler", ["aot_eager"])
@pytest.mark.parametrize("name", ["batch", "group", "layer", "rms"])
def test_compiled(name: str, compiler: str, backend: str) -> None:
    torch._dynamo.reset()
    layer = LAYERS[name](act="leaky_relu", backend=backend, memory_efficient=True)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend=compiler)
    for _ in range(2):
        x = torch.randn(2, 8, 12, 12).to(memory_format=torch.channels_last)
        results = []
        for run, own in ((layer, layer), (compiled, twin)):
            leaf = x.clone().requires_grad_()
            y = run(leaf)
            y.square().sum().backward()
            results.append((y, leaf.grad, own.weight.grad, *own.buffers()))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    nn.init.zeros_(twin.weight)
    compiled(x)
    assert twin.near_zero == twin.weight.numel()


@every_layer
def test_checkpoints_copies_and_meta(name: str) -> None:
    layer, plain = LAYERS[name](memory_efficient=True), LAYERS[name]()
    assert list(layer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    assert "memory_efficient" in repr(layer) and "memory_efficient" not in repr(plain)
    x = torch.randn(2, 8, 12, 12)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert twin.memory_efficient and torch.equal(twin.eval()(x), copy.deepcopy(layer).eval()(x))
    assert layer.half()(x.half()).dtype == torch.float16 and layer.near_zero.dtype == torch.int64
    meta = LAYERS[name](memory_efficient=True, device="meta")
    assert meta(x.to("meta")).is_meta
    meta.to_empty(device="cpu").reset_parameters()
    assert meta.near_zero == 0
    seen_through = torch.func.grad(lambda t: LAYERS[name](memory_efficient=True).eval()(t).square().sum())(x)
    assert seen_through.shape == x.shape
    empty = LAYERS[name](memory_efficient=True)(x[:0])
    assert empty.shape == (0, 8, 12, 12)
