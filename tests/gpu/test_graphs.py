"""CUDA graphs: a replay gives the bits of an eager call, beside whatever else runs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from .kinds import BF16, KINDS, NAMED, Kind, differing, same_bits, step

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
REPLAYS = 1000


@dataclass
class Captured:
    """Forward and backward of a layer of its own as a graph, with what eager calls give for the same inputs."""

    graph: torch.cuda.CUDAGraph
    stream: torch.cuda.Stream
    layer: nn.Module
    inputs: list[Tensor]
    dy: Tensor
    outputs: list[Tensor]
    expected: list[Tensor]

    def replay(self, times: int) -> Tensor:
        """How many elements were wrong in all replays, on the device; everything on its own stream."""
        wrong = torch.zeros((), dtype=torch.int64, device=self.dy.device)
        with torch.cuda.stream(self.stream):
            for _ in range(times):
                for out in self.outputs:
                    out.zero_()  # so that a replay which writes nothing is seen
                self.graph.replay()
                wrong += differing(self.outputs, self.expected)
        return wrong


def capture(kind: Kind, backend: str, device: torch.device, seed: int = 0, warm_up: int = 3) -> Captured:
    layer = kind.layer(device, backend)
    inputs, dy = kind.inputs(device, BF16, seed)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            expected = step(layer, inputs, dy)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = step(layer, inputs, dy)
    torch.cuda.synchronize(device)
    return Captured(graph, stream, layer, inputs, dy, outputs, [t.clone() for t in expected])


@kinds
def test_replays_have_the_bits_of_eager_calls(kind: Kind, fused: str, gpu: torch.device) -> None:
    captured = capture(kind, fused, gpu)
    torch.cuda.synchronize(gpu)
    wrong = captured.replay(REPLAYS)
    torch.cuda.synchronize(gpu)
    assert int(wrong) == 0


@pytest.mark.parametrize("name", ["batch", "batch+add, cumulative", "batch+add, channels last"])
def test_replays_count_and_average(name: str, fused: str, gpu: torch.device) -> None:
    """Running statistics and the counter move with every replay, as they do with eager calls."""
    kind, replays = NAMED[name], 20
    captured = capture(kind, fused, gpu, warm_up=3)
    captured.replay(replays)
    torch.cuda.synchronize(gpu)
    other = kind.layer(gpu, fused)
    with torch.no_grad():
        for _ in range(3 + replays):
            other(*captured.inputs)
    for (name, a), b in zip(captured.layer.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), (name, a, b)


@kinds
def test_new_inputs(kind: Kind, fused: str, gpu: torch.device) -> None:
    captured = capture(kind, fused, gpu)
    for seed in range(1, 6):
        inputs, dy = kind.inputs(gpu, BF16, seed)
        want = step(kind.layer(gpu, fused), inputs, dy)
        torch.cuda.synchronize(gpu)
        with torch.no_grad(), torch.cuda.stream(captured.stream):
            for old, new in zip([*captured.inputs, captured.dy], [*inputs, dy], strict=True):
                old.copy_(new)
            captured.graph.replay()
        torch.cuda.synchronize(gpu)
        assert same_bits(captured.outputs, want)


@kinds
def test_two_graphs_beside_eager_work(kind: Kind, fused: str, gpu: torch.device) -> None:
    """Two graphs on two streams and eager calls on a third, all at once: their barriers are their own."""
    first, second = capture(kind, fused, gpu, 1), capture(kind, fused, gpu, 2)
    layer, third = kind.layer(gpu, fused), torch.cuda.Stream(gpu)
    inputs, dy = kind.inputs(gpu, BF16, 3)
    want = [t.clone() for t in step(layer, inputs, dy)]
    torch.cuda.synchronize(gpu)
    wrong = []
    for _ in range(30):
        wrong += [first.replay(3), second.replay(3)]
        with torch.cuda.stream(third):
            for _ in range(3):
                wrong.append(differing(step(layer, inputs, dy), want))
    torch.cuda.synchronize(gpu)
    assert [int(w) for w in wrong] == [0] * len(wrong)


@pytest.mark.parametrize("name", ["batch+add, cumulative", "group", "layer, rows"])
def test_one_graph_of_many_calls(name: str, fused: str, gpu: torch.device) -> None:
    """As many launches as a network has; each one captured has its own barriers."""
    kind, calls = NAMED[name], 64
    captured = capture(kind, fused, gpu)
    graph, outputs = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, stream=captured.stream):
        for _ in range(calls):
            outputs.append(step(captured.layer, captured.inputs, captured.dy))
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize(gpu)
    assert all(same_bits(out, captured.expected) for out in outputs)


@pytest.mark.parametrize("name", ["batch", "group", "layer, rows"])
def test_make_graphed_callables(name: str, fused: str, gpu: torch.device) -> None:
    kind = NAMED[name]
    inputs, dy = kind.inputs(gpu)
    want = step(kind.layer(gpu, fused), inputs, dy)
    sample = tuple(torch.randn_like(t).requires_grad_() for t in inputs)
    layer = kind.layer(gpu, fused)
    graphed = torch.cuda.make_graphed_callables(layer, sample)
    y = graphed(*inputs)
    got = [y.detach(), *torch.autograd.grad(y, [*inputs, *layer.parameters()], dy)]
    assert same_bits(got, want)
