"""The kernels of csrc/kernels/weights.cuh, emulated: order of threads, races, bits, and how much of memory they ask for in how many
launches. What they compute is tested in tests/weights, which runs on every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from normfused.backends.cuda import weights as backend
from normfused.backends.weights import View, view_of

from ..weights.oracle import SHAPES, WEIGHT_ONLY, Shape, spectral, weighted
from .cases import Machine

ORDERS = [("reverse", 0), ("starve", 1), ("starve", 2)]
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# aligned and not, rows of a warp and of a block that fit registers or not, pieces, columns of several blocks
ALL = {**SHAPES, **WEIGHT_ONLY, "long rows": Shape((2, 17000)), "long odd rows": Shape((2, 2051)), "tall": Shape((300, 70))}
ALL = {name: replace(shape, gaps=False) for name, shape in ALL.items()}


class Weights:
    """Of some shapes, their operators' inputs."""

    def __init__(self, shapes: dict[str, Shape], dtype: torch.dtype, ordered: bool) -> None:
        torch.manual_seed(0)
        self.shapes = {n: s for n, s in shapes.items() if not ordered or (s.dim is not None and len(s.sizes) > 1 and n != "no known order")}
        made: list[Any] = [(spectral if ordered else weighted)(shape, dtype) for shape in self.shapes.values()]
        self.weights: list[Tensor] = [(m.weight if ordered else m.v).detach() for m in made]
        self.gs = [] if ordered else [m.g.detach() for m in made]
        self.us, self.vs = ([m.u for m in made], [m.v for m in made]) if ordered else ([], [])
        self.dws = [torch.randn_like(w) for w in self.weights]
        views = [view_of(w, m.dim, ordered) for w, m in zip(self.weights, made, strict=True)]
        self.views: list[View] = [v for v in views if v is not None]
        assert len(self.views) == len(self.weights)


def weight_norm(shapes: dict[str, Shape], dtype: torch.dtype, between: Callable[[], None] = lambda: None) -> list[Tensor]:
    w = Weights(shapes, dtype, False)
    made, saved = backend.weight_norm(w.views, w.gs, w.weights)
    between()
    dgs, dvs = backend.weight_norm_backward(w.views, w.dws, w.gs, w.weights, saved)
    return [*made, *saved, *dgs, *dvs]  # type: ignore[list-item]


def spectral_norm(
    shapes: dict[str, Shape], dtype: torch.dtype, between: Callable[[], None] = lambda: None, iterations: int = 2
) -> list[Tensor]:
    w = Weights(shapes, dtype, True)
    made, saved = backend.spectral_norm(w.views, w.weights, w.us, w.vs, iterations, 1e-12)
    between()
    return [*made, *saved, *w.us, *w.vs, *backend.spectral_norm_backward(w.views, w.dws, w.weights, saved)]  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_orders_and_races(norm: Callable[..., list[Tensor]], dtype: torch.dtype, machine: Machine) -> None:
    """No two accesses that nothing orders, and the same bits whoever comes first."""
    shapes = dict([*ALL.items()][TYPES.index(dtype) % 3 :: 3]) if dtype != torch.float32 else ALL
    first = norm(shapes, dtype)
    assert all(bool(t.isfinite().all()) for t in first)
    for order, seed in ORDERS:
        with machine.mode(order, seed=seed, races=True):
            for one, other in zip(first, norm(shapes, dtype), strict=True):
                assert torch.equal(one, other), (order, seed)
            assert not machine.message()


def test_every_barrier_is_missed(machine: Machine) -> None:
    """A race or another result in some order, whichever barrier of weights.cuh does nothing."""
    norms = (weight_norm, spectral_norm)
    shapes = {name: ALL[name] for name in ("linear", "transposed", "transposed, wide kernel", "columns", "rows of a block")}
    with machine.mode():
        right = [norm(shapes, torch.float32) for norm in norms]
        places = [s for s in machine.sites() if s["file"].endswith("weights.cuh")]
    assert len(places) == 4

    def noticed(place: dict[str, Any]) -> bool:
        for order, seed in [("forward", 0), *ORDERS]:
            with machine.mode(order, seed=seed, races=True):
                machine.skip("weights.cuh", place["line"])
                try:
                    made = [norm(shapes, torch.float32) for norm in norms]
                except RuntimeError:
                    return True
                if any(not torch.equal(a, b) for one, other in zip(made, right, strict=True) for a, b in zip(one, other, strict=True)):
                    return True
        return False

    for place in places:
        assert noticed(place), place


