"""How much of memory is asked for: promises of bytes and sectors per tensor, counted by the emulation.

Bytes are exact: a single pass asks for x once, two passes twice, and every large output is written once; where rows begin inside of
16-byte vectors, those at their ends are read whole and belong to two rows. So are sectors (32 bytes, the
grain of L2 and DRAM) where all runs begin and end on a sector's boundary. Elsewhere a request's piece of a run, of ``b`` bytes, touches
at most ``b / 32 + 2`` sectors (a part of one at each end), and a vector at the end of a run that is not whole is asked for element by
element: at most ``2*(V - 1)`` single elements a run, a sector each. Full-size shapes are checked by the plan's arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from normfused.backends import cuda as backend
from normfused.backends.cuda import _load
from normfused.problem import BATCH_INSTANCE, CHANNEL, MEAN_ONLY, NHWC, POSITION, PRE_NORM, RENORM, RMS, SAMPLE_GROUP, Problem

from ..support import cases
from .cases import LIMITS, SMALL, Case, Machine, forced
from .test_plan import DEVICES, Question, walks

Counters = dict[str, Any]
SECTOR = 32


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass
class Measured:
    """The counters of a call and its plan."""

    case: Case
    plan: dict[str, Any]
    counters: Counters
    backward: bool

    @property
    def bytes(self) -> int:
        return self.case.x.numel() * self.case.x.element_size()

    @property
    def V(self) -> int:
        return 16 // self.case.x.element_size()

    def of(self, tensor: str) -> dict[str, int]:
        found: dict[str, int] = self.counters["tensors"].get(tensor, {})
        return found

    @property
    def runs(self) -> tuple[int, int]:
        """Contiguous runs of the tensor as the kernels walk it, and bytes of each: rows of channels, or of positions."""
        p = self.case.p
        channels_last = p.layout == NHWC or p.S == 1
        length = p.C if channels_last else p.S
        return p.N * p.C * p.S // length, length * self.case.x.element_size()


def plan_of(case: Case, step: str, needs: int = 7) -> dict[str, Any]:
    library = _load.library()
    assert library is not None
    with forced(case.route, case.limits):
        limits = None if case.limits is None else dict(zip(LIMITS, case.limits, strict=True))
        plan = library.describe(case.p, step, needs, limits)
    if plan is None:
        pytest.skip("the module was not built for this Python")
    return plan


def measure(case: Case, machine: Machine, needs: tuple[bool, bool, bool] = (True, True, True), **mode: Any) -> tuple[Measured, Measured]:
    """A forward and a backward, counted."""
    with machine.mode(traffic=True, **mode):
        out = case.forward()
        forward = machine.counters()
        machine.reset()
        case.backward(*out, needs=needs)
        backward = machine.counters()
    codes = _load.pack_needs(needs[0], needs[1] and case.residual == "pre_act", needs[2])
    return Measured(case, plan_of(case, "norm_act"), forward, False), Measured(
        case, plan_of(case, "norm_act_backward", codes), backward, True
    )


# ------------------------------------------------------------------------------------------------------------------- promises
def beyond(m: Measured) -> int:
    """Bytes of its neighbours that are asked for with a row: where rows begin inside of vectors, the whole vectors at both ends."""
    runs, length = m.runs
    phased = m.plan["sets"] == "wide" and m.plan["channels"] == "rows" and length % 16 != 0
    return runs * 2 * (16 - m.case.x.element_size()) if phased else 0


def check_once(m: Measured, tensor: str, what: str, size: int) -> None:
    """Every byte once: as many as there are, and all of them."""
    found = m.of(tensor)
    most = size + (beyond(m) if what == "read" else 0)
    assert size <= found[f"{what}_bytes"] <= most, f"{tensor}: {found} of {size} bytes; {m.case}"
    assert found[f"{what}_distinct"] == _ceil(size, SECTOR), f"{tensor}: {found} of {size} bytes; {m.case}"


def reads_of_x(m: Measured) -> float:
    """How often x must be asked for: by its route, or as the plan of a position set that stays partly on chip says."""
    planned: float = m.plan["reads_of_x"]
    if m.case.p.scope != POSITION:
        assert planned == {"single_pass": 1, "two_pass": 2, "apply": 1}[m.plan["route"]]
    return planned


def check_reads(m: Measured, tensor: str, size: int, times: float) -> None:
    found = m.of(tensor)
    asked = found["read_bytes"] / size
    if times == int(times):
        assert times <= asked <= times * (1 + beyond(m) / size), (
            f"{tensor} is asked for {asked} times, not {times}: {found} of {size} bytes; {m.plan}; {m.case}"
        )
    else:  # vectors that are not there, at the edges of a slab, are part of the plan's count
        assert abs(asked - times) <= (m.plan["batch"] / m.plan["steps"]) + times * beyond(m) / size, (
            f"{tensor}: {asked}, not {times}; {m.plan}; {m.case}"
        )
    assert found["read_distinct"] == _ceil(size, SECTOR)


def check_sectors(m: Measured, tensor: str, what: str) -> None:
    """The bound of this file's head."""
    found = m.of(tensor)
    sectors, asked, requests = found[f"{what}_sectors"], found[f"{what}_bytes"], found[f"{what}_requests"]
    runs, length = m.runs
    times = asked / m.bytes
    runs *= m.plan["pieces"]  # a row that several blocks share
    note = f"{tensor}: {found}, {runs} runs of {length} bytes; {m.plan}; {m.case}"
    if length % SECTOR == 0 and m.plan["pieces"] == 1:
        assert sectors * SECTOR == asked, note
        return
    pieces = requests + times * runs * m.plan["steps"]
    phased = m.plan["sets"] == "wide" and m.plan["channels"] == "rows"
    if length % 16 != 0 and not phased:
        # lanes keep their columns, so that no vector is aligned: element by element, and each request touches what one of vectors would
        assert sectors <= m.V * (asked / SECTOR + 2 * pieces), note
    else:
        # only at the end of the tensor there is nothing to read beyond a row
        ends = 1 if phased and what == "read" else runs * 2
        assert sectors <= asked / SECTOR + 2 * pieces + times * ends * (m.V - 1), note


