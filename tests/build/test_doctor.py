"""What `python -m normfused` says about the extension."""

from __future__ import annotations

import pytest

from normfused import __main__ as doctor
from normfused import _build

BUILT = {"architectures": ["8.0", "9.0+PTX"], "toolkit": "13.0", "module": "cpython-311", "path": "/x/_ops.so", "reason": None}


@pytest.mark.parametrize(
    ("extension", "line"),
    [
        (BUILT, "compiled for 8.0 9.0+PTX with nvcc 13.0"),
        ({**BUILT, "module": None}, "compiled for 8.0 9.0+PTX with nvcc 13.0; normfused._C was not built (no pybind11)"),
        (
            {**BUILT, "reason": "no CUDA GPU is visible to torch"},
            "compiled for 8.0 9.0+PTX with nvcc 13.0; not used: no CUDA GPU is visible to torch",
        ),
        ({**BUILT, "architectures": ["emulation"], "toolkit": None}, "compiled for emulation"),
        ({**BUILT, "path": None, "reason": "torch 2.13.0+cpu has no CUDA"}, "torch 2.13.0+cpu has no CUDA"),
    ],
)
def test_the_line_of_the_extension(extension, line):
    assert doctor._extension_line(extension) == line


def advice(available: list[str], reason: str | None) -> str:
    report = {
        "backends": {},
        "forced_error": None,
        "available": available,
        "cuda": "13.0",
        "auto": available[0],
        "extension": {**BUILT, "reason": reason},
    }
    return doctor._advice(report)


def test_advice_names_the_command_that_helps():
    missing = f"the CUDA extension is not built; run: {_build.COMMAND}"
    assert advice(["triton", "torch"], missing) == f"The CUDA kernels are not used: {missing}."
    assert advice(["torch"], missing) == f"The CUDA kernels are not used: {missing} (or, without a compiler: pip install triton)."
    old = "the CUDA kernels need compute capability 8.0 or newer, this GPU has 7.5; Triton or torch runs there"
    assert advice(["triton", "torch"], old) == "Ready: CUDA tensors run through backend triton."
    assert advice(["torch"], old) == "A GPU is here but Triton is not: pip install triton"
    assert advice(["cuda", "torch"], None) == "Ready: CUDA tensors run through backend cuda."


def test_the_report_has_the_extension():
    extension = doctor._extension()
    assert {"kind", "architectures", "toolkit", "path", "reason"} <= set(extension)
    assert extension["path"] is not None or extension["reason"] is not None


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as done:
        doctor.main(["build", "--help"])
    assert done.value.code == 0
    assert "--emulation" in capsys.readouterr().out


def test_a_build_that_cannot_be_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(_build, "survey", lambda environment: _build.Machine())
    assert doctor.main(["build"]) == 1
    assert capsys.readouterr().err == (
        "normfused: the CUDA extension cannot be built: no torch was found; install torch >= 2.10, then: python -m normfused build\n"
    )
