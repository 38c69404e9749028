"""Importing what `pip install "pynn-torch[train]"` adds, with an error that says so when it is missing."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A package of the [train] extra is not installed."""


def require(module: str) -> ModuleType:
    """Imports a module of the [train] extra.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f'{module} is needed here ({error}): pip install "pynn-torch[train]"') from error
