"""Streams and devices: calls run where they are asked to, wait for nothing, and do not meet."""

from __future__ import annotations

import pytest
import torch

from .kinds import BF16, KINDS, Kind, differing, same_bits, step

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)


@kinds
def test_eager_calls_on_many_streams(kind: Kind, fused: str, gpu: torch.device) -> None:
    streams = [torch.cuda.Stream(gpu) for _ in range(4)]
    layers = [kind.layer(gpu, fused) for _ in streams]
    data = [kind.inputs(gpu, BF16, seed) for seed in range(len(streams))]
    want = [step(layer, *d) for layer, d in zip(layers, data, strict=True)]
    torch.cuda.synchronize(gpu)
    wrong = []
    for _ in range(50):
        for stream, layer, d, expected in zip(streams, layers, data, want, strict=True):
            with torch.cuda.stream(stream):
                wrong.append(differing(step(layer, *d), expected))
    torch.cuda.synchronize(gpu)
    assert int(torch.stack(wrong).sum()) == 0


@kinds
def test_the_current_stream_is_used(kind: Kind, fused: str, gpu: torch.device) -> None:
    """The input is written late on a stream; a call on that stream sees it, whatever other streams do."""
    layer, stream = kind.layer(gpu, fused), torch.cuda.Stream(gpu)
    inputs, dy = kind.inputs(gpu)
    want = step(layer, inputs, dy)
    late = [torch.zeros_like(t).requires_grad_() for t in inputs]
    torch.cuda.synchronize(gpu)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # some 50 ms
        with torch.no_grad():
            for empty, full in zip(late, inputs, strict=True):
                empty.copy_(full)
        got = step(layer, late, dy)
    torch.cuda.synchronize(gpu)
    assert same_bits(got, want)


@kinds
def test_the_host_waits_for_nothing(kind: Kind, fused: str, gpu: torch.device) -> None:
    layer = kind.layer(gpu, fused)
    inputs, dy = kind.inputs(gpu)
    for _ in range(3):
        step(layer, inputs, dy)
    torch.cuda.synchronize(gpu)
    asleep = torch.cuda.Event()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # what torch knows of
    try:
        torch.cuda._sleep(2_000_000_000)  # about a second
        asleep.record()
        step(layer, inputs, dy)
        waited = asleep.query()  # what it does not know of
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize(gpu)
    assert not waited


@kinds
def test_the_second_device(kind: Kind, fused: str, gpu: torch.device) -> None:
    """Tensors of a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    with torch.cuda.device(here):
        inputs, dy = kind.inputs(here)
        want = step(kind.layer(here, fused), inputs, dy)
        far = [t.detach().to(there).requires_grad_() for t in inputs]
        got = step(kind.layer(there, fused), far, dy.to(there))
        assert torch.cuda.current_device() == 0
    assert all(t.device == there for t in got)
    if torch.cuda.get_device_capability(here) == torch.cuda.get_device_capability(there):
        assert same_bits([t.to(here) for t in got], want)
