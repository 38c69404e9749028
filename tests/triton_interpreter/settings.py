"""Switches of the interpreter. Tests change them with `override`, a shell with the variables named below."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

CHOICES = {
    "program_order": ("forward", "reverse", "shuffled"),
    "extent": ("view", "storage"),
    "autotune": ("all", "first"),
    "autotune_compare": ("tolerance", "bitwise"),
}


@dataclasses.dataclass
class Settings:
    """Every check is on by default.

    program_order: the order in which the programs of a grid run. TRITON_INTERPRETER_ORDER sets the initial value.
    seed: of the shuffled order. TRITON_INTERPRETER_SEED sets the initial value.
    extent: a pointer may reach the bytes of its tensor ("view"), or of the whole storage behind it ("storage").
    races: report bytes shared by two programs without an atomic that orders them.
    allowed_races: kernel name -> argument names whose races are accepted (see README.md on locks).
    hints: check what tl.multiple_of and tl.max_contiguous promise.
    poison: fill lanes that tl.load masks off without `other`, and report them when they are stored.
    autotune: run every configuration of an autotuned kernel, or the first one only.
    autotune_compare: how equal the results of two configurations must be.
    cooperative_programs: how many programs of a cooperative launch run at once; by default one on each processor of an
        H200.
    """

    program_order: str = "forward"
    seed: int = 0
    extent: str = "view"
    races: bool = True
    allowed_races: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    hints: bool = True
    poison: bool = True
    autotune: str = "all"
    autotune_compare: str = "tolerance"
    cooperative_programs: int = 132

    def validate(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


settings = Settings(
    program_order=os.environ.get("TRITON_INTERPRETER_ORDER", "forward"),
    seed=int(os.environ.get("TRITON_INTERPRETER_SEED", "0")),
)
settings.validate()


@contextlib.contextmanager
def override(**changes: object) -> Iterator[Settings]:
    """Changes settings in a `with` block. Raises TypeError for an unknown name, ValueError for an unknown choice."""
    known = {field.name for field in dataclasses.fields(Settings)}
    if unknown := sorted(changes.keys() - known):
        raise TypeError(f"unknown settings {unknown}, known are {sorted(known)}")
    before = {name: getattr(settings, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(settings, name, value)
        settings.validate()
        yield settings
    finally:
        for name, value in before.items():
            setattr(settings, name, value)