def check_forward(m: Measured) -> None:
    case, times = m.case, reads_of_x(m)
    pre_norm = case.residual == PRE_NORM
    check_reads(m, "x", m.bytes, 1 if pre_norm else times)
    check_once(m, "y", "write", m.bytes)
    if case.residual:
        check_once(m, "residual", "read", m.bytes)
    if pre_norm:
        check_once(m, "h", "write", m.bytes)
        again = m.of("h").get("read_bytes", 0) / m.bytes
        assert abs(again - (times - 1)) <= m.plan["batch"] / m.plan["steps"]
    if case.mask is not None:
        check_mask(m, "write", 1)
    for tensor, what in (("x", "read"), ("residual", "read"), ("y", "write"), ("h", "write")):
        if m.of(tensor):
            check_sectors(m, tensor, what)


def check_backward(m: Measured, needs: tuple[bool, bool, bool] = (True, True, True)) -> None:
    case, times = m.case, reads_of_x(m)
    z_is_recomputed = case.residual == "pre_act" and case.p.act.name != "identity" and case.mask is None
    check_reads(m, "x", m.bytes, times)
    check_reads(m, "dy", m.bytes, times)
    if z_is_recomputed:
        check_reads(m, "residual", m.bytes, times)
    else:
        assert not m.of("residual"), "nothing needs the residual"
    if case.mask is not None:
        check_mask(m, "read", times)
    if case.dh is not None:
        check_once(m, "dh", "read", m.bytes)
    if needs[0]:
        check_once(m, "dx", "write", m.bytes)
    if needs[1] and case.residual == "pre_act" and case.p.act.name != "identity":
        check_once(m, "dresidual", "write", m.bytes)
    for tensor, what in (("x", "read"), ("dy", "read"), ("residual", "read"), ("dh", "read"), ("dx", "write"), ("dresidual", "write")):
        if m.of(tensor) and (what == "write" or times == int(times)):
            check_sectors(m, tensor, what)


def check_mask(m: Measured, what: str, times: float) -> None:
    """A bit an element in bytes of their own for each vector of memory that a run touches."""
    size = backend.mask_bytes(m.case.p)
    found = m.of("mask")[f"{what}_bytes"]
    if times != int(times):
        assert abs(found / size - times) <= m.plan["batch"] / m.plan["steps"]
        return
    # a run that begins on a boundary touches one vector fewer than there is room for
    assert times * (size - m.runs[0]) <= found <= times * size, (found, size, m.case)
    if m.runs[1] % 16 == 0:
        assert found == times * m.bytes // 16


