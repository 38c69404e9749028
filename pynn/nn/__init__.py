"""torch.nn-compatible layers on pynn kernels: the same constructors, state_dict names and errors."""

from .attention import MultiheadAttention
from .conv import Conv2d, ConvTranspose2d
from .normalization import GroupNorm

__all__ = ["Conv2d", "ConvTranspose2d", "GroupNorm", "MultiheadAttention"]
