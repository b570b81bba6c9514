"""Builds the CUDA extension, or says in one line why not.

Loaded by path from setup.py, so it imports neither torch nor the rest of the package. Three parts: `survey` looks at the machine,
`decide` is a pure function from what it found to a `Decision`, and `build` compiles into a folder of products::

    _ops.so        the operator library: kernels and their registration with torch; free of Python
    _C.<abi>.so    the pybind11 module; left out where pybind11 is missing
    record.json    what was built from what; of a pure Python install, why

The folder is ``normfused/_lib``, or one in the user's cache where the package cannot be written, or ``build/emulation``.

Environment: NORMFUSED_BUILD=auto|python|cuda, TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX, MAX_JOBS, NORMFUSED_TORCH_DIR (a torch package to
compile against), NORMFUSED_CXXFLAGS and NORMFUSED_NVCCFLAGS (appended).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
COMMAND = "python -m normfused build"
OLDEST_TORCH = (2, 10)  # of the stable ABI that the binding uses
OLDEST_ARCHITECTURE = (8, 0)
RELEASE_ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0 12.0"  # and the PTX of the newest
_TARGET_VERSION = "0x020a000000000000"
# The names that torch.utils.cpp_extension knows, too
_ARCHITECTURE_NAMES = {"ampere": "8.0 8.6", "ada": "8.9", "hopper": "9.0", "blackwell": "10.0 12.0"}
_GB_PER_JOB = 1.5
_OPERATORS = ("ops.cpp", "weights.cpp")  # of csrc/binding, the files that include torch's headers


class BuildError(Exception):
    """A build that cannot be; its message is one line."""


# ------------------------------------------------------------------------------------------------------- architectures
@dataclass(frozen=True, order=True)
class Architecture:
    """``9.0``, ``9.0a`` (features of one architecture only) or ``9.0+PTX``, as TORCH_CUDA_ARCH_LIST writes them."""

    major: int
    minor: int
    suffix: str = ""
    ptx: bool = False

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.suffix}{'+PTX' if self.ptx else ''}"

    @property
    def capability(self) -> tuple[int, int]:
        return self.major, self.minor

    @property
    def number(self) -> str:
        return f"{self.major}{self.minor}{self.suffix}"

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether code for it runs on a GPU: machine code within its generation, PTX on all that is newer."""
        if self.suffix:
            return self.capability == capability
        return (self.major == capability[0] and self.minor <= capability[1]) or (self.ptx and self.capability <= capability)


def parse_architectures(text: str) -> tuple[Architecture, ...]:
    """A TORCH_CUDA_ARCH_LIST: numbers or names, divided by spaces, commas or semicolons."""
    found: dict[Architecture, None] = {}
    for word in re.split(r"[\s;,]+", text.strip()):
        name, plus, _ = word.partition("+")
        for number in _ARCHITECTURE_NAMES.get(name.lower(), name).split():
            match = re.fullmatch(r"(\d+)\.(\d)([af]?)", number)
            if match is None or word[len(name) :] not in ("", "+PTX"):
                raise BuildError(f"TORCH_CUDA_ARCH_LIST must hold architectures such as 8.0, 9.0a or 12.0+PTX, got {word!r}")
            found[Architecture(int(match[1]), int(match[2]), match[3], bool(plus))] = None
    return tuple(found)


def runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    return any(a.runs_on(capability) for text in architectures for a in parse_architectures(text))


# -------------------------------------------------------------------------------------------------------- the machine
@dataclass(frozen=True)
class Torch:
    folder: Path
    version: str
    cuda: str | None

    @property
    def numbers(self) -> tuple[int, ...]:
        return _numbers(self.version)


@dataclass(frozen=True)
class Toolkit:
    home: Path
    version: str
    architectures: tuple[tuple[int, int], ...]  # that nvcc compiles for

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"


@dataclass(frozen=True)
class Machine:
    """What a decision depends on."""

    system: str = "Linux"
    torch: Torch | None = None
    toolkit: Toolkit | None = None
    compiler: str | None = None
    gpus: tuple[tuple[int, int], ...] = ()
    driver_cuda: str | None = None  # newest CUDA version that the driver serves
    cuda_home: str | None = None  # where the user said the toolkit is


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:2])


def _output(*command: str | Path) -> str | None:
    try:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None