# --------------------------------------------------------------------------------------------------------------- scaled shapes
LADDER = {
    "sectors": (2, 48, 8, 4),  # runs of whole sectors, of any type, in either layout
    "vectors": (3, 24, 4, 6),  # whole vectors of half types
    "ragged": (3, 24, 7, 9),
    "odd channels": (2, 15, 5, 8),
    "odd everything": (3, 21, 7, 5),
    "one position": (40, 24),
    "long": (2, 6, 24, 16),
}
SETS: dict[str, dict[str, Any]] = {
    "channel": {"scope": CHANNEL},
    "group": {"scope": SAMPLE_GROUP, "groups": 3},
    "instance": {"scope": SAMPLE_GROUP, "groups": 0},
    "position": {"scope": POSITION},
    "position rms": {"scope": POSITION, "rule": RMS},
}
# float16 is cut like bfloat16
QUICK_DTYPES = [pytest.param(t, marks=pytest.mark.slow) if t == torch.float16 else t for t in cases.DTYPES]
MODES: list[dict[str, Any]] = [
    {"act": "silu"},
    {"act": "relu", "residual": "pre_act"},  # a mask
    {"act": "gelu", "residual": "pre_act"},  # z is recomputed from the residual
    {"act": "relu", "residual": "post_act"},
]


def make(sets: str, shape: tuple[int, ...], layout: str, **options: Any) -> Case:
    if len(shape) == 2 and (layout == NHWC or sets == "instance"):
        pytest.skip("channels are contiguous already, or a set would be one element")
    own = dict(SETS[sets])
    if own.get("groups") == 0:
        own["groups"] = shape[1]
    return Case(shape=shape, layout=layout, **own, **options)


@pytest.mark.parametrize("route", ["single_pass", "two_pass"])
@pytest.mark.parametrize("dtype", QUICK_DTYPES)
@pytest.mark.parametrize("layout", ["nchw", NHWC])
@pytest.mark.parametrize("rung", LADDER)
@pytest.mark.parametrize("sets", SETS)
def test_promises(sets: str, rung: str, layout: str, dtype: torch.dtype, route: str, machine: Machine) -> None:
    modes = list(MODES)
    if sets.startswith("position"):
        modes.append({"act": "relu", "residual": PRE_NORM})
    for mode in modes:
        limits = None if rung == "long" else SMALL
        forward, backward = measure(make(sets, LADDER[rung], layout, dtype=dtype, route=route, limits=limits, **mode), machine)
        assert sets.startswith("position") or forward.plan["route"] == backward.plan["route"] == route
        check_forward(forward)
        check_backward(backward)


@pytest.mark.parametrize("route", ["single_pass", "cluster", "group", "two_pass"])
@pytest.mark.parametrize("layout", ["nchw", NHWC])
@pytest.mark.parametrize("rule", [MEAN_ONLY, RENORM])
def test_rules_of_batch_norms_sets(rule: str, layout: str, route: str, machine: Machine) -> None:
    """As batch norm: x is asked for once in a single pass; each running statistic is read before it moves, and written once."""
    for mode in MODES[:2]:
        case = Case(CHANNEL, rule, LADDER["long"], layout=layout, dtype=torch.bfloat16, route=route, tracked=True, **mode)
        forward, backward = measure(case, machine)
        for m in (forward, backward):
            assert m.plan["route"] == ("two_pass" if route == "two_pass" else "single_pass")
        check_forward(forward)
        check_backward(backward)
        for name in ("running_mean", "running_var") if rule == RENORM else ("running_mean",):
            assert forward.of(name)["write_bytes"] == 4 * case.p.C, name
            assert not backward.of(name), "running statistics are no part of a backward"


@pytest.mark.parametrize("route", ["single_pass", "cluster", "group"])
@pytest.mark.parametrize("layout", ["nchw", NHWC])
@pytest.mark.parametrize("statistics", [True, False])
def test_samples_take_no_pass_of_their_own(statistics: bool, layout: str, route: str, machine: Machine) -> None:
    """Batch-instance norm reads x once for the statistics of the samples and of the batch, and so in evaluation."""
    for rung in ("sectors", "ragged", "long"):
        for mode in (MODES[0], MODES[2]):
            case = Case(
                CHANNEL, BATCH_INSTANCE, LADDER[rung], layout=layout, dtype=torch.bfloat16, route=route, tracked=True,
                rule_weights=LADDER[rung][1], batch_statistics=statistics, **mode,
            )  # fmt: skip
            forward, backward = measure(case, machine)
            for m in (forward, backward):
                assert m.plan["route"] == "single_pass"
            check_forward(forward)
            check_backward(backward)
            saved = 4 * case.p.C * (1 + case.p.N)
            for name in ("mean", "rstd"):
                assert forward.of(name)["write_bytes"] == saved, name
            for name in ("running_mean", "running_var"):
                assert forward.of(name).get("write_bytes", 0) == (4 * case.p.C if statistics else 0), name


