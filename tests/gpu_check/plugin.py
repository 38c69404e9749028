"""What `make gpu` adds to pytest: an end in time, failures at once, and no process that goes on with a broken GPU.

    python -m pytest -p gpu_check.plugin --time-limit S ...

Tests come in the order of a hash, so that those before the limit are a sample of all of them; the others are skipped.
A failure is printed when it happens, for a log that may be cut short. An error like an illegal address stays with the
process: its test fails, and a worker of pytest-xdist then ends, so that another one goes on with the next test.
"""

from __future__ import annotations

import os
import sys
import time
import zlib

import pytest

OUT_OF_TIME = "out of time"
STOP = pytest.StashKey[float]()  # the time after which no test begins
_LINES = 40  # of a failure


def pytest_addoption(parser):
    parser.addoption("--time-limit", type=float, metavar="S", help="skip what has not begun after this many seconds")


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        config.stash[STOP] = config.workerinput["stop"]
        return
    limit = config.getoption("--time-limit")
    config.stash[STOP] = time.time() + limit if limit else float("inf")
    config.pluginmanager.register(_Failures(config))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_configure_node(node):
    node.workerinput["stop"] = node.config.stash[STOP]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if time.time() > item.config.stash[STOP]:
        pytest.skip(OUT_OF_TIME)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    synchronize()  # an error of a kernel is its test's
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    result = yield
    if hasattr(item.config, "workerinput") and is_broken():
        os._exit(1)
    return result


def synchronize() -> None:
    torch = sys.modules.get("torch")  # whoever has not imported it has launched nothing
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def is_broken() -> bool:
    """Whether the GPU refuses everything that this process asks for."""
    try:
        synchronize()
    except RuntimeError:
        return True
    return False


class _Failures:
    """Prints what failed, and its last lines."""

    def __init__(self, config):
        self._config = config

    def pytest_runtest_logreport(self, report):
        if report.failed:
            lines = str(report.longrepr).splitlines()[-_LINES:]
            terminal = self._config.pluginmanager.get_plugin("terminalreporter")
            terminal.write_line("\n".join([f"\n::: {report.nodeid} {report.when} failed", *lines]), flush=True)
