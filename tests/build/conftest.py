"""A copy of the source tree whose kernels are a placeholder, and what is built from it once for all tests of this folder."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from normfused import _build

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
_OWN = ("NORMFUSED_", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CXX", "MAX_JOBS", "TRITON_INTERPRET", "PYTHONPATH")


def clean_environment(**extra: str) -> dict[str, str]:
    """Without the variables that decide about builds."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OWN)}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


def run(*command: str | Path, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], cwd=cwd, env=clean_environment(**extra), capture_output=True, text=True, check=False)


def python(code: str, *, cwd: Path, package: Path, executable: str | Path = sys.executable, **extra: str) -> Any:
    """Runs code that prints JSON, with the package that lies in ``package``."""
    done = run(executable, "-c", code, cwd=cwd, **{"PYTHONPATH": str(package), **extra})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


_OFFLINE = "No matching distribution found for setuptools"


def _has_setuptools() -> bool:
    try:
        return tuple(map(int, importlib.metadata.version("setuptools").split(".")[:2])) >= (70, 1)
    except importlib.metadata.PackageNotFoundError:
        return False


def pip(*arguments: str | Path, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """pip in its isolated way, as a user calls it, or where nothing can be downloaded without isolation."""
    command = (sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)
    done = run(*command, cwd=cwd, **extra)
    if _OFFLINE in done.stdout + done.stderr:
        if not _has_setuptools():
            pytest.skip("pip finds no setuptools for an isolated build, and the environment has none from 70.1 on")
        done = run(*command, "--no-build-isolation", cwd=cwd, **extra)
    return done


def copy_tree(to: Path) -> Path:
    """The files of a checkout that a build reads, kernels replaced by the placeholder."""
    (to / "csrc" / "kernels").mkdir(parents=True)
    (to / "csrc" / "emulation").mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    shutil.copytree(ROOT / "normfused", to / "normfused", ignore=shutil.ignore_patterns("_lib", "__pycache__"))
    shutil.copytree(ROOT / "csrc" / "binding", to / "csrc" / "binding")
    for name in ("problem.h", "steps.h", "weights.h"):
        shutil.copy(ROOT / "csrc" / "kernels" / name, to / "csrc" / "kernels")
    shutil.copy(HERE / "placeholder.cu", to / "csrc" / "kernels" / "steps.cu")
    (to / "csrc" / "emulation" / "simt.h").write_text("// a test tool\n")
    return to


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="session")
def setuptools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with a setuptools that knows pyproject.toml's licence; empty if the environment's does."""
    folder = tmp_path_factory.mktemp("setuptools")
    if not _has_setuptools():
        done = run(sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, "setuptools>=70.1", cwd=folder)
        if done.returncode != 0:
            pytest.skip("no setuptools from 70.1 on, and none can be downloaded")
    return folder


@pytest.fixture(scope="session")
def compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("no g++")
    return found


@pytest.fixture(scope="session")
def emulation(tree: Path, compiler: str) -> Path:
    """The tree, with the emulation of its placeholder built."""
    if _build.find_cuda_headers() is None:
        pytest.skip("no CUDA headers")
    done = run(sys.executable, "-m", "normfused", "build", "--emulation", cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory, compiler: str) -> Path:
    """A wheel with a compiled extension, as `make wheel` makes it."""
    toolkit = _build.find_toolkit()
    if toolkit is None:
        pytest.skip("no nvcc")
    root = copy_tree(tmp_path_factory.mktemp("wheel_tree"))
    done = pip("wheel", "--no-deps", "--wheel-dir", "dist", ".", cwd=root, NORMFUSED_BUILD="cuda", TORCH_CUDA_ARCH_LIST="9.0")
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (root / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder
