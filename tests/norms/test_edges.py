"""Numbers at their worst: large means, constant sets, NaN, ties, one element, nothing at all; and invariants that hold at any size."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import normfused as nf
import normfused.functional as NF
from tests.support.check import DEVICE, HALF, arguments, close, compare, data, error, layout
from tests.support.formulas import BY_NAME, KINDS, Kind

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
SETS = [k for k in KINDS if not k.frozen]
CENTRED = [k for k in SETS if not k.rms]


def _shifted(kind: Kind, mean: float, form: str) -> torch.Tensor:
    return layout(data((4, 6, 8, 6), mean=0) + mean, form)


@pytest.mark.parametrize("kind", CENTRED, ids=lambda k: k.name)
@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
def test_mean_a_hundred_deviations(kind: Kind, form: str, backend: str) -> None:
    """1e-5, and 3e-5 for ATen's kernels (2.5e-5 at worst); E[x^2] - E[x]^2 would give 6e-4."""
    x = _shifted(kind, 100.0, form)
    tolerance = 3e-5 if backend == "torch" else 1e-5
    compare(kind, x, arguments(kind, tuple(x.shape), act="relu"), backend, tolerance=tolerance, parameters=tolerance)


@pytest.mark.parametrize("kind", CENTRED, ids=lambda k: k.name)
@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
def test_mean_a_thousand_deviations(kind: Kind, form: str, backend: str) -> None:
    """y within 1e-3; anything worse is E[x^2] - E[x]^2, which gives 7e-2."""
    x = _shifted(kind, 1000.0, form)
    a = arguments(kind, tuple(x.shape))
    close("y", kind.call(x, a, backend), kind.oracle(x.double(), a.wide())[0], 1e-3)


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
def test_long_sums_keep_their_digits(form: str, backend: str) -> None:
    """Half of 2^15 positions are one value, like the background of an image: sums taken one by one are off by 6e-6 of y and 5e-5 of the
    sum of the terms' sizes. Against the formulas in float64, the sums relative to those sizes."""
    x, dy = data((1, 4, 128, 256), mean=0), data((1, 4, 128, 256), seed=3, mean=0) * 1e-2 + 1e-2
    x[:, :, :64] = x[:, :, :1, :1]
    weight, bias = (torch.tensor(v, device=DEVICE, requires_grad=True) for v in ([0.5, 1.0, 1.5, 2.0], [0.1, 0.2, -0.3, 0.0]))
    leaf = layout(x, form).requires_grad_()
    y = NF.instance_norm_act(leaf, None, None, weight, bias, backend=backend)
    got = y.detach(), *torch.autograd.grad(y, (leaf, weight, bias), layout(dy, form))

    x, dy, w = x.double(), dy.double(), weight.detach().double().view(1, -1, 1, 1)
    over = {"dim": (0, 2, 3), "keepdim": True}
    rstd = (x.var(**over, correction=0) + 1e-5).rsqrt()
    hat = (x - x.mean(**over)) * rstd
    dx = w * rstd * (dy - dy.mean(**over) - hat * (dy * hat).mean(**over))
    want = w * hat + bias.detach().view(1, -1, 1, 1), dx, (dy * hat).sum((0, 2, 3)), dy.sum((0, 2, 3))
    sizes = (*(t.abs().max() for t in want[:2]), *(t.abs().sum((0, 2, 3)).max() for t in (dy * hat, dy)))
    errors = [float((a - b).abs().max() / size) for a, b, size in zip(got, want, sizes, strict=True)]
    assert max(errors) < 1e-6, errors


