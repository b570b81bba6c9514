"""Weights of all shapes together, against float64; invariants of the gradients; what a backward needs to be right about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from normfused import weights
from normfused.backends.reference import weights as formulas

from .conftest import DEVICE
from .oracle import SHAPES, WEIGHT_ONLY, Shape, close, spectral, spectral_norm, weight_norm, weighted

pytestmark = pytest.mark.triton_surface

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EVERY = {**SHAPES, **WEIGHT_ONLY}


def chosen(shapes: dict[str, Shape], backend: str, dtype: torch.dtype) -> list[Shape]:
    """Under the interpreter, which is slow, a quarter for each type."""
    return [*shapes.values()] if backend != "triton" else [*shapes.values()][DTYPES.index(dtype) :: 4]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_norm(dtype: torch.dtype, backend: str) -> None:
    requests = [weighted(shape, dtype) for shape in chosen(EVERY, backend, dtype)]
    made = weights.weight_norm(requests)
    upstream = [torch.randn_like(w) for w in made]
    torch.autograd.backward(made, upstream)
    for request, w, dw in zip(requests, made, upstream, strict=True):
        expected, g, v = weight_norm(request)
        expected.backward(dw.double())
        if request.v.is_contiguous() or request.v.stride() == torch.empty_like(request.v).stride():
            assert w.stride() == request.v.stride()
        assert w.shape == request.v.shape and request.g.grad is not None and request.v.grad is not None
        terms = request.v.numel() // max(1, request.g.numel())
        others = [d for d in range(v.dim()) if d != request.dim]
        length = v.detach().square().sum(others, keepdim=True).sqrt() if others else v.detach().abs()
        close(w, expected, dtype, terms)
        # dg is a sum of products, dv a difference of p*dw and q*v: errors are relative to these
        close(request.g.grad, g.grad, dtype, terms, float((dw.double() * v.detach()).abs().sum() / length.min()))
        p = float((g.detach().reshape(length.shape) / length * dw.double()).abs().max())
        close(request.v.grad, v.grad, dtype, terms, p * (1 + terms**0.5))


@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spectral_norm(dtype: torch.dtype, iterations: int, backend: str) -> None:
    requests = [spectral(shape, dtype, iterations) for shape in chosen(SHAPES, backend, dtype)]
    expected = [spectral_norm(request) for request in requests]
    kept = [(request.u.clone(), request.v.clone()) for request in requests]
    made = weights.spectral_norm(requests)
    upstream = [torch.randn_like(w) for w in made]
    torch.autograd.backward(made, upstream)
    for request, w, dw, (e, weight, u, v), (u0, v0) in zip(requests, made, upstream, expected, kept, strict=True):
        e.backward(dw.double())
        terms = request.weight.numel()
        assert request.weight.grad is not None and weight.grad is not None
        # without an iteration sigma = u'Wv may be far below |W|: its relative error grows by their ratio
        matrix = weight.detach().movedim(request.dim, 0).reshape(len(u), -1)
        ratio = max(1.0, float(u.abs() @ matrix.abs() @ v.abs()) / float(abs(u @ matrix @ v)))
        size = float(e.detach().abs().max())
        close(w, e, dtype, terms, size * ratio if dtype in (torch.float32, torch.float64) else size * (1 + 1e-4 * ratio))
        largest = float(dw.double().abs().max() + (dw.double() * e.detach()).abs().sum() * torch.outer(u, v).abs().max())
        close(request.weight.grad, weight.grad, dtype, terms, ratio * largest / float(abs(u @ matrix @ v)))
        if iterations:
            close(request.u, u, dtype, terms)
            close(request.v, v, dtype, terms)
        else:
            assert torch.equal(request.u, u0) and torch.equal(request.v, v0)


def test_gradients_are_orthogonal(backend: str) -> None:
    """Scaling a row of v, or W, changes nothing: <v, dv> = 0 per row, <W, dW> = 0."""
    requests = [weighted(shape, torch.float32) for shape in (SHAPES["linear"], SHAPES["transposed"], SHAPES["channels_last"])]
    made = weights.weight_norm(requests)
    torch.autograd.backward(made, [torch.randn_like(w) for w in made])
    for request in requests:
        assert request.v.grad is not None
        products = (request.v.grad * request.v).detach().double()
        rows = products.movedim(request.dim, 0).flatten(1)
        assert float((rows.sum(1).abs() / rows.abs().sum(1)).max()) < 1e-6
    spectrals = [spectral(shape, torch.float32) for shape in (SHAPES["linear"], SHAPES["transposed"], SHAPES["channels_last"])]
    made = weights.spectral_norm(spectrals)
    torch.autograd.backward(made, [torch.randn_like(w) for w in made])
    for s in spectrals:
        assert s.weight.grad is not None
        products = (s.weight.grad * s.weight).detach().double()
        assert float(products.sum().abs() / products.abs().sum()) < 1e-6


@pytest.mark.parametrize("shape", ["odd rows", "transposed, one row left", "channels_last"])
def test_double_backward(shape: str, backend: str) -> None:
    """The gradient by the kernels, its gradient by the formulas."""
    request = weighted(SHAPES[shape], torch.float64)
    together = weighted(SHAPES["linear"], torch.float64)

    def weight(g: Tensor, v: Tensor, *rest: Any) -> Tensor:
        return weights.weight_norm([weights.Weighted(g, v, request.dim), together])[0]

    few = {"fast_mode": True}
    assert torch.autograd.gradcheck(weight, (request.g, request.v), **few)
    assert torch.autograd.gradgradcheck(weight, (request.g, request.v), **few)
    s = spectral(SHAPES[shape], torch.float64, 0)

    def normalised(w: Tensor) -> Tensor:
        return weights.spectral_norm([s._replace(weight=w)])[0]

    assert torch.autograd.gradcheck(normalised, (s.weight,), **few)
    assert torch.autograd.gradgradcheck(normalised, (s.weight,), **few)


@pytest.mark.parametrize("name", ["linear", "transposed", "channels_last"])
@pytest.mark.parametrize("frozen", ["g", "v"])
def test_double_backward_of_one(name: str, frozen: str, backend: str) -> None:
    """Of one weight, one of whose parameters needs no gradient."""
    request = weighted(SHAPES[name], torch.float64)
    getattr(request, frozen).requires_grad_(False)
    (wanted,) = (t for t in (request.g, request.v) if t.requires_grad)
    dw = torch.randn_like(request.v).requires_grad_()

    def second(w: Tensor) -> list[Tensor]:
        (first,) = torch.autograd.grad(w, wanted, dw, create_graph=True)
        return [first, *torch.autograd.grad(first.sin().sum(), dw, retain_graph=True)]

    ours, theirs = second(weights.weight_norm_of(*request)), second(formulas.weight_norm(*request))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_some(backend: str) -> None:
    """Weights that take no part in the loss get no gradient, frozen ones neither; the others are as if they were alone."""
    shapes = [SHAPES["linear"], SHAPES["transposed"], SHAPES["odd rows"], SHAPES["channels_last"]]
    requests = [weighted(shape, torch.float32) for shape in shapes]
    requests[3].v.requires_grad_(False)
    made = weights.weight_norm(requests)
    (made[1].square().sum() + made[3].sum()).backward()
    assert all(t.grad is None for i in (0, 2) for t in requests[i][:2]) and requests[3].v.grad is None
    alone = weighted(shapes[1], torch.float32)._replace(
        v=requests[1].v.detach().requires_grad_(), g=requests[1].g.detach().requires_grad_()
    )
    weights.weight_norm([alone])[0].square().sum().backward()
    assert torch.equal(alone.v.grad, requests[1].v.grad) and torch.equal(alone.g.grad, requests[1].g.grad)  # type: ignore[arg-type]
    spectrals = [spectral(shape, torch.float32) for shape in shapes]
    before = [(s.u.clone(), s.v.clone()) for s in spectrals]
    made = weights.spectral_norm(spectrals)
    made[2].sum().backward()
    assert [s.weight.grad is not None for s in spectrals] == [False, False, True, False]
    lone = spectrals[2]._replace(weight=spectrals[2].weight.detach().requires_grad_(), u=before[2][0], v=before[2][1])
    weights.spectral_norm([lone])[0].sum().backward()
    torch.testing.assert_close(lone.weight.grad, spectrals[2].weight.grad, rtol=0, atol=2e-6)


def test_two_forwards_before_a_backward(backend: str) -> None:
    """u and v of the first forward are those of its backward, whatever a second forward or a broadcast writes since."""
    request = spectral(SHAPES["transposed"], torch.float32)
    first_expected, first_weight, u, v = spectral_norm(request)
    first = weights.spectral_norm([request])[0]
    second_expected, second_weight, _, _ = spectral_norm(request._replace(u=u, v=v))
    second = weights.spectral_norm([request])[0]
    request.u.fill_(7.0)
    request.v.fill_(7.0)
    dw = torch.randn_like(first)
    for made, expected, weight in ((second, second_expected, second_weight), (first, first_expected, first_weight)):
        request.weight.grad = None
        made.backward(dw)
        expected.backward(dw.double())
        torch.testing.assert_close(request.weight.grad.double(), weight.grad, rtol=0, atol=float(weight.grad.abs().max()) * 1e-5)  # type: ignore[union-attr]


def test_changed_weights_are_noticed(backend: str) -> None:
    request, s = weighted(SHAPES["linear"], torch.float32), spectral(SHAPES["linear"], torch.float32)
    for made, changed in ((weights.weight_norm([request])[0], request.v), (weights.spectral_norm([s])[0], s.weight)):
        with torch.no_grad():
            changed.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            made.sum().backward()


def test_upstream_of_any_layout(backend: str) -> None:
    for name in ("channels_last", "transposed"):
        request, s = weighted(SHAPES[name], torch.float32), spectral(SHAPES[name], torch.float32, 0)
        for made, of in ((weights.weight_norm([request])[0], request.v), (weights.spectral_norm([s])[0], s.weight)):
            dw = torch.randn(made.shape, device=DEVICE)
            (dense,) = torch.autograd.grad(made, of, torch.empty_like(made).copy_(dw), retain_graph=True)
            (other,) = torch.autograd.grad(made, of, dw.flip(0).contiguous().flip(0), retain_graph=True)
            torch.testing.assert_close(dense, other, rtol=0, atol=1e-6 * float(dense.abs().max()))
            made.sum().backward()  # expanded, of stride 0


def test_zeros_are_as_in_torch(backend: str) -> None:
    v = torch.randn(4, 8, device=DEVICE)
    v[1] = 0
    w = weights.weight_norm([weights.Weighted(torch.ones(4, 1, device=DEVICE), v, 0)])[0]
    assert w[1].isnan().all() and not w[[0, 2, 3]].isnan().any()
    s = spectral(SHAPES["linear"], torch.float32)
    assert weights.spectral_norm([s._replace(weight=torch.zeros(8, 64, device=DEVICE))])[0].isnan().all()


def test_halves_of_any_size(backend: str) -> None:
    """Squares of float16 would overflow at 300 and vanish at 1e-4."""
    for size in (300.0, 1e-4):
        v = torch.full((2, 64), size, dtype=torch.float16, device=DEVICE)
        w = weights.weight_norm([weights.Weighted(torch.ones(2, 1, dtype=torch.float16, device=DEVICE), v, 0)])[0]
        torch.testing.assert_close(w, torch.full_like(w, 0.125), rtol=2e-3, atol=0)
        s = spectral(SHAPES["linear"], torch.float16)._replace(weight=torch.full((8, 64), size, dtype=torch.float16, device=DEVICE))
        made = weights.spectral_norm([s])[0]
        torch.testing.assert_close(made, torch.full_like(made, 512**-0.5), rtol=2e-3, atol=0)


def test_mixed_types_and_orders(backend: str) -> None:
    """One call for all: grouped by type, in the order given."""
    requests = [
        weighted(SHAPES[name], dtype) for name in ("linear", "transposed") for dtype in (torch.float32, torch.bfloat16, torch.float64)
    ]
    for request, w in zip(requests, weights.weight_norm(requests), strict=True):
        assert torch.equal(w, weights.weight_norm([request])[0])
    for made in weights.weight_norm([requests[0]._replace(g=requests[0].g.detach().double())]):  # g of another type
        assert made.dtype == torch.float32


def test_many_weights(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a launch holds."""
    count = 110
    if backend == "triton":  # interpreted, each program takes milliseconds
        monkeypatch.setattr("normfused.backends.triton.weights._WEIGHTS", 3)
        count = 7
    requests = [weighted(Shape((1 + i % 3, 2 + i % 5)), torch.float32) for i in range(count)]
    for request, w in zip(requests, weights.weight_norm(requests), strict=True):
        close(w, weight_norm(request)[0], torch.float32, 6)
    spectrals = [spectral(Shape((2 + i % 3, 2 + i % 5)), torch.float32) for i in range(count)]
    expected = [spectral_norm(s) for s in spectrals]
    made = weights.spectral_norm(spectrals)
    torch.autograd.backward(made, [torch.ones_like(w) for w in made])
    for s, w, (e, weight, u, v) in zip(spectrals, made, expected, strict=True):
        e.sum().backward()
        close(w, e, torch.float32, 60)
        close(s.u, u, torch.float32, 60)
        close(s.v, v, torch.float32, 60)
        assert s.weight.grad is not None and weight.grad is not None
        close(s.weight.grad, weight.grad, torch.float32, 600, float(e.detach().abs().max()) * 10 + 10 * float(weight.grad.abs().max()))


def test_nothing_at_all(backend: str) -> None:
    assert weights.weight_norm([]) == [] and weights.spectral_norm([]) == []
    w = weights.weight_norm([weights.Weighted(torch.ones(0, 1, device=DEVICE), torch.ones(0, 3, device=DEVICE), 0)])[0]
    assert w.shape == (0, 3)
