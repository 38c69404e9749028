"""Weights in and out: files and state_dicts of torchvision, timm and Hugging Face for the models in pynn.models.

Nothing is ever unpickled but tensors and plain containers, and a model is changed only when everything fits.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ._weight_layouts import Layout, Rule, layouts_of, matches
from .train.extras import require

__all__ = ["WeightsError", "export_weights", "load_weights", "save_weights"]

_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_CONTAINERS = ("state_dict", "model_state_dict", "model")  # where checkpoints keep the weights
_WRAPPERS = ("module.", "_orig_mod.")  # in front of every name: DistributedDataParallel, torch.compile
_SHOWN = 12  # names of a list in an error


class WeightsError(ValueError):
    """Weights do not fit a model, or a file holds something else than weights."""


def load_weights(
    model: torch.nn.Module, source: str | os.PathLike[str] | Mapping[str, Any], layout: str = "auto"
) -> str:
    """Fills a model with weights, under its own names or those of another library; dtypes are converted.

    Layouts: "pynn", the model's own names, for every module; "torchvision" for AlexNet, VGG, GoogLeNet, ResNet and ViT;
    "timm" for ViT; "hf", the names in Hugging Face's files, for ViT, Bert, GPT (GPT-2), T5, CLIP and CLAP. Of CLAP only
    the text side is there: the audio tower and its projection stay as they are. A pooler in a file for ViT is left out.

    Args:
        model: a module from pynn.models, or any other for "pynn".
        source: a state_dict, or a file: .safetensors, or .pt, .pth, .bin, .ckpt with a state_dict, alone or as
            "state_dict", "model_state_dict" or "model". Files of torch are read with weights_only: no code can run.
        layout: a name from above; "auto" takes the one that shares the most names with the source.
    Returns:
        The name of the layout.
    Raises:
        WeightsError: one message with all tensors that are missing, unexpected or of another shape (the model is then
            unchanged); the model has no such layout; a file with other objects than tensors, or a damaged one.
        FileNotFoundError: no such file.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"load_weights: expected model to be a torch.nn.Module, got {type(model).__name__}")
    found = _unwrapped(_read(source))
    own = model.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise WeightsError("load_weights: the model is on the meta device; call model.to_empty(device=...) first")
    known = layouts_of(model)
    if layout == "auto":
        # The first of the best: "pynn" before the libraries, so that the model's own names are read as such.
        shared = {k: len(_renamed(v, own, found).keys() & _expected(v, own)) for k, v in known.items()}
        layout = max(shared, key=lambda name: shared[name])
    chosen = _chosen("load_weights", model, known, layout)
    values, problems = _assemble(chosen, own, _renamed(chosen, own, found))
    if problems:
        raise WeightsError(f"load_weights: {type(model).__name__} in layout {layout!r}\n" + "\n".join(problems))
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
    return layout


def export_weights(model: torch.nn.Module, layout: str = "pynn") -> dict[str, torch.Tensor]:
    """The weights of a model under a library's names, as copies; what the library ties is there once.

    Args:
        model: see load_weights. layout: a name from there, not "auto".
    Raises:
        WeightsError: the model has no such layout, or tensors that it has no name for.
    """
    chosen = _chosen("export_weights", model, layouts_of(model), layout)
    exported: dict[str, torch.Tensor] = {}
    unnamed = []
    for name, tensor in model.state_dict().items():
        found = chosen.rule(name)
        if found is None:
            if not matches(chosen.optional, name):
                unnamed.append(name)
            continue
        rule, names = found
        parts = (tensor,) if len(names) == 1 else tensor.chunk(len(names))
        for their_name, part in zip(names, parts, strict=True):
            part = part.reshape(part.shape[rule.squeezed :])
            exported[their_name] = (part.T if rule.transposed else part).clone(memory_format=torch.contiguous_format)
    if unnamed:
        raise WeightsError(f"export_weights: layout {layout!r} has no name for {_listed(unnamed)}")
    return exported


