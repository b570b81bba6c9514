"""Each misuse is reported with its place, in every order; what is unusual but right is not."""

from __future__ import annotations

import ctypes
import math
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from .machine import HERE, Machine, build, compile_command, machine

SOURCE = (HERE / "misuses.cpp").read_text()
PLACES: dict[str, set[int]] = {}
for _line, _text in enumerate(SOURCE.splitlines(), 1):
    if _found := re.search(r"// HERE (\w+)", _text):
        PLACES.setdefault(_found[1], set()).add(_line)

# What the line says, without the place
EXPECTED = {
    "load_beyond": r"load at x\[128\], beyond its 128 elements .*thread 5\)",
    "load_before": r"load at x\[-1\], beyond",
    "load_beyond_after_advance": r"load at x\[128\], beyond",
    "pack_beyond": r"load of 4 elements at x\[125\], beyond",
    "store_beyond": r"store at y\[1000128\], beyond",
    "misaligned_load": r"load of 4 elements at x\[2\], misaligned.* 16 bytes",
    "misaligned_store": r"store of 2 elements at y\[1\], misaligned.* 8 bytes",
    "store_to_read_only": r"store to x\[3\], a read-only tensor",
    "read_only_load_of_written": r"read-only load of y\[7\], a tensor that the launch may write",
    "undeclared_tensor": r"load outside of every declared tensor",
    "null_pointer": r"load through a null pointer",
    "same_element_twice": r"race: this store of y\[\d+\] is not ordered with the store at misuses.cpp:\d+ by block 0, thread \d+",
    "other_blocks_element": r"race: this store of y\[\d+\] is not ordered with the store",
    "in_place_unordered": r"race: this (load of in|store of out)\[\d+\] is not ordered with the (load|store) at misuses.cpp:\d+",
    "in_place_read_only": r"read-only load of in\[\d+\], a tensor that the launch may write",
    "shared_beyond": r"load at 32, beyond the 32 elements of a shared view .*thread 9\)",
    "view_beyond": r"a shared view of bytes 256 to 516, beyond the launch's 512",
    "part_beyond": r"elements 16 to 33 of a shared view of 32",
    "misaligned_view": r"a shared view at byte 4, no multiple of 8",
    "misaligned_shared_pack": r"store of 4 elements at 6 of a shared view, misaligned",
    "nobody_wrote": r"load of byte 124 of block 0's shared memory, which nobody wrote",
    "own_read_hides_anothers": r"race: this \w+ of byte 0 of block 0's shared memory is not ordered with the (load|store)",
    "no_sync_warp": r"race|nobody wrote",
    "no_sync_block": r"race|nobody wrote",
    "no_sync_before_reuse": r"race: this \w+ of byte \d+ of block 0's shared memory is not ordered",
    "divergent_barrier": r"divergent: sync_block, while \d+ threads of the block wait in sync_block at misuses.cpp:\d+",
    "barrier_missed": r"exits while \d+ threads of the block wait in sync_block|sync_block, but 1 threads of the block have exited",
    "one_barrier_more": r"exits while 1 threads of the block wait in sync_block|sync_block, but \d+ threads of the block have exited",
    "divergent_shuffle": r"divergent: shuffle, with \d+ lanes from \d+ on of the warp waiting in shuffle at misuses.cpp:\d+",
    "lanes_masked_out": r"divergent: (sync_block|shuffle), with .* of the warp waiting in (shuffle|sync_block)",
    "exit_before_shuffle": r"exits with .* of the warp waiting in shuffle|shuffle, but lane 3 of the warp exited",
    "shuffle_beyond_warp": r"shuffle from lane 20 of a warp of 16",
    "grid_barrier_in_plain_launch": r"sync_blocks in a launch that is not cooperative",
    "grid_barrier_missed": r"deadlock: \d+ threads wait in sync_blocks at misuses.cpp:\d+ .*; 1 blocks have exited",
    "grid_barrier_not_at_rest": r"sync_blocks on a word that is not at rest: 0x7",
    "blocks_of_two_minds": r"sync_blocks of \d and of \d blocks on one word",
    "two_leaders": r"sync_blocks with two leaders",
    "no_leader": r"sync_blocks without a leader",
    "blocks_unordered": r"race: this (load|store) of y\[\d\] is not ordered",
    "more_arrivals_than_parties": r"last_to_arrive of 2 parties on a word that is not at rest or had more: 0x7",
    "late_of_an_earlier_block": r"race: this (load|store) of y\[\d\] is not ordered",
    "remote_before_first_barrier": r"store in block \d's shared memory before the cluster's first barrier",
    "remote_without_last_barrier": r"load in block \d's shared memory, which has exited|block \d exits though no barrier",
    "remote_unordered": r"race: this store of byte \d+ of block \d's shared memory is not ordered with the store",
    "rank_beyond": r"block 2 of a cluster of 2",
    "cluster_barrier_missed": r"block \d exits while others wait in sync_cluster|sync_cluster, but 1 blocks of the cluster have exited",
    "copy_not_awaited": r"load of byte \d+ of block 0's shared memory, into which the copy at misuses.cpp:\d+ is not awaited",
    "copy_not_committed": r"into which the copy at misuses.cpp:\d+ is not awaited|exits before this copy was awaited",
    "copy_left_behind": r"exits before this copy was awaited",
    "copy_over_a_copy": r"copy to byte \d+ of shared memory, into which the copy at misuses.cpp:\d+ is not awaited",
    "misaligned_copy": r"load of 4 elements at x\[2\], misaligned",
    "bulk_not_awaited": r"into which the copy at misuses.cpp:\d+ is not awaited",
    "bulk_too_few_bytes": r"deadlock: 1 threads wait in .*; a bulk barrier of block 0 lacks 0 arrivals and 64 bytes",
    "bulk_too_many_bytes": r"bulk copies of 32 bytes more than expected",
    "bulk_not_initialised": r"a bulk barrier that is not initialised",
    "bulk_init_without_barrier": r"race|a bulk barrier that is not initialised",
    "bulk_odd_size": r"bulk copy of 12 bytes, no multiple of 16",
    "bulk_out_left_behind": r"exits before this copy was awaited",
}
# What only the race check sees for sure
RACES = {
    "same_element_twice", "other_blocks_element", "nobody_wrote", "no_sync_warp", "no_sync_block", "no_sync_before_reuse",
    "own_read_hides_anothers", "remote_unordered", "late_of_an_earlier_block", "blocks_unordered",
    "in_place_unordered", "copy_not_awaited", "bulk_not_awaited", "bulk_init_without_barrier",
}  # fmt: skip
REFUSED = {"no_threads": 9, "too_many_threads": 9, "odd_clusters": 9, "too_much_shared": 1, "cooperative_too_large": 720}
RIGHT = [
    "votes",
    "many_readers_one_writer",
    "in_place_ordered",
    "predicated_lanes",
    "alternating_grid_barriers",
    "groups_of_blocks",
    "arrivals_at_two_levels",
    "partial_warp",
]


