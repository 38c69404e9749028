"""fit: the training loop of every recipe but DDPM's, on Hugging Face accelerate.

accelerate does mixed precision, gradient accumulation and DistributedDataParallel, sharding.py FSDP2; under torchrun
each process takes its part of every batch, and the losses are those of one process to rounding, dropout and batch
normalisation apart. A batch follows from (seed, step) and so does the state of the random generators inside a step: a
resumed run needs no state but weights and optimizer, and goes on bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import checkpoint
from .extras import progress_bar, require

PRECISIONS = ("no", "bf16", "fp16")
SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adam", "adamw", "sgd")

Batch = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the result of a run, beside its model and data.

    Args:
        steps: updates of the weights. batch_size: samples of an update, over all processes. seed: of weights and data.
        learning_rate: the largest. optimizer: "adam", "adamw" or "sgd" (momentum 0.9). weight_decay: the optimizer's.
        schedule: "constant", or "cosine" down to 0. warmup: steps the learning rate grows over, linearly.
        clip_norm: largest norm of the gradient; None does not clip.
        accumulate: parts a process computes its share of a batch in, one after the other, to save memory.
        precision: "no", or autocast to "bf16" or "fp16" (with loss scaling).
    Raises:
        ValueError: a value out of range, by name.
    """

    steps: int
    batch_size: int
    seed: int = 0
    learning_rate: float = 1e-3
    optimizer: str = "adam"
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: int = 0
    clip_norm: float | None = None
    accumulate: int = 1
    precision: str = "no"

    def __post_init__(self) -> None:
        choices_of = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "precision": PRECISIONS}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, least in (("steps", 0), ("batch_size", 1), ("seed", 0), ("warmup", 0), ("accumulate", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm: expected a positive number or None, got {self.clip_norm}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        rate = self.learning_rate * min(1.0, (step + 1) / (self.warmup + 1))
        return rate if self.schedule == "constant" else rate * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))


@dataclasses.dataclass
class History:
    """What a run has shown: (step, mean loss since the entry before) and (step, metrics) in order."""

    losses: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    metrics: list[tuple[int, dict[str, float]]] = dataclasses.field(default_factory=list)
    step: int = 0  # updates done
    finished: bool = False


def build_optimizer(parameters: Any, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer of a run, PyTorch's fused form."""
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "fused": True}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **options)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, **options)


