"""Makes sure that the kernel libraries load here: the carried ones, or new ones built for this GPU.

The program that compares the PTX wrappers with their twins is built too when it was not carried; without it only the
part that runs it fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROBE = "import pynn; u = pynn.backends.unavailable; print(u['cpu'] or u['cuda'])"


def reason() -> str:
    """'' when a fresh process loads the CPU and the CUDA library, otherwise why not."""
    result = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else result.stderr.strip().splitlines()[-1]


def arch_of(major: int, minor: int) -> str:
    """The entry of PYNN_CUDA_ARCHS for a compute capability: Hopper's own instructions need the 'a' variant."""
    return f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def build_primitives() -> None:
    if not (ROOT / "build" / "primitives_check").exists():
        subprocess.run(["make", "primitives-check", f"BIN={Path(sys.executable).parent}"], cwd=ROOT, check=False)


def main() -> int:
    build_primitives()
    why = reason()
    if not why:
        print("the libraries in pynn/lib load")
        return 0
    print(f"building here, because: {why}", flush=True)
    import torch

    environment = {**os.environ, "PYNN_CUDA_ARCHS": arch_of(*torch.cuda.get_device_capability())}
    environment["MAX_JOBS"] = str(os.cpu_count() or 1)
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)
    why = reason()
    print(why or "built here; the libraries load")
    return int(bool(why))


if __name__ == "__main__":
    sys.exit(main())
