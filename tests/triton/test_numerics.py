"""What random data of unit variance do not show: large means, constants, NaN, ties, rounding, repeatability, launches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from normfused.activations import ACTIVATIONS, activate, parse
from normfused.backends import by_steps
from normfused.backends import triton as backend
from normfused.backends.triton import launch
from normfused.backends.triton.plan import forced
from normfused.problem import CHANNEL, NHWC, POSITION, PRE_NORM, RMS, SAMPLE_GROUP, Problem, dense

from .cases import KINDS, LOOPED, SMALL, Case

ROUTES = ["single_pass", "two_pass"]
CENTRED = ["channel", "group", "instance", "position"]


def routed(kinds: list[str], single_pass: tuple[str, ...] = ("batch instance",)) -> pytest.MarkDecorator:
    """``kinds`` on both routes, and those that by steps are of kind ``instance`` in one pass alone."""
    return pytest.mark.parametrize(("kind", "route"), [*itertools.product(kinds, ROUTES), *((k, "single_pass") for k in single_pass)])


def _limits(kind: str, route: str) -> Any:
    return LOOPED if kind.startswith("position") and route == "two_pass" else SMALL


# ----------------------------------------------------------------------------------------------------------- statistics
@routed(CENTRED)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_large_mean(kind: str, route: str, layout: str, device: torch.device) -> None:
    """mean/sd = 1000 in float32: y within 1e-3; E[x^2] - E[x]^2 would be wrong by 7e-2 and more."""
    case = Case(shape=(2, 6, 20, 5), layout=layout, route=route, limits=_limits(kind, route), device=device, mean=1000.0, **KINDS[kind])
    wide = Case(shape=(2, 6, 20, 5), layout=layout, route=route, dtype=torch.float64, device=device, **KINDS[kind])
    wide.x, wide.w, wide.b = case.x.double(), case.w.double(), case.b.double()
    y, expected = case.forward()[0].double(), wide.forward()[0]
    assert float((y - expected).abs().max() / expected.abs().max()) < 1e-3


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("kind", ["batch instance", "batch instance given"])
def test_large_mean_of_batch_instance(kind: str, layout: str, device: torch.device) -> None:
    """mean/sd = 33 in float32: every statistic, output and gradient as with a mean of 0; E[x^2] - E[x]^2 would lose 3 digits."""
    Case(shape=(3, 6, 7, 5), layout=layout, route="single_pass", device=device, mean=1000.0, scale=30.0, **KINDS[kind]).check()


@pytest.mark.parametrize("kind", CENTRED)
@pytest.mark.parametrize("route", ROUTES)
def test_unlike_beginning(kind: str, route: str, device: torch.device) -> None:
    """A set that begins with zeros and goes on at 1000: the first tile's mean, by which sums are shifted, is far from the set's."""
    case = Case(shape=(2, 6, 40, 5), route=route, limits=_limits(kind, route), device=device, mean=1000.0, **KINDS[kind])
    case.x[:, :2] = 0
    case.x[0, :, :8] = 0
    case.check()


@routed(CENTRED)
def test_constant_set_gives_bias(kind: str, route: str, device: torch.device) -> None:
    case = Case(shape=(3, 6, 7, 3), route=route, limits=_limits(kind, route), device=device, **KINDS[kind])
    case.x.fill_(1234.567)
    y, _, rstd, _ = case.forward()
    expected = case.b.view(1, -1, 1, 1).expand_as(y)
    torch.testing.assert_close(y, expected, atol=0.1, rtol=0)  # rstd, 316, times one rounding of the mean
    assert torch.isfinite(rstd).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.25, None])
@routed(["channel tracked", "instance tracked"])
def test_half_running_statistics_round_once(
    kind: str, dtype: torch.dtype, momentum: float | None, route: str, device: torch.device
) -> None:  # fmt: skip
    case = Case(**{**KINDS[kind], "momentum": momentum}, dtype=dtype, route=route, half_parameters=True, device=device)
    before = [t.clone() for t in case.running]
    mean = case.forward()[1]
    factor = momentum if momentum is not None else 1 / 5
    if kind == "batch instance":
        mean = mean[0]
    per_channel = mean if mean.dim() == 1 else mean.mean(0)
    expected = (before[0].float() * (1 - factor) + per_channel * factor).to(dtype)
    ulp = torch.finfo(dtype).eps * expected.abs().float()
    assert ((case.running[0].float() - expected.float()).abs() <= ulp).all()
    assert (case.running[0] == expected).float().mean() >= 0.8, "it is rounded to nearest"
    assert case.running[0].dtype == case.running[1].dtype == dtype
    assert int(case.running[2]) == int(before[2]) + 1


@routed(["channel tracked", "instance tracked"])
@pytest.mark.parametrize("missing", [(True, False, False), (False, True, True), (True, True, False), (False, False, True)])
def test_some_buffers(kind: str, route: str, missing: tuple[bool, ...], device: torch.device) -> None:
    for momentum in (0.1, None):
        case = Case(**{**KINDS[kind], "momentum": momentum}, route=route, device=device)
        case.running = tuple(None if gone else t for gone, t in zip(missing, case.running, strict=True))
        case.check()


@pytest.mark.parametrize("kind", ["channel cumulative", "batch instance cumulative"])
def test_several_steps_of_a_cumulative_average(kind: str, device: torch.device) -> None:
    case = Case(**KINDS[kind], device=device)
    case.running[2].zero_()
    seen = []
    for step in range(3):
        case.x = torch.randn_like(case.x)
        seen.append(case.forward()[1].view(-1, 6)[0])
        assert int(case.running[2]) == step + 1
    torch.testing.assert_close(case.running[0], torch.stack(seen).mean(0))


# ---------------------------------------------------------------------------------------------------------- activations
SPECIAL = [
    -100.0, -30.0, -5.0, -3.0, -1.5, -0.6, -0.49, -1e-3, -1e-6, 0.0,
    1e-6, 1e-3, 0.3, 0.51, 1.0, 2.9, 3.0, 5.0, 6.0, 19.0, 21.0, 40.0, 100.0,
]  # fmt: skip


def _identity_norm(name: str, dtype: torch.dtype, z: Tensor) -> Problem:
    return Problem(SAMPLE_GROUP, "standard", 1, 1, z.numel(), 1, "nchw", dtype, z.device, act=parse(name))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activation_element_by_element(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Small results must be relatively exact too, and ties fall as in PyTorch; derivative from z, and from y where that is taken."""
    z = torch.tensor(SPECIAL, dtype=dtype, device=device).reshape(1, 1, -1)
    p = _identity_norm(name, dtype, z)
    aw = torch.full((1,), 0.3, dtype=dtype, device=device) if p.act.takes_weight else None
    one, zero = torch.ones(1, 1, dtype=dtype, device=device), torch.zeros(1, 1, dtype=dtype, device=device)
    exact = z.double().requires_grad_()
    expected = activate(exact, p.act, None if aw is None else aw.double())
    (slope,) = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    if name == "hardsigmoid":
        slope = (exact.detach().abs() < 3).double() / 6  # torch's own constant is a float32
    small = 2e-6 if dtype == torch.float32 else 1e-14
    # 1 + erf and exp(z) of a large z lose digits that nobody misses: of the far tails only the absolute error counts
    absolute = 1e-7 if dtype == torch.float32 else 1e-16
    y, _ = backend.apply(p, z, None, one, zero, aw)
    torch.testing.assert_close(y.double(), expected.detach(), rtol=small, atol=absolute)
    dz, _ = backend.grad_apply(p, torch.ones_like(z), z, None, zero, one, zero, aw, one, zero, zero, (True, False, False))
    torch.testing.assert_close(dz.double(), slope, rtol=small, atol=8 * absolute)
    if p.act.derivative_from_y(dtype):
        from dataclasses import replace

        pre = replace(p, residual_mode="pre_act")
        dz, _ = backend.grad_apply(pre, torch.ones_like(z), z, y, zero, one, zero, aw, one, zero, zero, (True, False, False))
        torch.testing.assert_close(dz.double(), slope, rtol=small, atol=8 * absolute)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_passes_through(name: str, device: torch.device) -> None:
    z = torch.tensor([1.0, torch.nan, -1.0, 2.0], device=device).reshape(1, 1, -1)
    p = _identity_norm(name, torch.float32, z)
    aw = torch.full((1,), 0.3, device=device) if p.act.takes_weight else None
    one, zero = torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device)
    y, _ = backend.apply(p, z, None, one, zero, aw)
    assert torch.isnan(y).flatten().tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_storage_rounds_to_nearest_even(dtype: torch.dtype, device: torch.device) -> None:
    """Also through the interpreter, which by itself truncates to bfloat16."""
    z = torch.cat([torch.randn(200, dtype=torch.float32), torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 1.00390625, 1.01171875])])
    z = z.to(device).reshape(1, 1, -1)
    half = z.to(dtype)
    p = _identity_norm("identity", dtype, half)
    scale, zero = torch.full((1, 1), 1.2345, device=device), torch.zeros(1, 1, device=device)
    y, _ = backend.apply(p, half, None, scale, zero, None)
    assert torch.equal(y, (half.float() * 1.2345).to(dtype))


