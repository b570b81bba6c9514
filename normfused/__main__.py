"""``python -m normfused``: what is installed, which backends run here and why not the others, and a self-test against float64."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import normfused as nf

from . import _build, dispatch, selftest
from .backends.cuda import _load


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _advice(report: dict[str, Any]) -> str:
    failed = [n for n, b in report["backends"].items() if b.get("self_test", {}).get("passed") is False]
    if failed:
        return f"Self-test of {', '.join(failed)} failed: set NORMFUSED_BACKEND=torch and report this page (python -m normfused --json)."
    if report["forced_error"]:
        return "Unset NORMFUSED_BACKEND, or set it to one of: auto, " + ", ".join(report["available"]) + "."
    if report["cuda"] and "cuda" not in report["available"] and _build.COMMAND in (report["extension"]["reason"] or ""):
        without = "" if "triton" in report["available"] else " (or, without a compiler: pip install triton)"
        return f"The CUDA kernels are not used: {report['extension']['reason']}{without}."
    if report["cuda"] and not {"cuda", "triton"} & set(report["available"]):
        return "A GPU is here but Triton is not: pip install triton"
    if not report["cuda"]:
        return "No GPU visible: CPU tensors run through ATen (backend torch). Nothing to do."
    return f"Ready: CUDA tensors run through backend {report['auto']}."


def _extension() -> dict[str, Any]:
    """What is known of the compiled kernels, whether they are used or not."""
    library, record = _load.library(), _load.record()
    facts = {name: record.get(name) for name in ("kind", "architectures", "toolkit", "torch", "compiler", "module", "flags")}
    return {**facts, "path": str(library.path) if library else None, "reason": _load.reason()}


def _extension_line(extension: dict[str, Any]) -> str:
    if extension["path"] is None:
        return str(extension["reason"])
    made = " with ".join(
        [f"for {' '.join(extension['architectures'])}"] + ([f"nvcc {extension['toolkit']}"] if extension["toolkit"] else [])
    )
    module = "" if extension["module"] else "; normfused._C was not built (no pybind11)"
    return f"compiled {made}{module}" + (f"; not used: {extension['reason']}" if extension["reason"] else "")


def _report() -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report: dict[str, Any] = {
        "normfused": nf.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())) if device == "cuda" else None,
        "device": device,
        "extension": _extension(),
        "selected": dispatch.get_backend(),
        "forced_error": None,
        "backends": {},
    }
    for name, reason in dispatch.reasons(device, torch.float32).items():
        entry: dict[str, Any] = {"available": reason is None, "reason": reason}
        if reason is None:
            try:
                entry["self_test"] = selftest.run(name, device)
            except Exception as error:  # a broken backend must not hide the rest of the report
                entry["self_test"] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        report["backends"][name] = entry
    report["available"] = [n for n, b in report["backends"].items() if b["available"]]
    report["auto"] = dispatch.choose(device, torch.float32, "auto")
    try:
        dispatch.choose(device, torch.float32)
    except (RuntimeError, ValueError) as error:
        report["forced_error"] = str(error)
    report["advice"] = _advice(report)
    return report


def _lines(entry: dict[str, Any]) -> tuple[str, str]:
    if not entry["available"]:
        return "no", entry["reason"]
    test = entry["self_test"]
    if "error" in test:
        return "FAILED", test["error"]
    detail = f"largest error {test['worst_error_of_tolerance']:.1%} of the tolerance ({test['worst_case']})"
    return ("ok" if test["passed"] else "FAILED"), detail


def _print(report: dict[str, Any]) -> None:
    facts = [
        ("normfused", report["normfused"]),
        ("torch", report["torch"]),
        ("triton", report["triton"] or "not installed"),
        ("python", f"{report['python']} on {report['platform']}"),
        ("CUDA C++", _extension_line(report["extension"])),
        ("GPU", f"{report['gpu']} (compute capability {report['compute_capability']})" if report["gpu"] else "none visible"),
        (
            "backend",
            f"{report['selected']}" + (f" -> {report['auto']} for {report['device']} tensors" if report["selected"] == "auto" else ""),
        ),
    ]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for name, value in facts:
            print(f"{name:10} {value}")
        for name, entry in report["backends"].items():
            print(f"  {name:10} {'  '.join(_lines(entry))}")
    else:
        console = Console()
        for name, value in facts:
            console.print(f"{name:10} {value}", highlight=False)
        table = Table(
            "backend", "self-test", "detail", title=f"Backends for {report['device']} tensors (forward and backward against float64)"
        )
        for name, entry in report["backends"].items():
            word, detail = _lines(entry)
            colour = {"ok": "green", "no": "yellow", "FAILED": "red"}[word]
            table.add_row(name, f"[{colour}]{word}[/]", detail)
        console.print(table)
    if report["forced_error"]:
        print(report["forced_error"])
    print(report["advice"])


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["build"]:
        return _build.main(arguments[1:])
    if arguments[:1] == ["bench"]:
        from .benchmark import command

        return command.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m normfused", description=__doc__)
    parser.add_argument(
        "command",
        nargs="?",
        choices=["doctor", "build", "bench"],
        default="doctor",
        help="doctor (default): this report; build: compile kernels; bench: how much faster, and what it costs",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable, for bug reports")
    options = parser.parse_args(arguments)
    report = _report()
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    healthy = all(b["self_test"]["passed"] for b in report["backends"].values() if b["available"])
    return 0 if healthy and report["forced_error"] is None else 1


if __name__ == "__main__":
    sys.exit(main())
