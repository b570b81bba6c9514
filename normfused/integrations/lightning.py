"""Lightning: fused norms from the start of a run, and synchronized ones in place of ``Trainer(sync_batchnorm=True)``.

Both of its packages, ``lightning`` and ``pytorch_lightning``, have classes of their own. What is here belongs to those that are imported,
or to the first that can be.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import copy
from importlib.util import find_spec
from typing import Any

from torch import nn

from ..convert import FusionReport, convert_sync_batchnorm, fuse_norms
from ..convert.swap import record_of
from ._common import required

__all__ = ["FuseNorms", "NormFusedSyncBatchNorm"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _classes(module: str, name: str) -> tuple[type, ...]:
    """The class of every Lightning that is imported, else of the first that can be."""
    packages = [package for package in _PACKAGES if package in sys.modules]
    if not packages:
        packages = [next((p for p in _PACKAGES if find_spec(p.partition(".")[0]) is not None), _PACKAGES[0])]
    return tuple(getattr(required(f"{package}.{module}", "lightning"), name) for package in packages)


_LayerSync: Any = type("_LayerSync", _classes("plugins.layer_sync", "LayerSync"), {})
_Callback: Any = type("_Callback", _classes("callbacks.callback", "Callback"), {})


class NormFusedSyncBatchNorm(_LayerSync):
    """``Trainer(plugins=[NormFusedSyncBatchNorm()])``: batch norms synchronized over the processes, with their activations, on CPU too.

    In place of ``sync_batchnorm=True``, which raises for models with fused norms, as its converter would drop their activations; Lightning
    refuses both together. Like it, it acts in training with several processes (DDP, FSDP), and gives the layers back after it.

    Args:
        process_group: that of the statistics; default None, all processes. A function without arguments is called when the
            processes are there.
    """

    def __init__(self, process_group: Any = None) -> None:
        self.process_group = process_group
        self._undo: list[Callable[[], None]] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """`normfused.convert_sync_batchnorm` of ``model``, in place."""
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        before = [_Before(m) for m in norms]
        convert_sync_batchnorm(model, self.process_group() if callable(self.process_group) else self.process_group)
        self._undo = [b.restorer() for b in before]
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """The layers are what they were before `apply`; what they learned stays."""
        for undo in self._undo:
            undo()
        self._undo = []
        return model


class _Before:
    """A layer's class and attributes."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.cls, self.attributes = layer, type(layer), dict(layer.__dict__)
        self.record = copy(record_of(layer))

    def restorer(self) -> Callable[[], None]:
        """Undoes what happened to class and attributes since, and nothing that happens later."""
        layer, cls, record, now = self.layer, self.cls, self.record, self.layer.__dict__
        added = [name for name in now if name not in self.attributes]
        changed = {name: value for name, value in self.attributes.items() if name in now and now[name] is not value}

        def undo() -> None:
            for name in added:
                layer.__dict__.pop(name, None)
            layer.__dict__.update(changed)
            found = record_of(layer)
            if found is not None and record is not None:
                found.__dict__.update(record.__dict__)
            layer.__class__ = cls

        return undo


class FuseNorms(_Callback):
    """``Trainer(callbacks=[FuseNorms()])``: `normfused.fuse_norms` of the module at setup, before optimizers are made and weights moved.

    Names, parameters and checkpoints are those of before: ``trainer.fit(ckpt_path=...)`` takes either's. What the module makes in its own
    ``setup`` or ``configure_model`` is fused when a fit starts.

    Args:
        verbose: print the report, a row per norm, on the first process (default True).
        options: of `normfused.fuse_norms`, but ``inplace`` and ``dry_run``.

    ``report`` is the last `FusionReport` that changed something; None before.
    """

    report: FusionReport | None = None

    def __init__(self, *, verbose: bool = True, **options: Any) -> None:
        unknown = sorted({"inplace", "dry_run"} & set(options))
        if unknown:
            raise TypeError(f"FuseNorms: options must be those of fuse_norms for a model in place, got {', '.join(unknown)}")
        self.verbose, self.options = verbose, options

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        self._fuse(trainer, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self._fuse(trainer, pl_module)

    def _fuse(self, trainer: Any, model: nn.Module) -> None:
        report = fuse_norms(model, **self.options)
        if report.converted:
            self.report = report
            if self.verbose and trainer.is_global_zero:
                print(report)
