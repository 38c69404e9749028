"""torch.nn-compatible layers on pynn kernels."""

from .conv import Conv2d

__all__ = ["Conv2d"]
