"""Warps in every order, and no two accesses that a barrier does not order: starved and reversed runs with the race check on.

A barrier that is missing shows as a race, as a number that nobody wrote, or as a wrong result, depending on who runs first; starved orders
let some warps lag as far as the barriers allow. What is asked of memory is the same in all of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from normfused.problem import BATCH_INSTANCE, CHANNEL, MEAN_ONLY, NHWC, POSITION, PRE_NORM, RENORM, RMS, SAMPLE_GROUP

from ..support import cases
from .cases import CRAMPED, FEW, ROOMY, SMALL, TINY, Case, Machine
from .test_norm_act import IDS, ROWS
from .test_steps import check_steps

ORDERS = [("reverse", 0), ("starve", 1), ("starve", 2)]

_RENORM: dict[str, Any] = {"scope": CHANNEL, "rule": RENORM, "tracked": True}
_APART: dict[str, Any] = {"scope": CHANNEL, "rule": BATCH_INSTANCE, "tracked": True}

# What meets all views, routes, reductions and hand-overs between launches; each as small as it can be
REPRESENTATIVE: dict[str, dict[str, Any]] = {
    # wide sets along rows: batch norm and group norm in NCHW
    "wide rows, single": {"scope": CHANNEL, "shape": (3, 3, 33, 31), "route": "single_pass", "act": "relu"},
    "wide rows, two": {"scope": CHANNEL, "shape": (3, 3, 33, 31), "route": "two_pass", "act": "relu", "residual": "pre_act"},
    "wide rows, chunks of a row": {"scope": SAMPLE_GROUP, "groups": 1, "shape": (1, 2, 9000), "route": "two_pass", "act": "silu"},
    "wide rows, several channels": {"scope": SAMPLE_GROUP, "groups": 2, "shape": (2, 24, 40), "route": "single_pass", "act": "prelu"},
    "wide rows, teams of warps": {"scope": SAMPLE_GROUP, "groups": 1, "shape": (2, 3, 1001), "route": "single_pass", "act": "silu"},
    "wide rows, teams of warps, two": {"scope": SAMPLE_GROUP, "groups": 1, "shape": (2, 3, 2001), "route": "two_pass", "act": "silu"},
    "several sets to a block": {"scope": SAMPLE_GROUP, "groups": 12, "shape": (3, 12, 5, 3), "route": "single_pass", "act": "relu"},
    "several sets to a block, two": {"scope": SAMPLE_GROUP, "groups": 6, "shape": (3, 12, 5, 3), "route": "two_pass", "act": "relu"},
    # ... which several blocks hold: of a cluster, or of groups that are on the device together, each with one set after the other
    "cluster": {"scope": CHANNEL, "shape": (8, 3, 33, 64), "route": "cluster", "act": "relu", "residual": "pre_act", "tracked": True},
    "cluster, several channels": {"scope": SAMPLE_GROUP, "groups": 2, "shape": (2, 6, 40, 65), "route": "cluster", "act": "prelu"},
    "cluster, a block without rows": {"scope": SAMPLE_GROUP, "groups": 1, "shape": (2, 5, 16), "route": "cluster", "limits": FEW},
    "groups of blocks": {"scope": CHANNEL, "shape": (8, 3, 33, 64), "route": "group", "act": "silu", "tracked": True, "momentum": None},
    "groups of blocks, several channels": {"scope": SAMPLE_GROUP, "groups": 2, "shape": (3, 6, 40, 65), "route": "group", "act": "silu"},
    "groups of blocks, the next slab on its way": {
        "scope": CHANNEL,
        "shape": (16, 5, 40, 64),
        "route": "group",
        "act": "relu",
        "residual": "pre_act",
        "tracked": True,
        "limits": ROOMY,
    },
    "groups of blocks, the next slab on its way, several channels": {
        "scope": SAMPLE_GROUP,
        "groups": 2,
        "shape": (3, 10, 67, 64),
        "route": "group",
        "act": "gelu",
        "residual": "pre_act",
        "limits": ROOMY,
    },
    "groups of blocks, partly resident": {
        "scope": SAMPLE_GROUP,
        "groups": 1,
        "shape": (2, 3, 202, 201),
        "route": "group",
        "act": "relu",
        "limits": CRAMPED,
    },
    "groups of blocks, partly resident, residual": {
        "scope": CHANNEL,
        "shape": (4, 2, 180, 181),
        "route": "group",
        "act": "silu",
        "residual": "pre_act",
        "limits": CRAMPED,
    },
    "groups of blocks, partly resident, mask": {
        "scope": CHANNEL,
        "shape": (4, 2, 120, 128),
        "route": "group",
        "act": "relu",
        "residual": "pre_act",
        "limits": CRAMPED,
    },
    # narrow sets along columns: the same in NHWC
    "narrow columns, single": {"scope": CHANNEL, "shape": (3, 12, 8, 7), "layout": NHWC, "route": "single_pass", "act": "relu"},
    "narrow columns, two": {"scope": CHANNEL, "shape": (3, 12, 24, 21), "layout": NHWC, "route": "two_pass", "act": "prelu"},
    "narrow columns of groups": {
        "scope": SAMPLE_GROUP,
        "groups": 4,
        "shape": (2, 24, 9, 8),
        "layout": NHWC,
        "route": "single_pass",
        "act": "silu",
    },
    "narrow columns of groups, the last slice": {
        "scope": SAMPLE_GROUP,
        "groups": 10,
        "shape": (2, 60, 9, 8),
        "layout": NHWC,
        "route": "single_pass",
        "act": "relu",
    },
    "narrow columns, cluster": {
        "scope": CHANNEL,
        "shape": (5, 72, 9, 7),
        "layout": NHWC,
        "route": "cluster",
        "act": "relu",
        "residual": "pre_act",
        "tracked": True,
    },
    "narrow columns of groups, cluster": {
        "scope": SAMPLE_GROUP,
        "groups": 8,
        "shape": (2, 24, 9, 32),
        "layout": NHWC,
        "route": "cluster",
        "act": "prelu",
    },
    "narrow columns, groups of blocks": {
        "scope": CHANNEL,
        "shape": (9, 40, 9, 11),
        "layout": NHWC,
        "route": "group",
        "act": "silu",
        "tracked": True,
        "momentum": None,
    },
    "narrow columns of groups, groups of blocks": {
        "scope": SAMPLE_GROUP,
        "groups": 6,
        "shape": (3, 18, 9, 32),
        "layout": NHWC,
        "route": "group",
        "act": "relu",
        "residual": "pre_act",
    },
    "narrow columns, groups of blocks, the next slab on its way": {
        "scope": SAMPLE_GROUP,
        "groups": 40,
        "shape": (4, 40, 20, 16),
        "layout": NHWC,
        "route": "group",
        "act": "relu",
        "residual": "pre_act",
        "limits": ROOMY,
    },
    "narrow columns, groups of blocks, partly resident": {
        "scope": CHANNEL,
        "shape": (4, 36, 40, 30),
        "layout": NHWC,
        "route": "group",
        "act": "relu",
        "residual": "pre_act",
        "limits": CRAMPED,
    },
    "narrow columns, groups of blocks, partly resident, residual": {
        "scope": CHANNEL,
        "shape": (4, 24, 40, 30),
        "layout": NHWC,
        "route": "group",
        "act": "silu",
        "residual": "pre_act",
        "limits": CRAMPED,
    },
    "narrow columns of groups, two": {"scope": SAMPLE_GROUP, "groups": 2, "shape": (2, 70, 9, 8), "layout": NHWC, "route": "two_pass"},
    "groups wider than a block": {"scope": SAMPLE_GROUP, "groups": 1, "shape": (1, 9000, 3), "layout": NHWC, "act": "relu"},
    # position sets along columns (wide) and along rows (narrow)
    "position columns": {"scope": POSITION, "shape": (9, 520), "act": "silu"},
    "position columns, small": {"scope": POSITION, "shape": (40, 24), "act": "gelu", "residual": "pre_act"},
    "position columns, partly resident": {"scope": POSITION, "shape": (3, 8200), "act": "relu", "residual": PRE_NORM},
    "position columns, a pass of their own": {"scope": POSITION, "shape": (3, 12000), "act": "relu", "residual": "pre_act"},
    "position rows": {"scope": POSITION, "shape": (2, 24, 9, 8), "act": "prelu"},
    "position rows, partly resident": {"scope": POSITION, "rule": RMS, "shape": (2, 2500, 9), "act": "relu", "residual": "pre_act"},
    # running statistics, masks, learned epsilons
    "tracked": {"scope": CHANNEL, "shape": (3, 6, 9, 5), "tracked": True, "act": "relu", "residual": "pre_act"},
    "cumulative": {"scope": CHANNEL, "shape": (3, 6, 9, 5), "tracked": True, "momentum": None, "route": "single_pass"},
    "cumulative, two": {"scope": CHANNEL, "shape": (3, 6, 9, 5), "layout": NHWC, "tracked": True, "momentum": None, "route": "two_pass"},
    "cumulative instance": {"scope": SAMPLE_GROUP, "groups": 6, "shape": (3, 6, 9, 5), "tracked": True, "momentum": None},
    "given": {"scope": CHANNEL, "shape": (3, 6, 9, 5), "tracked": True, "batch_statistics": False, "act": "relu", "residual": "pre_act"},
    "one epsilon": {
        "scope": SAMPLE_GROUP,
        "rule": RMS,
        "groups": 6,
        "shape": (3, 6, 9, 5),
        "rule_weights": 1,
        "act": "tlu",
        "shared_act_weight": True,
    },
    "shared weight": {"scope": CHANNEL, "shape": (3, 6, 9, 5), "act": "prelu", "shared_act_weight": True},
    # coefficients that depend on running statistics, which all blocks of an owner read before one of them moves them on
    "renorm, several sets to a block": {**_RENORM, "shape": (3, 6, 3, 2), "route": "single_pass", "act": "relu", "residual": "pre_act"},
    "renorm, a block": {**_RENORM, "shape": (3, 3, 9, 31), "route": "single_pass", "momentum": None},
    "renorm, cluster": {**_RENORM, "shape": (8, 3, 9, 64), "route": "cluster", "act": "relu"},
    "renorm, groups of blocks": {**_RENORM, "shape": (8, 3, 9, 64), "route": "group", "act": "silu"},
    "renorm, two": {**_RENORM, "shape": (3, 3, 33, 31), "route": "two_pass", "act": "silu", "momentum": None},
    "renorm columns, a block": {**_RENORM, "shape": (3, 12, 8, 7), "layout": NHWC, "route": "single_pass", "act": "relu"},
    "renorm columns, cluster": {**_RENORM, "shape": (5, 72, 9, 7), "layout": NHWC, "route": "cluster", "act": "relu"},
    "renorm columns, groups of blocks": {**_RENORM, "shape": (9, 40, 9, 5), "layout": NHWC, "route": "group", "act": "silu"},
    "renorm columns, two": {**_RENORM, "shape": (3, 12, 24, 21), "layout": NHWC, "route": "two_pass", "act": "prelu"},
    # statistics of every sample beside the batch's: teams of a sample each, samples in pieces, and blocks without a sample
    "samples, a block": {**_APART, "rule_weights": 3, "shape": (5, 3, 9, 31), "route": "single_pass", "act": "prelu"},
    "samples, a team of warps": {**_APART, "rule_weights": 3, "shape": (1, 3, 70, 31), "route": "single_pass", "momentum": None},
    "samples, cluster": {**_APART, "rule_weights": 3, "shape": (9, 3, 9, 64), "route": "cluster", "act": "relu", "residual": "pre_act"},
    "pieces of samples, cluster": {**_APART, "rule_weights": 2, "shape": (2, 2, 150, 96), "route": "cluster", "act": "silu"},
    "pieces of samples, groups of blocks": {**_APART, "rule_weights": 2, "shape": (2, 2, 150, 96), "route": "group", "act": "relu"},
    "samples, given": {**_APART, "rule_weights": 3, "shape": (8, 3, 9, 64), "route": "group", "batch_statistics": False},
    "samples in columns, a block": {
        **_APART,
        "rule_weights": 12,
        "shape": (9, 12, 8, 7),
        "layout": NHWC,
        "route": "single_pass",
        "act": "prelu",
    },
    "samples in columns, several warps each": {
        **_APART,
        "rule_weights": 16,
        "shape": (2, 16, 24, 17),
        "layout": NHWC,
        "route": "single_pass",
        "act": "relu",
    },
    "samples in odd columns": {**_APART, "rule_weights": 5, "shape": (9, 5, 8, 7), "layout": NHWC, "route": "single_pass", "act": "silu"},
    "samples in columns, cluster": {
        **_APART,
        "rule_weights": 72,
        "shape": (9, 72, 5, 7),
        "layout": NHWC,
        "route": "cluster",
        "act": "relu",
        "residual": "pre_act",
    },
    "pieces of samples in columns, cluster": {
        **_APART,
        "rule_weights": 24,
        "shape": (2, 24, 16, 37),
        "layout": NHWC,
        "route": "cluster",
        "act": "silu",
    },
    "pieces of samples in columns, groups of blocks": {
        **_APART,
        "rule_weights": 40,
        "shape": (2, 40, 16, 37),
        "layout": NHWC,
        "route": "group",
        "act": "tlu",
        "momentum": None,
    },
    "mean only": {"scope": CHANNEL, "rule": MEAN_ONLY, "shape": (3, 6, 9, 5), "tracked": True, "act": "relu", "residual": "pre_act"},
    "mean only columns, groups of blocks": {
        "scope": CHANNEL,
        "rule": MEAN_ONLY,
        "shape": (9, 40, 9, 5),
        "layout": NHWC,
        "route": "group",
        "act": "silu",
        "tracked": True,
    },
}
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(name: str, **changes: Any) -> Case:
    dtype = TYPES[list(REPRESENTATIVE).index(name) % 3]
    return Case(**{"dtype": dtype, "limits": SMALL, **REPRESENTATIVE[name], **changes})


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_no_races(name: str, order: str, seed: int, machine: Machine) -> None:
    with machine.mode(order, seed=seed, races=True):
        make(name).check()
        assert not machine.message()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 8))
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_no_races_of_any_type(name: str, dtype: torch.dtype, seed: int, machine: Machine) -> None:
    with machine.mode("starve", seed=seed, races=True):
        make(name, dtype=dtype, **({} if "limits" in REPRESENTATIVE[name] else {"limits": TINY if seed % 2 else SMALL})).check()


@pytest.mark.parametrize("layout", ["nchw", NHWC])
@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_no_races_in_steps(order: str, seed: int, layout: str, machine: Machine) -> None:
    for shape in ((2, 6, 33, 31), (3, 12, 7)):
        case = Case(SAMPLE_GROUP, shape=shape, groups=shape[1], layout=layout, act="prelu", residual="pre_act")
        with machine.mode(order, seed=seed, races=True):
            check_steps(case, SMALL)


def counted(case: Case, machine: Machine, **mode: Any) -> list[dict[str, Any]]:
    with machine.mode(traffic=True, **mode):
        out = case.forward()
        forward = machine.counters()
        machine.reset()  # scratch may lie elsewhere in the backward
        case.backward(*out)
        return [forward, machine.counters()]


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_the_same_is_asked_in_every_order(name: str, machine: Machine) -> None:
    """Which block is the last one, and sums up, depends on the order; how much it asks for does not."""
    first = counted(make(name), machine)
    for order, seed in ORDERS:
        assert counted(make(name), machine, order=order, seed=seed) == first, (order, seed)


def bits(name: str, machine: Machine, **mode: Any) -> list[torch.Tensor]:
    case = make(name)
    with machine.mode(**mode):
        out = case.forward()
        return [t for t in (*out, *case.backward(*out), *case.running) if t is not None]


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_the_same_bits_in_every_order(name: str, machine: Machine) -> None:
    """Sums have one order, whoever comes first."""
    first = bits(name, machine)
    for order, seed in ORDERS:
        for one, other in zip(first, bits(name, machine, order=order, seed=seed), strict=True):
            assert torch.equal(one, other), (order, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_pairs_starved(row: dict[str, Any], seed: int, machine: Machine) -> None:
    """Every pair of features under other seeds than test_norm_act.py's."""
    case = Case(**cases.options(row), seed=seed, limits=SMALL)
    with machine.mode("starve", seed=1000 + seed, races=True):
        replace(case).check()
