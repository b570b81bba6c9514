"""Whole networks: either kind of norms is the same network, conversion leaves none behind, wrong and failed variants have no figures."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn

import normfused as nf
from normfused.activations import from_module
from normfused.benchmark import networks, results
from normfused.benchmark.networks import NETWORKS, Size, convert, measure
from normfused.benchmark.networks.layers import NORMFUSED, TORCH, instance_norm
from normfused.benchmark.networks.models import CycleGanGenerator

CPU = torch.device("cpu")
ABSENT = networks.absent("cpu")
# float64's rounding, 2e-16, times what the depth of a network and batch norm of few values make of it
TOLERANCE = 1e-9


def setting(name: str, dtype: torch.dtype = torch.float64, training: bool = True, layout: str | None = None) -> measure.Setting:
    network = NETWORKS[name]
    if name in ABSENT:
        pytest.skip(ABSENT[name])
    return measure.Setting(network, network.small, network.small.batches[0], layout or network.layouts[0], dtype, CPU, training)


def pair(name: str, training: bool = True) -> list[measure.Variant]:
    """Both variants, their parameters moved off 1 and 0, which would hide a weight that is not used."""
    made = []
    for norms in (TORCH, NORMFUSED):
        s = setting(name, training=training)
        variant = measure.Variant(s, s.row(norms, "eager"), *s.data())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in variant.plain.parameters():
                p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        made.append(variant)
    return made


def assert_near(got: Tensor, wanted: Tensor, scale: float = 1.0) -> None:
    assert got.shape == wanted.shape
    got, wanted = got.detach().double(), wanted.detach().double()
    assert float((got - wanted).abs().max()) <= TOLERANCE * max(float(wanted.abs().max()), scale)


# ------------------------------------------------------------------------------------------------- the same network
@pytest.mark.parametrize("name", NETWORKS)
def test_both_kinds_of_norms_are_the_same_network(name: str) -> None:
    plain, fused = pair(name)
    output, wanted = fused.model(*fused.inputs), plain.model(*plain.inputs)
    assert_near(output, wanted)
    for variant in (plain, fused):
        variant.loss().backward()
    gradients = [[p.grad for p in v.plain.parameters()] for v in (plain, fused)]
    # a convolution's bias before a norm has the gradient 0, and is as accurate as the others
    scale = max(float(g.abs().max()) for g in gradients[0])
    for got, wanted in zip(gradients[1], gradients[0], strict=True):
        assert_near(got, wanted, scale)
    for got, wanted in zip(fused.plain.buffers(), plain.plain.buffers(), strict=True):
        assert_near(got, wanted)


@pytest.mark.parametrize("name", NETWORKS)
def test_two_steps_end_at_the_same_loss(name: str) -> None:
    losses = [[float(v.step()) for _ in range(3)] for v in pair(name)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0][2] != losses[0][0], "the weights moved"


@pytest.mark.parametrize("name", NETWORKS)
def test_eval_gives_the_same_output(name: str) -> None:
    plain, fused = pair(name, training=False)
    with torch.inference_mode():
        assert_near(fused.model(*fused.inputs), plain.model(*plain.inputs))


@pytest.mark.parametrize("name", NETWORKS)
def test_no_norm_of_torch_is_left(name: str) -> None:
    s = setting(name)
    plain, fused = s.model(TORCH), s.model(NORMFUSED)
    left = convert.norms_left(plain)
    if NETWORKS[name].norm != "frn":  # torch has none
        assert len(left) > 0
        assert convert.norms_fused(fused) == len(left)
    assert convert.norms_left(fused) == []
    assert convert.norms_fused(plain) == 0


@pytest.mark.parametrize(("name", "count"), [("resnet50", 53), ("efficientnet_b0", 49), ("convnext_tiny", 23), ("resnet50_frn", 53)])
def test_layers_of_the_full_size(name: str, count: int) -> None:
    if name in ABSENT:
        pytest.skip(ABSENT[name])
    with torch.device("meta" if name.endswith("frn") else "cpu"):
        assert convert.norms_fused(NETWORKS[name].full.build(NORMFUSED)) == count


@pytest.mark.parametrize(("name", "millions"), [("resnet50_frn", 25.6), ("nnunet", 31.2), ("cyclegan", 11.4)])
def test_full_sizes_have_their_published_number_of_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = NETWORKS[name].full.build(TORCH)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


# -------------------------------------------------------------------------------------------- conversion without timm
class Bottleneck(nn.Module):
    """timm's, as far as conversion looks at it."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.conv1, self.bn1, self.act1 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.drop_block, self.act2, self.aa = nn.Identity(), nn.ReLU(inplace=True), nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(width, outside, 1, bias=False), nn.BatchNorm2d(outside)
        self.se: nn.Module | None = None
        self.act3 = nn.ReLU(inplace=True)
        changes = stride > 1 or inside != outside
        self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)) if changes else None
        self.drop_path: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act3(x)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        blocks, inside = [], 4
        for level, depth in enumerate((3, 4, 6, 3)):
            for i in range(depth):
                blocks.append(Bottleneck(inside, 2 << level, 2 if level and not i else 1))
                inside = 8 << level
        self.layers = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.act1(self.bn1(self.conv1(x))))


