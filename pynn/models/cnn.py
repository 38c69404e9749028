"""Convolutional classifiers from LeNet to ResNet, on pynn's convolution.

AlexNet, VGG, GoogLeNet and ResNet have torchvision's parameter names and compute what its models compute. An activation
that directly follows a convolution runs in the convolution's pass; nn.Identity keeps its number in a Sequential.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn.conv import Conv2d
from ._filters import CausalConv1d, ReceptiveField, conv_output_size, gabor_bank, haar_bank, receptive_field

__all__ = [
    "VGG",
    "AlexNet",
    "BasicBlock",
    "Bottleneck",
    "CausalConv1d",
    "GoogLeNet",
    "GoogLeNetOutputs",
    "LeNet",
    "ReceptiveField",
    "ResNet",
    "ZFNet",
    "conv_output_size",
    "gabor_bank",
    "haar_bank",
    "receptive_field",
    "resnet18",
    "resnet50",
    "vgg16",
]


@fx.wrap  # receptive_field traces models, and a trace cannot follow a decision about values
def check_images(model: str, x: Tensor, channels: int, size: int | None = None, at_least: int = 1) -> None:
    """Raises ValueError unless x is (B, channels, H, W), with H and W equal to size if given, or at least at_least."""
    height, width = ("H", "W") if size is None else (size, size)
    if x.dim() != 4 or x.shape[1] != channels or (size is not None and x.shape[2:] != (size, size)):
        raise ValueError(f"{model}: expected x of shape (B, {channels}, {height}, {width}), got {tuple(x.shape)}")
    if min(x.shape[2:]) < at_least:
        raise ValueError(f"{model}: expected height and width of at least {at_least}, got {tuple(x.shape[2:])}")


class LeNet(nn.Module):
    """LeNet-5: two convolutions of 5x5 with pooling, three linear layers.

    LeCun et al., "Gradient-based learning applied to document recognition", 1998; with max pooling, and ReLU by
    default, as it is used today.

    Args:
        num_classes: outputs. in_channels: channels of the image.
        image_size: height and width of the image, at least 12; 28 for MNIST.
        activation: of the convolutions and hidden layers: relu, tanh or sigmoid.
    Shape:
        (B, in_channels, image_size, image_size) to logits (B, num_classes).
    Raises:
        ValueError: an image too small for two poolings, an unknown activation, an input of another shape.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28, activation: str = "relu"
    ) -> None:
        super().__init__()
        hidden = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}.get(activation)
        if hidden is None:
            raise ValueError(f"LeNet: expected activation to be relu, tanh or sigmoid, got {activation!r}")
        if image_size < 12:
            raise ValueError(f"LeNet: expected image_size >= 12, got {image_size}")
        size = conv_output_size(conv_output_size(image_size, 2, stride=2), 5)
        size = conv_output_size(size, 2, stride=2)
        self.in_channels, self.image_size = in_channels, image_size
        self.features = nn.Sequential(
            Conv2d(in_channels, 6, 5, padding=2, activation=activation),
            nn.MaxPool2d(2),
            Conv2d(6, 16, 5, activation=activation),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * size * size, 120), hidden(), nn.Linear(120, 84), hidden(), nn.Linear(84, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        check_images("LeNet", x, self.in_channels, self.image_size)
        return self.classifier(self.features(x).flatten(1))


def _classifier(in_features: int, num_classes: int, dropout: float, dropout_first: bool) -> list[nn.Module]:
    """The three linear layers of AlexNet (dropout before the hidden ones) and VGG (after them)."""
    layers: list[nn.Module] = []
    for features in (in_features, 4096):
        hidden: list[nn.Module] = [nn.Linear(features, 4096), nn.ReLU(inplace=True)]
        drop = nn.Dropout(dropout)
        layers += [drop, *hidden] if dropout_first else [*hidden, drop]
    return [*layers, nn.Linear(4096, num_classes)]


class _PooledClassifier(nn.Module):
    """features, average pooling to a fixed size, classifier."""

    def __init__(self, features: nn.Module, pooled: int, classifier: Sequence[nn.Module], in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(pooled)
        self.classifier = nn.Sequential(*classifier)

    def forward(self, x: Tensor) -> Tensor:
        check_images(type(self).__name__, x, self.in_channels)
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class AlexNet(_PooledClassifier):
    """AlexNet in its one-GPU form: Krizhevsky, "One weird trick", https://arxiv.org/abs/1404.5997.

    Args:
        num_classes: outputs. dropout: before the first two linear layers. in_channels: channels of the image.
    Shape:
        (B, in_channels, H, W), H and W at least 63, to logits (B, num_classes).
    Raises:
        ValueError: an input of another shape.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5, in_channels: int = 3) -> None:
        features = nn.Sequential(
            Conv2d(in_channels, 64, 11, stride=4, padding=2, activation="relu"),
            nn.Identity(),
            nn.MaxPool2d(3, stride=2),
            Conv2d(64, 192, 5, padding=2, activation="relu"),
            nn.Identity(),
            nn.MaxPool2d(3, stride=2),
            Conv2d(192, 384, 3, padding=1, activation="relu"),
            nn.Identity(),
            Conv2d(384, 256, 3, padding=1, activation="relu"),
            nn.Identity(),
            Conv2d(256, 256, 3, padding=1, activation="relu"),
            nn.Identity(),
            nn.MaxPool2d(3, stride=2),
        )
        super().__init__(features, 6, _classifier(256 * 6 * 6, num_classes, dropout, True), in_channels)


class ZFNet(_PooledClassifier):
    """ZFNet: AlexNet with a finer first layer. Zeiler and Fergus, https://arxiv.org/abs/1311.2901.

    The paper's contrast normalisation after the first two poolings is AlexNet's local response normalisation.

    Args:
        num_classes: outputs. dropout: before the first two linear layers. in_channels: channels of the image.
    Shape:
        (B, in_channels, H, W), 224x224 in the paper, at least 31x31, to logits (B, num_classes).
    Raises:
        ValueError: an input of another shape.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5, in_channels: int = 3) -> None:
        features = nn.Sequential(
            Conv2d(in_channels, 96, 7, stride=2, padding=1, activation="relu"),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.LocalResponseNorm(5),
            Conv2d(96, 256, 5, stride=2, activation="relu"),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.LocalResponseNorm(5),
            Conv2d(256, 384, 3, padding=1, activation="relu"),
            Conv2d(384, 384, 3, padding=1, activation="relu"),
            Conv2d(384, 256, 3, padding=1, activation="relu"),
            nn.MaxPool2d(3, stride=2),
        )
        super().__init__(features, 6, _classifier(256 * 6 * 6, num_classes, dropout, True), in_channels)


VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


class VGG(_PooledClassifier):
    """A VGG network: 3x3 convolutions only. Simonyan and Zisserman, https://arxiv.org/abs/1409.1556.

    Three of them see 7x7 pixels like one 7x7 convolution, with 27 C^2 weights instead of 49 C^2.

    Args:
        cfg: a number of channels per convolution, "M" for max pooling by 2.
        num_classes: outputs. batch_norm: batch normalisation after each convolution. dropout: of the classifier.
        in_channels: channels of the image.
    Shape:
        (B, in_channels, H, W), H and W at least 2 ** (number of "M"), to logits (B, num_classes).
    Raises:
        ValueError: cfg without convolution or with another entry, an input of another shape.
    """

    def __init__(
        self,
        cfg: Sequence[int | str] = VGG16,
        num_classes: int = 1000,
        batch_norm: bool = False,
        dropout: float = 0.5,
        in_channels: int = 3,
    ) -> None:
        layers: list[nn.Module] = []
        channels = in_channels
        for entry in cfg:
            if entry == "M":
                layers.append(nn.MaxPool2d(2))
            elif not isinstance(entry, int) or entry < 1:
                raise ValueError(f'VGG: expected cfg to hold numbers of channels and "M", got {entry!r}')
            elif batch_norm:
                layers += [Conv2d(channels, entry, 3, padding=1), nn.BatchNorm2d(entry), nn.ReLU(inplace=True)]
                channels = entry
            else:
                layers += [Conv2d(channels, entry, 3, padding=1, activation="relu"), nn.Identity()]
                channels = entry
        if not any(isinstance(layer, Conv2d) for layer in layers):
            raise ValueError(f"VGG: expected cfg with at least one convolution, got {tuple(cfg)}")
        classifier = _classifier(channels * 7 * 7, num_classes, dropout, False)
        super().__init__(nn.Sequential(*layers), 7, classifier, in_channels)


def vgg16(num_classes: int = 1000, **options) -> VGG:
    """VGG-16; options are VGG's."""
    return VGG(VGG16, num_classes, **options)


class _ConvNorm(nn.Module):
    """relu(norm(conv(x))), GoogLeNet's building block."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Inception(nn.Module):
    """Four branches on the same input, side by side in the output's channels.

    The third branch is 5x5 in the paper; torchvision's weights have 3x3 there, and so has this.
    """

    def __init__(
        self, in_channels: int, one: int, reduce3: int, three: int, reduce5: int, five: int, pool: int
    ) -> None:
        super().__init__()
        self.branch1 = _ConvNorm(in_channels, one, 1)
        self.branch2 = nn.Sequential(_ConvNorm(in_channels, reduce3, 1), _ConvNorm(reduce3, three, 3))
        self.branch3 = nn.Sequential(_ConvNorm(in_channels, reduce5, 1), _ConvNorm(reduce5, five, 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _ConvNorm(in_channels, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1)


class _InceptionAux(nn.Module):
    """A classifier on a feature map halfway up, for its gradient."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv = _ConvNorm(in_channels, 128, 1)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.adaptive_avg_pool2d(x, 4)).flatten(1)
        return self.fc2(self.dropout(F.relu(self.fc1(x))))


class GoogLeNetOutputs(NamedTuple):
    """What GoogLeNet returns in training: the logits, and those of the classifiers after 4d and after 4a."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class GoogLeNet(nn.Module):
    """GoogLeNet (Inception v1) with batch normalisation. Szegedy et al., https://arxiv.org/abs/1409.4842.

    Args:
        num_classes: outputs. aux_logits: two auxiliary classifiers, used in training only.
        dropout, dropout_aux: before the last layer of the classifier and of the auxiliary ones.
        in_channels: channels of the image.
    Shape:
        (B, in_channels, H, W), H and W at least 15, to logits (B, num_classes); GoogLeNetOutputs of three of them in
        training with aux_logits.
    Raises:
        ValueError: an input of another shape.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        dropout: float = 0.2,
        dropout_aux: float = 0.7,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.conv1 = _ConvNorm(in_channels, 64, 7, stride=2)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = _ConvNorm(64, 64, 1)
        self.conv3 = _ConvNorm(64, 192, 3)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a = _Inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = _Inception(256, 128, 128, 192, 32, 96, 64)
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception4a = _Inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = _Inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = _Inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = _Inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = _Inception(528, 256, 160, 320, 32, 128, 128)
        self.maxpool4 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.inception5a = _Inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = _Inception(832, 384, 192, 384, 48, 128, 128)
        self.aux1 = _InceptionAux(512, num_classes, dropout_aux) if aux_logits else None
        self.aux2 = _InceptionAux(528, num_classes, dropout_aux) if aux_logits else None
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1024, num_classes)
        for module in self.modules():  # torchvision's initialisation
            if isinstance(module, (Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        check_images("GoogLeNet", x, self.in_channels)
        x = self.maxpool2(self.conv3(self.conv2(self.maxpool1(self.conv1(x)))))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        after_4a = self.inception4a(x)
        after_4d = self.inception4d(self.inception4c(self.inception4b(after_4a)))
        x = self.maxpool4(self.inception4e(after_4d))
        x = F.adaptive_avg_pool2d(self.inception5b(self.inception5a(x)), 1).flatten(1)
        logits = self.fc(self.dropout(x))
        if not self.training or self.aux1 is None or self.aux2 is None:
            return logits
        return GoogLeNetOutputs(logits, self.aux2(after_4d), self.aux1(after_4a))


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """The convolution on the identity's path, where shapes differ."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """relu(x + norm(conv3x3(relu(norm(conv3x3(x)))))), the block of ResNet-18 and 34.

    Args:
        in_channels: of the input. channels: of both convolutions. stride: of the first convolution.
    Shape:
        (B, in_channels, H, W) to (B, channels * expansion, ceil(H / stride), ceil(W / stride)).
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _downsample(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """relu(x + norm(conv1x1(...conv3x3(...conv1x1(x))))), the block of ResNet-50 and deeper.

    The stride is in the 3x3 convolution, as in torchvision (ResNet v1.5); the paper has it in the first 1x1.

    Args:
        in_channels: of the input. channels: of the 3x3 convolution; the output has four times as many.
        stride: of the 3x3 convolution.
    Shape:
        (B, in_channels, H, W) to (B, channels * expansion, ceil(H / stride), ceil(W / stride)).
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.downsample = _downsample(in_channels, channels * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A residual network. He et al., https://arxiv.org/abs/1512.03385.

    Args:
        block: BasicBlock or Bottleneck.
        layers: blocks of each stage; from the second on, a stage halves the resolution and doubles the channels.
        num_classes: outputs. in_channels: channels of the image. width: channels of the first stage.
        stem: "imagenet", a 7x7 convolution with stride 2 and max pooling, or "small", a 3x3 convolution.
    Shape:
        (B, in_channels, H, W) to logits (B, num_classes).
    Raises:
        ValueError: no stage or an empty one, an unknown stem, an input of another shape.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
        stem: str = "imagenet",
    ) -> None:
        super().__init__()
        if not layers or min(layers) < 1:
            raise ValueError(f"ResNet: expected layers to hold at least one block per stage, got {tuple(layers)}")
        if stem not in ("imagenet", "small"):
            raise ValueError(f'ResNet: expected stem to be "imagenet" or "small", got {stem!r}')
        self.in_channels = in_channels
        if stem == "imagenet":
            self.conv1 = Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        self.stages = len(layers)
        channels = width
        for i, blocks in enumerate(layers):
            stage = nn.Sequential()
            for j in range(blocks):
                stage.append(block(channels, width * 2**i, stride=2 if i > 0 and j == 0 else 1))
                channels = width * 2**i * block.expansion
            self.add_module(f"layer{i + 1}", stage)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():  # torchvision's initialisation
            if isinstance(module, Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        check_images("ResNet", x, self.in_channels)
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for i in range(self.stages):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet18(num_classes: int = 1000, **options) -> ResNet:
    """ResNet-18; options are ResNet's."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, **options)


def resnet50(num_classes: int = 1000, **options) -> ResNet:
    """ResNet-50; options are ResNet's."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, **options)
