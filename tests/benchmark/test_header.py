"""What figures are labelled with."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch

import normfused
from normfused.benchmark import header


def test_it_names_what_decides_a_figure() -> None:
    found = header.header("cpu", {"rounds": 7})
    assert {"device", "machine", "torch", "normfused", "versions", "commit", "dirty", "date", "threads", "options"} <= found.keys()
    assert found["versions"]["torch"] == found["torch"] == torch.__version__
    assert found["options"] == {"rounds": 7}


def test_it_names_nobody() -> None:
    text = json.dumps(header.header("cpu"))
    assert str(Path.home()) not in text
    assert str(Path(normfused.__file__).parent) not in text
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text


def test_without_a_checkout_the_commit_is_what_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normfused, "__file__", str(tmp_path / "normfused" / "__init__.py"))
    monkeypatch.delenv("NORMFUSED_COMMIT", raising=False)
    assert header.commit() == (None, None)
    monkeypatch.setenv("NORMFUSED_COMMIT", "abc1234")
    assert header.commit() == ("abc1234", None)


def smi(folder: Path, answers: dict[str, str]) -> None:
    """An nvidia-smi that knows these fields and no other."""
    lines = "".join(f"  *--query-gpu={fields}' '*) echo '{text}'; exit 0;;\n" for fields, text in answers.items())
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncase \"$*\" in\n{lines}esac\necho 'Field is not a valid field to query.'; exit 2\n")
    program.chmod(0o755)


def test_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    answers = {"clocks.sm,clocks.mem,power.draw,temperature.gpu": "1980, 2619, 121.5, [N/A]"}
    smi(tmp_path, answers | {"clocks_throttle_reasons.active": "0x0000000000000001"})
    assert header.clocks() == {
        "sm_mhz": 1980.0,
        "memory_mhz": 2619.0,
        "power_w": 121.5,
        "temperature_c": None,
        "throttle_reasons": "0x0000000000000001",
    }
    assert header.nvidia_smi("clocks.unknown") == {}


def test_without_nvidia_smi_there_are_no_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert header.clocks() == {}


def test_differences_show_both_sides() -> None:
    here = header.header("cpu")
    assert header.differences(here, here) == []
    there = {**here, "machine": "another", "date": "2001-01-01 00:00 UTC"}
    assert header.differences(there, here) == [f"machine: another there, {here['machine']} here"]
