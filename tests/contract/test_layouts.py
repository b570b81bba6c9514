"""Memory formats: outputs and gradients keep x's, on every backend and path, and no tensor of x's size is copied to get there.

Formats are compared by strides over dimensions of more than one element; the others have no order.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile

import normfused as nf
from normfused import ops
from normfused.backends.torch import composite
from normfused.problem import NCHW, NHWC, dense, format_of, layout_of

from ..conftest import EMULATED, INTERPRETED
from ..support.cases import covering
from ..support.check import DEVICE

NAMES = ["triton"] if INTERPRETED else ["cuda"] if EMULATED else ["torch", "reference"]
SHAPES = {3: (2, 8, 5), 4: (2, 8, 5, 3), 5: (2, 8, 3, 2, 5)}
LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "batch": lambda c, d: getattr(nf, f"BatchNormAct{d - 2}d")(c, act="relu"),
    "instance": lambda c, d: getattr(nf, f"InstanceNormAct{d - 2}d")(c, affine=True, act="leaky_relu"),
    "group": lambda c, d: nf.GroupNormAct(math.gcd(4, c), c, act="silu"),
    "frn": lambda c, d: getattr(nf, f"FilterResponseNorm{d - 2}d")(c),
    "layer": lambda c, d: nf.LayerNormAct(c, dim=1, act="gelu"),
    "rms": lambda c, d: nf.RMSNormAct(c, dim=1, act="tanh"),
}


def last(x: Tensor) -> Tensor:
    return dense(x.contiguous(), NHWC)


def _wide(s: tuple[int, ...]) -> Tensor:
    return torch.randn(s[0], 2 * s[1], *s[2:], device=DEVICE, dtype=torch.float64)


def _plain(*s: int) -> Tensor:
    return torch.randn(s, device=DEVICE, dtype=torch.float64)


FORMS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "contiguous": lambda s: _plain(*s),
    "channels_last": lambda s: last(_plain(*s)),
    # not dense
    "channels of contiguous": lambda s: _wide(s)[:, : s[1]],
    "channels of channels_last": lambda s: last(_wide(s))[:, : s[1]],
    "every other channel": lambda s: _wide(s)[:, ::2],
    "window of channels_last": lambda s: last(_plain(*s[:-1], 2 * s[-1]))[..., : s[-1]],
    "samples of channels_last": lambda s: last(_plain(2 * s[0], *s[1:]))[::2],
    "one sample expanded": lambda s: last(_plain(1, *s[1:])).expand(s),
    "one position expanded": lambda s: _plain(*s[:2], *[1] * (len(s) - 2)).expand(s),
    "transposed": lambda s: _plain(s[1], s[0], *s[2:]).transpose(0, 1),
    # strides of single elements say nothing
    "one channel": lambda s: _plain(s[0], 1, *s[2:]),
    "one channel of channels_last": lambda s: last(_wide(s))[:, :1],
    "one sample of channels_last": lambda s: last(_plain(1, *s[1:])),
    "one position, channels_last": lambda s: last(_plain(*s[:2], *[1] * (len(s) - 2))),
}  # fmt: skip


def order(x: Tensor) -> list[int]:
    """Strides of the dimensions that have an order."""
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def like(x: Tensor, layout: str) -> Tensor:
    return dense(torch.randn(x.shape, device=x.device, dtype=x.dtype), layout)


def kept(t: Tensor, x: Tensor) -> bool:
    """Whether t has x's strides, or, if x is not dense, is dense in x's format."""
    return order(t) == order(x if layout_of(x) is not None else dense(x, format_of(x)))


def run(layer: nn.Module, x: Tensor, r: Tensor | None, dy: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of x, the residual and the parameters, of intermediate tensors: leaves get theirs restrided by autograd."""
    inputs = [t.detach().requires_grad_() for t in (x, r) if t is not None]
    through = [t.view_as(t) for t in inputs]
    y = layer(*through)
    return y, *torch.autograd.grad(y, [*through, *layer.parameters()], dy)


