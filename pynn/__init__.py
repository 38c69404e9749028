"""pynn: fused neural-network kernels for PyTorch in C++, CUDA C++ and Triton."""

__version__ = "0.1.0"

from . import backends, diffusion, models, nn, ops
from .backends import backend, explain
from .patching import patch, unpatch
from .weights import WeightsError, export_weights, load_weights, save_weights

__all__ = [
    "WeightsError",
    "__version__",
    "backend",
    "backends",
    "diffusion",
    "explain",
    "export_weights",
    "load_weights",
    "models",
    "nn",
    "ops",
    "patch",
    "save_weights",
    "unpatch",
]