# ------------------------------------------------------------------------------------------------------------ behaviour
@routed(["channel tracked", "group", "instance", "filter response", "position", "position rms"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_value_stays_in_its_set(kind: str, route: str, layout: str, value: float, device: torch.device) -> None:
    case = Case(shape=(2, 6, 5, 3), layout=layout, route=route, limits=_limits(kind, route), act="silu", device=device, **KINDS[kind])
    case.x[1, 2, 3, 1] = value
    member = torch.zeros(case.x.shape, dtype=torch.bool, device=device)
    if case.scope == CHANNEL:
        member[:, 2] = True
    elif case.scope == POSITION:
        member[1, :, 3, 1] = True
    else:
        width = 6 // case.groups
        member[1, 2 // width * width : (2 // width + 1) * width] = True
    out = case.forward()
    gradients = case.backward(*out)
    centred_or_nan = case.rule != RMS or value != value
    for tensor in (out[0], gradients[0]):
        assert torch.isfinite(tensor[~member]).all()
    if centred_or_nan:
        assert torch.isnan(out[0][member]).all()
        assert torch.isnan(gradients[0][member]).all()
    if case.tracked:
        assert torch.isfinite(case.running[0]).tolist() == [c != 2 for c in range(6)]
        assert torch.isfinite(case.running[1]).tolist() == [c != 2 for c in range(6)]


@routed(["channel tracked", "group", "filter response, eps each", "position"])
def test_same_bits_twice(kind: str, route: str, device: torch.device) -> None:
    def run() -> list[Tensor | None]:
        case = Case(shape=(3, 6, 7, 5), route=route, limits=_limits(kind, route), act="prelu", device=device, **KINDS[kind])
        out = case.forward()
        return [*out, *case.backward(*out), *case.running]

    for a, b in zip(run(), run(), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@routed(["channel", "channel given", "group", "filter response, eps each", "position"], ("batch instance", "batch instance given"))
def test_what_is_not_needed_is_not_there(kind: str, route: str, device: torch.device) -> None:
    case = Case(route=route, limits=_limits(kind, route), act="silu", residual="pre_act", device=device, **KINDS[kind])
    out = case.forward()
    full = case.backward(*out)
    for needs in [(True, False, False), (False, True, False), (False, False, True), (True, True, False), (False, False, False)]:
        some = case.backward(*out, needs=needs)
        wanted = (needs[0], needs[1], *[needs[2]] * 4)
        for got, want, need in zip(some, full, wanted, strict=True):
            assert (got is not None) == (need and want is not None)
            assert got is None or torch.equal(got, want)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    def count(kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.__name__)
        launch.run(kernel, *args, **options)

    monkeypatch.setattr(launch, "launcher", count)
    return names


FORWARD = {
    ("channel tracked", "single_pass"): ["single_pass_kernel"],
    ("channel tracked", "two_pass"): ["moments_kernel", "finalize_kernel", "apply_kernel"],
    ("channel given", "two_pass"): ["apply_kernel"],
    ("batch instance", "single_pass"): ["single_pass_kernel"],
    ("batch instance given", "single_pass"): ["single_pass_kernel"],
    ("batch instance", "two_pass"): ["moments_kernel", "finalize_kernel", "apply_kernel"],
    ("group", "single_pass"): ["single_pass_kernel"],
    ("instance tracked", "single_pass"): ["single_pass_kernel", "average_running_kernel"],
    ("position", "single_pass"): ["positions_kernel"],
    ("position", "two_pass"): ["positions_kernel"],
}
BACKWARD = {
    ("channel tracked", "single_pass"): ["grad_single_pass_kernel"],
    ("channel tracked", "two_pass"): ["grad_moments_kernel", "grad_channels_kernel", "grad_apply_kernel"],
    ("channel given", "two_pass"): ["grad_moments_kernel", "grad_channels_kernel"],
    ("batch instance", "single_pass"): ["grad_single_pass_kernel"],
    ("batch instance given", "single_pass"): ["grad_single_pass_kernel"],
    ("batch instance", "two_pass"): ["grad_moments_kernel", "grad_apply_kernel"],
    ("group", "single_pass"): ["grad_single_pass_kernel", "grad_channels_kernel"],
    ("instance tracked", "single_pass"): ["grad_single_pass_kernel", "grad_channels_kernel"],
    ("position", "single_pass"): ["grad_positions_kernel", "grad_channels_kernel"],
    ("position", "two_pass"): ["grad_positions_kernel", "grad_moments_kernel", "grad_channels_kernel"],
}


@pytest.mark.parametrize("kind", ["batch instance", "batch instance given"])
def test_batch_instance_takes_no_steps_by_itself(kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the backend plans an ordinary call, nobody forcing a route: x is read by one kernel."""
    for name in ("norm_act", "norm_act_backward"):
        monkeypatch.setattr(by_steps, name, lambda *args: pytest.fail("the four steps ran"))
    Case(shape=(3, 6, 5, 7), act="silu", limits=None, device=device, **KINDS[kind]).check()


@pytest.mark.parametrize(("kind", "route"), FORWARD)
def test_launches(kind: str, route: str, launches: list[str], device: torch.device) -> None:
    case = Case(route=route, limits=_limits(kind, route), act="relu", device=device, **KINDS[kind])
    out = case.forward()
    assert launches == FORWARD[kind, route]
    launches.clear()
    case.backward(*out)
    assert launches == BACKWARD[kind, route]


def test_frozen_statistics_without_parameters_read_once(launches: list[str], device: torch.device) -> None:
    case = Case(act="identity", device=device, **KINDS["channel given"])
    out = case.forward()
    launches.clear()
    case.backward(*out, needs=(True, False, False))
    assert launches == ["grad_apply_kernel"]


@pytest.mark.parametrize("kind", ["channel given", "batch instance given"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_inputs_and_given_statistics_are_left_alone(kind: str, momentum: float | None, device: torch.device) -> None:
    case = Case(act="silu", residual="pre_act", momentum=momentum, device=device, **KINDS[kind])
    inputs = [case.x, case.r, case.dy, case.w, case.b, *case.running]
    before = [t.clone() for t in inputs]
    y, mean, rstd, h = case.forward()
    case.backward(y, mean, rstd, h)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert mean.data_ptr() != case.running[0].data_ptr()


def test_strides_are_those_of_x(device: torch.device) -> None:
    for kind in ("channel", "batch instance", "group", "position", "position pre-norm"):
        case = Case(layout="nhwc", device=device, **KINDS[kind])
        out = case.forward()
        dx = case.backward(*out)[0]
        for tensor in (out[0], dx, *([out[3]] if case.residual == PRE_NORM else [])):
            assert tensor.stride() == case.x.stride()


# -------------------------------------------------------------------------------------------------------------- float64
class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, case: Case, x: Tensor, r: Tensor | None, w: Tensor, b: Tensor, aw: Tensor | None, ew: Tensor | None) -> Any:
        with forced(case.route, case.limits):
            y, mean, rstd, h = backend.norm_act(case.p, x, r, w, b, aw, ew, None, None, None)
        ctx.case = case
        mask, h = (h, None) if backend.mask_bytes(case.p) else (None, h)
        source = {None: None, "y": y, "residual": r}[case.p.z_source] if mask is None else mask
        ctx.save_for_backward(x if h is None else h, source, w, b, aw, ew, mean, rstd)
        return y if h is None else (y, h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dh: Tensor | None = None) -> Any:
        case = ctx.case
        x, *rest = ctx.saved_tensors
        as_x = lambda t: None if t is None else dense(t, NHWC if case.layout == NHWC else "nchw")  # noqa: E731
        with forced(case.route, case.limits):
            dx, dr, *parameters = backend.norm_act_backward(case.p, as_x(dy), as_x(dh), x, *rest, (True, True, True))
        return None, dx, dx if case.residual == PRE_NORM else dr, *parameters


@pytest.mark.parametrize(
    ("kind", "act", "residual"),
    [
        ("channel", "silu", "pre_act"),
        ("batch instance", "mish", "pre_act"),
        ("group", "softplus", "post_act"),
        ("filter response, eps each", "prelu", None),
        ("filter response, one eps", "tlu", None),
        ("position", "mish", None),
        ("position pre-norm", "gelu", PRE_NORM),
    ],
)
def test_gradcheck(kind: str, act: str, residual: str | None, device: torch.device) -> None:
    for layout, route in (("nchw", "two_pass"), ("nhwc", "single_pass")):
        options = {**KINDS[kind], "residual": residual}
        case = Case(shape=(2, 6, 3), dtype=torch.float64, act=act, layout=layout, route=route, limits=None, device=device, **options)
        tensors = [case.x, case.r, case.w, case.b, case.aw, case.rw]
        inputs = [None if t is None else t.requires_grad_() for t in tensors]
        torch.autograd.gradcheck(lambda *t, case=case: _Norm.apply(case, *t), inputs, fast_mode=True)


# -------------------------------------------------------------------------------------------------------- large offsets
def test_starts_are_64_bit(device: torch.device) -> None:
    """The addresses of a tensor nobody has: 2^14 samples of 2^12 channels of 2^20 positions."""
    import triton
    import triton.language as tl

    from normfused.backends.triton.tiles import dense_strides, tile_start

    @triton.jit
    def kernel(out, o, t, c0, C, S, s_tiles, NHWC: tl.constexpr):
        C, S, sC, sS = dense_strides(C, S, NHWC, 1)
        zero = tl.program_id(0)
        _, _, start = tile_start(o + zero, t + zero, c0 + zero, 1, C, S, sC, sS, s_tiles, 1024)
        tl.store(out, start)

    globals().update(tl=tl, dense_strides=dense_strides, tile_start=tile_start)  # where triton looks names up
    n, c, s, C, S = 2**14 - 1, 2**12 - 64, 2**20 - 1024, 2**12, 2**20
    for nhwc in (False, True):
        out = torch.zeros(1, dtype=torch.int64, device=device)
        kernel[(1,)](out, n, s // 1024, c, C, S, S // 1024, NHWC=nhwc)
        assert int(out) == n * C * S + (s * C + c if nhwc else c * S + s)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_more_than_2_31_elements(layout: str, device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("it takes a GPU with 40 GiB")
    shape = (3, 8, 2**15 + 1, 2**12)
    x = torch.randn(shape, device=device, dtype=torch.float16)
    x = dense(x, layout)
    for scope in (CHANNEL, SAMPLE_GROUP, POSITION):
        p = Problem(scope, "standard", 3, 8, shape[2] * shape[3], 1, layout, x.dtype, x.device)
        y, mean, rstd, _ = backend.norm_act(p, x, None, None, None, None, None, None, None, None)
        last = y[2, :, -2:, -2:].float()
        source = x[2, :, -2:, -2:].float()
        if scope == POSITION:
            expected = torch.nn.functional.layer_norm(source.movedim(0, -1), (8,)).movedim(-1, 0)
        else:
            m, r = (t.view(-1)[-8:].view(-1, 1, 1) if scope == CHANNEL else t[2].view(1, 1, 1) for t in (mean, rstd))
            expected = (source - m) * r
        torch.testing.assert_close(last, expected, atol=4e-3, rtol=2e-3)
