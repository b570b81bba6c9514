"""Steps of whole networks, timed. Variants of one network take turns; each one's memory is what it adds to a device it has to itself.

A training step is zero_grad, forward under autocast, loss, backward, SGD with momentum; in eval the forward under inference_mode.
Data are random and the same for all variants of a network, weights start the same (one seed), compilation and warm-up are not timed.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from normfused import dispatch

from ..results import NetworkRow
from .catalogue import CHANNELS_LAST_3D, MEMORY_FORMATS, NETWORKS, Network, Size, absent
from .convert import norms_fused
from .layers import NORMFUSED, TORCH

EXECUTIONS = ("eager", "compile")
SEED = 0
# Steps before the loss is compared: the first has only seen the forward
STEPS = 4
LEARNING_RATE, MOMENTUM = 0.001, 0.9
# Relative difference of losses that is always allowed, in units of the type's eps, and how far beyond the effect of one rounding of the
# input, measured REPEATS times, a difference may lie: batch norm of few values and STEPS updates make much of a rounding
ROUNDINGS, BEYOND, REPEATS = 8, 4, 3
# A block of steps between two readings of the clock, so that waiting for the device is a small part of it
BLOCK_SECONDS, MOST_STEPS = 0.25, 20


@dataclass
class Setting:
    """One network as it is run: everything but norms and execution."""

    network: Network
    size: Size
    batch: int
    layout: str
    dtype: torch.dtype
    device: torch.device
    training: bool

    def row(self, norms: str, execution: str) -> NetworkRow:
        """An empty row; ``note`` tells what a reader must know of the comparison."""
        mode, kind = "training" if self.training else "eval", str(self.dtype).removeprefix("torch.")
        shape = (self.batch, *self.size.shape)
        note = self.network.note if self.half else None
        return NetworkRow(self.network.name, self.batch, shape, self.layout, kind, mode, norms, execution, note=note)

    @property
    def half(self) -> bool:
        return self.dtype in (torch.float16, torch.bfloat16)

    def data(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """(inputs, target) on the device, in layout and type."""
        with _seeded():
            inputs, target = self.network.task.data(self.batch, self.size.shape)
        kind = torch.float32 if self.half else self.dtype
        return tuple(self._placed(t, kind) for t in inputs), self._placed(target, kind)

    def model(self, norms: str) -> nn.Module:
        with _seeded():
            model = self.size.build(norms)
        kind = torch.float32 if self.half else self.dtype
        model.to(self.device, kind).train(self.training)
        # torch's annotation of Module.to leaves memory_format out
        return model.to(memory_format=MEMORY_FORMATS[self.layout])  # type: ignore[no-any-return,call-overload]

    def _placed(self, t: Tensor, kind: torch.dtype) -> Tensor:
        t = t.to(self.device, kind) if t.is_floating_point() else t.to(self.device)
        # targets of another number of dimensions have no such layout
        return t.contiguous(memory_format=MEMORY_FORMATS[self.layout]) if t.dim() == len(self.size.shape) + 1 else t


@dataclass
class Variant:
    """A network with one kind of norms and one execution, ready to step."""

    setting: Setting
    row: NetworkRow
    inputs: tuple[Tensor, ...]
    target: Tensor
    walls: list[float] = field(default_factory=list)  # seconds a step, one of each round
    devices: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        s = self.setting
        self.plain = s.model(self.row.norms)
        # dynamic=True would cost torch.compile its persistent kernels
        self.model: Any = torch.compile(self.plain, dynamic=False) if self.row.execution == "compile" else self.plain
        fused = {"fused": True} if s.device.type == "cuda" else {}
        self.optimizer = torch.optim.SGD(self.plain.parameters(), LEARNING_RATE, MOMENTUM, **fused) if s.training else None
        if self.row.norms == NORMFUSED:
            self.row.replaced = norms_fused(self.plain)
            self.row.backend = dispatch.choose(s.device.type, s.dtype)

    def loss(self) -> Tensor:
        s = self.setting
        with torch.autocast(s.device.type, s.dtype) if s.half else nullcontext():
            output = self.model(*self.inputs)
            return s.network.task.loss(output, self.target)

    def step(self) -> Tensor | None:
        """One step; its loss in training."""
        s = self.setting
        if self.optimizer is None:
            with torch.inference_mode(), torch.autocast(s.device.type, s.dtype) if s.half else nullcontext():
                self.model(*self.inputs)
            return None
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def learn(self) -> float:
        """The loss after STEPS steps, in eval of the first forward. Compiles."""
        start = time.perf_counter()
        last = self.step()
        _wait(self.setting.device)
        if self.row.execution == "compile":
            self.row.compile_s = time.perf_counter() - start
        for _ in range(STEPS - 1):
            last = self.step()
        if last is None:
            with torch.inference_mode():
                last = self.loss()
        return float(last)

    def weigh(self) -> None:
        """Peak of two steps, of all that the variant needs and nothing else, and what autograd keeps."""
        device = self.setting.device
        if device.type == "cuda":
            if self.optimizer is not None:
                self.optimizer.zero_grad(set_to_none=True)
            others = torch.cuda.memory_allocated(device) - self._own_bytes()
            torch.cuda.reset_peak_memory_stats(device)
            for _ in range(2):
                self.step()
            self.row.peak_bytes = torch.cuda.max_memory_allocated(device) - others
        if self.setting.training:
            self.row.saved_bytes = self._saved_bytes()

    def block(self, steps: int) -> None:
        """``steps`` steps between two readings of the wall clock and, on a GPU, between two events."""
        device = self.setting.device
        on_gpu = device.type == "cuda"
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if on_gpu else (None, None)
        _wait(device)
        start = time.perf_counter()
        if first is not None:
            first.record()
        for _ in range(steps):
            self.step()
        if last is not None:
            last.record()
        _wait(device)
        self.walls.append((time.perf_counter() - start) / steps)
        if first is not None and last is not None:
            self.devices.append(first.elapsed_time(last) / steps / 1e3)
        if self.optimizer is not None:
            # of an idle variant only weights and momentum stay on the device
            self.optimizer.zero_grad(set_to_none=True)

    def finish(self) -> None:
        """Medians of the rounds into the row."""
        wall = statistics.median(self.walls)
        self.row.step_ms, self.row.images_per_s = 1e3 * wall, self.setting.batch / wall
        if self.devices:
            self.row.device_ms = 1e3 * statistics.median(self.devices)
        if len(self.walls) > 1:
            quarter, _, three_quarters = statistics.quantiles(self.walls, n=4, method="inclusive")
            self.row.spread = (three_quarters - quarter) / wall

    def _own_bytes(self) -> int:
        """Of the model, its momentum and the data."""
        state = () if self.optimizer is None else self.optimizer.state.values()
        momentum = [t for kept in state for t in kept.values() if isinstance(t, Tensor)]
        own = (*self.plain.parameters(), *self.plain.buffers(), *momentum, *self.inputs, self.target)
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}.values())

    def _saved_bytes(self) -> int:
        """Bytes autograd keeps from one forward to the backward; parameters, buffers and the data aside."""
        known = {t.untyped_storage().data_ptr() for t in (*self.plain.parameters(), *self.plain.buffers(), *self.inputs, self.target)}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()  # held, so that no later tensor gets its address
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = self.loss()
        del loss
        return sum(storage.nbytes() for storage in kept.values())


def run(
    names: Iterable[str],
    *,
    device: str,
    batch: int | None = None,
    small: bool | None = None,
    norms: Sequence[str] = (TORCH, NORMFUSED),
    executions: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    layout: str | None = None,
    training: bool = True,
    rounds: int = 5,
    seconds: float | None = None,
    on_row: Callable[[NetworkRow], object] | None = None,
) -> list[NetworkRow]:
    """Time networks; a row for every network, batch, layout, kind of norms and execution, also where that failed.

    Args:
        names: of `NETWORKS`.
        device: ``"cuda"`` or ``"cpu"``.
        batch: None (default) for each network's own.
        small: the size for one CPU core; None (default) on a CPU, not on a GPU.
        norms: ``"torch.nn"``, ``"normfused"``; losses are compared with the first variant of torch.nn.
        executions: ``"eager"``, ``"compile"``; None (default) is both on a GPU and eager on a CPU, where compilation takes minutes.
        dtype: half types through autocast, others as the parameters' type. None (default): the network's on a GPU, float32 on a CPU.
        layout: ``"contiguous"`` or ``"channels_last"`` (of 3-D networks ``"channels_last_3d"``); None (default) for each network's own.
        training: whole training steps (default), or the forward in eval mode.
        rounds: in each, every variant runs a block of steps (default 5); medians over them are what rows hold.
        seconds: no network is begun after this time, and no round but the first; None (default) for no limit.
        on_row: called with each row when it is final.

    Raises:
        ValueError: an unknown name, norms, execution or layout, or no round.
    """
    names = list(names)
    executions = executions or (EXECUTIONS if torch.device(device).type == "cuda" else EXECUTIONS[:1])
    _known("names", names, NETWORKS)
    _known("norms", norms, (TORCH, NORMFUSED))
    _known("executions", executions, EXECUTIONS)
    _known("layout", [] if layout is None else [layout], MEMORY_FORMATS)
    if rounds < 1:
        raise ValueError(f"networks.run: rounds must be at least 1, got {rounds}")
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    missing = absent(device)
    found: list[NetworkRow] = []
    for name in names:
        for setting in _settings(NETWORKS[name], torch.device(device), batch, small, dtype, layout, training):
            rows = [setting.row(n, e) for e in executions for n in norms]
            if name in missing:
                rows = [replace(row, status="absent", reason=missing[name]) for row in rows]
            elif time.monotonic() > deadline:
                rows = [replace(row, status="refused", reason=f"the {seconds:g} s given were used up") for row in rows]
            else:
                _measure(setting, rows, rounds, deadline)
            found += rows
            for row in rows if on_row else ():
                on_row(row)  # type: ignore[misc]
    return found


def _settings(
    network: Network,
    device: torch.device,
    batch: int | None,
    small: bool | None,
    dtype: torch.dtype | None,
    layout: str | None,
    training: bool,
) -> Iterator[Setting]:
    on_cpu = device.type == "cpu"
    size = network.small if (on_cpu if small is None else small) else network.full
    dtype = dtype or (torch.float32 if on_cpu else network.dtype)
    if layout == "channels_last" and len(size.shape) == 4:
        layout = CHANNELS_LAST_3D
    for chosen in network.layouts if layout is None else (layout,):
        for one in size.batches if batch is None else (batch,):
            yield Setting(network, size, one, chosen, dtype, device, training)


def _measure(setting: Setting, rows: Sequence[NetworkRow], rounds: int, deadline: float) -> None:
    """Fills the rows of one setting. A variant that fails is left out, and the others go on."""
    torch.compiler.reset()
    variants: list[Variant] = []
    with _fastest_convolutions():
        inputs, target = setting.data()
        for row in rows:
            with _failing(row):
                variant = Variant(setting, row, inputs, target)
                row.loss = variant.learn()
                variant.weigh()
                variants.append(variant)
            variant = None  # type: ignore[assignment]
            _collect()
        _compare(setting, rows, inputs, target)
        variants = [v for v in variants if v.row.status == "ok"]
        steps = _steps_of_a_block(variants)
        for i in range(rounds):
            if i and time.monotonic() > deadline:
                break
            turn = i % max(len(variants), 1)
            for variant in variants[turn:] + variants[:turn]:
                if variant.row.status == "ok":
                    with _failing(variant.row):
                        variant.block(steps)
        for variant in variants:
            if variant.row.status == "ok":
                variant.finish()
    variants.clear()
    _collect()


def _compare(setting: Setting, rows: Sequence[NetworkRow], inputs: tuple[Tensor, ...], target: Tensor) -> None:
    """A variant whose loss is not that of the first variant of torch.nn is wrong, and its figures are not kept."""
    reference = next((row for row in rows if row.norms == TORCH and row.status == "ok"), None)
    allowed = 0.0
    if reference is not None and any(row.status == "ok" and row is not reference for row in rows):
        with _failing(reference):
            allowed = _allowed(setting, reference, inputs, target)
    for row in rows:
        if row.status != "ok" or row.loss is None:
            continue
        if not math.isfinite(row.loss):
            row.status, row.reason = "wrong", f"loss {row.loss} after {STEPS} steps"
        elif reference is not None and reference.loss is not None and abs(row.loss - reference.loss) > allowed:
            row.status = "wrong"
            row.reason = (
                f"loss {row.loss:.6g} after {STEPS} steps, torch.nn in {reference.execution} has {reference.loss:.6g};"
                f" rounding explains a difference of {allowed:.2g}"
            )
        if row.status == "wrong":
            row.peak_bytes = row.saved_bytes = None


def _allowed(setting: Setting, reference: NetworkRow, inputs: tuple[Tensor, ...], target: Tensor) -> float:
    """How far rounding alone may take a loss from that of ``reference``: torch.nn runs again on inputs moved by half an eps."""
    eps = torch.finfo(setting.dtype).eps
    wanted = reference.loss or 0.0
    moved = 0.0
    for i in range(REPEATS):
        generator = torch.Generator(setting.device).manual_seed(SEED + i)
        shifts = [torch.rand(t.shape, generator=generator, device=t.device, dtype=t.dtype) - 0.5 for t in inputs]
        shifted = tuple(t * (1 + eps * shift) for t, shift in zip(inputs, shifts, strict=True))
        again = Variant(setting, setting.row(TORCH, "eager"), shifted, target).learn()
        moved = max(moved, abs(again - wanted))
    return max(ROUNDINGS * eps * abs(wanted), BEYOND * moved)


def _steps_of_a_block(variants: Sequence[Variant]) -> int:
    """As many for all of them as the slowest needs for BLOCK_SECONDS."""
    slowest = 0.0
    for variant in variants:
        with _failing(variant.row):
            variant.block(1)
            slowest = max(slowest, variant.walls.pop())
            variant.devices.clear()
    return max(1, min(MOST_STEPS, int(BLOCK_SECONDS / slowest))) if slowest else 1


@contextmanager
def _failing(row: NetworkRow) -> Iterator[None]:
    """What is raised inside becomes the row's status and reason; half-measured figures go."""
    try:
        yield
    except Exception as error:  # one variant that cannot run must not stop the others
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
        row.status, row.reason = "failed", reason
        row.peak_bytes = row.saved_bytes = row.compile_s = row.loss = None


@contextmanager
def _seeded() -> Iterator[None]:
    """Random numbers from SEED on, and the caller's as they were afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


@contextmanager
def _fastest_convolutions() -> Iterator[None]:
    """cuDNN tries its algorithms out, as training scripts let it."""
    if torch.backends.flags_frozen():  # by torch.testing, in a process that runs torch's own tests
        yield
        return
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _known(argument: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"networks.run: {argument} must be of {', '.join(known)}, got {name!r}")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
