"""The Triton kernels compiled for sm_80 and sm_90 as the host code launches them, without a GPU: nothing spills."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
from normfused.backends.weights import View
from tests.triton.compiled import compile_launch, recorded

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on") or os.environ.get("NORMFUSED_EMULATE") == "1",
    reason="the interpreter does not compile; under emulation it has run before",
)


def test_compiles() -> None:
    from normfused.backends.triton import weights as backend

    views = [View(0, 1, 64, 576, 0), View(1, 64, 32, 16, 0), View(0, 1, 16, 27, 3)]
    sizes = [torch.empty(v.numel, dtype=torch.bfloat16) for v in views]
    rows, columns = (
        [t.new_empty(v.R) for t, v in zip(sizes, views, strict=True)],
        [t.new_empty(v.columns) for t, v in zip(sizes, views, strict=True)],
    )
    with recorded() as launches:
        _, saved = backend.weight_norm(views, rows, sizes)
        backend.weight_norm_backward(views, sizes, rows, sizes, saved)
        assert [call.kernel.__name__ for call in launches] == ["weight_norm_kernel", "weight_norm_backward_kernel"]
        _, saved = backend.spectral_norm(views, sizes, rows, columns, 1, 1e-12)
        backend.spectral_norm_backward(views, sizes, sizes, saved)
        backend.spectral_norm(views, sizes, rows, columns, 2, 1e-12)
    names = ["matvec_kernel", "transposed_matvec_kernel", "scale_kernel", "inner_product_kernel", "spectral_gradient_kernel"]
    assert [call.kernel.__name__ for call in launches[2:7]] == names
    assert [call.kernel.__name__ for call in launches[7:]] == [*names[:2], *names[:2], names[2]]
    for capability in (80, 90):
        for call in [*launches[:7], launches[9]]:  # the last: a product with the previous iteration's vector
            compiled = compile_launch(call, capability)
            assert compiled.stack_bytes == compiled.local_accesses == 0, compiled
