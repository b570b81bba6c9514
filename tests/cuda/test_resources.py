"""What compilers make of the CUDA kernels, from the committed table of bench/cuda_resources.py (``make resources``); no GPU, no nvcc."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import cuda_resources as resources
from normfused import _build

OCCUPANCY = r"""
#include <cuda_occupancy.h>
#include <cstdio>
#include <initializer_list>
int main() {
    const int processors[][4] = {{8, 0, 167936, 166912}, {9, 0, 233472, 232448}, {10, 0, 233472, 232448}};
    for (const auto& of : processors)
        for (int threads : {128, 256, 512})
            for (int registers = 1; registers <= 128; ++registers) {
                cudaOccDeviceProp p;
                p.computeMajor = of[0], p.computeMinor = of[1], p.maxThreadsPerBlock = 1024, p.maxThreadsPerMultiprocessor = 2048;
                p.regsPerBlock = p.regsPerMultiprocessor = 65536, p.warpSize = 32, p.sharedMemPerBlock = 49152;
                p.sharedMemPerMultiprocessor = of[2], p.sharedMemPerBlockOptin = of[3], p.reservedSharedMemPerBlock = 1024, p.numSms = 100;
                cudaOccFuncAttributes f;
                f.maxThreadsPerBlock = 1024, f.numRegs = registers, f.sharedSizeBytes = 0;
                f.partitionedGCConfig = PARTITIONED_GC_OFF, f.shmemLimitConfig = FUNC_SHMEM_LIMIT_DEFAULT;
                f.maxDynamicSharedSizeBytes = 0, f.numBlockBarriers = 1;
                cudaOccDeviceState state;
                cudaOccResult found;
                if (cudaOccMaxActiveBlocksPerMultiprocessor(&found, &p, &f, &state, threads, 0) != CUDA_OCC_SUCCESS) return 1;
                std::printf("%d %d %d\n", registers, threads, found.activeBlocksPerMultiprocessor);
            }
}
"""


# ------------------------------------------------------------------------------------------------------------ the reader
@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_ZN9normfused17grad_apply_kernelIdLb0ELb0ELin1EEEvNS_4CallE", "grad_apply fp64 narrow/columns other acts"),
        ("_ZN9normfused18single_pass_kernelI13__nv_bfloat16Lb1ELb0ELi1ELb0EEEvNS_4CallE", "single_pass bf16 wide/columns relu"),
        ("_ZN9normfused18single_pass_kernelIfLb1ELb1ELin1ELb1EEEvNS_4CallE", "single_pass fp32 wide/rows other acts samples"),
        ("_ZN9normfused14moments_kernelI6__halfLb1EEEvNS_4CallE", "moments fp16 wide"),
        ("_ZN9normfused18settle_sets_kernelIfEEvNS_4CallE", "settle_sets fp32"),
        ("_ZN9normfused12apply_kernelIfLb1ELb1ELi6ELi3EEEvNS_4CallE", "apply fp32 wide/rows silu +3"),
        ("_ZN5other6kernelIfEEvv", None),
    ],
)
def test_names(mangled: str, name: str | None) -> None:
    assert resources.readable(mangled) == name


def test_what_nvcc_prints() -> None:
    printed = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN1a' for 'sm_90'
ptxas info    : Function properties for _ZN1a
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 97 registers, used 1 barriers, 8 bytes cumulative stack size, 128 bytes smem
ptxas info    : Compile time = 296.215 ms
ptxas info    : Compiling entry function '_ZN1b' for 'sm_90'
ptxas info    : Function properties for _ZN1b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
    assert resources.parse_usage(printed) == {"_ZN1a": resources.Usage(97, 16, 8, 128), "_ZN1b": resources.Usage(8, 0, 0, 0)}


def test_what_a_disassembler_prints() -> None:
    printed = """\t\tFunction : _ZN1a
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000e220000000800 */
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ; /* 0x0000000402047981 */
        /*0020*/              @!P0 LDG.E.U16 R8, desc[UR4][R2.64] ;          /* 0x0000000402047981 */
        /*0030*/              @UP1 STL [R1], R4 ;                            /* 0x0000000402047981 */
        /*0040*/                   STG.E.EF.128 desc[UR4][R2.64], R4 ;       /* 0x0000000402047981 */
        /*0050*/                   EXIT ;                                    /* 0x000000000000794d */
        /*0060*/                   NOP ;                                     /* 0x000000000000794d */
\t\tFunction : _ZN1b
        /*0000*/                   STG.E.64 desc[UR4][R2.64], R4 ;           /* 0x0000000402047981 */
