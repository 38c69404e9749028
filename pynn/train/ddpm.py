"""A class-conditional DDPM (Ho et al. 2020, arXiv 2006.11239) on small real images: `pynn train ddpm`.

The loop is pytorch-ignite's Engine. With the same number of threads a resumed run continues bit for bit: the checkpoint
holds the model, its moving average, the optimizer and the random states; the order of the data follows from (seed,
epoch).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, data
from .extras import progress_bar, require
from .threads import ThreadTuner

RECIPE = "ddpm"
SCHEDULES = ("cosine", "linear")
PREDICTION_TYPES = ("epsilon", "v", "sample")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides the result of a run. `out`, device and threads are not here."""

    data: str = "digits"
    steps: int = 3000
    batch_size: int = 64
    seed: int = 0
    timesteps: int = 200
    schedule: str = "cosine"
    prediction_type: str = "v"
    channels: int = 24
    channel_multipliers: tuple[int, ...] = (1, 2)
    attention_levels: tuple[int, ...] = (1,)
    learning_rate: float = 2e-3
    ema_decay: float = 0.995
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        choices_of = {"data": data.SHAPES, "schedule": SCHEDULES, "prediction_type": PREDICTION_TYPES}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("steps", "batch_size", "timesteps", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.channels % 8:
            raise ValueError(f"channels: expected a multiple of 8, got {self.channels}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 .. 2**63 - 1, got {self.seed}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        for name in ("ema_decay", "label_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= value < 1, got {getattr(self, name)}")


def build_model(config: Config, layers: Any = None) -> torch.nn.Module:
    """The U-Net of a run, with fresh weights.

    Args:
        config: the run.
        layers: `pynn.models.unet.TORCH_LAYERS` builds the same network from torch.nn; None builds it from pynn.nn.
    """
    from pynn.models.unet import PYNN_LAYERS, UNet

    return UNet(
        data.SHAPES[config.data][0],
        channels=config.channels,
        channel_multipliers=config.channel_multipliers,
        attention_levels=config.attention_levels,
        num_classes=data.NUM_CLASSES,
        layers=PYNN_LAYERS if layers is None else layers,
    )


def build_diffusion(config: Config):
    """The diffusion process of a run."""
    from pynn.diffusion import GaussianDiffusion, Schedule

    return GaussianDiffusion(getattr(Schedule, config.schedule)(config.timesteps), config.prediction_type)


def build_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """Adam, the whole update of a parameter in one fused kernel of PyTorch's."""
    return torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), fused=True)


def build_average(model: torch.nn.Module, config: Config) -> torch.optim.swa_utils.AveragedModel:
    """An exponential moving average of the weights whose decay grows to `ema_decay`, so early weights are forgotten."""

    def update(average, current, count):
        count = float(count)
        torch._foreach_lerp_(average, current, 1 - min(config.ema_decay, (1 + count) / (10 + count)))

    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.no_grad()(update))


class Trainer:
    """The state of a run, and one step of it.

    Args:
        config: the run.
        device: where to train.
    """

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        self.config = config
        self.device = torch.device(device)
        self.images = data.load(config.data)
        torch.manual_seed(config.seed)  # weights, and whatever in the model has no generator of its own
        self.model = build_model(config).to(self.device)
        self.average = build_average(self.model, config)
        self.optimizer = build_optimizer(self.model, config)
        self.diffusion = build_diffusion(config)
        self.generator = torch.Generator().manual_seed(config.seed)  # noise, timesteps, dropped labels
        self.step = 0
        self._x = self.images.train.to(self.device)

    def batches(self) -> Iterator[torch.Tensor]:
        """Indices of the batches still to come."""
        return data.batches(len(self.images.train), self.config.batch_size, seed=self.config.seed, first_step=self.step)

    def learning_rate(self) -> float:
        """Linear warm-up over 100 steps, then half a cosine down to 0."""
        warm_up = min(1.0, (self.step + 1) / 100)
        return self.config.learning_rate * warm_up * (0.5 + 0.5 * math.cos(math.pi * self.step / self.config.steps))

    def train_step(self, index: torch.Tensor) -> torch.Tensor:
        """One update with the images (B,) of an index; returns the loss, a scalar tensor."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.diffusion.loss(
            self.model, self._x[index.to(self.device)], generator=self.generator, class_labels=self._labels(index)
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.step += 1
        return loss.detach()

    def _labels(self, index: torch.Tensor) -> torch.Tensor:
        """Labels with a share replaced by "no class", which is what guidance needs (arXiv 2207.12598)."""
        dropped = torch.rand(len(index), generator=self.generator) < self.config.label_dropout
        return self.images.train_labels[index].masked_fill(dropped, data.NUM_CLASSES).to(self.device)

    def save(self, directory: Path) -> Path:
        """Writes a checkpoint."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.average.state_dict().items()}
        tensors |= checkpoint.pack_optimizer(self.optimizer)
        tensors["rng.generator"] = self.generator.get_state()
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        metadata = {"recipe": RECIPE, "step": self.step, "config": dataclasses.asdict(self.config)}
        return checkpoint.save(directory, self.step, tensors, metadata)

    def restore(self, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
        """Continues from what `save` wrote."""
        checkpoint.load_module(self.model, checkpoint.part(tensors, "model."))
        checkpoint.load_module(self.average, checkpoint.part(tensors, "ema."))
        checkpoint.restore_optimizer(self.optimizer, tensors)
        self.generator.set_state(tensors["rng.generator"])
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.step = metadata["step"]


def config_of(metadata: Any) -> Config:
    """The configuration in the metadata of a checkpoint.

    Raises:
        ValueError: another recipe wrote it, or the configuration is not valid.
    """
    try:
        if metadata["recipe"] != RECIPE:
            raise ValueError(f"checkpoint: expected recipe {RECIPE!r}, got {metadata['recipe']!r}")
        config: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in metadata["config"].items()
        }
        return Config(**config)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint: no configuration of a {RECIPE} run ({error!r})") from error


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[torch.nn.Module, Config, int]:
    """The averaged model of a checkpoint file, or of the newest checkpoint in a directory.

    Returns:
        (model in evaluation mode, configuration, step).
    Raises:
        FileNotFoundError, CorruptCheckpointError: as `pynn.train.checkpoint.load_newest`.
        ValueError: not a checkpoint of this recipe.
    """
    tensors, metadata = checkpoint.load(path) if path.is_file() else checkpoint.load_newest(path)[:2]
    config = config_of(metadata)
    model = build_model(config)
    checkpoint.load_module(model, checkpoint.part(tensors, "ema.module."))
    return model.to(device).eval(), config, metadata["step"]


