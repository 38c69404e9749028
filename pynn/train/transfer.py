"""Transfer learning: what was learnt on one task as the start of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .fit import Batch, History, Settings, fit


def freeze(model: torch.nn.Module, names: Sequence[str]) -> list[str]:
    """Takes parts of a model out of training: `fit` leaves their parameters and their batch statistics as they are.

    Args:
        model: changed in place. names: of modules or parameters, as in `named_modules` ("" is all of it).
    Returns:
        The names of the parameters frozen.
    Raises:
        ValueError: a name with no parameters under it.
    """
    frozen = []
    for name in names:
        own = [key for key, _ in model.named_parameters() if not name or key == name or key.startswith(name + ".")]
        if not own:
            raise ValueError(f"freeze: expected the name of a part with parameters, got {name!r}")
        frozen += own
    for key in frozen:
        model.get_parameter(key).requires_grad_(False)
    return frozen


def replace_head(model: torch.nn.Module, head: torch.nn.Module, name: str | None = None) -> torch.nn.Module:
    """Puts another module in the place of a model's head.

    Args:
        model: changed in place. head: the new one. name: of the old one; the last torch.nn.Linear when None.
    Returns:
        The old head.
    Raises:
        ValueError: no such module, or a torch.nn.Linear of another in_features than the old one's.
    """
    modules = dict(model.named_modules())
    if name is None:
        linear = [key for key, module in modules.items() if isinstance(module, torch.nn.Linear)]
        if not linear:
            raise ValueError(f"replace_head: expected name, since {type(model).__name__} has no torch.nn.Linear")
        name = linear[-1]
    if not name or name not in modules:
        raise ValueError(f"replace_head: expected name to be that of a part of {type(model).__name__}, got {name!r}")
    old = modules[name]
    if isinstance(old, torch.nn.Linear) and isinstance(head, torch.nn.Linear) and old.in_features != head.in_features:
        raise ValueError(f"replace_head: expected head of {old.in_features} in_features, got {head.in_features}")
    model.set_submodule(name, head)
    return old


def finetune(
    model: torch.nn.Module,
    loss: Callable[..., torch.Tensor],
    batch: Callable[[int], Batch],
    settings: Settings,
    *,
    frozen: Sequence[str] = (),
    head: torch.nn.Module | None = None,
    **options: Any,
) -> History:
    """Trains a model further, with a new head and without its frozen parts.

    Args:
        model, loss, batch, settings: as `fit`'s. frozen: names for `freeze`. head: for `replace_head`; None keeps it.
        options: `fit`'s.
    Returns:
        The history of the training.
    Raises:
        ValueError: as freeze, replace_head and fit.
    """
    if head is not None:
        replace_head(model, head)
    freeze(model, frozen)
    return fit(model, loss, batch, settings, **options)