def _site_folders() -> Iterator[Path]:
    """Where packages lie. In pip's isolated builds sysconfig still names the environment that pip installs into."""
    for folder in (sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), site.getusersitepackages(), *sys.path):
        if folder:
            yield Path(folder)


def find_torch(environment: Mapping[str, str] = os.environ) -> Torch | None:
    given = environment.get("NORMFUSED_TORCH_DIR")
    folders = [Path(given)] if given else [folder / "torch" for folder in _site_folders()]
    spec = None if given else importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        folders.insert(0, Path(spec.origin).parent)
    for folder in folders:
        try:
            text = (folder / "version.py").read_text()
        except OSError:
            continue
        version = re.search(r"^__version__\s*=\s*['\"](.+?)['\"]", text, re.MULTILINE)
        cuda = re.search(r"^cuda\b[^=]*=\s*['\"](.+?)['\"]", text, re.MULTILINE)
        if version is not None:
            return Torch(folder, version[1], cuda[1] if cuda else None)
    return None


def _cuda_homes(environment: Mapping[str, str]) -> Iterator[Path]:
    given = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if given:  # no other is a substitute for the one that was named
        yield Path(given)
        return
    on_path = shutil.which("nvcc", path=environment.get("PATH"))
    if on_path is not None:  # perhaps a script elsewhere that calls the real one, which knows where it lies
        top = re.search(r"^#\$ TOP=(.+)$", _output(on_path, "--dryrun", "-c", "-x", "cu", os.devnull) or "", re.MULTILINE)
        yield Path(top[1]).resolve() if top is not None else Path(on_path).resolve().parent.parent
    yield Path("/usr/local/cuda")
    for folder in _site_folders():  # the toolkit's packages on PyPI
        yield from sorted((folder / "nvidia").glob("cu[0-9]*"), reverse=True)


def find_toolkit(environment: Mapping[str, str] = os.environ) -> Toolkit | None:
    for home in dict.fromkeys(home.resolve() for home in _cuda_homes(environment)):
        nvcc = home / "bin" / "nvcc"
        version = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version") or "")
        if version is None:
            continue
        numbers = re.findall(r"compute_(\d+)(\d)\b", _output(nvcc, "--list-gpu-arch") or "")
        return Toolkit(home, version[1], tuple(sorted((int(a), int(b)) for a, b in numbers)))
    return None


def find_cuda_headers(environment: Mapping[str, str] = os.environ) -> Path | None:
    """All that the emulation needs of CUDA: the half types."""
    folders = [home / "include" for home in _cuda_homes(environment)]
    folders += [folder / "nvidia" / "cuda_runtime" / "include" for folder in _site_folders()]
    return next((folder for folder in folders if (folder / "cuda_bf16.h").exists()), None)


def find_pybind11(torch: Torch | None) -> Path | None:
    """A folder that holds ``pybind11/``. Torch's own copy is the last resort: the rest of its headers must not come with it."""
    spec = importlib.util.find_spec("pybind11")
    folders = [Path(spec.origin).parent / "include"] if spec is not None and spec.origin is not None else []
    if torch is not None:
        folders.append(torch.folder / "include")
    return next((folder for folder in folders if (folder / "pybind11" / "pybind11.h").exists()), None)


def survey(environment: Mapping[str, str] = os.environ) -> Machine:
    compiler = shutil.which(environment.get("CXX") or "g++", path=environment.get("PATH"))
    smi = shutil.which("nvidia-smi", path=environment.get("PATH"))
    found = _output(smi, "--query-gpu=compute_cap", "--format=csv,noheader") if smi is not None else None
    gpus = sorted({(int(a), int(b)) for a, b in re.findall(r"^\s*(\d+)\.(\d+)\s*$", found or "", re.MULTILINE)})
    driver = re.search(r"CUDA Version:\s*(\d+\.\d+)", _output(smi) or "") if smi is not None and gpus else None
    return Machine(
        platform.system(),
        find_torch(environment),
        find_toolkit(environment),
        compiler,
        tuple(gpus),
        driver[1] if driver is not None else None,
        environment.get("CUDA_HOME") or environment.get("CUDA_PATH"),
    )


