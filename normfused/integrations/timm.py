"""timm: norms for ``norm_layer=``, names in its registries, and models whose norms are fused as they are made.

timm's models take their norms in two ways. Some call ``norm_layer(channels)`` and apply an activation of their own (ResNet); some ask
``get_norm_act_layer(norm_layer, act_layer)`` for both in one (EfficientNet). `norm_layer` serves both, as timm tells it which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..activations import ActivationLike, module_of, parse
from ..convert import FusionReport, fuse_norms
from ..convert.swap import twin
from ..norms.base import NormActMixin
from ._common import KINDS, check_kind, make, required

__all__ = ["NAMES", "norm_act_layer", "norm_layer", "patched", "register"]

# by kind, as ``norm_layer="normfused_gn"``; timm drops the underscores
NAMES = {kind: f"normfused_{kind}" for kind in KINDS}
_NOT_GIVEN: Any = object()


def norm_layer(kind: str | type = "bn", **options: Any) -> Callable[..., nn.Module]:
    """A function to pass as ``norm_layer=`` to ``timm.create_model``, a model or a layer of timm.

    In models with norm and activation in one it takes the activation that the model asks for, fused; in the others it is the norm alone,
    and `normfused.fuse_norms` of the model takes the activations over.

    Args:
        kind: ``bn`` ``sync_bn`` ``frozen_bn`` ``in`` ``gn`` ``ln`` ``rms`` (last dimension) ``ln2d`` ``rms2d`` (channels of maps) ``frn``,
            or a class of normfused's that takes the number of channels.
        options: of the layer's constructor; ``num_groups=32`` or ``group_size=`` for group norm.

    Raises:
        ValueError: an unknown kind. ImportError: no timm.
    """
    return _function("norm_layer", kind, _NOT_GIVEN, options)


def norm_act_layer(kind: str | type = "bn", act: ActivationLike = "relu", **options: Any) -> Callable[..., nn.Module]:
    """`norm_layer` with an activation of its own in place of the model's, for models and layers of timm with both in one.

    Where the model wants none (``apply_act=False``, ``act_layer=None``) there is none. A model that applies activations itself gets a
    TypeError, as it would apply two.

    Args:
        act: a name, ``(name, parameters)``, a torch activation module or class, or any callable (composed, not fused).
        kind, options: as in `norm_layer`.
    """
    parse(act)
    return _function("norm_act_layer", kind, act, options)


def register() -> None:
    """Make the names of `NAMES` known to timm, for good: ``norm_layer="normfused_gn"`` in models, layers and ``create_norm_act_layer``."""
    for kind, name in NAMES.items():
        _norms()[name.replace("_", "")] = _norm_acts()[name.replace("_", "")] = norm_layer(kind)


@contextmanager
def patched(**options: Any) -> Iterator[list[FusionReport]]:
    """Within it, every model of ``timm.create_model`` comes with its norms fused, and the names of `register` are known.

    Args:
        options: of `normfused.fuse_norms`, but ``inplace`` and ``dry_run``.

    Yields:
        The reports, one a model.

    Left, timm's registries and functions are as they were. It holds for all threads. Models that are made without ``create_model`` are not
    fused: call `fuse_norms`.
    """
    unknown = sorted({"inplace", "dry_run"} & set(options))
    if unknown:
        raise TypeError(f"patched: options must be those of fuse_norms for a model in place, got {', '.join(unknown)}")
    reports: list[FusionReport] = []
    # create_model looks its function up here, however it was imported
    entrypoint = _private("timm.models._factory", "model_entrypoint")
    factory = required("timm.models._factory", "timm")

    def fused_entrypoint(*name: Any, **more: Any) -> Callable[..., nn.Module]:
        create = entrypoint(*name, **more)

        def fused(*arguments: Any, **keywords: Any) -> nn.Module:
            model: nn.Module = create(*arguments, **keywords)
            reports.append(fuse_norms(model, **options))
            return model

        return fused

    with ExitStack() as stack:
        for registry in (_norms(), _norm_acts()):
            stack.callback(_refill, registry, registry.copy())
        told = set(_with_act_layer())
        register()
        # functions that are made within the block are told further on
        stack.callback(_with_act_layer().difference_update, _with_act_layer() - told)
        stack.callback(setattr, factory, "model_entrypoint", entrypoint)
        factory.model_entrypoint = fused_entrypoint
        yield reports


def _refill(registry: dict[str, Any], content: dict[str, Any]) -> None:
    """The same object with its former content, in its order."""
    registry.clear()
    registry.update(content)


def _private(module: str, name: str) -> Any:
    """What timm does not promise to keep."""
    found = required(module, "timm")
    if not hasattr(found, name):
        version = required("timm", "timm").__version__
        raise RuntimeError(
            f"normfused.integrations.timm: {module} must have {name}, got timm {version} without it; normfused.fuse_norms(model) needs none"
        )
    return getattr(found, name)


def _norms() -> Any:
    return _private("timm.layers.create_norm", "_NORM_MAP")


def _norm_acts() -> Any:
    return _private("timm.layers.create_norm_act", "_NORM_ACT_MAP")


def _with_act_layer() -> Any:
    """The functions and classes that timm tells the model's activation."""
    return _private("timm.layers.create_norm_act", "_NORM_ACT_REQUIRES_ARG")


def _function(where: str, kind: str | type, own: Any, options: dict[str, Any]) -> Callable[..., nn.Module]:
    check_kind(where, kind)

    def layer(
        num_features: int,
        *,
        act_layer: Any = _NOT_GIVEN,
        apply_act: bool | None = None,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool | None = None,
        drop_layer: Callable[[], nn.Module] | None = None,
        **given: Any,
    ) -> nn.Module:
        in_one = act_layer is not _NOT_GIVEN or not (apply_act is None and act_kwargs is None and inplace is None)
        if own is not _NOT_GIVEN and not in_one:
            raise TypeError(
                f"{where}: the model must want norm and activation in one, got a call for a norm alone, after which it would apply a second"
                " activation; use norm_layer(kind), or call this with apply_act=True"
            )
        act: Any = None
        if in_one and apply_act is not False and act_layer is not None:
            act = act_layer if own is _NOT_GIVEN else own
            if act is _NOT_GIVEN:
                raise TypeError(f"{where}: a norm with an activation must be told which, got no act_layer; use norm_act_layer(kind, act)")
            if own is _NOT_GIVEN:
                module = required("timm.layers", "timm").create_act_layer(act, **(act_kwargs or {}))
                act = None if module is None else twin(module) or module  # torch's class where timm has one of its own
        if drop_layer is not None:  # between the two: nothing to fuse
            parts = [drop_layer()] if act is None else [drop_layer(), module_of(act, num_features)]
            act = nn.Sequential(*parts)
        return make(kind, num_features, act, **options, **given)

    layer.__name__ = layer.__qualname__ = f"normfused_{kind if isinstance(kind, str) else kind.__name__}"
    # then timm says which activation it wants where it wants one, and nothing where it wants the norm alone
    _with_act_layer().add(layer)
    _make_leaves()
    return layer


def _make_leaves() -> None:
    """timm's extraction of features by torch.fx then looks at what the layers return, not into them."""
    leaf = required("timm.layers", "timm").register_notrace_module
    pending: list[type] = [NormActMixin]
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if issubclass(cls, nn.Module):
            leaf(cls)
