"""How problems are cut: the plan as a pure function, and the walk of its slabs element by element. No GPU, and no launch but the last ones.

Three views of the same plans: what the library tells of them (`Library.describe`), the very `Slab` of the kernels compiled into a small
library that needs no memory (walks.cpp), and a model of walk.h in Python's integers, which do not overflow.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import math
import os
import random
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import normfused
import normfused.functional as F
from bench import slab_plans
from normfused import explain
from normfused.backends.cuda import _load
from normfused.problem import BATCH_INSTANCE, CHANNEL, MEAN_ONLY, NHWC, POSITION, RENORM, RMS, SAMPLE_GROUP, STANDARD, Problem

from ..emulation.machine import ROOT, compile_command
from ..support import cases
from .cases import LIMITS, ROUTES, SMALL, Case, Machine, forced

# processors, shared bytes of a block (opt-in) and of a processor, threads of a processor, blocks of a cluster, processors to spare
DEVICES = {
    "A100": (108, 166912, 167936, 2048, 1, 0),
    "4090": (128, 101376, 102400, 1536, 1, 0),
    "H100": (132, 232448, 233472, 2048, 8, 0),
    "H200": (132, 232448, 233472, 2048, 8, 0),
    "H200, a few to spare": (132, 232448, 233472, 2048, 8, 8),
    "B200": (148, 232448, 233472, 2048, 8, 0),
    "5090": (170, 101376, 102400, 1536, 8, 0),
}
BLOCK, CLUSTER, GROUP = range(3)
SCOPES = [CHANNEL, SAMPLE_GROUP, POSITION]
RULES = [STANDARD, RMS, MEAN_ONLY, RENORM, BATCH_INSTANCE]
TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
STEPS = ["norm_act", "norm_act_backward", "moments", "apply", "grad_moments", "grad_apply"]
WHOLE_STEPS = STEPS[:2]


@dataclass(frozen=True)
class Question:
    """The fields of the struct in walks.cpp, in its order."""

    scope: str
    N: int
    C: int
    S: int
    groups: int = 1
    layout: str = "nchw"
    dtype: torch.dtype = torch.bfloat16
    step: str = "norm_act"
    route: str | None = None
    pool: bool = True
    cumulative: bool = False
    batch_statistics: bool = True
    residual: str | None = None
    act: int = 1  # relu
    device: tuple[int, ...] = DEVICES["H200"]
    columns: bool = False
    rule: str = STANDARD

    @property
    def V(self) -> int:
        return 16 // self.dtype.itemsize

    @property
    def elements(self) -> int:
        return self.N * self.C * self.S

    @property
    def numbers(self) -> ctypes.Array[ctypes.c_int64]:
        route = ROUTES[self.route]
        residual = {None: 0, "pre_act": 1, "post_act": 2, "pre_norm": 3}[self.residual]
        numbers = (
            SCOPES.index(self.scope), self.layout == NHWC, TYPES.index(self.dtype), self.N, self.C, self.S, self.groups,
            RULES.index(self.rule), self.batch_statistics, self.cumulative, residual, self.act, STEPS.index(self.step), 7, route,
            self.pool, *self.device, self.columns,
        )  # fmt: skip
        return (ctypes.c_int64 * len(numbers))(*map(int, numbers))

    @property
    def problem(self) -> Problem:
        return Problem(
            self.scope, self.rule, self.N, self.C, self.S, self.groups, self.layout, self.dtype, torch.device("cpu"),
            1e-5, None if self.cumulative else 0.1, self.batch_statistics, cases.parse("relu" if self.act else None), self.residual,
        )  # fmt: skip


class Walks:
    """The plans and slabs of walks.cpp."""

    def __init__(self) -> None:
        source = Path(__file__).parent / "walks.cpp"
        digest = hashlib.sha256(source.read_bytes())
        for path in sorted((ROOT / "csrc/kernels").glob("*.*h")):
            digest.update(path.read_bytes())
        made = ROOT / f"build/emulation-tests/walks-{digest.hexdigest()[:16]}.so"
        if not made.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            partial = made.with_suffix(f".{os.getpid()}.so")
            subprocess.run(compile_command("-Wno-unknown-pragmas", "-shared", source, "-o", partial), check=True)
            partial.rename(made)
        self.c = ctypes.CDLL(str(made))
        for function in (self.c.nf_plan, self.c.nf_cover, self.c.nf_look):
            function.restype = ctypes.c_char_p

    def plan(self, q: Question) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.c.nf_plan(q.numbers))
        return found


@functools.cache
def walks() -> Walks:
    return Walks()


# ------------------------------------------------------------------------------------------------------------ a plan is legal
def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def refused(q: Question, at: dict[str, Any]) -> bool:
    """What run() refuses: offsets inside a slab have 32 bits, and columns of groups are counted by 20."""
    if q.scope == POSITION and q.layout == "nchw" and q.S > 1 and q.C * q.S >= 2**32 - 128:
        return True
    return q.scope == SAMPLE_GROUP and q.C >= 2**20 and not at["wide"] and q.groups < q.C


def check_legal(q: Question, launchable: bool = True) -> dict[str, Any]:
    """What any device would launch, and products that a plan holds in 32 bits recomputed without a limit."""
    at = walks().plan(q)
    if refused(q, at):
        return at
    block_bytes = q.device[1]
    assert 32 <= at["threads"] <= 1024, at
    assert at["threads"] % 32 == 0, at
    assert 0 <= at["shared_bytes"] <= block_bytes, at
    assert at["blocks"] >= 1, at
    assert not launchable or at["blocks"] < 2**31, at
    assert 1 <= at["team"] * at["teams"] * at["sets_per_block"] * at["samples"] <= at["threads"], at
    assert at["per_row"] == _ceil(at["chunk_vectors"], at["team"]), at
    assert at["steps"] == _ceil(at["chunk_rows"], at["teams"]) * at["per_row"] >= 1, at
    least_chunks = (
        _ceil(at["walk_rows"] // at["sample_rows"], at["samples"]) * _ceil(at["sample_rows"], at["chunk_rows"]) * at["vector_chunks"]
    )
    assert at["chunks"] == least_chunks or (at["owner"] == CLUSTER and least_chunks <= at["chunks"] <= q.device[4]), at
    assert at["vector_chunks"] * at["chunk_vectors"] >= at["row_vectors"] if at["wide"] else at["slices"] * at["slice"] >= at["cols"], at
    slabs = _ceil(at["outers"], at["sets_per_block"]) if at["wide"] else at["outers"] * at["slices"]
    assert at["units"] == slabs * at["chunks"] >= at["blocks"], at
    check_owner(q, at)
    # what stays on chip beside the last batch: x, or x and dy, or with the residual or mask that z is known from
    backward = q.step in ("norm_act_backward", "grad_moments", "grad_apply")
    vector = 16 * (1 + backward) + (backward and q.residual == "pre_act" and q.act > 0)
    batches = _ceil(at["steps"], at["batch"])
    assert at["resident"] * at["batch"] * at["threads"] * vector <= at["slab_bytes"] <= at["shared_bytes"], at
    assert 0 <= at["resident"] < batches, at
    if at["route"] == 0 and q.scope != POSITION and at["owner"] != GROUP:
        assert at["resident"] == batches - 1, at
    return at


def check_owner(q: Question, at: dict[str, Any]) -> None:
    """Blocks that share a set: as many as there are chunks, and on the device at one time."""
    processors, _, processor_bytes, threads, largest, spare = q.device
    assert at["owner"] == BLOCK or (at["route"] == 0 and at["sets_per_block"] == 1 and at["chunks"] > 1), at
    if at["owner"] == BLOCK:
        assert at["route"] != 0 or at["chunks"] == 1, at
    elif at["owner"] == CLUSTER:
        assert at["chunks"] in (2, 4, 8), at
        assert at["chunks"] <= largest, at
        assert at["blocks"] == at["units"], at
    else:
        assert q.pool, at
        assert at["blocks"] == at["groups"] * at["chunks"], at
        assert 1 <= at["groups"] <= at["outers"] * (1 if at["wide"] else at["slices"]), at
        # the system keeps 1 KB of every block; kernels have up to 128 registers a thread (narrow sets: 168), of 65,536
        registers = 128 if at["wide"] else 168
        at_once = min(processor_bytes // (at["shared_bytes"] + 1024), threads // at["threads"], 65536 // (registers * at["threads"]))
        assert at["blocks"] <= (processors - spare) * at_once, at


LENGTH = st.integers(1, 40) | st.integers(1, 3000) | st.sampled_from([2**k + d for k in range(4, 21) for d in (-1, 0, 1)])


@st.composite
def questions(draw: st.DrawFn, length: st.SearchStrategy[int], width: st.SearchStrategy[int]) -> Question:
    scope = draw(st.sampled_from(SCOPES))
    step = draw(st.sampled_from(STEPS))
    if step not in WHOLE_STEPS:
        scope = SAMPLE_GROUP
    groups = draw(st.integers(1, 40)) if scope == SAMPLE_GROUP else 1
    C = groups * draw(width)
    if step not in WHOLE_STEPS:
        groups = C
    S = draw(length)
    rule = draw(st.sampled_from([STANDARD, BATCH_INSTANCE])) if scope == CHANNEL and S > 1 and step in WHOLE_STEPS else STANDARD
    return Question(
        scope, draw(length), C, S, groups, draw(st.sampled_from(["nchw", NHWC])), draw(st.sampled_from(TYPES)), step,
        draw(st.sampled_from([None, "single_pass", "two_pass", "cluster", "group"])) if step in WHOLE_STEPS else None,
        draw(st.booleans()), scope == CHANNEL and draw(st.booleans()), scope != CHANNEL or draw(st.booleans()),
        draw(st.sampled_from([None, "pre_act", "post_act"])), draw(st.integers(0, 1)), draw(st.sampled_from(list(DEVICES.values()))),
        rule=rule,
    )  # fmt: skip


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(q=questions(LENGTH, st.integers(1, 70) | st.integers(1, 9000)))
def test_any_plan_is_legal(q: Question) -> None:
    # a launch has fewer than 2^31 blocks: the one thing that a tensor can be too large for, and it is refused
    check_legal(q, launchable=q.elements < 2**36)
    assert walks().plan(q) == walks().plan(replace(q)), "a plan is a function"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step", WHOLE_STEPS)
@pytest.mark.parametrize("layout", ["nchw", NHWC])
@pytest.mark.parametrize("scope", SCOPES)
def test_edges_are_legal(scope: str, layout: str, step: str, device: str) -> None:
    """One channel, one position, one sample, a group per channel, everything odd, or so large that bytes of a set pass 2^31 and 2^32."""
    shapes = [
        (1, 1, 1), (7, 1, 1), (1, 7, 1), (1, 1, 7), (3, 5, 7), (2**20 + 1, 3, 1), (1, 3, 2**20 + 1), (1, 2**20 + 1, 3), (1, 1, 2**31 + 8),
        (16, 64, 2**20), (64, 32, 2**21), (3, 5, 2**30), (1, 2, 2**30 + 8), (5, 2**29, 1), (3, 2**31 - 8, 1), (2, 2**25, 3),
        (2**31 + 1, 1, 1),
    ]  # fmt: skip
    for N, C, S in shapes:
        for dtype in TYPES:
            for groups in (1, C) if scope == SAMPLE_GROUP else (1,):
                for route in (None, "single_pass", "two_pass", "cluster", "group"):
                    check_legal(
                        Question(scope, N, C, S, groups, layout, dtype, step, route, device=DEVICES[device]), launchable=N * C * S < 2**31
                    )


@pytest.mark.parametrize("device", ["4090", "5090"])
def test_sums_that_take_a_whole_block_are_legal(device: str) -> None:
    """Rows of 1408 and 2240 channels: their sums take what two blocks of a processor, or one, have for a slab, to the byte."""
    for C in range(1376, 2273, 8):
        for step in WHOLE_STEPS:
            check_legal(Question(SAMPLE_GROUP, 4, C, 784, 1, NHWC, torch.float16, step, device=DEVICES[device]))


# ------------------------------------------------------------------------------------------------- every element exactly once
def check_covered(q: Question) -> None:
    at = walks().plan(q)
    elements = (ctypes.c_uint8 * q.elements)()
    mask = (ctypes.c_uint8 * (at["outers"] * at["walk_rows"] * at["row_vectors"]))()
    wrong = walks().c.nf_cover(q.numbers, elements, mask).decode()
    assert not wrong, f"{wrong}: {at}"
    assert bytes(elements) == b"\1" * q.elements, f"an element is met {sorted(set(bytes(elements)))} times: {at}"
    assert max(bytes(mask)) == 1, f"a byte of the mask has two vectors: {at}"
    phased = at["phase_mask"] != 0  # a run that starts on a boundary touches one vector fewer
    assert phased or min(bytes(mask)) == 1, f"a byte of the mask has no vector: {at}"


SHORT = st.integers(1, 9) | st.integers(1, 70)


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(
    q=questions(SHORT, st.integers(1, 9)),
    processors=st.integers(1, 40),
    shared=st.sampled_from([40000, 65536, 232448]),
    largest=st.sampled_from([1, 8]),
)
def test_every_element_is_met_once(q: Question, processors: int, shared: int, largest: int) -> None:
    """By some thread of some slab, in a vector that knows its set, channel and place in the mask, forth and back."""
    q = replace(q, device=(processors, shared, 233472, 2048, largest, 0))
    check_covered(q)
    q = replace(q, step="norm_act_backward", columns=True)
    if q.scope == POSITION and walks().plan(q)["columns_pass"]:
        check_covered(q)


@pytest.mark.parametrize("step", WHOLE_STEPS)
@pytest.mark.parametrize("route", ["single_pass", "two_pass", "cluster", "group"])
@pytest.mark.parametrize(
    "q",
    [
        Question(CHANNEL, 2, 3, 40001),
        Question(CHANNEL, 40001, 3, 2),
        Question(CHANNEL, 2, 71, 2000, layout=NHWC),
        Question(CHANNEL, 70, 3, 500, rule=BATCH_INSTANCE),
        Question(CHANNEL, 5, 3, 40001, rule=BATCH_INSTANCE),
        Question(CHANNEL, 37, 71, 50, layout=NHWC, rule=BATCH_INSTANCE),
        Question(CHANNEL, 3, 24, 2000, layout=NHWC, rule=BATCH_INSTANCE),
        Question(SAMPLE_GROUP, 1, 4, 60007, 2),  # a row over several chunks
        Question(SAMPLE_GROUP, 2, 9000, 3, layout=NHWC),  # sets wider than a block
        Question(SAMPLE_GROUP, 1, 10002, 5, 2, layout=NHWC),
        Question(POSITION, 6, 12001, 1),
        Question(POSITION, 3, 40007, 2, layout=NHWC),
        Question(POSITION, 2, 5000, 17),
        Question(POSITION, 2, 5000, 16),
    ],
)
def test_large_ones_are_met_once(q: Question, route: str, step: str) -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        for device in ((2, 40000, 65536, 512, 8, 0), (2, 40000, 65536, 512, 1, 0), DEVICES["H200"]):
            asked = replace(q, route=route, step=step, dtype=dtype, device=device)
            check_covered(asked)
            if step == "norm_act_backward" and walks().plan(asked)["columns_pass"]:
                check_covered(replace(asked, columns=True))


# --------------------------------------------------------------------------------------------- more elements than 32 bits count
def expected_spot(at: dict[str, Any], V: int, unit: int, thread: int, step: int) -> tuple[int, int, int, int] | None:
    """walk.h in integers without an end: address, first and last lane, byte of the mask. None: the thread has no vector there."""
    threads = at["team"] * at["teams"]
    group, first_column = 0, 0
    if at["wide"]:
        if at["sets_per_block"] > 1:
            group, thread = divmod(thread, threads)
        unit, chunk = divmod(unit, at["chunks"])
        outer = unit * at["sets_per_block"] + group
    else:
        if at["chunks_adjoin"]:
            unit, chunk = divmod(unit, at["chunks"])
            outer, part = divmod(unit, at["slices"])
        else:
            unit, part = divmod(unit, at["slices"])
            outer, chunk = divmod(unit, at["chunks"])
        first_column = part * at["slice"]
    row_lane, lane = divmod(thread, at["team"])
    row_chunk, vector_chunk = divmod(chunk, at["vector_chunks"])
    rows_done, vectors_done = divmod(step, at["per_row"])
    row = row_lane + rows_done * at["teams"]
    vector = lane + vectors_done * at["team"]
    if row_lane >= at["teams"] or outer >= at["outers"] or row >= at["chunk_rows"] or vector >= at["chunk_vectors"]:
        return None
    row += row_chunk * at["chunk_rows"]
    vector += vector_chunk * at["chunk_vectors"]
    if row >= at["walk_rows"]:
        return None
    high, low = divmod(outer, at["period"])
    run = high * at["high_stride"] + low * at["low_stride"] + row * at["row_stride"]
    column = first_column + vector * V - (run & at["phase_mask"] if at["wide"] else 0)
    end = at["cols"] if at["wide"] else min(at["cols"], first_column + at["slice"])
    first, last = max(0, -column), min(V, end - column)
    if last <= first:
        return None
    vector += first_column // V
    strip = vector >> at["mask_shift"] << at["mask_shift"]  # its first vector
    width = min(1 << at["mask_shift"], at["row_vectors"] - strip)
    return run + column, first, last, (outer * at["row_vectors"] + strip) * at["walk_rows"] + row * width + vector - strip


@pytest.mark.parametrize("step", WHOLE_STEPS)
@pytest.mark.parametrize("route", ["single_pass", "two_pass", "cluster", "group"])
@pytest.mark.parametrize("layout", ["nchw", NHWC])
@pytest.mark.parametrize(
    ("scope", "groups"),
    [(CHANNEL, 1), (SAMPLE_GROUP, 1), (SAMPLE_GROUP, 0), (POSITION, 1)],
    ids=["channel", "one-group", "instance", "position"],
)
@pytest.mark.parametrize(
    "shape", [(1, 3, 2**30 + 8), (3, 2, 2**30 + 3), (2**20 + 1, 3, 4099), (70001, 256, 1024), (3, 2**30 + 3, 1), (9, 70000, 30011)]
)
def test_addresses_beyond_32_bits(shape: tuple[int, int, int], scope: str, groups: int, layout: str, route: str, step: str) -> None:
    """Corners and random vectors of tensors of 2^31 to 2^35 elements: exact, of the right set and channel, inside the tensor."""
    choose = random.Random(repr((shape, scope, groups, layout, route, step)))
    for dtype in (torch.bfloat16, torch.float64):
        q = Question(scope, *shape, groups or shape[1], layout, dtype, step, route)
        for columns in (False, True):
            q = replace(q, columns=columns)
            at = walks().plan(q)
            if (columns and not at["columns_pass"]) or refused(q, at):
                break
            last = (at["units"] - 1, at["threads"] - 1, at["steps"] - 1)
            cursors = [(u, t, s) for u in (0, last[0]) for t in (0, last[1]) for s in (0, last[2])]
            cursors += [tuple(choose.randint(0, end) for end in last) for _ in range(300)]
            met = 0
            for unit, thread, walked in cursors:
                out = (ctypes.c_int64 * 4)()
                wrong = walks().c.nf_look(q.numbers, ctypes.c_int64(unit), ctypes.c_int64(thread), ctypes.c_int64(walked), out)
                assert not wrong, (wrong, unit, thread, walked, at)
                expected = expected_spot(at, q.V, unit, thread, walked)
                assert (expected is None) == (out[2] == 0), (unit, thread, walked, at)
                if expected is not None:
                    assert tuple(out) == expected, (unit, thread, walked, at)
                    met += out[0] >= 2**31
            assert met, "no address was beyond 32 bits"


# ----------------------------------------------------------------------------------------------------------- without a pool
@pytest.fixture
def emulated(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("only the emulation pretends")


@pytest.mark.parametrize("layout", ["nchw", NHWC])
@pytest.mark.parametrize("dtype", TYPES)
def test_cumulative_average_without_a_pool(dtype: torch.dtype, layout: str, emulated: None) -> None:
    """One launch needs an arrival word, so that the last block counts; without one two launches give the same numbers and count once."""
    outs, counters = [], []
    for pool in (True, False):
        case = Case(CHANNEL, shape=(4, 6, 5, 3), layout=layout, dtype=dtype, tracked=True, momentum=None, act="relu", limits=(*SMALL, pool))
        case.check()
        counters.append(int(case.running[2]))
        q = Question(CHANNEL, 4, 6, 15, layout=layout, dtype=dtype, cumulative=True, pool=pool, device=SMALL)
        assert walks().plan(q)["route"] == (0 if pool else 1)
        outs.append([*case.forward()[:3], *case.running[:2]])
    assert counters == [5, 5]
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other, rtol=10 * cases.TOLERANCE[dtype], atol=cases.TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["group", "instance", "filter response, one eps", "position", "position rms"])
@pytest.mark.parametrize("layout", ["nchw", NHWC])
def test_parameters_without_a_pool(kind: str, layout: str, emulated: None) -> None:
    """Their gradients take a launch of their own, where else the last block sums them."""
    for pool in (True, False):
        Case(shape=(4, 6, 5, 3), layout=layout, act="prelu", limits=(*SMALL, pool), **cases.KINDS[kind]).check()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_is_counted(momentum: float | None, device: torch.device) -> None:
    """As by torch: the running statistics stay, the counter moves on."""
    mean, var, counter = torch.zeros(6, device=device), torch.ones(6, device=device), torch.tensor(4, device=device)
    x = torch.zeros(0, 6, 5, 3, device=device)
    y = F.batch_norm_act(x, mean, var, training=True, momentum=momentum, num_batches_tracked=counter, act="relu", backend="cuda")
    assert y.shape == x.shape
    assert int(counter) == 5
    assert torch.equal(mean, torch.zeros_like(mean))
    assert torch.equal(var, torch.ones_like(var))


# ------------------------------------------------------------------------------------------------------- what the library tells
def test_the_library_tells_the_same_plan(device: torch.device) -> None:
    """describe() and walks.cpp are compiled from one plan.h; describe() says it of a device it is given."""
    loaded = _load.library()
    assert loaded is not None
    if loaded.module is None:
        pytest.skip("the module was not built for this Python")
    choose = random.Random(0)
    for _ in range(200):
        q = Question(
            choose.choice(SCOPES), choose.randint(1, 300), 12 * choose.randint(1, 99), choose.randint(1, 5000), 1,
            choose.choice(["nchw", NHWC]), choose.choice(TYPES), choose.choice(WHOLE_STEPS), device=choose.choice(list(DEVICES.values())),
        )  # fmt: skip
        told = loaded.describe(q.problem, q.step, 7, dict(zip(LIMITS, q.device, strict=True)), True)
        assert told is not None
        at = walks().plan(q)
        same = ("blocks", "threads", "team", "teams", "steps", "batch", "resident", "slice", "chunks", "shared_bytes", "groups")
        assert {name: told[name] for name in same} == {name: at[name] for name in same}
        assert told["route"] == ("single_pass", "two_pass", "apply")[at["route"]]


def test_the_table_of_slabs_is_current(device: torch.device) -> None:
    """docs/slabs.md is what this plan says; if not: python -m bench.slab_plans"""
    loaded = _load.library()
    assert loaded is not None
    if loaded.module is None:
        pytest.skip("the module was not built for this Python")
    assert slab_plans.PAGE.read_text() == slab_plans.page(loaded)


@pytest.mark.parametrize("layer", slab_plans.LAYERS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("step", WHOLE_STEPS)
def test_what_fits_the_device_is_read_once(layer: slab_plans.Layer, step: str) -> None:
    """On an H200: sets of up to 30 MB forward, of up to 15 MB backward (two inputs); and the larger ones as far as they fit."""
    q = Question(layer.scope, layer.N, layer.C, layer.S, layer.groups, step=step)
    at = walks().plan(q)
    set_bytes = layer.tensor_bytes / layer.sets
    assert at["route"] == 0
    if set_bytes * (2 if "backward" in step else 1) <= 30e6:
        assert at["read_x"] == 1, at
    else:
        assert at["read_x"] <= 1.05 * (2 - 30e6 / 2 / set_bytes), at


@pytest.mark.parametrize("layer", slab_plans.LAYERS_NHWC, ids=lambda layer: layer.name)
@pytest.mark.parametrize("step", WHOLE_STEPS)
def test_slices_that_fit_the_device_are_read_once(layer: slab_plans.Layer, step: str) -> None:
    """On an H200: slices of 64 bytes of channels up to 26 MB forward and 13 MB of each input backward; of the others what fits, if it is a
    fifth of the slice at least."""
    at = walks().plan(Question(layer.scope, layer.N, layer.C, layer.S, layer.groups, layer.layout, step=step, residual=layer.residual))
    least = 2 * math.lcm(32, layer.C // layer.groups if layer.scope == SAMPLE_GROUP else 1)
    held = layer.held_bytes(least // 2) * (2 + (layer.residual is not None) / 16 if "backward" in step else 1)
    if held <= 26e6:
        assert at["read_x"] == 1, at
    elif held <= 4.5 * 26e6:
        assert at["route"] == 0, at
        assert at["read_x"] <= 1.05 * (2 - 26e6 / held), at
    else:
        assert at["read_x"] <= 2, at


def spoken_for(case: Case) -> tuple[str, ...]:
    with forced(case.route, case.limits):
        return explain(lambda x: F.instance_norm_act(x, act="relu", backend="cuda"), case.x).plan


def test_explain_tells_the_owner(emulated: None) -> None:
    case = Case(SAMPLE_GROUP, groups=2, shape=(1, 2, 200, 224), dtype=torch.float32, limits=(4, 80000, 162048, 512, 8, 0))
    assert "a set to a cluster of 4 blocks" in spoken_for(case)[0]
    case.limits = (4, 80000, 162048, 512, 1, 0)
    assert "a set to 4 blocks that run together, 2 sets at a time" in spoken_for(case)[0]


def test_processors_to_spare(emulated: None) -> None:
    """Of those that run together only; a device that is all spared still has one."""
    case = Case(SAMPLE_GROUP, groups=2, shape=(1, 2, 200, 224), dtype=torch.float32, limits=(4, 80000, 162048, 512, 1, 0))
    try:
        for spare, blocks in ((0, 8), (2, 4), (99, 2)):
            normfused.set_spare_processors(spare)
            case.check()
            assert f" {blocks} blocks of 256 threads" in spoken_for(case)[0], spoken_for(case)
    finally:
        normfused.set_spare_processors(0)


@pytest.mark.parametrize(("count", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_wrong_processors_to_spare(count: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"set_spare_processors: count must .*, got"):
        normfused.set_spare_processors(count)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_a_group_without_room_takes_two_launches(act: str, machine: Machine, emulated: None) -> None:
    """The device says that a cooperative grid is too large: other work holds its processors. The same call then runs without."""
    case = Case(SAMPLE_GROUP, groups=2, shape=(1, 4, 160, 200), act=act, residual="pre_act", limits=None)
    launches = []
    with forced(None, (4, 80000, 162048, 512, 1, 0)):
        for processors in (4, 1):
            with machine.mode(traffic=True):
                machine.c.nf_emulation_limits(processors, 80000, 162048)
                case.check()
                launches.append([kernel["kernel"] for kernel in machine.counters()["kernels"]])
    assert launches[0] == ["single_pass", "grad_single_pass"]
    assert launches[1] == ["moments", "apply", "grad_moments", "grad_apply", "grad_parameters"]


@pytest.mark.parametrize("layout", ["nchw", NHWC])
@pytest.mark.parametrize("rule", [STANDARD, BATCH_INSTANCE])
def test_a_cluster_without_room_takes_other_launches(rule: str, layout: str, machine: Machine, emulated: None) -> None:
    """In a part of a device (MPS, green contexts) there may be no place for a cluster that the device's properties promise."""
    gates = 8 if rule == BATCH_INSTANCE else 0
    case = Case(CHANNEL, rule, (8, 8, 33, 20), layout=layout, route="cluster", rule_weights=gates, act="relu", tracked=True, limits=SMALL)
    launches = []
    try:
        for largest in (8, 1):
            with machine.mode(traffic=True):
                machine.c.nf_emulation_largest_cluster(largest)
                replace(case).check()
                launches.append([kernel["kernel"] for kernel in machine.counters()["kernels"]])
    finally:
        machine.c.nf_emulation_largest_cluster(8)
    assert launches[0] == ["single_pass", "grad_single_pass"]
    assert launches[1][-1] == "grad_apply"
    assert "single_pass" not in launches[1]