def test_not_aligned() -> None:
    """Tensors that start off a 16-byte boundary take single elements, with the same results but for the order of sums."""
    for norm in (weight_norm, spectral_norm):
        aligned = norm({"linear": ALL["linear"]}, torch.float32)
        real = torch.randn_like

        def shifted(t: Tensor, real: Callable[[Tensor], Tensor] = real) -> Tensor:
            return torch.cat([t.new_zeros(1), real(t).flatten()])[1:].view(t.shape)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", shifted)
            for one, other in zip(aligned, norm({"linear": ALL["linear"]}, torch.float32), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ launches and bytes
def counted(run: Callable[[Callable[[], None]], Any], machine: Machine) -> list[dict[str, Any]]:
    found = []

    def between() -> None:
        found.append(machine.counters())
        machine.reset()

    with machine.mode(traffic=True):
        run(between)
        between()
    return found


def bytes_of(counters: dict[str, Any], name: str, count: int, what: str) -> list[int]:
    return [counters["tensors"].get(f"{name}{i}", {}).get(f"{what}_bytes", 0) for i in range(count)]


def kernels(counters: dict[str, Any]) -> list[str]:
    return [k["kernel"] for k in counters["kernels"]]


# contiguous rows that the registers of a team hold
ONCE = {name: ALL[name] for name in ("linear", "odd rows", "one column", "one row", "channels_last", "tall")}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_traffic_of_weight_norm(dtype: torch.dtype, machine: Machine) -> None:
    """One launch forward and one backward; v read once, w written once; dw and v read once, dv written once. Longer rows, and rows in
    pieces, are read twice."""
    size = torch.empty((), dtype=dtype).element_size()
    for shapes, reads in ((ONCE, 1), ({n: ALL[n] for n in ("transposed", "columns", "transposed, wide kernel")}, 2)):
        sizes = [w.numel() * size for w in Weights(shapes, dtype, False).weights]
        n = len(sizes)
        forward, backward = counted(lambda between, s=shapes: weight_norm(s, dtype, between), machine)
        assert kernels(forward) == ["weight_norm"] and kernels(backward) == ["weight_norm_backward"]
        assert bytes_of(forward, "v", n, "read") == [reads * b for b in sizes]
        assert bytes_of(forward, "w", n, "write") == sizes
        assert bytes_of(backward, "v", n, "read") == bytes_of(backward, "dw", n, "read") == [reads * b for b in sizes]
        assert bytes_of(backward, "dv", n, "write") == sizes


def test_traffic_of_long_rows(machine: Machine) -> None:
    """What of a row is beyond 8 vectors a thread (4 with two tensors) is read twice."""
    forward, backward = counted(lambda between: weight_norm({"long rows": ALL["long rows"]}, torch.float32, between), machine)
    held = 256 * 8 * 4
    assert bytes_of(forward, "v", 1, "read") == [4 * 2 * (17000 + 17000 - held)]
    assert bytes_of(backward, "dw", 1, "read") == [4 * 2 * (17000 + 17000 - held // 2)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_traffic_of_spectral_norm(dtype: torch.dtype, machine: Machine) -> None:
    """Three launches: the weight is read by each and written by the last. Two backward: dw twice, the weight once, one written."""
    shapes = {name: ALL[name] for name in ("linear", "odd rows", "channels_last", "transposed", "columns", "tall")}
    sizes = [w.numel() * w.element_size() for w in Weights(shapes, dtype, True).weights]
    n = len(sizes)
    forward, backward = counted(lambda between: spectral_norm(shapes, dtype, between, 1), machine)
    assert kernels(forward) == ["matvec", "transposed_matvec", "scale"]
    assert kernels(backward) == ["inner_product", "spectral_gradient"]
    assert bytes_of(forward, "weight", n, "read") == [3 * b for b in sizes]
    assert bytes_of(forward, "w", n, "write") == sizes
    assert bytes_of(backward, "dw", n, "read") == [2 * b for b in sizes]
    assert bytes_of(backward, "weight", n, "read") == bytes_of(backward, "dweight", n, "write") == sizes
    assert kernels(counted(lambda between: spectral_norm(shapes, dtype, between, 0), machine)[0]) == ["matvec", "scale"]


def test_wide_accesses(machine: Machine) -> None:
    """Aligned rows are asked for in 16 bytes a thread: 512 bytes a request of a warp."""
    forward, backward = counted(lambda between: weight_norm({"rows": Shape((64, 512))}, torch.bfloat16, between), machine)
    for counters, tensor, what in (
        (forward, "v0", "read"),
        (forward, "w0", "write"),
        (backward, "dw0", "read"),
        (backward, "dv0", "write"),
    ):
        found = counters["tensors"][tensor]
        assert found[f"{what}_bytes"] == 512 * found[f"{what}_requests"], (tensor, found)


def test_launches_of_many_weights(machine: Machine) -> None:
    """A launch holds 54 weights, so that a ResNet-50 takes one."""
    shapes = {str(i): Shape((3, 8)) for i in range(55)}
    forward, backward = counted(lambda between: weight_norm(dict([*shapes.items()][:54]), torch.float32, between), machine)
    assert len(kernels(forward)) == len(kernels(backward)) == 1
    forward, backward = counted(lambda between: spectral_norm(shapes, torch.float32, between, 1), machine)
    assert len(kernels(forward)) == 6 and len(kernels(backward)) == 4


def test_refusals(machine: Machine) -> None:
    w = Weights({"linear": ALL["linear"]}, torch.float32, False)
    with pytest.raises(RuntimeError, match="a view must cover its weight's 512 elements, got 63 columns of 8 rows"):
        backend.weight_norm([w.views[0]._replace(B=63)], w.gs, w.weights)
    with pytest.raises(RuntimeError, match="g 0 must have 8 elements of Float, got 7 of Float"):
        backend.weight_norm(w.views, [w.gs[0][:7]], w.weights)
    with pytest.raises(RuntimeError, match="g must be 1 tensors, got 2"):
        backend.weight_norm(w.views, w.gs * 2, w.weights)
