"""A converted network is the same network: what every test of a conversion asks, in float64."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor, nn

import normfused as nf
from tests.convert.blocks import Pickler, Unpickler

# float64's rounding, 2e-16, times what three steps through a deep network of random weights make of it
TOLERANCE = 1e-9


def moved(model: nn.Module) -> nn.Module:
    """In float64, with parameters and statistics off 1 and 0, which would hide one that is not used."""
    generator = torch.Generator().manual_seed(3)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer += torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype)
            elif name.endswith(("running_mean", "weight", "bias")):
                buffer += 0.1 * torch.randn(buffer.shape, generator=generator, dtype=buffer.dtype)
    return model


def near(got: Any, wanted: Any, scale: float = 1.0) -> None:
    if isinstance(wanted, Tensor):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        if wanted.numel():
            assert float((got.detach() - wanted.detach()).abs().max()) <= TOLERANCE * max(float(wanted.detach().abs().max()), scale)
        return
    assert len(got) == len(wanted)
    for g, w in zip(got, wanted, strict=True):
        near(g, w, scale)


def total(y: Any) -> Tensor:
    return y.square().mean() if isinstance(y, Tensor) else sum((total(part) for part in y), torch.zeros((), dtype=torch.float64))


def run(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The same random numbers for every copy, and inputs that in-place operations of one do not change for the other."""
    torch.manual_seed(5)
    return model(*copy.deepcopy(inputs))


def three_steps(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Losses, and the first step's gradients."""
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9) if parameters else None
    losses, first = [], None
    for _ in range(3):
        model.zero_grad()
        loss = total(run(model, inputs))
        loss.backward()
        first = [None if p.grad is None else p.grad.clone() for p in parameters] if first is None else first
        if optimizer is not None:
            optimizer.step()
        losses.append(loss.detach())
    return losses, first or []


def shape_of(model: nn.Module) -> list[Any]:
    """All that the way back must restore: names, objects, classes, attributes."""
    inner = ("_parameters", "_buffers", "_modules")
    of_fx = ("_code", "_lineno_map")  # a graph module writes its code anew when it is pickled
    own = [
        (n, id(m), type(m), sorted((i for i in m.__dict__.items() if i[0] not in of_fx), key=lambda i: i[0]))
        for n, m in model.named_modules()
    ]
    return [(n, m, cls, [(k, list(v) if k in inner else id(v)) for k, v in items]) for n, m, cls, items in own]


def same_after_conversion(model: nn.Module, *inputs: Any, compiled: bool = True, exported: bool = True, **options: Any) -> nf.FusionReport:
    """Converts ``model`` and compares with a copy; returns the report."""
    plain = copy.deepcopy(model)
    before, names = shape_of(model), [n for n, _ in model.named_modules()]
    tensors = {n: id(t) for n, t in (*model.named_parameters(), *model.named_buffers())}
    foreseen = nf.fuse_norms(model, dry_run=True, **options)
    assert shape_of(model) == before, "a dry run changes nothing"
    report = nf.fuse_norms(model, **options)
    assert report.rows == foreseen.rows and report.model is model
    assert names == [n for n, _ in model.named_modules()]
    assert tensors == {n: id(t) for n, t in (*model.named_parameters(), *model.named_buffers())}
    assert list(model.state_dict()) == list(plain.state_dict())
    again = shape_of(model)
    assert nf.fuse_norms(model, **options).converted == [] and shape_of(model) == again, "idempotent"

    for training in (False, True):
        near(run(model.train(training), inputs), run(plain.train(training), inputs))
    for twin in (copy.deepcopy(model), pickled(model)):
        near(run(twin.eval(), inputs), run(plain.eval(), inputs))
    (losses, gradients), (wanted, wanted_gradients) = three_steps(model, inputs), three_steps(plain, inputs)
    near(losses, wanted)
    known = [g for g in wanted_gradients if g is not None]
    scale = max((float(g.abs().max()) for g in known), default=1.0)
    assert [g is None for g in gradients] == [g is None for g in wanted_gradients]
    near([g for g in gradients if g is not None], known, scale)
    state, wanted_state = model.state_dict(), plain.state_dict()
    assert list(state) == list(wanted_state)
    near([t.double() for t in state.values()], [t.double() for t in wanted_state.values()])

    other = moved(copy.deepcopy(plain))
    model.load_state_dict(other.state_dict())
    plain.load_state_dict(model.state_dict())
    near(run(model.eval(), inputs), run(plain.eval(), inputs))
    if compiled:
        torch._dynamo.reset()
        near(run(torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True), inputs), run(plain, inputs))
    if exported:
        near(run(torch.export.export(copy.deepcopy(model), copy.deepcopy(inputs)).module(), inputs), run(plain, inputs))
    nf.unfuse_norms(model)
    assert shape_of(model.train()) == before, "the way back is exact"
    model.eval()
    near(run(model, inputs), run(plain, inputs))
    return report


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    Pickler(file).dump(model)
    file.seek(0)
    found: nn.Module = Unpickler(file).load()
    return found
