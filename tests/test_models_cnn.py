"""Convolutional models: against torchvision's with the same weights, formulas against measured facts, errors."""

import copy
import math

import peers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pynn
from pynn.models import (
    VGG,
    AlexNet,
    BasicBlock,
    Bottleneck,
    CausalConv1d,
    GoogLeNet,
    LeNet,
    ResNet,
    SegmentationUNet,
    ZFNet,
    conv_output_size,
    gabor_bank,
    haar_bank,
    receptive_field,
    resnet18,
    resnet50,
    vgg16,
)

# Ours, torchvision's name and arguments, size of the image. Dropout is off: its draws differ.
PEERS = {
    "alexnet": (lambda: AlexNet(10, dropout=0.0), "alexnet", {"dropout": 0.0}, 64),
    "vgg16": (lambda: vgg16(10, dropout=0.0), "vgg16", {"dropout": 0.0}, 32),
    "googlenet": (
        lambda: GoogLeNet(10, dropout=0.0, dropout_aux=0.0),
        "googlenet",
        {"dropout": 0.0, "dropout_aux": 0.0, "init_weights": False},
        48,
    ),
    "resnet18": (lambda: resnet18(10), "resnet18", {}, 64),
    "resnet50": (lambda: resnet50(10), "resnet50", {}, 64),
}


def twins(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """Ours and torchvision's with the same random weights, drawn once since some models are large, and images."""
    make, peer, options, size = PEERS[name]
    torchvision = peers.load("torchvision")
    with torch.device("meta"):
        ours, theirs = make(), getattr(torchvision.models, peer)(num_classes=10, **options)
    theirs.to_empty(device="cpu")
    peers.randomise(theirs)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked.zero_()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.to_empty(device="cpu")
    assert pynn.load_weights(ours, theirs.state_dict()) == "pynn"
    return ours, theirs, torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name", PEERS)
def test_same_outputs_and_gradients_as_torchvision(name):
    ours, theirs, x = twins(name)
    with torch.no_grad():
        peers.assert_close(*(model.eval()(x) for model in (ours, theirs)))
    # Gradients in float64: where an input of a ReLU or two of a maximum are within a rounding, float32 tosses a coin.
    outputs = [model.double()(x.double()) for model in (ours, theirs)]
    peers.assert_close(*outputs, bound=1e-9)
    for output in outputs:
        peers.backward(output)
    gradients = [
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in (ours, theirs)
    ]
    peers.assert_gradients_close(*gradients, bound=1e-9)
    del gradients, outputs
    theirs.load_state_dict(pynn.export_weights(ours, "torchvision"))  # strict: the way back


@pytest.mark.parametrize("name", ["googlenet", "resnet18", "resnet50"])
def test_same_training_step_as_torchvision(name):
    """In float64: batch statistics of two images magnify rounding."""
    ours, theirs, x = twins(name)
    ours, theirs, x = ours.double().train(), theirs.double().train(), x.double()
    got, truth = ours(x), theirs(x)
    if name == "googlenet":
        assert got._fields == truth._fields
        got, truth = torch.cat(got), torch.cat(truth)
    peers.assert_close(got, truth, bound=1e-9)
    for output in (got, truth):
        peers.backward(output)
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (ours, theirs)]
    peers.assert_gradients_close(*gradients, bound=1e-7)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


def test_vgg_with_batch_normalisation():
    torchvision = peers.load("torchvision")
    with torch.device("meta"):
        cfg = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
        ours, theirs = VGG(cfg, batch_norm=True), torchvision.models.vgg11_bn()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours, theirs = (model.features.to_empty(device="cpu").double() for model in (ours, theirs))
    peers.randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    peers.assert_close(ours(x), theirs(x), bound=1e-9)


def test_activations_run_inside_the_convolutions():
    with pynn.explain() as calls, torch.no_grad():
        AlexNet(2)(torch.randn(1, 3, 64, 64))
    assert [call.op for call in calls] == ["conv2d_fwd"] * 5
    assert not any(isinstance(module, nn.ReLU) for module in AlexNet(2).features)


def test_patched_resnet50():
    torchvision = peers.load("torchvision")
    model = torchvision.models.resnet50(num_classes=4).eval()
    x = torch.randn(2, 3, 48, 48)
    truth = model(x)
    assert len(pynn.patch(model).replaced) == 53
    peers.assert_close(model(x), truth)
    pynn.unpatch(model)
    assert torch.equal(model(x), truth)


