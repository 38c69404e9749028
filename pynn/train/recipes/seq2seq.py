"""Recipes of encoder and decoder, and of one to many."""

from __future__ import annotations

import re
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynn.models.rnn import Captioner, Seq2Seq

from .. import data
from ..extras import require
from ..fit import Batch, Settings
from ._recipe import Recipe, device_of

_START, _END, _FIRST = 0, 1, 2  # token ids; letters from _FIRST
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _spell(word: str) -> list[int]:
    return [ord(letter) - ord("a") + _FIRST for letter in word]


def _padded(rows: list[list[int]]) -> Tensor:
    """Rows as one tensor; after the end of a row comes _END."""
    longest = max(map(len, rows))
    return torch.tensor([row + [_END] * (longest - len(row)) for row in rows])


class Reverse(Recipe):
    """Words of Python's help topics, the letters to be given in reverse; tested on words never seen."""

    name = "seq2seq"
    summary = "GRU encoder and decoder with additive attention reverse unseen words"
    settings = Settings(steps=900, batch_size=64, learning_rate=4e-3, warmup=20, clip_norm=1.0)
    metric, gate = "words", 0.97
    better_than: ClassVar[str | None] = "seq2seq_plain"
    attention: str | None = "additive"

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        text = data.load_text()
        letters = "".join(text.characters[i] for i in torch.cat((text.train, text.test)).tolist()).lower()
        words = sorted({word for word in re.findall("[a-z]+", letters) if 3 <= len(word) <= 12})
        order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
        cut = len(words) * 9 // 10
        self.train, self.test = ([words[i] for i in part] for part in (order[:cut], order[cut:]))

    def model(self) -> nn.Module:
        return Seq2Seq(_FIRST + 26, _FIRST + 26, 128, self.attention, start=_START)

    def tensors(self, words: list[str]) -> Batch:
        """(source, target, lengths): letters forwards, letters backwards and _END, lengths of the source."""
        source = _padded([_spell(word) for word in words])
        return source, _padded([[*_spell(word[::-1]), _END] for word in words]), torch.tensor([*map(len, words)])

    def batch(self, step: int) -> Batch:
        return self.tensors([self.train[i] for i in self.indices(len(self.train), step).tolist()])

    def loss(self, model, source: Tensor, target: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        logits, _ = model(source, target, src_lengths=lengths)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    @torch.no_grad()
    def evaluate(self, model) -> dict[str, float]:
        """Share of words and letters right when the model has only its own letters to go on from."""
        source, target, lengths = (t.to(device_of(model)) for t in self.tensors(self.test))
        words, letters = (require("torchmetrics").MeanMetric().to(source.device) for _ in range(2))
        logits, _ = model(source, max_len=target.shape[1], src_lengths=lengths)
        right = logits.argmax(-1) == target
        wanted = torch.arange(target.shape[1], device=source.device) <= lengths[:, None]  # letters and the end
        words.update((right | ~wanted).all(1).float())
        letters.update(right[wanted].float())
        return {"words": words.compute().item(), "letters": letters.compute().item()}


class ReversePlain(Reverse):
    name = "seq2seq_plain"
    summary = "the same without attention, a whole word through one state"
    gate = 0.0
    better_than = None
    attention = None


class Caption(Recipe):
    """Images of digits are told in letters: one vector to many tokens."""

    name = "captioner"
    summary = "GRU spells the names of scikit-learn's digits from their pixels"
    settings = Settings(steps=440, batch_size=64, learning_rate=4e-3, clip_norm=1.0)
    metric, gate = "names", 0.90

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.images = data.load("digits")
        self.names = _padded([[_START, *_spell(name), _END] for name in _NAMES])  # (10, letters)

    def model(self) -> nn.Module:
        return Captioner(64, _FIRST + 26, 96)

    def batch(self, step: int) -> Batch:
        index = self.indices(len(self.images.train), step)
        return self.images.train[index].flatten(1), self.names[self.images.train_labels[index]]

    def loss(self, model, x: Tensor, names: Tensor) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(model(x, names[:, :-1]).flatten(0, 1), names[:, 1:].flatten())

    def evaluate(self, model) -> dict[str, float]:
        wanted = self.names[self.images.test_labels, 1:]
        x = self.images.test.flatten(1).to(device_of(model))
        told = model.generate(x, _START, _END, wanted.shape[1]).cpu()
        told = F.pad(told, (0, wanted.shape[1] - told.shape[1]), value=_END)
        metric = require("torchmetrics").MeanMetric()
        metric.update((told == wanted).all(1).float())
        return {"names": metric.compute().item()}


RECIPES: tuple[type[Recipe], ...] = (Reverse, ReversePlain, Caption)
