"""Fused ops, with the arguments of torch.nn.functional plus keyword-only extras."""

from .diffusion import diffusion_loss, forward_jump, forward_step, reverse_step
from .random import normal

__all__ = ["diffusion_loss", "forward_jump", "forward_step", "normal", "reverse_step"]
