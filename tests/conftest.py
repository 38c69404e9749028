"""Fixtures shared by every test: one thread, a fixed seed, and the backend an op runs on.

A test that takes `backend` has a variant for each backend that this process can run: cpu and sim, with a GPU cuda and
triton too. The Triton kernels are interpreted in a process of their own (TRITON_INTERPRET=1 python -m pytest -k
interpret). The head of the report tells why others are left out.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import warnings
import zlib

import pytest
import sample
import simulator
import torch
from hypothesis import HealthCheck, settings

import pynn

settings.register_profile(
    "pynn",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("pynn")
warnings.filterwarnings("ignore", message=".*lazy loading.*")


if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter

    triton_interpreter.install()  # before a kernel module is imported


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, help="run one in so many variants of each test function")


@pytest.hookimpl(trylast=True)  # of what -k and -m left
def pytest_collection_modifyitems(config, items):
    """Keeps a sample of the variants of each test function, and at least one."""
    every = config.getoption("every")
    if every == 1:
        return
    functions = collections.defaultdict(list)
    for item in items:
        functions[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for variants in functions.values():
        kept.update([item for item in variants if sample.chosen(item.nodeid, every)] or variants[:1])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@dataclasses.dataclass(frozen=True)
class Backend:
    name: str
    device: str

    @property
    def ops(self):
        """The dispatcher namespace of this backend, for tests that call its ops directly."""
        return getattr(torch.ops, pynn.backends.namespace_of(self.name))


def _schedule(name, test):
    """On the sim, every test has its own order of CUDA threads and blocks: no result may depend on it."""
    if name != "sim":
        return contextlib.nullcontext()
    return simulator.schedule(simulator.SHUFFLED, seed=zlib.crc32(test.encode()), resident_blocks=2)


OF_OURS = [name for name in pynn.backends.BACKENDS if name not in ("auto", "library")]


def pytest_report_header(config):
    reasons = {name: _why_not_here(name) for name in OF_OURS}
    return [f"backend {name}: {reason or 'tested'}" for name, reason in reasons.items()]


def _why_not_here(name):
    return pynn.backends.why_not("forward_jump_fwd", name)  # every backend has this one


def pytest_generate_tests(metafunc):
    """A variant for each backend of ours that runs the test's op here: ten thousand skipped tests would take a minute.

    The op is the test module's: test_<op>.py tests the kernel <op>_fwd, or the one the module names as KERNEL.
    tests/test_choices.py has the library's.
    """
    if "backend" not in metafunc.fixturenames or "backend" in _marked(metafunc):
        return
    kernel = getattr(metafunc.module, "KERNEL", metafunc.module.__name__.rpartition("test_")[2] + "_fwd")
    names = [name for name in OF_OURS if not pynn.backends.why_not(kernel, name)]
    metafunc.parametrize("backend", names, indirect=True)


def _marked(metafunc):
    """What the test's own marks parametrize."""
    return [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]


@pytest.fixture
def backend(request):
    """The backend that serves the test's calls of ops."""
    name = request.param
    with pynn.backend(name), _schedule(name, request.node.name):
        yield Backend(name, pynn.backends.device_of(name))


@pytest.fixture
def cpu_kernels():
    """Runs a test on the C++ kernels, whatever the choice table says of its shapes."""
    with pynn.backend("cpu"):
        yield


def pytest_terminal_summary(terminalreporter):
    """How many tests did not run, by reason: one line each instead of one per test."""
    skipped = collections.Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in skipped.most_common():
        terminalreporter.write_line(f"{count:6} {reason}")


@pytest.fixture(autouse=True)
def _reproducible():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)