class BatchNormAct2d(nn.BatchNorm2d):
    __module__ = "timm.layers.norm_act"

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.2)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class LayerNorm2d(nn.LayerNorm):
    __module__ = "timm.layers.norm"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def moved(model: nn.Module) -> nn.Module:
    """In float64, with parameters and statistics that differ from 1 and 0."""
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer += torch.rand_like(buffer)
    return model


def assert_same_after_conversion(model: nn.Module, x: Tensor) -> nn.Module:
    fused = convert.fuse(copy.deepcopy(model))
    assert fused.state_dict().keys() == model.state_dict().keys()
    for training in (False, True):
        outputs = [m.train(training)(x) for m in (model, fused)]
        assert_near(outputs[1], outputs[0])
    gradients = [torch.autograd.grad(y.square().sum(), list(m.parameters())) for m, y in zip((model, fused), outputs, strict=True)]
    scale = max(float(g.abs().max()) for g in gradients[0])
    for got, wanted in zip(gradients[1], gradients[0], strict=True):
        assert_near(got, wanted, scale)
    for (name, got), wanted in zip(fused.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.allclose(got, wanted, rtol=TOLERANCE, atol=TOLERANCE), name
    assert convert.norms_left(fused) == []
    return fused


def test_bottlenecks_are_converted() -> None:
    fused = assert_same_after_conversion(moved(ResNet()), torch.randn(4, 3, 32, 32, dtype=torch.float64))
    assert convert.norms_fused(fused) == 53
    assert sum(m.act is not None for m in fused.modules() if isinstance(m, nf.BatchNormAct2d)) == 49, "all but the shortcuts'"


def test_timms_own_norms_are_converted() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), BatchNormAct2d(8, nn.SiLU(inplace=True)), BatchNormAct2d(8, nn.Identity()), LayerNorm2d(8), nn.LayerNorm(6)
    )
    fused = assert_same_after_conversion(moved(model), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert [type(m) for m in list(fused)[1:]] == [nf.BatchNormAct2d] * 2 + [nf.LayerNormAct] * 2
    assert from_module(fused[1].act).name == "silu"
    assert (fused[1].eps, fused[1].momentum, from_module(fused[2].act).name) == (1e-3, 0.2, "identity")
    assert [m.dim for m in list(fused)[3:]] == [1, -1]


# --------------------------------------------------------------------------------------------------------------- run
def checked(rows: list[results.NetworkRow]) -> list[results.NetworkRow]:
    results.check(asdict(results.Results({}, networks=rows)))
    return rows


def test_rows_of_a_run() -> None:
    told: list[results.NetworkRow] = []
    state = torch.get_rng_state()
    rows = checked(networks.run(["nnunet"], device="cpu", rounds=2, on_row=told.append))
    assert told == rows
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
    assert [(r.layout, r.norms) for r in rows] == [(lay, n) for lay in ("contiguous", "channels_last_3d") for n in (TORCH, NORMFUSED)]
    for row in rows:
        assert (row.status, row.reason, row.mode, row.dtype, row.execution) == ("ok", None, "training", "float32", "eager")
        assert row.shape == (2, 1, 16, 16, 16)
        assert row.step_ms is not None and row.images_per_s == pytest.approx(2 / row.step_ms * 1e3)
        assert row.device_ms is row.peak_bytes is row.compile_s is None, "figures that a CPU does not have"
        assert row.saved_bytes is not None and row.spread is not None
        assert (row.replaced, row.backend) == ((10, "torch") if row.norms == NORMFUSED else (None, None))


def test_data_and_weights_are_in_the_layout() -> None:
    s = setting("nnunet", layout="channels_last_3d")
    assert s.data()[0][0].is_contiguous(memory_format=torch.channels_last_3d)
    kernel = s.model(TORCH).down[1][0].weight
    assert kernel.is_contiguous(memory_format=torch.channels_last_3d) and not kernel.is_contiguous()


def test_channels_last_is_that_of_the_dimensions() -> None:
    rows = networks.run(["nnunet", "cyclegan"], device="cpu", rounds=1, layout="channels_last", norms=(TORCH,))
    assert [r.layout for r in rows] == ["channels_last_3d", "channels_last"]


def test_eval_runs_the_forward_alone() -> None:
    rows = checked(networks.run(["cyclegan"], device="cpu", rounds=1, training=False))
    assert [(r.status, r.mode, r.saved_bytes) for r in rows] == [("ok", "eval", None)] * 2


def test_half_types_go_through_autocast() -> None:
    rows = checked(networks.run(["diffusion_unet"], device="cpu", rounds=1, dtype=torch.bfloat16))
    assert [(r.status, r.dtype) for r in rows] == [("ok", "bfloat16")] * 2
    assert all("float32" in (r.note or "") for r in rows)


def test_variants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    block = measure.Variant.block

    def watched(self: measure.Variant, steps: int) -> None:
        seen.append(self.row.norms)
        block(self, steps)

    monkeypatch.setattr(measure.Variant, "block", watched)
    networks.run(["cyclegan"], device="cpu", rounds=3)
    # one block each to see how long a step takes, then the rounds
    assert seen[2:] == [TORCH, NORMFUSED, NORMFUSED, TORCH, TORCH, NORMFUSED]


def test_a_step_is_a_training_step() -> None:
    s = setting("cyclegan", torch.float32)
    variant = measure.Variant(s, s.row(TORCH, "eager"), *s.data())
    first = float(variant.step())
    assert first == pytest.approx(float(measure.Variant(s, s.row(TORCH, "eager"), *s.data()).loss().detach()))
    for _ in range(20):
        last = float(variant.step())
    assert last < first


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sigmoid().sigmoid()


def changed(monkeypatch: pytest.MonkeyPatch, build: object) -> None:
    small = Size(build, (3, 32, 32), (1,))  # type: ignore[arg-type]
    monkeypatch.setitem(NETWORKS, "cyclegan", replace(NETWORKS["cyclegan"], small=small))


def test_saved_bytes_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, lambda norms: Twice())
    row = networks.run(["cyclegan"], device="cpu", rounds=1, norms=(TORCH,))[0]
    # both sigmoids keep their output, the loss |output - target| the difference; x, the target and the weight are there anyway
    assert row.saved_bytes == 3 * 4 * 3 * 32 * 32


