"""Recipes of the contrastive models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynn.models.clip import CLIP, TextTower
from pynn.models.transformer import ViT

from .. import data
from ..extras import require
from ..fit import Batch, Settings
from ._recipe import Recipe, device_of

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEMPLATES = ("a photo of the digit {}", "this is a {}", "someone wrote {} here", "the number {}", "{}")
_UNSEEN = "an image of {}"
_LENGTH = 32


def tokens_of(text: str) -> list[int]:
    """Letters as 1 .. 26, a space as 27, the end as 28, then zeros: (32) ids."""
    ids = [27 if letter == " " else ord(letter) - ord("a") + 1 for letter in text] + [28]
    return ids + [0] * (_LENGTH - len(ids))


class DigitClip(Recipe):
    """Digits and sentences about them; judged by sentences of a form that was never trained on (zero-shot)."""

    name = "clip"
    summary = "CLIP matches scikit-learn's digits and sentences, judged with an unseen sentence"
    settings = Settings(steps=400, batch_size=60, learning_rate=2e-3, optimizer="adamw", warmup=20, clip_norm=1.0)
    metric, gate = "zero_shot", 0.95
    templates = torch.tensor([[tokens_of(form.format(name)) for name in _NAMES] for form in _TEMPLATES])  # (5, 10, 32)

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.images = data.load("digits")
        self.of_class = [(self.images.train_labels == label).nonzero()[:, 0] for label in range(data.NUM_CLASSES)]

    def model(self) -> nn.Module:
        image = ViT(8, 2, 1, num_classes=None, width=64, layers=3, heads=4, pre_norm=True)
        text = TextTower(29, _LENGTH, width=64, layers=2, heads=4)
        return CLIP(image, text, width=64)

    def batch(self, step: int) -> Batch:
        """Groups of one image of each class, with a sentence about it."""
        generator = self.generator(step)
        groups = self.settings.batch_size // data.NUM_CLASSES
        draws = torch.rand(groups, data.NUM_CLASSES, generator=generator)
        index = [
            own[(draws[:, label] * len(own)).long()] for label, own in enumerate(self.of_class)
        ]  # of each class (groups)
        forms = torch.randint(len(_TEMPLATES), (groups, data.NUM_CLASSES), generator=generator)
        texts = self.templates[forms, torch.arange(data.NUM_CLASSES)]  # (groups, 10, 32)
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
