"""`tests.support.cases` on the Triton backend, with the tiles of a plan under the tests' control."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from normfused.backends import triton as backend
from normfused.backends.triton.plan import Limits, forced
from normfused.problem import PRE_NORM

from ..support import cases
from ..support.cases import KINDS, PARAMETER_TOLERANCE, TOLERANCE, activate, ncs, pairwise

# tiles so small that a tensor of a few dozen elements has tails, several blocks of channels, and several chunks
SMALL = Limits(processors=2, stream_tile=32, max_tiles=2)
LOOPED = Limits(processors=2, stream_tile=16, max_tiles=2, row_tile=4, grad_row_tile=4)


@dataclass
class Case(cases.Case):
    limits: Limits | None = SMALL

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        with forced(self.route, self.limits):
            y, mean, rstd, extra = backend.norm_act(self.p, self.x, self.r, self.w, self.b, self.aw, self.rw, *self.running, *self.bounds)
        self.mask = extra if self.residual != PRE_NORM else None
        assert (0 if self.mask is None else self.mask.numel()) == backend.mask_bytes(self.p)
        return y, mean, rstd, extra if self.residual == PRE_NORM else None

    def backward(
        self, y: Tensor, mean: Tensor, rstd: Tensor, h: Tensor | None, needs: tuple[bool, bool, bool] = (True, True, True)
    ) -> tuple[Tensor | None, ...]:
        source = {None: None, "y": y, "residual": self.r}[self.p.z_source] if self.mask is None else self.mask
        x = self.x if h is None else h
        with forced(self.route, self.limits):
            return backend.norm_act_backward(self.p, self.dy, self.dh, x, source, self.w, self.b, self.aw, self.rw, mean, rstd, needs)


__all__ = ["KINDS", "LOOPED", "PARAMETER_TOLERANCE", "SMALL", "TOLERANCE", "Case", "activate", "ncs", "pairwise"]
