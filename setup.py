"""Metadata lives in pyproject.toml. What is built depends on the machine: normfused/_build.py decides it and says so in one line."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def _load_build() -> Any:
    """The module by its path: importing the package would import torch, which an isolated build does not have."""
    spec = importlib.util.spec_from_file_location("normfused_build", ROOT / "normfused" / "_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_build = _load_build()


def _products(command: Any) -> Path:
    """Where the build's products go: into the wheel, or of an editable install into the source tree."""
    in_place = getattr(command, "editable_mode", False) or getattr(command, "inplace", False)
    return Path(ROOT if in_place else command.build_lib) / "normfused" / "_lib"


class BuildPy(build_py):
    """Adds the sources of the kernels, for `python -m normfused build`, and the reason where there is no extension."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "normfused", ignore_errors=True)  # what an earlier build left there
        super().run()
        if not self.editable_mode:
            for part in ("kernels", "binding"):  # not the emulation, a test tool
                shutil.copytree(ROOT / "csrc" / part, Path(self.build_lib) / "normfused" / "_csrc" / part)
        if decision.kind == "python":
            _build.write_python_record(_products(self), decision)


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        folder = _products(self)
        try:
            _build.build(machine, decision, folder)
        except _build.BuildError as error:
            if mode == "cuda":
                raise SystemExit(f"normfused: {error}") from None
            failed = _build.Decision("python", str(error), f"once that is repaired: {_build.COMMAND}")
            print(failed.message, flush=True)
            _build.write_python_record(folder, failed)

    def copy_extensions_to_source(self) -> None:
        """An editable install's products are in the source tree already."""

    def get_outputs(self) -> list[str]:
        return [str(f) for f in _products(self).glob("*") if f.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BdistWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """The operator library is free of Python, so the wheel serves all of them."""
        python, abi, system = super().get_tag()
        return (python, abi, system) if self.root_is_pure else ("py3", "none", system)


try:
    mode = _build.mode_of()
    if {"egg_info", "dist_info", "sdist", "clean"} & set(sys.argv):
        machine, decision = None, _build.Decision("python", "nothing is built")
    else:
        machine = _build.survey()
        decision = _build.decide(machine, mode, _build.os.environ.get("TORCH_CUDA_ARCH_LIST"))
        print(decision.message, flush=True)
except _build.BuildError as error:
    raise SystemExit(f"normfused: {error}") from None

setup(
    ext_modules=[Extension("normfused._lib._C", [])] if decision.kind == "cuda" else [],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt, "bdist_wheel": BdistWheel},
)
