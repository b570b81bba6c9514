"""What a network does to its activations: dead and linear units, and how the variance travels from layer to layer.

A unit (a feature of a linear layer, a channel of a convolution) whose pre-activation is negative for every sample and position of a
data set is *dead* behind a ReLU: it is 0 and learns nothing. One that is positive everywhere is *linear*: the ReLU does nothing. Only
*mixed* units bend. Without normalization deep networks lose their mixed units, and their variance explodes or vanishes.

    with nf.diagnostics.observe(model) as found:
        for images, _ in loader:
            model(images)
    print(found.report())
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Union

import torch
from torch import Tensor, nn

from .activations import _MODULES, Composed, weight_of
from .norms.filter_response_norm import _FilterResponseNorm, filter_response_norm
from .problem import PRE_ACT, accumulation_dtype

__all__ = ["LayerReport", "Observation", "Report", "diagnose", "observe"]

# a straight piece of zero or small slope below the threshold, one of slope 1 above
_BENT = ("relu", "leaky_relu", "prelu", "relu6", "tlu")

Outputs = Union[str, Iterable[str], Callable[[str, nn.Module], bool]]


@dataclass(frozen=True)
class LayerReport:
    """One layer: fractions of its ``units`` (None where the activation has no straight pieces), and variances.

    ``variance`` is the mean over units of the variance over samples and positions, ``mean_square`` that of the mean square, which also
    holds what is the same for all samples; He's initialization keeps the latter. ``relative_variance`` and ``relative_mean_square`` are
    in units of the model's input's (None where that is no tensor).
    """

    name: str
    kind: str
    units: int
    dead: float | None
    linear: float | None
    mixed: float | None
    variance: float
    mean_square: float
    relative_variance: float | None
    relative_mean_square: float | None


@dataclass(frozen=True)
class Report:
    """All layers, in the order they ran. ``str()`` is a plain table; `print` draws it with rich where that is installed."""

    layers: tuple[LayerReport, ...]
    input_variance: float | None
    input_mean_square: float | None

    def __getitem__(self, name: str) -> LayerReport:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; known: {', '.join(layer.name for layer in self.layers)}")

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        def share(value: float | None) -> str:
            return "-" if value is None else f"{100 * value:.1f} %"

        header = ["layer", "activation", "units", "dead", "linear", "mixed", "variance", "of input's", "mean square", "of input's"]

        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:.3g}"

        rows = [
            [
                layer.name, layer.kind, str(layer.units), share(layer.dead), share(layer.linear), share(layer.mixed),
                number(layer.variance), number(layer.relative_variance), number(layer.mean_square), number(layer.relative_mean_square),
            ]
            for layer in self.layers
        ]  # fmt: skip
        return header, rows

    def __str__(self) -> str:
        header, rows = self._cells()
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

        def line(cells: list[str]) -> str:
            left = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
            return "  ".join([*left, *(cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True))]).rstrip()

        return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])

    def print(self) -> None:
        """The table on the terminal: by rich if it is installed, else plain."""
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            print(self)
            return
        header, rows = self._cells()
        table = Table()
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console().print(table)

    def plot(self, path: Any = None) -> Any:
        """Dead, linear and mixed units as stacked areas over the layers, and the variance below on a logarithmic axis.

        Args:
            path: a file to draw to (PNG, SVG, PDF); None draws to none.

        Returns:
            matplotlib's Figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Report.plot: drawing needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(max(6.0, min(16.0, 0.3 * len(self.layers) + 3)), 6.5), layout="constrained")
        upper, lower = figure.subplots(2, 1)
        bent = [(i, layer) for i, layer in enumerate(self.layers) if layer.dead is not None]
        if bent:
            places = [i for i, _ in bent]
            below = [0.0] * len(bent)
            # Okabe and Ito's palette, which colour-blind readers can tell apart
            for name, colour in (("mixed", "#009E73"), ("linear", "#56B4E9"), ("dead", "#D55E00")):
                values = [float(getattr(layer, name)) for _, layer in bent]
                upper.bar(places, values, 0.85, bottom=below, label=name, color=colour)
                below = [a + b for a, b in zip(below, values, strict=True)]
            upper.legend(ncols=3, loc="lower right")
        upper.set(ylabel="fraction of units", ylim=(0, 1), title="units behind activations with two straight pieces")
        for name, colour, style in (("variance", "#0072B2", "o-"), ("mean_square", "#E69F00", "s--")):
            values = [float(getattr(layer, name)) for layer in self.layers]
            lower.plot(range(len(values)), values, style, markersize=4, color=colour, label=name.replace("_", " "))
            if any(v > 0 for v in values):
                lower.set_yscale("log")
        lower.legend(loc="best")
        lower.set(ylabel="mean of units", title="over samples and positions")
        for axis in (upper, lower):
            axis.set_xlim(-0.6, max(len(self.layers), 1) - 0.4)
            axis.grid(alpha=0.25, linewidth=0.5)
        step = math.ceil(max(len(self.layers), 1) / 40)
        names = [layer.name for layer in self.layers]
        upper.set_xticks([])
        lower.set_xticks(range(0, len(names), step), names[::step], rotation=60, ha="right", fontsize=8)
        if path is not None:
            figure.savefig(path, dpi=110)
        return figure


