"""Faults that are planted on purpose, and must be noticed: a suite that passes proves something only if a broken kernel fails it.

Barriers are removed one by one, without compiling anything, by the emulation (nf_emulation_skip); a fault shows as a wrong number, a race,
or a report of the emulator. Other faults are patched into a copy of the sources, compiled, and run through the very tests of this
directory in a process of their own.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from normfused import _build
from normfused.problem import SAMPLE_GROUP

from ..emulation.machine import ROOT
from ..support.cases import KINDS
from .cases import SMALL, Case, Machine
from .test_races import ORDERS, REPRESENTATIVE, make
from .test_steps import check_steps

KERNELS = ROOT / "csrc/kernels"
STEPS = "steps"  # the slice steps, beside the representative calls
SEEDS = [("reverse", 0), *(("starve", seed) for seed in range(1, 6))]


def run(name: str) -> None:
    if name == STEPS:
        for layout in ("nchw", "nhwc"):
            check_steps(Case(SAMPLE_GROUP, shape=(2, 6, 33, 31), groups=6, layout=layout, act="prelu", residual="pre_act"), SMALL)
    else:
        make(name).check()


def barriers() -> list[tuple[str, int]]:
    """File and line of every barrier in the kernels' sources. The helpers' own (device.cuh) take the place of their callers;
    weights.cuh has a test of its own."""
    found = []
    for path in sorted(KERNELS.glob("*.cuh")):
        if path.name in ("device.cuh", "weights.cuh"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"\bsync_(warp|block|blocks|cluster)\(|copy_async_wait<|copy_bulk_wait<|\.wait\(", line.split("//")[0]):
                found.append((path.name, number))
    return found


@functools.cache
def met(machine: Machine) -> dict[tuple[str, int], list[str]]:
    """By which calls a barrier is met."""
    found: dict[tuple[str, int], list[str]] = {}
    for name in [*REPRESENTATIVE, STEPS]:
        with machine.mode():
            run(name)
            for site in machine.sites():
                found.setdefault((Path(site["file"]).name, site["line"]), []).append(name)
    return found


def noticed(name: str, machine: Machine, order: str, seed: int, site: tuple[str, int]) -> str:
    """How a call fails without a barrier, or nothing."""
    with machine.mode(order, seed=seed, races=True):
        machine.skip(*site)
        try:
            run(name)
        except (AssertionError, RuntimeError) as error:
            return str(error).splitlines()[0]
    return ""


@pytest.mark.parametrize("site", barriers(), ids=lambda site: f"{site[0]}:{site[1]}")
def test_no_barrier_can_be_spared(site: tuple[str, int], machine: Machine) -> None:
    calls = met(machine).get(site, [])
    assert calls, "no call meets it"
    ways = [(name, order, seed) for order, seed in SEEDS for name in calls]
    assert any(noticed(name, machine, order, seed, site) for name, order, seed in ways), f"redundant in {calls}"


def test_nothing_is_noticed_without_a_fault(machine: Machine) -> None:
    """The way back: a mutant that is none."""
    for order, seed in ORDERS:
        assert not noticed("narrow columns of groups", machine, order, seed, ("nothing.cuh", 1))


# ----------------------------------------------------------------------------------------------------------- planted in sources
DRIVER = """
import sys
from pathlib import Path
from normfused import _build
_build.emulation_products = lambda: Path(sys.argv[1])
import pytest
sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""
# file, what is there, what is put in its place, and tests of float32 that must fail
FAULTS: dict[str, tuple[str, str, str, list[str]]] = {
    "x is read again": (
        "owners.cuh",
        "batch[k] = slab.load(call.tensors.x, spots[k]);",
        "batch[k] = slab.load(call.tensors.x, spots[k]), batch[k] = slab.load(call.tensors.x, spots[k]);",
        ["test_traffic.py::test_promises[channel-sectors-nchw-dtype0-single_pass]"],
    ),
    "a tail has one lane too many": (
        "slab.cuh",
        "s.last = kRegular ? V : min_(columns - s.column, V);",
        "s.last = kRegular ? V : min_(columns - s.column + 1, V);",
        ["test_races.py::test_no_races[wide rows, single-reverse-0]"],
    ),
    "an absent vector is taken for a whole one": (
        "slab.cuh",
        "if (!has(c) || (!kRegular && s.last <= s.first)) s.first = s.last = 0;",
        "if (!kRegular && (!has(c) || s.last <= s.first)) s.first = s.last = 0;",
        ["test_norm_act.py::test_moments_of_awkward_numbers"],
    ),
    "the centre of a thread's sums stays": (
        "moments.cuh",
        "if (centred && count >= move_at) move();",
        "",
        ["test_norm_act.py::test_a_first_number_far_away"],
    ),
    "the centre moves and the sum does not know": (
        "moments.cuh",
        "sum[j] = fma_(-A(count), moved, all);",
        "sum[j] = A(0);",
        ["test_norm_act.py::test_moments_of_awkward_numbers"],
    ),
    "the first block counts": (
        "single_pass.cuh",
        "call.problem.cumulative ? last_to_arrive(Global<uint32_t>(t.arrivals), grid_blocks()) : block_index() == 0;",
        "block_index() == 0;",
        [f"test_mutants.py::test_the_counter_is_read_before_it_moves[{order}-{seed}]" for order, seed in SEEDS],
    ),
    "the next slab lands on this one": (
        "moments.cuh",
        "return base + last >= ring ? base + last - ring : base + last;",
        "return base;",
        ["test_races.py::test_no_races_of_any_type[groups of blocks, the next slab on its way, several channels-dtype0-4]"],
    ),
    "what passes lands on what stays": (
        "moments.cuh",
        "place = (b - passing) & (ahead - 1);",
        "place = (b + 1 - passing) & (ahead - 1);",
        ["test_races.py::test_no_races_of_any_type[groups of blocks, partly resident-dtype0-4]"],
    ),
    "every block of a set moves the statistics": (
        "apply.cuh",
        "const bool stores = slab.chunk == 0;  // of all slabs that know the set",
        "const bool stores = true;",
        ["test_races.py::test_no_races_of_any_type[cluster-dtype0-4]"],
    ),
    "running statistics are read when another block may have moved them": (
        "apply.cuh",
        "const Pair<A> running = with_running ? numbers.get(set) : Pair<A>();",
        "const Running<A> late = running_of<A>(call, slab.first_set(call.walk) + set);\n"
        "const Pair<A> running = {late.mean, late.deviation};",
        ["test_races.py::test_no_races_of_any_type[renorm columns, cluster-dtype0-4]"],
    ),
    "a team keeps to its neighbour's sample": (
        "samples.cuh",
        "int64_t(group) * w.samples + in_slab(w);",
        "int64_t(group) * w.samples;",
        ["test_races.py::test_no_races_of_any_type[samples in columns, a block-dtype0-4]"],
    ),
    "a piece stands for its sample": (
        "samples.cuh",
        "if (sample.pieces > 1) v[0] = exchange.merged(sample.first_chunk, sample.first_chunk + sample.pieces);",
        "",
        ["test_races.py::test_no_races_of_any_type[pieces of samples, cluster-dtype0-4]"],
    ),
    "neighbours are summed": (
        "slab.cuh",
        "v.keep([&](int j) { return s.has(j); });",
        "",
        ["test_norm_act.py::test_nan_stays_in_its_set"],
    ),
    "eps outside of the root": (
        "rules/standard.cuh",
        "return reciprocal_sqrt_(var + eps);",
        "return A(1) / (sqrt_(var) + eps);",
        ["test_mutants.py::test_variances_like_eps[channel]"],
    ),
}


