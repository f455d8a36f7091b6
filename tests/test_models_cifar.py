"""Networks for 32-pixel images: sizes against formulas by hand, shapes, layouts, taps and formulas."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coursepack.distill.setup.student import blocks
from coursepack.models import Tap, TeacherRunner, build_network
from coursepack.models.networks import CIFAR, NETWORKS

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
NAMES = [name for name, kind in NETWORKS.items() if kind.preprocessing == CIFAR]


def parameters(module):
    return sum(value.numel() for value in module.parameters())


def outline(name, classes):
    """A network without values."""
    with torch.device("meta"):
        return NETWORKS[name].build(classes)


def images_of(count, *, size=32, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def lively(network):
    """The network with normalisations that differ from layer to layer."""
    generator = torch.Generator().manual_seed(1)
    for layer in network.module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value, low, high in (
                (layer.weight.data, 0.5, 1.5),
                (layer.bias.data, -0.2, 0.2),
                (layer.running_mean, -0.2, 0.2),
                (layer.running_var, 0.5, 1.5),
            ):
                value.copy_(low + (high - low) * torch.rand(value.shape, generator=generator))
    return network.module.eval()


# Each network's parameters by hand: k² in out / groups of a convolution of side k, 2 per channel of its norm.
def conv(channels_in, channels_out, side=3, *, groups=1, biases=0):
    return side**2 * channels_in * channels_out // groups + 2 * channels_out + biases


def resnet(depth, widths=(16, 16, 32, 64), classes=100):
    total, before = conv(3, widths[0]), widths[0]
    for width in widths[1:]:
        total += conv(before, width) + (2 * ((depth - 2) // 6) - 1) * conv(width, width)
        total += conv(before, width, 1) if before != width else 0
        before = width
    return total + (before + 1) * classes


def wide_resnet(depth, factor, classes=100):
    total, before = 27 * 16, 16
    for width in (16 * factor, 32 * factor, 64 * factor):
        # The normalisation stands before its convolution, so the first has as many channels as come in.
        total += 2 * before + 9 * before * width
        total += (2 * ((depth - 4) // 6) - 1) * (9 * width * width + 2 * width)
        total += before * width if before != width else 0
        before = width
    return total + 2 * before + (before + 1) * classes


def vgg(*counts, classes=100):
    total, before = 0, 3
    for width, count in zip((64, 128, 256, 512, 512), counts, strict=True):
        total += conv(before, width, biases=width) + (count - 1) * conv(width, width, biases=width)
        before = width
    return total + 513 * classes


def mobilenet(classes=100):
    table = ((1, 8, 1), (6, 12, 2), (6, 16, 3), (6, 32, 4), (6, 48, 3), (6, 80, 3), (6, 160, 1))
    total, before = conv(3, 16), 16
    for factor, width, count in table:
        for _ in range(count):
            inner = factor * before
            total += conv(before, inner, 1) + conv(inner, inner, groups=inner) + conv(inner, width, 1)
            before = width
    return total + conv(160, 1280, 1) + 1281 * classes


def shufflenet_v1(classes=100):
    total, before = conv(3, 24, 1), 24
    for width, count in ((240, 4), (480, 8), (960, 4)):
        for place in range(count):
            new = width - before if place == 0 else width
            inner, first = new // 4, 1 if before == 24 else 3
            total += conv(before, inner, 1, groups=first) + conv(inner, inner, groups=inner)
            total += conv(inner, new, 1, groups=3)
            before = width
    return total + 961 * classes


def shufflenet_v2(classes=100):
    total, before = conv(3, 24, 1), 24
    for width, count in ((116, 4), (232, 8), (464, 4)):
        half = width // 2
        total += conv(before, before, groups=before) + 2 * conv(before, half, 1)
        total += conv(half, half, groups=half) + conv(half, half, 1)
        total += (count - 1) * (2 * conv(half, half, 1) + conv(half, half, groups=half))
        before = width
    return total + conv(464, 1024, 1) + 1025 * classes


WIDE = (32, 64, 128, 256)
# For 100 classes. Two of the figures were read in print: 7,433,860 (resnet32x4) and 703,284 (wrn-16-2), of
# the networks that Tian et al. 2020 (arXiv 1910.10699) use. All others come from the formulas beside them,
# which are written from the papers' tables; they agree with what reports commonly give, where they do.
COUNTS = {
    "resnet8": (83_892, resnet(8)),
    "resnet14": (181_108, resnet(14)),
    "resnet20": (278_324, resnet(20)),
    "resnet32": (472_756, resnet(32)),
    "resnet44": (667_188, resnet(44)),
    "resnet56": (861_620, resnet(56)),
    "resnet110": (1_736_564, resnet(110)),
    "resnet8x4": (1_233_540, resnet(8, WIDE)),
    "resnet32x4": (7_433_860, resnet(32, WIDE)),
    "wrn-16-1": (180_916, wide_resnet(16, 1)),
    "wrn-16-2": (703_284, wide_resnet(16, 2)),
    "wrn-40-1": (569_780, wide_resnet(40, 1)),
    "wrn-40-2": (2_255_156, wide_resnet(40, 2)),
    "vgg8": (3_965_028, vgg(1, 1, 1, 1, 1)),
    "vgg11": (9_277_284, vgg(1, 1, 2, 2, 2)),
    "vgg13": (9_462_180, vgg(2, 2, 2, 2, 2)),
    "mobilenet-v2": (812_836, mobilenet()),
    "shufflenet-v1": (949_258, shufflenet_v1()),
    "shufflenet-v2": (1_355_528, shufflenet_v2()),
}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_counted_by_hand(name):
    figure, by_hand = COUNTS[name]
    assert parameters(outline(name, 100)) == figure == by_hand


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85), ("resnet110", 1.7)],
)
def test_resnets_for_ten_classes_have_about_the_parameters_given_for_them(name, millions):
    """Rounded figures as they are commonly given after table 6 of He et al. 2016, which was not at hand.

    Its shortcuts have no parameters; ours have two with 1x1 convolutions.
    """
    module = outline(name, 10)
    shortcuts = [layer.shortcut for layer in module.modules() if hasattr(layer, "shortcut")]
    assert sum(parameters(shortcut) > 0 for shortcut in shortcuts) == 2
    bare = parameters(module) - sum(map(parameters, shortcuts))
    digits = 1 if name == "resnet110" else 2
    assert round(bare / 1e6, digits) == millions


@pytest.mark.parametrize(("name", "millions"), [("wrn-40-1", 0.6), ("wrn-40-2", 2.2)])
def test_wide_resnets_for_ten_classes_have_about_the_parameters_given_for_them(name, millions):
    """Rounded figures as commonly given after Zagoruyko and Komodakis 2016, which was not at hand."""
    assert round(parameters(outline(name, 10)) / 1e6, 1) == millions


# Channels and side in pixels of what each layer gives.
STAGES = {
    "resnet20": {"stem": (16, 32), "layer1": (16, 32), "layer2": (32, 16), "layer3": (64, 8)},
    "resnet8x4": {"stem": (32, 32), "layer1": (64, 32), "layer2": (128, 16), "layer3": (256, 8)},
    "wrn-16-2": {
        "stem": (16, 32), "layer1": (32, 32), "layer2": (64, 16), "layer3": (128, 8), "norm": (128, 8)
    },
    "vgg8": {
        "layer1": (64, 32), "layer2": (128, 16), "layer3": (256, 8), "layer4": (512, 4), "layer5": (512, 4)
    },
    "mobilenet-v2": {
        "stem": (16, 16), "layer1": (8, 16), "layer2": (12, 16), "layer3": (16, 8), "layer4": (32, 4),
        "layer5": (48, 4), "layer6": (80, 2), "layer7": (160, 2), "tail": (1280, 2),
    },
    "shufflenet-v1": {"stem": (24, 32), "layer1": (240, 16), "layer2": (480, 8), "layer3": (960, 4)},
    "shufflenet-v2": {
        "stem": (24, 32), "layer1": (116, 16), "layer2": (232, 8), "layer3": (464, 4), "tail": (1024, 4)
    },
}  # fmt: skip


EACH = [name if name in STAGES else pytest.param(name, marks=pytest.mark.integration) for name in NAMES]
"""One network of each kind by default, and the deeper and wider ones marked `integration`."""


@pytest.mark.parametrize("name", STAGES)
def test_parts_have_the_papers_shapes(name):
    network = build_network(name, 10)
    assert blocks(network.module) == list(STAGES[name])
    runner = TeacherRunner(network, [Tap((layer,)) for layer in STAGES[name]])
    shapes = runner.row_shapes(3)
    assert {layer: shapes[f"features/{layer}"] for layer in STAGES[name]} == {
        layer: (channels, side, side) for layer, (channels, side) in STAGES[name].items()
    }


@pytest.mark.parametrize("name", EACH)
def test_every_layer_can_be_tapped_and_the_head_is_the_last(name):
    network = build_network(name, 7)
    module = network.module
    layers = [layer for layer, _ in module.named_modules() if layer]
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    output = TeacherRunner(network, [Tap((layer,)) for layer in layers]).run(pixels)
    assert torch.equal(output.features["head"], output.logits)
    assert layers[-1] == [child for child, _ in module.named_children()][-1] == "head"
    assert isinstance(module.head, nn.Linear)
    assert output.logits.shape == (2, 7)


@pytest.mark.parametrize("name", EACH)
def test_every_weight_learns_in_both_layouts(name):
    torch.manual_seed(0)
    images, labels = images_of(2), torch.tensor([0, 1])
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        module = build_network(name, 5).module.double().to(memory_format=layout)
        logits = module(images.double().contiguous(memory_format=layout))
        F.cross_entropy(logits, labels).backward()
        found.append([logits.detach(), *(weight.grad for weight in module.parameters())])
    assert all(bool(grad.isfinite().all()) and float(grad.abs().amax()) > 0 for grad in found[0][1:])
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(other.contiguous(), ours.contiguous(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", EACH)
def test_evaluation_does_not_depend_on_the_batch(name):
    module = lively(build_network(name, 5)).double()
    images = images_of(3).double()
    with torch.inference_mode():
        together = module(images)
        alone = torch.cat([module(images[[row]]) for row in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)
    assert float((together[0] - together[1]).abs().max()) > 1e-8


@pytest.mark.parametrize("name", EACH)
def test_the_head_reads_the_mean_over_places_of_what_is_active(name):
    network = build_network(name, 5)
    last = blocks(lively(network))[-1]
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    output = TeacherRunner(network, [Tap((last,))]).run(pixels)
    with torch.inference_mode():
        expected = network.module.head(F.relu(output.features[last]).mean((2, 3)))
    torch.testing.assert_close(output.logits, expected)
    assert (float(output.features[last].min()) < 0) == (last == "norm")


@pytest.mark.parametrize("name", EACH)
def test_larger_images_are_taken(name):
    module = build_network(name, 5).module.eval()
    with torch.inference_mode():
        assert module(images_of(1, size=64)).shape == (1, 5)


def test_vgg_pools_once_more_from_64_pixels():
    network = build_network("vgg8", 5, size=64)
    assert TeacherRunner(network, [Tap(("layer5",))]).row_shapes(3)["features/layer5"] == (512, 4, 4)


HE = [name for name in NAMES if not name.startswith("shufflenet")]


@pytest.mark.parametrize("name", HE)
def test_first_weights_are_he_et_als(name):
    module = build_network(name, 100, seed=5).module
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            expected = math.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.out_channels))
            count = layer.weight.numel()
            # Five standard errors of a standard deviation, and of a mean.
            weight = layer.weight.detach()
            assert float(weight.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * count))
            assert abs(float(weight.mean())) < 5 * expected / math.sqrt(count)
            assert layer.bias is None or not layer.bias.any()
        elif isinstance(layer, nn.BatchNorm2d):
            assert bool((layer.weight == 1).all())
            assert not layer.bias.any()
    assert not module.head.bias.any()
    if name.startswith(("vgg", "mobilenet")):
        assert float(module.head.weight.detach().std()) == pytest.approx(0.01, rel=0.03)


def norm(layer, maps):
    """Batch normalisation from its definition."""

    def per_channel(value):
        return value[:, None, None]

    scaled = (maps - per_channel(layer.running_mean)) / (per_channel(layer.running_var) + layer.eps).sqrt()
    return scaled * per_channel(layer.weight) + per_channel(layer.bias)


def apply(part, maps, **options):
    """Convolution and normalisation of a part that holds both, without its ReLU."""
    return norm(part[1], F.conv2d(maps, part[0].weight, part[0].bias, **options))


def shuffled(maps, groups):
    """Channel c of the result is channel (c mod groups) (C / groups) + c div groups of the maps."""
    count = maps.shape[1]
    order = [(c % groups) * (count // groups) + c // groups for c in range(count)]
    return maps[:, order]


@torch.inference_mode()
def test_blocks_are_the_papers():
    """One block of each kind against its figure, written out."""
    relu = F.relu
    block = lively(build_network("resnet20", 10)).layer2[0]
    maps = torch.randn(2, 16, 8, 8)
    inner = relu(norm(block.bn1, F.conv2d(maps, block.conv1.weight, None, 2, 1)))
    expected = norm(block.bn2, F.conv2d(inner, block.conv2.weight, None, 1, 1)) + apply(
        block.shortcut, maps, stride=2
    )
    torch.testing.assert_close(block(maps), relu(expected), rtol=1e-4, atol=1e-4)

    layer = lively(build_network("wrn-16-2", 10)).layer2
    maps = torch.randn(2, 32, 8, 8)
    active = relu(norm(layer[0].bn1, maps))
    inner = relu(norm(layer[0].bn2, F.conv2d(active, layer[0].conv1.weight, None, 2, 1)))
    first = F.conv2d(inner, layer[0].conv2.weight, None, 1, 1) + F.conv2d(
        active, layer[0].shortcut.weight, None, 2
    )
    torch.testing.assert_close(layer[0](maps), first, rtol=1e-4, atol=1e-4)
    inner = relu(
        norm(layer[1].bn2, F.conv2d(relu(norm(layer[1].bn1, first)), layer[1].conv1.weight, None, 1, 1))
    )
    second = F.conv2d(inner, layer[1].conv2.weight, None, 1, 1) + first
    torch.testing.assert_close(layer[1](first), second, rtol=1e-4, atol=1e-4)

    layer = lively(build_network("mobilenet-v2", 10)).layer3
    for block, channels, stride in ((layer[0], 12, 2), (layer[1], 16, 1)):
        maps = torch.randn(2, channels, 8, 8)
        inner = relu(apply(block.expand, maps))
        inner = relu(apply(block.depthwise, inner, stride=stride, padding=1, groups=6 * channels))
        expected = apply(block.project, inner) + (maps if stride == 1 else 0)
        torch.testing.assert_close(block(maps), expected, rtol=1e-4, atol=1e-4)

    module = lively(build_network("shufflenet-v1", 10))
    for block, channels, groups in (
        (module.layer1[0], 24, 1),
        (module.layer2[0], 240, 3),
        (module.layer2[1], 480, 3),
    ):
        maps = torch.randn(2, channels, 8, 8)
        inner = shuffled(relu(apply(block.reduce, maps, groups=groups)), groups)
        stride = 1 if channels == 480 else 2
        inner = relu(apply(block.depthwise, inner, stride=stride, padding=1, groups=inner.shape[1]))
        new = apply(block.expand, inner, groups=3)
        beside = F.avg_pool2d(maps, 3, 2, 1)
        expected = relu(new + maps) if stride == 1 else relu(torch.cat([new, beside], 1))
        torch.testing.assert_close(block(maps), expected, rtol=1e-4, atol=1e-4)

    down, split = lively(build_network("shufflenet-v2", 10)).layer2[:2]
    maps = torch.randn(2, 116, 8, 8)
    left = relu(apply(down.shortcut[1], apply(down.shortcut[0], maps, stride=2, padding=1, groups=116)))
    right = apply(down.branch[1], relu(apply(down.branch[0], maps)), stride=2, padding=1, groups=116)
    expected = shuffled(torch.cat([left, relu(apply(down.branch[2], right))], 1), 2)
    torch.testing.assert_close(down(maps), expected, rtol=1e-4, atol=1e-4)
    right = apply(split.branch[1], relu(apply(split.branch[0], expected[:, 116:])), padding=1, groups=116)
    expected = shuffled(torch.cat([expected[:, :116], relu(apply(split.branch[2], right))], 1), 2)
    torch.testing.assert_close(split(down(maps)), expected, rtol=1e-4, atol=1e-4)


def test_the_page_has_every_network():
    lines = [
        line for line in PAGE.read_text().splitlines() if line.startswith("| `") and line.count("|") == 7
    ]
    rows = {}
    for line in lines:
        name, hundred, ten, size, _, _ = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name.strip("`")] = (hundred, ten, size)
    assert rows == {
        name: (
            f"{parameters(outline(name, 100)):,}",
            f"{parameters(outline(name, 10)):,}",
            f"{kind.preprocessing.size}",
        )
        for name, kind in NETWORKS.items()
    }
