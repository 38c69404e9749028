"""Builds the kernel libraries with ninja and ships them inside the package.

Products, all under pynn/:
    lib/libpynn_cpu_<isa>.so   csrc/ops + csrc/cpu, once per instruction set; one of them is loaded at run time
    lib/libpynn_cuda.so        csrc/ops + csrc/cuda, when nvcc is found (a CPU-only torch is enough, no GPU is needed)
    lib/libpynn_sim.so         csrc/ops + csrc/cuda compiled by the host compiler over csrc/sim: a test tool for source
                               trees (--inplace), never part of a wheel; needs no CUDA toolkit
    _core.<python tag>.so      build facts and CPU features; the only file that depends on the Python version

Environment: PYNN_CUDA_ARCHS ("80 90a"; empty builds no CUDA library), CUDA_HOME, MAX_JOBS; PYNN_WHEEL_VARIANT ("cpu" or
"cu13": a wheel for release, which says so in its version and holds exactly that; see docs/wheels.md).
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
VARIANT = os.environ.get("PYNN_WHEEL_VARIANT", "")
VERSION = "0.1.0" + (f"+{VARIANT}" if VARIANT else "")
TORCH_TARGET = "0x020b000000000000"  # the binaries load on torch 2.11 and every later release
# The code for sm_80 runs on 86 and 89 too: to compile for them as well takes half as long again.
CUDA_ARCHS = "" if VARIANT == "cpu" else "80 90a 100 120"

CPU_ISAS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    CPU_ISAS["avx2"] = ["-march=x86-64-v3"]
    CPU_ISAS["avx512"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]

# Contraction is off so that a*b+c rounds twice on every machine: the random normals must be bit-identical.
# Kernels that want a fused multiply-add call fma() from csrc/cpu/vec.h.
CXX_FLAGS = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -ffp-contract=off -fno-math-errno "
    "-fno-trapping-math -Wall -Wextra -Wno-unused-parameter -Wno-missing-field-initializers -Wno-maybe-uninitialized "
    "-Wno-uninitialized -Wno-psabi"
)
NVCC_FLAGS = (
    "-std=c++20 -O3 --fmad=false -Xcompiler -fPIC,-fvisibility=hidden -Werror all-warnings --expt-relaxed-constexpr "
    "-DPYNN_CUDA"
)

LAUNCHER = {"conv_transpose2d": "conv2d"}  # ops that run the launchers of another op

# Architectures that take the PTX of an earlier one, when both are built: nvcc then compiles the source once for them.
PTX_OF = {"86": "80", "89": "80", "120": "100"}


def torch_directory():
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError(
            "building pynn needs torch >= 2.11 for its headers: install it first, or drop --no-build-isolation"
        )
    return Path(spec.origin).parent


def cuda_home():
    """A CUDA toolkit with a compiler, headers and the static runtime, or None."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parents[1] if nvcc else None, "/usr/local/cuda"]
    needed = ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a")
    for home in (Path(candidate) for candidate in candidates if candidate):
        if all((home / file).exists() for file in needed):
            return home
    if nvcc:
        print(f"{nvcc} found, but no toolkit around it: set CUDA_HOME to build the CUDA kernels", file=sys.stderr)
    return None


