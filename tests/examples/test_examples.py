"""The examples run, in a few steps on made-up digits: training, table and picture."""

from __future__ import annotations

import gzip
import importlib
import json
import struct
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


@pytest.fixture
def brain(tmp_path: Path) -> Path:
    """Slabs of other, grey and white matter along x of (32, 64, 32) voxels, in NIfTI's format."""
    generator = torch.Generator().manual_seed(0)
    tissue = (torch.arange(32) // 11).view(32, 1, 1).expand(32, 64, 32)
    volumes = (40 + 80 * tissue + torch.randint(0, 20, tissue.shape, generator=generator), 255 * (tissue == 1), 255 * (tissue == 2))
    for kind, volume in zip(("t1", "gm", "wm"), volumes, strict=True):
        header = bytearray(352)
        struct.pack_into("<8h", header, 40, 3, *volume.shape, 1, 1, 1, 1)
        struct.pack_into("<2h", header, 70, 2, 8)
        struct.pack_into("<3f", header, 108, 352, 0.5 if kind == "t1" else 0.0, 1.0 if kind == "t1" else 0.0)
        header[344:348] = b"n+1\0"
        voxels = volume.permute(2, 1, 0).reshape(-1).to(torch.uint8).numpy().tobytes()
        (tmp_path / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz").write_bytes(gzip.compress(bytes(header) + voxels, 1))
    return tmp_path


@pytest.mark.parametrize("example", ["nnunet_channels_last"], indirect=True)
def test_nnunet_channels_last(example: Any, brain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The four copies agree and learn; a difference in a gradient would be told."""
    monkeypatch.setattr(example, "PATCH", 16)
    t1 = example.read_nifti(example.find_brain(brain)[0])
    assert t1.shape == (32, 64, 32) and float(t1.min()) == 21 and 65 < float(t1[15].mean()) < 66
    assert example.main(["--data", str(brain), "--out", str(brain), "--steps", "2"]) == 0
    assert (brain / "brain.png").stat().st_size > 10_000 and "white matter held out" in " ".join(capsys.readouterr().out.split())
    runs = example.train(example.load_brain(example.find_brain(brain), torch.device("cpu")), 25, lambda: None)
    assert [(r.layers, r.channels_last) for r in runs] == [(n, last) for last in (False, True) for n in ("torch.nn", "normfused")]
    assert not example.disagreements(runs)
    for run in runs:
        fused = [m for m in run.model.modules() if isinstance(m, nf.InstanceNormAct3d)]
        assert len(fused) == (10 if run.layers == "normfused" else 0) and all(m.act is not None for m in fused)
        assert run.losses[-1] < run.losses[0] - 0.5 and run.saved_bytes > 0
    runs[1].gradients[0] = runs[1].gradients[0] + 0.01 * max(float(g.abs().max()) for g in runs[1].gradients)
    assert "gradients of the first batch differ by 1.0e-02" in example.disagreements(runs)[0]


@pytest.mark.parametrize("example", ["nnunet_channels_last"], indirect=True)
def test_the_brain_is_asked_for(example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps nilearn==0\.14\.1"):
        example.find_brain(None)
    with pytest.raises(SystemExit, match="no file .*mni_icbm152_t1"):
        example.find_brain(tmp_path)