@pytest.mark.parametrize("route", ["cluster", "group"])
@pytest.mark.parametrize("dtype", QUICK_DTYPES)
@pytest.mark.parametrize("layout", ["nchw", NHWC])
@pytest.mark.parametrize("rung", [rung for rung in LADDER if rung != "one position"])
@pytest.mark.parametrize("sets", ["channel", "group", "instance"])
def test_shared_sets_are_read_once(sets: str, rung: str, layout: str, dtype: torch.dtype, route: str, machine: Machine) -> None:
    """However a set is cut into slabs, blocks that share it ask for it once."""
    for mode in MODES:
        for m in measure(make(sets, LADDER[rung], layout, dtype=dtype, route=route, limits=SMALL, **mode), machine):
            if m.plan["owner"] == "block":  # no set has two vectors
                continue
            assert (m.plan["route"], m.plan["owner"]) == ("single_pass", route)
            (check_backward if m.backward else check_forward)(m)


# Devices and sets scaled down together: processors, shared memory, and with and without clusters
SCALED = {
    "clusters": (4, 80000, 162048, 512, 8, 0),
    "no clusters": (4, 80000, 162048, 512, 1, 0),
    "one processor to spare": (4, 80000, 162048, 512, 1, 1),
    "one block to a processor": (8, 98000, 100000, 512, 1, 0),
}
# bytes of a set in bfloat16, from what a block holds to what eight do not; in NHWC, of the sets of 64 bytes of channels
SHARED = {
    "two blocks": ("channel", "nchw", (4, 3, 96, 112)),
    "four blocks": ("group", "nchw", (2, 6, 96, 192)),
    "all blocks": ("instance", "nchw", (1, 2, 400, 448)),
    "more than all": ("instance", "nchw", (1, 2, 512, 704)),
    "twice of all": ("channel", "nchw", (2, 1, 640, 480)),
    "two blocks of columns": ("channel", NHWC, (4, 96, 20, 20)),
    "four blocks of columns": ("group", NHWC, (2, 96, 60, 60)),
    "all blocks of columns": ("instance", NHWC, (2, 64, 72, 72)),
    "columns beyond all": ("channel", NHWC, (3, 32, 64, 64)),
    "twice of all columns": ("channel", NHWC, (4, 64, 72, 64)),
}


def passed_between_blocks(m: Measured) -> float:
    """The bound of what blocks tell each other, in sectors: of wide sets 2 % of x. Of narrow ones a value of 16 bytes a column of each
    slab, written and read by itself; two numbers a set for each of its blocks; and the words they meet at, twice."""
    if m.plan["sets"] == "wide":
        return 0.02 * m.of("x")["read_sectors"]
    width = m.case.p.C // m.case.p.groups if m.case.p.scope == SAMPLE_GROUP else 1
    columns = m.case.p.C * (m.case.p.N if m.case.p.scope == SAMPLE_GROUP else 1)
    value = 2 if m.case.x.element_size() == 8 else 1
    values = 2 * columns * m.plan["chunks"] * value
    slabs = columns / m.plan["slice"] * m.plan["chunks"]
    pairs = columns / width * 2 + slabs * 2 * (m.plan["slice"] / width * 4 / SECTOR + 1)
    return values + pairs + 8 * slabs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("name", SHARED)
def test_large_sets(name: str, scaled: str, dtype: torch.dtype, machine: Machine) -> None:
    """What fits the device is asked for once, of the rest only what does not fit again; next to nothing passes between blocks."""
    sets, layout, shape = SHARED[name]
    for mode in ({"act": "silu"}, {"act": "relu", "residual": "pre_act"}):
        case = make(sets, shape, layout, dtype=dtype, limits=SCALED[scaled], **mode)
        for m in measure(case, machine):
            for tensor in ("x", "dy") if m.backward else ("x",):
                asked, planned = m.of(tensor)["read_bytes"] / m.bytes, m.plan["reads_of_x"]
                # 2 - R/set
                assert asked == 1 if planned == 1 else asked <= 1.05 * planned, (asked, m.plan)
                assert m.of(tensor)["read_distinct"] * SECTOR == m.bytes
                if planned == 1 and layout == NHWC:
                    assert m.of(tensor)["read_sectors"] * SECTOR == m.bytes, m.plan
            if m.plan["owner"] == "block":
                continue
            assert m.of("dx" if m.backward else "y")["write_bytes"] == m.bytes
            passed = sum(m.of(t).get(f"{what}_sectors", 0) for t in ("scratch", "arrivals") for what in ("read", "write"))
            own = 0 if m.case.p.scope == CHANNEL or not m.backward else 4 * 3 * m.case.p.N * m.case.p.C  # sums per channel, of any route
            assert passed <= passed_between_blocks(m) + own, (passed, m.counters["tensors"], m.plan)


