"""The examples run, in a few steps on made-up digits: training, table and picture."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import normfused as nf

EXAMPLES = Path(nf.__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Any]:
    if not EXAMPLES.is_dir():
        pytest.skip("an installed package keeps its examples elsewhere")
    for needed in ("matplotlib", "numpy", "rich"):
        pytest.importorskip(needed)
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module(request.param)
    for name in (request.param, "train_digits"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 images of 784 pixels and a label a line: a bright bar whose place is the digit, and noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 10
    images = torch.randint(0, 60, (100, 28, 28), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 2 * label + 2 : 2 * label + 5] += 180
    path = tmp_path_factory.mktemp("digits") / "digits.csv"
    rows = torch.cat([images.flatten(1), labels[:, None]], 1).tolist()
    path.write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")
    return path


@pytest.mark.parametrize("example", ["compare_norms"], indirect=True)
def test_compare_norms(example: Any, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every method that this version has trains at both batch sizes; one that it has not is named, with the reason."""
    missing = example.Method("Missing", example.of("NoSuchNorm2d"))
    example.METHODS = (*example.METHODS, missing)
    assert example.main(["--data", str(digits), "--out", str(tmp_path), "--scale", "0.002"]) == 0
    record = json.loads((tmp_path / "norms.json").read_text())
    assert record["missing"].pop("Missing") == f"normfused {nf.__version__} has no NoSuchNorm2d"
    ran = [(r["method"], r["batch"]) for r in record["results"]]
    assert ran == [(m.name, b) for m in example.METHODS[:-1] if m.name not in record["missing"] for b in (2, 64)]
    assert {"BN", "GN", "IN", "LN", "FRN + TLU", "RescaleNet, no norm"} <= {name for name, _ in ran}
    assert all(0 <= r["accuracy"] <= 1 and r["final_loss"] < 10 for r in record["results"])
    assert (tmp_path / "norms.png").stat().st_size > 10_000
    assert "NoSuchNorm2d" in capsys.readouterr().out


@pytest.mark.parametrize("example", ["compare_norms"], indirect=True)
def test_the_comparison_learns(example: Any, digits: Path) -> None:
    """Above chance, by far, on images that it can learn in forty steps."""
    images, labels, *test = example.load_digits(digits, torch.device("cpu"))
    data = (torch.nn.functional.avg_pool2d(images, 2), labels, torch.nn.functional.avg_pool2d(test[0], 2), test[1])
    example.RATES[16] = 0.05
    by_name = {m.name: m for m in example.METHODS}
    for name in ("BN", "RescaleNet, no norm"):
        assert example.train(by_name[name], 16, 40, data, lambda: None).accuracy > 0.5, name


@pytest.mark.parametrize("example", ["spectral_norm_gan"], indirect=True)
def test_spectral_norm_gan(example: Any, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The penalty reaches the critic's weights by the second derivative, and training brings the made images near the real ones."""
    judge = example.critic()
    example.gradient_penalty(judge, torch.randn(4, 1, 14, 14), torch.randn(4, 1, 14, 14)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in judge.named_parameters() if "weight" in n)
    assert example.main(["--data", str(digits), "--out", str(tmp_path), "--steps", "2"]) == 0
    assert (tmp_path / "gan.png").stat().st_size > 10_000
    assert "energy distance" in capsys.readouterr().out
    images = 2 * torch.nn.functional.avg_pool2d(example.load_digits(digits, torch.device("cpu"))[0] * 0.3081 + 0.1307, 2) - 1
    _, history, (before, after) = example.train(images.repeat(8, 1, 1, 1), 40, lambda: None)
    assert len(history) == 40 and after < 0.5 * before
