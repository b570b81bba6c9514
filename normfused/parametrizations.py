"""Weight norm and spectral norm as parametrizations with torch's names, for one layer or for all layers of a model in one launch.

`weight_norm` and `spectral_norm` stand in for those of ``torch.nn.utils.parametrizations``: the same arguments, state dicts and
``remove_parametrizations``. `weight_norm_model` and `spectral_norm_model` do the same to every layer of a model and compute all weights
together, before the model's forward.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

from . import weights
from .backends.reference import weights as formulas
from .problem import accumulation_dtype
from .weights import Spectral, Weighted

__all__ = [
    "init_weight_norm",
    "remove_spectral_norm",
    "remove_weight_norm",
    "spectral_norm",
    "spectral_norm_model",
    "weight_norm",
    "weight_norm_model",
]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_LAYERS = (nn.Linear, *_CONVOLUTIONS)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FIRST_ITERATIONS = 15  # torch's, so that the same seed gives the same vectors


# ------------------------------------------------------------------------------------------------- the parametrizations
class _Shared(nn.Module):
    """A parametrization whose weight may have been computed beforehand, together with those of other layers."""

    _ready: Tensor | None = None  # no buffer: it lives as long as a forward of the model

    def request(self, original: Any) -> Weighted | Spectral | None:
        """What is to be computed for a ParametrizationList, None if there is nothing to be shared."""
        raise NotImplementedError

    def _use(self, weight: Tensor | None) -> None:
        self.__dict__["_ready"] = weight

    def _computed(self, *originals: Tensor) -> Tensor | None:
        """What was computed beforehand, unless the graph that is wanted now was not wanted then."""
        ready = self._ready
        if ready is None or (not ready.requires_grad and torch.is_grad_enabled() and any(t.requires_grad for t in originals)):
            return None
        return ready


class _Straight(parametrize.ParametrizationList):
    """torch's list, which takes as long to find its only member as a small weight takes to be normalised."""

    def forward(self) -> Tensor:
        members = self._modules
        if len(members) > 1:
            return super().forward()
        only: Any = members["0"]
        ready: Tensor | None = only._ready
        if ready is not None and ready.requires_grad and not only._forward_hooks and not only._forward_pre_hooks:
            return ready
        weight: Tensor = only(self.original) if self.is_tensor else only(self.original0, self.original1)
        return weight


class _WeightNorm(_Shared):
    def __init__(self, dim: int | None) -> None:
        super().__init__()
        self.dim = dim

    def request(self, original: Any) -> Weighted:
        return Weighted(original.original0, original.original1, self.dim)

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        ready = self._computed(weight_g, weight_v)
        return weights.weight_norm_of(weight_g, weight_v, self.dim) if ready is None else ready

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return formulas.norm(weight.to(accumulation_dtype(weight.dtype)), self.dim).to(weight.dtype), weight

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class _SpectralNorm(_Shared):
    _u: Tensor
    _v: Tensor

    def __init__(self, dim: int, n_power_iterations: int, eps: float) -> None:
        super().__init__()
        self.dim, self.n_power_iterations, self.eps = dim, n_power_iterations, eps

    @torch.no_grad()
    def first_vectors(self, weight: Tensor) -> None:
        """Random ones and some steps of the power method; not of a weight of one dimension, whose norm is exact without."""
        if weight.dim() < 2:
            return
        matrix = formulas.matrix_of(weight, self.dim)
        u, v = (matrix.new_empty(size).normal_(0, 1) for size in matrix.shape)
        matrix = matrix.to(accumulation_dtype(weight.dtype))
        wide_u, wide_v = formulas.iterate(matrix, formulas.unit(v.to(matrix.dtype), self.eps), _FIRST_ITERATIONS, self.eps)
        self.register_buffer("_u", u.copy_(wide_u))
        self.register_buffer("_v", v.copy_(wide_v))

    def _request(self, weight: Tensor) -> Spectral:
        iterations = self.n_power_iterations if self.training else 0
        return Spectral(weight, self._u, self._v, self.dim, iterations, self.eps)

    def request(self, original: Any) -> Spectral | None:
        return self._request(original.original) if original.original.dim() > 1 else None

    def forward(self, weight: Tensor) -> Tensor:
        if weight.dim() < 2:
            return nn.functional.normalize(weight, dim=0, eps=self.eps)
        ready = self._computed(weight)
        return weights.spectral_norm([self._request(weight)])[0] if ready is None else ready

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        return f"dim={self.dim}, n_power_iterations={self.n_power_iterations}, eps={self.eps}"


