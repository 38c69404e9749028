"""What a finished DDPM run is worth: pictures, quality under the judge, and time per step against torch.nn."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import compare, data, ddpm, judge, pictures
from .threads import ThreadTuner

_COLUMNS = 12  # pictures of each class in the grid
_PATH_STOPS = 10  # pictures along the path from noise to image

ACCURACY_GOAL = 0.97


@dataclasses.dataclass(frozen=True)
class Quality:
    """How samples look to the judge; every distance is a Frechet distance to the real training images."""

    samples: int
    label_accuracy: float
    distance: float
    real_images: int
    real_label_accuracy: float
    real_distance: float
    fewer_samples: int  # at most `real_images`: small sets lie further away by chance, and these can be compared
    distance_of_fewer: float


def measure_quality(images: data.Images, samples: torch.Tensor, labels: torch.Tensor) -> Quality:
    """Judges samples (N, 1, H, W) made for labels (N,) beside the real test images."""
    eye = judge.train_judge(images)
    count = min(len(images.test), len(samples))
    return Quality(
        samples=len(samples),
        label_accuracy=judge.accuracy(eye, samples, labels),
        distance=judge.frechet_distance(eye, samples, images.train),
        real_images=len(images.test),
        real_label_accuracy=judge.accuracy(eye, images.test, images.test_labels),
        real_distance=judge.frechet_distance(eye, images.test, images.train),
        fewer_samples=count,
        distance_of_fewer=judge.frechet_distance(eye, samples[:count], images.train),
    )


def draw_samples(samples: torch.Tensor, labels: torch.Tensor, path: Path, title: str) -> None:
    """A grid with one row per class."""
    rows = [samples[labels == label][:_COLUMNS] for label in range(data.NUM_CLASSES)]
    columns = min(len(row) for row in rows)
    grid = torch.stack([row[:columns] for row in rows])
    pictures.draw_grid(grid, path, title=title, row_labels=[str(label) for label in range(data.NUM_CLASSES)])


def draw_path(model: torch.nn.Module, config: ddpm.Config, path: Path, *, seed: int) -> None:
    """The way from noise to an image: one row per class, time running from left to right."""
    labels = torch.arange(data.NUM_CLASSES)
    every = max(1, config.timesteps // _PATH_STOPS)
    _, states = ddpm.build_diffusion(config).sample(
        model,
        (data.NUM_CLASSES, *data.SHAPES[config.data]),
        seed=seed,
        trajectory_every=every,
        class_labels=labels.to(next(model.parameters()).device),
    )
    grid = torch.stack([x for _, x in states], dim=1)
    columns = [f"t={t}" for t, _ in states]
    rows = [str(label) for label in labels.tolist()]
    pictures.draw_grid(grid, path, title="From noise to digit", row_labels=rows, column_labels=columns)


def write(
    out: Path,
    config: ddpm.Config,
    model: torch.nn.Module,
    *,
    samples: int = 1000,
    rounds: int = 40,
    training_seconds: float | None = None,
    tuner: ThreadTuner | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluates a trained model and writes samples.png, path.png, report.json and report.md into `out`.

    Args:
        out: directory of the run.
        config: the run.
        model: its averaged model.
        samples: number of images to judge, the same number of each class.
        rounds: steps to time against torch.nn; 0 leaves the comparison out.
        training_seconds: how long the training took, when known.
        tuner: chooses the number of threads for the samples; the comparison runs with the last choice.
        progress: show progress bars.
    Returns:
        The content of report.json.
    """
    device = next(model.parameters()).device
    labels = torch.arange(samples) % data.NUM_CLASSES
    x = ddpm.sample(model, config, labels, seed=config.seed + 1, tuner=tuner, progress=progress)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    draw_samples(x, labels, out / "samples.png", f"pynn DDPM on {config.data}: samples of each class")
    draw_path(model, config, out / "path.png", seed=config.seed + 2)
    quality = measure_quality(data.load(config.data), x, labels)
    comparison = compare.compare_step(config, device, rounds=rounds, progress=progress) if rounds else None
    report = {
        "config": dataclasses.asdict(config),
        "parameters": parameters,
        "training_seconds": training_seconds,
        "quality": dataclasses.asdict(quality),
        "step_time": _comparison_json(comparison, config) if comparison else None,
        "goals": _goals(quality, comparison),
        "environment": _environment(device),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "report.md").write_text(markdown(report))
    return report


