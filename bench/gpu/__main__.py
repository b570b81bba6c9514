"""``python -m bench.gpu [STAGE ...]``: all stages, or those named, on this machine's GPU; ``--dry`` shows what they would run.

Results go to $OUT, else to bench/results/<the GPU's name>: summary.md, results.json, logs.zip and benchmark.json, written anew after
every command. The stages bench, matrix and networks go on with build/gpu/benchmark.json where it is of the same machine and commit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .runner import run_stages, table
from .stages import LIMITS, NAMES, ROOT, stages

WORK = ROOT / "build" / "gpu"


def gpu_name() -> str | None:
    """By nvidia-smi, as torch would open the device for that."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    try:
        done = subprocess.run([smi, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def why_not() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"this Python has no torch ({error})"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="What only a GPU can answer, in stages.")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{' '.join(NAMES)} (default: all)")
    parser.add_argument("--dry", action="store_true", help="say what would be run, and run nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the same over the emulation, to try the commands")
    options = parser.parse_args()
    unknown = [name for name in options.stages if name not in NAMES]
    if unknown:
        parser.error(f"unknown stage {' '.join(unknown)}; known: {' '.join(NAMES)}")
    os.chdir(ROOT)
    chosen = stages(options.stages or NAMES, WORK, options.device)
    if options.dry:
        for stage in chosen:
            print(f"{stage.name}: at most {stage.limit:.0f} s")
            for command in stage.commands:
                print(f"  {command.name}, {command.limit:.0f} s: {command}" + (f"  # {command.note}" if command.note else ""))
        return 0
    reason = why_not() if options.device == "cuda" else None
    if reason is not None:
        print(f"make gpu needs a CUDA GPU: {reason}", file=sys.stderr)
        return 1
    from normfused.benchmark.results import folder_name  # imports torch, which was not sure to be there before

    name = (gpu_name() or "gpu") if options.device == "cuda" else "emulation"
    given = os.environ.get("OUT")
    out = Path(given) if given else (ROOT / "bench" / "results" if options.device == "cuda" else WORK) / folder_name(name)
    started = time.monotonic()
    print(f"{name}: {', '.join(s.name for s in chosen)}; at most {sum(LIMITS[s.name] for s in chosen) / 60:.0f} minutes; {out}", flush=True)
    outcomes = run_stages(chosen, WORK, out, lambda text: print(text, flush=True))
    print(f"\n{table(outcomes)}\n\n{time.monotonic() - started:.0f} s; {out}")
    return 0 if all(o.ok for o in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
