"""pynn: fused neural-network kernels for PyTorch in C++, CUDA C++ and Triton."""

from . import backends, nn, ops
from .backends import backend, explain

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "backends", "explain", "nn", "ops"]
