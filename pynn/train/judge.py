"""An independent judge of generated digits: a small CNN trained on the real ones.

It is plain torch.nn on purpose, so that an error in pynn's kernels cannot flatter the model it judges.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .data import NUM_CLASSES, Images, batches

_SEED = 0
_FEATURES = 64


class Judge(nn.Module):
    """A CNN with a look at its last hidden layer, whose activations are the space distances are measured in.

    Args:
        shape: (channels, height, width) of an image.
    """

    scale: torch.Tensor

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        channels, height, width = shape
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.hidden = nn.Sequential(nn.Linear(64 * (height // 4) * (width // 4), _FEATURES), nn.ReLU())
        self.classes = nn.Sequential(nn.Dropout(0.5), nn.Linear(_FEATURES, NUM_CLASSES))
        self.register_buffer("scale", torch.ones(()))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Scaled hidden activations (N, 64) of images (N, C, H, W)."""
        return self.hidden(self.convolutions(images)) * self.scale

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classes(self.hidden(self.convolutions(images)))


def train_judge(images: Images, *, steps: int = 600, batch_size: int = 64) -> Judge:
    """Trains the judge on the training part; the same judge every time, whatever the random state of the caller.

    Its features are scaled to a mean variance of 1 over the training part, so that distances do not depend on the
    scale the training happened to arrive at.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        judge = Judge(tuple(images.train.shape[1:]))
        optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _, index in zip(range(steps), batches(len(images.train), batch_size, seed=_SEED), strict=False):
            loss = F.cross_entropy(judge(images.train[index]), images.train_labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    judge.eval()
    with torch.no_grad():
        judge.scale /= judge.features(images.train).var(0).mean().sqrt()
    return judge


@torch.inference_mode()
def accuracy(judge: Judge, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images (N, C, H, W) the judge gives their label (N,)."""
    return (judge(images).argmax(1) == labels).double().mean().item()


@torch.inference_mode()
def frechet_distance(judge: Judge, images: torch.Tensor, reference: torch.Tensor) -> float:
    """Frechet distance between two sets of images in the judge's features, in float64.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), means and covariances of the features
    (Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500, with Inception as the judge).

    Args:
        judge: a trained judge.
        images: (N, C, H, W).
        reference: (M, C, H, W).
    """
    first, second = (judge.features(part).double() for part in (images, reference))
    first_covariance, second_covariance = first.T.cov(), second.T.cov()
    values, vectors = torch.linalg.eigh(first_covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second_covariance @ root).clamp(min=0).sqrt().sum()
    shift = (first.mean(0) - second.mean(0)).square().sum()
    return (shift + first_covariance.trace() + second_covariance.trace() - 2 * cross).item()