@pytest.mark.parametrize("layout", ["nchw", NHWC])
def test_every_kind_of_owner_is_met(layout: str, machine: Machine) -> None:
    """By the tests above, forward and backward."""
    met = set()
    for device in SCALED.values():
        for sets, own_layout, shape in SHARED.values():
            if own_layout == layout:
                case = make(sets, shape, layout, dtype=torch.bfloat16, limits=device)
                for step in ("norm_act", "norm_act_backward"):
                    plan = plan_of(case, step)
                    met.add((step, plan["owner"], plan["reads_of_x"] > 1))
    for step in ("norm_act", "norm_act_backward"):
        assert {(step, "cluster", False), (step, "group", False), (step, "group", True)} <= met


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((6, 12000), "nchw"), ((5, 30016, 1), NHWC), ((2, 3000, 32), "nchw"), ((3, 2048, 17), "nchw"), ((2, 12008, 3), NHWC)],
)
def test_partly_resident(shape: tuple[int, ...], layout: str, dtype: torch.dtype, machine: Machine) -> None:
    """Of position sets beyond a block's memory only what does not fit is asked for again, as the plan says within one batch."""
    partly = 0
    for shared in (40000, 65536):
        for mode in (
            {"act": "silu"},
            {"act": "relu", "residual": "pre_act"},
            {"act": "gelu", "residual": "pre_act"},
            {"residual": PRE_NORM},
        ):
            case = make("position", shape, layout, dtype=dtype, limits=(2, shared, 233472, 512, 8, 0), **mode)
            forward, backward = measure(case, machine)
            check_forward(forward)
            check_backward(backward)
            partly += sum(m.plan["reads_of_x"] % 1 > 0 for m in (forward, backward))
    assert partly, "everything fits, or nothing"


@pytest.mark.parametrize("needs", [(True, False, False), (False, False, True), (False, True, False)])
@pytest.mark.parametrize("route", ["single_pass", "two_pass"])
@pytest.mark.parametrize("sets", ["channel", "group", "position"])
def test_what_is_not_needed_is_not_written(sets: str, route: str, needs: tuple[bool, bool, bool], machine: Machine) -> None:
    case = make(sets, LADDER["sectors"], "nchw", route=route, act="silu", residual="pre_act")
    _, backward = measure(case, machine, needs)
    for tensor, needed in (("dx", needs[0]), ("dresidual", needs[1]), ("dweight", needs[2]), ("dbias", needs[2])):
        assert bool(backward.of(tensor)) == needed, tensor
    for tensor in ("x", "dy", "residual"):
        assert backward.of(tensor)["read_bytes"] <= 2 * backward.bytes


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("layout", ["nchw", NHWC])
@pytest.mark.parametrize("rung", ["sectors", "ragged", "odd channels", "one position"])
def test_evaluation_reads_once(rung: str, layout: str, dtype: torch.dtype, machine: Machine) -> None:
    """Given statistics take no pass of their own, forward and, unless parameters are trained, backward."""
    for mode in MODES:
        case = make("channel", LADDER[rung], layout, dtype=dtype, tracked=True, batch_statistics=False, **mode)
        forward, backward = measure(case, machine, (True, True, False))
        assert forward.plan["route"] == backward.plan["route"] == "apply"
        check_forward(forward)
        check_backward(backward)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("layout", ["nchw", NHWC])
@pytest.mark.parametrize("rung", [rung for rung in LADDER if rung != "one position"])
def test_steps_read_once(rung: str, layout: str, dtype: torch.dtype, machine: Machine) -> None:
    """The steps for rules written in PyTorch: one pass each."""
    case = make("instance", LADDER[rung], layout, dtype=dtype, act="silu", residual="pre_act")
    p = case.p
    scale, shift, dz_scale, q, r = (torch.randn(p.N, p.C, dtype=p.accumulate) for _ in range(5))
    size, writes = case.x.numel() * case.x.element_size(), {"apply": ["y"], "grad_apply": ["dx", "dresidual"]}
    mean, _ = backend.moments(p, case.x)
    given = (case.dy, case.x, case.r, mean, scale, shift, None)
    calls = {
        "moments": lambda: backend.moments(p, case.x),
        "apply": lambda: backend.apply(p, case.x, case.r, scale, shift, None),
        "grad_moments": lambda: backend.grad_moments(p, *given),
        "grad_apply": lambda: backend.grad_apply(p, *given, dz_scale, q, r, (True, True, True)),
    }
    for step, call in calls.items():
        with machine.mode(traffic=True), forced(None, SMALL):
            call()
            m = Measured(case, plan_of(case, step), machine.counters(), step.startswith("grad"))
        for tensor in ("x", *(["residual"] if step != "moments" else []), *(["dy"] if m.backward else [])):
            check_once(m, tensor, "read", size)
            check_sectors(m, tensor, "read")
        for tensor in writes.get(step, []):
            check_once(m, tensor, "write", size)
            check_sectors(m, tensor, "write")


