"""Importing what `pip install "pynn-torch[train]"` adds, with an error that says so when it is missing."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


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


def progress_bar(*arguments: Any, enabled: bool, **options: Any) -> Any:
    """A tqdm bar on the terminal; in a log file a line now and then."""
    interval = 0.2 if sys.stderr.isatty() else 20.0
    tqdm = require("tqdm").tqdm
    return tqdm(*arguments, disable=not enabled, dynamic_ncols=True, mininterval=interval, **options)
