"""Time of a training step against the same network built from torch.nn, part by part.

The opponents start from the same weights, see the same batches and run in one process, in turn, in a rotating order,
so that a slow moment of the machine hits all of them; medians are reported. PyTorch is counted at the better of its two
memory formats. Its loss is the usual eager code: gather two coefficients, draw noise, blend, mean squared error.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import data, ddpm
from .extras import progress_bar

_TORCH_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PARTS = ("forward", "loss", "backward", "optimizer")


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Medians in seconds; `step` is the median of whole steps, so the parts need not add up to it exactly."""

    step: float
    parts: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """pynn against torch.nn; `torch_format` is the memory format torch was faster in."""

    pynn: StepTimes
    torch: StepTimes
    torch_format: str
    rounds: int

    @property
    def ratio(self) -> float:
        """pynn / torch; below 1 pynn is faster."""
        return self.pynn.step / self.torch.step

    @property
    def slower_parts(self) -> list[str]:
        """The parts in which torch.nn is faster."""
        return [part for part in PARTS if self.pynn.parts[part] > self.torch.parts[part]]


class TorchLoss:
    """The loss of `GaussianDiffusion.loss`, written with PyTorch's own ops."""

    def __init__(self, config: ddpm.Config, device: torch.device):
        schedule = ddpm.build_diffusion(config).schedule
        self.signal = schedule.alphas_cumprod.sqrt().float().to(device)
        self.noise = schedule.noise_power.sqrt().float().to(device)
        self.prediction_type = config.prediction_type

    def __call__(self, model, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        t = torch.randint(len(self.signal), (len(x),), device=x.device)
        noise = torch.randn_like(x)
        a, b = self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)
        if self.prediction_type == "epsilon":
            target = noise
        elif self.prediction_type == "v":
            target = a * noise - b * x
        else:
            target = x
        return F.mse_loss(model(a * x + b * noise, t, labels), target)


class Opponent:
    """One network with its optimizer and its moving average.

    Args:
        model: the network.
        loss: called with (model, images, labels).
        config: the run.
    """

    def __init__(self, model: torch.nn.Module, loss: Callable[..., torch.Tensor], config: ddpm.Config):
        self.model, self.loss = model, loss
        self.optimizer = ddpm.build_optimizer(model, config)
        self.average = ddpm.build_average(model, config)
        self.rows: list[list[float]] = []  # seconds of PARTS

    def step(self, x: torch.Tensor, labels: torch.Tensor, record: bool) -> None:
        """One training step."""
        inside = [0.0]

        def model(*args, **kwargs):
            start = _now(x)
            output = self.model(*args, **kwargs)
            inside[0] += _now(x) - start
            return output

        start = _now(x)
        loss = self.loss(model, x, labels)
        end_of_loss = _now(x)
        loss.backward()
        end_of_backward = _now(x)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.model)
        end = _now(x)
        if record:
            around = end_of_loss - start - inside[0]
            self.rows.append([inside[0], around, end_of_backward - end_of_loss, end - end_of_backward])

    def times(self) -> StepTimes:
        """Medians over the recorded steps."""
        parts = {part: statistics.median(row[i] for row in self.rows) for i, part in enumerate(PARTS)}
        return StepTimes(statistics.median(sum(row) for row in self.rows), parts)


def compare_step(
    config: ddpm.Config, device: torch.device | str = "cpu", *, rounds: int = 40, progress: bool = False
) -> Comparison:
    """Times training steps of the network of a run against the same network built from torch.nn.

    Args:
        config: the run.
        device: where to run.
        rounds: timed steps of each opponent, after three to warm up.
        progress: show a progress bar.
    """
    from pynn.models.unet import TORCH_LAYERS

    device = torch.device(device)
    images = data.load(config.data)
    diffusion, generator = ddpm.build_diffusion(config), torch.Generator().manual_seed(config.seed)
    model = ddpm.build_model(config)
    opponents = {
        "pynn": Opponent(
            model.to(device), lambda net, x, y: diffusion.loss(net, x, generator=generator, class_labels=y), config
        )
    }
    for name, memory_format in _TORCH_FORMATS.items():
        twin: Any = ddpm.build_model(config, TORCH_LAYERS)
        twin.load_state_dict(model.state_dict())
        twin.memory_format = memory_format  # of the activations
        twin.to(device, memory_format=memory_format)
        opponents[name] = Opponent(twin, TorchLoss(config, device), config)
    order = list(opponents)
    batches = data.batches(len(images.train), config.batch_size, seed=config.seed)
    bar = progress_bar(range(rounds + 3), desc="time", unit="round", enabled=progress)
    for number, index in zip(bar, batches, strict=False):
        x, labels = images.train[index].to(device), images.train_labels[index].to(device)
        for name in order:
            opponents[name].step(x, labels, record=number >= 3)
        order.append(order.pop(0))
    results = {name: opponent.times() for name, opponent in opponents.items()}
    best = min(_TORCH_FORMATS, key=lambda name: results[name].step)
    return Comparison(results["pynn"], results[best], best, rounds)


def _now(x: torch.Tensor) -> float:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
