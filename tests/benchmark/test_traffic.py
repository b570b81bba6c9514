"""Bytes by hand against the formulas, the emulation's counts against the formulas, and the routes."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch

from normfused.backends.cuda import _load
from normfused.benchmark import traffic
from normfused.benchmark.cases import CHANNELS_LAST, HEADLINE, MATRIX, QUICK, Case
from normfused.benchmark.traffic import eager_bytes, floor_bytes, route_bytes, routes, scaled, slab_bytes

from ..conftest import EMULATED

F32 = torch.float32
BATCH = (2, 8, 4, 4)  # 256 elements: 512 bytes in bfloat16, 1,024 in float32, 32 of a bit each

# case, (forward, backward) in bytes
FLOORS = {
    "BN": (Case("batch", BATCH), (1024, 1536)),
    "BN, float32": (Case("batch", BATCH, dtype=F32), (2048, 3072)),
    "BN + ReLU": (Case("batch", BATCH, "relu"), (1024, 1536)),
    "BN + add + ReLU": (Case("batch", BATCH, "relu", "pre_act"), (1536 + 32, 2048 + 32)),
    "BN + add + ReLU, float32": (Case("batch", BATCH, "relu", "pre_act", dtype=F32), (3072 + 32, 4096 + 32)),
    "BN + add + LeakyReLU": (Case("batch", BATCH, "leaky_relu", "pre_act"), (1568, 2080)),
    "BN + add + SiLU": (Case("batch", BATCH, "silu", "pre_act"), (1536, 2560)),
    "BN + add": (Case("batch", BATCH, "identity", "pre_act"), (1536, 1536)),
    "BN + ReLU, add": (Case("batch", BATCH, "relu", "post_act"), (1536, 1536)),
    "GN + SiLU": (Case("group", BATCH, "silu", groups=4), (1024, 1536)),
    "GN + SiLU, channels_last": (Case("group", BATCH, "silu", groups=4, layout=CHANNELS_LAST), (1024, 1536)),
    "IN + LeakyReLU, 3-D": (Case("instance", (1, 4, 4, 4, 4), "leaky_relu"), (1024, 1536)),
    "LN": (Case("layer", (4, 64)), (1024, 1536)),
    "LN over channels": (Case("layer", BATCH, "gelu", dim=1), (1024, 1536)),
    "RMS": (Case("rms", (4, 64)), (1024, 1536)),
    "add, RMS": (Case("rms", (4, 64), residual="pre_norm"), (2048, 2048)),
    "FRN + TLU": (Case("frn", BATCH, "tlu"), (1024, 1536)),
    "batch-instance": (Case("batch_instance", BATCH), (1024, 1536)),
}


@pytest.mark.parametrize("name", FLOORS)
def test_floor(name: str) -> None:
    case, (forward, backward) = FLOORS[name]
    assert (floor_bytes(case, "forward"), floor_bytes(case, "backward")) == (forward, backward)
    assert floor_bytes(case, "forward_backward") == forward + backward


def test_floor_of_evaluation() -> None:
    """A forward alone leaves no mask; one that is followed by a backward does."""
    case = Case("batch", BATCH, "relu", "pre_act")
    assert floor_bytes(case, "forward", "eval") == 1536
    assert floor_bytes(case, "backward", "eval") == 2080
    assert floor_bytes(case, "forward_backward", "eval") == 1568 + 2080


def test_floor_of_a_norm_that_couples_all() -> None:
    """Switchable norm reads x once only where all of it stays on chip."""
    small, large = Case("switchable", BATCH), Case("switchable", (64, 256, 56, 56))
    assert floor_bytes(small, "forward") == 1024
    T = 64 * 256 * 56 * 56 * 2
    assert (floor_bytes(large, "forward"), floor_bytes(large, "backward")) == (3 * T, 5 * T)


def test_floor_refuses() -> None:
    with pytest.raises(ValueError, match=r"floor_bytes: direction must be forward, backward or forward_backward, got sideways"):
        floor_bytes(Case("batch", BATCH), "sideways")


# case, route, (forward, backward) in bytes
ROUTES = [
    (Case("batch", BATCH, "relu"), "single_pass", (1024, 1536)),
    (Case("batch", BATCH, "relu"), "two_pass", (1536, 2560)),
    (Case("batch", BATCH, "relu", "pre_act"), "single_pass", (1536 + 32, 2048 + 32)),
    (Case("batch", BATCH, "relu", "pre_act"), "two_pass", (2048 + 32, 3072 + 64)),
    # float32 has four elements to a vector of memory, and so to a byte of the mask
    (Case("batch", BATCH, "relu", "pre_act", dtype=F32), "single_pass", (3072 + 64, 4096 + 64)),
    (Case("group", BATCH, "silu", "pre_act", groups=4), "single_pass", (1536, 2560)),
    (Case("group", BATCH, "silu", "pre_act", groups=4), "two_pass", (2048, 4096)),
    (Case("batch_instance", BATCH), "slices", (1536, 2560)),
    (Case("batch_instance", BATCH, "relu", "pre_act"), "slices", (2048, 4096)),
    (Case("batch_instance", BATCH, "relu", "pre_act"), "single_pass", (1536, 2560)),
    (Case("rms", (4, 64), residual="pre_norm"), "single_pass", (2048, 2048)),
]


@pytest.mark.parametrize(("case", "route", "wanted"), ROUTES)
def test_route(case: Case, route: str, wanted: tuple[int, int]) -> None:
    assert (route_bytes(case, "forward", "training", route), route_bytes(case, "backward", "training", route)) == wanted
    assert route_bytes(case, "forward_backward", "training", route) == sum(wanted)


def test_route_of_two_kinds() -> None:
    case = Case("batch", BATCH)
    assert route_bytes(case, "forward_backward", "training", "single_pass, two_pass") == 1024 + 2560
    assert route_bytes(case, "forward", "eval", "apply") == 1024


def test_route_with_what_does_not_stay_on_chip() -> None:
    case = Case("rms", (4, 64), residual="pre_norm")
    assert route_bytes(case, "forward", "training", "single_pass", 1.5) == 2048 + 256
    assert route_bytes(case, "backward", "training", "single_pass", 1.5) == 2048 + 512


@pytest.mark.parametrize(("direction", "route"), [("forward", "three_pass"), ("sideways", "two_pass")])
def test_route_refuses(direction: str, route: str) -> None:
    with pytest.raises(ValueError, match=rf"route_bytes: route must be one of .* got {route}, {direction}"):
        route_bytes(Case("batch", BATCH), direction, "training", route)


# passes of torch.nn's chain (forward, backward), counted in its kernels' sources
CHAINS = {
    "BN + ReLU": (Case("batch", BATCH, "relu"), (5, 8)),
    "BN + ReLU, channels_last": (Case("batch", BATCH, "relu", layout=CHANNELS_LAST), (5, 8)),
    "BN + add + ReLU": (Case("batch", BATCH, "relu", "pre_act"), (8, 8)),
    "BN + SiLU": (Case("batch", BATCH, "silu"), (5, 8)),
    "GN + SiLU": (Case("group", BATCH, "silu", groups=4), (5, 8)),
    "GN + SiLU, channels_last": (Case("group", BATCH, "silu", groups=4, layout=CHANNELS_LAST), (9, 12)),
    "IN + LeakyReLU": (Case("instance", BATCH, "leaky_relu"), (5, 8)),
    "IN + LeakyReLU, channels_last": (Case("instance", BATCH, "leaky_relu", layout=CHANNELS_LAST), (9, 12)),
    "LN": (Case("layer", (4, 64)), (2, 5)),
    "RMS": (Case("rms", (4, 64)), (2, 5)),
    "add, RMS": (Case("rms", (4, 64), residual="pre_norm"), (5, 8)),
    "LN over channels": (Case("layer", BATCH, dim=1), (4, 7)),
    "LN over channels, channels_last": (Case("layer", BATCH, dim=1, layout=CHANNELS_LAST), (2, 5)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_eager_passes(name: str) -> None:
    case, (forward, backward) = CHAINS[name]
    assert (eager_bytes(case, "forward"), eager_bytes(case, "backward")) == (forward * 512, backward * 512)
    assert eager_bytes(case, "forward_backward") == (forward + backward) * 512


def test_eager_evaluation_and_what_torch_does_not_have() -> None:
    assert eager_bytes(Case("batch", BATCH, "relu"), "forward", "eval") == 4 * 512
    assert eager_bytes(Case("frn", BATCH, "tlu"), "forward") is None
    assert eager_bytes(Case("frn", BATCH, "tlu"), "forward_backward") is None


@pytest.mark.parametrize(
    ("case", "size"),
    [
        (Case("batch", (32, 64, 112, 112)), 32 * 112 * 112 * 2),  # 0.80 MB: a channel
        (Case("batch", (32, 64, 112, 112), layout=CHANNELS_LAST), 32 * 112 * 112 * 64),  # 25.7 MB: 64 bytes of channels
        (Case("group", (1, 128, 20, 256, 256), groups=32), 4 * 20 * 256 * 256 * 2),  # 10.5 MB: a group
        (Case("group", (1, 512, 512, 512), groups=32, layout=CHANNELS_LAST), 512 * 512 * 64),  # 16.8 MB: two groups of 16 channels
        (Case("group", (1, 1280, 16, 16), groups=32, layout=CHANNELS_LAST), 16 * 16 * 80),  # a group of 40 channels, whole vectors
        (Case("instance", (2, 32, 128, 128, 128)), 128**3 * 2),
        (Case("rms", (16384, 4096)), 8192),
    ],
)
def test_slab(case: Case, size: int) -> None:
    assert slab_bytes(case) == size


# ------------------------------------------------------------------------------------------------------- the committed table
def test_table_is_of_these_cases_and_agrees_with_the_formulas() -> None:
    """What the emulation counted is what the formulas say, and two exceptions: a mask may have spare bytes, one for a run that starts on a
    boundary; and the 16 bytes at both ends of a run that starts elsewhere are read whole, with its neighbours' elements."""
    counted = traffic.table()["cases"]
    sizes = {case.name: case.dtype.itemsize for case in [*MATRIX, *QUICK] if case.norm != "whitening"}
    assert counted.keys() == sizes.keys(), "cases have changed: python -m normfused.benchmark.traffic"
    for name, entries in counted.items():
        for key, entry in entries.items():
            spare = 0.02 if "add+relu" in name else 0
            run = prod(entry["shape"][2:]) * sizes[name] if name.endswith("contiguous") and len(entry["shape"]) > 2 else 16
            neighbours = entry["model"] * 2 * (16 - sizes[name]) / run if run % 16 else 0
            assert entry["model"] - spare <= entry["asked"] <= entry["model"] + neighbours + 1e-4, (name, key, entry)
            # an element of a run that no vector holds whole costs a sector
            assert entry["asked"] <= entry["sectors"] + 1e-4, (name, key, entry)


