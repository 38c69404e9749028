"""pynn: fused neural-network kernels for PyTorch in C++, CUDA C++ and Triton."""

__version__ = "0.1.0"

from . import backends, diffusion, models, nn, ops
from .backends import backend, explain
from .patching import patch, unpatch

__all__ = ["__version__", "backend", "backends", "diffusion", "explain", "models", "nn", "ops", "patch", "unpatch"]
