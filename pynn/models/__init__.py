"""Models built on pynn layers."""

from .cnn import (
    VGG,
    AlexNet,
    BasicBlock,
    Bottleneck,
    CausalConv1d,
    GoogLeNet,
    GoogLeNetOutputs,
    LeNet,
    ReceptiveField,
    ResNet,
    ZFNet,
    conv_output_size,
    gabor_bank,
    haar_bank,
    receptive_field,
    resnet18,
    resnet50,
    vgg16,
)
from .segmentation import SegmentationUNet
from .unet import UNet

__all__ = [
    "VGG",
    "AlexNet",
    "BasicBlock",
    "Bottleneck",
    "CausalConv1d",
    "GoogLeNet",
    "GoogLeNetOutputs",
    "LeNet",
    "ReceptiveField",
    "ResNet",
    "SegmentationUNet",
    "UNet",
    "ZFNet",
    "conv_output_size",
    "gabor_bank",
    "haar_bank",
    "receptive_field",
    "resnet18",
    "resnet50",
    "vgg16",
]