def test_table_answers_where_no_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "library", lambda: None)
    found = routes(Case("rms", (16384, 4096)))
    assert found == {"forward": traffic.Planned("single_pass", 1), "backward": traffic.Planned("single_pass", 1)}
    assert routes(Case("rms", (16384, 4096)), limits={**traffic.H200, "processors": 10}) is None
    assert routes(Case("batch", (3, 5, 7, 9))) is None
    slices = routes(Case("switchable", BATCH))
    assert slices is not None
    assert slices["forward"].route == "slices"


def test_table_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "traffic.json"
    assert traffic.table(path)["cases"] == {}
    path.write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match=r"traffic.json: traffic: schema must be 1, got 99"):
        traffic.table(path)


@pytest.mark.parametrize("case", [c for c in MATRIX if c.tier == HEADLINE][::5], ids=lambda c: c.name)
def test_scaled_keeps_what_decides(case: Case) -> None:
    small = scaled(case)
    assert small.numel <= 300_000
    assert (small.norm, small.act, small.residual, small.layout, small.dtype) == (
        case.norm, case.act, case.residual, case.layout, case.dtype,
    )  # fmt: skip
    full, cut = traffic.problem(case), traffic.problem(small)
    assert full.S % 16 == cut.S % 16
    assert len(small.shape) == len(case.shape)
    if case.norm == "group":
        assert full.C // full.groups == cut.C // cut.groups
    if case.norm in ("layer", "rms"):
        assert full.C == cut.C