def check_variant(cuda, archs):
    """A release wheel holds what its version says, or is not built."""
    if VARIANT not in ("", "cpu", "cu13"):
        raise ValueError(f"PYNN_WHEEL_VARIANT: expected cpu or cu13, got {VARIANT!r}")
    if VARIANT == "cpu" and archs:
        raise RuntimeError(f"PYNN_WHEEL_VARIANT=cpu holds no CUDA kernels, but PYNN_CUDA_ARCHS asks for {archs}")
    if VARIANT == "cu13":
        if not archs:
            raise RuntimeError("PYNN_WHEEL_VARIANT=cu13 needs a CUDA 13 toolkit and a list of architectures")
        version = subprocess.run([cuda / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        if "release 13." not in version:
            raise RuntimeError(f"PYNN_WHEEL_VARIANT=cu13 needs CUDA 13, got {version.strip().splitlines()[-1]}")


def quote(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def gencode(archs):
    """nvcc's options for a list of architectures: code for each, and the newest PTX for those to come."""
    codes = {}  # virtual architecture -> what is made of its PTX
    for arch in archs:
        codes.setdefault(PTX_OF[arch] if PTX_OF.get(arch) in archs else arch, []).append(f"sm_{arch}")
    newest = list(codes)[-1]
    codes[newest].append(f"compute_{newest}")
    return [f"-gencode 'arch=compute_{virtual},code=[{','.join(code)}]'" for virtual, code in codes.items()]


class Ninja:
    """Collects rules and edges of a build.ninja file."""

    def __init__(self):
        self.lines = ["ninja_required_version = 1.5"]

    def rule(self, name, command, depfile=True):
        self.lines += [f"rule {name}", f"  command = {command}", "  description = " + name + " $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def edge(self, out, rule, inputs, **variables):
        self.lines.append(f"build {quote(out)}: {rule} {' '.join(quote(i) for i in inputs)}")
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]


class BuildLibraries(build_ext):
    def run(self):
        package = ROOT / "pynn" if self.inplace else Path(self.build_lib).resolve() / "pynn"
        temp = ROOT / "build" / "ninja"
        temp.mkdir(parents=True, exist_ok=True)
        (package / "lib").mkdir(parents=True, exist_ok=True)
        ninja = self.describe(temp, package)
        (temp / "build.ninja").write_text("\n".join(ninja.lines) + "\n")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        # The environment's own first: another version's log of the build is not read, and everything is built again.
        beside = shutil.which("ninja", path=str(Path(sys.executable).parent))
        program = beside or shutil.which("ninja")
        command = [program] if program else [sys.executable, "-m", "ninja"]
        subprocess.check_call([*command, "-C", str(temp), "-j", jobs])

    def describe(self, temp, package):
        torch = torch_directory()
        # Only csrc/ops sees torch: the kernels need not be compiled again for another one.
        with_torch = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        with_torch += [f"-I{quote(torch / path)}" for path in ("include", "include/torch/csrc/api/include")]
        link = f"-L{quote(torch / 'lib')} -ltorch -ltorch_cpu -lc10 -Wl,-Bsymbolic -Wl,--as-needed -s"
        cxx = os.environ.get("CXX", "g++")
        ninja = Ninja()
        include = f"-I{quote(ROOT / 'csrc/include')}"
        ninja.rule("cxx", f"{cxx} -MD -MF $out.d {CXX_FLAGS} $flags {include} -c $in -o $out")
        ninja.rule("link", f"{cxx} -shared $in -o $out $flags {link}", depfile=False)
        ops, cpu = sorted((ROOT / "csrc/ops").glob("*.cpp")), sorted((ROOT / "csrc/cpu").glob("*.cpp"))

        sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))

        # First, because nvcc takes the longest.
        archs = os.environ.get("PYNN_CUDA_ARCHS", CUDA_ARCHS).split()
        cuda = cuda_home()
        built_archs = archs if cuda and sources else []
        if built_archs:
            ninja.rule(
                "nvcc",  # what it keeps is what `make aot` measures
                f"rm -rf $out.kept && mkdir -p $out.kept && {quote(cuda / 'bin/nvcc')} -MD -MF $out.d {NVCC_FLAGS} "
                f"--compress-mode=size --threads 2 --keep --keep-dir $out.kept {include} "
                f"{' '.join(gencode(archs))} -c $in -o $out",
            )
            flags = ["-DPYNN_CUDA", "-DUSE_CUDA", f"-I{quote(cuda / 'include')}", *with_torch]
            objects = self.compile(ninja, temp / "cuda", "nvcc", sources, [])
            objects += self.compile(ninja, temp / "cuda_ops", "cxx", self.with_kernels(ops, sources), flags)
            runtime = f"-L{quote(cuda / 'lib64')} -lcudart_static -lrt -ldl -lpthread"
            ninja.edge(package / "lib/libpynn_cuda.so", "link", objects, flags=runtime)

        if self.inplace and sources:  # before the CPU kernels: no other file of theirs takes as long as one of these
            # -O1: the tests take as long as with -O3, which takes three times as long to compile.
            ninja.rule(
                "cxx_cuda",
                f"{cxx} -x c++ -MD -MF $out.d {CXX_FLAGS} -O1 -Wno-unknown-pragmas -DPYNN_SIM {include} -c $in -o $out",
            )
            runtime = sorted((ROOT / "csrc/sim").glob("*.cpp"))
            launched = self.with_kernels(ops, sources)
            objects = self.compile(ninja, temp / "sim", "cxx", launched, ["-O1", "-DPYNN_SIM", *with_torch])
            objects += self.compile(ninja, temp / "sim", "cxx", runtime, ["-DPYNN_SIM"])
            objects += self.compile(ninja, temp / "sim", "cxx_cuda", sources, [])
            ninja.edge(package / "lib/libpynn_sim.so", "link", objects)

        checked = self.compile(ninja, temp / "cpu_ops", "cxx", ops, with_torch)  # once: nothing in them is worth an ISA
        for isa, flags in CPU_ISAS.items():
            objects = self.compile(ninja, temp / f"cpu_{isa}", "cxx", cpu, flags)
            ninja.edge(package / f"lib/libpynn_cpu_{isa}.so", "link", [*objects, *checked])

        check_variant(cuda, built_archs)
        self.describe_core(ninja, temp, package, built_archs)
        return ninja

    @staticmethod
    def with_kernels(ops, sources):
        """The csrc/ops files whose op has a CUDA launcher, its own or another op's."""
        have = {source.stem for source in sources}
        return [op for op in ops if LAUNCHER.get(op.stem, op.stem) in have]

    @staticmethod
    def compile(ninja, directory, rule, sources, flags):
        objects = []
        for source in sources:
            objects.append(directory / f"{source.parent.name}_{source.stem}.o")
            ninja.edge(objects[-1], rule, [source], flags=" ".join(flags))
        return objects

    @staticmethod
    def describe_core(ninja, temp, package, archs):
        python = Path(sysconfig.get_paths()["include"])
        if importlib.util.find_spec("pybind11") is None or not (python / "Python.h").exists():
            print("pynn._core is left out: pybind11 or Python.h is missing (pynn works without it)", file=sys.stderr)
            return
        import pybind11

        facts = {
            "VERSION": VERSION,
            "CUDA_ARCHS": " ".join(archs),
            "CPU_ISAS": " ".join(CPU_ISAS),
        }
        flags = [f'-D"PYNN_{key}=\\"{value}\\""' for key, value in facts.items()]
        flags += [f"-I{quote(python)}", f"-I{quote(pybind11.get_include())}"]
        target = temp / f"core_{sysconfig.get_config_var('SOABI')}"
        objects = BuildLibraries.compile(ninja, target, "cxx", [ROOT / "csrc/core.cpp"], flags)
        ninja.rule("link_core", "g++ -shared $in -o $out -s", depfile=False)
        ninja.edge(package / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}", "link_core", objects)

    def get_outputs(self):
        return []


class BuildPython(build_py):
    def run(self):
        if not self.editable_mode:  # nothing of an earlier build may get into this wheel
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()

    def find_package_modules(self, package, package_dir):
        """Without pynn/triton_kernels.py, which stands in for the package of that name in a source tree."""
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[:2] != ("pynn", "triton_kernels")]


class BuildWheel(bdist_wheel):
    def get_tag(self):
        """A release wheel serves every Python: pynn._core, which serves one, is optional."""
        python, abi, platform_tag = super().get_tag()
        return ("py3", "none", platform_tag) if VARIANT else (python, abi, platform_tag)


PACKAGES = ["pynn", "pynn.choices", "pynn.ops", "pynn.nn", "pynn.models", "pynn.diffusion"]
PACKAGES += ["pynn.train", "pynn.train.recipes"]
PACKAGE_DIRECTORIES = {}
if (ROOT / "triton_kernels").is_dir():
    PACKAGES.append("pynn.triton_kernels")
    PACKAGE_DIRECTORIES["pynn.triton_kernels"] = "triton_kernels"

setup(
    version=VERSION,
    packages=PACKAGES,
    package_dir=PACKAGE_DIRECTORIES,
    package_data={"pynn": ["py.typed"], "pynn.choices": ["*.csv"], "pynn.train": ["*.csv"]},
    ext_modules=[Extension("pynn.kernels", [])],  # marks the wheel as platform-specific; BuildLibraries does the work
    cmdclass={"build_ext": BuildLibraries, "build_py": BuildPython, "bdist_wheel": BuildWheel},
)