@pytest.mark.parametrize("dtype", QUICK_DTYPES)
@pytest.mark.parametrize("layout", ["nchw", NHWC])
@pytest.mark.parametrize("rung", ["sectors", "ragged", "odd channels"])
def test_second_output_takes_no_pass(rung: str, layout: str, dtype: torch.dtype, machine: Machine) -> None:
    """With a factor of the residual and y + shift_after: 4 tensors forward, 5 backward where y tells the slope; nothing else is touched."""
    case = make("instance", LADDER[rung], layout, dtype=dtype, act="relu", residual="pre_act")
    p = case.p
    scale, shift, after = (torch.randn(p.N, p.C, dtype=p.accumulate) for _ in range(3))
    factor, zero, one = torch.full((1,), 0.7, dtype=p.accumulate), torch.zeros_like(scale), torch.ones_like(scale)
    y, _ = backend.apply(p, case.x, case.r, scale, shift, None, factor, after)
    assert y is not None
    dshifted = torch.randn_like(y)
    at_y = (case.dy, y, None, zero, one, zero, None)
    calls: list[tuple[str, Any, list[str], list[str]]] = [
        ("apply", lambda: backend.apply(p, case.x, case.r, scale, shift, None, factor, after), ["x", "residual"], ["y", "shifted"]),
        ("apply", lambda: backend.apply(p, case.x, case.r, scale, shift, None, factor, after, False), ["x", "residual"], ["shifted"]),
        (
            "grad_apply",
            lambda: backend.grad_apply(p, *at_y, scale, zero, zero, (True, True, False), factor, dshifted),
            ["x", "dy", "dshifted"],
            ["dx", "dresidual"],
        ),
        ("grad_moments", lambda: backend.grad_moments(p, *at_y, factor, dshifted, case.x), ["x", "dy", "dshifted", "against"], []),
    ]
    for step, call, reads, writes in calls:
        with machine.mode(traffic=True), forced(None, SMALL):
            call()
            m = Measured(case, plan_of(case, step), machine.counters(), step.startswith("grad"))
        for tensor in reads:
            check_once(m, tensor, "read", m.bytes)
        for tensor in writes:
            check_once(m, tensor, "write", m.bytes)
        large = {  # coefficients are read again and again, from cache
            name
            for name, found in m.counters["tensors"].items()
            if max(found["read_distinct"], found["write_distinct"]) * SECTOR >= m.bytes
        }
        assert large <= {*reads, *writes}, (step, large)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("route", ["single_pass", "two_pass"])
@pytest.mark.parametrize(
    ("sets", "shape", "layout"),
    [
        ("channel", (4, 6, 64, 32), "nchw"),
        ("group", (2, 6, 32, 32), "nchw"),
        ("instance", (2, 3, 64, 64), "nchw"),
        ("channel", (4, 256, 8, 8), NHWC),
        ("group", (2, 768, 8, 8), NHWC),
        ("position", (12, 2048), "nchw"),
        ("position", (4, 64, 32, 32), "nchw"),
    ],
)
def test_accesses_are_of_16_bytes(sets: str, shape: tuple[int, ...], layout: str, route: str, dtype: torch.dtype, machine: Machine) -> None:
    """Where whole vectors fill all lanes, a request is of 512 bytes; warps at the end of a row's teams may lack some lanes."""
    forward, backward = measure(make(sets, shape, layout, dtype=dtype, route=route, act="relu", limits=None), machine)
    for m, tensors in ((forward, ("x", "y")), (backward, ("x", "dy", "dx"))):
        lanes = m.plan["team"] * m.plan["teams"]
        for tensor in tensors:
            what = "write" if tensor in ("y", "dx") else "read"
            found = m.of(tensor)
            idle = 1.25 if lanes >= 32 and lanes % 32 else 1  # 30 of 32 lanes, or fewer in the last warp
            assert found[f"{what}_requests"] * 512 <= idle * 1.1 * found[f"{what}_bytes"], (tensor, found, m.plan)
            assert found[f"{what}_sectors"] * SECTOR == found[f"{what}_bytes"]


