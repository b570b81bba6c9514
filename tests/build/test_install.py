"""What pip installs: the pure package where nothing can be compiled, and a wheel whose binary serves every torch and Python."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from normfused import _build

from .conftest import copy_tree, pip, python, run

LOAD = """
import json, torch
from normfused.backends.cuda import _load
library = _load.library()
print(json.dumps({
    "torch": torch.__version__,
    "path": str(library.path) if library else None,
    "op": str(library.ops.norm_act.default) if library else None,
    "interface": library.interface and [library.interface.architectures, library.interface.runtime_version] if library else None,
    "reason": _load.reason(),
    "kind": _load.record().get("kind"),
}))
"""


def a_torch(folder: Path, version: str, cuda: str | None) -> str:
    folder.mkdir()
    (folder / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
    return str(folder)


@pytest.mark.parametrize(
    ("version", "cuda", "environment", "reason"),
    [
        ("2.13.0+cpu", None, {}, "torch 2.13.0+cpu has no CUDA"),
        ("2.11.0+cu130", "13.0", {"CUDA_HOME": "/nowhere"}, "no nvcc was found in CUDA_HOME=/nowhere"),
        ("2.11.0+cu130", "13.0", {"NORMFUSED_BUILD": "python"}, "NORMFUSED_BUILD=python"),
    ],
)
def test_pure_install_into_an_empty_folder(tmp_path, version, cuda, environment, reason):
    root = copy_tree(tmp_path / "tree")
    torch = a_torch(tmp_path / "torch", version, cuda)
    done = pip("install", "--no-deps", "--target", tmp_path / "to", ".", cwd=root, NORMFUSED_TORCH_DIR=torch, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    package = tmp_path / "to" / "normfused"
    assert json.loads((package / "_lib" / "record.json").read_text())["reason"] == reason
    assert sorted(p.name for p in (package / "_csrc").iterdir()) == ["binding", "kernels"]
    assert not list(package.rglob("*.so"))
    (metadata,) = (tmp_path / "to").glob("*.dist-info")
    assert "Tag: py3-none-any" in (metadata / "WHEEL").read_text()
    if reason == "NORMFUSED_BUILD=python" and _build.find_torch().cuda is not None:
        found = python(LOAD, cwd=tmp_path, package=tmp_path / "to")
        assert found["reason"] == f"this is a pure Python install ({reason}); to have the CUDA kernels: python -m normfused build"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"NORMFUSED_BUILD": "cuda", "CUDA_HOME": "/nowhere"},
            "the CUDA extension cannot be built: no nvcc was found in CUDA_HOME=/nowhere",
        ),
        ({"NORMFUSED_BUILD": "gpu"}, "NORMFUSED_BUILD must be auto, python or cuda, got 'gpu'"),
    ],
)
def test_a_forced_build_that_cannot_be_fails_in_a_line(tree, tmp_path, environment, message):
    done = pip("install", "--no-deps", "--target", tmp_path / "to", ".", cwd=tree, **environment)
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert f"normfused: {message}" in output
    assert "Traceback" not in output
    assert not (tmp_path / "to").exists()


def test_an_error_of_the_compiler_is_a_line_too(tmp_path, compiler):
    if _build.find_toolkit() is None:
        pytest.skip("no nvcc")
    root = copy_tree(tmp_path / "tree")
    with (root / "csrc" / "kernels" / "steps.cu").open("a") as file:
        file.write("this is no C++;\n")
    environment = {
        "NORMFUSED_TORCH_DIR": str(_cuda_torch(tmp_path)),
        "TORCH_CUDA_ARCH_LIST": "9.0",
    }
    done = pip("install", "--no-deps", "--target", tmp_path / "to", ".", cwd=root, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    reason = json.loads((tmp_path / "to" / "normfused" / "_lib" / "record.json").read_text())["reason"]
    assert reason.startswith("compiling failed: ") and "steps.cu" in reason and "\n" not in reason
    done = pip("install", "--no-deps", "--target", tmp_path / "to2", ".", cwd=root, NORMFUSED_BUILD="cuda", **environment)
    assert done.returncode != 0
    assert "normfused: compiling failed: " in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def _cuda_torch(tmp_path: Path) -> Path:
    """This environment's torch, said to have CUDA."""
    torch = _build.find_torch()
    assert torch is not None
    folder = tmp_path / "cuda_torch"
    a_torch(folder, "2.11.0+cu130", "13.0")
    for part in ("include", "lib"):
        (folder / part).symlink_to(torch.folder / part)
    return folder


