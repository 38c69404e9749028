"""UNet: the pynn model against its twin built from torch layers, shapes, conditioning, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pynn.models.unet import PYNN_LAYERS, TORCH_LAYERS, UNet

SMALL = {"channels": 16, "num_heads": 2, "groups": 4, "num_classes": 10}
DIGITS = {"channels": 24, "time_dim": 48, "num_classes": 10}  # 8x8 digits


def build(layers=PYNN_LAYERS, in_channels=1, dtype=torch.float32, **options):
    """A model whose zero-initialised layers hold numbers too, so that nothing is hidden behind a zero."""
    torch.manual_seed(0)
    model = UNet(in_channels, layers=layers, **{**SMALL, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model.to(dtype)


def twins(dtype, **options):
    ours, theirs = build(dtype=dtype, **options), build(TORCH_LAYERS, dtype=dtype, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def batch(model, size=(3, 1, 8, 8), dtype=torch.float32):
    x = torch.randn(size, dtype=dtype)
    labels = None if model.num_classes is None else torch.randint(0, model.num_classes + 1, size[:1])
    return x, torch.randint(0, 1000, size[:1]), labels


def loss_and_gradients(model, x, t, labels):
    x = x.detach().requires_grad_()
    y = model(x, t, labels)
    loss = F.mse_loss(y, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return y.detach(), torch.autograd.grad(loss, [x, *model.parameters()])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_classes": None, "attention_levels": ()},
        {"in_channels": 3, "out_channels": 6, "size": (2, 3, 12, 8)},
        {"channel_multipliers": (1, 2, 2), "attention_levels": (1, 2), "size": (2, 1, 28, 28)},
        {"blocks_per_level": 2, "channel_multipliers": (1, 1), "attention_levels": (0,)},
    ],
    ids=["digits", "unconditional", "more outputs", "three levels", "two blocks"],
)
def test_agrees_with_the_torch_twin(dtype, tolerance, options):
    size = options.get("size", (3, 1, 8, 8))
    options = {k: v for k, v in options.items() if k != "size"}
    ours, theirs = twins(dtype, **options)
    inputs = batch(ours, size, dtype)
    y, grads = loss_and_gradients(ours, *inputs)
    expected, expected_grads = loss_and_gradients(theirs, *inputs)
    assert y.shape == (size[0], options.get("out_channels", size[1]), *size[2:])
    assert (y - expected).norm() <= tolerance * expected.norm()
    names = ["x", *(name for name, _ in ours.named_parameters())]
    for name, got, want in zip(names, grads, expected_grads, strict=True):
        assert (got - want).norm() <= tolerance * want.norm() + tolerance * 1e-3, name


def test_memory_format_of_the_twin_does_not_matter():
    ours, theirs = twins(torch.float64)
    inputs = batch(ours, dtype=torch.float64)
    theirs.memory_format = torch.contiguous_format
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))


def test_activations_are_channels_last():
    model = build()
    seen = []
    for module in model.modules():
        if isinstance(module, (PYNN_LAYERS.Conv2d, PYNN_LAYERS.GroupNorm)):
            module.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    for size in ((2, 1, 8, 8), (2, 1, 28, 28)):
        model(*batch(model, size))
    for x, y in seen:
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_demo_configuration_has_a_quarter_million_parameters():
    model = UNet(1, **DIGITS)
    assert 235_000 < sum(p.numel() for p in model.parameters()) < 250_000
    assert model(*batch(model)).shape == (3, 1, 8, 8)


def test_starts_at_zero_and_learns():
    torch.manual_seed(0)
    model = UNet(1, **SMALL)
    inputs = batch(model)
    assert not model(*inputs).any()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(model(*inputs), inputs[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_class_and_time_matter():
    model = build()
    x, t, labels = batch(model)
    no_class = torch.full_like(labels, 10)
    torch.testing.assert_close(model(x, t), model(x, t, no_class), rtol=0, atol=0)
    assert not torch.allclose(model(x, t, labels * 0), model(x, t, labels * 0 + 1))
    assert not torch.allclose(model(x, t), model(x, t + 100))
    torch.testing.assert_close(model(x, t.float()), model(x, t))


def test_samples_do_not_see_each_other():
    model = build()
    x, t, labels = batch(model, (5, 1, 8, 8))
    torch.testing.assert_close(model(x, t, labels)[3:4], model(x[3:4], t[3:4], labels[3:4]), rtol=1e-5, atol=1e-6)


def test_state_dicts_are_exchangeable():
    ours, theirs = build(), build(TORCH_LAYERS)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_dropout_only_in_training():
    model = build(dropout=0.5)
    inputs = batch(model)
    assert not torch.equal(model(*inputs), model(*inputs))
    model.eval()
    assert torch.equal(model(*inputs), model(*inputs))


def test_compiles_whole():
    torch._dynamo.reset()
    model = build(channels=8, groups=2)
    inputs = batch(model)
    y, grads = loss_and_gradients(model, *inputs)
    got, got_grads = loss_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), *inputs)
    torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-5)
    for a, b in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


def test_autocast():
    model = build()
    inputs = batch(model)
    expected = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(*inputs)
        F.mse_loss(got.float(), inputs[0]).backward()
    assert (got.float() - expected).norm() < 0.05 * expected.norm()
    assert all(p.grad.dtype is torch.float32 for p in model.parameters())


CALLS = [
    (lambda m, x, t, c: m(x[:, :, :7], t, c), "height and width to be divisible by 2, got 7x8"),
    (lambda m, x, t, c: m(x[0], t, c), r"x of shape \(B, 1, H, W\)"),
    (lambda m, x, t, c: m(x.expand(-1, 2, -1, -1), t, c), r"x of shape \(B, 1, H, W\)"),
    (lambda m, x, t, c: m(x, t[:2], c), r"t of shape \(3,\), got \(2,\)"),
    (lambda m, x, t, c: m(x, t, c[:2]), r"class_labels of shape \(3,\)"),
    (lambda m, x, t, c: build(num_classes=None)(x, t, c), "without num_classes"),
    (lambda m, x, t, c: build(attention_levels=(2,)), "attention_levels below 2"),
    (lambda m, x, t, c: build(num_heads=3), r"divisible by num_heads \(3\)"),
    (lambda m, x, t, c: build(groups=5), "divisible by num_groups"),
    (lambda m, x, t, c: build(channel_multipliers=()), "at least one level"),
]


@pytest.mark.parametrize(("call", "message"), CALLS)
def test_errors(call, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        call(model, *batch(model))


def test_labels_out_of_range_raise():
    model = build()
    x, t, _ = batch(model)
    with pytest.raises(IndexError):
        model(x, t, torch.tensor([0, 1, 11]))
