"""make gpu-carry: what a GPU machine needs beside the tracked files to run `make gpu` without building anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CARRIED = ("pynn/lib", "build/primitives_check", "build/revision")
LIMIT = 64 << 20  # bytes, tracked files and these together


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout


def problems(sizes: dict[str, int], total: int) -> list[str]:
    """What stands in the way of carrying these."""
    found = [f"{name} is missing or empty" for name, size in sizes.items() if not size]
    if total > LIMIT:
        found.append(f"{total / 2**20:.1f} MiB in all are more than {LIMIT >> 20}")
    return found


def main() -> int:
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "revision").write_text(git("describe", "--always", "--dirty"))
    sizes = {name: size_of(ROOT / name) for name in CARRIED}
    tracked = git("ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    total = sum(sizes.values()) + sum(size_of(ROOT / name) for name in tracked)
    for name, size in sizes.items():
        print(f"{name:<24} {size / 2**20:6.2f} MiB")
    print(f"{'with the tracked files':<24} {total / 2**20:6.2f} MiB")
    found = problems(sizes, total)
    print("\n".join(found) if found else "carry: " + " ".join(CARRIED))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
