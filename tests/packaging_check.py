"""make packaging: what a user gets from the release wheels in dist/, checked in fresh environments.

1. Contents: the top level is `pynn` and its dist-info; exactly this tree's modules and the kernel libraries that the
   version promises (+cpu, +cu13); the CUDA library holds every architecture (or those of PYNN_CUDA_ARCHS).
2. The libraries need torch's C shims and system libraries only: undefined symbols and needed libraries.
3. Each wheel imports and computes on this environment's torch, and on every `--torch VERSION` asked for, from PyPI: on
   Linux these are CUDA builds (gigabytes each; 2.11.0 is the oldest supported). Without a GPU the CUDA kernels must
   load and say clearly why they cannot run.
4. `pip install .` works with build isolation.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CPU_ISAS = ("baseline", "avx2", "avx512") if platform.machine() in ("x86_64", "AMD64") else ("baseline",)
CUDA_ARCHS = os.environ.get("PYNN_CUDA_ARCHS", "80 90a 100 120").split()  # as setup.py builds
CUDA_CODE = {*(f"sm_{arch}" for arch in CUDA_ARCHS), f"ptx sm_{'100' if '100' in CUDA_ARCHS else CUDA_ARCHS[-1]}"}
ALLOWED_SYMBOL = re.compile(
    r"^(aoti_torch_\w+|torch_\w+)$"  # the stable C shims of libtorch
    r"|@(GLIBC|GLIBCXX|CXXABI|GCC)_"  # versioned symbols of the system's C and C++ libraries
    r"|^_ZN?K?[RO]*St|^_ZNK?[RO]?St"  # the C++ standard library, bound to the copy that torch carries
    r"|^(_ITM_\w+|__gmon_start__|__cxa_finalize)$"
)
ALLOWED_LIBRARY = re.compile(
    r"^(libtorch|libtorch_cpu|libc10|libstdc\+\+|libgcc_s|lib(c|m|dl|rt|pthread)|ld-linux.*)\.so"
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
print("computes on torch", torch.__version__)
"""
NO_GPU_TEST = """
import torch, pynn
from torch._subclasses.fake_tensor import FakeTensorMode
from pynn.info import availability

assert not torch.cuda.is_available()
assert pynn.backends.unavailable["cuda"] == "", pynn.backends.unavailable["cuda"]
reasons = {op: reason for op, backend, reason in availability() if backend == "cuda"}
assert reasons["forward_jump"] == "torch sees no GPU", reasons

def message(call):
    try:
        call()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    raise SystemExit("a CUDA op ran without a GPU")

def forced():
    with pynn.backend("cuda"):
        pynn.ops.normal((4,), seed=0)

forced = message(forced)
assert "backend 'cuda' was forced but the tensor is on cpu" in forced, forced
created = message(lambda: pynn.ops.normal((4,), seed=0, device="cuda"))
assert "NVIDIA" in created or "not compiled with CUDA" in created, created
with FakeTensorMode():  # the ops still have shapes on CUDA tensors: models can be traced here
    x = torch.empty(4, 3, 8, device="cuda")
    t = torch.zeros(4, dtype=torch.int64, device="cuda")
    table = torch.empty(11, 2, dtype=torch.float64, device="cuda")
    y = pynn.ops.forward_jump(x, t, table, noise=x)
    assert y.device.type == "cuda" and y.shape == x.shape
print(f"CUDA kernels load without a GPU; a CUDA tensor: {created!r}")
"""


