"""Every provider of this environment runs every norm in both modes and is right; the others say why they are absent or refuse."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from normfused.benchmark import peers
from normfused.benchmark.accuracy import errors
from normfused.benchmark.cases import CHANNELS_LAST, QUICK, Case
from normfused.benchmark.peers import PEERS, Peer, probe
from normfused.benchmark.providers import Provider, all_providers, eager, names, prepare, running_statistics, saved_bytes, step, tensors

BATCH = Case("batch", (4, 8, 6, 6), "relu", dtype=torch.float32)


def tiny(case: Case) -> Case:
    """The same operation on few numbers."""
    if case.rows:
        return replace(case, shape=(12, 32))
    return replace(case, shape=(2, 8, *[6] * (len(case.shape) - 2)), groups=min(case.groups, 4))


TINY = list({case.name: case for case in map(tiny, QUICK)}.values())
FOUND = all_providers("cpu", peers=True)
PRESENT = [provider for provider in FOUND if provider.absent is None]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("provider", [p for p in PRESENT if not p.name.startswith("compile")], ids=lambda p: p.name)
def test_a_provider_is_right(provider: Provider, training: bool) -> None:
    for case in TINY:
        if provider.refuses(case, "cpu", training) is None:
            found = errors(provider, case, "cpu", training)
            assert not found.wrong, (case.name, found)


def test_a_compiled_chain_is_right() -> None:
    """One, since each takes seconds."""
    (provider,) = all_providers("cpu", ["compile"])
    for case in [c for c in TINY if c.residual == "pre_norm"]:
        assert not errors(provider, case, "cpu").wrong, case.name


def test_compiled_modules_do_not_share_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """More cases than torch compiles one function for, and none falls back to eager or is compiled twice."""
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode, dynamic: real(function, backend=backend, dynamic=dynamic))
    (provider,) = all_providers("cpu", ["compile"])
    cases = [replace(BATCH, shape=(2, channels, 4, 4)) for channels in range(1, torch._dynamo.config.recompile_limit + 4)]
    modules = [prepare(provider, case, "cpu") for case in cases]
    for _ in range(2):  # in turns
        for case, module in zip(cases, modules, strict=True):
            module(tensors(case, "cpu")[0])
    assert len(compilations) == len(cases)


def test_names_are_those_of_all_providers() -> None:
    assert [provider.name for provider in FOUND] == names()
    assert {"eager", "compile", "compile-max-autotune", "eager-no-cudnn", "normfused-cuda", "normfused-torch", *PEERS} <= set(names())
    assert {"eager", "compile", "normfused-torch"} <= {provider.name for provider in PRESENT}


def test_wanted_providers_only() -> None:
    assert [p.name for p in all_providers("cpu", ["normfused-torch", "eager"])] == ["eager", "normfused-torch"]
    assert {p.name for p in all_providers("cpu")}.isdisjoint(PEERS)
    with pytest.raises(ValueError, match=r"^all_providers: wanted must be of eager, .*torchnorm.*, got apeks, eagre$"):
        all_providers("cpu", ["eagre", "apeks", "eager"])


def test_absence_and_refusal_are_said_in_words() -> None:
    for provider in FOUND:
        if provider.absent is not None:
            assert len(provider.absent.split()) >= 4
            assert "\n" not in provider.absent
    for peer in PEERS.values():
        reasons = [peer.refuses(case, device, training) for case in TINY for device in ("cpu", "cuda") for training in (True, False)]
        assert None in reasons or peer is PEERS["inplace-abn"]  # whose activations QUICK does not have behind a batch norm
        assert all(len(reason.split()) >= 4 for reason in reasons if reason is not None)


@pytest.mark.parametrize(
    ("name", "case", "device", "training", "word"),
    [
        ("compile-max-autotune", BATCH, "cpu", True, "matrix products"),
        ("compile-max-autotune", BATCH, "cuda", True, None),
        ("eager-no-cudnn", BATCH, "cuda", True, None),
        ("eager-no-cudnn", replace(BATCH, dtype=torch.bfloat16), "cuda", True, "float16 and float32"),
        ("eager-no-cudnn", replace(BATCH, norm="group"), "cuda", True, "batch norm"),
        ("eager-no-cudnn", replace(BATCH, shape=(8, 4)), "cuda", True, "maps"),
        ("timm", BATCH, "cpu", True, None),
        ("timm", replace(BATCH, residual="pre_act"), "cpu", True, "no layer"),
        ("timm", replace(BATCH, norm="instance"), "cpu", True, "no instance norm"),
        ("liger-kernel", replace(BATCH, norm="layer", dim=1), "cuda", True, "last dimension"),
        ("liger-kernel", Case("rms", (4, 8), residual="pre_norm"), "cuda", True, None),
        ("torchnorm", replace(BATCH, norm="group"), "cuda", True, "torch's"),
        ("flag-gems", BATCH, "cuda", True, None),
        ("flag-gems", BATCH, "cuda", False, "eval"),
        ("cudnn-frontend", BATCH, "cuda", True, "channels_last"),
        ("cudnn-frontend", replace(BATCH, layout=CHANNELS_LAST), "cuda", True, None),
        ("cudnn-frontend", replace(BATCH, layout=CHANNELS_LAST), "cuda", False, "batch's statistics"),
        ("inplace-abn", BATCH, "cpu", True, "inverted"),
        ("inplace-abn", replace(BATCH, act="elu"), "cpu", True, None),
        ("apex", replace(BATCH, dtype=torch.float16, layout=CHANNELS_LAST), "cuda", True, None),
        ("apex", replace(BATCH, layout=CHANNELS_LAST), "cuda", True, "float16"),
        ("apex", replace(BATCH, norm="group", groups=4, layout=CHANNELS_LAST), "cuda", True, "16 or 32 groups"),
    ],
)
def test_refusals(name: str, case: Case, device: str, training: bool, word: str | None) -> None:
    refuses = PEERS[name].refuses if name in PEERS else next(p for p in FOUND if p.name == name).refuses
    reason = refuses(case, device, training)
    assert reason is None if word is None else word in (reason or "")


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    roots = {peer.module.partition(".")[0] for peer in PEERS.values()}
    code = (
        "import sys, normfused.benchmark.accuracy, normfused.benchmark.peers\n"
        "from normfused.benchmark.providers import all_providers, names\n"
        "names(); all_providers('cpu')\n"
        f"print(sorted({{name.partition('.')[0] for name in sys.modules}} & {roots!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package ``peerless`` that can be imported, with the text of its second module to be written."""
    folder = tmp_path / "peerless"
    folder.mkdir()
    (folder / "__init__.py").write_text("from . import first, second\n")
    (folder / "first.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "peerless"]:
        del sys.modules[name]


PEERLESS = Peer("peerless", "pip install peerless", eager, peers._only("batch"), gpu_only=False)


def test_a_library_that_is_there(library: Path) -> None:
    (library / "second.py").write_text("")
    assert probe(PEERLESS, "cpu") is None
    assert "peerless.first" in sys.modules


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("raise RuntimeError('no driver\\nsecond line')", "RuntimeError: no driver"),
        ("import sys; sys.exit('needs a licence')", "SystemExit: needs a licence"),
        ("import a_module_that_nobody_has", "ModuleNotFoundError"),
        ("def", "SyntaxError"),
        ("raise OSError", "OSError: no message"),
    ],
)
def test_a_broken_library_is_absent_and_leaves_nothing(library: Path, text: str, word: str) -> None:
    (library / "second.py").write_text(text)
    reason = probe(PEERLESS, "cpu")
    assert reason is not None
    assert word in reason
    assert "\n" not in reason
    assert not [name for name in sys.modules if name.partition(".")[0] == "peerless"]