def test_batch_instance_norm_without_room_takes_the_steps(machine: Machine, emulated: None) -> None:
    """It has no launch per pass: the moments of every (n, c) and the rule on them stand in."""
    case = Case(CHANNEL, BATCH_INSTANCE, (8, 3, 64, 100), rule_weights=3, act="relu", residual="pre_act", tracked=True, limits=None)
    launches = []
    with forced("group", (4, 80000, 162048, 512, 1, 0)):
        for processors in (4, 1):
            made = replace(case, route="group")
            with machine.mode(traffic=True):
                machine.c.nf_emulation_limits(processors, 80000, 162048)
                made.check()
                launches.append([kernel["kernel"] for kernel in machine.counters()["kernels"]])
    assert launches[0] == ["single_pass", "grad_single_pass"]
    assert launches[1] == ["moments", "settle", "apply", "grad_moments", "grad_settle", "grad_apply"]


LAYERS_OF_CHANNELS = [layer for layer in (*slab_plans.LAYERS, *slab_plans.LAYERS_NHWC) if layer.scope == CHANNEL]


@pytest.mark.parametrize("step", WHOLE_STEPS)
@pytest.mark.parametrize("layer", LAYERS_OF_CHANNELS, ids=lambda layer: f"{layer.name}, {layer.layout}")
def test_batch_instance_norm_stays_on_chip_as_batch_norm_does(layer: slab_plans.Layer, step: str) -> None:
    """Its teams keep to a sample each, which costs a slab a few threads, but hardly a part of what stays."""
    q = Question(CHANNEL, layer.N, layer.C, layer.S, layout=layer.layout, step=step)
    plain, apart = walks().plan(q), walks().plan(replace(q, rule=BATCH_INSTANCE))
    assert plain["route"] == apart["route"]
    assert apart["read_x"] <= plain["read_x"] + 0.05, (plain, apart)


def test_what_is_refused_says_so(device: torch.device) -> None:
    """Not silently: no number is written where there is no plan."""
    case = Case(SAMPLE_GROUP, shape=(1, 2**20), groups=2, device=device, limits=None)
    with pytest.raises(RuntimeError, match="no plan"):
        case.forward()


@pytest.mark.parametrize("layer", [*slab_plans.LAYERS, *slab_plans.LAYERS_NHWC], ids=lambda layer: f"{layer.name}, {layer.layout}")
def test_layers_of_whole_vectors_are_regular(layer: slab_plans.Layer) -> None:
    """Where a position's channels, or a channel's positions, are whole vectors: a thread has all lanes of a vector or none."""
    run = layer.C if layer.layout == NHWC or layer.S == 1 else layer.S
    at = walks().plan(Question(layer.scope, layer.N, layer.C, layer.S, layer.groups, layer.layout))
    assert at["regular"] == (run % 8 == 0), at
