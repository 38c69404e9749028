"""The recipes: data, batches, models against their torch twins, the command line, results; training marked slow."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pynn.train import checkpoint, cli, data, results
from pynn.train.fit import Settings, fit
from pynn.train.recipe_cli import gate_of
from pynn.train.recipes import RECIPES, cnn, get, transformer, tree
from pynn.train.twin import compare_step, torch_twin

for package in ("accelerate", "torchmetrics", "sklearn", "mlxtend", "safetensors", "tqdm", "tensorboard", "matplotlib"):
    pytest.importorskip(package, reason="needs the [train] extra")

FAST = ("rbf", "tree", "tree_recursive")  # trained to their goals in seconds
TRAINED = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in RECIPES]
TWINLESS = ("xor", "mlp", "rbf", "knn", "tree", "tree_recursive", "ensemble")  # nothing of pynn.nn, or TreeLSTM


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pynn(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


# Every recipe


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "knn"])
def test_batches_follow_from_the_step_and_losses_from_the_model(name):
    recipe, again = get(name)(3), get(name)(3)
    model = recipe.build() if name != "transfer" else get("few_shot")(3).build()  # whose model trains first
    for step in (0, 7):
        batch = recipe.batch(step)
        assert all(torch.equal(a, b) for a, b in zip(batch, again.batch(step), strict=True))
        assert {len(tensor) for tensor in batch} == {recipe.settings.batch_size}
    if name != "xor":
        assert not all(torch.equal(a, b) for a, b in zip(batch, recipe.batch(8), strict=True))
    torch.manual_seed(0)  # of dropout
    loss = recipe.loss(model, *batch)
    assert loss.dim() == 0
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    twin = torch_twin(model)
    assert (twin is None) == (name in TWINLESS)
    if twin is not None:
        torch.manual_seed(0)
        torch.testing.assert_close(recipe.loss(twin, *batch), loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_recipes_reach_their_goals(name):
    torch.set_num_threads(1)
    recipe = get(name)(0)
    model = recipe.build()
    history = fit(model, recipe.loss, recipe.batch, recipe.run, name=name, evaluate=recipe.evaluate)
    value = history.metrics[-1][1][recipe.metric]
    assert recipe.meets_gate(value), f"{value}, expected {gate_of(recipe)}"


def test_the_loss_of_a_part_is_the_mean_over_it():
    """What processes and accumulation rely on: parts of equal size average to the whole."""
    for name in ("seq2seq", "tree", "clip", "gpt", "unet"):
        recipe = get(name)(0)
        model = recipe.build().eval()
        batch = recipe.batch(0)
        half = recipe.settings.batch_size // 2
        with torch.no_grad():
            parts = [
                recipe.loss(model, *(tensor[rows] for tensor in batch)) for rows in (slice(half), slice(half, None))
            ]
            torch.testing.assert_close(sum(parts) / 2, recipe.loss(model, *batch), rtol=1e-4, atol=1e-5)


def test_committed_results_are_of_these_recipes():
    rows = results.read()
    assert {row.recipe for row in rows} <= set(RECIPES)
    for row in rows:
        recipe = get(row.recipe)
        assert (row.metric, row.gate) == (recipe.metric, gate_of(recipe))
        assert row.met == ("yes" if recipe.meets_gate(row.value) else "no")


# Data


def test_kinds_of_tokens():
    code = "def f(x):  # why\n    return 'a' + 1.5\n"
    kinds = data.token_kinds(code)
    names = {data.KINDS[kind]: "".join(c for c, k in zip(code, kinds, strict=True) if k == kind) for kind in range(7)}
    assert names["keyword"] == "defreturn"
    assert names["name"] == "fx"
    assert names["operator"] == "():+"
    assert names["number"] == "1.5"
    assert names["string"] == "'a'"
    assert names["comment"] == "# why"
    assert names["space"].split() == []


def test_text_is_whole_and_windows_lie_in_the_training_part():
    text = data.load_text()
    assert len(text.test) == pytest.approx(0.1 * (len(text.train) + len(text.test)), rel=1e-3)
    window = text.windows(3, 20, torch.Generator().manual_seed(0))[1]
    joined = "".join(text.characters[i] for i in text.train.tolist())
    assert "".join(text.characters[i] for i in window.tolist()) in joined


def test_trees_have_the_values_of_their_expressions():
    draw = random.Random(0)
    for depth in range(1, 7):
        tokens, parents, values = tree.draw_tree(depth, draw)
        heights = [0] * len(tokens)
        for node, parent in enumerate(parents):  # children come before their parents
            assert parent == -1 or parent > node
            if parent >= 0:
                heights[parent] = max(heights[parent], heights[node] + 1)
            below = [values[n] for n, p in enumerate(parents) if p == node]
            expected = {0: 0, 1: 1, 2: 1 - below[0] if below else 0}.get(tokens[node])
            if expected is None:
                expected = [min(below), max(below), below[0] ^ below[1]][tokens[node] - 3]
            assert values[node] == expected
        assert heights[-1] == depth
        assert parents.count(-1) == 1


def test_spans_go_back_where_they_were_cut():
    recipe = transformer.SpanT5(0)
    windows = recipe.text.windows(4, recipe.length, torch.Generator().manual_seed(1))
    source, target = recipe.cut(windows, torch.Generator().manual_seed(2))
    for row in range(4):
        spans, number = {}, None
        for token in target[row].tolist():
            if token >= recipe.sentinel:
                number = token
                spans[number] = []
            else:
                spans[number].append(token)
        restored = [t for token in source[row].tolist() for t in spans.get(token, [token])]
        assert restored == windows[row].tolist()
    assert recipe.shifted(target)[:, 1:].equal(target[:, :-1])


def test_hidden_characters_are_berts_shares():
    recipe = transformer.MaskedBert(0)
    ids = recipe.text.train[: 128 * 400].view(400, 128)
    seen, hidden = recipe.hide(ids, torch.Generator().manual_seed(0))
    chosen = hidden != -100
    assert chosen.double().mean().item() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(hidden[chosen], ids[chosen])
    assert torch.equal(seen[~chosen], ids[~chosen])
    assert (seen[chosen] == recipe.mask).double().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (seen[chosen] == ids[chosen]).double().mean().item() == pytest.approx(0.1, abs=0.02)


def test_scenes_show_the_digits_their_classes_say():
    recipe = cnn.Segmentation(0)
    recipe.noise = 0.0
    images = recipe.images
    x, y = recipe.scenes(images.test, images.test_labels, 5, torch.Generator().manual_seed(0))
    assert torch.equal(y > 0, x[:, 0] > 0)
    assert all(2 <= len(scene.unique()) <= 4 for scene in y)


# Times and the command line


def test_step_times_of_both():
    recipe = get("row_lstm")(0)
    times = compare_step(recipe, rounds=2)
    assert times is not None
    assert times.ratio == times.pynn / times.torch > 0
    assert compare_step(get("rbf")(0), rounds=2) is None


def test_the_reader_of_a_list_may_leave():
    """As in `pynn list | head -1`, and sooner."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "pynn.train.cli", "list"]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")


