"""A module becomes another class where it stands, and back: the object, its name, parameters, buffers, hooks and mode stay.

That is what makes a conversion exact. Nothing is registered anew, so optimizers, DDP, hooks, shared modules and state dicts notice
nothing, and the way back is the class that was there before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from ..activations import IDENTITY, from_module

_RECORD = "_normfused_record"
_F = TypeVar("_F", bound=Callable[..., Any])


def remembered(function: _F) -> _F:
    """`functools.cache` with the function's own types."""
    return cast(_F, cache(function))


@dataclass
class Record:
    """What a swapped module was: its class, and the entries of its ``__dict__`` that were added or replaced."""

    original: type
    added: tuple[str, ...]
    replaced: dict[str, Any]


def record_of(module: nn.Module) -> Record | None:
    return module.__dict__.get(_RECORD)


def swap(module: nn.Module, cls: type, **attributes: Any) -> None:
    """``module`` becomes a ``cls`` with these plain attributes; a later swap keeps the record of the first."""
    record = record_of(module)
    if record is None:
        record = Record(type(module), (), {})
        module.__dict__[_RECORD] = record
    new = [name for name in attributes if name not in record.added and name not in record.replaced]
    record.replaced |= {name: module.__dict__[name] for name in new if name in module.__dict__}
    record.added += tuple(name for name in new if name not in module.__dict__)
    # not setattr: an activation that is kept beside the module must not become its child, which would change names and state dicts
    module.__dict__.update(attributes)
    module.__class__ = cls


def restore(module: nn.Module) -> None:
    """The way back from `swap`."""
    record = module.__dict__.pop(_RECORD)
    for name in record.added:
        module.__dict__.pop(name, None)
    module.__dict__.update(record.replaced)
    module.__class__ = record.original


def without_act(norm: nn.Module, x: Tensor) -> Tensor:
    """What a converted norm returned before: no activation, no residual."""
    record = record_of(norm)
    assert record is not None
    original: Any = record.original
    y: Tensor = original.forward(norm, x)
    return y


class Swapped:
    """Of classes made at run time: pickled and copied by how they are made."""

    _made_by: tuple[Callable[..., type], tuple[Any, ...]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        own_state = getattr(self, "__getstate__", None)
        return _empty, type(self)._made_by, self.__dict__ if own_state is None else own_state()


def _empty(maker: Callable[..., type], arguments: tuple[Any, ...]) -> Any:
    cls: Any = maker(*arguments)
    return cls.__new__(cls)


def derived(original: type, mixin: type, members: dict[str, Any], maker: Callable[..., type], *arguments: Any) -> type:
    """A subclass of ``original`` under its name, which ``maker(*arguments)`` makes again."""
    named = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    bases = (original,) if issubclass(original, mixin) else (mixin, original)
    return type(original.__name__, bases, {**named, **members, "_made_by": (maker, arguments)})


class PassThrough(Swapped, nn.Module):
    """An activation whose norm applies it: it stays where it was, with its name, parameters and options, and returns its input."""

    def forward(self, input: Tensor) -> Tensor:
        return input

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}, fused into the norm before" if own else "fused into the norm before"


@remembered
def pass_through(original: type) -> type:
    return derived(original, PassThrough, {}, pass_through, original)


# activations of other packages that compute what torch's do, by package and name
_SAME: dict[tuple[str, str], Callable[[Any], nn.Module | None]] = {
    ("timm", "GELU"): lambda m: nn.GELU(),
    ("timm", "GELUTanh"): lambda m: nn.GELU("tanh"),
    ("timm", "Sigmoid"): lambda m: nn.Sigmoid(),
    ("timm", "Tanh"): lambda m: nn.Tanh(),
    ("timm", "Swish"): lambda m: nn.SiLU(),
    ("timm", "Mish"): lambda m: nn.Mish(),
    ("timm", "HardSwish"): lambda m: nn.Hardswish(),
    ("timm", "HardSigmoid"): lambda m: nn.Hardsigmoid(),
    ("timm", "PReLU"): lambda m: _as_prelu(m),
    ("transformers", "SiLUActivation"): lambda m: nn.SiLU(),
    ("monai", "Swish"): lambda m: nn.SiLU() if m.alpha == 1 else None,
    ("monai", "MemoryEfficientSwish"): lambda m: nn.SiLU(),
    ("monai", "Mish"): lambda m: nn.Mish(),
}


def twin(act: nn.Module) -> nn.Module | None:
    """The activation for a norm to apply in place of ``act``, or None if it is not one of the fused kinds or has hooks.

    It is a second object of torch's class that shares the parameters, buffers and hooks of ``act`` (their very dictionaries), so that a
    state dict that is loaded, ``functional_call`` and ``to`` reach it through ``act``, which keeps its place in the model.
    """
    if _has_hooks(act) or "forward" in act.__dict__ or record_of(act) is not None:
        return None
    if from_module(act) is not None:
        return copy.copy(act)
    same = _SAME.get(named(type(act)))
    return None if same is None else same(act)


def kept_by_hooks(act: nn.Module) -> bool:
    """Whether ``act`` is of a fused kind, and only its hooks stand in the way."""
    if not _has_hooks(act):
        return False
    bare = copy.copy(act)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(bare, hooks, {})
    held = twin(bare)
    found = None if held is None else from_module(held)
    return found is not None and found != IDENTITY


def _has_hooks(act: nn.Module) -> bool:
    return bool(act._forward_hooks or act._forward_pre_hooks or act._backward_hooks or act._backward_pre_hooks)


def _as_prelu(act: nn.Module) -> nn.Module:
    shared = copy.copy(act)
    shared.__class__ = nn.PReLU
    return shared


def named(cls: type) -> tuple[str, str]:
    """(package, class name): how classes of packages that are not imported here are told."""
    return cls.__module__.partition(".")[0], cls.__name__
