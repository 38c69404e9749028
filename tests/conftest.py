"""Fixtures shared by every test: one thread, a fixed seed, and the backend an op runs on."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
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


@dataclasses.dataclass(frozen=True)
class Backend:
    name: str
    device: str


@pytest.fixture(params=["cpu", "cuda"])
def backend(request):
    """Runs the test once per backend; a backend that this machine lacks is skipped with the reason."""
    name = request.param
    if pynn.backends.unavailable[name]:
        pytest.skip(f"{name}: {pynn.backends.unavailable[name]}")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("cuda: no GPU")
    with pynn.backend(name):
        yield Backend(name, name)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)