# ------------------------------------------------------------------------------------------------------------- the emulation
@pytest.mark.skipif(EMULATED, reason="the emulation is here")
def test_without_emulation_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NORMFUSED_EMULATE", raising=False)
    assert traffic.main() == 1
    assert capsys.readouterr().out.count("\n") == 1
    with pytest.raises(RuntimeError, match="count: NORMFUSED_EMULATE=1 and a built emulation are needed"):
        traffic.count(Case("batch", BATCH))


@pytest.mark.skipif(not EMULATED, reason="counts are the emulation's")
@pytest.mark.parametrize(
    "case",
    [
        Case("batch", (256, 256, 56, 56), "relu", "pre_act", layout=CHANNELS_LAST),
        Case("group", (8, 320, 64, 64), "silu", groups=32),
        Case("rms", (2048, 4096), residual="pre_norm"),
        Case("batch_instance", (32, 256, 56, 56)),
        Case("batch_renorm", (256, 64, 56, 56), layout=CHANNELS_LAST),
    ],
    ids=lambda c: c.name,
)
def test_count_is_the_committed_count(case: Case) -> None:
    found = traffic.count(case)
    entries = traffic.table()["cases"][case.name]
    assert found == {direction: entries[f"training {direction}"] for direction in ("forward", "backward")}
