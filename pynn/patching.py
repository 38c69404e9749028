"""pynn.patch: runs the layers of an existing model on pynn's kernels, without building the model again.

A layer is replaced by changing the class of the module object itself: parameters, buffers, hooks, names and every
reference to the module stay what they are, so optimizers, state_dicts and other modules never notice.
"""

from __future__ import annotations

import dataclasses

import torch

from . import _transformers_attention, nn

# torch.nn's class -> pynn's, which keeps the same state in the same attributes, and those that its constructor adds.
_LAYERS: dict[type[torch.nn.Module], tuple[type[torch.nn.Module], dict[str, object]]] = {
    torch.nn.Conv2d: (nn.Conv2d, {"activation": None}),
    torch.nn.ConvTranspose2d: (nn.ConvTranspose2d, {"activation": None}),
    torch.nn.GroupNorm: (nn.GroupNorm, {"activation": None}),
    torch.nn.MultiheadAttention: (nn.MultiheadAttention, {}),
    torch.nn.LSTM: (nn.LSTM, {}),
    torch.nn.GRU: (nn.GRU, {}),
    torch.nn.RNN: (nn.RNN, {}),
    torch.nn.LSTMCell: (nn.LSTMCell, {}),
    torch.nn.GRUCell: (nn.GRUCell, {}),
    torch.nn.RNNCell: (nn.RNNCell, {}),
}
_ORIGINALS = {layer: original for original, (layer, _) in _LAYERS.items()}
_MARK = "_pynn_patched"  # attribute of a module that `patch` changed, so that `unpatch` leaves the others alone


@dataclasses.dataclass(frozen=True)
class Layer:
    """One module of a patched model: its name in the model, its class before, and why it was kept ('' if replaced)."""

    name: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name:<48} {self.kind:<24} {self.reason or 'replaced'}"


@dataclasses.dataclass(frozen=True)
class Patched:
    """What `patch` did; printed, it is a table."""

    replaced: tuple[Layer, ...]
    kept: tuple[Layer, ...]

    def __str__(self) -> str:
        summary = f"{len(self.replaced)} layers replaced, {len(self.kept)} kept"
        return "\n".join([*map(str, self.replaced), *map(str, self.kept), summary])


def patch(model: torch.nn.Module) -> Patched:
    """Makes the torch.nn layers inside a model compute with pynn's kernels, in place.

    Replaced are torch.nn.Conv2d, ConvTranspose2d, GroupNorm, MultiheadAttention, LSTM, GRU, RNN and their cells, and
    the attention of a Hugging Face model whose implementation is "sdpa", or for which there is none, as with the soft
    caps of Gemma 2 and the sinks of gpt-oss (it becomes "pynn", without weights too). What
    else holds parameters of its own is kept, and so are subclasses of these layers, whose own code would be lost
    (parametrized layers among them). Outputs and gradients agree to rounding, but for the two differences that
    pynn.nn.MultiheadAttention documents. Patch a model before compiling or scripting it.

    Args:
        model: any module; a layer itself, too.
    Returns:
        The layers replaced, and those kept with the reason. A model that is patched already stays as it is.
    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    layers: list[Layer] = []
    inner: set[torch.nn.Module] = set()  # what is inside a model of transformers: its attention is changed as a whole
    for name, module in _modules("patch", model):
        kind = type(module)
        if _transformers_attention.is_model(module) and module not in inner:
            inner.update(module.modules())
            layers += _patch_attention(name, module)
        if kind in _LAYERS:
            layer, attributes = _LAYERS[kind]
            module.__class__ = layer
            for attribute, value in attributes.items():
                setattr(module, attribute, value)
            setattr(module, _MARK, True)
            layers.append(Layer(name, kind.__name__, ""))
        elif kind not in _ORIGINALS and any(True for _ in module.parameters(recurse=False)):
            layers.append(Layer(name, kind.__name__, _why_kept(module)))
    return Patched(tuple(x for x in layers if not x.reason), tuple(x for x in layers if x.reason))


def _patch_attention(name: str, model: torch.nn.Module) -> list[Layer]:
    """Of a model of transformers; empty when it is patched already."""
    if _transformers_attention.NAME in _transformers_attention.implementations(model):
        return []
    reason = _transformers_attention.why_kept(model)
    if not reason:
        (before,) = _transformers_attention.implementations(model)
        _transformers_attention.use(model, _transformers_attention.NAME)
        setattr(model, _MARK, before)
    return [Layer(name, f"{type(model).__name__} attention", reason)]


def unpatch(model: torch.nn.Module) -> Patched:
    """Takes `patch` back, in place: every layer that it replaced is torch.nn's again, with its present parameters.

    Args:
        model: a module that was patched, whole or in parts.
    Returns:
        The layers restored, as `replaced`; `kept` is empty.
    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    restored = []
    for name, module in _modules("unpatch", model):
        mark = module.__dict__.pop(_MARK, None)
        if mark is None:
            continue
        kind = type(module)
        if kind not in _ORIGINALS:  # a model of transformers
            _transformers_attention.use(module, mark)
            restored.append(Layer(name, f"{kind.__name__} attention", ""))
            continue
        original = _ORIGINALS[kind]
        for attribute in _LAYERS[original][1]:
            delattr(module, attribute)
        module.__class__ = original
        restored.append(Layer(name, kind.__name__, ""))
    return Patched(tuple(restored), ())


def _modules(function: str, model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"pynn.{function}: expected model to be a torch.nn.Module, got {type(model).__name__}")
    return list(model.named_modules())


def _why_kept(module: torch.nn.Module) -> str:
    base = next((original for original in _LAYERS if isinstance(module, original)), None)
    return (
        "no pynn layer of this kind" if base is None else f"a subclass of {base.__name__}: its own code would be lost"
    )
