"""Checkpoints: exact round trips, no silent damage, no unreadable state after kill -9, bit-exact resumption."""

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch

from pynn.train import checkpoint, ddpm

for package in ("ignite", "sklearn", "safetensors", "tqdm", "tensorboard"):
    pytest.importorskip(package, reason="needs the [train] extra")

TINY = ddpm.Config(steps=25, batch_size=8, timesteps=10, channels=8, seed=3)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
KILLS = 20
PRELOAD = ["pynn.models.unet", "pynn.diffusion", "pynn.train.ddpm", "sklearn.datasets", "sklearn.model_selection"]
PRELOAD += ["ignite.engine", "safetensors.torch", "tqdm", "torch.utils.tensorboard", "torch._dynamo", "pytest"]


def tensors(seed: int = 0, size: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(size, generator=generator),
        "model.bias": torch.randn(3, generator=generator).bfloat16(),
        "optimizer.0.step": torch.tensor(7.0),
        "rng": torch.arange(5, dtype=torch.uint8),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_exact(tmp_path, dtype):
    base = torch.randint(0, 100, (6, 8)).to(dtype)
    saved = {"plain": base, "strided": base.t()[::2], "expanded": base[:1].expand(4, 8), "empty": base[:0]}
    saved |= {"scalar": base[0, 0], "same storage": base}
    metadata = {"text": 'quotes " and "sha256":"0', "list": [1, 2.5, None], "nested": {"a": True}}
    path = checkpoint.save(tmp_path, 12, saved, metadata)
    loaded, loaded_metadata = checkpoint.load(path)
    assert loaded_metadata == metadata
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert loaded[name].dtype == dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor)


def test_special_values_survive_bit_for_bit(tmp_path):
    bits = torch.tensor([0x7FC00001, 0x7F800000, -0x80000000, 1, 0x7FA00000], dtype=torch.int32)
    loaded, _ = checkpoint.load(checkpoint.save(tmp_path, 0, {"x": bits.view(torch.float32)}, {}))
    assert torch.equal(loaded["x"].view(torch.int32), bits)


def test_any_safetensors_reader_reads_it(tmp_path):
    from safetensors import safe_open

    path = checkpoint.save(tmp_path, 1, tensors(), {"step": 1})
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("model.weight"), tensors()["model.weight"])
        assert json.loads(file.metadata()["json"]) == {"step": 1}