def _cases() -> list[tuple[str, int, str]]:
    every = [(k, d, f) for k, d, f in itertools.product(LAYERS, SHAPES, FORMS) if not (k == "instance" and f.startswith("one position,"))]
    # the interpreter takes its time: both dense formats and one slice of each layer
    few = ("contiguous", "channels_last", "channels of channels_last")
    return [c for c in every if c[2] in few and c[1] != 3] if INTERPRETED else [c for c in every if c[2] in few or c[1] == 4]


@pytest.mark.triton_surface
@pytest.mark.parametrize(("kind", "dims", "form"), _cases())
def test_formats_are_kept(kind: str, dims: int, form: str, backend: str) -> None:
    """Whatever format dy and the residual come in; and the numbers are those of contiguous tensors."""
    x = FORMS[form](SHAPES[dims])
    layer = LAYERS[kind](x.shape[1], dims).to(x)
    layer.backend = backend
    own, other = (NCHW, NHWC) if format_of(x) == NCHW else (NHWC, NCHW)
    gradients = {"own": like(x, own), "other": like(x, other), "expanded": _plain(1).expand(x.shape)}
    gradients["channels"] = dense(_wide(tuple(x.shape)), own)[:, : x.shape[1]]
    residuals = {"none": None, "own": like(x, own), "other": like(x, other)}
    pairs = [("own", "own"), ("other", "none"), ("expanded", "other"), ("channels", "other"), ("other", "own")]
    for dy, r in pairs[:3] if INTERPRETED else pairs:
        found = run(copy.deepcopy(layer), x, residuals[r], gradients[dy])
        plain = (None if t is None else t.contiguous() for t in (x, residuals[r], gradients[dy]))
        expected = run(copy.deepcopy(layer), *plain)
        sized = 2 if residuals[r] is None else 3
        for name, t in zip(("y", "dx", "dresidual")[:sized], found[:sized], strict=True):
            assert kept(t, x), f"{name}: strides {t.stride()} beside x's {x.stride()}, dy {dy}, residual {r}"
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", LAYERS)
def test_formats_are_kept_in_every_type(kind: str, dtype: torch.dtype, backend: str) -> None:
    layer = LAYERS[kind](8, 4).to(DEVICE, dtype)
    layer.backend = backend
    for form, dy, r in (("channels_last", NCHW, NHWC), ("contiguous", NHWC, NCHW), ("channels_last", NHWC, NCHW)):
        x = FORMS[form](SHAPES[4])
        found = run(layer, x.to(dtype), like(x, r).to(dtype), like(x, dy).to(dtype))
        assert all(kept(t, x) for t in found[:3]), [t.stride() for t in found[:3]]


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_keep_the_format(name: str) -> None:
    x = last(_plain(2, 4, 3, 2)).requires_grad_()
    for kind in LAYERS:
        layer = LAYERS[kind](4, 4).to(x)
        layer.backend = name
        y = layer(x.view_as(x))
        (dx,) = torch.autograd.grad(y, x, like(x, NCHW), create_graph=True)
        (twice,) = torch.autograd.grad(dx.square().sum(), x)
        assert kept(dx, x), kind
        assert kept(twice, x), kind


# -------------------------------------------------------------------------------------------------------------- copies
# What comes as it is not taken, and is copied once, by backend. The composite of the torch backend hands x and the residual to ATen in any
# strides; its own steps (filter response norm, large channels_last instance norm) and the CUDA kernels have one layout for all.
OPERANDS = {
    "x, channels of channels_last": lambda x: {"x": last(_wide(tuple(x.shape)))[:, : x.shape[1]]},
    "x, every other position": lambda x: {"x": last(_plain(*x.shape[:-1], 2 * x.shape[-1]))[..., ::2]},
    "x, a window": lambda x: {"x": last(_plain(*x.shape[:-1], 2 * x.shape[-1]))[..., : x.shape[-1]]},
    "residual in the other format": lambda x: {"r": like(x, NCHW)},
    "residual, channels of channels_last": lambda x: {"r": last(_wide(tuple(x.shape)))[:, : x.shape[1]]},
    "dy in the other format": lambda x: {"dy": like(x, NCHW)},
    "dy, channels of channels_last": lambda x: {"dy": last(_wide(tuple(x.shape)))[:, : x.shape[1]]},
    "dy, expanded": lambda x: {"dy": _plain(*x.shape[:2], 1, 1).expand(x.shape)},
}  # fmt: skip
COPIED = {
    "reference": set(),
    "torch": set(),
    "torch, own steps": set(OPERANDS),
    "cuda": set(OPERANDS),
    "triton": set(OPERANDS),
}


