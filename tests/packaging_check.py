"""make packaging: what a user gets from the wheel, checked in fresh environments.

1. One wheel is built here; its top level is `pynn` and its dist-info, nothing else.
2. The kernel libraries' undefined symbols are torch's C shims and system libraries only.
3. The same wheel imports and computes in a fresh environment with this environment's torch, and with every
   `--torch VERSION` asked for (2.11.0 is the oldest supported; outside of CI, because it downloads gigabytes).
4. `pip install .` works with build isolation.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALLOWED_SYMBOL = re.compile(
    r"^(aoti_torch_\w+|torch_\w+)$"  # the stable C shims of libtorch
    r"|@(GLIBC|GLIBCXX|CXXABI|GCC)_"  # versioned symbols of the system's C and C++ libraries
    r"|^_ZN?K?[RO]*St|^_ZNK?[RO]?St"  # the C++ standard library, bound to the copy that torch carries
    r"|^(_ITM_\w+|__gmon_start__|__cxa_finalize)$"
)
SMOKE_TEST = """
import torch, pynn
x, w = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3)
y = pynn.ops.conv2d(x, w, padding=1, activation="silu")
torch.testing.assert_close(y, torch.nn.functional.silu(torch.conv2d(x, w, padding=1)), rtol=1e-4, atol=1e-4)
y.sum().backward()
process = pynn.diffusion.GaussianDiffusion(pynn.diffusion.Schedule.cosine(8), "v")
model = pynn.models.UNet(1, channels=16, num_classes=10)
loss = process.loss(model, torch.rand(4, 1, 8, 8) * 2 - 1, class_labels=torch.arange(4))
loss.backward()
labels = torch.arange(2)
assert process.sample(model, (2, 1, 8, 8), seed=0, class_labels=labels).isfinite().all()
from pynn.info import main
assert main() == 0
print("smoke test passed on torch", torch.__version__)
"""


def run(*command: str | Path, **kwargs) -> str:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **kwargs)
    if result.returncode != 0:
        raise SystemExit(f"failed: {' '.join(map(str, command))}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    return result.stdout


def build_wheel(directory: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", directory, ROOT)
    (wheel,) = directory.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    wrong = {entry for entry in top if entry != "pynn" and not entry.endswith(".dist-info")}
    assert not wrong, f"unexpected top-level entries in the wheel: {sorted(wrong)}"
    libraries = [name for name in names if name.endswith(".so")]
    assert any("libpynn_cpu_baseline" in name for name in libraries), f"no CPU kernels in the wheel: {libraries}"
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, {len(libraries)} libraries, top level {sorted(top)}")


def check_symbols(wheel: Path, directory: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not re.search(r"libpynn_\w+\.so$", name):
                continue
            path = archive.extract(name, directory)
            symbols = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", path).splitlines()]
            wrong = [symbol for symbol in symbols if not ALLOWED_SYMBOL.search(symbol)]
            assert not wrong, f"{name} needs more than the stable ABI: {wrong[:10]}"
            print(f"{name}: {len(symbols)} undefined symbols, all torch C shims or system libraries")


def environment(directory: Path, *requirements: str | Path) -> Path:
    """A fresh virtual environment with these requirements; returns its python."""
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", *requirements)
    return python


def smoke_test(python: Path) -> None:
    isolated = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    print(run(python, "-c", SMOKE_TEST, cwd=python.parent, env=isolated).splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="append", default=[], metavar="VERSION", help="also test on this torch")
    parser.add_argument("--no-isolation", action="store_true", help="leave out `pip install .` with build isolation")
    arguments = parser.parse_args()
    import torch

    here = torch.__version__.split("+")[0]
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        wheel = build_wheel(directory / "wheel")
        check_contents(wheel)
        check_symbols(wheel, directory / "unpacked")
        for version in [here, *arguments.torch]:
            smoke_test(environment(directory / f"torch-{version}", f"torch=={version}", "numpy", wheel))
            shutil.rmtree(directory / f"torch-{version}")
        if not arguments.no_isolation:
            archs = {**os.environ, "PYNN_CUDA_ARCHS": ""}  # the CUDA kernels were built above; once is enough
            os.environ.update(archs)
            smoke_test(environment(directory / "isolated", f"torch=={here}", "numpy", ROOT))


if __name__ == "__main__":
    main()
