"""The backends that compute weights; torch's two paths of the activation side are one here."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import normfused

from ..conftest import BACKENDS

DEVICE = os.environ.get("NORMFUSED_TEST_DEVICE", "cpu")


@pytest.fixture(params=[b for b in BACKENDS if b != "torch_steps"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with normfused.backend(request.param):
        yield request.param
