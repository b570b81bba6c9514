"""Imports point one way, so that a backend can be read without the norms and the norms without a backend."""

from __future__ import annotations

import ast
from pathlib import Path

import normfused

ROOT = Path(normfused.__file__).parent
# what each part may import from the package; a part not named here is the public surface and may import anything
ALLOWED = {
    "norms": {"activations", "checks", "dispatch", "norms", "ops", "problem"},
    "ops": {"activations", "backends", "dispatch", "problem"},
    "dispatch": {"backends"},
    "backends": {"activations", "backends", "problem"},
    "problem": {"activations"},
    "checks": set(),
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


def test_a_wrong_import_would_be_seen(tmp_path, monkeypatch):
    bad = tmp_path / "backends" / "x.py"
    bad.parent.mkdir()
    bad.write_text("from ..norms.base import call\nfrom .. import ops\n")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert imported_parts(bad) == {"norms", "ops"}
