"""``python -m bench.gpu.quick``: the key shapes, forward and backward apart, by eager, torch.compile, Triton and CUDA C++.

Device time by events around replays of CUDA graphs; each graph's calls rotate over more memory than the cache. The providers of a case
take turns, so that the machine's noise hits all of them. A backward is captured by itself, after forwards that are not (its inputs are
kept by ``retain_graph``). GB/s: bytes that must move, over the time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config

from normfused.benchmark.accuracy import error_against_float64
from normfused.benchmark.cases import CHANNELS_LAST, Case
from normfused.benchmark.providers import Provider, all_providers, prepare, tensors
from normfused.benchmark.timing import COLD_BYTES

from .facts import MIB, about, copy_gbps, save

PROVIDERS = ("eager", "compile", "normfused-triton", "normfused-cuda")


def _case(norm: str, shape: tuple[int, ...], act: str = "identity", layout: str = "contiguous", **options: Any) -> Case:
    return Case(norm, shape, act=act, layout=layout, **options)


# The most telling first: the list is cut where time is up
CASES = [
    _case("batch", (32, 256, 56, 56), "relu", CHANNELS_LAST, residual="pre_act"),
    _case("batch", (32, 256, 56, 56), "relu", residual="pre_act"),
    _case("group", (8, 320, 64, 64), "silu", groups=32),
    _case("group", (8, 320, 64, 64), "silu", CHANNELS_LAST, groups=32),
    _case("layer", (25088, 384)),
    _case("rms", (16384, 4096), residual="pre_norm"),
    _case("instance", (2, 32, 128, 128, 128), "leaky_relu"),
    _case("batch", (256, 64, 112, 112), "relu", CHANNELS_LAST),
    _case("group", (1, 512, 16, 180, 320), "silu", groups=32),
    _case("layer", (128, 96, 56, 56), dim=1),
    _case("frn", (32, 256, 56, 56), "tlu"),
    _case("batch", (8, 64, 32, 32), "relu"),
    _case("group", (1, 320, 64, 64), "silu", groups=32),
    _case("batch", (4, 128, 1024, 1024), "relu"),
    _case("batch", (256, 2048, 7, 7), "relu", CHANNELS_LAST),
    _case("batch", (128, 96, 112, 112), "silu"),
    _case("group", (1, 512, 512, 512), "silu", groups=32),
    _case("instance", (2, 320, 8, 8, 8), "leaky_relu", CHANNELS_LAST),
    _case("layer", (1024, 12288)),
    _case("rms", (8192, 8192)),
]
TINY = [_case("batch", (2, 8, 6, 6), "relu"), _case("rms", (16, 64), residual="pre_norm")]  # to try this file on a CPU


Data = list[tuple[list[torch.Tensor], torch.Tensor]]  # of each set: (x and perhaps the residual, dy)


def data_of(case: Case, device: str) -> Data:
    """As many sets as together exceed the cache; all providers take the same."""
    sets = max(2, min(64, -(-COLD_BYTES // case.floor_bytes("forward")))) if device == "cuda" else 2
    found = []
    for seed in range(sets):
        x, residual, dy = tensors(case, device, seed)
        found.append(([t.requires_grad_() for t in (x, residual) if t is not None], dy))
    return found


def calls(provider: Provider, case: Case, data: Data, device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """(forward, backward), each of which takes the sets in turn."""
    module = prepare(provider, case, device)
    graphs = []
    for leaves, dy in data:
        out = module(*leaves)
        heads = out if isinstance(out, tuple) else (out,)
        graphs.append((heads, [*leaves, *module.parameters()], (dy,) * len(heads)))
    ahead, back = itertools.cycle(data), itertools.cycle(graphs)

    def forward() -> object:
        return module(*next(ahead)[0])  # with grad: what training runs, saved tensors and masks included

    def backward() -> object:
        return torch.autograd.grad(*next(back), retain_graph=True)

    return forward, backward


def repeated(call: Callable[[], object], times: int, kept: int) -> Callable[[], None]:
    """The last results live on, so that the next do not take their place, which would still be in the cache."""

    def run() -> None:
        results: deque[object] = deque(maxlen=kept)
        for _ in range(times):
            results.append(call())

    return run


def captured(call: Callable[[], object], times: int, kept: int) -> tuple[Callable[[], object], str | None]:
    """(a CUDA graph's replay of ``times`` calls, None), or (the calls one by one, why they cannot be captured). On the current stream."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            repeated(call, times, kept)()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return repeated(call, times, kept), str(error).splitlines()[0]
    return graph.replay, None


def device_us(replay: Callable[[], object], times: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end) / times


def wall_us(replay: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    replay()
    return 1e6 * (time.perf_counter() - start) / times


def measure(case: Case, providers: list[Provider], device: str, rounds: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    replays: dict[str, list[Callable[[], object]]] = {}
    data = data_of(case, device)
    times = max(len(data), 10)
    for provider in providers:
        reason = provider.refuses(case, device)
        if reason is not None:
            continue
        try:
            error = error_against_float64(provider, case, device)
            record: dict[str, Any] = {"error_of_allowed": round(error, 3)}
            made = []
            for name, call in zip(("forward", "backward"), calls(provider, case, data, device), strict=True):
                replay, why = captured(call, times, len(data)) if device == "cuda" else (repeated(call, times, len(data)), None)
                made.append(replay)
                if why is not None:
                    record[f"{name}_not_in_a_graph"] = why
            found[provider.name], replays[provider.name] = record, made
        except Exception as failure:  # the others are still worth their figures
            found[provider.name] = {"failed": f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"[:200]}
    clock = device_us if device == "cuda" else wall_us
    samples: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds + 1):
        names = list(replays) if turn % 2 else list(replays)[::-1]
        for name in names:
            for k, replay in enumerate(replays[name]):
                taken = clock(replay, times)
                if turn:  # the first warms up
                    samples.setdefault((name, k), []).append(taken)
    bytes_of = (case.floor_bytes("forward"), case.floor_bytes("forward_backward") - case.floor_bytes("forward"))
    for (name, k), values in samples.items():
        direction, us = ("forward", "backward")[k], statistics.median(values)
        found[name] |= {f"{direction}_us": round(us, 2), f"{direction}_gbps": round(bytes_of[k] / us / 1e3)}
    return found


def markdown(results: list[dict[str, Any]], ceiling: float, machine: dict[str, Any]) -> str:
    lines = [
        f"## Key shapes on {machine.get('gpu', machine['device'])}, torch {machine['torch']}, commit {machine['commit']}",
        "",
        f"Microseconds, and per cent of the copy rate ({ceiling:.0f} GB/s) that the bytes which must move would need; bf16, training.",
        "A wrong result is marked with !.",
        "",
        "| case | " + " | ".join(f"{p} {d}" for d in ("forward", "backward") for p in PROVIDERS) + " |",
        "|---|" + "---|" * (2 * len(PROVIDERS)),
    ]
    for row in results:
        cells = []
        for direction in ("forward", "backward"):
            for name in PROVIDERS:
                r = row["providers"].get(name, {})
                us = r.get(f"{direction}_us")
                wrong = "!" if r.get("error_of_allowed", 0) > 1 else ""
                loose = "*" if f"{direction}_not_in_a_graph" in r else ""
                share = 100 * r.get(f"{direction}_gbps", 0) / ceiling if ceiling else 0
                cells.append(f"{us:.1f} ({share:.0f} %){wrong}{loose}" if us is not None else "failed" if "failed" in r else "")
        lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "*: could not be captured; the host's time is in it."])


def headline(results: list[dict[str, Any]]) -> str:
    ratios = [
        r["providers"]["eager"][f"{d}_us"] / r["providers"]["normfused-cuda"][f"{d}_us"]
        for r in results
        for d in ("forward", "backward")
        if f"{d}_us" in r["providers"].get("eager", {}) and f"{d}_us" in r["providers"].get("normfused-cuda", {})
    ]
    if not ratios:
        return f"{len(results)} cases, no figure of the cuda backend beside eager"
    middle = statistics.median(ratios)
    return f"{len(results)} cases; eager / cuda: median {middle:.2f}, worst {min(ratios):.2f}, best {max(ratios):.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=400.0, help="no case is begun after these")
    parser.add_argument("--providers", nargs="*", default=list(PROVIDERS))
    parser.add_argument("--cases", nargs="*", default=[], help="only names that contain one of these")
    options = parser.parse_args()
    started, device = time.monotonic(), options.device
    # a backward runs on its forward's stream, and the default stream cannot be captured: all of it runs on another
    side = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
    with side:
        return run(options, device, started)


def run(options: argparse.Namespace, device: str, started: float) -> int:
    ceiling = copy_gbps(256 * MIB) if device == "cuda" else 0.0
    providers = [p for p in all_providers(device) if p.name in options.providers]
    print(f"copy {ceiling:.0f} GB/s; absent: {[p.absent for p in providers if p.absent]}", flush=True)
    providers = [p for p in providers if p.absent is None]
    cases = [c for c in (CASES if device == "cuda" else TINY) if not options.cases or any(text in c.name for text in options.cases)]
    results: list[dict[str, Any]] = []
    machine = about(device)
    for case in cases:
        if time.monotonic() - started > options.seconds:
            print(f"time is up before {case.name}", flush=True)
            break
        found = measure(case, providers, device, options.rounds)
        results.append({"case": case.name, "providers": found})
        print(f"{time.monotonic() - started:4.0f} s {case.name}: {found}", flush=True)
        save({"labels": machine, "copy_gbps": ceiling, "cases": results, "markdown": markdown(results, ceiling, machine)})
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    print(markdown(results, ceiling, machine))
    wrong = [f"{r['case']} {n}" for r in results for n, p in r["providers"].items() if "failed" in p or p.get("error_of_allowed", 0) > 1]
    print(f"headline: {headline(results)}" + (f"; {len(wrong)} wrong or failed" if wrong else ""))
    return 1 if any("normfused" in w for w in wrong) or not results else 0


if __name__ == "__main__":
    # what torch.compile's backward may overwrite, it could not be given twice
    torch._functorch.config.donated_buffer = False
    raise SystemExit(main())
