"""The matrix holds every shape it should, and the words of the command line mean what they say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from normfused import ACTIVATIONS
from normfused.benchmark.cases import CHANNELS_LAST, CONTIGUOUS, FULL, HEADLINE, MATRIX, NORMS, QUICK, Case, parse, select

BF16 = [case for case in MATRIX if case.dtype == torch.bfloat16]


def test_every_name_is_unique() -> None:
    for cases in (MATRIX, QUICK):
        assert Counter(case.name for case in cases).most_common(1)[0][1] == 1


@pytest.mark.parametrize(
    ("family", "norm", "shapes", "variants"),
    [
        # batches 32 and 256, two formats, with and without residual
        ("ResNet-50", "batch", 9 * 2, 4),
        ("ResNet-50", "frn", 9 * 2, 2),
        ("EfficientNet-B0", "batch", 8, 2),
        ("fully connected", "batch", 1, 2),
        ("large", "batch", 1, 4),
        ("SD 1.5", "group", 7 * 2, 2),
        ("SDXL", "group", 3, 2),
        ("SDXL VAE", "group", 6, 2),
        ("video VAE", "group", 4, 2),
        # no activation and ReLU
        ("Mask R-CNN", "group", 5, 4),
        ("plain", "group", 1, 4),
        ("nnU-Net", "instance", 6, 2),
        ("CycleGAN", "instance", 3, 2),
        ("style", "instance", 2, 2),
        ("ViT-B", "layer", 1, 2),
        ("GPT-3", "layer", 1, 1),
        ("LLM", "rms", 8, 2),
        ("exotic", "batch_instance", 3, 2),
        ("exotic", "batch_renorm", 3, 2),
        ("exotic", "switchable", 3, 2),
        ("exotic", "mean_only", 3, 2),
        ("exotic", "eval", 3, 2),
        ("exotic", "whitening", 3, 2),
    ],
)
def test_a_family_has_all_its_shapes(family: str, norm: str, shapes: int, variants: int) -> None:
    found = Counter(case.shape for case in BF16 if case.family == family and case.norm == norm)
    assert len(found) == shapes
    assert set(found.values()) == {variants}


@pytest.mark.parametrize(
    ("op", "shape", "layouts"),
    [
        ("bn_relu", "256x2048x7x7", "both"),
        ("bn_add_relu", "32x64x112x112", "both"),
        ("bn_relu", "32x64", "rows"),
        ("bn_relu", "8x64x32x32", "both"),
        ("bn_add_relu", "4x256x28x28", "both"),
        ("bn_relu", "4x128x1024x1024", "both"),
        ("bn_relu", "4096x1024", "rows"),
        ("bn_silu", "128x1152x7x7", "both"),
        ("gn_silu", "8x2560x8x8", "both"),
        ("gn_silu", "4x1280x32x32", "both"),
        ("gn_silu", "1x128x1024x1024", "both"),
        ("gn_silu", "1x128x20x256x256", "both"),
        ("gn_silu", "1x512x16x180x320", "both"),
        ("gn_relu", "2x64x400x672", "both"),
        ("gn", "1024x256x7x7", "both"),
        ("gn", "32x256x56x56", "both"),
        ("in_leaky_relu", "2x32x128x128x128", "both"),
        ("in_relu", "1x256x64x64", "both"),
        ("in", "16x512x64x64", "both"),
        ("ln", "401408x96", "rows"),
        ("ln2d", "128x768x7x7", "both"),
        ("ln", "25216x768", "rows"),
        ("ln", "1024x12288", "rows"),
        ("rms", "131072x128", "rows"),
        ("add_rms", "1x4096", "rows"),
        ("frn_tlu", "256x64x112x112", "both"),
        ("bin", "2x256x200x336", "both"),
    ],
)
def test_the_matrix_has(op: str, shape: str, layouts: str) -> None:
    names = {case.name for case in BF16}
    for layout in (CONTIGUOUS, CHANNELS_LAST) if layouts == "both" else (CONTIGUOUS,):
        assert parse(op, shape, layout=layout).name in names


def test_headline_cases_come_first_and_in_every_type() -> None:
    tiers = [case.tier for case in MATRIX]
    count = tiers.count(HEADLINE)
    assert 50 <= count <= 60
    assert tiers[:count] == [HEADLINE] * count
    assert set(tiers[count:]) == {FULL}
    headline = MATRIX[:count]
    assert {case.dtype for case in headline} == {torch.bfloat16}
    assert {case.norm for case in headline} == set(NORMS.values())
    names = {case.name for case in MATRIX}
    for dtype in (torch.float16, torch.float32):
        assert all(replace(case, dtype=dtype).name in names for case in headline)


def test_quick_is_for_a_cpu() -> None:
    assert {case.dtype for case in QUICK} == {torch.float32}
    assert {case.norm for case in QUICK} == set(NORMS.values())
    assert {case.layout for case in QUICK} == {CONTIGUOUS, CHANNELS_LAST}
    assert max(case.tensor_bytes for case in QUICK) < 16 * 2**20
    small = [case for case in QUICK if case.tensor_bytes < 4 * 10**6]
    assert 0 < len(small) < len(QUICK)
    assert max(case.tensor_bytes for case in small) < 2**20


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (("bn_relu", "32x256x56x56"), Case("batch", (32, 256, 56, 56), "relu")),
        (
            ("bn_add_relu", "2x4x8x8", "fp16", "nhwc"),
            Case("batch", (2, 4, 8, 8), "relu", "pre_act", dtype=torch.float16, layout=CHANNELS_LAST),
        ),
        (("bn", "32x64"), Case("batch", (32, 64))),
        (("gn_silu", "1x64x8x8"), Case("group", (1, 64, 8, 8), "silu", groups=32)),
        (("gn_gelu_tanh", "1x64x8x8", "fp32", "nchw", 4), Case("group", (1, 64, 8, 8), "gelu_tanh", groups=4, dtype=torch.float32)),
        (("in_leaky_relu", "1x4x8x8x8"), Case("instance", (1, 4, 8, 8, 8), "leaky_relu")),
        (("ln_gelu", "16x64", torch.float64), Case("layer", (16, 64), "gelu", dtype=torch.float64)),
        (("ln2d_gelu", "2x4x8x8"), Case("layer", (2, 4, 8, 8), "gelu", dim=1)),
        (("rms", "16x64"), Case("rms", (16, 64))),
        (("add_rms", "16x64"), Case("rms", (16, 64), residual="pre_norm")),
        (("add_ln_relu", "16x64"), Case("layer", (16, 64), "relu", "pre_norm")),
        (("rms2d", "2x4x8x8"), Case("rms", (2, 4, 8, 8), dim=1)),
        (("frn_tlu", "2x4x8x8"), Case("frn", (2, 4, 8, 8), "tlu")),
        (("brn_relu", "2x4x8x8"), Case("batch_renorm", (2, 4, 8, 8), "relu")),
        (("sn", "2x4x8x8"), Case("switchable", (2, 4, 8, 8))),
        (("bin_add_silu", "2x4x8x8"), Case("batch_instance", (2, 4, 8, 8), "silu", "pre_act")),
    ],
)
def test_parse(words: tuple, want: Case) -> None:
    assert parse(*words) == want


def test_parse_knows_every_activation() -> None:
    assert {parse(f"bn_{act}", "2x4x8x8").act for act in ACTIVATIONS} == set(ACTIVATIONS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("batchnorm_relu", "2x4x8x8"), "op must name one of the norms bn, gn.*got 'batchnorm_relu'"),
        (("bn2d_relu", "2x4x8x8"), "op must name one of the norms"),
        (("", "2x4x8x8"), "op must name one of the norms"),
        (("bn_rleu", "2x4x8x8"), "op must end with one of the activations identity, relu.*got 'rleu'"),
        (("add_bn_relu", "2x4x8x8"), "add_ in front must be followed by ln or rms"),
        (("add_rms_add", "16x64"), "add_ in front"),
        (("bn_relu", "2x4x8xa"), "shape must be positive sizes joined by x.*got '2x4x8xa'"),
        (("bn_relu", "2,4,8,8"), "shape must be positive sizes"),
        (("bn_relu", "2x0x8x8"), "shape must be positive sizes"),
        (("bn_relu", ""), "shape must be positive sizes"),
        (("in_relu", "2x4"), "shape of in_relu must have 3 to 5 dimensions, got 2"),
        (("bn_relu", "64"), "must have 2 to 5 dimensions, got 1"),
        (("bn_relu", "2x4x8x8", "int8"), "dtype must be one of bf16.*got 'int8'"),
        (("bn_relu", "2x4x8x8", torch.int8), "dtype must be one of"),
        (("bn_relu", "2x4x8x8", "bf16", "nchwc"), "layout must be one of contiguous, nchw, channels_last, nhwc, got 'nchwc'"),
        (("ln", "16x64", "bf16", "nhwc"), "layout of ln must be contiguous for rows"),
        (("gn_silu", "2x4x8x8"), "groups must divide the channels 4, got 32"),
        (("gn_silu", "2x4x8x8", "bf16", "nchw", 0), "groups must divide"),
    ],
)
def test_parse_says_what_is_known(words: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"^parse: .*{message}"):
        parse(*words)


def test_select() -> None:
    assert select([]) == MATRIX
    found = select(["batch_instance", "GPT-3"])
    assert {case.norm for case in found} == {"batch_instance", "layer"}
    assert found == [case for case in MATRIX if case in found]
    assert all(case.tier == HEADLINE for case in select(["headline"]))
    assert select(["rms"], QUICK) == [case for case in QUICK if case.norm == "rms"]
    with pytest.raises(ValueError, match=r"^select: words must occur .*ResNet-50.* got 'resnet99'"):
        select(["rms", "resnet99"])
