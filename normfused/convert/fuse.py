"""`fuse_norms`: find the norms, prove what follows them, swap; `unfuse_norms`: the way back."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import dispatch
from ..activations import ACTIVATIONS, IDENTITY, Activation, from_module
from ..norms.base import NormActMixin
from . import guards, source, trace
from .blocks import known_block, residual_block
from .classes import ALREADY, KINDS, Conversion, class_name, conversion, is_norm
from .report import FusionReport, Row
from .source import Fusion
from .swap import kept_by_hooks, pass_through, record_of, restore, swap, twin

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# act(m x) = m act(x) for m >= 0: dropout's mask may as well come after them
_HOMOGENEOUS = ("relu", "leaky_relu", "prelu")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def fuse_norms(
    model: nn.Module,
    *,
    kinds: Iterable[str] = KINDS,
    acts: str | Iterable[str] | None = "auto",
    residual: bool = True,
    exclude: Iterable[str] = (),
    backend: str | None = None,
    inplace: bool = True,
    dry_run: bool = False,
) -> FusionReport:
    """Make the norms of a network normfused's, each with the activation and the residual add that provably follow it.

    The modules stay the same objects under the same names, with the same parameters, buffers, hooks, mode, types, devices and
    attributes: optimizers, DDP and checkpoints, of either form, go on as before. `unfuse_norms` is the exact way back. An activation
    is taken over only where it is proven to follow, and nothing else sees what lies between: neighbours in an ``nn.Sequential``,
    the code of the module that calls the norm (any module's, read from its source), known blocks of other packages, a torch.fx graph.
    A module whose code adds or applies a function, or shares its activation, gets methods without them; else the activation module
    stays where it is and lets its input pass. Calling it again changes nothing.

    Args:
        model: any network. Layers of torch.nn, and those of timm, torchvision and detectron2 that are known, are converted.
        kinds: which: ``"bn"``, ``"in"``, ``"gn"``, ``"ln"``, ``"rms"``, ``"frn"`` (default: all).
        acts: ``"auto"`` (default) for every activation that can be fused, names of `ACTIVATIONS` for these only, None for none.
            Layers that bring their own (timm's) keep it.
        residual: take over the add between norm and activation (default True).
        exclude: names of norms, or of modules that hold them, to leave alone.
        backend: for these layers (default None: the selected one).
        inplace: convert ``model`` itself (default) or a copy, which is then the report's ``model``.
        dry_run: only report what would be done.

    Returns:
        `FusionReport`: print it. A row per norm: name, class before and after, activation, residual, and why something stays.

    Raises:
        TypeError, ValueError: arguments that are not the above.
    """
    exclude = exclude if isinstance(exclude, str) else tuple(exclude)
    wanted = _checked(model, kinds, acts, exclude, backend)
    if not inplace and not dry_run:
        model = copy.deepcopy(model)
    plan = _Plan(model, frozenset(kinds), wanted, residual, tuple(exclude))
    if not dry_run:
        plan.apply(backend)
        guards.guard_loaded()
    title = f"fuse_norms({type(model).__name__})" + (", dry run" if dry_run else "")
    return FusionReport(title, model, plan.rows(), _notes(model))


def unfuse_norms(model: nn.Module) -> FusionReport:
    """Undo `fuse_norms`: every module is of its former class again, with its former attributes, parameters and names.

    What was learned stays, as do layers that were built as normfused's. Of a model whose norms were synchronized or frozen by
    `convert_sync_batchnorm` or `freeze_batch_norm` these come back as ``nn.SyncBatchNorm`` and ``FrozenBatchNormAct*``, without activation.

    Raises:
        ValueError: an activation of a converted norm was replaced since; nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse_norms: model must be a Module, got {type(model).__name__}")
    swapped = [(name, m) for name, m in model.named_modules() if record_of(m) is not None]
    for name, module in swapped:
        record = record_of(module)
        assert record is not None
        if isinstance(module, NormActMixin) and "act" in record.added and "act" not in module.__dict__:
            raise ValueError(f"unfuse_norms: the activation of {name} must be the one it was fused with, got {module.act}")
    rows = []
    for name, module in swapped:
        was, is_layer = type(module).__name__, isinstance(module, NormActMixin)
        restore(module)
        if is_layer:
            rows.append(Row(name, was, type(module).__name__))
    return FusionReport(f"unfuse_norms({type(model).__name__})", model, rows)


def _checked(model: Any, kinds: Iterable[str], acts: Any, exclude: Iterable[str], backend: str | None) -> frozenset[str]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_norms: model must be a Module, got {type(model).__name__}")
    unknown = sorted(set(kinds) - set(KINDS))
    if isinstance(kinds, str) or unknown:
        raise ValueError(f"fuse_norms: kinds must be among {', '.join(KINDS)}, got {kinds if isinstance(kinds, str) else unknown}")
    if backend is not None and backend not in ("auto", *dispatch.BACKENDS):
        raise ValueError(f"fuse_norms: unknown backend {backend!r}; known: auto, {', '.join(dispatch.BACKENDS)}")
    absent = sorted(set(exclude) - {name for name, _ in model.named_modules(remove_duplicate=False)})
    if isinstance(exclude, str) or absent:
        raise ValueError(f"fuse_norms: exclude must be names of the model's modules, got {exclude if isinstance(exclude, str) else absent}")
    if acts is None:
        return frozenset()
    if isinstance(acts, str):
        if acts != "auto":
            raise ValueError(f"fuse_norms: acts must be 'auto', None or a list of names, got {acts!r}")
        return frozenset(ACTIVATIONS)
    unknown = sorted(set(acts) - set(ACTIVATIONS))
    if unknown:
        raise ValueError(f"fuse_norms: acts must be among {', '.join(ACTIVATIONS)}, got {unknown}")
    return frozenset(acts)


def _notes(model: nn.Module) -> list[str]:
    notes = []
    if any(isinstance(m, torch._dynamo.OptimizedModule) for m in model.modules()):
        notes.append("The model is compiled: torch.compile will compile it anew on its next call. Fuse before compiling.")
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        notes.append("TorchScript modules stay as they are: fuse before scripting.")
    return notes


@dataclass
class _Norm:
    name: str
    module: nn.Module
    conversion: Conversion | str
    was: type
    was_called: str
    fusion: Fusion | None = None
    note: str = ""

    @property
    def is_done(self) -> bool:
        """Whether it was converted before and there is nothing to add."""
        return issubclass(self.was, NormActMixin) and self.fusion is None


@dataclass
class _Plan:
    """Everything that is to be done, decided before anything is."""

    model: nn.Module
    kinds: frozenset[str]
    wanted: frozenset[str]
    residual: bool
    exclude: tuple[str, ...]
    norms: dict[nn.Module, _Norm] = field(default_factory=dict)
    owners: dict[nn.Module, type] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.places: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
        for owner in self.model.modules():
            for name, child in owner._modules.items():
                if child is not None:
                    self.places[child].append((owner, name))
        self.foreign = {m for owner in self.model.modules() if _is_quantized(owner) for m in owner.modules()}
        for name, module in self.model.named_modules():
            if is_norm(module):
                self.norms[module] = _Norm(name, module, self._conversion(name, module), type(module), class_name(module))
        if self.wanted:
            for module in list(self.model.modules()):
                self._prove(module)

    def _conversion(self, name: str, module: nn.Module) -> Conversion | str:
        if any(name == e or name.startswith(e + ".") for e in self.exclude):
            return "excluded"
        if module in self.foreign:
            return "belongs to a quantization module"
        found = conversion(module)
        return f"kind {found.kind} is not wanted" if isinstance(found, Conversion) and found.kind not in self.kinds else found

    # -------------------------------------------------------------------------------------------------------- proof
    def _prove(self, owner: nn.Module) -> None:
        if isinstance(owner, torch.jit.ScriptModule) or owner in self.norms or "forward" in owner.__dict__:
            return
        if isinstance(owner, torch.fx.GraphModule):
            self._prove_by_graph(owner, owner, {m for m in owner.modules() if len(self.places[m]) == 1})
        elif isinstance(owner, nn.Sequential) and type(owner).forward is nn.Sequential.forward:
            self._prove_neighbours(owner)
        elif isinstance(owner, (nn.ModuleList, nn.ModuleDict)):
            for _, norm in self._candidates(owner):
                norm.note = f"no activation fused: what is called through a {type(owner).__name__} is not read"
        elif not isinstance(owner, _CONTAINERS):
            self._prove_residual_block(owner)
            self._prove_by_code(owner)

    def _candidates(self, owner: nn.Module) -> Iterator[tuple[str, _Norm]]:
        """Norms that are children of ``owner`` and may get an activation; the others' notes say why not."""
        for name, child in owner._modules.items():
            norm = self.norms.get(child) if child is not None else None
            if norm is None or isinstance(norm.conversion, str) or norm.fusion is not None:
                continue
            if norm.conversion.own_act or norm.conversion.attributes.get("tlu", getattr(norm.module, "tlu", False)):
                continue
            if _sees_output(norm.module):
                norm.note = "no activation fused: a hook sees the norm's output"
                continue
            yield name, norm

    def _prove_neighbours(self, owner: nn.Sequential) -> None:
        candidates = dict(self._candidates(owner))
        if not candidates:
            return
        children = list(owner._modules.items())
        apart = next((type(o).__name__ for o, name in self.places[owner] if source.takes_apart(type(o), name)), None)
        for i, (name, _) in enumerate(children):
            norm = candidates.get(name)
            if norm is None:
                continue
            between, act_name, act = _next_but_dropout(children[i + 1 :])
            held = None if act is None else twin(act)
            found = None if held is None else from_module(held)
            if act is not None and kept_by_hooks(act):
                norm.note = f"no activation fused: the {type(act).__name__} after it has a hook"
            if act is None or held is None or not self._wanted(found):
                continue
            if between is not None and found is not None and found.name not in _HOMOGENEOUS:
                norm.note = f"no activation fused: {type(between).__name__} stands between"
            elif apart is not None:
                norm.note = f"no activation fused: {apart} takes the Sequential apart"
            elif not self._alone(norm.module, owner, name) or not self._alone(act, owner, act_name):
                norm.note = "no activation fused: it or the norm is used elsewhere too"
            else:
                norm.fusion = Fusion(held, silent=[act])

    def _prove_by_code(self, owner: nn.Module) -> None:
        candidates = dict(self._candidates(owner))
        if not candidates:
            return
        block = known_block(owner)
        if block is not None and block[0] in candidates:
            name, fusion, cls = block
            if self._alone(candidates[name].module, owner, name) and self._wanted(from_module(fusion.act)):
                candidates[name].fusion = fusion
                self.owners[owner] = cls
            return
        alone = [name for name, norm in candidates.items() if self._alone(norm.module, owner, name)]
        for name in candidates.keys() - set(alone):
            candidates[name].note = "no activation fused: the norm is used elsewhere too"
        reading = source.read(owner, alone, self._wanted, self.residual, lambda m, n: self._alone(m, owner, n))
        for name, fusion in reading.fusions.items():
            candidates[name].fusion = fusion
        for name, reason in reading.refusals.items():
            if "cannot be read" in reason:
                self._prove_by_graph(owner, None, {candidates[name].module} | {m for m in owner.children() if len(self.places[m]) == 1})
            if candidates[name].fusion is None and reason != source.NOTHING:
                candidates[name].note = f"no activation fused: {reason}"
        if reading.methods:
            self.owners[owner] = source.rewritten(type(owner), tuple(sorted(reading.methods.items())))

    def _prove_residual_block(self, owner: nn.Module) -> None:
        block = residual_block(owner) if self.residual else None
        if block is None:
            return
        unit, fusion, cls = block
        norm = dict(self._candidates(unit)).get("norm")
        # its unit has the norm under two names, as itself and in its Sequential
        alone = len(self.places[unit]) == len(self.places[unit.all_modules]) == 1 and len(self.places[unit.norm]) == 2
        if norm is not None and alone and self._wanted(from_module(fusion.act)):
            norm.fusion = fusion
            self.owners[owner] = cls

    def _prove_by_graph(self, owner: nn.Module, whole: nn.Module | None, once: set[nn.Module]) -> None:
        holders = [m for m in owner.modules() if type(m) is nn.Module or m is owner] if whole is not None else [owner]
        candidates = {norm.module: norm for holder in holders for _, norm in self._candidates(holder)}
        graph = trace.graph_of(owner) if candidates else None
        if graph is None:
            return
        for module, fusion in trace.fusions(owner, graph, set(candidates) & once).items():
            if all(m in once for m in fusion.silent) and self._wanted(from_module(fusion.act)):
                candidates[module].fusion = fusion

    def _wanted(self, act: Activation | None) -> bool:
        return act is not None and act != IDENTITY and act.name in self.wanted

    def _alone(self, module: nn.Module, owner: nn.Module, name: str) -> bool:
        """Whether ``owner`` is the only one whose code reaches ``module``, its child ``name``."""
        for other, other_name in self.places[module]:
            if other is owner:
                if other_name != name:
                    return False
            elif isinstance(other, _CONTAINERS) or source.mentions(type(other), other_name):
                return False
        for other in self.model.modules():
            for path in source.chains(type(other), name):
                found: Any = other
                for part in path:
                    found = getattr(found, part, None)
                if found is owner:
                    return False
        return True

    # ---------------------------------------------------------------------------------------------------- doing it
    def apply(self, backend: str | None) -> None:
        for norm in self.norms.values():
            if isinstance(norm.conversion, str) or norm.is_done:
                continue
            attributes = {"residual_mode": "pre_act", "backend": backend, **norm.conversion.attributes}
            if backend is None and issubclass(norm.was, NormActMixin):
                del attributes["backend"]  # it keeps its own
            own = norm.module._modules.get("act") if norm.conversion.own_act else None
            if norm.fusion is not None:
                attributes["act"] = norm.fusion.act
            elif own is None:
                attributes["act"] = None
            else:
                held = twin(own)
                if held is not None:
                    attributes["act"] = held  # torch's class where the package has one of its own
            silent = [] if norm.fusion is None else norm.fusion.silent
            swap(norm.module, norm.conversion.cls, **attributes)
            for act in silent:
                swap(act, pass_through(type(act)))
        for owner, cls in self.owners.items():
            swap(owner, cls)

    def rows(self) -> list[Row]:
        rows = []
        for norm in self.norms.values():
            was = norm.was_called
            if isinstance(norm.conversion, str) or norm.is_done:
                rows.append(Row(norm.name, was, note=norm.conversion if isinstance(norm.conversion, str) else ALREADY))
                continue
            own = norm.module._modules.get("act") if norm.conversion.own_act else None
            act, note = "", norm.note
            if norm.fusion is not None:
                # of a norm with two owners (nnU-Net's), one may have proved what the other could not
                act, note = str(from_module(norm.fusion.act)), ""
            elif getattr(norm.module, "tau", None) is not None:
                act = "tlu"
            elif own is not None:
                held = twin(own)
                found = None if held is None else from_module(held)
                act = "" if found == IDENTITY else str(found)
                if found is None:
                    act, note = "", f"{type(own).__name__} is not one of the fused activations: it runs after the norm"
            has_residual = norm.fusion is not None and norm.fusion.residual
            rows.append(Row(norm.name, was, norm.conversion.cls.__name__, act, has_residual, note))
        return rows


def _next_but_dropout(children: list[tuple[str, nn.Module]]) -> tuple[nn.Module | None, str, nn.Module | None]:
    """(a dropout on the way, name and module of the first child that is neither dropout nor identity)."""
    dropout = None
    for name, child in children:
        if type(child) in _DROPOUTS and not (child._forward_hooks or child._forward_pre_hooks):
            dropout = child
        elif type(child) is not nn.Identity:
            return dropout, name, child
    return dropout, "", None


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.ao.", "torchao."))


def _sees_output(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)