def test_a_wrong_variant_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(norms: str) -> nn.Module:
        def one_wrong(channels: int, act: str | None = None) -> nn.Module:
            return instance_norm(norms, 2, affine=False)(channels, "silu" if act == "relu" and norms == NORMFUSED else act)

        return CycleGanGenerator(one_wrong, width=8, blocks=2)

    changed(monkeypatch, build)
    right, wrong = checked(networks.run(["cyclegan"], device="cpu", rounds=1))
    assert right.status == "ok" and right.step_ms is not None
    assert (wrong.status, wrong.step_ms, wrong.images_per_s, wrong.saved_bytes) == ("wrong", None, None, None)
    assert f"{wrong.loss:.6g}" in wrong.reason and f"{right.loss:.6g}" in wrong.reason


def test_a_loss_that_is_no_number_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nan(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float("nan")

    changed(monkeypatch, lambda norms: Nan())
    rows = checked(networks.run(["cyclegan"], device="cpu", rounds=1))
    assert {(r.status, r.step_ms) for r in rows} == {("wrong", None)}


@pytest.mark.parametrize("late", [False, True], ids=["first step", "in the rounds"])
def test_a_variant_that_runs_out_of_memory_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    step, steps = measure.Variant.step, []

    def out_of_memory(self: measure.Variant) -> Tensor | None:
        steps.append(self.row.norms)
        if self.row.norms == NORMFUSED and steps.count(NORMFUSED) > (measure.STEPS + 1 if late else 0):
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 1 TiB\nmore lines")
        return step(self)

    monkeypatch.setattr(measure.Variant, "step", out_of_memory)
    good, bad = checked(networks.run(["cyclegan"], device="cpu", rounds=2))
    assert good.status == "ok" and good.step_ms is not None
    assert (bad.status, bad.reason) == ("failed", "OutOfMemoryError: out of memory. Tried to allocate 1 TiB")
    assert (bad.step_ms, bad.saved_bytes, bad.loss) == (None, None, None)


def test_networks_that_are_not_here_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "cyclegan", replace(NETWORKS["cyclegan"], package="no_such_package"))
    assert "No module named 'no_such_package'" in networks.absent("cpu")["cyclegan"]
    rows = checked(networks.run(["cyclegan"], device="cpu"))
    assert {(r.status, r.reason) for r in rows} == {("absent", networks.absent("cpu")["cyclegan"])}
    if not torch.cuda.is_available():
        assert networks.absent("cuda").keys() == NETWORKS.keys()