@pytest.mark.triton_surface
@pytest.mark.parametrize("name", [*NAMES, *(["torch, own steps"] if "torch" in NAMES else [])])
def test_what_is_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of x's size that is copied because of its layout is one of those listed, and those listed are, once."""
    copies: list[int] = []

    def counted(x: Tensor, layout: str | None = None) -> Tensor:
        out = dense(x, layout)
        copies.extend([x.numel()] if out.data_ptr() != x.data_ptr() else [])
        return out

    for module in (ops, composite):
        monkeypatch.setattr(module, "dense", counted)
    if name == "torch, own steps":
        monkeypatch.setattr(ops, "_CHANNELS_LAST_ELEMENTS", 0)
    x = last(_plain(2, 8, 5, 3))
    layer = LAYERS["instance"](8, 4).to(x)
    layer.backend = name.split(",")[0]
    run(layer, x, like(x, NHWC), like(x, NHWC))
    assert not copies
    for what, make in OPERANDS.items():
        copies.clear()
        given = {"x": x, "r": like(x, NHWC), "dy": like(x, NHWC), **make(x)}
        run(layer, **given)
        assert len(copies) == (what in COPIED[name]), f"{what}: {len(copies)} copies"


MOVES = ("aten::contiguous", "aten::clone", "aten::copy_")


