"""Fused ops, with the arguments of torch.nn.functional plus keyword-only extras."""

from .conv2d import conv2d
from .conv_transpose2d import conv_transpose2d
from .diffusion import diffusion_loss, forward_jump, forward_step, reverse_step
from .group_norm import group_norm
from . import recurrent  # noqa: F401  (registers the ops)
from .random import normal
from .scaled_dot_product_attention import scaled_dot_product_attention

__all__ = [
    "conv2d",
    "conv_transpose2d",
    "diffusion_loss",
    "forward_jump",
    "forward_step",
    "group_norm",
    "normal",
    "reverse_step",
    "scaled_dot_product_attention",
]
