"""Determinism, and agreement of the backends with each other and with float64, at the sizes of networks."""

from __future__ import annotations

import pytest
import torch

from normfused import dispatch

from .kinds import BF16, DTYPES, FP16, FP32, FP64, KINDS, Kind, differing, moved, same_bits, step

# relative to the largest value: a rounding or two of what is stored, and of sums of many terms in float32
TOLERANCE = {BF16: 2**-7, FP16: 2**-9, FP32: 2e-5, FP64: 1e-11}
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)


def _errors(got: list[torch.Tensor], want: list[torch.Tensor]) -> list[float]:
    return [float((g.double() - w.double()).abs().max() / w.double().abs().max().clamp_min(1e-30)) for g, w in zip(got, want, strict=True)]


@kinds
def test_a_hundred_runs_have_the_same_bits(kind: Kind, fused: str, device: torch.device) -> None:
    """With fresh memory each time: the allocator's blocks are shuffled by allocations in between."""
    layer = kind.layer(device, fused)
    inputs, dy = kind.inputs(device)
    first = step(layer, inputs, dy)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    held = []
    for run in range(100 if device.type == "cuda" else 3):
        wrong += differing(step(layer, inputs, dy), first)
        held.append(torch.empty(1 + 1000 * (run % 7), device=device))
        del held[: len(held) // 2]
    assert int(wrong) == 0


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_backends_agree(kind: Kind, dtype: torch.dtype, fused: str, device: torch.device) -> None:
    reason = dispatch.unavailable(fused, device.type, dtype)
    if reason is not None:
        pytest.skip(reason)
    inputs, dy = kind.inputs(device, dtype)
    got = step(kind.layer(device, fused, dtype), inputs, dy)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    want = step(kind.layer(device, "torch", FP64), wide, dy.double())
    assert got[0].dtype == dtype
    assert got[0].stride() == inputs[0].stride()
    errors = _errors(got, want)
    assert max(errors) <= TOLERANCE[dtype], errors


@kinds
def test_running_statistics_agree(kind: Kind, fused: str, device: torch.device) -> None:
    layer, other = kind.layer(device, fused), kind.layer(device, "torch")
    if not list(layer.buffers()):
        pytest.skip("keeps none")
    for seed in range(3):
        inputs, _ = kind.inputs(device, FP32, seed)
        with torch.no_grad():
            layer(*inputs)
            other(*inputs)
    for (name, a), b in zip(layer.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@kinds
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_unaligned_storage(kind: Kind, dtype: torch.dtype, offset: int, fused: str, device: torch.device) -> None:
    """Tensors that begin anywhere in their storage, so not on 16 bytes; offset 8 is aligned again and must change nothing at all."""
    inputs, dy = kind.inputs(device, dtype)
    layer = kind.layer(device, fused, dtype)
    want = step(layer, inputs, dy)
    shifted = moved([*inputs, dy], offset)
    got = step(layer, shifted[:-1], shifted[-1])
    if offset * dtype.itemsize % 16 == 0:
        assert same_bits(got, want)
    assert max(_errors(got, want)) <= TOLERANCE[dtype]