@pytest.fixture(scope="module")
def misuses() -> Iterator[Machine]:
    yield from machine("misuses.cpp")


def test_every_case_is_known() -> None:
    cases = set(re.findall(r"NF_CASE\((\w+), \d", SOURCE)) | set(re.findall(r'\{"(\w+)", nothing', SOURCE))
    assert cases == {*EXPECTED, *REFUSED, *RIGHT, "stack_overflow"}
    assert set(PLACES) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_misuse_is_reported(misuses: Machine, name: str) -> None:
    modes = [("forward", 0, True), ("reverse", 0, True), ("starve", 1, True), ("starve", 2, True)]
    if name not in RACES:
        modes += [("forward", 0, False), ("reverse", 0, False), ("starve", 3, False)]
    for order, seed, races in modes:
        status = misuses.mode(order, seed, races).run("run_misuse", name)
        said = f"{order} {seed} races={races}: {misuses.message}"
        assert status == -2, said
        assert re.search(EXPECTED[name], misuses.message), said
        assert f"kernel {name}" in misuses.message, said
        place = re.search(r"misuses\.cpp:(\d+)", misuses.message)
        assert place and int(place[1]) in PLACES[name], said


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_launch_is_refused(misuses: Machine, name: str) -> None:
    assert misuses.mode().run("run_misuse", name) == REFUSED[name]
    assert f"kernel {name}" in misuses.message


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("races", [False, True])
@pytest.mark.parametrize("order", ["forward", "reverse", "starve"])
def test_right_kernel_is_silent(misuses: Machine, name: str, order: str, races: bool) -> None:
    for seed in range(4):
        status = misuses.mode(order, seed, races, traffic=seed == 3).run("run_misuse", name)
        assert (status, misuses.message) == (0, "")


@pytest.mark.parametrize(("name", "thread"), [("nobody_wrote", 31), ("copy_not_awaited", 5), ("bulk_not_awaited", 0)])
def test_what_is_not_there_yet_is_nan(misuses: Machine, name: str, thread: int) -> None:
    """Without the race check it is the result that tells."""
    result = misuses.library.misuse_result
    result.restype = ctypes.POINTER(ctypes.c_float)
    assert misuses.mode().run("run_misuse", name) == 0
    assert math.isnan(result()[thread])


def test_launch_after_a_fault_is_unaffected(misuses: Machine) -> None:
    misuses.mode(races=True)
    assert misuses.run("run_misuse", "divergent_shuffle") == -2
    assert misuses.run("run_misuse", "many_readers_one_writer") == 0
    assert misuses.run("run_misuse", "bulk_too_few_bytes") == -2
    assert misuses.run("run_misuse", "alternating_grid_barriers") == 0


def test_stack_overflow_ends_on_the_guard_page() -> None:
    program = f"import ctypes; ctypes.CDLL({str(build('misuses.cpp'))!r}).run_misuse(b'stack_overflow')"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGSEGV


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("a.store(0, 1.0f);", "cannot store"),
        ("a[0];", "no match for .operator"),
        ("*a;", "no match for .operator"),
        ("__shared__ float tile[32];", "bare_shared_memory_is_not_emulated"),
        ("copy_async<2>(shared_at<float>(0, 32), 0, a, 0);", "16 bytes"),
        ("copy_async<8>(shared_at<__half>(0, 32), 0, a, 0);", "one type"),
        ("a.load(0);", None),
    ],
)
def test_compile_errors(line: str, error: str | None) -> None:
    header = HERE.parents[1] / "csrc/kernels/device.cuh"
    program = f'#include "{header}"\nusing namespace normfused;\nvoid kernel(Global<const float> a) {{ {line} }}'
    done = subprocess.run([*compile_command("-fsyntax-only", "-x", "c++", "-")], input=program, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (error is None), done.stderr
    assert error is None or re.search(error, done.stderr), done.stderr
