"""Recipes of the contrastive models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynn.models.clip import CLIP, TextTower
from pynn.nn import Conv2d

from .. import data
from ..extras import require
from ..fit import Batch, Settings
from ._recipe import Recipe, device_of

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEMPLATES = ("a photo of the digit {}", "this is a {}", "someone wrote {} here", "the number {}", "{}")
_UNSEEN = "someone wrote the digit {}"  # known words, as no template has them
_WORDS = sorted({word for form in _TEMPLATES for word in form.replace("{}", "").split()} | set(_NAMES))
_END = len(_WORDS) + 1  # 0 is padding, words count from 1
_LENGTH = 8


def tokens_of(text: str) -> list[int]:
    """The numbers of the words, the end, then zeros: (8) ids."""
    ids = [_WORDS.index(word) + 1 for word in text.split()] + [_END]
    return ids + [0] * (_LENGTH - len(ids))


class DigitClip(Recipe):
    """Digits and sentences about them; judged by sentences of a form that was never trained on (zero-shot)."""

    name = "clip"
    summary = "CLIP matches scikit-learn's digits and sentences, judged with an unseen sentence"
    settings = Settings(steps=400, batch_size=60, learning_rate=2e-3, optimizer="adamw", warmup=20, clip_norm=1.0)
    metric, gate = "zero_shot", 0.95
    templates = torch.tensor([[tokens_of(form.format(name)) for name in _NAMES] for form in _TEMPLATES])  # (5, 10, 8)

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.images = data.load("digits")
        self.of_class = [(self.images.train_labels == label).nonzero()[:, 0] for label in range(data.NUM_CLASSES)]

    def model(self) -> nn.Module:
        # 1,437 images of 8 x 8 are too few for a ViT (0.90 on sentences it was trained on).
        image = nn.Sequential(
            Conv2d(1, 32, 3, padding=1, activation="relu"),
            Conv2d(32, 64, 3, stride=2, padding=1, activation="relu"),
            nn.Flatten(),
            nn.Dropout(0.25),
        )
        text = TextTower(_END + 1, _LENGTH, width=64, layers=2, heads=4)
        return CLIP(image, text, width=64, image_width=64 * 4 * 4)

    def batch(self, step: int) -> Batch:
        """Groups of one image of each class, with a sentence about it."""
        generator = self.generator(step)
        groups = self.settings.batch_size // data.NUM_CLASSES
        draws = torch.rand(groups, data.NUM_CLASSES, generator=generator)
        index = [
            own[(draws[:, label] * len(own)).long()] for label, own in enumerate(self.of_class)
        ]  # of each class (groups)
        forms = torch.randint(len(_TEMPLATES), (groups, data.NUM_CLASSES), generator=generator)
        texts = self.templates[forms, torch.arange(data.NUM_CLASSES)]  # (groups, 10, 8)
        return self.images.train[torch.stack(index, 1).flatten()], texts.flatten(0, 1)

    def loss(self, model, x: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        """CLIP's loss within each group, where every image has one sentence that is right."""
        groups = len(x) // data.NUM_CLASSES
        logits = model(x, ids).logits.view(groups, data.NUM_CLASSES, groups, data.NUM_CLASSES)
        logits = logits.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (groups, images, sentences)
        target = torch.arange(data.NUM_CLASSES, device=x.device).expand(groups, -1)
        return (F.cross_entropy(logits.mT, target) + F.cross_entropy(logits, target)) / 2

    @torch.no_grad()
    def evaluate(self, model) -> dict[str, float]:
        metric = require("torchmetrics").MeanMetric().to(device_of(model))
        ids = torch.tensor([tokens_of(_UNSEEN.format(name)) for name in _NAMES], device=device_of(model))
        found = model(self.images.test.to(ids.device), ids).logits.argmax(1)
        metric.update((found == self.images.test_labels.to(ids.device)).float())
        return {"zero_shot": metric.compute().item()}


RECIPES: tuple[type[Recipe], ...] = (DigitClip,)
