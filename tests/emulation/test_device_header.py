"""The CUDA side of device.cuh compiles for old and new devices, to the instructions that are meant."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .machine import HERE

TOGETHER = [
    "cp.async.cg.shared.global", "cp.async.commit_group", "cp.async.wait_group 1", "cp.async.wait_group 0", "bar.warp.sync", "bar.sync",
    "shfl.sync.bfly", "shfl.sync.down", "shfl.sync.idx", "ld.acquire.gpu.global", "atom.global.add", "membar",
]  # fmt: skip
MATHS = ["ex2.approx", "sqrt.rn.f32", "sqrt.rn.f64", "fma.rn.f32", "fma.rn.f64", "ld.global.nc.v2.f64|ld.global.nc.v4.u32"]
CLUSTERS = [
    "mbarrier.init", "fence.mbarrier_init", "mbarrier.arrive.expect_tx", "mbarrier.try_wait.parity", "barrier.cluster.arrive",
    "barrier.cluster.wait", "mapa.u64", "cp.async.bulk.shared::cluster.global", "cp.async.bulk.global.shared::cta",
    "cp.async.bulk.commit_group", "cp.async.bulk.wait_group 0", "fence.proxy.async.shared::cta", "%cluster_ctarank", "%cluster_nctarank",
]  # fmt: skip

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def nvcc(source: str, *arguments: str | Path) -> str:
    done = subprocess.run(["nvcc", "-std=c++17", *map(str, arguments), HERE / source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module", params=[80, 90])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, str]]:
    """The PTX of each kernel of the probe."""
    out = tmp_path_factory.mktemp("ptx") / "probe.ptx"
    nvcc("probe.cu", f"-arch=sm_{request.param}", "-ptx", "-o", out)
    entries = re.findall(r"\.entry _Z\d+(\w+?)9Arguments\((.*?)^}", out.read_text(), re.S | re.M)
    return request.param, dict(entries)


def accesses(ptx: str) -> list[str]:
    return re.findall(r"\b((?:ld|st)\.(?!param)[\w:.]+)", ptx)


def test_packs_are_single_accesses(kernels: tuple[int, dict[str, str]]) -> None:
    _, ptx = kernels
    assert [re.sub(r"\.[fub]\d+$", "", a) for a in accesses(ptx["copy_floats"])] == ["ld.global.nc.v4", "st.global.v4"]
    assert [re.sub(r"\.[fub]\d+$", "", a) for a in accesses(ptx["copy_halves"])] == ["ld.global.nc.v4", "st.global.v4"]
    assert [re.sub(r"\.[fub]\d+$", "", a) for a in accesses(ptx["copy_coherent"])] == ["ld.global.v4", "st.global.v4"]
    assert accesses(ptx["copy_first"]) == ["ld.global.cs.v4.u32", "st.global.cs.v4.u32"]
    assert accesses(ptx["copy_last"])[:2] == ["ld.global.nc.L2::cache_hint.v4.u32", "st.global.L2::cache_hint.v4.u32"]
    assert accesses(ptx["copy_last"])[2] == "ld.global.L2::cache_hint.v4.u32"


def test_no_access_is_generic(kernels: tuple[int, dict[str, str]]) -> None:
    """But those to another block's shared memory."""
    _, ptx = kernels
    spaces = ("ld.global", "st.global", "ld.shared", "st.shared", "ld.acquire.gpu.global", "ld.const")
    for name, text in ptx.items():
        generic = [access for access in accesses(text) if not access.startswith(spaces)]
        assert not generic or name == "in_clusters", (name, generic)


def test_instructions(kernels: tuple[int, dict[str, str]]) -> None:
    arch, ptx = kernels
    expected = {"together": TOGETHER, "maths": MATHS, "in_clusters": CLUSTERS if arch >= 90 else ["trap"]}
    for name, instructions in expected.items():
        for instruction in instructions:
            assert re.search(instruction, ptx[name]), (name, instruction)


@pytest.mark.parametrize("source", ["probe.cu", "samples.cpp"])
@pytest.mark.parametrize("arch", [80, 90])
def test_machine_code(source: str, arch: int, tmp_path: Path) -> None:
    """ptxas takes it, without spills."""
    said = nvcc(source, "-x", "cu", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "-o", tmp_path / "out.cubin")
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert not re.search(r"[1-9]\d* bytes spill", said)
