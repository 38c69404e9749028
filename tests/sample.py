"""Running a part of many: the same one in every run, whatever else there is, so that a failure can be repeated."""

from __future__ import annotations

import zlib


def chosen(name: str, every: int) -> bool:
    """Whether `name` is in the sample that has about one in `every` of all names.

    A hash chooses: grids of parameters have periods, and each n-th of them could be the same dtype over and over.
    """
    return zlib.crc32(name.encode()) % every == 0
