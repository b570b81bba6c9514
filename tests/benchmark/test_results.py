"""The results file: what is saved is what is loaded, and whatever is not of the schema is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from normfused.benchmark.cases import MATRIX
from normfused.benchmark.results import Results, by, check, folder_name

from . import synthetic


@pytest.fixture
def given() -> Results:
    return synthetic.gpu(MATRIX[:2])


@pytest.fixture
def stored(given: Results, tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "r.json"
    given.save(path)
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def test_round_trip(given: Results, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.json"
    given.save(path)
    once = Results.load(path)
    assert [r.case for r in once.rows] == [r.case for r in given.rows]
    assert once.rows[0].shape == given.rows[0].shape
    assert once.rows[0].device_us == pytest.approx(given.rows[0].device_us, rel=1e-4)
    assert (once.header, once.networks[0].network, once.absent) == (given.header, given.networks[0].network, given.absent)
    once.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob("**/*.part")), "the draft is moved into place"


def test_figures_that_do_not_exist_stay_none(given: Results, tmp_path: Path) -> None:
    given.rows[0].device_us = None
    given.save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json").rows[0].device_us is None


def changed(stored: dict[str, Any], row: int = 0, table: str = "rows", **values: Any) -> dict[str, Any]:
    stored[table][row] |= values
    return stored


REFUSED = {
    "schema": (lambda s: {**s, "schema": 2}, "results: schema must be 1, got 2"),
    "no dictionary": (lambda s: [s], "results: schema must be 1, got list"),
    "no header": (lambda s: {k: v for k, v in s.items() if k != "header"}, "results: header must be a dict, got NoneType"),
    "rows": (lambda s: {**s, "rows": {}}, "results: rows must be a list, got dict"),
    "networks": (lambda s: {**s, "networks": None}, "results: networks must be a list, got NoneType"),
    "absent": (lambda s: {**s, "absent": []}, "results: absent must be a dict, got list"),
    "not_run": (lambda s: {**s, "not_run": "all"}, "results: not_run must be a list, got str"),
    "unknown field": (lambda s: changed(s, 1, speed=1), r"results: rows\[1\] has speed, which no schema knows"),
    "text for a figure": (lambda s: changed(s, device_us="3"), r"results: rows\[0\].device_us must be float \| None, got '3'"),
    "true for a figure": (lambda s: changed(s, device_us=True), r"results: rows\[0\].device_us must be float \| None, got True"),
    "fraction of a byte": (lambda s: changed(s, bytes_min=1.5), r"results: rows\[0\].bytes_min must be int, got 1.5"),
    "no case": (lambda s: changed(s, case=None), r"results: rows\[0\].case must be str, got None"),
    "shape": (lambda s: changed(s, shape=["2"]), r"results: rows\[0\].shape must be tuple"),
    "status": (lambda s: changed(s, status="fine"), r"results: rows\[0\].status must be one of ok, wrong, failed, refused, absent, got"),
    "no reason": (lambda s: changed(s, status="wrong"), r"results: rows\[0\] is wrong and must say why in reason"),
    "network": (lambda s: changed(s, 2, "networks", batch="8"), r"results: networks\[2\].batch must be int, got '8'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, stored: dict[str, Any], tmp_path: Path) -> None:
    change, message = REFUSED[name]
    check(stored)
    bad = change(stored)
    with pytest.raises(ValueError, match=message):
        check(bad)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(bad))
    with pytest.raises(ValueError, match=r"bad\.json: results: "):
        Results.load(path)


def test_a_field_that_is_missing_is_named(stored: dict[str, Any]) -> None:
    del stored["rows"][0]["launches"]
    with pytest.raises(ValueError, match=r"results: rows\[0\] must have launches"):
        check(stored)


def test_no_json_is_refused_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"schema": 1,')
    with pytest.raises(ValueError, match=r"cut\.json: "):
        Results.load(tmp_path / "cut.json")


def test_folder_name() -> None:
    assert folder_name("NVIDIA H200") == "h200"
    assert folder_name("NVIDIA GeForce RTX 4090") == "geforce-rtx-4090"
    assert folder_name("Intel(R) Xeon(R) CPU @ 2.0GHz") == "intel-xeon-cpu-2-0ghz"
    assert folder_name("..") == "unknown"


def test_by_keeps_the_order(given: Results) -> None:
    groups = by(given.rows, "case", "direction")
    assert next(iter(groups)) == (MATRIX[0].name, "forward")
    assert sum(map(len, groups.values())) == len(given.rows)
    assert all(row.direction == direction for (_, direction), rows in groups.items() for row in rows)
