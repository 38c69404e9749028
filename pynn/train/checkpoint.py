"""Checkpoints that survive a kill at any moment and never load damaged data silently.

A checkpoint is one safetensors file, readable by any safetensors reader, named after its step. Its metadata holds one
JSON text and the SHA-256 of the whole file, taken with the 64 characters of the digest itself set to "0".

Saving writes a temporary file, flushes it to the disk, renames it into place (atomic on POSIX) and flushes the
directory; only then is the oldest checkpoint removed. So at every moment the newest complete checkpoint is on disk.
Loading checks the digest first. `load_newest` goes on to the previous checkpoint when the newest is damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .extras import require

_FORMAT = "pynn-checkpoint-1"
_NO_DIGEST = "0" * 64
_NAME = re.compile(r"checkpoint-(\d{8,})\.safetensors")


class CorruptCheckpointError(RuntimeError):
    """A checkpoint file is damaged or is not one of ours."""


def find(directory: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints in a directory, newest first; empty when there is none."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=_step, reverse=True)


def save(
    directory: str | os.PathLike[str], step: int, tensors: Mapping[str, torch.Tensor], metadata: Any, *, keep: int = 2
) -> Path:
    """Writes one checkpoint, then removes all but the newest `keep`.

    Args:
        directory: created when missing.
        step: names the file; saving a step again replaces its file.
        tensors: any tensors on any device; shared storage is written once per name.
        metadata: anything JSON can hold.
        keep: number of checkpoints left in the directory, at least 1.
    Returns:
        The path of the file.
    Raises:
        OSError: the disk refused; earlier checkpoints are untouched.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"checkpoint.save: expected step >= 0 and keep >= 1, got {step} and {keep}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    content = _serialise(tensors, metadata)
    path = directory / f"checkpoint-{step:08d}.safetensors"
    temporary = directory / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_directory(directory)
    for old in [*find(directory)[keep:], *directory.glob(".checkpoint-*.tmp")]:  # the latter: left by killed runs
        if old != path:
            old.unlink(missing_ok=True)
    return path


def load(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], Any]:
    """Reads one checkpoint file.

    Returns:
        (tensors on the CPU by name, metadata) as they were saved.
    Raises:
        FileNotFoundError: no such file.
        CorruptCheckpointError: any byte differs from what was written, or the file is not a pynn checkpoint.
    """
    safetensors = require("safetensors")
    path = Path(path)
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            metadata = _header(content)
            digest = metadata["sha256"]
            position = _digest_position(content, digest)
            if metadata["format"] != _FORMAT or _sha256(content, position) != digest:
                raise CorruptCheckpointError(f"{path}: the SHA-256 of the file is not the one it was written with")
        tensors = require("safetensors.torch").load_file(path)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise CorruptCheckpointError(f"{path}: not a readable pynn checkpoint ({error})") from error
    return tensors, json.loads(metadata["json"])


def load_newest(directory: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], Any, Path]:
    """Reads the newest checkpoint in a directory that is intact; warns about every damaged one it passes over.

    Returns:
        (tensors, metadata, path of the file).
    Raises:
        FileNotFoundError: the directory holds no checkpoint.
        CorruptCheckpointError: it holds some, all damaged.
    """
    paths = find(directory)
    if not paths:
        raise FileNotFoundError(f"{directory}: no checkpoint here")
    for path in paths:
        try:
            return *load(path), path
        except CorruptCheckpointError as error:
            warnings.warn(f"{error}; trying the checkpoint before it", stacklevel=2)
    raise CorruptCheckpointError(f"{directory}: all {len(paths)} checkpoints are damaged")


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of an optimizer as tensors `optimizer.<parameter>.<name>`, for `save`."""
    return {
        f"optimizer.{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives an optimizer the state that `pack_optimizer` took from its like."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in part(tensors, "optimizer.").items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def load_module(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Loads a state_dict out of a checkpoint.

    Raises:
        ValueError: it does not fit the module.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"checkpoint: its tensors do not fit its configuration ({error})") from error


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _serialise(tensors: Mapping[str, torch.Tensor], metadata: Any) -> bytearray:
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"format": _FORMAT, "json": json.dumps(metadata, sort_keys=True), "sha256": _NO_DIGEST}
    content = bytearray(require("safetensors.torch").save(own, metadata=header))
    position = _digest_position(content, _NO_DIGEST)
    content[position : position + 64] = hashlib.sha256(content).hexdigest().encode()
    return content


def _digest_position(content: bytearray | mmap.mmap, digest: str) -> int:
    key = b'"sha256":"'  # JSON escapes every quote inside a string, so this is the key itself
    position = content.find(key + digest.encode() + b'"')
    if position < 0:
        raise ValueError("no SHA-256 in the header")
    return position + len(key)


def _header(content: mmap.mmap) -> dict[str, str]:
    """The metadata of a safetensors file: an 8-byte little-endian length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    if length > len(content) - 8:
        raise ValueError("the header is cut off")
    return json.loads(content[8 : 8 + length])["__metadata__"]


def _sha256(content: mmap.mmap, position: int) -> str:
    digest = hashlib.sha256()
    with memoryview(content) as view:
        for part in (view[:position], _NO_DIGEST.encode(), view[position + 64 :]):
            digest.update(part)
            if isinstance(part, memoryview):
                part.release()
    return digest.hexdigest()


def _flush_directory(directory: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot; the rename itself is still atomic
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