def test_contents_of_the_wheel(wheel):
    assert wheel.name.startswith("normfused-") and wheel.name.endswith(f"-py3-none-linux_{os.uname().machine}.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "normfused/_lib/_ops.so",
        "normfused/_lib/record.json",
        "normfused/_csrc/kernels/steps.cu",
        "normfused/_csrc/binding/ops.cpp",
    } <= names
    assert not [n for n in names if "emulation" in n or n.startswith(("tests", "csrc", "build"))]
    assert len([n for n in names if n.startswith("normfused/_lib/_C.")]) == 1
    record = json.loads(zipfile.ZipFile(wheel).read("normfused/_lib/record.json"))
    assert (record["kind"], record["architectures"]) == ("cuda", ["9.0"])


def test_contents_of_the_source_distribution(setuptools, tmp_path):
    root = copy_tree(tmp_path / "tree")
    done = run(sys.executable, "setup.py", "-q", "sdist", cwd=root, PYTHONPATH=str(setuptools))
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (root / "dist").glob("*.tar.gz")
    with tarfile.open(made) as archive:
        names = {"/".join(n.split("/")[1:]) for n in archive.getnames()}
    shutil.unpack_archive(made, tmp_path / "unpacked")
    assert {"csrc/kernels/steps.cu", "csrc/binding/ops.cpp", "normfused/_build.py", "CMakeLists.txt"} <= names
    assert not [n for n in names if "emulation" in n or n.endswith(".so")]
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    done = pip("install", "--no-deps", "--target", tmp_path / "to", ".", cwd=unpacked, NORMFUSED_BUILD="python")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "to" / "normfused" / "_csrc" / "kernels" / "steps.cu").exists()


def test_the_wheel_loads_from_an_empty_folder(installed, tmp_path):
    found = python(LOAD, cwd=tmp_path, package=installed)
    assert found["path"] == str(installed / "normfused" / "_lib" / "_ops.so")
    assert found["op"] == "normfused_cuda.norm_act.default"
    assert found["interface"][0] == "9.0" and found["interface"][1] >= 12000


def test_the_same_binary_loads_under_another_torch(installed, tmp_path):
    """NORMFUSED_OTHER_PYTHON: a Python whose torch is another, e.g. a CUDA build; variables may stand before it, as for `env`."""
    other = shlex.split(os.environ.get("NORMFUSED_OTHER_PYTHON", ""))
    if not other:
        pytest.skip("NORMFUSED_OTHER_PYTHON names no Python with another torch")
    launcher = tmp_path / "python"
    launcher.write_text(f'#!/bin/sh\nexec {shlex.join(["env", *other])} "$@"\n')
    launcher.chmod(0o755)
    here, there = (python(LOAD, cwd=tmp_path, package=installed, executable=e) for e in (sys.executable, launcher))
    assert there["torch"] != here["torch"]
    assert there["op"] == "normfused_cuda.norm_act.default"
    assert there["path"] == here["path"]


def test_the_binary_exports_nothing_of_cuda_and_needs_no_python(installed, tmp_path):
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    library = installed / "normfused" / "_lib" / "_ops.so"
    symbols = run("nm", "-D", library, cwd=tmp_path).stdout.splitlines()
    defined = {line.split()[-1] for line in symbols if line.split()[-2] in "TDBRVW" and " w " not in line}
    assert "normfused_interface" in defined
    assert not [s for s in defined if s.startswith(("cuda", "__cuda", "Py"))]
    wanted = {line.split()[-1].split("@")[0] for line in symbols if " U " in line}
    assert not [s for s in wanted if s.startswith(("Py", "_Py", "cuda"))]
    # the stable ABI only: a C++ symbol of torch would tie the binary to one torch
    assert not [s for s in wanted if s.startswith("_ZN") and any(space in s for space in ("2at", "3c10", "5torch"))]


