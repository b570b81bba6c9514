"""What is built where: a table from (torch, nvcc, GPU, wishes) to a decision and its one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from normfused._build import Architecture, BuildError, Machine, Toolkit, Torch, decide, mode_of, parse_architectures, runs_on

NVCC_13 = Toolkit(Path("/cuda"), "13.0", ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)))
NVCC_12 = Toolkit(Path("/cuda"), "12.4", ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0)))
TORCH = Torch(Path("/torch"), "2.11.0+cu130", "13.0")
TORCH_12 = Torch(Path("/torch"), "2.11.0+cu128", "12.8")
TORCH_CPU = Torch(Path("/torch"), "2.13.0+cpu", None)
FULL = Machine("Linux", TORCH, NVCC_13, "g++", ((9, 0),), "13.0")


@pytest.mark.parametrize(
    ("machine", "wanted", "architectures"),
    [
        (FULL, None, "9.0"),
        (replace(FULL, gpus=((8, 0), (9, 0))), None, "8.0 9.0"),
        (replace(FULL, gpus=((7, 5), (8, 6))), None, "8.6"),
        (replace(FULL, gpus=()), "9.0", "9.0"),
        (FULL, " ", "9.0"),
        (FULL, "8.0;8.6+PTX", "8.0 8.6+PTX"),
        (FULL, "5.2 6.0 7.0 8.0 9.0+PTX 14.0", "8.0 9.0+PTX"),
        (FULL, "hopper, Ada", "8.9 9.0"),
        (FULL, "9.0a", "9.0a"),
        (replace(FULL, toolkit=NVCC_12, gpus=((12, 0),)), None, "9.0+PTX"),
        (replace(FULL, toolkit=NVCC_12), None, "9.0"),
        (replace(FULL, torch=TORCH_12), None, "9.0"),  # the driver serves CUDA 13, so does the static runtime
        (replace(FULL, driver_cuda=None), None, "9.0"),
    ],
)
def test_it_compiles(machine, wanted, architectures):
    decision = decide(machine, "auto", wanted)
    assert (decision.kind, " ".join(decision.architectures)) == ("cuda", architectures)
    assert decision.message.startswith(f"normfused: compiling CUDA kernels for {architectures} (nvcc ")


@pytest.mark.parametrize(
    ("machine", "wanted", "message"),
    [
        (replace(FULL, system="Darwin"), None, "the CUDA kernels are built on Linux only, this is Darwin"),
        (replace(FULL, torch=None), None, "no torch was found; install torch >= 2.10, then: python -m normfused build"),
        (
            replace(FULL, torch=Torch(Path(), "2.9.1+cu128", "12.8")),
            None,
            "the CUDA kernels need torch >= 2.10, found 2.9.1+cu128; upgrade torch, then: python -m normfused build",
        ),
        (
            replace(FULL, torch=TORCH_CPU),
            None,
            "torch 2.13.0+cpu has no CUDA; install a CUDA build of torch, then: python -m normfused build",
        ),
        (
            replace(FULL, toolkit=None),
            None,
            "no nvcc was found; install the CUDA toolkit 13.0 or set CUDA_HOME to it, then: python -m normfused build",
        ),
        (
            replace(FULL, toolkit=None, cuda_home="/x"),
            None,
            "no nvcc was found in CUDA_HOME=/x; install the CUDA toolkit 13.0 or set CUDA_HOME to it, then: python -m normfused build",
        ),
        (replace(FULL, compiler=None), None, "no C++ compiler was found; install g++ or set CXX, then: python -m normfused build"),
        (
            replace(FULL, gpus=()),
            None,
            "no GPU is visible; on the machine with the GPU, or here with its architecture: python -m normfused build --arch 9.0",
        ),
        (
            replace(FULL, gpus=((7, 0), (7, 5))),
            None,
            "the CUDA kernels need compute capability 8.0, the GPU has 7.5; Triton or torch runs there",
        ),
        (
            replace(FULL, driver_cuda="12.8"),
            None,
            "nvcc 13.0 makes kernels for newer drivers: the driver serves CUDA 12.8; set CUDA_HOME to a toolkit 12.x, "
            "then: python -m normfused build",
        ),
        (
            replace(FULL, torch=TORCH_12, driver_cuda=None),
            None,
            "nvcc 13.0 makes kernels for newer drivers: torch 2.11.0+cu128 is built for CUDA 12.8; set CUDA_HOME to a toolkit 12.x, "
            "then: python -m normfused build",
        ),
        (
            FULL,
            "7.0 7.5",
            "nvcc 13.0 compiles for up to 12.0 and the kernels need 8.0 or newer, asked for: 7.0 7.5; "
            "name another: python -m normfused build --arch 9.0",
        ),
        (FULL, "9.0 sm_90", "TORCH_CUDA_ARCH_LIST must hold architectures such as 8.0, 9.0a or 12.0+PTX, got 'sm_90'"),
    ],
)
def test_it_installs_the_pure_package_and_says_why(machine, wanted, message):
    decision = decide(machine, "auto", wanted)
    assert decision.kind == "python"
    assert decision.message == f"normfused: pure Python install: {message}"
    assert "\n" not in decision.message


@pytest.mark.parametrize("machine", [FULL, Machine()])
def test_it_never_compiles_when_told_so(machine):
    decision = decide(machine, "python", "9.0")
    assert decision.kind == "python"
    assert decision.message == (
        "normfused: pure Python install: NORMFUSED_BUILD=python; to have the CUDA kernels: python -m normfused build"
    )


@pytest.mark.parametrize(
    ("machine", "wanted", "architectures"),
    [
        (replace(FULL, torch=TORCH_CPU, gpus=(), driver_cuda=None), None, "8.0 8.6 8.9 9.0 10.0 12.0+PTX"),
        (replace(FULL, toolkit=NVCC_12, gpus=(), driver_cuda=None), None, "8.0 8.6 8.9 9.0+PTX"),
        (replace(FULL, driver_cuda="12.8"), None, "9.0"),
        (replace(FULL, gpus=((7, 5),)), "8.0", "8.0"),
    ],
)
def test_forced_it_cross_compiles(machine, wanted, architectures):
    assert " ".join(decide(machine, "cuda", wanted).architectures) == architectures


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        (FULL, ""),
        (replace(FULL, gpus=()), "they will not run here: no GPU is visible"),
        (replace(FULL, torch=replace(TORCH, version="2.13.0+cpu", cuda=None)), "they will not run here: torch 2.13.0+cpu has no CUDA"),
    ],
)
def test_forced_it_says_where_it_will_not_run(machine, why):
    message = decide(machine, "cuda", "9.0").message
    assert message.endswith(why) if why else "not run here" not in message


@pytest.mark.parametrize(
    ("machine", "wanted", "message"),
    [
        (replace(FULL, torch=None), None, "no torch was found"),
        (replace(FULL, toolkit=None), None, "no nvcc was found"),
        (replace(FULL, compiler=None), None, "no C++ compiler was found"),
        (replace(FULL, gpus=((7, 5),)), None, "the GPU has 7.5"),
        (FULL, "7.5", "asked for: 7.5"),
        (FULL, "nonsense", "got 'nonsense'"),
    ],
)
def test_forced_it_fails_in_one_line(machine, wanted, message):
    with pytest.raises(BuildError, match="the CUDA extension cannot be built: ") as error:
        decide(machine, "cuda", wanted)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_mode():
    assert mode_of({}) == mode_of({"NORMFUSED_BUILD": ""}) == "auto"
    assert mode_of({"NORMFUSED_BUILD": " CUDA "}) == "cuda"
    with pytest.raises(BuildError, match="NORMFUSED_BUILD must be auto, python or cuda, got 'gpu'"):
        mode_of({"NORMFUSED_BUILD": "gpu"})


@pytest.mark.parametrize(
    ("text", "architectures"),
    [
        ("8.0", [Architecture(8, 0)]),
        (" 8.0;9.0a, 12.0+PTX 8.0", [Architecture(8, 0), Architecture(9, 0, "a"), Architecture(12, 0, "", True)]),
        ("Hopper+PTX", [Architecture(9, 0, "", True)]),
    ],
)
def test_lists_of_architectures(text, architectures):
    assert list(parse_architectures(text)) == architectures


@pytest.mark.parametrize("text", ["90", "sm_90", "9.0+ptxx", "native"])
def test_bad_lists_of_architectures(text):
    with pytest.raises(BuildError, match="TORCH_CUDA_ARCH_LIST must hold architectures"):
        parse_architectures(text)


@pytest.mark.parametrize(
    ("compiled", "gpu", "runs"),
    [
        (["9.0"], (9, 0), True),
        (["8.0"], (8, 6), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (9, 0), True),
        (["9.0+PTX"], (8, 9), False),
        (["12.0"], (12, 1), True),
        (["10.0"], (12, 0), False),
        (["9.0a"], (9, 0), True),
        (["9.0a+PTX"], (10, 0), False),
        (["8.0", "9.0", "12.0+PTX"], (13, 0), True),
        ([], (9, 0), False),
    ],
)
def test_which_gpu_runs_what(compiled, gpu, runs):
    assert runs_on(compiled, gpu) is runs
