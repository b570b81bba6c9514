"""What a call puts on the device, by torch's profiler: which kernels, and nothing beside them; and how much memory it takes."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.gpu import calls
from normfused import dispatch

from .kinds import BF16, KINDS, NAMED, Kind, step

MIB = 2**20


def launched(call: Callable[[], object], device: torch.device) -> list[str]:
    """Names of kernels, memsets and copies, in their order."""
    call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize(device)
    events = [e for e in found.events() if e.device_type == DeviceType.CUDA]
    names = [e.name for e in sorted(events, key=lambda e: e.time_range.start)]
    return [re.sub(r"^void |normfused::|[<(].*$", "", name).removesuffix("_kernel") for name in names]


@pytest.fixture
def profiler(gpu: torch.device) -> torch.device:
    """The GPU, where its profiler sees kernels; inside some sandboxes it does not."""
    x = torch.zeros(8, device=gpu)
    if not launched(lambda: x.add_(1), gpu):
        pytest.skip("torch's profiler sees no kernels on this machine")
    return gpu


# Sets that a block, a cluster or all blocks of an H200 together can hold: one launch each way. The sums over rows of layer norm's
# parameters take a second.
ONE_LAUNCH = {
    "batch": ["grad_single_pass"],
    "batch+add, cumulative": ["grad_single_pass"],
    "group, large": ["grad_single_pass"],
    "instance, few sets": ["grad_single_pass"],
    "group": ["grad_single_pass"],
    "instance": ["grad_single_pass"],
    "filter response": ["grad_single_pass"],
    "layer, rows": ["grad_single_pass", "grad_parameters"],
    "rms, pre-norm": ["grad_single_pass", "grad_parameters"],
}


@pytest.mark.parametrize("name", ONE_LAUNCH)
def test_one_launch(name: str, profiler: torch.device) -> None:
    kind = NAMED[name]
    layer = kind.layer(profiler)
    inputs, dy = kind.inputs(profiler)
    wanted = [*inputs, *layer.parameters()]
    assert launched(lambda: layer(*inputs), profiler) == ["single_pass"]
    out = layer(*inputs)
    heads = out if isinstance(out, tuple) else (out,)
    backward = launched(lambda: torch.autograd.grad(heads, wanted, (dy,) * len(heads), retain_graph=True), profiler)
    assert backward == ONE_LAUNCH[name]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_nothing_but_kernels(kind: Kind, profiler: torch.device) -> None:
    """No memset, no copy, no kernel of torch's: two passes at most take three launches forward and four backward."""
    layer = kind.layer(profiler)
    inputs, dy = kind.inputs(profiler)
    names = launched(lambda: step(layer, inputs, dy), profiler)
    assert set(names) <= calls.KERNELS, names
    assert len(names) <= 7, names


def test_calls_launch_every_kernel(profiler: torch.device) -> None:
    """bench.gpu.calls, which the sanitizer looks at."""
    seen: set[str] = set()
    for call in calls.CALLS:
        seen |= set(launched(lambda call=call: calls.run(call, "cuda", "cuda"), profiler))
    assert seen >= calls.KERNELS, calls.KERNELS - seen


@pytest.mark.parametrize("call", calls.CALLS, ids=lambda c: c.name)
def test_calls_are_right(call: calls.Call, device: torch.device) -> None:
    assert dispatch.unavailable("cuda", device.type, torch.float32) is None
    assert calls.error(call, device.type) <= 1


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_memory(kind: Kind, gpu: torch.device) -> None:
    """A call allocates its results, the statistics and little more."""
    layer = kind.layer(gpu)
    inputs, dy = kind.inputs(gpu, BF16)
    wanted = [*inputs, *layer.parameters()]
    step(layer, inputs, dy)
    torch.cuda.synchronize(gpu)

    def peak(call: Callable[[], object]) -> tuple[int, object]:
        torch.cuda.reset_peak_memory_stats(gpu)
        before = torch.cuda.memory_allocated(gpu)
        kept = call()
        return torch.cuda.max_memory_allocated(gpu) - before, kept

    size = inputs[0].numel() * BF16.itemsize
    taken, out = peak(lambda: layer(*inputs))
    heads = out if isinstance(out, tuple) else (out,)
    mask = size // 16 if kind.residual else 0
    assert taken <= len(heads) * size + mask + size // 8 + 8 * MIB
    taken, _ = peak(lambda: torch.autograd.grad(heads, wanted, (dy,) * len(heads)))
    own = 2 if kind.residual and len(heads) == 1 else 1
    assert taken <= own * size + size // 8 + 16 * MIB