# ----------------------------------------------------------------------------------------------------------- one layer
def weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """Replaces a parameter by ``w = g * v / ||v||``, direction and length learned apart; in place of torch's.

    Args:
        module: any; a layer whose parameter ``name`` has (rows, ...) along ``dim``.
        name: of the parameter. Default: ``"weight"``.
        dim: g has a value for each index along it, and norms go over all other dimensions. None or -1: one norm for the whole
            tensor, as in torch. Default: 0, the output channels of linear layers and convolutions; those of transposed
            convolutions are 1, which torch's default leaves to the caller, too.

    Returns:
        ``module``, with the parameters ``parametrizations.<name>.original0`` (g, size 1 in all dimensions but dim) and
        ``original1`` (v), both of the type of the weight, which does not change. State dicts of torch's parametrization load, as
        do those of the older ``torch.nn.utils.weight_norm`` (``<name>_g``, ``<name>_v``).

    Raises:
        ValueError: there is no such parameter, it is uninitialized, no floating point or parametrized already (further
            parametrizations come after a weight norm). IndexError: it has no such dimension.

    Norms are computed in float32 or better. A row of zeros gives NaN, as in torch. Deterministic, differentiable twice.

    Reference: Salimans & Kingma, Weight Normalization, 2016 (arXiv 1602.07868); `init_weight_norm` is its initialization from data.
    """
    weight = _weight_of(module, name, "weight_norm")
    before = _parametrizations(module, name)
    if len(before):
        found = type(before[-1]).__name__.lstrip("_")
        raise ValueError(
            f"weight_norm: {name!r} must be a plain parameter, as g and v take its place, got one with {found}; "
            "apply weight_norm first, further parametrizations after it"
        )
    dim = None if dim is None or dim == -1 else _dimension(dim, weight)
    parametrize.register_parametrization(module, name, _WeightNorm(dim), unsafe=True)
    _settle(module, name)
    return module


def spectral_norm(
    module: nn.Module, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> nn.Module:
    """Replaces a parameter by ``W / sigma(W)``, sigma being its largest singular value by the power method; in place of torch's.

    In training every use of the weight first takes ``n_power_iterations`` steps ``u <- W v / max(||W v||, eps)``,
    ``v <- W' u / max(||W' u||, eps)``; in evaluation none. Then ``sigma = u' W v``, with u and v constant for the gradient. A
    weight of one dimension is divided by its norm.

    Args:
        module: any; a layer with the parameter ``name``.
        name: of the parameter. Default: ``"weight"``.
        n_power_iterations: at least 1. Default: 1.
        eps: least norm to divide by. Default: 1e-12.
        dim: of the rows of the matrix W; the others, flattened, are its columns. Default: 0, of transposed convolutions 1.

    Returns:
        ``module``, with the parameter ``parametrizations.<name>.original`` and the buffers ``parametrizations.<name>.0._u`` and
        ``._v``. State dicts of torch's parametrization load, as do those of the older ``torch.nn.utils.spectral_norm``
        (``<name>_orig``, ``<name>_u``, ``<name>_v``). The same seed gives the same first vectors as torch's.

    Raises:
        ValueError: there is no such parameter, it is uninitialized or no floating point, or ``n_power_iterations`` < 1.
        IndexError: it has no such dimension.

    Several forwards may run before a backward: each has its own u and v. Computed in float32 or better, whatever the type of the
    weight and of autocast. A weight of zeros gives NaN, as in torch. Deterministic, differentiable twice.

    Reference: Miyato et al., Spectral Normalization for Generative Adversarial Networks, 2018 (arXiv 1802.05957); the order of the
    two steps is torch's.
    """
    weight = _weight_of(module, name, "spectral_norm")
    if n_power_iterations < 1:
        raise ValueError(f"spectral_norm: n_power_iterations must be at least 1, got {n_power_iterations}")
    if dim is None:
        dim = 1 if isinstance(module, _TRANSPOSED) else 0
    parametrization = _SpectralNorm(_dimension(dim, weight), n_power_iterations, eps)
    parametrization.first_vectors(weight)
    parametrize.register_parametrization(module, name, parametrization)
    _settle(module, name)
    return module


def _weight_of(module: nn.Module, name: str, function: str) -> Tensor:
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{function}: {type(module).__name__} must have a parameter {name!r}, got {type(weight).__name__}")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{function}: {name!r} must be initialized by a first forward, got an uninitialized parameter")
    if weight.dtype not in _DTYPES:
        raise ValueError(f"{function}: {name!r} must be float16, bfloat16, float32 or float64, got {weight.dtype}")
    return weight