def test_training_evaluating_listing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results, "PATH", tmp_path / "results.csv")
    common = ["--threads", 1, "--quiet", "--out", tmp_path / "run"]
    assert pynn("train", "rbf", "--steps", 4, *common) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["recipe"], report["settings"]["steps"], report["met"]) == ("rbf", 4, "no")
    assert pynn("eval", "rbf", *common) == 1
    assert "goal accuracy >= 0.88: NOT MET" in capsys.readouterr().out
    assert pynn("train", "rbf", *common) == 1
    assert "holds a run" in capsys.readouterr().err
    assert pynn("train", "rbf", "--steps", 4, "--record", "--overwrite", *common) == 1
    assert "--record: expected a whole run with the recipe's own settings" in capsys.readouterr().err
    assert pynn("train", "rbf", "--steps", 6, "--resume", *common) == 0
    assert checkpoint.load_newest(tmp_path / "run" / "checkpoints")[1]["history"]["step"] == 6
    assert pynn("train", "rbf", "--overwrite", "--record", "--seed", 5, *common) == 0
    row = results.read()[0]
    assert (row.recipe, row.seed, row.metric, row.met, row.ratio) == ("rbf", 5, "accuracy", "yes", "")
    capsys.readouterr()
    assert pynn("eval", "rbf", *common) == 0
    assert f"accuracy {row.value:.4f}" in capsys.readouterr().out
    assert pynn("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(RECIPES)
    assert next(line for line in lines if line.startswith("rbf ")).split()[4:6] == [f"{row.value:g}", "1/1"]


def test_readme_shows_what_was_measured(capsys):
    assert pynn("list", "--markdown") == 0
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert capsys.readouterr().out in readme, "paste the output of pynn list --markdown"


def test_recorded_rows_replace_older_ones_of_their_seed(tmp_path):
    row = results.Row("rbf", 0, "accuracy", 0.9, ">= 0.88", "yes", 1.5, "", 1, "2026-01-01", "cpu", "2.11", "3.11")
    path = tmp_path / "results.csv"
    assert results.read(path) == []
    for new in (row, row._replace(seed=1), row._replace(value=0.95)):
        results.record(new, path)
    assert results.read(path) == [row._replace(value=0.95), row._replace(seed=1)]


def test_unknown_recipes_are_named():
    with pytest.raises(ValueError, match=r"recipe: expected one of xor, mlp, .*, got 'gan'"):
        get("gan")
    assert dataclasses.replace(get("mlp").settings, seed=1) == Settings(**dataclasses.asdict(get("mlp")(1).run))