def save_weights(model: torch.nn.Module, path: str | os.PathLike[str], layout: str = "pynn") -> None:
    """Writes export_weights(model, layout) to a file.

    Args:
        path: .safetensors, or .pt, .pth, .bin, .ckpt for torch.save.
    Raises:
        WeightsError: another ending of path; see export_weights.
    """
    path = Path(path)
    if path.suffix != ".safetensors" and path.suffix not in _PICKLED:
        endings = ", ".join((".safetensors", *_PICKLED))
        raise WeightsError(f"save_weights: expected path to end in {endings}, got {path.name!r}")
    weights = export_weights(model, layout)
    if path.suffix == ".safetensors":
        require("safetensors.torch").save_file(weights, path, metadata={"format": "pt"})
    else:
        torch.save(weights, path)


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, torch.Tensor]:
    if isinstance(source, Mapping):
        return _tensors("the state_dict", source)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"load_weights: no file {path}")
    if path.suffix == ".safetensors":
        safetensors = require("safetensors")
        try:
            return require("safetensors.torch").load_file(path)
        except safetensors.SafetensorError as error:
            raise WeightsError(f"load_weights: {path} is not a readable safetensors file ({error})") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"load_weights: {path} holds other objects than tensors and is not read, because unpickling them could run "
            f"any code ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise WeightsError(f"load_weights: {path} is not a readable file of torch ({error})") from error
    if isinstance(content, Mapping):
        content = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping)), content)
    return _tensors(str(path), content)


def _tensors(what: str, content: Any) -> dict[str, torch.Tensor]:
    if not isinstance(content, Mapping):
        raise WeightsError(f"load_weights: expected {what} to hold tensors by name, got {type(content).__name__}")
    wrong = [f"{name!r}: {type(value).__name__}" for name, value in content.items() if not _is_tensor(name, value)]
    if wrong:
        raise WeightsError(f"load_weights: expected {what} to hold tensors by name, got {_listed(wrong)}")
    return dict(content)


def _is_tensor(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, torch.Tensor)


def _unwrapped(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for wrapper in _WRAPPERS:
        if found and all(name.startswith(wrapper) for name in found):
            found = {name.removeprefix(wrapper): tensor for name, tensor in found.items()}
    return found


def _chosen(function: str, model: torch.nn.Module, known: Mapping[str, Layout], layout: str) -> Layout:
    if layout not in known:
        raise WeightsError(
            f"{function}: expected the layout of {type(model).__name__} to be one of {', '.join(known)}, got {layout!r}"
        )
    return known[layout]


def _expected(layout: Layout, own: Iterable[str]) -> set[str]:
    """All names that a file in this layout can have for these tensors of ours."""
    found = (layout.rule(name) for name in own)
    return {their_name for rule in found if rule is not None for their_name in rule[1]}


def _renamed(layout: Layout, own: Iterable[str], found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The file's tensors with the layout's prefix in front, where the file has left it out."""
    if not layout.prefix:
        return found
    known = _expected(layout, own)

    def full(name: str) -> str:
        longer = layout.prefix + name
        return longer if name not in known and (longer in known or matches(layout.ignored, longer)) else name

    return {full(name): tensor for name, tensor in found.items()}


def _assemble(
    layout: Layout, own: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Our tensors, made of those of the file, and what is wrong with them: one line per kind of problem."""
    values: dict[str, torch.Tensor] = {}
    missing, unnamed, mismatched = [], [], []
    used = set()
    for name, tensor in own.items():
        match = layout.rule(name)
        if match is None:
            if not matches(layout.optional, name):
                unnamed.append(name)
            continue
        rule, names = match
        used.update(names)
        absent = [their_name for their_name in names if their_name not in found]
        if absent and len(absent) == len(names) and matches(layout.optional, name):
            continue
        missing += absent
        parts = [found[their_name] for their_name in names if their_name in found]
        shapes = _shapes(rule, tensor, len(names))
        mismatched += [
            f"{n}: {tuple(found[n].shape)} instead of {tuple(shapes)}"
            for n in names
            if n in found and found[n].shape != shapes
        ]
        if not absent and all(part.shape == shapes for part in parts):
            parts = [part.T if rule.transposed else part for part in parts]
            values[name] = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(tensor.shape)
    unexpected = []
    for name in found:
        if name in used or matches(layout.ignored, name):
            continue
        original = layout.tied.get(name)
        if original is None or original not in values or not _same(found[name], values[original]):
            unexpected.append(name if original is None else f"{name} (not the copy of {original} that it should be)")
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "mismatched": mismatched,
        "without a name in this layout": unnamed,
    }
    return values, [f"  {kind} ({len(names)}): {_listed(names)}" for kind, names in kinds.items() if names]


def _shapes(rule: Rule, tensor: torch.Tensor, parts: int) -> torch.Size:
    """The shape of each of the file's parts of our tensor."""
    shape = list(tensor.shape[rule.squeezed :])
    if parts > 1:
        shape[0] //= parts
    return torch.Size(shape[::-1] if rule.transposed else shape)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(b.dtype), b)


def _listed(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