def run(*command: str | Path, **kwargs) -> str:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **kwargs)
    if result.returncode != 0:
        raise SystemExit(f"failed: {' '.join(map(str, command))}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    return result.stdout


def variant_of(wheel: Path) -> str:
    """cpu or cu13, from the version in the file name."""
    name = re.fullmatch(r"pynn_torch-[\d.]+\+(cpu|cu13)-py3-none-linux_\w+\.whl", wheel.name)
    assert name, (
        f"expected a wheel named pynn_torch-<version>+<cpu or cu13>-py3-none-linux_<machine>.whl, got {wheel.name}"
    )
    return name[1]


def expected_modules() -> set[str]:
    """The Python files of this tree as a wheel holds them."""
    pynn = {file.relative_to(ROOT).as_posix() for file in (ROOT / "pynn").rglob("*.py")}
    triton = {f"pynn/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "triton_kernels").glob("*.py")}
    return pynn - {"pynn/triton_kernels.py"} | triton


def check_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    wrong = {entry for entry in top if entry != "pynn" and not entry.endswith(".dist-info")}
    assert not wrong, f"unexpected top-level entries in the wheel: {sorted(wrong)}"
    libraries = {name for name in names if name.endswith(".so") and not name.startswith("pynn/_core.")}
    promised = {f"pynn/lib/libpynn_cpu_{isa}.so" for isa in CPU_ISAS}
    promised |= {"pynn/lib/libpynn_cuda.so"} if variant_of(wheel) == "cu13" else set()
    assert libraries == promised, f"{wheel.name} holds {sorted(libraries)}, expected {sorted(promised)}"
    modules = {name for name in names if name.endswith(".py")}
    difference = sorted(modules ^ expected_modules())
    assert not difference, f"{wheel.name} and this tree differ in {difference}"
    assert "pynn/py.typed" in names, "py.typed is missing: type checkers would ignore pynn's types"
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, {len(libraries)} libraries, {len(modules)} modules")


def check_libraries(wheel: Path, directory: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not re.search(r"libpynn_\w+\.so$", name):
                continue
            path = archive.extract(name, directory)
            symbols = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", path).splitlines()]
            wrong = [symbol for symbol in symbols if not ALLOWED_SYMBOL.search(symbol)]
            assert not wrong, f"{name} needs more than the stable ABI: {wrong[:10]}"
            needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", path))
            wrong = [library for library in needed if not ALLOWED_LIBRARY.search(library)]
            assert not wrong, f"{name} needs libraries that a user may not have: {wrong}"
            glibc = max(tuple(map(int, v.split("."))) for s in symbols for v in re.findall(r"@GLIBC_([\d.]+)", s))
            kinds = "all torch C shims or system libraries"
            print(f"  {Path(name).name}: {len(symbols)} undefined symbols, {kinds}", end="; ")
            print(f"glibc >= {'.'.join(map(str, glibc))}" + check_cuda_code(path))


def check_cuda_code(library: str) -> str:
    """Which GPUs a library has code for; needs the cuobjdump that Triton's package carries."""
    if "libpynn_cuda" not in library:
        return ""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return "; architectures not looked at (Triton's cuobjdump is not here)"
    listed = run(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump", "--list-elf", "--list-ptx", library)
    code = set(re.findall(r"\.(sm_\w+)\.cubin", listed)) | {f"ptx {a}" for a in re.findall(r"\.(sm_\w+)\.ptx", listed)}
    assert code == CUDA_CODE, f"{library} holds code for {sorted(code)}, expected {sorted(CUDA_CODE)}"
    return "; " + " ".join(sorted(code))


def environment(directory: Path, *requirements: str | Path) -> Path:
    """A fresh virtual environment with these requirements; returns its python."""
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", *requirements)
    return python


def test(python: Path, program: str) -> None:
    isolated = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    print("  " + run(python, "-c", program, cwd=python.parent, env=isolated).splitlines()[-1])


def check_on_torch(version: str, wheels: list[Path], directory: Path) -> None:
    python = environment(directory, f"torch=={version}", "numpy")
    for wheel in wheels:
        print(f"{variant_of(wheel)} wheel on torch {version}")
        run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)
        test(python, SMOKE_TEST)
        if variant_of(wheel) == "cu13":
            test(python, NO_GPU_TEST)
    shutil.rmtree(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="append", default=[], metavar="VERSION", help="also test on this torch")
    parser.add_argument("--no-isolation", action="store_true", help="leave out `pip install .` with build isolation")
    arguments = parser.parse_args()
    import torch

    here = torch.__version__.split("+")[0]
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    variants = {variant_of(wheel) for wheel in wheels}
    assert "cpu" in variants, "no wheels in dist/: run make wheel first"
    if "cu13" not in variants:
        print("there is no cu13 wheel in dist/ (make wheel found no CUDA toolkit): nothing about CUDA is checked")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        for wheel in wheels:
            check_contents(wheel)
            check_libraries(wheel, directory / wheel.stem)
        for version in [here, *arguments.torch]:
            check_on_torch(version, wheels, directory / f"torch-{version}")
        if not arguments.no_isolation:
            # The CUDA kernels were built above; once is enough.
            os.environ["PYNN_CUDA_ARCHS"] = ""
            print(f"pip install . with build isolation, torch {here}")
            test(environment(directory / "isolated", f"torch=={here}", "numpy", ROOT), SMOKE_TEST)


if __name__ == "__main__":
    main()