# ----------------------------------------------------------------------------------------------------- full size, by arithmetic
def _squares(n: int, *maps: tuple[int, int]) -> list[tuple[int, int, int]]:
    return [(n, c, side * side) for c, side in maps]


RESNET = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
UNET = ((320, 64), (640, 32), (1280, 16), (1280, 8), (960, 64), (1920, 32), (2560, 8))
# The benchmark's shapes (N, C, S), bf16
FULL: dict[str, tuple[str, int, list[tuple[int, int, int]]]] = {
    "ResNet-50": (CHANNEL, 1, [*_squares(32, *RESNET), *_squares(256, *RESNET)]),
    "EfficientNet-B0": (CHANNEL, 1, _squares(128, (32, 112), (96, 112), (96, 56), (144, 56), (240, 28), (480, 14), (672, 14), (1152, 7))),
    "batch norm": (CHANNEL, 1, [(8, 64, 1024), (4, 256, 784), (4, 128, 2**20), (4096, 1024, 1)]),
    "Stable Diffusion": (SAMPLE_GROUP, 32, [*_squares(1, *UNET), *_squares(8, *UNET), *_squares(4, (320, 128), (640, 64), (1280, 32))]),
    "image decoders": (SAMPLE_GROUP, 32, _squares(1, (512, 128), (512, 256), (512, 512), (256, 512), (256, 1024), (128, 1024))),
    "video decoders": (SAMPLE_GROUP, 32, [(1, 128, 20 * 2**16), (1, 512, 8 * 45 * 80), (1, 512, 16 * 90 * 160), (1, 512, 16 * 180 * 320)]),
    "Mask R-CNN": (SAMPLE_GROUP, 32, [(2, 64, 400 * 672), (2, 256, 200 * 336), (2, 256, 100 * 168), (2, 256, 50 * 84), (1024, 256, 49)]),
    "nnU-Net": (SAMPLE_GROUP, 0, [(2, 32, 128**3), (2, 64, 64**3), (2, 128, 32**3), (2, 256, 16**3), (2, 320, 8**3), (2, 320, 4**3)]),
    "CycleGAN and style": (SAMPLE_GROUP, 0, [*_squares(1, (64, 256), (128, 128), (256, 64)), (16, 512, 4096), (4, 64, 2**18)]),
    "ConvNeXt": (POSITION, 1, _squares(128, (96, 56), (192, 28), (384, 14), (768, 7))),
    "rows": (POSITION, 1, [(25216, 768, 1), (1024, 12288, 1), (16384, 4096, 1), (8192, 8192, 1), (4096, 16384, 1), (8192, 5120, 1)]),
    "more rows": (POSITION, 1, [(2048, 4096, 1), (131072, 128, 1), (8192, 128, 1), (1, 4096, 1)]),
}
H200 = {"processors": 132, "shared_bytes_per_block": 232448, "shared_bytes_per_processor": 233472, "threads_per_processor": 2048}


def fits_a_block(scope: str, N: int, C: int, S: int, groups: int, layout: str, tensors: int, block: int) -> bool:
    """Whether a set, or the narrowest slice of columns that is worth reading (64 bytes), is smaller than a block's memory."""
    channels_last = layout == NHWC or S == 1
    width = C // groups
    if scope == CHANNEL:
        slab = N * S * (32 if channels_last else 1)
    elif scope == SAMPLE_GROUP:
        slab = S * (max(math.lcm(width, 8), 32) if channels_last else width)
    else:
        return True
    return slab * 2 * tensors <= 0.75 * block


def enough(scope: str, N: int, C: int, S: int, groups: int, layout: str) -> bool:
    """Whether there are sets, or slices of 128 bytes, for half of the processors; else many blocks for a set may be faster."""
    if layout == NHWC or S == 1:
        slices = C // max(64, math.lcm(C // groups, 8) if scope == SAMPLE_GROUP else 1)
        return scope == POSITION or slices * (N if scope == SAMPLE_GROUP else 1) >= 66
    return {CHANNEL: C, SAMPLE_GROUP: N * groups, POSITION: N * S}[scope] >= 66


