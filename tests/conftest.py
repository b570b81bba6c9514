"""Backends and seeds for all tests.

On the CPU the suite runs with the backends ``torch`` (by either of its paths) and ``reference``. With ``TRITON_INTERPRET=1``
set before Python starts, the tests marked ``triton_surface`` run through Triton's interpreter instead, in a process of their
own, since the variable changes what `triton.jit` makes. With ``NORMFUSED_EMULATE=1`` all of it runs through the CUDA kernels,
emulated (``make emulation`` first). ``NORMFUSED_TEST_DEVICE=cuda`` runs all of it on a GPU with every backend that can run there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import normfused
from normfused import ops
from normfused.backends.torch import steps

EMULATED = os.environ.get("NORMFUSED_EMULATE") == "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = os.environ.get("NORMFUSED_TEST_DEVICE", "cpu") != "cpu"
_HERE = Path(__file__).parent
# compiled libraries, groups of processes, a trained network
_TOGETHER = ("build", "distributed", "emulation", "examples")


def _backends() -> list[str]:
    if INTERPRETED:
        return ["triton"]
    if EMULATED:
        return ["cuda"]
    if ON_GPU:
        return normfused.available_backends(os.environ["NORMFUSED_TEST_DEVICE"])
    return ["torch", "torch_steps", "reference"]


BACKENDS = _backends()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that share what takes long to make stay together. Under the interpreter, which is slow, keep what is marked for it, and
    the backend's own tests."""
    for item in items:
        folder = item.path.relative_to(_HERE).parts[0]
        if folder in _TOGETHER:
            item.add_marker(pytest.mark.xdist_group(folder))
    if not INTERPRETED:
        return
    own = _HERE / "triton"
    kept = [i for i in items if own in i.path.parents or i.get_closest_marker("triton_surface")]
    config.hook.pytest_deselected(items=[i for i in items if i not in set(kept)])
    items[:] = kept


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend's name. ``torch_steps`` is ``torch`` with its own steps for tensors of any size, else only large ones take them."""
    name: str = request.param
    if name == "torch_steps":
        monkeypatch.setattr(ops, "_FRN_ELEMENTS", 0)
        monkeypatch.setattr(ops, "_CHANNELS_LAST_ELEMENTS", 0)
        monkeypatch.setattr(steps, "_ELEMENTS_FOR_OWN_CALL", 0)
        name = "torch"
    return name


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """The same random numbers for every test, and no backend or policy left selected by an earlier one."""
    torch.manual_seed(0)
    before, policy, mode = normfused.get_backend(), normfused.get_autocast_policy(), normfused.get_compile_mode()
    normfused.set_backend("auto")
    yield
    normfused.set_backend(before if before in ("auto", *normfused.dispatch.BACKENDS) else "auto")
    normfused.set_autocast_policy(policy)
    normfused.set_compile_mode(mode)


torch.set_num_threads(1)