def moves(call: Callable[[], object], size: int) -> list[str]:
    """What ``call`` copies of at least ``size`` elements, by the profiler."""
    call()  # lazy imports and plans
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        call()
    events = [e for e in found.events() if e.name in MOVES and e.input_shapes]
    return [f"{e.name} {e.input_shapes[0]}" for e in events if math.prod(e.input_shapes[0]) >= size]


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter copies what it is given: only the host code runs."""
    if INTERPRETED:
        from normfused.backends.triton import launch

        monkeypatch.setattr(launch, "launcher", lambda *args, **options: None)


PROFILED = [k for k in LAYERS if k != "rms"]  # ATen's own derivative of x^2 is x^1, a copy


@pytest.mark.triton_surface
@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("name", [n for n in NAMES if n != "reference"])  # the oracle converts types and writes its results by copies
@pytest.mark.parametrize("elements", [1, 1024], ids=["small", "large"])
@pytest.mark.parametrize("dims", [4, 5])
@pytest.mark.parametrize("kind", PROFILED)
def test_profile_of_a_layer_shows_no_copy(kind: str, dims: int, elements: int, name: str) -> None:
    shape = (2, 8, 3 * (32 if elements > 1 else 1), *[4 * (8 if elements > 1 and i == 0 else 1) for i in range(dims - 3)])
    shape = (*shape[:1], 32 if elements > 1 else 8, *shape[2:])
    x = last(_plain(*shape))
    layer = LAYERS[kind](shape[1], dims).to(x)
    layer.backend = name
    for r in (None, like(x, NHWC)):
        dy = like(x, NHWC)
        assert not moves(lambda r=r, dy=dy: run(layer, x, r, dy), x.numel())


class Net(nn.Module):
    """Convolutions, norms and a shortcut of a network in 2 or 3 dimensions."""

    def __init__(self, dims: int, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 4 else nn.Conv3d
        self.first, self.second, self.third = conv(3, 8, 3, padding=1), conv(8, 8, 3, padding=1), conv(16, 8, 1)
        self.norms = nn.ModuleList([norm() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        a = self.norms[0](self.first(x))
        b = self.norms[1](self.second(a))
        return self.norms[2](self.third(torch.cat([a, b], 1)))


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("name", [n for n in NAMES if n != "reference"])
@pytest.mark.parametrize("dims", [4, 5])
@pytest.mark.parametrize("kind", PROFILED)
def test_network_copies_no_more_than_without_norms(kind: str, dims: int, name: str) -> None:
    torch.manual_seed(0)
    x = last(_plain(2, 3, *[6] * (dims - 2)))

    def norm() -> nn.Module:
        layer = LAYERS[kind](8, dims)
        layer.backend = name
        return layer

    def counted(make: Callable[[], nn.Module]) -> list[str]:
        nonlocal given
        net = Net(dims, make).to(x).to(memory_format=torch.channels_last if dims == 4 else torch.channels_last_3d)
        dy = last(_plain(2, 8, *x.shape[2:]))
        given = format_of(net.first(x))
        return moves(lambda: net(x).backward(dy), 2 * 8 * x.shape[2:].numel())

    given = NHWC
    ours, without = counted(norm), counted(nn.Identity)
    if name == "torch" and kind == "layer" and given == NCHW:
        pytest.skip("ATen's convolution drops channels_last here, and its layer norm wants rows")
    assert len(ours) <= len(without), f"{ours} against {without}"


# -------------------------------------------------------------------------------------------------- compile, operators
LAST = ["channels_last", "channels of channels_last", "window of channels_last", "one channel of channels_last"]


@covering({"kind": list(LAYERS), "form": LAST, "name": NAMES})
def test_compiled_formats(kind: str, form: str, name: str) -> None:
    torch._dynamo.reset()
    x = FORMS[form](SHAPES[4])
    layer = LAYERS[kind](x.shape[1], 4).to(x)
    layer.backend = name
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for dy, r in ((NHWC, NHWC), (NCHW, NCHW)):
        call = (x, like(x, r), like(x, dy))
        for got, want in zip(run(compiled, *call), run(copy.deepcopy(layer), *call), strict=True):
            assert order(got) == order(want)
            torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("form", ["channels_last", "channels of channels_last"])
@pytest.mark.parametrize("kind", LAYERS)
def test_exported_formats(kind: str, form: str) -> None:
    x = FORMS[form](SHAPES[4])
    layer = LAYERS[kind](x.shape[1], 4).to(x).eval()
    program = torch.export.export(layer, (x,))
    (out,) = [a.meta["val"] for a in program.graph.find_nodes(op="output")[0].args[0]][-1:]
    y = program.module()(x)
    assert order(out) == order(y) == order(layer(x))
    assert kept(y, x)


STATIC = {
    "batch": ("channel", "standard", 1, True, 1e-5, None),
    "group": ("sample_group", "standard", 2, True, 1e-5, 0.1),
    "frn": ("sample_group", "rms", 8, True, 1e-5, 0.1),
    "layer": ("position", "standard", 1, True, 1e-5, 0.1),
}


@pytest.mark.triton_surface
@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", [f for f in FORMS if f not in ("contiguous", "one position expanded")])
@pytest.mark.parametrize("norm", STATIC)
def test_fake_kernels_assert_the_strides(norm: str, form: str, name: str) -> None:
    x = FORMS[form](SHAPES[4])
    scope, rule, groups, *rest = STATIC[norm]
    static = (scope, rule, math.gcd(groups, x.shape[1]) if norm != "frn" else x.shape[1], *rest, "relu", 0.0, 0.0, "pre_act", name)
    r = like(x, NCHW)
    arguments = (x, r, *(None,) * 4, *(None,) * 3, *static)
    checks = ("test_schema", "test_faketensor")
    opcheck(torch.ops.normfused.norm_act.default, arguments, test_utils=checks)
    y, mean, rstd, h = torch.ops.normfused.norm_act(*arguments)
    assert kept(y, x)
    source = h if h.numel() else y
    gradient = (like(x, NHWC), None, x, source, *(None,) * 4, mean, rstd, *static, True, True, False)
    opcheck(torch.ops.normfused.norm_act_backward.default, gradient, test_utils=checks)
