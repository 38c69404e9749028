"""Recipes of the recurrent models."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynn.models.rnn import CharLM, SequenceClassifier, SequenceTagger

from .. import data
from ..extras import require
from ..fit import Batch, Settings
from ._recipe import Recipe, accuracy, device_of


class LanguageModel(Recipe):
    """Bits per character of Python's help topics; their unigrams take 4.67, bigrams 3.35, bz2 1.68."""

    settings = Settings(steps=600, batch_size=32, learning_rate=4e-3, warmup=20, clip_norm=1.0)
    length = test_length = 128  # characters of a sample
    metric, gate, goal = "bits_per_character", 2.05, "<="

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.text = data.load_text()

    def logits(self, model, ids: Tensor) -> Tensor:
        """(B, T, V) of the character after each of ids (B, T)."""
        return model(ids)[0]

    def batch(self, step: int) -> Batch:
        return (self.text.windows(self.settings.batch_size, self.length + 1, self.generator(step)),)

    def loss(self, model, ids: Tensor) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(self.logits(model, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self, model) -> dict[str, float]:
        """On all of the test part, cut in pieces that know nothing of each other."""
        text, length = self.text.test, self.test_length
        count = (len(text) - 1) // length
        x, y = (text[i : i + count * length].view(count, length).to(device_of(model)) for i in (0, 1))
        metric = require("torchmetrics").MeanMetric().to(x.device)
        for part, target in zip(x.split(64), y.split(64), strict=True):
            nats = F.cross_entropy(self.logits(model, part).flatten(0, 1), target.flatten())
            metric.update(nats / math.log(2), weight=target.numel())
        return {"bits_per_character": metric.compute().item()}


class CharGru(LanguageModel):
    name = "char_gru"
    summary = "GRU language model on Python's help topics"
    cell = "gru"
    test_length = 1024  # the state goes on beyond the length of training

    def model(self) -> nn.Module:
        return CharLM(len(self.text.characters), 256, self.cell)


class CharLstm(CharGru):
    name = "char_lstm"
    summary = "LSTM language model on Python's help topics"
    cell = "lstm"


class Tagger(Recipe):
    name = "tagger"
    summary = "kind of token of every character of Python code, LSTM in both directions"
    settings = Settings(steps=450, batch_size=32, learning_rate=5e-3, warmup=20, clip_norm=1.0)
    metric, gate = "accuracy", 0.94
    better_than: ClassVar[str | None] = "tagger_forward"
    bidirectional = True
    length = 128

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.sources = data.load_sources()

    def model(self) -> nn.Module:
        hidden = 64 if self.bidirectional else 128  # about as many parameters
        return SequenceTagger(self.sources.vocab, hidden, len(data.KINDS), "lstm", self.bidirectional, embedding=32)

    def batch(self, step: int) -> Batch:
        sources = self.sources
        starts = torch.randint(
            len(sources.train) - self.length, (self.settings.batch_size, 1), generator=self.generator(step)
        )
        positions = starts + torch.arange(self.length)
        return sources.train[positions], sources.train_kinds[positions]

    def loss(self, model, ids: Tensor, kinds: Tensor) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(model(ids).flatten(0, 1), kinds.flatten())

    def evaluate(self, model) -> dict[str, float]:
        count = len(self.sources.test) // self.length
        ids, kinds = (
            t[: count * self.length].view(count, self.length) for t in (self.sources.test, self.sources.test_kinds)
        )
        return {"accuracy": accuracy(model, ids, labels=kinds, batch_size=64)}


class TaggerForward(Tagger):
    name = "tagger_forward"
    summary = "the same in one direction, which cannot see how a token ends"
    gate = 0.85
    better_than = None
    bidirectional = False


class RowLstm(Recipe):
    name = "row_lstm"
    summary = "LSTM reads MNIST row by row, one class for the sequence"
    settings = Settings(steps=630, batch_size=64, learning_rate=4e-3, clip_norm=1.0)
    metric, gate = "accuracy", 0.93

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.images = data.load("mnist")

    def model(self) -> nn.Module:
        return SequenceClassifier(28, 64, 10, "lstm")

    def batch(self, step: int) -> Batch:
        index = self.indices(len(self.images.train), step)
        return self.images.train[index].squeeze(1), self.images.train_labels[index]

    def loss(self, model, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(model(x), y)

    def evaluate(self, model) -> dict[str, float]:
        return {"accuracy": accuracy(model, self.images.test.squeeze(1), labels=self.images.test_labels)}


RECIPES: tuple[type[Recipe], ...] = (CharGru, CharLstm, Tagger, TaggerForward, RowLstm)
