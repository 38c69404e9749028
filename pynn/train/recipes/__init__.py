"""The recipes of `pynn train`: a model, real data, a loss, and the number it has to reach.

One file per family; each trains in seconds to minutes on one CPU thread and needs no network.
"""

from __future__ import annotations

from . import clip, cnn, mlp, rnn, seq2seq, transfer, transformer, tree
from ._recipe import Recipe

_FAMILIES = (mlp, cnn, rnn, seq2seq, tree, transformer, clip, transfer)
RECIPES: dict[str, type[Recipe]] = {recipe.name: recipe for family in _FAMILIES for recipe in family.RECIPES}


def get(name: str) -> type[Recipe]:
    """The recipe of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


__all__ = ["RECIPES", "Recipe", "get"]