def fit(
    model: torch.nn.Module,
    loss: Callable[..., torch.Tensor],
    batch: Callable[[int], Batch],
    settings: Settings,
    *,
    out: Path | None = None,
    name: str = "fit",
    evaluate: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    evaluate_every: int = 0,
    checkpoint_every: int = 500,
    log_every: int = 20,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    shard: bool = False,
    progress: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> History:
    """Trains a model in place.

    SIGINT (Ctrl-C) or SIGTERM ends the run after the current step, with a checkpoint.

    Args:
        model: any module; only parameters that require a gradient are trained.
        loss: called with (model, *batch); the mean over the samples it is given, a scalar.
        batch: the batch of a step: tensors of `batch_size` samples along dim 0. Must follow from the step alone.
        settings: the run.
        out: directory for checkpoints/, tensorboard/ and curves.png; None writes nothing.
        name: of the run, in checkpoints and logs.
        evaluate: metrics of the model in evaluation mode, after the last step and every `evaluate_every` steps (0: only
            then). Every process computes them.
        checkpoint_every, log_every: steps between checkpoints, and between log entries.
        resume: continue from the newest intact checkpoint in `out`.
        overwrite: remove the checkpoints that `out` holds.
        device: "cpu" or "cuda"; under torchrun accelerate chooses the GPU of each process.
        shard: every process keeps a part of the weights and of the optimizer (FSDP2) instead of all of them; the
            checkpoints are the same. Batch statistics are those of the first process.
        progress: show a progress bar.
        on_step: called with (steps done, loss) after every step.
    Returns:
        The history; `finished` is False when a signal ended the run.
    Raises:
        ValueError: batch_size that processes and `accumulate` do not divide; a checkpoint of another run; `out` holds a
            run and is neither to be resumed nor overwritten; `shard` with one process or in fp16.
        FileNotFoundError: nothing to resume.
        FloatingPointError: the loss is no longer finite; the last checkpoint is from before that.
    """
    accelerate = require("accelerate")
    if shard and settings.precision == "fp16":
        raise ValueError("shard: expected precision no or bf16, got fp16")
    accelerator = accelerate.Accelerator(
        cpu=device == "cpu", mixed_precision=settings.precision, gradient_accumulation_steps=settings.accumulate
    )
    share, rest = divmod(settings.batch_size, accelerator.num_processes * settings.accumulate)
    if rest:
        parts = f"{accelerator.num_processes} processes x accumulate {settings.accumulate}"
        raise ValueError(f"batch_size: expected a multiple of {parts}, got {settings.batch_size}")
    history = History()
    model.to("cpu" if shard else accelerator.device)
    old = [] if out is None or resume else checkpoint.find(out / "checkpoints")
    if old and not overwrite:
        raise ValueError(f"{out} holds a run: continue it with resume, or start anew with overwrite")
    accelerator.wait_for_everyone()  # all have looked
    if accelerator.is_main_process:
        for path in old:
            path.unlink()
    if settings.steps:
        optimizer = build_optimizer([p for p in model.parameters() if p.requires_grad], settings)
        if resume:
            if out is None:
                raise ValueError("resume: expected an out directory to continue from")
            history = _restore(model, optimizer, accelerator.scaler, settings, name, out)
        sharded = None
        if shard:
            from .sharding import Sharded  # here, because torch.distributed's parts take a second to import

            build = functools.partial(build_optimizer, settings=settings)
            sharded = Sharded(model, optimizer, build, accelerator.device, accelerator.num_processes)
            trained = accelerator.prepare_model(sharded.model, evaluation_mode=True)  # autocast alone
            wrapped = accelerator.prepare_optimizer(sharded.optimizer)
        else:
            trained, wrapped = accelerator.prepare(model, optimizer)
        run = _Run(accelerator, model, trained, wrapped, loss, batch, settings, share, history, sharded)

        def save() -> None:
            if out is not None:
                _save(model, optimizer, accelerator.scaler, settings, name, history, out)

        try:
            run.loop(out, save, name, evaluate, evaluate_every, checkpoint_every, log_every, progress, on_step)
        finally:
            accelerator.unwrap_model(trained, keep_fp32_wrapper=False)  # prepare() put autocast around forward
        model.to(accelerator.device)  # where it is already, unless its parts were trained
    history.finished = history.step == settings.steps
    model.eval()
    if history.finished and evaluate is not None:
        history.metrics.append((history.step, evaluate(model)))
    if out is not None and accelerator.is_main_process and history.losses:
        draw_curves(history, out / "curves.png", name)
    return history


class _Run:
    """One process's part of a run."""

    def __init__(self, accelerator, model, trained, optimizer, loss, batch, settings, share, history, sharded) -> None:
        self.accelerator, self.trained, self.optimizer, self.sharded = accelerator, trained, optimizer, sharded
        self.model = model if sharded is None else trained
        self.loss, self.batch, self.settings, self.share, self.history = loss, batch, settings, share, history
        self.stop = False
        # A frozen batch normalisation keeps its statistics too.
        self.frozen = [
            module
            for module in self.model.modules()
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
            and module.affine
            and not any(parameter.requires_grad for parameter in module.parameters())
        ]

    def loop(self, out, save, name, evaluate, evaluate_every, checkpoint_every, log_every, progress, on_step) -> None:
        history, settings, main = self.history, self.settings, self.accelerator.is_main_process
        writer = None
        if out is not None and main:
            tensorboard = require("torch.utils.tensorboard")
            writer = tensorboard.SummaryWriter(str(out / "tensorboard"), purge_step=history.step)
        bar = progress_bar(
            total=settings.steps, initial=history.step, desc=name, unit="step", enabled=progress and main
        )
        window: list[float] = []
        clock = time.perf_counter()
        try:
            with self._stopped_by_signals():
                while history.step < settings.steps and not self.stop:
                    self.trained.train()
                    for module in self.frozen:
                        module.eval()
                    value = self.step()
                    window.append(value)
                    bar.update()
                    if on_step is not None:
                        on_step(history.step, value)
                    last = history.step == settings.steps or self.stop
                    if history.step % log_every == 0 or last:
                        now = time.perf_counter()
                        rate = len(window) * settings.batch_size / (now - clock)
                        history.losses.append((history.step, sum(window) / len(window)))
                        bar.set_postfix_str(f"loss {history.losses[-1][1]:.4f}, {rate:,.0f} samples/s", refresh=False)
                        _log(writer, history.step, loss=history.losses[-1][1], samples_per_second=rate)
                        window.clear()
                        clock = now
                    if evaluate is not None and evaluate_every and history.step % evaluate_every == 0 and not last:
                        self.model.eval()
                        history.metrics.append((history.step, evaluate(self.model)))
                        _log(writer, history.step, **history.metrics[-1][1])
                    due = last or (out is not None and history.step % checkpoint_every == 0)
                    if due and self.sharded is not None:
                        self.sharded.collect()
                    if due and out is not None and main:
                        save()
        finally:
            bar.close()
            if writer is not None:
                writer.close()
        self.accelerator.wait_for_everyone()

    def step(self) -> float:
        """One update; returns its loss over all processes."""
        accelerator, settings, history = self.accelerator, self.settings, self.history
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(history.step)
        whole = self.batch(history.step)
        sizes = {len(tensor) for tensor in whole}
        if sizes != {settings.batch_size}:
            raise ValueError(f"batch: expected tensors of {settings.batch_size} samples, got {sorted(sizes)}")
        # Dropout and noise: another stream for each step, process and part, that no earlier step decides.
        key = (settings.seed * 1_000_003 + history.step) * accelerator.num_processes + accelerator.process_index
        torch.manual_seed(key % 2**63)
        total = torch.zeros((), device=accelerator.device)
        for part in range(settings.accumulate):
            first = (accelerator.process_index * settings.accumulate + part) * self.share
            samples = [tensor[first : first + self.share].to(accelerator.device) for tensor in whole]
            with accelerator.accumulate(self.trained):
                value = self.loss(self.trained, *samples)
                accelerator.backward(value)
                if accelerator.sync_gradients and settings.clip_norm is not None:
                    accelerator.clip_grad_norm_(self.trained.parameters(), settings.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += value.detach() / settings.accumulate
        history.step += 1
        # One sum tells every process the loss and whether a signal reached any of them: all stop after the same step.
        shared = torch.stack((total.double() / accelerator.num_processes, total.new_tensor(self.stop).double()))
        loss, stop = accelerator.reduce(shared, "sum").tolist()
        self.stop = stop > 0
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss} at step {history.step}; try a lower learning rate")
        return loss

    @contextlib.contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        before = {}

        def stop(*_: Any) -> None:
            self.stop = True

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _log(writer: Any, step: int, **values: float) -> None:
    if writer is not None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)