def test_patched_bottlenecks_train_alike():
    """In float64: in float32 an activation within rounding of ReLU's kink goes the other way now and then."""
    torchvision = peers.load("torchvision")
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1])
    model.layer4, model.fc = nn.Identity(), nn.Linear(1024, 4)
    x, target = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)

    def loss_of(model):
        return F.cross_entropy(model(x), target)

    peers.assert_patch_is_faithful(model.double(), lambda model: model(x), loss_of, {"conv2d_fwd"}, lr=1e-3)


SMALL = {
    "LeNet": (lambda: LeNet(), (1, 28, 28), 10),
    "LeNet tanh": (lambda: LeNet(5, 3, 32, "tanh"), (3, 32, 32), 5),
    "mini ResNet": (lambda: ResNet(BasicBlock, [1, 1, 1], 10, 1, 16, "small"), (1, 28, 28), 10),
    "mini Bottleneck": (lambda: ResNet(Bottleneck, [1, 1], 3, 2, 4), (2, 32, 40), 3),
    "VGG": (lambda: VGG((4, "M", 8), 3), (3, 16, 16), 3),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_models_learn_and_return_logits(name):
    make, shape, classes = SMALL[name]
    torch.manual_seed(1)
    model, x, target = make(), torch.randn(6, *shape), torch.arange(6) % classes
    model.eval()  # without dropout and batch statistics, the loss must fall on every model
    found = peers.losses(model, lambda model: F.cross_entropy(model(x), target), steps=12, lr=0.02)
    assert found.isfinite().all()
    assert found[-1] < found[0]
    assert model(x).shape == (6, classes)


def test_zfnet_has_the_sizes_of_the_paper():
    model, x, sizes = ZFNet(7), torch.randn(1, 3, 224, 224), []
    for layer in model.features:
        x = layer(x)
        sizes.append(tuple(x.shape[1:]))
    convolutions = [size for size, layer in zip(sizes, model.features, strict=True) if isinstance(layer, nn.Conv2d)]
    assert convolutions == [(96, 110, 110), (256, 26, 26), (384, 13, 13), (384, 13, 13), (256, 13, 13)]
    assert model.classifier(model.avgpool(x).flatten(1)).shape == (1, 7)


@pytest.mark.parametrize("size", [9, 15, 224])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), [(2, 2, 0, 1), (3, 1, 1, 1), (3, 2, 2, 3)])
def test_conv_output_size(size, kernel, stride, padding, dilation):
    x = torch.empty(1, 1, size, size, device="meta")
    expected = nn.Conv2d(1, 1, kernel, stride, padding, dilation, device="meta")(x).shape[2]
    assert conv_output_size(size, kernel, stride, padding, dilation) == expected


def test_conv_output_size_rounds_down():
    assert conv_output_size(15, 2, 2) == 7  # 7.5 positions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 1), "size >= 1"), ((4, 1, 0), "stride >= 1"), ((4, 1, 1, -1), "padding >= 0"), ((4, 5), "a window of 5")],
)
def test_conv_output_size_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        conv_output_size(*arguments)