def test_the_newest_checkpoints_are_kept(tmp_path):
    (tmp_path / ".checkpoint-00000001.safetensors.77.tmp").write_bytes(b"left by a killed run")
    (tmp_path / "notes.txt").write_text("not ours")
    for step in (5, 10, 100_000_000, 20):
        checkpoint.save(tmp_path, step, tensors(), {"step": step}, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-00000020.safetensors", "checkpoint-100000000.safetensors", "notes.txt"]
    assert checkpoint.load_newest(tmp_path)[1] == {"step": 100_000_000}


def test_a_failing_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, tensors(1), {"step": 1})

    def fail(*_):
        raise OSError(28, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(OSError, match="No space left"):
                checkpoint.save(tmp_path, 2, tensors(2), {"step": 2})
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001.safetensors"]
    assert checkpoint.load_newest(tmp_path)[1] == {"step": 1}


def test_every_bit_flip_is_detected(tmp_path):
    path = checkpoint.save(tmp_path, 1, tensors(), {"step": 1, "text": "a b"})
    content = bytearray(path.read_bytes())
    silent = []
    for position in range(len(content)):
        for bit in range(8):
            content[position] ^= 1 << bit
            path.write_bytes(content)
            content[position] ^= 1 << bit
            try:
                checkpoint.load(path)
            except checkpoint.CorruptCheckpointError:
                continue
            silent.append((position, bit))
    assert silent == []
    path.write_bytes(content)
    checkpoint.load(path)


def test_truncation_splices_and_swaps_are_detected(tmp_path):
    content = checkpoint.save(tmp_path, 1, tensors(1, 64), {"step": 1}).read_bytes()
    other = checkpoint.save(tmp_path, 2, tensors(2, 64), {"step": 2}).read_bytes()
    assert len(content) == len(other)
    generator = random.Random(0)
    damaged = [content[:length] for length in range(len(content))]
    damaged += [content + extra for extra in (b"\0", b" ", content)]
    for _ in range(300):
        first, second = sorted(generator.sample(range(len(content) + 1), 2))
        damaged.append(content[:first] + other[first:second] + content[second:])
        damaged.append(content[:first] + bytes(second - first) + content[second:])
        damaged.append(content[:first] + content[second:])
    path = tmp_path / "checkpoint-00000003.safetensors"
    for bad in damaged:
        if bad in (content, other):
            continue
        path.write_bytes(bad)
        with pytest.raises(checkpoint.CorruptCheckpointError, match="checkpoint-00000003"):
            checkpoint.load(path)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file(tensors(), path)
    with pytest.raises(checkpoint.CorruptCheckpointError):
        checkpoint.load(path)
    torch.save(tensors(), path)
    with pytest.raises(checkpoint.CorruptCheckpointError):
        checkpoint.load(path)
    for header in (b"{}", b"[]", b"null", b'{"__metadata__":1}', b'{"__metadata__":{"sha256":""}}', b"[" * 100_000):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(checkpoint.CorruptCheckpointError):
            checkpoint.load(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "missing.safetensors")


def test_a_damaged_newest_falls_back_to_the_previous(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors(step), {"step": step})
    newest, previous = checkpoint.find(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="checkpoint-00000002.*trying the checkpoint before it"):
        loaded, metadata, path = checkpoint.load_newest(tmp_path)
    assert path == previous
    assert metadata == {"step": 1}
    assert torch.equal(loaded["model.weight"], tensors(1)["model.weight"])
    previous.write_bytes(b"")
    with pytest.warns(match="trying"), pytest.raises(checkpoint.CorruptCheckpointError, match="all 2 checkpoints"):
        checkpoint.load_newest(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.load_newest(tmp_path / "nothing")


def run_tiny(out: Path, log: Path) -> None:
    """Trains the tiny model from the newest checkpoint, if any, saving after every step; logs losses exactly."""
    torch.set_num_threads(1)
    trainer = ddpm.Trainer(TINY)
    if checkpoint.find(out / "checkpoints"):
        trainer.restore(*checkpoint.load_newest(out / "checkpoints")[:2])
    with open(log, "a", buffering=1) as file:

        def write(step: int, loss: torch.Tensor) -> None:
            file.write(f"{step} {loss.item().hex()}\n")

        ddpm.train(trainer, out, checkpoint_every=1, on_step=write)


def losses(log: Path) -> dict[int, str]:
    """Step -> loss, leaving out a last line that the kill cut off."""
    lines = [line.split() for line in log.read_text().split("\n")[:-1]] if log.exists() else []
    return {int(step): loss for step, loss in lines}


def wait_for_the_first(out: Path, process) -> None:
    while not checkpoint.find(out / "checkpoints") and process.is_alive():
        time.sleep(0.001)


def test_kill_while_saving_then_resume_bit_exactly(tmp_path):
    context = multiprocessing.get_context("forkserver")  # children start in milliseconds, from a process that has
    context.set_forkserver_preload(PRELOAD)  # imported everything and run nothing

    def start(name: str, log: str):
        process = context.Process(target=run_tiny, args=(tmp_path / name, tmp_path / log))
        process.start()
        return process

    process = start("whole", "whole.log")
    process.join()
    assert process.exitcode == 0
    process = start("timed", "timed.log")
    wait_for_the_first(tmp_path / "timed", process)
    begin = time.monotonic()
    process.join()
    seconds = time.monotonic() - begin
    expected = losses(tmp_path / "whole.log")
    assert list(expected) == list(range(1, TINY.steps + 1))
    assert losses(tmp_path / "timed.log") == expected

    def kill_and_resume(index: int) -> int:
        name, moment = f"run{index}", random.Random(index).random()
        checkpoints = tmp_path / name / "checkpoints"
        process = start(name, f"{name}.log")
        wait_for_the_first(tmp_path / name, process)
        time.sleep(moment * seconds * 0.8)
        process.kill()
        process.join()
        step = checkpoint.load_newest(checkpoints)[1]["step"]
        before = losses(tmp_path / f"{name}.log")
        assert before.items() <= expected.items()
        assert step in (max(before), max(before) - 1)  # at most the step in flight is lost
        process = start(name, f"{name}-resumed.log")
        process.join()
        assert process.exitcode == 0
        assert losses(tmp_path / f"{name}-resumed.log") == {k: v for k, v in expected.items() if k > step}
        final, whole = (checkpoint.load_newest(tmp_path / n / "checkpoints")[0] for n in (name, "whole"))
        assert final.keys() == whole.keys()
        assert all(torch.equal(final[key], whole[key]) for key in whole)
        return step

    # One after the other: starting a process polls its siblings, so two threads would race for an exit status.
    steps = [kill_and_resume(index) for index in range(KILLS)]
    assert sum(step < TINY.steps for step in steps) >= KILLS // 2  # most kills came before the end