class _Units:
    """Running extremes, count, mean and sum of squared deviations of every unit, on the tensors' device; nothing is read from it."""

    def __init__(self) -> None:
        self.count = 0
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, name: str, z: Tensor, dim: int, threshold: Tensor | None) -> None:
        if z.numel() == 0 or z.dim() < 2:
            return
        over = [d for d in range(z.dim()) if d != dim % z.dim()]
        # float64 where the device has it: the sums run over a whole data set
        wide = accumulation_dtype(z.dtype) if z.device.type == "mps" else torch.float64
        number = z.numel() // z.shape[dim]
        var, mean = torch.var_mean(z.to(accumulation_dtype(z.dtype)), over, correction=0)
        mean, squares = mean.to(wide), var.to(wide) * number
        low, high = z.amin(over), z.amax(over)
        if threshold is not None:
            low, high = low - threshold, high - threshold
        if self.low is None or self.high is None or self.mean is None or self.squares is None:
            self.low, self.high, self.mean, self.squares, self.count = low, high, mean, squares, number
            return
        if mean.shape != self.mean.shape:
            raise ValueError(f"observe: {name} must have the same units in every batch, got {len(mean)} after {len(self.mean)}")
        total, apart = self.count + number, mean - self.mean
        self.squares = self.squares + squares + apart.square() * (self.count * number / total)
        self.mean = self.mean + apart * (number / total)
        self.low, self.high, self.count = torch.minimum(self.low, low), torch.maximum(self.high, high), total

    def variance_and_mean_square(self) -> tuple[float, float]:
        if self.squares is None or self.mean is None:
            return math.nan, math.nan
        var = self.squares / self.count
        return float(var.mean()), float((var + self.mean.square()).mean())


@dataclass
class _Place:
    """One call of one module within a forward of the model."""

    name: str
    kind: str
    bent: bool
    units: _Units


