"""The sentence that says why the kernels cannot be used, for every way in which they cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from normfused import _build
from normfused.activations import ACTIVATIONS, Activation
from normfused.backends.cuda import _load
from normfused.problem import Problem

from .conftest import ROOT


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("NORMFUSED_EMULATE", raising=False)
    _load._state.cache_clear()
    yield
    _load._state.cache_clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of products, on a machine with an H100 whose torch has CUDA."""
    monkeypatch.setattr(_build, "package_products", lambda: tmp_path)
    monkeypatch.setattr(_build, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(_load, "_capabilities", lambda: [(9, 0)])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return tmp_path


def write(folder: Path, **record: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_ops.so").write_bytes(b"no library")
    (folder / "record.json").write_text(json.dumps({"kind": "cuda", "sources": _build.sources_hash(), **record}))


def test_nothing_built(folder):
    assert _load.library() is None
    assert _load.reason() == "the CUDA extension is not built; run: python -m normfused build"


def test_pure_python_install(folder):
    _build.write_python_record(folder, _build.Decision("python", "no nvcc was found", "install it, then: python -m normfused build"))
    assert _load.reason() == "this is a pure Python install (no nvcc was found); install it, then: python -m normfused build"
    assert _load.record()["kind"] == "python"


def test_no_cuda(folder, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _load.reason() == f"torch {torch.__version__} has no CUDA"


def test_old_torch(folder, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert _load.reason() == "the CUDA kernels need torch >= 2.10, this is 2.9.1+cu128; upgrade torch"


def test_stale(folder):
    write(folder, architectures=["9.0"], sources="of yesterday")
    assert _load.reason() == "the CUDA extension was built from other sources than these; run: python -m normfused build"


def test_load_error(folder):
    write(folder, architectures=["9.0"])
    reason = _load.reason()
    assert reason is not None
    assert reason.startswith("the CUDA extension does not load (") and reason.endswith("build it again: python -m normfused build")
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("compiled", "gpus", "reason"),
    [
        (["8.0"], [], "no CUDA GPU is visible to torch"),
        (["8.0"], [(8, 6)], None),
        (["8.0", "8.6"], [(9, 0)], "the CUDA extension was compiled for 8.0 8.6 and this GPU has 9.0; run: python -m normfused build"),
        (["8.0+PTX"], [(12, 0)], None),
        (["8.0"], [(7, 5)], "the CUDA kernels need compute capability 8.0 or newer, this GPU has 7.5; Triton or torch runs there"),
        (["9.0"], [(9, 0), (8, 0)], "the CUDA extension was compiled for 9.0 and this GPU has 8.0; run: python -m normfused build"),
    ],
)
def test_gpu_against_compiled_architectures(compiled, gpus, reason):
    assert _load._mismatch({"architectures": compiled}, gpus) == reason


def test_of_several_builds_the_one_that_serves_the_gpu_is_taken(folder):
    write(folder, architectures=["8.0"])
    write(folder / "cache" / f"{_build.cached_prefix()}-90", architectures=["9.0"])
    write(folder / "cache" / "0.0.0-another", architectures=["9.0"])
    _load.reason()
    assert _load.record()["architectures"] == ["9.0"]


def test_emulation_not_built_or_stale(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMFUSED_EMULATE", "1")
    monkeypatch.setattr(_build, "emulation_products", lambda: tmp_path)
    assert _load.reason() == "NORMFUSED_EMULATE=1 and the emulation is not built; run: make emulation"
    write(tmp_path, sources="of yesterday")
    _load._state.cache_clear()
    assert _load.reason() == "the emulation was built from other sources than these; run: make emulation"
    monkeypatch.setattr(_build, "emulation_products", lambda: None)
    _load._state.cache_clear()
    assert _load.reason() == "NORMFUSED_EMULATE=1 needs a source checkout of normfused, this is an installed package"


# ------------------------------------------------------------------------------------------------------------ pack_code
def test_activations_are_numbered_as_in_the_kernels():
    text = (ROOT / "csrc" / "kernels" / "problem.h").read_text()
    names = text[text.index("enum class Act") :].split("{")[1].split("}")[0]
    assert [n.strip() for n in names.split(",")] == list(ACTIVATIONS)


def test_pack_code():
    p = Problem("position", "rms", 2, 3, 4, 1, "nhwc", torch.float32, torch.device("cpu"), act=Activation("tlu"), momentum=None)
    assert _load.pack_code(p) == 2 | 1 << 2 | 1 << 3 | 1 << 4 | 0 << 6 | 15 << 8 | 1 << 14
    p = Problem(
        "sample_group", "standard", 2, 4, 4, 2, "nchw", torch.float32, torch.device("cpu"), batch_statistics=False, residual_mode="pre_norm"
    )
    assert _load.pack_code(p) == 1 | 3 << 6
    p = Problem("channel", "renorm", 2, 4, 4, 1, "nchw", torch.float32, torch.device("cpu"))
    assert _load.pack_code(p) == 1 << 3 | 3 << 14
    assert _load.pack_needs(True, False, True) == 5
