"""``python -m bench.memory``: what autograd keeps for the backward beyond y, pattern by pattern, in units of one activation.

Counts storages with saved-tensor hooks on the CPU and writes the columns that can run here into ``bench/results/memory.json`` and
docs/memory.md; other columns stay as they are. ``NORMFUSED_EMULATE=1`` adds the CUDA kernels' (`make emulation`),
``TRITON_INTERPRET=1`` Triton's. tests/benchmark/test_memory_table.py measures again and compares.

*compile* is what torch.compile keeps: AOT autograd with the min-cut partitioner and Inductor's decompositions, without generating code.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfused import rebuild
from normfused.activations import parse
from normfused.benchmark import providers
from normfused.benchmark.cases import Case

ROOT = Path(__file__).resolve().parents[1]
TABLE, PAGE = ROOT / "bench" / "results" / "memory.json", ROOT / "docs" / "memory.md"
_BEGIN, _END = "<!-- python -m bench.memory -->", "<!-- end of bench.memory -->"
_MAP = (2, 64, 24, 24)
PATTERNS: dict[str, Case] = {
    "BN": Case("batch", _MAP),
    "BN + ReLU": Case("batch", _MAP, "relu"),
    "BN + add + ReLU": Case("batch", _MAP, "relu", "pre_act"),
    "BN + LeakyReLU": Case("batch", _MAP, "leaky_relu"),
    "BN + SiLU": Case("batch", _MAP, "silu"),
    "GN + SiLU": Case("group", _MAP, "silu", groups=4),
    "IN + LeakyReLU (3-D)": Case("instance", (2, 64, 8, 8, 8), "leaky_relu"),
    "LN over channels + GELU": Case("layer", _MAP, "gelu", dim=1),
    "RMS norm": Case("rms", (256, 256)),
    "FRN + TLU": Case("frn", _MAP, "tlu"),
    "switchable norm + ReLU": Case("switchable", _MAP, "relu"),
    "Batch Renorm + ReLU": Case("batch_renorm", _MAP, "relu"),
    "batch-instance norm + ReLU": Case("batch_instance", _MAP, "relu"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = {
    "eager": "`torch.nn`, eager",
    "compile": "`torch.compile`",
    "normfused-torch": "normfused, torch (CPU)",
    "normfused-cuda": "CUDA (emulated)",
    "normfused-triton": "Triton (interpreted)",
    "memory_efficient": "`memory_efficient`",
}
_HAVE_THE_MODE = ("batch", "instance", "group", "layer", "rms")


def beyond_y(module: nn.Module, x: Tensor, residual: Tensor | None) -> float:
    """Bytes kept beside parameters, buffers and y, over the bytes of x; numbers per channel or set are rounded away."""
    held, y = providers.storages_kept(module, x, residual)
    held.pop(y.untyped_storage().data_ptr(), None)
    kept = sum(held.values())
    # half of the smallest thing that counts, a bit an element of float32
    return round(32 * kept / (x.numel() * x.element_size())) / 32


def _partitioned(chain: nn.Module) -> nn.Module:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def run(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        return graph.forward

    backend = aot_autograd(
        fw_compiler=run, bw_compiler=run, partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table()
    )
    torch._dynamo.reset()
    compiled: nn.Module = torch.compile(chain, backend=backend, dynamic=False)  # type: ignore[assignment]
    return compiled


def column(case: Case, name: str) -> nn.Module | None:
    """The module of a column; None where there is none, or where it cannot run here."""
    if name == "eager":
        return providers.eager(case)
    if name == "compile":
        return _partitioned(providers.eager(case))
    if name == "memory_efficient":
        if case.norm not in _HAVE_THE_MODE or case.residual is not None:
            return None
        try:
            rebuild.check_activation("memory", parse(case.act), case.dtype)
        except ValueError:
            return None
        return providers.ours("auto", memory_efficient=True)(case)
    backend = name.removeprefix("normfused-")
    switch = {"cuda": "NORMFUSED_EMULATE", "triton": "TRITON_INTERPRET"}.get(backend)
    return None if switch is not None and os.environ.get(switch) != "1" else providers.ours(backend)(case)


def measure(names: tuple[str, ...] = tuple(COLUMNS), patterns: tuple[str, ...] = tuple(PATTERNS)) -> dict[str, dict[str, dict[str, float]]]:
    """{pattern: {type: {column: units of x beyond y}}} of what can run here."""
    made: dict[str, dict[str, dict[str, float]]] = {}
    for pattern in patterns:
        for dtype_name, dtype in DTYPES.items():
            case = replace(PATTERNS[pattern], dtype=dtype)
            x, residual, _ = providers.tensors(case, "cpu")
            for name in names:
                module = column(case, name)
                if module is None:
                    continue
                inputs = [None if t is None else t.clone().requires_grad_() for t in (x, residual)]
                assert inputs[0] is not None
                made.setdefault(pattern, {}).setdefault(dtype_name, {})[name] = beyond_y(module.train(), inputs[0], inputs[1])
    return made


def committed() -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    return found


def table(values: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown; ``a / b`` where float32 and bfloat16 differ."""
    rows = ["| pattern | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    for pattern in PATTERNS:
        cells = []
        for name in COLUMNS:
            got = [values.get(pattern, {}).get(dtype, {}).get(name) for dtype in DTYPES]
            texts = ["–" if v is None else f"{v:.2f}" for v in got]
            cells.append(texts[0] if texts[0] == texts[1] else " / ".join(texts))
        rows.append(f"| {pattern} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def page() -> tuple[str, str, str]:
    """docs/memory.md before, in and after the table."""
    before, _, rest = PAGE.read_text().partition(_BEGIN)
    inside, _, after = rest.partition(_END)
    return before + _BEGIN, inside, _END + after


def main() -> int:
    values = committed()
    for pattern, types in measure().items():
        for dtype, columns in types.items():
            values.setdefault(pattern, {}).setdefault(dtype, {}).update(columns)
    values = {pattern: values[pattern] for pattern in PATTERNS}
    TABLE.write_text(json.dumps(values, indent=1) + "\n")
    before, _, after = page()
    PAGE.write_text(f"{before}\n{table(values)}\n{after}")
    print(table(values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