# ------------------------------------------------------------------------------------------------------- the decision
@dataclass(frozen=True)
class Decision:
    """``kind`` is "cuda" or "python". Of a pure Python install ``reason`` says why and ``fix`` what to do; ``elsewhere``: why what is
    compiled will not run on this machine."""

    kind: str
    reason: str
    fix: str = ""
    architectures: tuple[str, ...] = ()
    elsewhere: str = ""

    @property
    def message(self) -> str:
        if self.kind == "cuda":
            note = f"; they will not run here: {self.elsewhere}" if self.elsewhere else ""
            return f"normfused: compiling CUDA kernels for {' '.join(self.architectures)} ({self.reason}){note}"
        return f"normfused: pure Python install: {self.reason}" + (f"; {self.fix}" if self.fix else "")


def mode_of(environment: Mapping[str, str] = os.environ) -> str:
    mode = environment.get("NORMFUSED_BUILD", "auto").strip().lower() or "auto"
    if mode not in ("auto", "python", "cuda"):
        raise BuildError(f"NORMFUSED_BUILD must be auto, python or cuda, got {mode!r}")
    return mode


class _NotHere(Exception):
    """Why there will be no extension, and what to do."""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(f"{reason}; {fix}" if fix else reason)
        self.reason, self.fix = reason, fix


def decide(machine: Machine, mode: str = "auto", architectures: str | None = None) -> Decision:
    """What to install on a machine.

    Args:
        mode: "auto" compiles where the result can run; "cuda" wherever it can be compiled, and raises if it cannot; "python" never.
        architectures: a TORCH_CUDA_ARCH_LIST. By default the GPUs that are there, else those of a release.

    Raises:
        BuildError: mode "cuda" and it cannot be compiled.
    """
    if mode == "python":
        return Decision("python", "NORMFUSED_BUILD=python", f"to have the CUDA kernels: {COMMAND}")
    architectures = (architectures or "").strip() or None
    elsewhere = ""
    try:
        torch, toolkit = _tools(machine, mode == "cuda", architectures)
        if mode == "auto":
            _can_run(machine, torch, toolkit, architectures)
        else:
            elsewhere = _why_elsewhere(machine, torch, toolkit)
        chosen = _architectures(machine, toolkit, architectures)
    except _NotHere as why:
        if mode == "cuda":
            raise BuildError(f"the CUDA extension cannot be built: {why}") from None
        return Decision("python", why.reason, why.fix)
    return Decision("cuda", f"nvcc {toolkit.version}, torch {torch.version}", architectures=tuple(map(str, chosen)), elsewhere=elsewhere)


def _tools(machine: Machine, forced: bool, wanted: str | None) -> tuple[Torch, Toolkit]:
    """What compiling takes. The order is that of what a user should hear first."""
    torch = machine.torch
    if machine.system != "Linux":
        raise _NotHere(f"the CUDA kernels are built on Linux only, this is {machine.system}")
    if torch is None:
        raise _NotHere("no torch was found", f"install torch >= 2.10, then: {COMMAND}")
    if torch.numbers < OLDEST_TORCH:
        raise _NotHere(f"the CUDA kernels need torch >= 2.10, found {torch.version}", f"upgrade torch, then: {COMMAND}")
    if torch.cuda is None and not forced:
        raise _NotHere(f"torch {torch.version} has no CUDA", f"install a CUDA build of torch, then: {COMMAND}")
    if machine.gpus and max(machine.gpus) < OLDEST_ARCHITECTURE and not wanted:
        raise _NotHere(
            f"the CUDA kernels need compute capability 8.0, the GPU has {_dotted(max(machine.gpus))}", "Triton or torch runs there"
        )
    if machine.toolkit is None:
        where = f" in CUDA_HOME={machine.cuda_home}" if machine.cuda_home else ""
        wanted_version = torch.cuda or "12 or newer"
        raise _NotHere(f"no nvcc was found{where}", f"install the CUDA toolkit {wanted_version} or set CUDA_HOME to it, then: {COMMAND}")
    if machine.compiler is None:
        raise _NotHere("no C++ compiler was found", f"install g++ or set CXX, then: {COMMAND}")
    return torch, machine.toolkit


def _can_run(machine: Machine, torch: Torch, toolkit: Toolkit, wanted: str | None) -> None:
    """Whether what is compiled here can run here. A wanted architecture speaks for another machine."""
    if not machine.gpus and not wanted:
        raise _NotHere("no GPU is visible", f"on the machine with the GPU, or here with its architecture: {COMMAND} --arch 9.0")
    # The runtime is linked statically, so what counts is whether the driver is new enough for it; torch's CUDA is a hint to that
    serves = machine.driver_cuda or torch.cuda
    if serves is not None and _numbers(serves)[0] < _numbers(toolkit.version)[0]:
        who = "the driver serves" if machine.driver_cuda else f"torch {torch.version} is built for"
        raise _NotHere(
            f"nvcc {toolkit.version} makes kernels for newer drivers: {who} CUDA {serves}",
            f"set CUDA_HOME to a toolkit {_numbers(serves)[0]}.x, then: {COMMAND}",
        )