@pytest.mark.parametrize("step", ["norm_act", "norm_act_backward"])
@pytest.mark.parametrize("layout", ["nchw", NHWC])
@pytest.mark.parametrize("model", FULL)
def test_full_size(model: str, layout: str, step: str, device: torch.device, record_property: Any) -> None:
    """Legal on an H200, in one pass where a set fits a block, and with little to write beside the tensors."""
    library = _load.library()
    assert library is not None
    if library.module is None:
        pytest.skip("the module was not built for this Python")
    scope, groups, shapes = FULL[model]
    for N, C, S in shapes:
        own = groups or C
        p = Problem(scope, "standard", N, C, S, own, layout, torch.bfloat16, torch.device("cpu"))
        plan = library.describe(p, step, 7, H200)
        assert plan is not None
        size = 2 * N * C * S
        note = f"{model} {(N, C, S)} {layout} {step}: {plan}"
        record_property(f"{N}x{C}x{S}", "{route} {blocks}x{threads} {shared_bytes} B shared, {scratch_bytes} B scratch".format(**plan))
        assert 32 <= plan["threads"] <= 1024, note
        assert plan["threads"] % 32 == 0, note
        assert 1 <= plan["blocks"] < 2**31, note
        assert 0 <= plan["shared_bytes"] <= H200["shared_bytes_per_block"], note
        # partials of chunks are little beside a tensor that is worth cutting, or 2 MiB, which L2 holds; sums per channel of each sample or
        # block are what they are
        entries = {CHANNEL: 0, SAMPLE_GROUP: N, POSITION: plan["blocks"]}[scope] if "backward" in step else 0
        tensors = 2 if "backward" in step else 1
        assert plan["scratch_bytes"] <= max(0.025 * size * tensors, 2**21, 12 * C * entries), note
        if fits_a_block(scope, N, C, S, own, layout, tensors, H200["shared_bytes_per_block"]) and enough(scope, N, C, S, own, layout):
            assert plan["route"] == "single_pass", note
        if plan["route"] == "two_pass":
            assert plan["blocks"] >= 60 or size < 2**20, f"half of the processors idle: {note}"


def settles(p: Problem, device: tuple[int, ...], route: str | None) -> bool:
    """Whether a launch of its own merges partials, which describe() does not tell."""
    q = Question(p.scope, p.N, p.C, p.S, p.groups, p.layout, p.dtype, route=route, device=device)
    return bool(walks().plan(q)["settles"])


def partials_read(plan: dict[str, Any], columns: int, settles: bool) -> int:
    """Bytes, four numbers for each chunk and set or column: by every block of the second pass for its own, or once by a launch between."""
    if settles:
        return plan["chunks"] * columns * 16
    return plan["blocks"] * plan["chunks"] * (plan["slice"] if plan["sets"] == "narrow" else 1) * 16


@pytest.mark.parametrize(
    ("sets", "layout"), [("channel", "nchw"), ("channel", NHWC), ("instance", "nchw"), ("instance", NHWC), ("group", NHWC)]
)
@pytest.mark.parametrize("shape", [(2, 96, 32, 16), (1, 192, 32, 32)])
def test_partials(sets: str, layout: str, shape: tuple[int, ...], machine: Machine) -> None:
    """They are written once, and read as often as the arithmetic for full-size shapes says."""
    forward, _ = measure(make(sets, shape, layout, route="two_pass", limits=None), machine)
    scratch, plan, p = forward.of("scratch"), forward.plan, forward.case.p
    columns = p.C if sets == "channel" else p.N * p.C
    assert scratch["read_bytes"] == partials_read(plan, columns, settles(p, DEVICES["H200"], "two_pass")), (scratch, plan)
    assert scratch["write_bytes"] <= plan["scratch_bytes"]


@pytest.mark.parametrize("layout", ["nchw", NHWC])
@pytest.mark.parametrize("model", [model for model, (scope, *_) in FULL.items() if scope != POSITION])
def test_partials_are_read_little(model: str, layout: str, device: torch.device) -> None:
    """All blocks of the second pass together must not read another tensor."""
    library = _load.library()
    assert library is not None
    if library.module is None:
        pytest.skip("the module was not built for this Python")
    scope, groups, shapes = FULL[model]
    for N, C, S in shapes:
        p = Problem(scope, "standard", N, C, S, groups or C, layout, torch.bfloat16, torch.device("cpu"))
        plan = library.describe(p, "norm_act", 7, H200)
        assert plan is not None
        read = partials_read(plan, C if scope == CHANNEL else N * C, settles(p, DEVICES["H200"], None))
        if plan["route"] == "two_pass":
            assert read <= max(0.25 * 2 * N * C * S, 2**24), f"{model} {(N, C, S)} {layout}: {read / 1e6:.0f} MB of partials; {plan}"