def test_a_library_that_is_not_there_or_of_no_use_here(library: Path) -> None:
    assert (
        probe(replace(PEERLESS, module="a_module_that_nobody_has"), "cpu")
        == "a_module_that_nobody_has is not installed: pip install peerless"
    )
    assert probe(replace(PEERLESS, gpu_only=True), "cpu") == "peerless has kernels for a GPU only"
    assert "peerless" not in sys.modules


def test_all_providers_of_a_case_hold_the_same_numbers() -> None:
    """In eval mode too, where they normalize with the running statistics."""
    case = replace(BATCH, dtype=torch.bfloat16)
    first, second = (prepare(p, case, "cpu", training=False) for p in all_providers("cpu", ["eager", "normfused-torch"]))
    assert not first.training
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.float32
        assert torch.equal(a, a.bfloat16().float())
    for a, b in zip(running_statistics(first), running_statistics(second), strict=True):
        assert torch.equal(a, b)
        assert a.unique().numel() > 1
    assert len(running_statistics(first)) == 2


def test_tensors_have_the_case_s_type_and_layout() -> None:
    case = replace(BATCH, dtype=torch.float16, layout=CHANNELS_LAST, residual="pre_act")
    for t in tensors(case, "cpu"):
        assert t.dtype == torch.float16
        assert t.is_contiguous(memory_format=torch.channels_last)
    assert tensors(BATCH, "cpu")[1] is None
    assert not torch.equal(tensors(case, "cpu", 0)[0], tensors(case, "cpu", 1)[0])


def test_step_gives_both_outputs_a_gradient() -> None:
    case = Case("rms", (4, 8), residual="pre_norm", dtype=torch.float32)
    module = prepare(Provider("eager", eager), case, "cpu")
    x, residual, dy = tensors(case, "cpu")
    x.requires_grad_(), residual.requires_grad_()
    y, (dx, dresidual, dw) = step(module, x, residual, dy)
    want = torch.autograd.grad((module.norm(x + residual) * dy).sum(), x)[0] + dy
    torch.testing.assert_close(dx, want)
    assert torch.equal(dx, dresidual)
    assert (y.shape, dw.shape) == (x.shape, (8,))


def test_saved_bytes_counts_tensors_but_not_parameters() -> None:
    case = Case("layer", (64, 32), "silu", dtype=torch.float32)
    x = tensors(case, "cpu")[0].requires_grad_()
    kept = saved_bytes(prepare(Provider("eager", eager), case, "cpu"), x, None)
    assert kept == 2 * case.tensor_bytes + 2 * 64 * 4  # x, the norm's output, and two statistics a row