def _save(model, optimizer, scaler, settings: Settings, name: str, history: History, out: Path) -> None:
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    tensors |= checkpoint.pack_optimizer(optimizer)
    metadata = {"recipe": name, "settings": dataclasses.asdict(settings), "history": dataclasses.asdict(history)}
    if scaler is not None:  # of fp16's losses
        metadata["scaler"] = scaler.state_dict()
    checkpoint.save(out / "checkpoints", history.step, tensors, metadata)


def _restore(model, optimizer, scaler, settings: Settings, name: str, out: Path) -> History:
    tensors, metadata, path = checkpoint.load_newest(out / "checkpoints")
    saved = load_metadata(metadata, name, path)
    if dataclasses.replace(settings, steps=saved.steps, accumulate=saved.accumulate) != saved:
        raise ValueError(f"resume: {path} was written with other settings: {saved}, got {settings}")
    checkpoint.load_module(model, checkpoint.part(tensors, "model."))
    checkpoint.restore_optimizer(optimizer, tensors)
    if scaler is not None:
        scaler.load_state_dict(metadata["scaler"])
    history = metadata["history"]
    if settings.steps < history["step"]:
        raise ValueError(f"steps: the run is at step {history['step']} already, got {settings.steps}")
    return History(
        [(step, loss) for step, loss in history["losses"]],
        [(step, metrics) for step, metrics in history["metrics"]],
        history["step"],
    )


def load_metadata(metadata: Any, name: str, path: Path) -> Settings:
    """The settings in the metadata of a checkpoint that `fit` wrote.

    Raises:
        ValueError: another recipe wrote it, or the settings are not valid.
    """
    try:
        if metadata["recipe"] != name:
            raise ValueError(f"{path}: expected a checkpoint of {name!r}, got one of {metadata['recipe']!r}")
        return Settings(**metadata["settings"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: no settings of a {name} run ({error!r})") from error


def draw_curves(history: History, path: Path, title: str) -> None:
    """Writes a PNG of the loss and of every metric over the steps."""
    require("matplotlib").use("Agg")
    figure_module = require("matplotlib.figure")
    names = sorted({key for _, metrics in history.metrics for key in metrics})
    figure = figure_module.Figure(figsize=(6, 2.5 * (1 + len(names))), layout="constrained")
    axes = figure.subplots(1 + len(names), squeeze=False)[:, 0]
    axes[0].plot(*zip(*history.losses, strict=True))
    axes[0].set(title=title, ylabel="loss")
    for axis, name in zip(axes[1:], names, strict=True):
        points = [(step, metrics[name]) for step, metrics in history.metrics if name in metrics]
        axis.plot(*zip(*points, strict=True), marker="o")
        axis.set(ylabel=name)
    axes[-1].set(xlabel="step")
    figure.savefig(path)
