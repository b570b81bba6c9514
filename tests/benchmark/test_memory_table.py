"""The table of docs/memory.md says what autograd keeps here, now."""

from __future__ import annotations

import pytest

from bench import memory


def test_the_page_is_the_table() -> None:
    assert memory.page()[1].strip() == memory.table(memory.committed())


def test_counted_again() -> None:
    """All columns but compile's, whose partitioner belongs to the version of torch."""
    names = tuple(name for name in memory.COLUMNS if name != "compile")
    kept = memory.committed()
    for pattern, types in memory.measure(names).items():
        for dtype, columns in types.items():
            known = {name: value for name, value in kept[pattern][dtype].items() if name in columns}
            assert columns == pytest.approx(known, abs=1 / 32), (pattern, dtype)


def test_what_the_table_claims() -> None:
    """normfused never keeps more than the eager chain, nor torch's own 1 of a norm with a smooth activation on the kernels' path."""
    for pattern, types in memory.committed().items():
        for dtype, columns in types.items():
            assert columns["normfused-torch"] <= columns["eager"], (pattern, dtype)
            assert columns.get("memory_efficient", 0.0) == 0.0, (pattern, dtype)
            for kernels in ("normfused-cuda", "normfused-triton"):
                assert columns.get(kernels, 1.0) <= 1 + 1 / 16, (pattern, dtype)


@pytest.mark.slow
def test_compile_again() -> None:
    for pattern in ("BN + ReLU", "GN + SiLU"):
        got = memory.measure(("compile",), (pattern,))[pattern]
        assert {d: c["compile"] for d, c in got.items()} == {d: c["compile"] for d, c in memory.committed()[pattern].items()}
