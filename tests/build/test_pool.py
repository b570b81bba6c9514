"""The pool of arrival words, compiled alone."""

from __future__ import annotations

import pytest

from .conftest import HERE, ROOT, run


@pytest.mark.parametrize("sanitize", ["address,undefined", pytest.param("thread", marks=pytest.mark.slow)])
def test_pool(tmp_path, compiler, sanitize):
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-fsanitize={sanitize}", "-pthread", "-I", ROOT / "csrc"]
    built = run(compiler, *flags, HERE / "pool.cpp", "-o", "pool", cwd=tmp_path)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    done = run("./pool", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
