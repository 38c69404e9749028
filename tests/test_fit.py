"""fit on a small problem: exact resumption, accumulation, precision, two processes, what it writes and refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pynn.models.ensemble import Ensemble
from pynn.models.mlp import MLP
from pynn.train import checkpoint
from pynn.train.fit import Settings, fit
from pynn.train.transfer import finetune, freeze, replace_head

for package in ("accelerate", "torchmetrics", "safetensors", "tqdm", "tensorboard", "matplotlib"):
    pytest.importorskip(package, reason="needs the [train] extra")

SETTINGS = Settings(steps=12, batch_size=8, seed=3, learning_rate=1e-2, warmup=2, clip_norm=1.0)


def build(dropout: float = 0.2) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Dropout(dropout), MLP([16, 3]))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 5, generator=generator)
    return x, x[:, :3].argmax(1)


def loss(model, x, y):
    return F.cross_entropy(model(x), y)


def losses_of(model, settings=SETTINGS, **options) -> list[float]:
    seen: list[float] = []
    fit(model, loss, batch, settings, on_step=lambda _, value: seen.append(value), **options)
    return seen


def test_the_optimizer_sees_the_schedule_and_the_gradient_of_the_mean():
    """Against the loop written out."""
    model, twin = build(0.0), build(0.0)
    seen = losses_of(model)
    optimizer = torch.optim.Adam(twin.parameters())
    for step in range(SETTINGS.steps):
        warm = min(1, (step + 1) / 3)
        optimizer.param_groups[0]["lr"] = 1e-2 * warm * 0.5 * (1 + math.cos(math.pi * step / 12))
        value = loss(twin, *batch(step))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        assert seen[step] == pytest.approx(value.item(), rel=1e-5)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, optimizer):
    settings = dataclasses.replace(SETTINGS, optimizer=optimizer)
    whole = build()
    expected = losses_of(whole, settings)
    seen: list[float] = []

    def stop(step: int, value: float) -> None:
        seen.append(value)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    history = fit(build(), loss, batch, settings, out=tmp_path, on_step=stop)
    assert (history.finished, history.step) == (False, 5)
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = build()
    torch.manual_seed(99)  # no state but the checkpoint's counts
    seen += losses_of(resumed, settings, out=tmp_path, resume=True)
    assert seen == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_accumulated_parts_are_the_whole_batch():
    expected = losses_of(build(0.0))
    parts = losses_of(build(0.0), dataclasses.replace(SETTINGS, accumulate=4))
    assert parts == pytest.approx(expected, rel=1e-5)


def test_what_a_run_writes(tmp_path):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def evaluate(model):
        assert not model.training
        return {"half": 0.5}

    history = fit(
        build(), loss, batch, SETTINGS, out=tmp_path, evaluate=evaluate, evaluate_every=5, log_every=4,
        checkpoint_every=5,
    )  # fmt: skip
    assert [step for step, _ in history.losses] == [4, 8, 12]
    assert history.metrics == [(5, {"half": 0.5}), (10, {"half": 0.5}), (12, {"half": 0.5})]
    assert [path.name for path in checkpoint.find(tmp_path / "checkpoints")] == [
        "checkpoint-00000012.safetensors",
        "checkpoint-00000010.safetensors",
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [4, 8, 12]
    assert events.Scalars("loss")[-1].value == pytest.approx(history.losses[-1][1], rel=1e-5)
    assert min(Image.open(tmp_path / "curves.png").size) > 200


def test_a_run_is_not_lost_by_accident_nor_mixed_up(tmp_path):
    fit(build(), loss, batch, SETTINGS, out=tmp_path)
    with pytest.raises(ValueError, match="holds a run: continue it with resume, or start anew with overwrite"):
        fit(build(), loss, batch, SETTINGS, out=tmp_path)
    with pytest.raises(ValueError, match="expected a checkpoint of 'other', got one of 'fit'"):
        fit(build(), loss, batch, SETTINGS, out=tmp_path, name="other", resume=True)
    with pytest.raises(ValueError, match="other settings"):
        fit(build(), loss, batch, dataclasses.replace(SETTINGS, seed=4), out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="steps: the run is at step 12 already, got 6"):
        fit(build(), loss, batch, dataclasses.replace(SETTINGS, steps=6), out=tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        fit(build(), loss, batch, SETTINGS, out=tmp_path / "new", resume=True)
    with pytest.raises(ValueError, match="resume: expected an out directory"):
        fit(build(), loss, batch, SETTINGS, resume=True)
    assert fit(build(), loss, batch, SETTINGS, out=tmp_path, overwrite=True).finished


def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="became nan at step 1"):
        fit(
            build(), lambda model, x, y: loss(model, x, y) * math.nan, batch, SETTINGS, out=tmp_path, checkpoint_every=1
        )
    assert checkpoint.find(tmp_path / "checkpoints") == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", -1),
        ("batch_size", 0),
        ("seed", -1),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("optimizer", "lion"),
        ("schedule", "step"),
        ("precision", "fp8"),
        ("accumulate", 0),
        ("clip_norm", 0.0),
    ],
)
def test_bad_settings_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        dataclasses.replace(SETTINGS, **{field: value})


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of 1 processes x accumulate 3, got 8"):
        fit(build(), loss, batch, dataclasses.replace(SETTINGS, accumulate=3))
    with pytest.raises(ValueError, match=r"tensors of 4 samples, got \[8\]"):
        fit(build(), loss, batch, dataclasses.replace(SETTINGS, batch_size=4))


def test_sharding_wants_processes_and_no_fp16():
    with pytest.raises(ValueError, match="shard: expected several processes, started by torchrun, got one"):
        fit(build(), loss, batch, SETTINGS, shard=True)
    with pytest.raises(ValueError, match="shard: expected precision no or bf16, got fp16"):
        fit(build(), loss, batch, dataclasses.replace(SETTINGS, precision="fp16"), shard=True)


# Processes of their own: torchrun, and a precision that accelerate fixes for a process

WORKER = """
import json, os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_fit as t
from pathlib import Path
from pynn.train import checkpoint
from pynn.train.fit import fit
out = Path({out!r})
rank, attempt = int(os.environ["RANK"]), int(sys.argv[1])
def watch(step, value):
    if rank == 0:
        with open(out / f"losses-{{attempt}}.jsonl", "a") as file:
            print(json.dumps([step, value]), file=file)
    if rank == 1 and attempt == 0 and step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