def _comparison_json(comparison: compare.Comparison, config: ddpm.Config) -> dict[str, Any]:
    return {
        "rounds": comparison.rounds,
        "batch_size": config.batch_size,
        "torch_memory_format": comparison.torch_format,
        "pynn_ms": _milliseconds(comparison.pynn),
        "torch_ms": _milliseconds(comparison.torch),
        "ratio": comparison.ratio,
        "slower_parts": comparison.slower_parts,
    }


def _milliseconds(times: compare.StepTimes) -> dict[str, float]:
    return {"step": times.step * 1e3, **{part: seconds * 1e3 for part, seconds in times.parts.items()}}


def _goals(quality: Quality, comparison: compare.Comparison | None) -> dict[str, bool]:
    goals = {
        "label_accuracy": quality.label_accuracy >= ACCURACY_GOAL,
        "distance": quality.distance <= quality.real_distance,
    }
    return goals | ({"step_time": comparison.ratio <= 1.0} if comparison else {})


def _environment(device: torch.device) -> dict[str, Any]:
    import pynn

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()}, {pynn.backends.cpu_isa} kernels, {torch.get_num_threads()} threads"
    return {
        "device": f"{device.type} ({name})",
        "pynn": pynn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a Markdown document, also good to read on a terminal."""
    config, quality, times = report["config"], report["quality"], report["step_time"]
    met = {name: "met" if value else "NOT MET" for name, value in report["goals"].items()}
    environment = report["environment"]
    rows = [
        (
            f"label accuracy of {quality['samples']} samples",
            f"{quality['label_accuracy']:.4f}",
            f">= {ACCURACY_GOAL}: {met['label_accuracy']}",
        ),
        (f"label accuracy of {quality['real_images']} real test images", f"{quality['real_label_accuracy']:.4f}", ""),
        (
            f"Frechet distance, {quality['samples']} samples to training images",
            f"{quality['distance']:.4f}",
            f"<= real test images: {met['distance']}",
        ),
        (
            f"Frechet distance, {quality['fewer_samples']} samples to training images",
            f"{quality['distance_of_fewer']:.4f}",
            "",
        ),
        (
            f"Frechet distance, {quality['real_images']} real test to training images",
            f"{quality['real_distance']:.4f}",
            "",
        ),
    ]
    lines = [
        f"# DDPM on {config['data']}",
        "",
        f"{report['parameters']:,} parameters, T = {config['timesteps']}, {config['steps']} steps of "
        f"{config['batch_size']} images, {config['prediction_type']} prediction, {config['schedule']} schedule, "
        f"seed {config['seed']}",
        f"{environment['device']}, torch {environment['torch']}, pynn {environment['pynn']}"
        + (f"; trained in {report['training_seconds']:.0f} s" if report["training_seconds"] else ""),
        "",
        *_table(("quality", "value", "goal"), rows),
    ]
    if times:
        pynn_ms, torch_ms = times["pynn_ms"], times["torch_ms"]
        parts = [
            (part, f"{pynn_ms[part]:.2f}", f"{torch_ms[part]:.2f}", f"{pynn_ms[part] / torch_ms[part]:.2f}", "")
            for part in compare.PARTS
        ]
        whole = ("whole step", f"{pynn_ms['step']:.2f}", f"{torch_ms['step']:.2f}", f"{times['ratio']:.2f}")
        lines += [
            "",
            *_table(
                ("training step", "pynn ms", f"torch.nn ms ({times['torch_memory_format']})", "pynn / torch", "goal"),
                [*parts, (*whole, f"<= 1.00: {met['step_time']}")],
            ),
            "",
            f"Medians of {times['rounds']} steps of {times['batch_size']} images, taken in turn in one process. Slower "
            f"than torch.nn in: {', '.join(times['slower_parts']) or 'nothing'}.",
        ]
    return "\n".join(lines) + "\n"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in [head, *rows]]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