@pytest.mark.parametrize("kind", SETS, ids=lambda k: k.name)
@pytest.mark.parametrize("size", [300.0, 1e-3])
def test_halves_of_any_size(kind: Kind, size: float, backend: str) -> None:
    """Squares of float16 would overflow from 256 on and vanish below 2e-4."""
    x = (data(kind.shape, torch.float64, mean=1.0) * size).half()
    dy = data(kind.shape, torch.float16, seed=2, mean=0) * (1 if size > 1 else 1e-3)  # dx is as large as dy/|x|
    a = arguments(kind, kind.shape, torch.float16, torch.float32, act="relu")
    compare(kind, x, a, backend, dy=dy)


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sums_of_many_halves(dtype: torch.dtype, form: str, backend: str) -> None:
    """Of ones, some 1600 to a channel, and of a constant: a running sum in bfloat16 stalls at 256, in float16 at 2048."""
    x = layout(data((2, 6, 40, 40), dtype, mean=1.0), form)
    for name in ("batch", "instance", "group_3", "layer_channels", "frn"):
        a = arguments(BY_NAME[name], (2, 6, 40, 40), dtype, torch.float32, act="relu")  # or the sums would cancel
        compare(BY_NAME[name], x, a, backend, dy=torch.ones((), dtype=dtype, device=DEVICE).expand(x.shape))
    layer = nf.BatchNormAct2d(6, momentum=1.0, affine=False, backend=backend).to(DEVICE)
    layer(layout(torch.full((2, 6, 40, 40), 1.5, dtype=dtype, device=DEVICE), form))
    close("running_mean", layer.running_mean, torch.full((6,), 1.5, dtype=torch.float64, device=DEVICE), 1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", CENTRED, ids=lambda k: k.name)
def test_constant_sets(kind: Kind, backend: str) -> None:
    """No variance: y is the bias up to rho times the mean's rounding, and dx is finite."""
    x = torch.full(kind.shape, 3.3, device=DEVICE, requires_grad=True)
    a = arguments(kind, kind.shape)
    y = kind.call(x, a, backend)
    b = kind.broadcast(a.bias, kind.shape)
    assert b is not None
    assert float((y - b).abs().max()) < 316 * 3.3 * 1e-6
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.isfinite(dx).all()


@pytest.mark.parametrize("kind", SETS, ids=lambda k: k.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_set(kind: Kind, bad: float, backend: str) -> None:
    """Every element of the set becomes NaN and no element of another, also behind relu."""
    x = data(kind.shape)
    clean = kind.call(x, arguments(kind, kind.shape, act="relu"), backend)
    x[1, 2, 1, 1] = bad
    y = kind.call(x, arguments(kind, kind.shape, act="relu"), backend)
    _, _, z, _ = kind.oracle(x.double(), arguments(kind, kind.shape).wide())
    touched = z.isnan()
    if bad != bad or not kind.rms:  # an infinite mean square makes everything else in the set zero
        assert y.isnan()[touched].all()
    hat_touched = touched | (z != kind.oracle(data(kind.shape).double(), arguments(kind, kind.shape).wide())[2])
    assert not y.isnan()[~hat_touched].any()
    close("other sets", y[~hat_touched], clean.double()[~hat_touched], 1e-6)


@pytest.mark.triton_surface
@pytest.mark.parametrize("learned", [None, "scalar", "channel"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_frn_of_one_position(learned: str | None, size: float, backend: str) -> None:
    """dx = gamma*rho^3*eps*dy: the general formula is off by 100 % from |x| = 10 on."""
    kind = BY_NAME[{None: "frn", "scalar": "frn_eps1", "channel": "frn_epsC"}[learned]]
    for shape in ((4, 6), (4, 6, 1, 1)):
        x = ((data(shape, mean=0).sign() + 0.3 * data(shape, mean=0, seed=4)) * size).requires_grad_()
        a = arguments(kind, shape)
        x64 = x.detach().double().requires_grad_()
        a64 = a.wide()
        dy = data(shape, seed=5)
        (dx,) = torch.autograd.grad(kind.call(x, a, backend), x, dy)
        eps: torch.Tensor = torch.full((6,), kind.eps, dtype=torch.float64, device=DEVICE)
        if a64.eps_l is not None:
            eps = eps + a64.eps_l.detach().abs()
        eps, w = (t.view(1, 6, *[1] * (len(shape) - 2)) for t in (eps, a64.weight.detach()))  # type: ignore[union-attr]
        want = w * (x64.detach() ** 2 + eps) ** -1.5 * eps * dy.double()
        assert float(((dx.double() - want).abs() / want.abs()).max()) < 1e-5


def test_tlu_tie_belongs_to_the_norm(backend: str) -> None:
    """x = 0, bias = 0, tau = 0 at initialization: dy goes to x, nothing to tau; PyTorch's maximum would halve it."""
    x = torch.zeros(2, 3, 4, device=DEVICE, requires_grad=True)
    w, b, tau = (torch.full((3,), v, device=DEVICE, requires_grad=True) for v in (1.0, 0.0, 0.0))
    y = NF.filter_response_norm(x, w, b, tau, backend=backend)
    dx, db, dtau = torch.autograd.grad(y.sum(), (x, b, tau))
    assert torch.equal(dtau, torch.zeros(3, device=DEVICE))
    assert torch.equal(db, torch.full((3,), 8.0, device=DEVICE))
    close("dx", dx, torch.full(x.shape, 1e3, dtype=torch.float64), 1e-5)


@kinds
def test_empty_batch(kind: Kind, backend: str) -> None:
    """An empty y and dx, zero parameter gradients; no samples, or samples of no positions."""
    without = (kind.shape[0], 0, *kind.shape[2:]) if kind.dims == "rows" else (*kind.shape[:2], 0, *kind.shape[3:])
    for shape, act, mode in itertools.product(((0, *kind.shape[1:]), without), ("relu", "prelu"), (None, "pre_act")):
        x = torch.zeros(shape, device=DEVICE, requires_grad=True)
        a = arguments(kind, shape, act=act, mode=mode)
        y = kind.call(x, a, backend)
        assert y.shape == x.shape
        named = {"x": x, **a.named()}
        for name, grad in zip(named, torch.autograd.grad(y.sum(), list(named.values())), strict=True):
            assert grad.shape == named[name].shape and not grad.any(), name


@kinds
def test_twice_the_same(kind: Kind, backend: str) -> None:
    """Bit for bit: no order of summation is left to chance."""
    x = data(kind.shape).requires_grad_()
    seen = []
    for _ in range(2):
        a = arguments(kind, kind.shape, act="gelu", mode="pre_act")
        y = kind.call(x, a, backend)
        seen.append((y, *torch.autograd.grad(y, [x, *a.named().values()], data(kind.shape, seed=3))))
    assert all(torch.equal(p, q) for p, q in zip(*seen, strict=True))


@pytest.mark.parametrize("kind", CENTRED, ids=lambda k: k.name)
def test_dx_sums_to_zero_over_every_set(kind: Kind, backend: str) -> None:
    """A constant added to a set changes nothing, so the gradient along it is zero."""
    x = data(kind.shape).requires_grad_()
    (dx,) = torch.autograd.grad(kind.call(x, arguments(kind, kind.shape, act="silu"), backend), x, data(kind.shape, seed=3))
    if kind.dims == "group":
        dx = dx.reshape(kind.shape[0], kind.groups or kind.shape[1], -1)
        total = dx.sum(2)
    elif kind.dims == "channel":
        total = dx.sum((0, 2, 3))
    else:
        total = dx.sum(1 if kind.dims == "channels" else tuple(range(-kind.trailing, 0)))
    assert float(total.abs().max()) < 2e-5 * float(dx.abs().max())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_limiting_cases(dtype: torch.dtype, limit: float, backend: str) -> None:
    """Norms that are the same norm for some setting, among them FRN of centred slices and instance norm, TLU at 0 and relu."""
    x = data((3, 6, 4, 5), dtype)
    x64 = x.double()
    w, b = (torch.linspace(*ends, 6, dtype=dtype, device=DEVICE) for ends in ((0.5, 2), (-1, 1)))
    w64, b64 = w.double(), b.double()
    k = {"backend": backend}
    each = F.layer_norm(x64, (6, 4, 5)) * w64.view(-1, 1, 1) + b64.view(-1, 1, 1)
    instance = F.instance_norm(x64, None, None, w64, b64)
    viewed = F.batch_norm(x64.reshape(1, 18, 20), None, None, w64.repeat(3), b64.repeat(3), training=True).view_as(x64)
    close("GN(C) = IN", NF.group_norm_act(x, 6, w, b, **k), instance, limit)
    close("GN(1) = LN, then affine", NF.group_norm_act(x, 1, w, b, **k), each, limit)
    close("BN of one sample = IN", NF.batch_norm_act(x[:1], None, None, w, b, training=True, **k), instance[:1], limit)
    close("IN = BN of (1, N*C, S)", NF.instance_norm_act(x, None, None, w, b, **k), viewed, limit)
    close("FRN = RMS", NF.filter_response_norm(x, eps=1e-6, **k), F.rms_norm(x64.flatten(2), (20,), eps=1e-6).view_as(x), limit)
    centred = x - x.mean((2, 3), keepdim=True)
    close("FRN centred = IN", NF.filter_response_norm(centred, w, b, eps=1e-5, **k), instance, limit)
    for factor in (1e-3, 7.0, 1e3):
        close("FRN, eps 0: any scale", NF.filter_response_norm(factor * x, eps=0.0, **k), F.rms_norm(x64, (4, 5), eps=0.0), limit)
    zero = torch.zeros(6, dtype=dtype, device=DEVICE)
    assert torch.equal(NF.filter_response_norm(x, tau=zero, **k), NF.filter_response_norm(x, act="relu", **k))
    assert torch.equal(NF.filter_response_norm(x, tau=zero - 1e9, **k), NF.filter_response_norm(x, **k))


def test_one_element_rows_give_the_bias(backend: str) -> None:
    """Legal for layer norm, of rows and of channels: y = bias, dx = 0."""
    half = torch.full((1,), 0.5, device=DEVICE)
    for dim, shape in ((-1, (3, 4, 1)), (1, (3, 1, 4, 2))):
        x = data(shape).requires_grad_()
        y = NF.layer_norm_act(x, 1, half + 1, half, dim=dim, backend=backend)
        assert torch.equal(y, torch.full_like(y, 0.5))
        (dx,) = torch.autograd.grad(y, x, data(shape, seed=2))
        assert float(dx.abs().max()) < 1e-5 * 316 * 10  # against |p*dz|


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
def test_what_eps_leaves_of_dx(form: str, backend: str) -> None:
    """A scale of x is undone but for eps: of a set sum(dx*(x - mean)) = rho^3*eps*gamma*sum(dz*(x - mean)); of FRN without the mean, and
    with all of its eps."""
    x, dz = (layout(data((3, 6, 4, 5), torch.float64, mean=mean, seed=s), form) for mean, s in ((1.0, 0), (0.0, 5)))
    w = torch.linspace(0.5, 2, 6, dtype=torch.float64, device=DEVICE)
    learned = torch.linspace(-0.3, 0.2, 6, dtype=torch.float64, device=DEVICE)
    gamma, eps = w.view(-1, 1, 1), 0.1
    for over, centred, own_eps, call in (
        ((0, 2, 3), True, eps, lambda x: NF.batch_norm_act(x, None, None, w, None, True, eps=eps, backend=backend)),
        ((2, 3), True, eps, lambda x: NF.instance_norm_act(x, None, None, w, eps=eps, backend=backend)),
        ((2, 3), False, eps, lambda x: NF.filter_response_norm(x, w, None, None, eps, backend=backend)),
        (
            (2, 3),
            False,
            eps + learned.abs().view(-1, 1, 1),
            lambda x: NF.filter_response_norm(x, w, None, None, eps, eps_l=learned, backend=backend),
        ),
    ):
        leaf = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(call(leaf), leaf, dz)
        apart = x - x.mean(over, keepdim=True) if centred else x
        rho = (apart.square().mean(over, keepdim=True) + own_eps) ** -0.5
        want = rho**3 * own_eps * gamma * (dz * apart).sum(over, keepdim=True)
        torch.testing.assert_close((dx * apart).sum(over, keepdim=True), want, rtol=1e-9, atol=1e-11)


def test_one_element_groups_give_the_bias(backend: str) -> None:
    """Legal with more than one sample: y = bias, dx = 0."""
    x = data((4, 6)).requires_grad_()
    b = torch.arange(6.0, device=DEVICE)
    y = NF.group_norm_act(x, 6, None, b, backend=backend)
    close("y", y, b.double().expand(4, 6), 1e-6)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert float(dx.abs().max()) < 1e-5 * 316 * 10  # against |p*dz|


def test_error_measure_sees_a_wrong_number() -> None:
    """The measure all of this rests on: an error of one element, a NaN and a wrong shape are seen."""
    e = data((4, 6)).double()
    a = e.clone()
    a[1, 1] += 1e-3 * float(e.abs().max())
    assert error(a, e) == pytest.approx(1e-3)
    a[0, 0] = torch.nan
    assert error(a, e) == float("inf")
    with pytest.raises(AssertionError):
        error(e[:1], e)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 4),
    c=st.integers(1, 9),
    spatial=st.lists(st.integers(1, 9), min_size=0, max_size=3),
    kind=st.sampled_from([k for k in KINDS if k.name not in ("group_C", "group_3", "instance", "layer_rows2")]),
    act=st.sampled_from(["identity", "relu", "gelu", "elu", "tlu"]),
    mode=st.sampled_from([None, "pre_act", "post_act"]),
    last=st.booleans(),
)
def test_any_shape(n: int, c: int, spatial: list[int], kind: Kind, act: str, mode: str | None, last: bool, backend: str) -> None:
    """Random shapes; sets of fewer than three elements, whose gradient cancels to rounding, have tests of their own."""
    shape = (n, c, *spatial)
    count = 1
    for s in spatial:
        count *= s
    size = {"channel": n * count, "group": c * count, "channels": c, "rows": shape[-1]}[kind.dims]
    if kind.learned_eps or kind.name == "frn":
        size = count
    if size < 3 or (kind.name == "instance_eval" and len(shape) < 3):
        return
    x = data(shape, mean=1.0)
    compare(kind, layout(x, "channels_last") if last and len(shape) > 2 else x, arguments(kind, shape, act=act, mode=mode), backend)