resume = bool(checkpoint.find(out / "checkpoints"))
shard = {shard!r}[attempt]
model = t.build(0.0)
fit(model, t.loss, t.batch, t.SETTINGS, out=out, resume=resume, checkpoint_every=4, on_step=watch, shard=shard)
assert torch.distributed.get_world_size() == 2
assert all(type(p) is torch.nn.Parameter for p in model.parameters())
if rank == 0:
    torch.save(model.state_dict(), out / "weights.pt")
"""


def environment() -> dict[str, str]:
    root = Path(__file__).parent.parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path]), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("shard", [(False, False), (True, False), (False, True)], ids=str)
def test_two_processes_are_one_and_survive_the_death_of_one(tmp_path, shard):
    """The second is killed after step 7, which ends the first too; a new start goes on from the checkpoint of step 4.

    shard: before and after it. Every loss is that of one process.
    """
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent), out=str(tmp_path), shard=shard))
    for attempt in (0, 1):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--monitor-interval", "0.2", "--log-dir", str(tmp_path), str(script), str(attempt)]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert (result.returncode == 0) == (attempt == 1), result.stderr[-3000:]
    model = build(0.0)
    expected = dict(enumerate(losses_of(model), start=1))
    found = torch.load(tmp_path / "weights.pt")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    for attempt, steps in ((0, range(1, 8)), (1, range(5, 13))):
        lines = (tmp_path / f"losses-{attempt}.jsonl").read_text().splitlines()
        seen = dict(json.loads(line) for line in lines)
        assert list(seen) == list(steps)
        for step, value in seen.items():
            assert value == pytest.approx(expected[step], abs=1e-5)


def test_bf16_computes_in_bf16_and_keeps_float32_weights():
    program = """
import dataclasses, torch
import test_fit as t
from pynn.train.fit import fit
dtypes = set()
model = t.build(0.0)
model[0].register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
settings = dataclasses.replace(t.SETTINGS, precision="bf16", steps=60)
history = fit(model, t.loss, t.batch, settings, log_every=10)
assert dtypes == {torch.bfloat16}, dtypes
assert {p.dtype for p in model.parameters()} == {torch.float32}
assert model(t.batch(0)[0]).dtype == torch.float32  # autocast went with the training
assert history.losses[-1][1] < 0.8 * history.losses[0][1], history.losses
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(
        command, env=environment(), capture_output=True, text=True, cwd=Path(__file__).parent, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]


# Transfer and ensembles


def test_frozen_parts_stay_what_they_are():
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU())
    model = torch.nn.Sequential(body, torch.nn.Linear(16, 7))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    head = torch.nn.Linear(16, 3)
    start = head.weight.detach().clone()
    finetune(model, loss, batch, SETTINGS, frozen=["0"], head=head)
    assert model[1] is head
    assert not torch.equal(head.weight, start)
    for key, value in model.state_dict().items():
        assert not key.startswith("0.") or torch.equal(value, before[key])
    assert freeze(model, ["1.bias"]) == ["1.bias"]


def test_errors_of_transfer():
    model = MLP([5, 4, 3])
    with pytest.raises(ValueError, match="name of a part with parameters, got 'body'"):
        freeze(model, ["body"])
    with pytest.raises(ValueError, match="head of 4 in_features, got 5"):
        replace_head(model, torch.nn.Linear(5, 2))
    with pytest.raises(ValueError, match="name to be that of a part of MLP, got 'head'"):
        replace_head(model, torch.nn.Linear(4, 2), "head")
    with pytest.raises(ValueError, match=r"expected name, since Tanh has no torch\.nn\.Linear"):
        replace_head(torch.nn.Tanh(), torch.nn.Linear(4, 2))
    old = replace_head(model, torch.nn.Linear(4, 2))
    assert (old.out_features, model(torch.zeros(1, 5)).shape) == (3, (1, 2))


def test_ensembles_take_the_mean_or_the_votes():
    models = [torch.nn.Identity(), torch.nn.Softmax(-1), torch.nn.Identity()]
    x = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.1, 0.0]])
    mean = (2 * x.softmax(-1) + x.softmax(-1).softmax(-1)) / 3
    torch.testing.assert_close(Ensemble(models)(x), mean)
    models[2] = torch.nn.Hardtanh(-1, 0)  # all the same: the first class wins
    votes = torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 2 / 3, 0.0]])
    torch.testing.assert_close(Ensemble(models, vote="majority")(x), votes)
    with pytest.raises(ValueError, match="at least one model"):
        Ensemble([])
    with pytest.raises(ValueError, match="vote to be 'mean' or 'majority', got 'best'"):
        Ensemble(models, vote="best")