def _why_elsewhere(machine: Machine, torch: Torch, toolkit: Toolkit) -> str:
    if torch.cuda is None:
        return f"torch {torch.version} has no CUDA"
    try:
        _can_run(machine, torch, toolkit, None)
    except _NotHere as why:
        return why.reason
    return ""


def _architectures(machine: Machine, toolkit: Toolkit, wanted: str | None) -> tuple[Architecture, ...]:
    known = toolkit.architectures
    if wanted:
        try:
            asked = parse_architectures(wanted)
        except BuildError as error:
            raise _NotHere(str(error)) from None
    elif machine.gpus:
        asked = tuple(_for_gpu(gpu, known) for gpu in machine.gpus if gpu >= OLDEST_ARCHITECTURE)
    else:
        asked = tuple(Architecture(*a.capability) for a in parse_architectures(RELEASE_ARCHITECTURES) if a.capability in known)
        asked = (*asked[:-1], *(Architecture(*a.capability, ptx=True) for a in asked[-1:]))  # the newest, for the GPUs after it
    # Lists of container images name old architectures too; what the kernels or nvcc do not have is left out
    chosen = tuple(sorted({a for a in asked if a.capability >= OLDEST_ARCHITECTURE and a.capability in known}))
    if not chosen:
        most = _dotted(max(known)) if known else "nothing"
        raise _NotHere(
            f"nvcc {toolkit.version} compiles for up to {most} and the kernels need 8.0 or newer, asked for: "
            + (wanted or " ".join(map(_dotted, machine.gpus)) or RELEASE_ARCHITECTURES),
            f"name another: {COMMAND} --arch 9.0",
        )
    return chosen


def _for_gpu(gpu: tuple[int, int], known: Sequence[tuple[int, int]]) -> Architecture:
    """The GPU's own architecture, or the newest before it, whose PTX the driver compiles."""
    older = [k for k in known if k <= gpu]
    if gpu in known or not older:
        return Architecture(*gpu)
    return Architecture(*max(older), ptx=True)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


# ---------------------------------------------------------------------------------------------------- where things are
def checkout() -> Path | None:
    """The root of the source tree that this package is part of, None where it is installed."""
    return PACKAGE.parent if (PACKAGE.parent / "csrc" / "kernels").is_dir() else None


def sources_folder() -> Path:
    root = checkout()
    return root / "csrc" if root is not None else PACKAGE / "_csrc"