def measured_field(model: nn.Module, size: int) -> tuple[int, int]:
    """Height and width of the input pixels with a gradient from the middle output, all weights positive."""
    model = copy.deepcopy(model).double()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    x = torch.ones(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y[0, 0, y.shape[2] // 2, y.shape[3] // 2].backward()
    rows, columns = x.grad[0, 0].nonzero().unbind(1)
    return (rows.max() - rows.min() + 1).item(), (columns.max() - columns.min() + 1).item()


class Branches(nn.Module):
    """Two paths of different reach."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Sequential(
            pynn.nn.Conv2d(1, 1, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(1, 1, 3, padding=1)
        )
        self.narrow = nn.Conv2d(1, 1, (1, 9), padding="same")

    def forward(self, x):
        return self.wide(x) + self.narrow(x)


FIELDS = {
    "one": (nn.Sequential(nn.Conv2d(1, 1, 3)), 15),
    "strided": (nn.Sequential(nn.Conv2d(1, 2, 5, 2, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(2, 1, 3, padding=1)), 41),
    "branches": (Branches(), 21),
    "up": (nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1), nn.ConvTranspose2d(1, 1, 2, 2), nn.Conv2d(1, 1, 3, padding=1)), 32),
}


@pytest.mark.parametrize("name", FIELDS)
def test_receptive_field_is_what_gradients_reach(name):
    model, size = FIELDS[name]
    field = receptive_field(model).size
    reached = measured_field(model, size)
    if name == "up":  # half of the positions after upsampling see one pixel less
        assert all(a - 1 <= b <= a for a, b in zip(field, reached, strict=True))
    else:
        assert field == reached


def test_receptive_fields_of_known_models():
    """Araujo et al., "Computing receptive fields of convolutional neural networks", Distill 2019, table 1.

    Their ResNet-50 has its strides in the 1x1 convolutions, before the 3x3 ones, and sees 483 pixels.
    """
    with torch.device("meta"):
        models = {195: AlexNet(), 212: vgg16(), 435: resnet18(), 427: resnet50()}
    for size, model in models.items():
        assert receptive_field(model) == ((size, size), (32, 32)), type(model)
    three, seven = (nn.Sequential(*(nn.Conv2d(1, 1, k) for _ in range(n))) for k, n in ((3, 3), (7, 1)))
    assert receptive_field(three) == receptive_field(seven)  # three 3x3 see as much as one 7x7
    assert receptive_field(nn.Sequential(CausalConv1d(2, 2, 3, dilation=2), CausalConv1d(2, 2, 2))).size == (6,)


def test_receptive_field_errors():
    with pytest.raises(ValueError, match="no convolution or pool"):
        receptive_field(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got int"):
        receptive_field(3)


def test_gabor_bank():
    bank = gabor_bank(9, orientations=4, wavelengths=(4.0, 6.0))
    assert bank.shape == (16, 1, 9, 9)
    torch.testing.assert_close(bank.mean((1, 2, 3)), torch.zeros(16), rtol=0, atol=1e-7)
    torch.testing.assert_close(bank.flatten(1).norm(dim=1), torch.ones(16))
    # Orientation 0 waves along x: an even filter answers vertical lines, and its transpose is orientation 90 degrees.
    even = gabor_bank(9, orientations=2, wavelengths=(4.0,), phases=(0.0,))
    torch.testing.assert_close(even[1, 0], even[0, 0].T)
    x = torch.arange(32.0)
    wave = torch.cos(2 * math.pi * x / 4).expand(32, 32)
    answers = F.conv2d(wave[None, None], even).abs().amax((2, 3))[0]
    assert answers[0] > 20 * answers[1]
    for arguments, message in [
        ((1,), "kernel_size >= 2"),
        ((5, 4, ()), "positive wavelengths"),
        ((5, 4, (-1,)), "positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            gabor_bank(*arguments)


@pytest.mark.parametrize("levels", [1, 2])
def test_haar_bank(levels):
    bank = haar_bank(levels)
    rows = bank.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(4))
    if levels == 1:  # a basis: the transposed convolution gives the image back
        image = torch.randn(1, 1, 6, 8)
        parts = pynn.ops.conv2d(image, bank, stride=2)
        torch.testing.assert_close(pynn.ops.conv_transpose2d(parts, bank, stride=2), image)
    with pytest.raises(ValueError, match="levels >= 1"):
        haar_bank(0)


@pytest.mark.parametrize(("stride", "dilation", "groups"), [(1, 1, 1), (1, 3, 2), (2, 2, 1)])
def test_causal_conv1d(stride, dilation, groups):
    layer = CausalConv1d(4, 6, 3, stride, dilation, groups, activation="relu")
    x = torch.randn(2, 4, 11, requires_grad=True)
    y = layer(x)
    left = dilation * 2
    reference = F.conv1d(F.pad(x, (left, 0)), layer.weight, layer.bias, stride, 0, dilation, groups).relu()
    torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-6)
    assert y.shape[2] == math.ceil(11 / stride)
    (gradient,) = torch.autograd.grad(y[:, :, 2].sum(), x)
    assert not gradient[:, :, 2 * stride + 1 :].any()  # no future
    other = nn.Conv1d(4, 6, 3, stride, 0, dilation, groups)
    other.load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match=r"shape \(N, 4, L\), got \(4, 11\)"):
        layer(x[0])
    with pytest.raises(ValueError, match="activation"):
        CausalConv1d(1, 1, 1, activation="bad")


class ReferenceUNet(nn.Module):
    """milesial's U-Net from its names and the paper, of torch.nn layers."""

    def __init__(self, channels, classes, base):
        super().__init__()

        def double(a, b):
            layers = []
            for c in (a, b):
                layers += [nn.Conv2d(c, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
            return nn.ModuleDict({"double_conv": nn.Sequential(*layers)})

        self.inc = double(channels, base)
        for i in range(4):
            down = nn.ModuleDict({"maxpool_conv": nn.ModuleList([nn.Identity(), double(base << i, base << (i + 1))])})
            self.add_module(f"down{i + 1}", down)
        for i in range(4):
            c = base << (4 - i)
            self.add_module(
                f"up{i + 1}", nn.ModuleDict({"up": nn.ConvTranspose2d(c, c // 2, 2, 2), "conv": double(c, c // 2)})
            )
        self.outc = nn.ModuleDict({"conv": nn.Conv2d(base, classes, 1)})

    def forward(self, x):
        levels = [self.inc["double_conv"](x)]
        for i in range(4):
            block = self.get_submodule(f"down{i + 1}")["maxpool_conv"][1]["double_conv"]
            levels.append(block(F.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for i in range(4):
            block, skip = self.get_submodule(f"up{i + 1}"), levels.pop()
            up = block["up"](x)
            padded = torch.zeros_like(skip)
            top, left = ((a - b) // 2 for a, b in zip(skip.shape[2:], up.shape[2:], strict=True))
            padded[:, :, top : top + up.shape[2], left : left + up.shape[3]] = up
            x = block["conv"]["double_conv"](torch.cat([skip, padded], 1))
        return self.outc["conv"](x)


def test_segmentation_unet():
    theirs, ours = ReferenceUNet(2, 5, 4), SegmentationUNet(2, 5, 4)
    peers.randomise(theirs)
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
    assert "up1.conv.double_conv.0.weight" in ours.state_dict()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 2, 35, 48)  # 35 is odd on three levels
    outputs = [model.eval()(x) for model in (ours, theirs)]
    assert outputs[0].shape == (2, 5, 35, 48)
    peers.assert_close(*outputs)
    for output in outputs:
        peers.backward(output)
    peers.assert_gradients_close(*({name: p.grad for name, p in model.named_parameters()} for model in (ours, theirs)))
    smooth = SegmentationUNet(1, 3, 4, bilinear=True)
    assert smooth(torch.randn(1, 1, 20, 33)).shape == (1, 3, 20, 33)
    assert smooth.state_dict()["down4.maxpool_conv.1.double_conv.3.weight"].shape[0] == 32  # half: no parameters above


ERRORS = [
    (lambda: LeNet(image_size=8), "image_size >= 12, got 8"),
    (lambda: LeNet(activation="swish"), "relu, tanh or sigmoid, got 'swish'"),
    (lambda: LeNet()(torch.zeros(1, 1, 27, 28)), r"\(B, 1, 28, 28\), got \(1, 1, 27, 28\)"),
    (lambda: AlexNet(1)(torch.zeros(3, 64, 64)), r"AlexNet: expected x of shape \(B, 3, H, W\), got \(3, 64, 64\)"),
    (
        lambda: AlexNet(1)(torch.zeros(1, 3, 62, 99)),
        r"AlexNet: expected height and width of at least 63, got \(62, 99\)",
    ),
    (lambda: ZFNet(1)(torch.zeros(1, 3, 52, 99)), "ZFNet: expected height and width of at least 53"),
    (lambda: VGG((8, "M", "M"), 1)(torch.zeros(1, 3, 3, 9)), "VGG: expected height and width of at least 4"),
    (lambda: GoogLeNet(1)(torch.zeros(1, 3, 14, 99)), "GoogLeNet: expected height and width of at least 15"),
    (lambda: VGG((8, "P")), "\"M\", got 'P'"),
    (lambda: VGG(("M",)), "at least one convolution"),
    (lambda: ResNet(BasicBlock, []), "at least one block per stage"),
    (lambda: ResNet(BasicBlock, [1], stem="big"), "got 'big'"),
    (lambda: ResNet(BasicBlock, [1], width=4)(torch.zeros(1, 1, 8, 8)), r"ResNet: expected x of shape \(B, 3"),
    (lambda: GoogLeNet(2, aux_logits=False)(torch.zeros(2, 2)), "GoogLeNet: expected x"),
    (lambda: SegmentationUNet(1, 2, 2)(torch.zeros(1, 1, 8, 32)), r"at least 16, got \(8, 32\)"),
    (lambda: SegmentationUNet(1, 2, 3, bilinear=True), "base even with bilinear"),
]


@pytest.mark.parametrize(("model", "size"), [(AlexNet, 63), (ZFNet, 53), (GoogLeNet, 15)])
def test_smallest_images(model, size):
    assert model(2).eval()(torch.randn(1, 3, size, size)).shape == (1, 2)


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