def test_a_read_only_package_is_served_from_the_cache(installed, tmp_path):
    """The folder that a build would choose there is the one that the loader looks into."""
    package = tmp_path / "site" / "normfused"
    shutil.copytree(installed / "normfused", package)
    products = tmp_path / "products"
    shutil.move(package / "_lib", products)
    code = """
import json
from pathlib import Path
from normfused import _build
_build._writable = lambda folder: "site" not in folder.parts  # as for a user other than root
decision = _build.Decision("cuda", "", architectures=("8.0", "9.0+PTX"))
print(json.dumps([str(_build.products_for(decision)), str(_build.work_folder("cuda"))]))
"""
    cache = tmp_path / "cache"
    folder, work = python(code, cwd=tmp_path, package=package.parent, XDG_CACHE_HOME=str(cache))
    assert Path(folder).parent == cache / "normfused" and Path(folder).name.endswith("-80_90p")
    assert cache in Path(work).parents
    found = python(LOAD, cwd=tmp_path, package=package.parent, XDG_CACHE_HOME=str(cache))
    assert found["path"] is None
    shutil.copytree(products, folder)
    found = python(LOAD, cwd=tmp_path, package=package.parent, XDG_CACHE_HOME=str(cache))
    assert found["path"] == str(Path(folder) / "_ops.so")
    # sources of another version do not find it
    with (package / "_csrc" / "kernels" / "steps.h").open("a") as file:
        file.write("// changed\n")
    assert python(LOAD, cwd=tmp_path, package=package.parent, XDG_CACHE_HOME=str(cache))["path"] is None


@pytest.mark.slow
def test_an_installed_package_builds_itself(installed, tmp_path):
    package = tmp_path / "site" / "normfused"
    shutil.copytree(installed / "normfused", package)
    shutil.rmtree(package / "_lib")
    code = """
import json, sys
from normfused import _build
_build._writable = lambda folder: "site" not in folder.parts
status = _build.main(["--arch", "9.0"])
print(json.dumps([status, _build.main(["--emulation"])]))
"""
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert python(code, cwd=tmp_path, package=package.parent, **environment) == [0, 1]  # no emulation in a package
    assert not (package / "_lib").exists()
    found = python(LOAD, cwd=tmp_path, package=package.parent, **environment)
    assert str(tmp_path / "cache") in found["path"]


@pytest.mark.slow
def test_a_build_without_ninja(tmp_path, compiler):
    if _build.find_cuda_headers() is None:
        pytest.skip("no CUDA headers")
    root = copy_tree(tmp_path / "tree")
    code = """
import json
from normfused import _build
_build._find_ninja = lambda environment: None
print(json.dumps(_build.main(["--emulation"])))
"""
    assert python(code, cwd=root, package=root) == 0
    assert (root / "build" / "emulation" / "_ops.so").exists()


def test_a_check_keeps_nothing(tmp_path, compiler):
    if _build.find_toolkit() is None:
        pytest.skip("no nvcc")
    root = copy_tree(tmp_path / "tree")
    done = run(sys.executable, "-m", "normfused", "build", "--check", "--arch", "9.0", cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compile and link" in done.stdout
    assert not (root / "normfused" / "_lib").exists()
    (root / "csrc" / "kernels" / "steps.cu").write_text("this is not C++\n")
    done = run(sys.executable, "-m", "normfused", "build", "--check", "--arch", "9.0", cwd=root)
    assert done.returncode == 1
    assert "compiling failed" in done.stderr


@pytest.mark.slow
def test_editable_install(tmp_path, compiler):
    if _build.find_toolkit() is None:
        pytest.skip("no nvcc")
    root = copy_tree(tmp_path / "tree")
    environment = {"NORMFUSED_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0"}
    done = pip("install", "--no-deps", "--target", tmp_path / "to", "-e", ".", cwd=root, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (root / "normfused" / "_lib" / "_ops.so").exists()
    assert (root / "normfused" / "_lib" / ".gitignore").read_text() == "*\n"
    assert python(LOAD, cwd=tmp_path, package=root)["op"] == "normfused_cuda.norm_act.default"
