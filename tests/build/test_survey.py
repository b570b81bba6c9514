"""What the build finds on a machine, on machines made of files."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from normfused import _build


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def fake_nvcc(home: Path, release: str = "13.0") -> Path:
    return script(
        home / "bin" / "nvcc",
        f"""case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
--list-gpu-arch) printf 'compute_75\\ncompute_90\\ncompute_103\\ncompute_120\\n' ;;
--dryrun) echo "#$ TOP={home}/bin/.." >&2 ;;
esac""",
    )


@pytest.mark.parametrize(
    ("version", "cuda", "expected"),
    [
        ("__version__ = '2.13.0+cpu'", "cuda: Optional[str] = None", ("2.13.0+cpu", None, (2, 13))),
        ('__version__ = "2.11.0+cu130"', "cuda: str | None = '13.0'", ("2.11.0+cu130", "13.0", (2, 11))),
        ("__version__ = '2.10.1'", "cuda = '12.8'\nhip = None", ("2.10.1", "12.8", (2, 10))),
    ],
)
def test_torch_is_read_not_imported(tmp_path, version, cuda, expected):
    (tmp_path / "version.py").write_text(f"{version}\ndebug = False\n{cuda}\n")
    found = _build.find_torch({"NORMFUSED_TORCH_DIR": str(tmp_path)})
    assert found is not None
    assert (found.version, found.cuda, found.numbers) == expected


def test_no_torch_where_it_was_said_to_be(tmp_path):
    assert _build.find_torch({"NORMFUSED_TORCH_DIR": str(tmp_path)}) is None


def test_the_toolkit_that_was_named_is_the_only_one_asked(tmp_path):
    fake_nvcc(tmp_path / "path")
    environment = {"CUDA_HOME": str(tmp_path / "named"), "PATH": str(tmp_path / "path" / "bin")}
    assert _build.find_toolkit(environment) is None
    fake_nvcc(tmp_path / "named", "12.9")
    found = _build.find_toolkit(environment)
    assert found is not None
    assert (found.home, found.version) == (tmp_path / "named", "12.9")
    assert found.architectures == ((7, 5), (9, 0), (10, 3), (12, 0))


def test_an_nvcc_on_the_path_may_be_a_script_that_calls_another(tmp_path):
    real = fake_nvcc(tmp_path / "cuda")
    wrapper = script(tmp_path / "bin" / "nvcc", f'exec {real} "$@"')
    found = _build.find_toolkit({"PATH": str(wrapper.parent)})
    assert found is not None
    assert found.home == tmp_path / "cuda"


def test_gpus_and_driver(tmp_path, monkeypatch):
    script(
        tmp_path / "nvidia-smi",
        """case "$1" in
--query*) printf '9.0\\n8.6\\n9.0\\n' ;;
*) echo '| NVIDIA-SMI 580.1   Driver Version: 580.1   CUDA Version: 13.0  |' ;;
esac""",
    )
    machine = _build.survey({"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)})
    assert (machine.gpus, machine.driver_cuda, machine.toolkit) == (((8, 6), (9, 0)), "13.0", None)
    script(tmp_path / "nvidia-smi", "echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9")
    machine = _build.survey({"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)})
    assert (machine.gpus, machine.driver_cuda) == ((), None)


def test_jobs(monkeypatch):
    monkeypatch.setattr(_build.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(_build, "_free_memory_gb", lambda: 64.0)
    assert _build.jobs({}) == 16
    assert _build.jobs({"MAX_JOBS": "3"}) == 3
    assert _build.jobs({"MAX_JOBS": "0"}) == _build.jobs({"MAX_JOBS": "many"}) == 16
    monkeypatch.setattr(_build, "_free_memory_gb", lambda: 6.0)
    assert _build.jobs({}) == 4
    monkeypatch.setattr(_build, "_free_memory_gb", lambda: 0.5)
    assert _build.jobs({}) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["[1/2] nvcc a.cu", "FAILED: a.o", "a.cu(3): error: x", "a.cu(4): error: y"], "compiling failed: a.cu(3): error: x"),
        (
            ["FAILED: a.o", "/usr/bin/ld: cannot find -lx", "collect2: error: ld returned 1"],
            "compiling failed: collect2: error: ld returned 1",
        ),
        (["g++: fatal error: Killed signal terminated program cc1plus"], "out of memory? try MAX_JOBS=1"),
        (["something else", ""], "compiling failed: something else"),
        ([], "compiling failed: no output"),
    ],
)
def test_a_failure_is_one_line(lines, message):
    assert message in _build._first_error(lines)


def test_flags_follow_the_architectures(tmp_path):
    kernels = tmp_path / "kernels"
    (kernels / "instances").mkdir(parents=True)
    (kernels / "steps.cu").touch()
    (kernels / "instances" / "float32.cu").touch()
    (tmp_path / "cuda" / "include").mkdir(parents=True)
    (tmp_path / "cuda" / "include" / "cuda_runtime_api.h").touch()
    machine = _build.Machine("Linux", _build.Torch(tmp_path, "2.13.0", "13.0"), _build.Toolkit(tmp_path / "cuda", "13.0", ((9, 0),)), "g++")
    decision = _build.Decision("cuda", "", architectures=("8.0", "9.0+PTX"))
    with pytest.raises(_build.BuildError, match="has no libcudart_static.a"):
        _build.cuda_steps(machine, decision, tmp_path, tmp_path / "work", {})
    (tmp_path / "cuda" / "lib").mkdir()
    (tmp_path / "cuda" / "lib" / "libcudart_static.a").touch()
    steps = _build.cuda_steps(
        machine, decision, tmp_path, tmp_path / "work", {"NORMFUSED_NVCCFLAGS": "-lineinfo -Xptxas=-v", "MAX_JOBS": "3"}
    )
    nvcc = steps[0].command
    assert [w for w in nvcc if w.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert {"-lineinfo", "-Xptxas=-v", "--threads=2"} <= set(nvcc)
    assert [s.output.name for s in steps] == [
        "kernels_steps.cu.o",
        "kernels_instances_float32.cu.o",
        "binding_ops.cpp.o",
        "binding_weights.cpp.o",
        "binding_runtime.cpp.o",
        "_ops.so",
    ]
    link = steps[-1].command
    assert "-lcudart_static" in link and "-Wl,--exclude-libs,ALL" in link and "-lcudart" not in link
    assert not any("libtorch_cuda" in w or "torch_cuda" in w for w in link)


def test_no_kernels(tmp_path):
    with pytest.raises(_build.BuildError, match="no kernels were found in"):
        _build._kernel_sources(tmp_path)