def test_what_time_does_not_suffice_for_is_a_row() -> None:
    rows = checked(networks.run(["cyclegan"], device="cpu", seconds=-1))
    assert {(r.status, r.reason) for r in rows} == {("refused", "the -1 s given were used up")}


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["alexnet"], {}, "names must be of resnet50, .*, got 'alexnet'"),
        (["cyclegan"], {"norms": ("apex",)}, "norms must be of torch.nn, normfused, got 'apex'"),
        (["cyclegan"], {"executions": ("jit",)}, "executions must be of eager, compile, got 'jit'"),
        (["cyclegan"], {"layout": "nhwc"}, "layout must be of contiguous, .*, got 'nhwc'"),
        (["cyclegan"], {"rounds": 0}, "rounds must be at least 1, got 0"),
    ],
)
def test_unknown_arguments(names: list[str], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        networks.run(names, device="cpu", **options)


@pytest.mark.slow
def test_compiled_variants_compute_the_same() -> None:
    rows = checked(networks.run(["cyclegan"], device="cpu", rounds=1, executions=("eager", "compile")))
    assert [(r.status, r.execution) for r in rows] == [("ok", "eager")] * 2 + [("ok", "compile")] * 2
    assert all(r.compile_s is not None and r.compile_s > 0 for r in rows[2:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_peak_of_a_variant_does_not_depend_on_the_others() -> None:
    alone = networks.run(["cyclegan"], device="cuda", small=True, rounds=1, norms=(NORMFUSED,), executions=("eager",))[0]
    beside = networks.run(["cyclegan"], device="cuda", small=True, rounds=1, executions=("eager",))[1]
    assert alone.peak_bytes and beside.peak_bytes == pytest.approx(alone.peak_bytes, rel=0.02)
    assert alone.device_ms is not None
