"""State dicts with the names of RepDistiller's and mdistiller's CIFAR networks load into the networks here.

The definitions below are written from those repositories' naming, independently of `models/networks`.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coursepack.errors import TeacherMismatch
from coursepack.models import build_network, load_teacher

NAMES = tuple(map(str, range(10)))


def bn(channels):
    return nn.BatchNorm2d(channels)


def conv(before, after, side=3, stride=1, groups=1, bias=False):
    return nn.Conv2d(before, after, side, stride, side // 2, groups=groups, bias=bias)


class Block(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(before, after, 3, stride), bn(after)
        self.conv2, self.bn2 = conv(after, after), bn(after)
        self.downsample = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(conv(before, after, 1, stride), bn(after))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, depth, widths, classes=10):
        super().__init__()
        count = (depth - 2) // 6
        self.conv1, self.bn1 = conv(3, widths[0]), bn(widths[0])
        for index in (1, 2, 3):
            blocks = [Block(widths[index - 1], widths[index], 1 if index == 1 else 2)]
            blocks += [Block(widths[index], widths[index], 1) for _ in range(count - 1)]
            setattr(self, f"layer{index}", nn.Sequential(*blocks))
        self.fc = nn.Linear(widths[3], classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class WideBlock(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.bn1, self.conv1 = bn(before), conv(before, after, 3, stride)
        self.bn2, self.conv2 = bn(after), conv(after, after)
        self.convShortcut = None if before == after else conv(before, after, 1, stride)

    def forward(self, x):
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class Group(nn.Module):
    def __init__(self, before, after, count, stride):
        super().__init__()
        rest = [WideBlock(after, after, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(WideBlock(before, after, stride), *rest)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    def __init__(self, depth, factor, classes=10):
        super().__init__()
        count, widths = (depth - 4) // 6, [16, 16 * factor, 32 * factor, 64 * factor]
        self.conv1 = conv(3, 16)
        self.block1 = Group(16, widths[1], count, 1)
        self.block2 = Group(widths[1], widths[2], count, 2)
        self.block3 = Group(widths[2], widths[3], count, 2)
        self.bn1, self.fc = bn(widths[3]), nn.Linear(widths[3], classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(F.avg_pool2d(x, x.shape[2]).flatten(1))


class VGG(nn.Module):
    def __init__(self, plan, classes=10):
        super().__init__()
        before = 3
        for index, widths in enumerate(plan):
            layers = []
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, padding=1), bn(width), nn.ReLU()]
                before = width
            setattr(self, f"block{index}", nn.Sequential(*layers[:-1]))
        self.classifier = nn.Linear(512, classes)

    def forward(self, x):
        for index in range(4):
            x = F.relu(getattr(self, f"block{index}")(x))
            if index < 3:
                x = F.max_pool2d(x, 2)
        x = F.relu(self.block4(x))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Inverted(nn.Module):
    def __init__(self, before, after, stride, factor):
        super().__init__()
        inner = before * factor
        self.same = stride == 1 and before == after
        self.conv = nn.Sequential(
            conv(before, inner, 1), bn(inner), nn.ReLU(),
            conv(inner, inner, 3, stride, inner), bn(inner), nn.ReLU(),
            conv(inner, after, 1), bn(after),
        )  # fmt: skip

    def forward(self, x):
        return x + self.conv(x) if self.same else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        plan = [
            (1, 16, 1, 1),
            (6, 24, 2, 1),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]
        self.conv1 = nn.Sequential(conv(3, 16, 3, 2), bn(16), nn.ReLU())
        self.blocks, before = nn.ModuleList(), 16
        for factor, width, count, stride in plan:
            after = width // 2
            units = [
                Inverted(before if i == 0 else after, after, stride if i == 0 else 1, factor)
                for i in range(count)
            ]
            self.blocks.append(nn.Sequential(*units))
            before = after
        self.conv2 = nn.Sequential(conv(before, 1280, 1), bn(1280), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(1280, classes))

    def forward(self, x):
        x = self.conv1(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(F.adaptive_avg_pool2d(self.conv2(x), 1).flatten(1))


def shuffle(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)


class Bottleneck(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.stride, inner, self.groups = stride, after // 4, 1 if before == 24 else 3
        self.conv1, self.bn1 = conv(before, inner, 1, groups=self.groups), bn(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride, inner), bn(inner)
        self.conv3, self.bn3 = conv(inner, after, 1, groups=3), bn(after)

    def forward(self, x):
        out = shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        if self.stride == 2:
            return F.relu(torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], 1))
        return F.relu(out + x)


class ShuffleV1(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv1, self.bn1, before = conv(3, 24, 1), bn(24), 24
        for index, (after, count) in enumerate(((240, 4), (480, 8), (960, 4)), 1):
            units = [Bottleneck(before, after - before, 2)]
            units += [Bottleneck(after, after, 1) for _ in range(count - 1)]
            setattr(self, f"layer{index}", nn.Sequential(*units))
            before = after
        self.linear = nn.Linear(960, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


class Basic(nn.Module):
    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = conv(half, half, 1), bn(half)
        self.conv2, self.bn2 = conv(half, half, 3, groups=half), bn(half)
        self.conv3, self.bn3 = conv(half, half, 1), bn(half)

    def forward(self, x):
        half = x.shape[1] // 2
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x[:, half:])))))
        return shuffle(torch.cat([x[:, :half], F.relu(self.bn3(self.conv3(out)))], 1), 2)


class Down(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        half = after // 2
        self.conv1, self.bn1 = conv(before, before, 3, 2, before), bn(before)
        self.conv2, self.bn2 = conv(before, half, 1), bn(half)
        self.conv3, self.bn3 = conv(before, half, 1), bn(half)
        self.conv4, self.bn4 = conv(half, half, 3, 2, half), bn(half)
        self.conv5, self.bn5 = conv(half, half, 1), bn(half)

    def forward(self, x):
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        return shuffle(torch.cat([left, F.relu(self.bn5(self.conv5(right)))], 1), 2)


class ShuffleV2(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv1, self.bn1, before = conv(3, 24, 1), bn(24), 24
        for index, (after, count) in enumerate(((116, 3), (232, 7), (464, 3)), 1):
            setattr(
                self,
                f"layer{index}",
                nn.Sequential(Down(before, after), *(Basic(after) for _ in range(count))),
            )
            before = after
        self.conv2, self.bn2 = conv(464, 1024, 1), bn(1024)
        self.linear = nn.Linear(1024, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(F.relu(self.bn2(self.conv2(x))), 4).flatten(1))


PLAIN, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
THEIRS = {
    "resnet8": lambda: ResNet(8, PLAIN),
    "resnet20": lambda: ResNet(20, PLAIN),
    "resnet8x4": lambda: ResNet(8, WIDE),
    "wrn-16-1": lambda: WideResNet(16, 1),
    "wrn-16-2": lambda: WideResNet(16, 2),
    "vgg8": lambda: VGG([[64], [128], [256], [512], [512]]),
    "vgg11": lambda: VGG([[64], [128], [256, 256], [512, 512], [512, 512]]),
    "mobilenet-v2": MobileNetV2,
    "shufflenet-v1": ShuffleV1,
    "shufflenet-v2": ShuffleV2,
}


def theirs(name):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        network = THEIRS[name]()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, std=0.1)
                nn.init.normal_(layer.running_mean, std=0.1)
                nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize("name", THEIRS)
def test_published_names_load_and_give_the_same_logits(name, tmp_path, capsys):
    published, file = theirs(name), tmp_path / "ckpt.pth"
    torch.save({"epoch": 240, "model": published.state_dict(), "best_acc": torch.tensor(72.0)}, file)
    network = load_teacher(name, NAMES, weights=str(file))
    said = capsys.readouterr().err
    assert f"{file}: using the state dict under 'model'" in said
    assert f"{file}: mapped {len(published.state_dict())} names of RepDistiller's and mdistiller's" in said
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, ours = published(images), network.module.eval()(images)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_prefix_comes_off_first_and_own_names_are_left_alone(tmp_path, capsys):
    state = {f"module.{name}": value for name, value in theirs("resnet8").state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    load_teacher("resnet8", NAMES, weights=str(tmp_path / "w.pth"))
    said = capsys.readouterr().err
    assert said.index("removed the prefix 'module.'") < said.index("mapped ")
    torch.save(build_network("resnet8", 10).module.state_dict(), tmp_path / "w.pth")
    load_teacher("resnet8", NAMES, weights=str(tmp_path / "w.pth"))
    assert capsys.readouterr().err == ""


def test_another_networks_weights_are_refused_by_their_own_names(tmp_path):
    torch.save(theirs("resnet20").state_dict(), tmp_path / "w.pth")
    with pytest.raises(TeacherMismatch, match=r"are not of network 'resnet8': .*not expected \['bn1\.bias'"):
        load_teacher("resnet8", NAMES, weights=str(tmp_path / "w.pth"))
    with pytest.raises(TeacherMismatch, match="are not of network 'digits-cnn'"):
        load_teacher("digits-cnn", NAMES, weights=str(tmp_path / "w.pth"))
