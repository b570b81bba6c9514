"""Imports point one way, so that a backend can be read without the norms and the norms without a backend."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import normfused

ROOT = Path(normfused.__file__).parent
# what each part may import from the package; a part not named here is the public surface and may import anything
ALLOWED = {
    "norms": {"activations", "checks", "dispatch", "distributed", "norms", "ops", "problem", "rebuild", "rules"},
    "rebuild": {"activations", "backends", "dispatch", "ops", "problem"},
    "distributed": {"activations", "backends", "dispatch", "ops", "problem", "rebuild"},
    "ops": {"activations", "backends", "compiling", "dispatch", "problem"},
    "dispatch": {"backends"},
    "backends": {"_build", "activations", "backends", "compiling", "problem", "rules"},
    "_build": set(),
    "problem": {"activations"},
    "rules": set(),
    "checks": set(),
    "compiling": set(),
    "activations": set(),
}


def imported_parts(path: Path) -> set[str]:
    """First component, below the package, of every relative import of a file."""
    found = set()
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = package[: len(package) - node.level + 1]
            absolute = (*base, *(node.module.split(".") if node.module else ()))
        elif node.module and node.module.split(".")[0] == "normfused":
            absolute = tuple(node.module.split(".")[1:])
        else:
            continue
        found |= {absolute[0]} if absolute else {alias.name for alias in node.names}
    return found


def test_imports_point_one_way():
    seen = set()
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part in ALLOWED:
            seen.add(part)
            extra = imported_parts(path) - ALLOWED[part]
            assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}; {part} may import {sorted(ALLOWED[part])}"
    assert seen == set(ALLOWED)


def test_kernels_know_no_framework():
    """csrc/kernels is free of torch and Python, and only device.cuh speaks to the machine."""
    kernels = ROOT.parent / "csrc" / "kernels"
    if not kernels.is_dir():
        pytest.skip("an installed package keeps its sources elsewhere")
    files = [p for p in kernels.rglob("*") if p.suffix in (".cuh", ".cu", ".h")]
    assert len(files) > 15
    for path in files:
        text = path.read_text()
        included = set(re.findall(r'#include [<"]([^">]+)', text))
        assert not {i for i in included if i.startswith(("torch", "ATen", "c10", "Python", "pybind"))}, path.name
        if path.name == "device.cuh":
            continue
        code = re.sub(r"//[^\n]*", "", text)
        words = r"\basm\b|__CUDA_ARCH__|__shared__|cooperative_groups|<<<|threadIdx|blockIdx|__sync|__shfl|atomic[A-Z]|#if|#ifdef"
        assert not re.search(words, code), f"{path.name}: {re.search(words, code)}"


def test_a_wrong_import_would_be_seen(tmp_path, monkeypatch):
    bad = tmp_path / "backends" / "x.py"
    bad.parent.mkdir()
    bad.write_text("from ..norms.base import call\nfrom .. import ops\n")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert imported_parts(bad) == {"norms", "ops"}