@pytest.mark.parametrize(("order", "seed"), SEEDS)
def test_the_counter_is_read_before_it_moves(order: str, seed: int, machine: Machine) -> None:
    """A cumulative average weighs with the count of batches, which every block reads and one writes: the last to come."""
    with machine.mode(order, seed=seed, races=True):
        make("cumulative", dtype=torch.float32, shape=(2, 24, 5, 3)).check()


@pytest.mark.parametrize("kind", ["channel", "group rms", "position"])
def test_variances_like_eps(kind: str, machine: Machine) -> None:
    """Where the variance is near 1 the place of eps hides in the tolerance."""
    Case(shape=(2, 6, 5, 3), scale=0.003, **KINDS[kind]).check()


def run_planted(fault: str, folder: Path, instead: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a fault's tests on a copy of the float32 kernels with it (or with ``instead``), linked with the objects of the build at hand."""
    file, there, planted, nodes = FAULTS[fault]
    built = _build.emulation_products()
    assert built is not None
    commands = [line.partition("line = ")[2] for line in (built / "build.ninja").read_text().splitlines() if "line = " in line]
    compile_line = next(c for c in commands if "-c " in c and "instances/float32.cu" in c)
    link_line = next(c for c in commands if c.endswith("_ops.so"))
    sources, made = folder / "csrc", folder / "kernels_instances_float32.cu.o"
    shutil.copytree(ROOT / "csrc", sources)
    patched = sources / "kernels" / file
    text = patched.read_text()
    assert text.count(there) == 1, f"{file} has changed: write the fault {fault!r} anew"
    patched.write_text(text.replace(there, planted if instead is None else instead))
    own = next(word for word in shlex.split(link_line) if word.endswith("instances_float32.cu.o"))
    compile_line = compile_line.replace(str(ROOT / "csrc"), str(sources)).replace(own, str(made)).replace("-O2", "-O1")
    link = [word.replace(str(built / "_ops.so"), str(folder / "_ops.so")) for word in shlex.split(link_line) if word != own]
    # before the others, whose copies of functions that are not of a type alone would else be taken
    link.insert(next(i for i, word in enumerate(link) if word.endswith(".o")), str(made))
    for command in (shlex.split(compile_line), link):
        subprocess.run(command, check=True)
    for path in [built / "record.json", *built.glob("_C*")]:
        shutil.copy(path, folder)
    command = [sys.executable, "-c", DRIVER, str(folder), *(str(Path(__file__).parent / node) for node in nodes)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def check_planted(fault: str, folder: Path) -> None:
    done = run_planted(fault, folder)
    said = f"{fault}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, said
    assert "FAILED" in done.stdout and "ERROR" not in done.stdout, said


def test_a_planted_fault(tmp_path: Path, machine: Machine) -> None:
    check_planted("x is read again", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault: str, tmp_path: Path, machine: Machine) -> None:
    check_planted(fault, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_copy_without_a_fault_passes(fault: str, tmp_path: Path, machine: Machine) -> None:
    done = run_planted(fault, tmp_path, instead=FAULTS[fault][1])
    assert done.returncode == pytest.ExitCode.OK, done.stdout[-2000:] + done.stderr[-2000:]