def _dimension(dim: int, weight: Tensor) -> int:
    if not -weight.dim() <= dim < weight.dim():
        raise IndexError(f"Dimension out of range (expected to be in range of [{-weight.dim()}, {weight.dim() - 1}], but got {dim})")
    return dim % weight.dim()


def _settle(module: nn.Module, name: str) -> None:
    """After registration: the keys of older checkpoints, and the shorter way to the weight."""
    module._register_load_state_dict_pre_hook(_LegacyKeys(name), with_module=True)
    _parametrizations(module, name).__class__ = _Straight


class _LegacyKeys:
    """Before loading: the keys of torch.nn.utils.weight_norm and spectral_norm become those of the parametrizations."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name = self.name
        for index, parametrization in enumerate(_parametrizations(module, name)):
            to = f"{prefix}parametrizations.{name}."
            if isinstance(parametrization, _WeightNorm):
                new = {"_g": f"{to}original0", "_v": f"{to}original1"}
            elif isinstance(parametrization, _SpectralNorm):
                new = {"_orig": f"{to}original", "_u": f"{to}{index}._u", "_v": f"{to}{index}._v"}
            else:
                continue
            old = {f"{prefix}{name}{suffix}": key for suffix, key in new.items()}
            if all(key in state_dict for key in old):
                for key, renamed in old.items():
                    state_dict[renamed] = state_dict.pop(key)


def _parametrizations(module: Any, name: str) -> Any:
    """The ParametrizationList of a parameter, or nothing to go over."""
    lists = module._modules.get("parametrizations")  # as a model's forward asks for every layer: not by the module's attribute
    return lists._modules.get(name, ()) if isinstance(lists, nn.ModuleDict) else ()


# --------------------------------------------------------------------------------------------------- all layers at once
class _Together:
    """Hooks of a model: before its forward all weights are computed, after it they are forgotten.

    Where nothing was computed (a layer that is called by itself, a replica of DataParallel, torch.compile, which sees the formulas) a
    layer computes its own.
    """

    def __init__(
        self, root: nn.Module, layers: list[tuple[nn.Module, str]], kind: type[_Shared], compute: Callable[[list[Any]], list[Tensor]]
    ) -> None:
        self.root, self.layers, self.kind, self.compute = root, layers, kind, compute
        self.depth = 0  # of calls of the model within itself
        self.ready: list[_Shared] = []  # those whose weights are computed

    def before(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or module is not self.root:
            return
        self.depth += 1
        if self.depth > 1:
            return
        found: list[_Shared] = []
        requests: list[Any] = []
        for layer, name in self.layers:
            of_layer = _parametrizations(layer, name)
            first = of_layer._modules["0"] if of_layer != () else None
            # where another one comes before it, the weight it is given is not there yet: it computes its own
            request = first.request(of_layer) if isinstance(first, self.kind) else None
            if request is not None:
                found.append(first)  # type: ignore[arg-type]
                requests.append(request)
        # a parameter of several layers is computed once
        if self.compute is weights.weight_norm:
            keys = [(id(r.g), id(r.v), r.dim) for r in requests]
            distinct = dict(zip(keys, requests, strict=True))
            made = dict(zip(distinct, self.compute([*distinct.values()]), strict=True))
            computed = [made[key] for key in keys]
        else:
            computed = self.compute(requests)
        for parametrization, weight in zip(found, computed, strict=True):
            parametrization._use(weight)
        self.ready = found

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or module is not self.root:
            return
        self.depth -= 1
        if self.depth > 0:
            return
        for parametrization in self.ready:
            parametrization._use(None)
        self.ready = []

    def attach(self) -> None:
        self.root.register_forward_pre_hook(self.before)
        self.root.register_forward_hook(self.after, always_call=True)


def _owner(hook: Any) -> _Together | None:
    owner = hook.__self__ if isinstance(hook, types.MethodType) else None
    return owner if isinstance(owner, _Together) else None


Select = Callable[[str, nn.Module], bool]


def weight_norm_model(model: nn.Module, name: str = "weight", dim: int | None = 0, select: Select | None = None) -> nn.Module:
    """`weight_norm` of every layer of a model, all weights computed together before each forward: one launch, and one backward.

    Args:
        model: any. Layers that have a weight norm already, this one or torch's, keep their parameters and take part.
        name, dim: as of `weight_norm`, for layers that have none yet.
        select: ``select(path, module)`` tells which modules to take. Default: linear layers and (transposed) convolutions.

    Returns:
        ``model``. Its state dict is that of layer-wise parametrizations. `remove_weight_norm` undoes it.

    Raises:
        ValueError: no layer was selected, or one has torch's older hook (``torch.nn.utils.weight_norm``).

    Parameters that layers share stay shared. The gradients of all weights are kept until the last is there, then one launch turns
    them into those of the parameters: they arrive together, at the end of the backward (not on a CPU, where ATen's kernels take one
    weight after the other). A layer called outside of the model's forward computes its own weight, and so does everything under
    torch.compile.
    """

    def normalise(layer: nn.Module) -> None:
        weight_norm(layer, name, dim)

    def take_over(theirs: Any) -> nn.Module:
        return _WeightNorm(None if theirs.dim == -1 else int(theirs.dim))

    layers = _layers(model, name, select, "weight_norm_model")
    _parametrize(layers, name, normalise, _WeightNorm, torch_parametrizations._WeightNorm, take_over)
    _Together(model, [(layer, name) for layer in layers], _WeightNorm, weights.weight_norm).attach()
    return model


def spectral_norm_model(
    model: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    select: Select | None = None,
) -> nn.Module:
    """`spectral_norm` of every layer of a model, all weights computed together before each forward: three launches, two backward.

    In training each forward of the model takes ``n_power_iterations`` steps for every layer, also for one that it uses twice, where
    torch's takes as many for each use.

    Args:
        model: any. Layers that have a spectral norm already, this one or torch's, keep parameter, vectors and settings and take part.
        name, n_power_iterations, eps, dim: as of `spectral_norm`, for layers that have none yet.
        select: ``select(path, module)`` tells which modules to take. Default: linear layers and (transposed) convolutions.

    Returns:
        ``model``. Its state dict is that of layer-wise parametrizations. `remove_spectral_norm` undoes it.

    Raises:
        ValueError: no layer was selected, or one has torch's older hook (``torch.nn.utils.spectral_norm``).

    The remarks of `weight_norm_model` hold here, too.
    """

    def normalise(layer: nn.Module) -> None:
        spectral_norm(layer, name, n_power_iterations, eps, dim)

    def take_over(theirs: Any) -> nn.Module:
        ours = _SpectralNorm(theirs.dim, getattr(theirs, "n_power_iterations", n_power_iterations), theirs.eps)
        ours._buffers.update(theirs._buffers)
        return ours.train(theirs.training)

    layers = _layers(model, name, select, "spectral_norm_model")
    _parametrize(layers, name, normalise, _SpectralNorm, torch_parametrizations._SpectralNorm, take_over)
    _Together(model, [(layer, name) for layer in layers], _SpectralNorm, weights.spectral_norm).attach()
    return model


def _layers(model: nn.Module, name: str, select: Select | None, function: str) -> list[nn.Module]:
    chosen: list[nn.Module] = []
    # a copy: parametrizing adds modules, and those of parametrizations are no layers
    for path, module in list(model.named_modules()):
        if "parametrizations" in path.split("."):
            continue
        if isinstance(module, _LAYERS) if select is None else select(path, module):
            legacy = any(hasattr(module, name + suffix) for suffix in ("_g", "_orig"))
            if legacy:
                kind = function.removesuffix("_model")
                raise ValueError(
                    f"{function}: layers must be free of torch's older hooks, got {path or type(module).__name__!r} with one; "
                    f"call torch.nn.utils.remove_{kind} first"
                )
            chosen.append(module)
    if not chosen:
        raise ValueError(
            f"{function}: model must have linear layers or convolutions, or modules that select takes, got none in {type(model).__name__}"
        )
    return chosen


def _parametrize(
    layers: list[nn.Module],
    name: str,
    normalise: Callable[[nn.Module], None],
    ours: type[nn.Module],
    theirs: type[nn.Module],
    take_over: Callable[[Any], nn.Module],
) -> None:
    """Layers that share a parameter share what takes its place."""
    first: dict[int, tuple[Tensor, Any]] = {}
    for layer in layers:
        of_layer = _parametrizations(layer, name)
        if len(of_layer):
            if isinstance(of_layer[0], theirs) and not isinstance(of_layer[0], ours):
                of_layer[0] = take_over(of_layer[0])
                _settle(layer, name)
            if isinstance(of_layer[0], ours):
                continue
        weight = getattr(layer, name, None)
        normalise(layer)
        assert isinstance(weight, Tensor)
        of_layer = _parametrizations(layer, name)
        _, shared = first.setdefault(id(weight), (weight, of_layer))
        if shared is not of_layer:
            for parameter, value in shared._parameters.items():
                of_layer.register_parameter(parameter, value)


def remove_weight_norm(model: nn.Module) -> nn.Module:
    """Undoes `weight_norm` and `weight_norm_model` for all layers of a model: their weights become plain parameters.

    Returns:
        ``model``. Layers that shared a parameter share one again.

    Raises:
        ValueError: there is none.
    """
    return _remove(model, _WeightNorm, "remove_weight_norm")


def remove_spectral_norm(model: nn.Module) -> nn.Module:
    """Undoes `spectral_norm` and `spectral_norm_model` for all layers of a model: their weights become plain parameters.

    In training it takes a last step of the power method, as torch's removal does; call ``model.eval()`` first to take none.

    Returns:
        ``model``. Layers that shared a parameter share one again.

    Raises:
        ValueError: there is none.
    """
    return _remove(model, _SpectralNorm, "remove_spectral_norm")


def _remove(model: nn.Module, kind: type[nn.Module], function: str) -> nn.Module:
    found = [(module, name) for module, name, p in _all_of(model) if isinstance(p, kind)]
    if not found:
        raise ValueError(f"{function}: model must have layers to remove it from, got none in {type(model).__name__}")
    compute = weights.weight_norm if kind is _WeightNorm else weights.spectral_norm
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                owner = _owner(hook)
                if owner is not None and owner.compute is compute:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
    plain: dict[tuple[int, ...], Tensor] = {}
    kept = []  # so that no other parameter gets the number of one that is gone
    for module, name in found:
        originals = tuple(_parametrizations(module, name)._parameters.values())
        kept.append(originals)
        parametrize.remove_parametrizations(module, name)
        same = plain.setdefault(tuple(map(id, originals)), getattr(module, name))
        if same is not getattr(module, name):
            module.register_parameter(name, same)  # type: ignore[arg-type]
    return model


def _all_of(model: nn.Module) -> Iterator[tuple[Any, str, nn.Module]]:
    """(layer, name of the parameter, its first parametrization)."""
    module: Any
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name, of_layer in module.parametrizations.items():
                yield module, name, of_layer[0]


# --------------------------------------------------------------------------------------------- initialization from data
@torch.no_grad()
def init_weight_norm(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Sets g and bias of every weight-normalised layer from one batch, so that its outputs have mean 0 and variance 1 per channel.

    One forward ``model(*args, **kwargs)`` without gradients. Each layer, when it is first reached, computes ``t``, its output at the g
    it has and bias 0, with mean ``m`` and biased standard deviation ``s`` per channel over this batch, sets ``g <- g / s`` and
    ``bias <- -m / s``, and hands ``(t - m) / s`` on, so that later layers see what they will see. Without a bias only g is set.
    Statistics are taken in float32 or better. Channels that are constant keep their g.

    Args:
        model: with layers from `weight_norm` (linear or convolutions) whose ``dim`` is that of the output channels.
        args, kwargs: a batch, as the model takes it.

    Returns:
        What the model returned for the batch.

    Raises:
        ValueError: there is no such layer, or g has no value for every output channel.

    Reference: Salimans & Kingma 2016 (arXiv 1602.07868), section 3.
    """
    layers: list[Any] = [m for m, name, p in _all_of(model) if isinstance(p, _WeightNorm) and name == "weight" and isinstance(m, _LAYERS)]
    if not layers:
        raise ValueError(f"init_weight_norm: model must have weight-normalised linear layers or convolutions, got {type(model).__name__}")
    for layer in layers:
        g, dim = layer.parametrizations.weight.original0, layer.parametrizations.weight[0].dim
        channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        if g.numel() != channels or dim != _output_dim(layer):
            raise ValueError(
                f"init_weight_norm: g must have a value for each of the {channels} output channels (dim={_output_dim(layer)} of "
                f"{type(layer).__name__}, groups=1 if transposed), got {g.numel()} along dim={dim}"
            )
    handles = []
    waiting = {id(layer) for layer in layers}

    def set_from(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if id(layer) not in waiting:
            return None
        waiting.remove(id(layer))
        return _set_from(layer, output)

    together = [owner for m in model.modules() for hook in m._forward_pre_hooks.values() if (owner := _owner(hook)) is not None]
    try:
        for layer in layers:
            handles.append(layer.register_forward_hook(set_from))
        for group in together:  # a layer that is used again must see its new g
            group.depth += 1
        return model(*args, **kwargs)
    finally:
        for group in together:
            group.depth -= 1
        for handle in handles:
            handle.remove()


def _output_dim(layer: nn.Module) -> int:
    return 1 if isinstance(layer, _TRANSPOSED) else 0


def _set_from(layer: Any, output: Tensor) -> Tensor:
    g, bias = layer.parametrizations.weight.original0, layer.bias
    channel = -1 if isinstance(layer, nn.Linear) else output.dim() - layer.weight.dim() + 1
    t = output.to(accumulation_dtype(output.dtype)).movedim(channel, -1)
    if bias is not None:
        t = t - bias
    across = [*range(t.dim() - 1)]
    variance, mean = torch.var_mean(t, across, correction=0)
    std = torch.where(variance > 0, variance.sqrt(), 1)
    g.copy_(g / std.view(g.shape))
    if bias is None:
        t = t / std
    else:
        bias.copy_(-mean / std)
        t = (t - mean) / std
    return t.movedim(-1, channel).to(output.dtype)
