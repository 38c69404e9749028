"""Recipes of the transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynn.models._transformer import normal_init
from pynn.models.transformer import GPT, T5, Bert, ViT

from .. import data
from ..fit import Batch, Settings
from ._recipe import Recipe, accuracy
from .cnn import ImageClassifier
from .rnn import LanguageModel


class CharGpt(LanguageModel):
    name = "gpt"
    summary = "GPT of three blocks on Python's help topics"
    settings = Settings(
        steps=600, batch_size=32, learning_rate=3e-3, optimizer="adamw", weight_decay=0.01, warmup=50, clip_norm=1.0
    )
    gate = 2.2

    def model(self) -> nn.Module:
        return GPT(len(self.text.characters), self.length, width=128, layers=3, heads=4)

    def logits(self, model, ids: Tensor) -> Tensor:
        return model(ids)


class MaskedBert(Recipe):
    """Characters of Python's help topics, 15 % of them hidden as in BERT: 80 % masked, 10 % replaced, 10 % kept."""

    name = "bert"
    summary = "BERT names hidden characters of Python's help topics"
    settings = Settings(
        steps=900, batch_size=32, learning_rate=2e-3, optimizer="adamw", weight_decay=0.01, warmup=50, clip_norm=1.0
    )
    metric, gate = "masked_accuracy", 0.35
    length = 128

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.text = data.load_text()
        self.mask = len(self.text.characters)  # the token after the characters

    def model(self) -> nn.Module:
        bert = Bert(self.mask + 1, self.length, width=128, layers=3, heads=4, segments=0, pooler=False, sentence=False,
                    dropout=0.0)  # fmt: skip
        normal_init(bert, bert.token_embedding.embedding_dim**-0.5)  # BERT's 0.02 suits 768 features: slow with 128
        return bert

    def hide(self, ids: Tensor, generator: torch.Generator) -> Batch:
        """(ids with some hidden, the hidden ones and -100 elsewhere)."""
        chosen = torch.rand(ids.shape, generator=generator) < 0.15
        kind = torch.rand(ids.shape, generator=generator)
        other = torch.randint(self.mask, ids.shape, generator=generator)
        hidden = torch.where(kind < 0.8, self.mask, torch.where(kind < 0.9, other, ids))
        return torch.where(chosen, hidden, ids), ids.masked_fill(~chosen, -100)

    def batch(self, step: int) -> Batch:
        generator = self.generator(step)
        return self.hide(self.text.windows(self.settings.batch_size, self.length, generator), generator)

    def loss(self, model, ids: Tensor, hidden: Tensor) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(model(ids).token_logits.flatten(0, 1), hidden.flatten())

    def evaluate(self, model) -> dict[str, float]:
        """Beside the accuracy, that of always naming the most frequent character."""
        count = len(self.text.test) // self.length
        whole = self.text.test[: count * self.length].view(count, self.length)
        ids, hidden = self.hide(whole, torch.Generator().manual_seed(0))
        most = self.text.train.bincount().argmax()
        value = accuracy(_TokenLogits(model), ids, labels=hidden, batch_size=64)
        return {"masked_accuracy": value, "majority": (hidden[hidden != -100] == most).double().mean().item()}


class _TokenLogits(nn.Module):
    """Bert's logits of tokens alone."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(ids).token_logits


class SpanT5(Recipe):
    """Five spans of three characters are cut out of each window, and the decoder has to put them back.

    As in T5 the encoder sees a sentinel in the place of each span; the decoder writes sentinel, span, sentinel, span,
    ... and a last sentinel.
    """

    name = "t5"
    summary = "T5 restores spans cut out of Python's help topics"
    settings = Settings(steps=1200, batch_size=32, learning_rate=2e-3, optimizer="adamw", warmup=50, clip_norm=1.0)
    metric, gate = "span_accuracy", 0.37
    length, spans, span = 96, 5, 3

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.text = data.load_text()
        self.sentinel = len(self.text.characters)  # the first of spans + 1; the start token comes after them
        self.start = self.sentinel + self.spans + 1

    def model(self) -> nn.Module:
        return T5(self.start + 1, width=96, layers=2, heads=4, dropout=0.0)

    def cut(self, ids: Tensor, generator: torch.Generator) -> Batch:
        """(what the encoder sees (B, 86), what the decoder has to write (B, 21)) of windows ids (B, 96)."""
        count = len(ids)
        places = self.length - self.spans * self.span  # characters left; a span before some of them, at most one each
        chosen = torch.rand(count, places, generator=generator).argsort(1)[:, : self.spans].sort(1).values
        starts = chosen + self.span * torch.arange(self.spans)  # (B, spans), in the window
        positions = starts[:, :, None] + torch.arange(self.span)  # (B, spans, span)
        sentinels = (self.sentinel + torch.arange(self.spans)).expand(count, -1)
        written = torch.cat((sentinels[:, :, None], ids.gather(1, positions.flatten(1)).view_as(positions)), 2)
        target = torch.cat((written.flatten(1), ids.new_full((count, 1), self.sentinel + self.spans)), 1)
        source = ids.scatter(1, starts, sentinels)
        keep = torch.ones_like(ids, dtype=torch.bool).scatter_(1, positions[:, :, 1:].flatten(1), False)
        return source[keep].view(count, -1), target

    def batch(self, step: int) -> Batch:
        generator = self.generator(step)
        return self.cut(self.text.windows(self.settings.batch_size, self.length, generator), generator)

    def shifted(self, target: Tensor) -> Tensor:
        """What the decoder has written before each token."""
        return F.pad(target[:, :-1], (1, 0), value=self.start)

    def loss(self, model, source: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(model(source, self.shifted(target)).flatten(0, 1), target.flatten())

    def evaluate(self, model) -> dict[str, float]:
        """Characters of the spans right, each with the true ones before it given."""
        count = len(self.text.test) // self.length
        whole = self.text.test[: count * self.length].view(count, self.length)
        source, target = self.cut(whole, torch.Generator().manual_seed(0))
        labels = target.masked_fill(target >= self.sentinel, -100)
        most = self.text.train.bincount().argmax()
        value = accuracy(model, source, self.shifted(target), labels=labels, batch_size=64)
        return {"span_accuracy": value, "majority": (labels[labels != -100] == most).double().mean().item()}


class VisionTransformer(ImageClassifier):
    name = "vit"
    summary = "ViT of 7 x 7 patches on MNIST"
    settings = Settings(steps=930, batch_size=64, learning_rate=2e-3, optimizer="adamw", weight_decay=0.01, warmup=50,
                        clip_norm=1.0)  # fmt: skip
    gate = 0.90

    def model(self) -> nn.Module:
        return ViT(28, 7, 1, num_classes=10, width=64, layers=4, heads=4)


RECIPES: tuple[type[Recipe], ...] = (CharGpt, MaskedBert, SpanT5, VisionTransformer)
