"""``python -m normfused bench``: what is asked for, how it is shown, where it goes."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import normfused as nf

from . import header as headers
from . import networks, operators, report
from .cases import CHANNELS_LAST, CONTIGUOUS, DTYPES, MATRIX, QUICK, Case, parse
from .comparison import COMPILE, EAGER, is_ours
from .providers import Provider, all_providers, names
from .results import MODES, PASSES, NetworkRow, Results, folder_name
from .screen import Screen, headline, unsteady
from .timing import ROUNDS, SMALL_BYTES

# Unless others are named
_ON_A_CPU = (EAGER, COMPILE, "timm", "normfused-torch")


class UserError(Exception):
    """What the caller should have written; shown as one sentence."""


def main(arguments: Sequence[str]) -> int:
    """0: done; 1: a provider of normfused was wrong or failed; 2: the command cannot be carried out; 130: Ctrl-C, results kept."""
    try:
        if arguments[:1] == ["report"]:
            return report.main(list(arguments[1:]))
        options = _parser().parse_args(arguments)
        device = _device(options.device)
        return _list(device) if options.list else _bench(options, device)
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read has seen enough; Python would complain again when it closes its output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m normfused bench",
        description="How much faster, and what it costs: norm layers and whole networks against eager PyTorch, torch.compile and peers.",
        epilog="python -m normfused bench report [FILE ...] [--out FOLDER] makes tables and pictures of results.",
    )
    what = parser.add_argument_group("what (default: headline cases and the networks on a GPU, --quick on a CPU)")
    what.add_argument("--quick", action="store_true", help="small shapes and networks, also for a CPU")
    what.add_argument("--full", action="store_true", help="the whole matrix")
    what.add_argument("--op", help="one operator, such as bn_relu, gn_silu, bn_add_relu, ln, rms")
    what.add_argument("--shape", help="of --op, such as 32x256x56x56")
    what.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of --op and --model (default: bf16 on a GPU, fp32 on a CPU)")
    what.add_argument("--layout", choices=(CONTIGUOUS, CHANNELS_LAST), default=CONTIGUOUS, help="of --op")
    what.add_argument("--groups", type=int, default=32, help="of --op gn")
    what.add_argument("--model", nargs="+", metavar="NETWORK", help="whole networks, or all")
    what.add_argument("--batch", type=int, help="of --model")
    what.add_argument("--parts", nargs="+", choices=("operators", "networks"), help="only one of the two")
    how = parser.add_argument_group("how")
    how.add_argument("--providers", nargs="+", metavar="NAME", help="only these (see --list)")
    how.add_argument("--directions", nargs="+", choices=PASSES, default=list(PASSES))
    how.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="eval: forward without grad")
    how.add_argument("--rounds", type=int, default=ROUNDS, help="figures are medians over these (default: %(default)s)")
    how.add_argument(
        "--seconds",
        type=float,
        help="no case is begun after these, the rest is left for --resume; torch.compile then runs on the headline only",
    )
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, metavar="FILE", help="default: a new file in bench/results or normfused-bench")
    out.add_argument("--resume", type=Path, metavar="FILE", help="go on with this file; one that is not there yet is begun")
    out.add_argument("--plot", type=Path, nargs="?", const=Path(), metavar="FOLDER", help="tables and pictures too (default: beside them)")
    out.add_argument("--details", action="store_true", help="every pass and provider on the screen, also of many cases")
    out.add_argument("--list", action="store_true", help="what can be timed here, by whom, and who is absent")
    return parser


def _device(asked: str | None) -> str:
    if asked == "cuda" and not torch.cuda.is_available():
        build = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        raise UserError(f"--device cuda needs a CUDA GPU, but {build}; leave the option out for the CPU")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


# --------------------------------------------------------------------------------------------------------- what is to be done
def _cases(options: argparse.Namespace, device: str) -> tuple[list[Case], str]:
    """(cases, what they are called)."""
    if options.op or options.shape:
        if not (options.op and options.shape):
            raise UserError("--op and --shape go together, such as --op bn_relu --shape 32x256x56x56")
        dtype = options.dtype or ("bf16" if device == "cuda" else "fp32")
        try:
            return [parse(options.op, options.shape, dtype=dtype, layout=options.layout, groups=options.groups)], "one operator"
        except ValueError as error:
            raise UserError(str(error)) from None
    if options.full:
        # the headline comes first, so that --seconds cuts off the rest
        return sorted(MATRIX, key=lambda case: case.tier != "headline"), "the full matrix"
    if options.quick or device == "cpu":
        return list(QUICK), "the quick set"
    return _headline(), "the headline cases"


def _headline() -> list[Case]:
    return [case for case in MATRIX if case.tier == "headline"]


def _providers(options: argparse.Namespace, device: str) -> list[Provider]:
    for name in options.providers or ():
        if name not in names():
            raise UserError(f"unknown provider {name}; known: {', '.join(names())}")
    found = all_providers(device, options.providers or (_ON_A_CPU if device == "cpu" else names()))
    if all(p.absent is not None for p in found):
        raise UserError("; ".join(f"{p.name} is absent: {p.absent}" for p in found))
    return found


def _left_out(options: argparse.Namespace, device: str) -> Callable[[Provider, Case], str | None]:
    """What is done without for the sake of time, unless providers are named or one operator is asked for."""
    everything = bool(options.op or options.providers)

    def why(provider: Provider, case: Case) -> str | None:
        if everything or not provider.name.startswith(COMPILE):
            return None
        if device == "cuda":
            tuned = provider.name != COMPILE and case.tier != "headline"
            return "autotuning takes long: headline cases only, unless --providers names it" if tuned else None
        hard = case.layout == CHANNELS_LAST or case.tensor_bytes < SMALL_BYTES
        return f"compiling takes long: large contiguous cases only; for all: --providers {' '.join(_ON_A_CPU)}" if hard else None

    return why


def _networks(options: argparse.Namespace, device: str) -> list[str]:
    absent = networks.absent(device)
    here = [name for name in networks.NETWORKS if name not in absent]
    if options.model is None:
        return here
    for name in options.model:
        if name != "all" and name not in networks.NETWORKS:
            raise UserError(f"unknown network {name}; known: {', '.join(networks.NETWORKS)}")
        if name in absent:
            raise UserError(f"network {name} cannot be built here: {absent[name]}")
    return here if "all" in options.model else options.model


def _parts(options: argparse.Namespace) -> tuple[bool, bool]:
    """Whether operators, and whether networks are timed."""
    if options.op or options.shape or options.model:
        return bool(options.op or options.shape), bool(options.model)
    parts = options.parts or ("operators", "networks")
    return "operators" in parts, "networks" in parts


def _file(options: argparse.Namespace, device: str) -> Path:
    """Where results go; UserError unless a file can be written there."""
    path: Path = options.json or options.resume or _new_file(options, device)
    if path.is_dir():
        raise UserError(f"results cannot be written to {path}: it is a folder")
    trial = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"results cannot be written to {path}: {error.strerror}") from None
    return path


def _pages(options: argparse.Namespace, path: Path) -> Path | None:
    """Where the report goes, if one is asked for; UserError unless the folder can be made."""
    if options.plot is None:
        return None
    folder: Path = path.with_suffix("") if options.plot == Path() else options.plot
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the report cannot be written to {folder}: {error.strerror}") from None
    return folder


def _new_file(options: argparse.Namespace, device: str) -> Path:
    """One that is not there yet; in bench/results of the checkout only what is a whole set of cases."""
    folder = (Path("normfused-bench") if options.op or options.model else report.results_folder()) / folder_name(
        headers.machine_name(device)
    )
    stem = f"{time.strftime('%Y-%m-%d', time.gmtime())}-{headers.commit()[0] or nf.__version__}"
    names = (f"{stem}{f'-{k}' if k > 1 else ''}.json" for k in itertools.count(1))
    return next(path for name in names if not (path := folder / name).exists())


def _load(path: Path) -> Results:
    try:
        return Results.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{error}") from None


# ----------------------------------------------------------------------------------------------------------------------- runs
def _bench(options: argparse.Namespace, device: str) -> int:
    started = time.monotonic()
    if options.rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {options.rounds}")
    if options.batch is not None and options.batch < 1:
        raise UserError(f"--batch must be at least 1, got {options.batch}")
    with_operators, with_networks = _parts(options)
    cases, called = _cases(options, device) if with_operators else ([], "")
    providers = _providers(options, device)
    chosen = _networks(options, device) if with_networks else []
    path = _file(options, device)
    pages = _pages(options, path)
    before = _load(options.resume) if options.resume and options.resume.exists() else None
    screen = Screen()
    if options.resume and before is None:
        screen.say(f"{options.resume} is not there yet: it is begun")
    if device == "cpu" and not (options.quick or options.full or options.op or options.model):
        screen.say("No GPU here: the quick set is timed, on the CPU. On a GPU this command runs the headline cases.")
    if with_operators:
        screen.say(f"Operators: {called} ({len(cases)}) by {', '.join(p.name for p in providers if p.absent is None)}")
    try:
        with screen.progress(device) as on_event:
            results = operators.run(
                cases,
                providers,
                device=device,
                directions=options.directions,
                modes=options.modes,
                rounds=options.rounds,
                seconds=options.seconds,
                on_event=on_event,
                path=path,
                resume=before,
                left_out=_left_out(options, device),
            )
    except operators.CannotResume as error:
        raise UserError(str(error)) from None
    if chosen and "interrupted" not in results.header:
        left = None if options.seconds is None else options.seconds - (time.monotonic() - started)
        _run_networks(results, chosen, options, device, left, path, screen)
    return _finish(results, path, pages, options, screen)


def _run_networks(
    results: Results, names: list[str], options: argparse.Namespace, device: str, seconds: float | None, path: Path, screen: Screen
) -> None:
    results.absent |= networks.absent(device)
    done = {row.network for row in results.networks if options.batch in (None, row.batch)}
    waiting = [name for name in names if name not in done]
    screen.say(f"Networks: {', '.join(waiting) or 'all of them are in the file already'}")

    def on_row(row: NetworkRow) -> None:
        if row.status == "refused":  # there was no time for it: not a result, and --resume is to try again
            results.not_run += [row.network] if row.network not in results.not_run else []
            return
        results.networks.append(row)
        results.save(path)
        figure = f"{row.step_ms:.1f} ms" if row.step_ms is not None else f"{row.status}: {row.reason}"
        screen.say(f"  {row.network} batch {row.batch} {row.layout} {row.mode}, {row.norms}, {row.execution}: {figure}")

    try:
        networks.run(
            waiting,
            device=device,
            batch=options.batch,
            small=True if options.quick else None,
            dtype=DTYPES[options.dtype] if options.dtype else None,
            seconds=seconds,
            on_row=on_row,
        )
    except KeyboardInterrupt:
        results.header["interrupted"] = "Ctrl-C"
    results.save(path)


def _finish(results: Results, path: Path, pages: Path | None, options: argparse.Namespace, screen: Screen) -> int:
    screen.tables(results, details=options.details)
    screen.say("")
    for name, reason in results.absent.items():
        screen.say(f"absent: {name}: {reason}")
    if noise := unsteady(results):
        screen.say(noise)
    if results.header["device"] == "cpu":
        screen.say("On a CPU the layers run ATen's kernels, as torch.nn does: about 1 is to be expected, less in half types.")
        screen.say("The fused kernels need a GPU.")
    if results.not_run:
        screen.say(f"{len(results.not_run)} cases or networks were not run; to go on: the same command with --resume {path}")
    if pages is not None:
        for line in report.lines(report.write([path], pages, pages / "pictures")):
            screen.say(line)
    screen.say(f"Results: {report.shown(path)}")
    screen.say(f"headline: {headline(results)}")
    interrupted = results.header.get("interrupted")
    if interrupted == "Ctrl-C":
        screen.say("Interrupted; what was measured is kept.")
        return 130
    bad = sum(is_ours(row.provider) and row.status in ("wrong", "failed") for row in results.rows)
    if bad:
        screen.say(f"{bad} figures of normfused are missing, as it was wrong or failed; see the table.")
    return 1 if bad or interrupted else 0


def _list(device: str) -> int:
    screen = Screen()
    screen.say(f"On {headers.machine_name(device)} ({device})\n\nProviders:")
    for p in all_providers(device, names()):
        screen.say(f"  {p.name:24} {'ready' if p.absent is None else f'absent: {p.absent}'}")
    screen.say("\nNetworks:")
    absent = networks.absent(device)
    for name in networks.NETWORKS:
        screen.say(f"  {name:24} {'ready' if name not in absent else f'absent: {absent[name]}'}")
    for title, cases in (("Quick cases", QUICK), ("Headline cases", _headline()), ("All cases", MATRIX)):
        screen.say(f"\n{title} ({len(cases)}):")
        for case in cases:
            screen.say(f"  {case.name}")
    return 0
