"""Models built on pynn layers."""

from .unet import UNet

__all__ = ["UNet"]