def version() -> str:
    found = re.search(r'^__version__ = "(.+?)"', (PACKAGE / "__init__.py").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def sources_hash(emulation: bool = False, folder: Path | None = None) -> str:
    """Of all that is compiled, so that a build which no longer matches its sources is noticed; empty where there are none."""
    folder = folder or sources_folder()
    digest = hashlib.sha256()
    parts = ("kernels", "binding", "emulation") if emulation else ("kernels", "binding")
    files = sorted(f for part in parts for f in (folder / part).rglob("*") if f.suffix in (".h", ".cuh", ".cu", ".cpp"))
    for file in files:
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest() if files else ""


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normfused"


def cached_prefix() -> str:
    """Of the cache's folders that serve this package. A home may be shared by machines of other kinds, hence the machine's."""
    return f"{version()}-{sources_hash()[:12]}-{platform.machine()}"


def package_products() -> Path:
    return PACKAGE / "_lib"


def emulation_products() -> Path | None:
    root = checkout()
    return root / "build" / "emulation" if root is not None else None


def _writable(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)


def products_for(decision: Decision, environment: Mapping[str, str] = os.environ) -> Path:
    """The package's folder, or one of the user's cache where the package cannot be written."""
    if _writable(package_products()):
        return package_products()
    numbers = "_".join(str(a).replace(".", "").replace("+PTX", "p") for a in decision.architectures)
    return cache_folder(environment) / f"{cached_prefix()}-{numbers}"


def work_folder(kind: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Of objects, kept so that the next build compiles only what changed."""
    root = checkout()
    if root is not None and _writable(root):
        return root / "build" / kind
    return cache_folder(environment) / "objects" / cached_prefix()


def read_record(folder: Path) -> dict[str, Any]:
    """A build record, empty where there is none."""
    try:
        record = json.loads((folder / "record.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_python_record(folder: Path, decision: Decision) -> None:
    """Keeps the reason of a pure Python install for `python -m normfused`. A build that is there stays."""
    if not (folder / "_ops.so").exists():
        _write_record(folder, {"kind": "python", "version": version(), "reason": decision.reason, "fix": decision.fix})


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if folder == package_products():
        (folder / ".gitignore").write_text("*\n")  # products in a source tree are no part of it
    _replace(folder / "record.json", json.dumps(record, indent=2).encode() + b"\n")


def _replace(path: Path, content: bytes) -> None:
    """Atomically: a library that a process has mapped must not change under it."""
    fresh = path.with_name(path.name + f".{os.getpid()}")
    fresh.write_bytes(content)
    fresh.chmod(0o755 if path.suffix == ".so" else 0o644)
    fresh.replace(path)


# ------------------------------------------------------------------------------------------------------- the commands
@dataclass(frozen=True)
class Step:
    """One command of a build, with the file it makes from others."""

    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    output: Path
    depfile: bool = True

    @property
    def description(self) -> str:
        return f"{Path(self.command[0]).name} {self.inputs[0].name if self.depfile else self.output.name}"


def jobs(environment: Mapping[str, str] = os.environ) -> int:
    """MAX_JOBS, else the cores there are, as far as memory allows."""
    given = environment.get("MAX_JOBS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(_free_memory_gb() / _GB_PER_JOB)))


def _free_memory_gb() -> float:
    limits = []
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        limits += [int(found[1]) / 2**20] if found else []
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text().strip()
        anonymous = re.search(r"^anon (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)  # file caches give way
        if most.isdigit() and anonymous is not None:
            limits.append((int(most) - int(anonymous[1])) / 2**30)
    except (OSError, ValueError):
        pass
    return min(limits, default=4.0)


def _kernel_sources(sources: Path) -> list[Path]:
    kernels = sources / "kernels"
    found = sorted(kernels.glob("*.cu")) + sorted((kernels / "instances").glob("*.cu"))
    if not found:
        raise BuildError(f"no kernels were found in {kernels}")
    return found


def _object(work: Path, sources: Path, source: Path) -> Path:
    return work / "objects" / ("_".join(source.relative_to(sources).parts) + ".o")


def _own_flags(environment: Mapping[str, str]) -> list[str]:
    return shlex.split(environment.get("NORMFUSED_CXXFLAGS", ""))


def _host_flags(environment: Mapping[str, str]) -> list[str]:
    return ["-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *_own_flags(environment)]


def _link_flags(torch: Torch, environment: Mapping[str, str]) -> list[str]:
    # libtorch_cpu must be named as needed: torch loads its libraries for itself alone. exclude-libs keeps the CUDA runtime's names in.
    needed = ["-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--as-needed"]
    return ["-shared", f"-L{torch.folder / 'lib'}", *needed, "-Wl,--exclude-libs,ALL", "-Wl,-Bsymbolic", *_own_flags(environment)]


def _torch_flags(torch: Torch) -> list[str]:
    return ["-std=c++20", f"-DTORCH_TARGET_VERSION={_TARGET_VERSION}", "-isystem", str(torch.folder / "include")]


def cuda_steps(machine: Machine, decision: Decision, sources: Path, work: Path, environment: Mapping[str, str]) -> list[Step]:
    torch, toolkit, compiler = machine.torch, machine.toolkit, machine.compiler
    assert torch is not None and toolkit is not None and compiler is not None
    chosen = [a for text in decision.architectures for a in parse_architectures(text)]
    generated = [f"-gencode=arch=compute_{a.number},code=sm_{a.number}" for a in chosen]
    generated += [f"-gencode=arch=compute_{a.number},code=compute_{a.number}" for a in chosen if a.ptx]
    kernels = _kernel_sources(sources)
    threads = min(len(chosen), -(-jobs(environment) // len(kernels)))  # more cores than files: several architectures at once
    nvcc = [
        *(str(toolkit.nvcc), "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xfatbin=-compress-all", f"--threads={threads}"),
        *("-Xcompiler=-fPIC,-fvisibility=hidden", *(("-ccbin", compiler) if environment.get("CXX") else ())),
        *(*generated, *shlex.split(environment.get("NORMFUSED_NVCCFLAGS", ""))),
    ]
    host = [compiler, *_host_flags(environment)]
    cuda = ["-std=c++17", "-isystem", str(_toolkit_folder(toolkit, "include", "cuda_runtime_api.h"))]
    steps = []
    for source in kernels:
        made = _object(work, sources, source)
        steps.append(Step((*nvcc, "-MD", "-MF", f"{made}.d", "-c", str(source), "-o", str(made)), (source,), made))
    of_runtime = [*cuda, f'-DNF_ARCHITECTURES="{" ".join(map(str, chosen))}"']
    for name, flags in (*((name, _torch_flags(torch)) for name in _OPERATORS), ("runtime.cpp", of_runtime)):
        steps.append(_host_step([*host, *flags], sources, sources / "binding" / name, work))
    runtime = _toolkit_folder(toolkit, "lib64", "libcudart_static.a")
    objects = tuple(step.output for step in steps)
    link = (compiler, *map(str, objects), *_link_flags(torch, environment), f"-L{runtime}", "-lcudart_static", "-lrt", "-ldl", "-lpthread")
    return [*steps, Step((*link, "-o", str(work / "_ops.so")), objects, work / "_ops.so", depfile=False)]


def emulation_steps(machine: Machine, headers: Path, sources: Path, work: Path, environment: Mapping[str, str]) -> list[Step]:
    torch, compiler = machine.torch, machine.compiler
    assert torch is not None and compiler is not None
    # Tests control the emulator by its names, so these stay visible
    host = [compiler, *_host_flags(environment), "-fvisibility=default", "-DNF_EMULATION"]
    kernel = [*host, "-std=c++17", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-isystem", str(headers)]
    steps = [_host_step([*kernel, "-x", "c++"], sources, source, work) for source in _kernel_sources(sources)]
    steps += [_host_step(kernel, sources, source, work) for source in sorted((sources / "emulation").glob("simt*.cpp"))]
    steps += [_host_step([*host, *_torch_flags(torch)], sources, sources / "binding" / name, work) for name in _OPERATORS]
    steps.append(_host_step([*kernel, '-DNF_ARCHITECTURES="emulation"'], sources, sources / "binding" / "runtime.cpp", work))
    objects = tuple(step.output for step in steps)
    link = (compiler, *map(str, objects), *_link_flags(torch, environment), "-ldl", "-lpthread")
    return [*steps, Step((*link, "-o", str(work / "_ops.so")), objects, work / "_ops.so", depfile=False)]


def module_steps(compiler: str, pybind11: Path, sources: Path, work: Path, environment: Mapping[str, str]) -> list[Step]:
    """Of the pybind11 module, without torch's headers: some torch versions bring a pybind11 that refuses theirs."""
    if not (pybind11 / "__init__.py").exists() and (pybind11 / "torch").exists():
        alone = work / "include"
        alone.mkdir(parents=True, exist_ok=True)
        link = alone / "pybind11"
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(pybind11 / "pybind11")
        pybind11 = alone
    flags = ["-std=c++17", "-isystem", str(pybind11), "-isystem", sysconfig.get_path("include")]
    compiled = _host_step([compiler, *_host_flags(environment), *flags], sources, sources / "binding" / "module.cpp", work)
    made = work / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    link_step = (compiler, str(compiled.output), "-shared", "-ldl", *_own_flags(environment))
    return [compiled, Step((*link_step, "-o", str(made)), (compiled.output,), made, depfile=False)]


def _host_step(flags: Sequence[str], sources: Path, source: Path, work: Path) -> Step:
    made = _object(work, sources, source)
    return Step((*flags, "-MMD", "-MF", f"{made}.d", "-c", str(source), "-o", str(made)), (source,), made)


def _toolkit_folder(toolkit: Toolkit, name: str, file: str) -> Path:
    """Toolkits differ: lib64 or lib (the packages on PyPI), or below targets (conda's)."""
    candidates = [toolkit.home / name, toolkit.home / "lib", *sorted(toolkit.home.glob(f"targets/*/{name.removesuffix('64')}"))]
    found = next((folder for folder in candidates if (folder / file).exists()), None)
    if found is None:
        raise BuildError(f"the CUDA toolkit at {toolkit.home} has no {file}; install its runtime's development files")
    return found


# ------------------------------------------------------------------------------------------------------------ running
def run_steps(steps: Sequence[Step], work: Path, environment: Mapping[str, str] = os.environ) -> None:
    """By ninja, which compiles only what changed, else all of it side by side.

    Raises:
        BuildError: a command failed; one line, the rest is in ``build.log``.
    """
    (work / "objects").mkdir(parents=True, exist_ok=True)
    ninja = _find_ninja(environment)
    lines: list[str] = []
    started = time.monotonic()
    if ninja is not None:
        failed = _run_ninja(ninja, steps, work, environment, lines)
    else:
        failed = _run_directly(steps, environment, lines)
    (work / "build.log").write_text("\n".join(lines) + "\n")
    if failed:
        raise BuildError(f"{_first_error(lines)} (all of it: {work / 'build.log'})")
    print(f"normfused: built in {time.monotonic() - started:.0f} s", flush=True)


def _find_ninja(environment: Mapping[str, str]) -> str | None:
    spec = importlib.util.find_spec("ninja")
    package = Path(spec.origin).parent / "data" / "bin" / "ninja" if spec is not None and spec.origin is not None else None
    on_path = shutil.which("ninja", path=environment.get("PATH"))
    return on_path or (str(package) if package is not None and package.exists() else None)


def _run_ninja(ninja: str, steps: Sequence[Step], work: Path, environment: Mapping[str, str], lines: list[str]) -> bool:
    def path(p: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(p))

    text = ["rule run", "  command = $line", "  description = $what"]
    text += ["rule compile", "  command = $line", "  description = $what", "  depfile = $out.d", "  deps = gcc"]
    for step in steps:
        text.append(f"build {path(step.output)}: {'compile' if step.depfile else 'run'} {' '.join(map(path, step.inputs))}")
        text += [f"  line = {shlex.join(step.command).replace('$', '$$')}", f"  what = {step.description}"]
    (work / "build.ninja").write_text("\n".join(text) + "\n")
    command = [ninja, "-C", str(work), f"-j{jobs(environment)}"]
    status = {**environment, "NINJA_STATUS": "[%f/%t] "}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=status) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("[") or re.search(r"\bwarning\b", line):
                print(line.rstrip(), flush=True)
    return process.returncode != 0


def _run_directly(steps: Sequence[Step], environment: Mapping[str, str], lines: list[str]) -> bool:
    def run(step: Step) -> subprocess.CompletedProcess[str]:
        print(step.description, flush=True)
        return subprocess.run(step.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)

    with ThreadPoolExecutor(jobs(environment)) as pool:
        for compiling in (True, False):
            for done in pool.map(run, [step for step in steps if step.depfile is compiling]):
                lines += [shlex.join(done.args), *done.stdout.splitlines()]
                if done.returncode != 0:
                    return True
    return False


def _first_error(lines: Sequence[str]) -> str:
    for pattern, hint in (
        (r"\bKilled\b|signal (terminated|9)|Cannot allocate memory", "; out of memory? try MAX_JOBS=1"),
        (r"(fatal |catastrophic )?error\b", ""),
    ):
        found = next((line for line in lines if re.search(pattern, line) and not line.startswith("FAILED")), None)
        if found is not None:
            return f"compiling failed: {found.strip()[:300]}{hint}"
    return f"compiling failed: {next((line for line in reversed(lines) if line.strip()), 'no output')[:300]}"


# ------------------------------------------------------------------------------------------------------------ building
def build(
    machine: Machine,
    decision: Decision,
    folder: Path,
    *,
    sources: Path | None = None,
    work: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Compiles what ``decision`` says into ``folder``."""
    assert machine.torch is not None and machine.toolkit is not None and machine.compiler is not None
    sources, work = sources or sources_folder(), work or work_folder("cuda", environment)
    steps = cuda_steps(machine, decision, sources, work, environment)
    facts = {"kind": "cuda", "architectures": list(decision.architectures), "toolkit": machine.toolkit.version}
    _build(machine, steps, folder, sources, work, facts, environment)


def check(machine: Machine, decision: Decision, environment: Mapping[str, str] = os.environ) -> None:
    """Whether the kernels compile and link, in a fraction of the time: without optimization where nvcc can (from 13.0 on)."""
    assert machine.toolkit is not None
    major = int(machine.toolkit.version.split(".")[0])
    flags = f"{environment.get('NORMFUSED_NVCCFLAGS', '')} {'--Ofast-compile=max' if major >= 13 else ''}"
    quick = {**environment, "NORMFUSED_NVCCFLAGS": flags}
    with tempfile.TemporaryDirectory() as folder:
        build(machine, decision, Path(folder), work=work_folder("check", quick), environment=quick)


def build_emulation(
    machine: Machine,
    folder: Path,
    *,
    sources: Path | None = None,
    work: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Compiles the kernels by the host's compiler over ``csrc/emulation``, to run them on CPU tensors in tests.

    Raises:
        BuildError: no compiler, no torch, or no headers of CUDA.
    """
    sources, work = sources or sources_folder(), work or work_folder("emulation", environment)
    headers = find_cuda_headers(environment)
    if machine.torch is None or machine.compiler is None:
        raise BuildError(
            f"the emulation needs torch and g++, found torch: {machine.torch is not None}, g++: {machine.compiler is not None}"
        )
    if headers is None:
        raise BuildError(
            "the emulation needs CUDA's headers (cuda_bf16.h): set CUDA_HOME or pip install nvidia-cuda-runtime nvidia-cuda-nvcc"
        )
    steps = emulation_steps(machine, headers, sources, work, environment)
    _build(machine, steps, folder, sources, work, {"kind": "emulation", "architectures": ["emulation"]}, environment)


def _build(
    machine: Machine,
    steps: list[Step],
    folder: Path,
    sources: Path,
    work: Path,
    facts: dict[str, Any],
    environment: Mapping[str, str],
) -> None:
    assert machine.torch is not None and machine.compiler is not None
    digest = sources_hash(facts["kind"] == "emulation", sources)  # before compiling: an edit made meanwhile must count as one
    pybind11 = find_pybind11(machine.torch)
    if pybind11 is not None:
        steps = [*steps, *module_steps(machine.compiler, pybind11, sources, work, environment)]
    run_steps(steps, work, environment)
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        product = folder / step.output.name
        if step.output.suffix == ".so" and product != step.output:
            _replace(product, step.output.read_bytes())
    compiler = (_output(machine.compiler, "--version") or "unknown").splitlines()[0]
    record = {
        **facts,
        "version": version(),
        "sources": digest,
        "torch": machine.torch.version,
        "compiler": compiler,
        "module": sysconfig.get_config_var("SOABI") if pybind11 is not None else None,
        "flags": _flags(steps[0]),
    }
    _write_record(folder, record)


def _flags(step: Step) -> list[str]:
    """Of the kernels' compiler, without the files and folders of this machine."""
    return [w for w in step.command[1:] if w.startswith("-") and w not in ("-c", "-o", "-MD", "-MMD", "-MF", "-isystem", "-ccbin")]


# ---------------------------------------------------------------------------------------------------------- the command
def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """``python -m normfused build``: for what pip cannot serve (an installed package, a machine without network, the emulation)."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Compile the CUDA kernels into the package, or into the user's cache.")
    parser.add_argument("--arch", metavar="LIST", help="architectures, like TORCH_CUDA_ARCH_LIST: '8.0 9.0+PTX' (default: this machine's)")
    parser.add_argument("--emulation", action="store_true", help="compile them for the CPU instead, for tests (source checkouts only)")
    parser.add_argument("--check", action="store_true", help="only see whether they compile and link: not optimized, nothing is kept")
    options = parser.parse_args(arguments)
    try:
        machine = survey(environment)
        if options.emulation:
            folder = emulation_products()
            if folder is None or not (sources_folder() / "emulation").is_dir():
                raise BuildError("the emulation is built from a source checkout of normfused, this is an installed package")
            build_emulation(machine, folder, environment=environment)
            print(f"normfused: {folder / '_ops.so'}; use it with NORMFUSED_EMULATE=1")
            return 0
        decision = decide(machine, "cuda", options.arch or environment.get("TORCH_CUDA_ARCH_LIST"))
        print(decision.message, flush=True)
        if options.check:
            check(machine, decision, environment)
            print("normfused: the kernels compile and link; nothing was kept")
            return 0
        folder = products_for(decision, environment)
        build(machine, decision, folder, environment=environment)
        print(f"normfused: {folder / '_ops.so'}; check it with: python -m normfused")
    except BuildError as error:
        print(f"normfused: {error}", file=sys.stderr)
        return 1
    return 0
