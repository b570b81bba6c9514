"""``python -m bench.cpu_ratio``: normfused on the CPU against the torch.nn chain, interleaved, float32, forward and with backward.

Aims: at most 1.05 for tensors of 4 MB and more, at most 15 us more below, FRN+TLU at least 1.5 times as fast. Group and instance norm in
channels_last are reported, not bounded: ATen's kernels are inaccurate or copy there. Small tensors run on one thread, see `threads_for`.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch

from normfused.benchmark.cases import CHANNELS_LAST, QUICK, Case
from normfused.benchmark.providers import Provider, eager, ours, prepare, step, tensors
from normfused.benchmark.timing import SMALL_BYTES, take_turns, threads_for, wall_us


def bound(case: Case) -> str:
    if case.norm in ("group", "instance") and case.layout == CHANNELS_LAST:
        return ""
    if case.norm == "frn":
        return "<= 0.67"
    return "<= 1.05" if case.tensor_bytes >= 4 * 10**6 else "<= +15 us"


def measure(case: Case, rounds: int) -> tuple[float, float, float, float]:
    """(chain us, ours us, median ratio of neighbours, median difference us) of forward and backward."""
    x, residual, dy = tensors(case, "cpu")
    leaves = [(x.clone().requires_grad_(), None if residual is None else residual.clone().requires_grad_()) for _ in range(2)]
    modules = prepare(Provider("eager", eager), case, "cpu"), prepare(Provider("torch", ours("torch")), case, "cpu")
    calls = {name: partial(step, module, *leaf, dy) for name, module, leaf in zip(("chain", "own"), modules, leaves, strict=True)}
    times = take_turns({name: partial(wall_us, call, 1) for name, call in calls.items()}, rounds)
    ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    difference = statistics.median(b - a for a, b in zip(*times.values(), strict=True))
    return statistics.median(times["chain"]), statistics.median(times["own"]), ratio, difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="pairs of runs a case (small cases: twenty times as many)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {given.threads} threads (1 below 1 MB); forward+backward, us\n")
    print("| case | torch.nn | normfused | ratio | difference | aim |\n|---|---|---|---|---|---|")
    for case in QUICK:
        with threads_for(case.tensor_bytes, given.threads):
            chain, own, ratio, difference = measure(case, given.rounds * (20 if case.tensor_bytes < SMALL_BYTES else 1))
        print(f"| {case.name} | {chain:.0f} | {own:.0f} | {ratio:.2f} | {difference:+.0f} us | {bound(case)} |", flush=True)


if __name__ == "__main__":
    main()