"""
    found = resources.count_instructions(printed.splitlines())
    assert found == {
        "_ZN1a": {"wide_loads": 1, "loads": 2, "wide_stores": 1, "stores": 1, "local_accesses": 1, "instructions": 6},
        "_ZN1b": {"wide_loads": 0, "loads": 0, "wide_stores": 0, "stores": 1, "local_accesses": 0, "instructions": 1},
    }


def test_blocks_are_those_of_the_toolkit(tmp_path: Path) -> None:
    headers, compiler = _build.find_cuda_headers(), shutil.which("g++")
    if headers is None or compiler is None or not (headers / "cuda_occupancy.h").exists():
        pytest.skip("needs g++ and the toolkit's cuda_occupancy.h")
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(OCCUPANCY)
    subprocess.run([compiler, "-w", "-isystem", str(headers), str(source), "-o", str(program)], check=True)
    lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 3 * 3 * 128
    for line in lines:
        registers, threads, blocks = map(int, line.split())
        assert resources.blocks_per_processor(registers, threads) == blocks, line


def test_largest_blocks() -> None:
    wide, narrow = resources._most_threads()
    found = [resources.largest_block(name) for name in ("moments fp16 wide", "apply fp32 narrow/rows relu", "grad_columns fp64")]
    assert found == [wide, narrow, narrow]
    assert resources.largest_block("settle_sets fp32") == 256


# ------------------------------------------------------------------------------------------------------- the baseline
@pytest.fixture(scope="module")
def baseline() -> dict[str, Any]:
    found = resources.read_baseline()
    assert found["kernels"], "bench/results/cuda-resources.json is missing; run: make resources"
    return found


def test_the_architectures(baseline: dict[str, Any]) -> None:
    assert {"sm_80", "sm_90"} < set(baseline["architectures"])
    for name, by_architecture in baseline["kernels"].items():
        assert list(by_architecture) == baseline["architectures"], name


def test_every_instantiation_is_there(baseline: dict[str, Any]) -> None:
    """The emulation is compiled from the same list of instantiations; its symbols say what it holds."""
    products, nm = _build.emulation_products(), shutil.which("nm")
    if products is None or nm is None or _build.read_record(products).get("sources") != _build.sources_hash(emulation=True):
        pytest.skip("needs an emulation that is built from these sources (make emulation), and nm")
    symbols = subprocess.run([nm, "--defined-only", str(products / "_ops.so")], check=True, capture_output=True, text=True).stdout
    # _ZN 9normfused <length><name> I..: the name itself is a kernel's, not one of its arguments
    found = re.findall(r"\b(_ZN9normfused(\d+)(\w+))", symbols)
    names = [(symbol, rest[: int(length)]) for symbol, length, rest in found]
    compiled = {resources.readable(symbol) for symbol, name in names if name.endswith("_kernel") and name != "launch_kernel"} - {None}
    assert len(compiled) > 50
    assert compiled == set(baseline["kernels"]), "bench/results/cuda-resources.json is of other kernels; run: make resources"


def test_nothing_spills_that_may_not(baseline: dict[str, Any]) -> None:
    spilling = [
        f"{name} @{sm}: {usage.spill_bytes} bytes spilled, stack of {usage.stack_bytes}, {usage.local_accesses} local accesses"
        for name, sm, usage in resources.usages(baseline)
        if resources.spills(usage) and not resources.allowed(name, sm, baseline["allowed"])
    ]
    assert not spilling, spilling


def test_what_may_spill_does(baseline: dict[str, Any]) -> None:
    """An allowance that nothing needs any more would hide the next spill."""
    spilling = [(name, sm) for name, sm, usage in resources.usages(baseline) if resources.spills(usage)]
    for pattern, reason in baseline["allowed"].items():
        assert reason, pattern
        assert any(resources.allowed(name, sm, {pattern: reason}) for name, sm in spilling), f"nothing spills of {pattern!r}"


def test_the_largest_block_fits(baseline: dict[str, Any]) -> None:
    for name, sm, usage in resources.usages(baseline):
        assert resources.blocks_per_processor(usage.registers, resources.largest_block(name)) >= 1, (name, sm)


def test_two_blocks_of_a_group_fit_a_processor(baseline: dict[str, Any]) -> None:
    """As plan.h counts on: a cooperative launch of more blocks than fit would be refused."""
    met = 0
    for name, sm, usage in resources.usages(baseline):
        if resources.family(name) in ("single_pass", "grad_single_pass") and "wide/rows" in name:
            assert resources.blocks_per_processor(usage.registers, 256) >= 2, (name, sm, usage.registers)
            met += 1
    assert met == 2 * 3 * (3 * 5 + 2)  # directions, architectures; four activations and samples of three types, one and samples of float64


def test_streams_are_wide(baseline: dict[str, Any]) -> None:
    """What passes over tensors of x's size has accesses of 16 bytes for it."""
    narrow = []
    for name, sm, usage in resources.usages(baseline):
        assert usage.instructions, f"{name} @{sm}: the machine code was not counted; run make resources where there is a cuobjdump"
        if resources.family(name) in resources.STREAMING and not usage.wide_loads:
            narrow.append(f"{name} @{sm}: {usage.loads} loads")
        if resources.family(name) in resources.WRITING and not usage.wide_stores:
            narrow.append(f"{name} @{sm}: {usage.stores} stores")
    assert not narrow, f"{len(narrow)} without 16-byte accesses: {narrow[:5]}"