def sample(
    model: torch.nn.Module,
    config: Config,
    labels: torch.Tensor,
    *,
    seed: int,
    guidance_scale: float = 1.0,
    batch_size: int = 250,
    tuner: ThreadTuner | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Draws an image for every label; each has its own stream of noise, so it does not depend on its neighbours.

    Args:
        model: the averaged model of a run.
        config: the run.
        labels: int64 (N,).
        seed: names the streams.
        guidance_scale: classifier-free guidance; 1 is none.
        batch_size: images drawn together.
        tuner: chooses the number of threads; None leaves it alone.
        progress: show a progress bar.
    Returns:
        (N, 1, H, W) in [-1, 1], on the CPU.
    """
    device = next(model.parameters()).device
    diffusion, generator = build_diffusion(config), torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**63 - 1, (len(labels), 1), generator=generator)
    keys = torch.nn.functional.pad(seeds, (0, 1))  # (N, 2): seed, offset 0
    total = -(-len(labels) // batch_size) * config.timesteps
    parts = []
    with progress_bar(total=total, desc="sample", unit="step", enabled=progress) as bar:

        def count(timesteps: Iterable[int]) -> Iterator[int]:
            for t in timesteps:
                if tuner is not None:
                    tuner.tick()
                yield t
                bar.update()

        for part, key in zip(labels.to(device).split(batch_size), keys.split(batch_size), strict=True):
            shape = (len(part), *data.SHAPES[config.data])
            no_class = {"class_labels": torch.full_like(part, data.NUM_CLASSES)}
            x = diffusion.sample(
                model,
                shape,
                seed=key,
                progress=count,
                guidance_scale=guidance_scale,
                unconditional=no_class,
                class_labels=part,
            )
            parts.append(x.cpu())
    return torch.cat(parts)


def train(
    trainer: Trainer,
    out: Path,
    *,
    checkpoint_every: int = 500,
    log_every: int = 20,
    tuner: ThreadTuner | None = None,
    progress: bool = False,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
) -> bool:
    """Runs a trainer to its last step, with checkpoints and TensorBoard logs under `out`.

    Ctrl-C (SIGINT) or SIGTERM ends the run after the current step with a checkpoint.

    Args:
        trainer: new, or restored from a checkpoint.
        out: directory of the run.
        checkpoint_every: steps between checkpoints; the last step is always saved.
        log_every: steps between log entries.
        tuner: chooses the number of threads; None leaves it alone.
        progress: show a progress bar.
        on_step: called with (step, loss) after every step.
    Returns:
        True when the last step was reached, False when a signal ended the run.
    Raises:
        FloatingPointError: the loss is no longer finite; the last checkpoint is from before that.
    """
    engine_module = require("ignite.engine")
    events = engine_module.Events
    config = trainer.config
    engine = engine_module.Engine(lambda engine, index: trainer.train_step(index))
    engine.logger.setLevel(logging.CRITICAL)  # it would print every exception it passes on
    writer = require("torch.utils.tensorboard").SummaryWriter(str(out / "tensorboard"), purge_step=trainer.step)
    bar = progress_bar(total=config.steps, initial=trainer.step, desc="train", unit="step", enabled=progress)
    window: list[torch.Tensor] = []
    clock = time.perf_counter()

    @engine.on(events.ITERATION_STARTED)
    def _tune(engine):
        if tuner is not None:
            tuner.tick()

    @engine.on(events.ITERATION_COMPLETED)
    def _collect(engine):
        window.append(engine.state.output)
        bar.update()
        if on_step is not None:
            on_step(trainer.step, engine.state.output)
        if trainer.step % log_every == 0 or trainer.step % checkpoint_every == 0 or trainer.step == config.steps:
            _log()
        if trainer.step % checkpoint_every == 0 and trainer.step < config.steps:
            trainer.save(out / "checkpoints")

    def _log() -> None:
        nonlocal clock
        loss = torch.stack(window).mean().item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss} before step {trainer.step}; try a lower --learning-rate")
        now = time.perf_counter()
        rate = len(window) * config.batch_size / (now - clock)
        writer.add_scalar("train/loss", loss, trainer.step)
        writer.add_scalar("train/images_per_second", rate, trainer.step)
        writer.add_scalar("train/learning_rate", trainer.learning_rate(), trainer.step)
        bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} images/s", refresh=False)
        window.clear()
        clock = now

    try:
        with _terminate_on_signal(engine):
            if trainer.step < config.steps:
                engine.run(trainer.batches(), max_iters=config.steps - trainer.step, epoch_length=10**9)
                trainer.save(out / "checkpoints")
    finally:
        bar.close()
        writer.close()
    return trainer.step == config.steps


@contextlib.contextmanager
def _terminate_on_signal(engine) -> Iterator[None]:
    """Turns SIGINT and SIGTERM into the end of an engine's run after its current step (main thread only)."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda *_: engine.terminate())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
