"""What a run's figures are labelled with: machine, clocks, versions, commit. No host name, no path, no user."""

from __future__ import annotations

import csv
import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import normfused as nf

# Distributions whose versions decide what a figure is worth; those that are not installed are left out
PACKAGES = (
    *("triton", "numpy", "timm", "liger-kernel", "quack-kernels", "nvidia-cutlass-dsl", "nvidia-cudnn-frontend", "nvidia-cudnn-cu13"),
    *("nvidia-cudnn-cu12", "torchnorm", "flag-gems", "inplace-abn", "apex", "torchvision", "diffusers", "monai", "cuda-bindings"),
)
_CLOCKS = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "power_w": "power.draw", "temperature_c": "temperature.gpu"}
# Newer drivers have renamed it
_THROTTLE = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
_IDENTITY = ("device", "machine", "torch", "normfused", "commit", "dirty")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "normfused": nf.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> tuple[str | None, bool | None]:
    """(short hash, whether files differ from it) of the checkout that the package is in; (None, None) for an installed package.

    ``NORMFUSED_COMMIT`` names it where a checkout has come without its history.
    """
    root = Path(nf.__file__).resolve().parents[1]
    told = os.environ.get("NORMFUSED_COMMIT")
    if not (root / ".git").exists() or shutil.which("git") is None:
        return told, None

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    # results of runs do not make the code another one
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!docs")
    return git("rev-parse", "--short", "HEAD") or told, None if changed is None else bool(changed)


def nvidia_smi(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the current device; {} where there is no such program or it does not know a field."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None) if torch.cuda.is_available() else None
    if uuid is not None:
        command.append(f"--id=GPU-{uuid}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    rows = list(csv.reader(done.stdout.splitlines(), skipinitialspace=True))
    return dict(zip(fields, rows[0], strict=False)) if done.returncode == 0 and rows else {}


def clocks() -> dict[str, float | str | None]:
    """Clocks, power, temperature and the reasons for lower clocks, now; {} without nvidia-smi."""
    told = nvidia_smi(*_CLOCKS.values())
    found: dict[str, float | str | None] = {name: _number(told[field]) for name, field in _CLOCKS.items() if field in told}
    reasons = next((text for field in _THROTTLE if (text := nvidia_smi(field).get(field)) is not None), None)
    return found | ({} if reasons is None else {"throttle_reasons": reasons})


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]", in virtual machines
        return None


def header(device: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything but what is measured: the caller adds ``copy_gbps`` and, at the end, ``clocks_after``."""
    short, dirty = commit()
    found: dict[str, Any] = {
        "device": device,
        "machine": machine_name(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "torch": torch.__version__,
        "normfused": nf.__version__,
        "versions": versions(),
        "commit": short,
        "dirty": dirty,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "options": options or {},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        cudnn = torch.backends.cudnn
        found |= {
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "processors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": nvidia_smi("driver_version").get("driver_version"),
            "cudnn": cudnn.version(),
            "cudnn_flags": {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic},
            "matmul_precision": torch.get_float32_matmul_precision(),
            "clocks_before": clocks(),
        }
    return found


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what a run that is gone on with is not the same machine, software and commit: "torch: 2.10.0 there, 2.11.0 here"."""
    return [f"{key}: {before.get(key)} there, {now.get(key)} here" for key in _IDENTITY if before.get(key) != now.get(key)]
