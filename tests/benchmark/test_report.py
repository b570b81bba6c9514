"""Goals, pages and charts of made-up results: what must be said is said, and the same rows give the same bytes."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from normfused.benchmark import charts, report
from normfused.benchmark.cases import MATRIX, QUICK, Case
from normfused.benchmark.comparison import comparisons, headline, network_comparisons
from normfused.benchmark.results import PASSES, NetworkRow, OperatorRow, Results
from normfused.benchmark.targets import NOT_MEASURED, TARGETS, Verdict, judge

from . import synthetic

ROOT = Path(__file__).parents[2]
drawn = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="pictures need matplotlib")
SOME = MATRIX[:6]


def written(tmp_path: Path, *results: Results, name: str = "docs") -> tuple[str, str]:
    """(performance.md, performance-full.md) of these results."""
    files = []
    for i, one in enumerate(results):
        files.append(tmp_path / f"{i}.json")
        one.save(files[-1])
    report.write(files, tmp_path / name, tmp_path / name / "pictures")
    return (tmp_path / name / "performance.md").read_text(), (tmp_path / name / "performance-full.md").read_text()


def section(page: str, title: str) -> str:
    """The text below a heading, up to the next of any level."""
    found = re.search(rf"^#+ {re.escape(title)}$(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


# --------------------------------------------------------------------------------------------------------------------- goals
def verdict(name: str, results: Results | None) -> Verdict:
    return judge(next(t for t in TARGETS if t.name == name), results)


@pytest.fixture(scope="module")
def fast() -> Results:
    """Every case of the matrix at 96 % of the copy rate and 3.2 times eager."""
    return synthetic.gpu()


def test_all_goals_are_there() -> None:
    assert [t.name for t in TARGETS] == [f"P{i}" for i in range(1, 15)]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_only_a_gpu_answers(target) -> None:  # type: ignore[no-untyped-def]
    assert judge(target, None) == judge(target, synthetic.cpu()) == Verdict(NOT_MEASURED, "not measured")


@pytest.mark.parametrize("name", ["P1", "P2", "P5", "P7", "P9", "P10", "P11", "P14"])
def test_met(name: str, fast: Results) -> None:
    found = verdict(name, fast)
    assert found.verdict == "met", found


def test_met_with_numbers(fast: Results) -> None:
    rows = [c for c in MATRIX if c.norm in ("layer", "rms") and c.dim == -1 and c.tensor_bytes >= 64e6 and "bfloat16" in c.name]
    assert f"{len(rows)} of {len(rows)} cases, worst 96 %" in verdict("P1", fast).measured
    # 0.96 over 0.5 of the faster mode of torch.compile; 9 maps of ResNet-50 in two formats and two batches
    assert "over compile: 36 of 36 cases, worst 1.92x" in verdict("P7", fast).measured


def rms_forward(results: Results) -> OperatorRow:
    rows = [r for r in results.rows if r.case.startswith("rms-16384x4096-bf") and r.provider == "normfused-cuda"]
    return next(r for r in rows if r.direction == "forward")


def test_missed_by_one_case_names_it() -> None:
    results = synthetic.gpu()
    slow = next(
        r for r in results.rows if r.case.startswith("rms-16384x4096-bf") and r.direction == "forward" and r.provider == "normfused-cuda"
    )
    slow.pct_copy = 42.0
    found = verdict("P1", results)
    assert found.verdict == "missed"
    assert f"worst 42 % ({slow.case})" in found.measured


def test_wrong_is_missed() -> None:
    results = synthetic.gpu()
    bad = next(
        r for r in results.rows if r.case.startswith("rms-16384x4096-bf") and r.direction == "forward" and r.provider == "normfused-cuda"
    )
    bad.status, bad.reason, bad.device_us, bad.pct_copy = "wrong", "3 times what is allowed", None, None
    found = verdict("P1", results)
    assert found.verdict == "missed"
    assert f"wrong or failed: {bad.case}" in found.measured


def test_some_cases_are_met_in_part() -> None:
    found = verdict("P1", synthetic.gpu([c for c in MATRIX if c.name.startswith("rms-16384x4096-bfloat16")]))
    assert found.verdict == "met in part"
    assert re.search(r"1 of 1 cases, .*, \d+ not measured", found.measured)


def test_absent_rows_are_not_measured() -> None:
    empty = Results(dict(synthetic.GPU))
    for target in TARGETS:
        found = judge(target, empty)
        assert found.verdict == "not measured", target
        assert "not measured" in found.measured or target.name == "P6"


def test_no_row_answers_dram_bytes_and_bits(fast: Results) -> None:
    assert verdict("P6", fast).verdict == "not measured"
    assert verdict("P13", fast).verdict == "met in part"
    assert verdict("P12", fast).verdict == "met in part"


@pytest.mark.parametrize(("factor", "wanted"), [(1.3, "met"), (1.0, "missed")])
def test_networks_goal(factor: float, wanted: str) -> None:
    assert verdict("P14", Results(dict(synthetic.GPU), [], synthetic.networks(factor))).verdict == wanted


def test_read_once_is_of_the_route() -> None:
    results = synthetic.gpu([c for c in MATRIX if c.name.startswith("batch+relu-4x128x1024x1024-bfloat16-cont")])
    assert verdict("P3", results).verdict == "met in part"
    for row in results.rows:
        row.route = "two_pass" if row.route else None
    assert verdict("P3", results).verdict == "missed"


# --------------------------------------------------------------------------------------------------------------- comparisons
def test_compile_is_its_fastest_mode_and_ours_what_a_user_gets() -> None:
    found = comparisons(synthetic.gpu(SOME))[0]
    assert found.compiled is not None
    assert found.compiled.provider == "compile"
    assert found.ours is not None
    assert found.ours.provider == "normfused-cuda"
    assert found.speedup(found.eager) == pytest.approx(0.96 / 0.3)
    found = comparisons(synthetic.gpu(SOME, compile_max_autotune=0.8))[0]
    assert found.compiled is not None
    assert found.compiled.provider == "compile-max-autotune"


def test_a_failure_is_not_hidden_by_another_backend() -> None:
    results = synthetic.gpu(SOME[:1])
    for row in results.rows:
        if row.provider == "normfused-cuda":
            row.status, row.reason = "failed", "a launch failed"
    found = comparisons(results)[0]
    assert found.ours is not None
    assert found.ours.provider == "normfused-cuda"
    assert found.speedup(found.eager) is None
    for row in results.rows:
        if row.provider == "normfused-cuda":
            row.status, row.reason = "absent", "not built"
    found = comparisons(results)[0]
    assert found.ours is not None
    assert found.ours.provider == "normfused-triton"


def test_headline_of_other_cases_is_the_largest_of_each_kind() -> None:
    small, large, other = Case("batch", (1, 2, 3, 4)), Case("batch", (1, 2, 3, 5)), Case("batch", (1, 2, 3, 3), "relu")
    assert [c.case for c in headline(comparisons(synthetic.gpu([small, large, other])))] == [large.name, other.name]


def test_headline_of_the_matrix_is_its_headline_cases() -> None:
    found = [c.case for c in headline(comparisons(synthetic.gpu(MATRIX[-5:] + MATRIX[:2])))]
    assert found == [MATRIX[0].name, MATRIX[1].name]


# --------------------------------------------------------------------------------------------------------------------- pages
def test_nothing_measured(tmp_path: Path) -> None:
    page, full = written(tmp_path)
    assert page.startswith(f"<!-- Written by `{report.COMMAND}`.")
    assert "**No figure here is from a GPU:**" in page
    assert page.count(NOT_MEASURED) == len(TARGETS)
    assert "Nothing was measured." in full
    assert "| must move |" in page


@drawn
def test_results_without_rows(tmp_path: Path) -> None:
    page, _ = written(tmp_path, Results(dict(synthetic.CPU)))
    assert "No training step was measured." in page
    assert "No network was measured." in page
    assert "Nothing of what was measured." in section(page, "Where normfused is slower, larger or wrong")
    assert "| chart: speedup | no training step was timed" in page


def test_a_cpu_is_called_a_cpu(tmp_path: Path) -> None:
    page, full = written(tmp_path, synthetic.cpu())
    assert "**No figure here is from a GPU:**" in page
    assert "it says nothing of the CUDA kernels" in page
    assert "## Imaginary CPU (CPU)" in page
    assert page.count(NOT_MEASURED) == len(TARGETS)
    assert "| normfused-cuda | no CUDA GPU is visible to torch |" in page
    assert "CUDA-graph" not in page
    for case in QUICK:
        assert case.name.split("-")[1] in full


def test_a_gpu(tmp_path: Path) -> None:
    page, full = written(tmp_path, synthetic.cpu(), synthetic.gpu(SOME))
    assert "No figure here is from a GPU" not in page
    assert page.index("## NVIDIA Imaginary") < page.index("## Imaginary CPU"), "GPUs first"
    assert "| copy rate | 4,000 GB/s |" in page
    assert "| commit | abc1234 |" in page
    assert "| apex | apex: not installed |" in page
    assert "| P14 |" in page
    assert "GB/s, NVIDIA Imaginary |" in section(page, "Bytes")
    assert "3,840 |" in section(page, "Bytes"), "96 % of the copy rate"
    row = next(line for line in section(page, "Headline").splitlines() if line.startswith(f"| {charts.label_of(SOME[0])} "))
    assert [cell.strip() for cell in row.split("|")][5:7] == ["3.20", "1.92"]
    assert "liger" in row
    assert "| resnet50, batch 256 | channels_last | bfloat16 | training | eager | 100 | 2,560 | 20 | 76.9 | 3,328 | 15 | 1.30 |" in page
    assert full.count("| training |") >= len(SOME) * len(PASSES)


@drawn
def test_pictures_are_embedded_and_there(tmp_path: Path) -> None:
    page, full = written(tmp_path, synthetic.gpu(SOME))
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page + full)
    assert {"pictures/imaginary-speedup.png", "pictures/imaginary-networks.png", "pictures/imaginary-error.png"} <= set(links)
    assert {tmp_path / "docs" / link for link in links} == set((tmp_path / "docs" / "pictures").iterdir())


def test_what_is_slower_or_wrong_is_listed(tmp_path: Path) -> None:
    results = synthetic.gpu(SOME, normfused_triton=0.45)  # faster than eager, slower than torch.compile
    case = SOME[0]
    cuda = {r.direction: r for r in results.rows if r.case == case.name and r.provider == "normfused-cuda"}
    cuda["forward"].device_us = 1e6
    cuda["backward"].status, cuda["backward"].reason = "wrong", "dx: 7 times what is allowed"
    cuda["forward_backward"].saved_bytes = 5 * case.tensor_bytes
    results.networks[1].step_ms = 150.0
    failed = results.networks[3]
    failed.status, failed.reason, failed.step_ms = "failed", "out of memory", None
    results.not_run = ["some-case"]
    peer = next(r for r in results.rows if r.provider == "liger")
    peer.status, peer.reason = "wrong", "y: 9 times what is allowed"
    page, _ = written(tmp_path, results)
    text = section(page, "Where normfused is slower, larger or wrong")
    name = charts.label_of(case)
    assert f"| {name} | training | bwd | normfused-cuda | wrong | dx: 7 times what is allowed |" in text
    assert re.search(rf"\| {re.escape(name)} \| training \| fwd \| normfused-cuda \| \*\*0\.\d+\*\* \|", text)
    assert f"| {name} | training | fwd + bwd | normfused-cuda | saved | 2.50x |" in text
    for other in SOME:
        for direction in ("fwd", "bwd", "fwd + bwd"):
            assert f"| {charts.label_of(other)} | training | {direction} | normfused-triton | 1.50 | **0.90** |" in text
    assert "| resnet50, batch 256, channels_last, bfloat16, training | eager | step | 100 ms | 150 ms |" in text
    assert "| resnet50, batch 256 | training | compile | normfused | failed | out of memory |" in text
    assert "| liger: wrong in 1 cases | y: 9 times what is allowed |" in page
    assert "| 1 cases | time did not suffice: some-case |" in page


def test_nothing_negative_is_said_so(tmp_path: Path) -> None:
    results = synthetic.gpu(SOME)
    page, _ = written(tmp_path, results)
    assert "Nothing of what was measured." in section(page, "Where normfused is slower, larger or wrong")


@drawn
def test_same_rows_same_bytes(tmp_path: Path) -> None:
    given = [synthetic.gpu(SOME), synthetic.cpu()]
    first = written(tmp_path, *given, name="a")
    assert first == written(tmp_path, *given, name="b")
    pictures = sorted((tmp_path / "a" / "pictures").iterdir())
    assert pictures
    for picture in pictures:
        assert picture.read_bytes() == (tmp_path / "b" / "pictures" / picture.name).read_bytes(), picture.name


# ------------------------------------------------------------------------------------------------------------------- charts
@drawn
def test_empty_results_give_reasons_and_no_file(tmp_path: Path) -> None:
    files, reasons = charts.drawn(Results(dict(synthetic.GPU)), tmp_path / "none")
    assert files == []
    assert set(reasons) == {"speedup", "bandwidth", "memory", "networks", "error"}
    assert not (tmp_path / "none").exists()


def test_without_matplotlib_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    files, reasons = charts.drawn(synthetic.gpu(SOME), tmp_path)
    assert files == []
    assert reasons == {"charts": "matplotlib is not installed: pip install matplotlib"}
    page, _ = written(tmp_path, synthetic.gpu(SOME))
    assert "| chart: charts | matplotlib is not installed: pip install matplotlib |" in page


@drawn
def test_no_picture_has_too_many_bars(tmp_path: Path) -> None:
    results = synthetic.gpu(c for c in MATRIX if c.norm == "frn" or c.norm == "batch_instance")
    names = [p.name for p in charts.draw(results, tmp_path)]
    cases = len({r.case for r in results.rows})
    assert sum(name.startswith("all-speedup") for name in names) == -(-cases // 24)


@drawn
def test_not_finite_errors_are_drawn(tmp_path: Path) -> None:
    results = synthetic.gpu(SOME[:1])
    results.rows[0].err_of_allowed = float("nan")
    results.rows[1].err_of_allowed = 0.0
    assert any(p.name == "error.png" for p in charts.draw(results, tmp_path))


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (Case("batch", (32, 256, 56, 56), "relu", "pre_act", layout="channels_last"), "BN+add+ReLU 32x256x56x56 NHWC"),
        (Case("rms", (16384, 4096), residual="pre_norm"), "add+RMS 16384x4096"),
        (Case("layer", (8, 96, 7, 7), "gelu", dim=1), "LN+GELU 8x96x7x7 NCHW"),
    ],
)
def test_label(case: Case, text: str) -> None:
    assert charts.label_of(case) == text


# ------------------------------------------------------------------------------------------------------------------ command
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic.cpu().save(tmp_path / "r.json")
    assert report.main([str(tmp_path / "r.json"), "--out", str(tmp_path / "out")]) == 0
    *pages, pictures = capsys.readouterr().out.splitlines()
    assert pages == [f"Report: {tmp_path / 'out' / name}" for name in ("performance.md", "performance-full.md")]
    found = list((tmp_path / "out" / "pictures").glob("*.png"))
    assert pictures == (f"Pictures: {len(found)} in {tmp_path / 'out' / 'pictures'}" if found else "Pictures: none; the page says why")


def test_command_refuses_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.json").write_text("{}")
    assert report.main([str(tmp_path / "r.json"), "--out", str(tmp_path)]) == 2
    assert "schema must be 1, got None" in capsys.readouterr().err
    assert report.main([str(tmp_path / "no.json"), "--out", str(tmp_path)]) == 2


def test_default_files_are_the_newest_of_each_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "results_folder", lambda: tmp_path / "bench/results")
    for folder, name, date in (("a", "1.json", "2026-01-03"), ("a", "2.json", "2026-01-02"), ("b", "1.json", "2025-01-01")):
        Results({**synthetic.CPU, "date": date}).save(tmp_path / "bench/results" / folder / name)
    for name, text in (("results.json", '{"stages": []}'), ("traffic.json", "[]"), ("notes.json", "no JSON")):
        (tmp_path / "bench/results/a" / name).write_text(text)
    found = report.default_files()
    assert found == [tmp_path / "bench/results/a/1.json", tmp_path / "bench/results/b/1.json"]


def test_default_files_of_another_schema_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "results_folder", lambda: tmp_path / "bench/results")
    path = tmp_path / "bench/results/a/1.json"
    Results(dict(synthetic.CPU)).save(path)
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 99'))
    assert report.main(["--out", str(tmp_path / "out")]) == 2
    assert f"{path}: results: schema must be 1, got 99" in capsys.readouterr().err


def test_network_without_its_pair() -> None:
    alone = NetworkRow("resnet50", 8, (8, 3, 32, 32), "contiguous", "float32", "training", "torch.nn", "eager", step_ms=1.0)
    (found,) = network_comparisons([alone])
    assert found.ours is None
    assert found.speedup is None


# ------------------------------------------------------------------------------------------------------------ the repository
def test_committed_page_is_generated() -> None:
    """With the command in the first line, and of results that are committed: a page of a GPU needs its file."""
    page = (ROOT / "docs/performance.md").read_text()
    assert page.startswith(f"<!-- Written by `{report.COMMAND}`.")
    files = [Results.load(path) for path in report.default_files()]
    on_gpu = any(results.header.get("device") == "cuda" for results in files)
    assert ("No figure here is from a GPU" in page) != on_gpu


def test_links_of_the_pages_are_there() -> None:
    for page in ("docs/performance.md", "docs/performance-full.md", "docs/traffic.md", "README.md"):
        folder = (ROOT / page).parent
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert (folder / link).exists(), f"{page}: {link}"


def test_figures_that_readme_quotes_are_in_the_report() -> None:
    """Numbers in README between ``<!-- from the report -->`` and ``<!-- -->``; there need not be any."""
    known = (ROOT / "docs/performance.md").read_text() + (ROOT / "docs/performance-full.md").read_text()
    for quoted in re.findall(r"<!-- from the report -->(.*?)<!-- -->", (ROOT / "README.md").read_text(), re.DOTALL):
        for figure in re.findall(r"\d[\d.,]*\d|\d", quoted):
            assert figure in known, f"README quotes {figure}, which the report does not have"
