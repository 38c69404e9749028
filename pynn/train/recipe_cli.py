"""`pynn train <recipe>`, `pynn eval <recipe>` and `pynn list`: the command line of the recipes on `fit`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, results
from .fit import PRECISIONS, Settings, fit, load_metadata
from .recipes import RECIPES, Recipe, get
from .twin import compare_step

_OVERRIDES = ("steps", "batch_size", "learning_rate", "accumulate", "precision")


def add_train(commands: Any, add_machine: Any) -> None:
    """Adds a command for every recipe under `pynn train`."""
    for name, recipe in RECIPES.items():
        parser = commands.add_parser(
            name,
            help=recipe.summary,
            description=f"{recipe.summary}. Goal: {recipe.metric} {gate_of(recipe)}. Writes checkpoints/, "
            "tensorboard/, curves.png and report.json into --out. Under torchrun every process takes a part of each "
            "batch.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        parser.set_defaults(run=train, recipe=name)
        parser.add_argument("--out", type=Path, default=Path("runs") / name, help="directory of the run")
        parser.add_argument("--resume", action="store_true", help="continue from the newest intact checkpoint in --out")
        parser.add_argument("--overwrite", action="store_true", help="start anew although --out holds checkpoints")
        parser.add_argument("--seed", type=int, default=0, help="of weights and data order")
        for field in dataclasses.fields(Settings):
            if field.name in _OVERRIDES:
                choices = PRECISIONS if field.name == "precision" else None
                value = getattr(recipe.settings, field.name)
                option = "--" + field.name.replace("_", "-")
                parser.add_argument(option, type=type(value), default=value, choices=choices, help="of the run")
        parser.add_argument("--shard", action="store_true", help="under torchrun: weights in parts (FSDP2)")
        parser.add_argument("--checkpoint-every", type=int, default=500, help="steps between checkpoints")
        parser.add_argument("--rounds", type=int, default=0, help="steps to time against torch.nn; 0 leaves it out")
        parser.add_argument("--record", action="store_true", help=f"write the result into {results.PATH.name}")
        add_machine(parser)


def add_commands(commands: Any, add_machine: Any) -> None:
    """Adds `pynn eval` and `pynn list`."""
    parser = commands.add_parser(
        "eval",
        help="measure a trained recipe; exit status 1 when it misses its goal",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=evaluate)
    parser.add_argument("recipe", choices=list(RECIPES), metavar="RECIPE", help="as in `pynn list`")
    parser.add_argument("--out", type=Path, help="directory of the run (default: runs/RECIPE)")
    add_machine(parser)
    parser = commands.add_parser("list", help="show the recipes, their goals and what was measured last")
    parser.set_defaults(run=show)
    parser.add_argument("--markdown", action="store_true", help="as the table of the README")


def gate_of(recipe: type[Recipe] | Recipe) -> str:
    """Goal and limit, ">= 0.9"."""
    return f"{recipe.goal} {recipe.gate:g}"


def _threads(options: argparse.Namespace) -> None:
    if options.threads == "auto":
        raise ValueError("--threads: expected a number for this recipe, got auto")
    torch.set_num_threads(options.threads)


def train(options: argparse.Namespace) -> int:
    """`pynn train <recipe>`."""
    _threads(options)
    recipe = get(options.recipe)(options.seed)
    recipe.run = dataclasses.replace(recipe.run, **{name: getattr(options, name) for name in _OVERRIDES})
    model = recipe.build()
    start = time.perf_counter()
    history = fit(
        model,
        recipe.loss,
        recipe.batch,
        recipe.run,
        out=options.out,
        name=recipe.name,
        evaluate=recipe.evaluate,
        checkpoint_every=options.checkpoint_every,
        resume=options.resume,
        overwrite=options.overwrite,
        device=options.device,
        shard=options.shard,
        progress=not options.quiet,
    )
    seconds = time.perf_counter() - start
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return 0  # the first process reports
    if not history.finished:
        print(f"stopped after step {history.step} of {recipe.run.steps}; continue with --resume", file=sys.stderr)
        return 130
    comparison = compare_step(recipe, rounds=options.rounds, device=options.device) if options.rounds else None
    metrics = history.metrics[-1][1]
    own_settings = recipe.run == dataclasses.replace(recipe.settings, seed=recipe.seed)
    row = results.Row(
        recipe.name,
        recipe.seed,
        recipe.metric,
        round(metrics[recipe.metric], 4),
        gate_of(recipe),
        "yes" if recipe.meets_gate(metrics[recipe.metric]) else "no",
        round(seconds, 1),
        f"{comparison.ratio:.2f}" if comparison else "",
        torch.get_num_threads(),
        results.today(),
        results.device_name(options.device),
        torch.__version__,
        platform.python_version(),
    )
    report = {
        "settings": dataclasses.asdict(recipe.run),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "metrics": metrics,
        "step_seconds": dataclasses.asdict(comparison) if comparison else None,
        **row._asdict(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    if options.record:
        if options.resume or not own_settings:
            raise ValueError("--record: expected a whole run with the recipe's own settings")
        results.record(row)
    print(_verdict(recipe, metrics) + f", {seconds:.1f} s" + (f", {row.ratio} x torch.nn's step" * bool(row.ratio)))
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """`pynn eval <recipe>`."""
    _threads(options)
    kind = get(options.recipe)
    if kind.settings.steps:
        out = options.out or Path("runs") / kind.name
        tensors, metadata, path = checkpoint.load_newest(out / "checkpoints")
        settings = load_metadata(metadata, kind.name, path)
        recipe = kind(settings.seed)
        model = recipe.build()
        checkpoint.load_module(model, checkpoint.part(tensors, "model."))
    else:
        recipe = kind()
        model = recipe.build()
    metrics = recipe.evaluate(model.to(options.device).eval())
    print(_verdict(recipe, metrics))
    return 0 if recipe.meets_gate(metrics[recipe.metric]) else 1


def _verdict(recipe: Recipe, metrics: dict[str, float]) -> str:
    values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    met = "met" if recipe.meets_gate(metrics[recipe.metric]) else "NOT MET"
    return f"{recipe.name}: {values}; goal {recipe.metric} {gate_of(recipe)}: {met}"


def show(options: argparse.Namespace) -> int:
    """`pynn list`."""
    lines = table(results.read())
    if options.markdown:
        lines.insert(1, tuple("---" for _ in lines[0]))
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return 0
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    return 0


def table(rows: list[results.Row]) -> list[tuple[str, ...]]:
    """Every recipe with its goal and, seed by seed, what was measured; a header first."""
    lines: list[tuple[str, ...]] = [("recipe", "goal", "measured", "met", "seconds", "step / torch.nn", "date", "what")]
    for name, recipe in RECIPES.items():
        own = [row for row in rows if row.recipe == name]
        ratios = [float(row.ratio) for row in own if row.ratio]
        lines.append(
            (
                name,
                f"{recipe.metric} {gate_of(recipe)}" + (f", > {recipe.better_than}" if recipe.better_than else ""),
                " ".join(f"{row.value:.4g}" for row in own),
                _met(recipe, rows),
                f"{statistics.median(row.seconds for row in own):.0f}" if own else "",
                f"{statistics.median(ratios):.2f}" if ratios else "",
                max((row.date for row in own), default=""),
                recipe.summary,
            )
        )
    return lines


def _met(recipe: type[Recipe], rows: list[results.Row]) -> str:
    """ "2/3": seeds that meet the goal, out of those measured."""
    values = {row.seed: row.value for row in rows if row.recipe == recipe.name}
    others = {row.seed: row.value for row in rows if row.recipe == recipe.better_than}
    good = [
        seed
        for seed, value in values.items()
        if recipe.meets_gate(value) and (recipe.better_than is None or value > others.get(seed, math.inf))
    ]
    return f"{len(good)}/{len(values)}" if values else ""