class Observation:
    """Hooks on a model that collect until they are removed; made by `observe`. A context manager."""

    def __init__(self, model: nn.Module, outputs: Outputs | None, channel_dim: int) -> None:
        self._channel_dim = channel_dim
        self._places: dict[tuple[int, int], _Place] = {}
        self._calls: dict[int, int] = {}
        self._input = _Units()
        modules = dict(model.named_modules())
        if outputs is None:
            wanted: set[str] = set()
        elif callable(outputs):
            wanted = {name for name, m in modules.items() if outputs(name, m)}
        else:
            wanted = {outputs} if isinstance(outputs, str) else set(outputs)
            unknown = sorted(wanted - set(modules))
            if unknown:
                raise ValueError(
                    f"observe: outputs must name modules of the model, got {unknown}; known: {', '.join(filter(None, modules))}"
                )
        owners = {id(child): (name, parent) for name, parent in modules.items() for child in parent.children()}
        self._handles = [model.register_forward_pre_hook(self._start)]
        for name, module in modules.items():
            parent = owners.get(id(module), ("", None))[1]
            # a hook on a fused activation makes its layer compose it after the norm (`from_module`), so that z is seen as it is
            if _is_activation(module):
                self._handles.append(module.register_forward_pre_hook(self._before(name, module, parent)))
            if isinstance(module, _FilterResponseNorm) and module.tau is not None:  # has its threshold itself, and no module for it
                self._handles.append(module.register_forward_pre_hook(self._before_tlu(name), with_kwargs=True))
            if name in wanted:
                self._handles.append(module.register_forward_hook(self._after(name or type(module).__name__, module)))

    def _start(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._calls.clear()
        if arguments and isinstance(arguments[0], Tensor) and arguments[0].is_floating_point() and arguments[0].dim() > 1:
            with torch.no_grad():
                self._input.add("the model's input", arguments[0].detach(), self._channel_dim, None)

    def _place(self, key: int, name: str, kind: str, bent: bool) -> _Place:
        call = self._calls[key] = self._calls.get(key, 0) + 1
        place = self._places.get((key, call))
        if place is None:  # a module that runs several times in a forward is as many layers
            place = self._places[key, call] = _Place(name if call == 1 else f"{name}#{call}", kind, bent, _Units())
        return place

    def _before(self, name: str, module: nn.Module, parent: nn.Module | None) -> Callable[..., None]:
        found = _kind(module)
        dim = self._channel_dim
        if parent is not None and hasattr(parent, "normalized_shape") and getattr(parent, "dim", -1) == -1:
            dim = -1  # layer and RMS norm along rows

        def hook(m: nn.Module, arguments: tuple[Any, ...]) -> None:
            z = arguments[0].detach()
            with torch.no_grad():
                weight = weight_of(m) if found == "tlu" else None
                place = self._place(id(m), name or type(m).__name__, found, found in _BENT)
                place.units.add(place.name, z, dim, None if weight is None else weight.detach().to(z.dtype))

        return hook

    def _before_tlu(self, name: str) -> Callable[..., None]:
        def hook(m: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            x, residual, *_ = (*arguments, *named.values(), None)
            if m.residual_mode != PRE_ACT:
                residual = None
            with torch.no_grad():  # the norm once more without its threshold; it has no statistics that would move
                z = filter_response_norm(x, m.weight, m.bias, None, m.eps, eps_l=m.eps_l, residual=residual, backend=m.backend)
                place = self._place(id(m), name or type(m).__name__, "tlu", True)
                place.units.add(place.name, z, 1, m.tau.detach().to(z.dtype))

        return hook

    def _after(self, name: str, module: nn.Module) -> Callable[..., None]:
        def hook(m: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            y = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(y, Tensor) and y.is_floating_point() and y.dim() > 1:
                with torch.no_grad():
                    place = self._place(-id(m), name, f"output of {type(m).__name__}", False)
                    place.units.add(place.name, y.detach(), self._channel_dim, None)

        return hook

    def remove(self) -> None:
        """Take the hooks off; what was collected stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Observation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def report(self) -> Report:
        """What was collected so far, read from the device now.

        Raises:
            ValueError: no batch has run.
        """
        if not self._places and self._input.count == 0:
            raise ValueError("observe: nothing was collected; run the model on data before asking for the report")
        base: tuple[float | None, float | None] = self._input.variance_and_mean_square() if self._input.count else (None, None)
        layers = []
        for place in self._places.values():
            units = place.units
            if units.low is None or units.high is None:
                continue
            dead = linear = mixed = None
            if place.bent:
                # by the side that the derivative puts a tie on: relu's is 0 at 0, tlu's is 1 at its threshold
                negative = units.high < 0 if place.kind == "tlu" else units.high <= 0
                positive = units.low >= 0 if place.kind == "tlu" else units.low > 0
                dead, linear = float(negative.double().mean()), float(positive.double().mean())
                mixed = 1 - dead - linear
            values = units.variance_and_mean_square()
            relative = [value / of if of else None for value, of in zip(values, base, strict=True)]
            layers.append(LayerReport(place.name, place.kind, len(units.low), dead, linear, mixed, *values, *relative))
        return Report(tuple(layers), *base)


def _is_activation(module: nn.Module) -> bool:
    return isinstance(module, Composed) or (type(module) in _MODULES and type(module) is not nn.Identity)


def _kind(module: nn.Module) -> str:
    return module.extra_repr() if isinstance(module, Composed) else _MODULES[type(module)](module).name


def observe(model: nn.Module, *, outputs: Outputs | None = None, channel_dim: int = 1) -> Observation:
    """Watch a model's pre-activations while it runs on data of your choice.

    Every activation module that a norm can be fused with is watched: in normfused's layers (the child ``act``, whose input is the
    norm's output with the residual, if that is added before; callables too) and on its own, `nn.ReLU` first of all. A watched layer
    runs its activation after the norm instead of fused with it; nothing else changes. A module that runs several times in a forward
    counts as several layers.

    Args:
        model: any module, in training or evaluation mode, which is left as it is. Functions (``F.relu``) cannot be seen.
        outputs: names of modules, or one, or ``function(name, module)``, whose outputs' variance is collected too, e.g. residual blocks.
        channel_dim: the dimension of units in activations and in the model's input (default 1); of layer and RMS norms along rows it
            is the last.

    Returns:
        `Observation`: a context manager that takes its hooks off at the end; ``report()`` may be asked for at any time. Until then
        nothing is read from the device.

    Raises:
        ValueError: ``outputs`` names a module that is not there.

    The fractions are those of units whose pre-activation's maximum over samples and positions is <= 0 (dead), whose minimum is > 0
    (linear), and the rest (mixed); for TLU the threshold takes the place of 0.

    Reference: Shao et al., *Is normalization indispensable for training deep neural networks?*, NeurIPS 2020.
    """
    return Observation(model, outputs, channel_dim)


def diagnose(
    model: nn.Module,
    data: Iterable[Any] | Tensor,
    *,
    outputs: Outputs | None = None,
    channel_dim: int = 1,
    device: torch.device | str | None = None,
) -> Report:
    """`observe` over a data set, without gradients: dead, linear and mixed units and the variance of every layer.

    Args:
        model: run as it is; call ``model.eval()`` first if its statistics are not to move.
        data: one batch, or an iterable of batches; of a batch that is a tuple or list, the first part is the input.
        outputs, channel_dim: as in `observe`.
        device: batches are moved there first (default: as they are).

    Returns:
        `Report`; print it, ``plot()`` it, or read ``layers``.

    Raises:
        ValueError: no data.
    """
    with observe(model, outputs=outputs, channel_dim=channel_dim) as found, torch.no_grad():
        for batch in [data] if isinstance(data, Tensor) else data:
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            model(x if device is None else x.to(device, non_blocking=True))
    return found.report()
