"""conv2d with a prologue, activation(x * scale + shift): every backend against float64, its gradients, its surface."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from bad_input import assert_rejects
from conv2d_reference import BORDERS, FUNCTIONS, LAST, LAYERS, interpret_only, layers, on, operands, run_on
from conv2d_reference import reference as convolution
from policy import DTYPES, assert_bitwise, assert_relative, integers, run, threads, truth_of
from torch.autograd import gradcheck, gradgradcheck
from transforms import assert_all, assert_compiles

import pynn
from pynn.ops.conv2d import ACTIVATIONS, conv2d

GRADIENTS = ("input", "weight", "bias", "scale", "shift", "residual")


def prologue(x, scale=None, shift=None, activation=None):
    """In torch operations, in the compute type, rounded as often as torch rounds."""
    u = x
    if scale is not None:
        u = u * scale[..., None, None].to(x.dtype)
    if shift is not None:
        u = u + shift[..., None, None].to(x.dtype)
    return FUNCTIONS[activation](u)


def reference(x, w, b=None, scale=None, shift=None, r=None, input_activation="silu", activation=None, **geometry):
    return convolution(prologue(x, scale, shift, input_activation), w, b, r, activation, **geometry)


def ours(x, w, b=None, scale=None, shift=None, r=None, input_activation="silu", activation=None, **geometry):
    return conv2d(
        x,
        w,
        b,
        residual=r,
        activation=activation,
        input_scale=scale,
        input_shift=shift,
        input_activation=input_activation,
        **geometry,
    )


def coefficients(shape, dtype=torch.float32, per_sample=True):
    size = shape[:2] if per_sample else shape[1:2]
    return (torch.rand(size) + 0.5).to(dtype), torch.randn(size).to(dtype)


def compare(backend, tensors, **arguments):
    """The output: P1 against float64 and torch's chain. The gradients: the bits of a pass of the prologue, of a
    convolution without one (tests/test_conv2d.py) and of the prologue's own gradient (test_pass)."""
    tensors = (*tensors, *(None,) * (6 - len(tensors)))
    truth, _ = truth_of(lambda *t: reference(*t, **arguments), *tensors)
    peer, _ = run(lambda *t: reference(*t, **arguments), *tensors)
    dy = torch.randn(truth.shape).to(tensors[0].dtype)
    after = {name: value for name, value in arguments.items() if name != "input_activation"}
    kind = ACTIVATIONS.index(arguments.get("input_activation", "silu"))
    for memory_format in (torch.contiguous_format, LAST):
        x, *rest = on(backend, tensors[0].to(memory_format=memory_format), *tensors[1:])
        w, b, scale, shift, r = rest
        y, grads = run(lambda *t: ours(*t, **arguments), x, *rest, grad_output=dy.to(x.device))
        assert_relative(y.cpu(), truth, [peer], what=f"output {memory_format}")
        image = backend.ops.conv2d_prologue_fwd(x, scale, shift, kind)
        y, parts = run(lambda x, w, b, r: conv2d(x, w, b, residual=r, **after), image, w, b, r,
                       grad_output=dy.to(x.device))  # fmt: skip
        dx, sums = backend.ops.conv2d_prologue_bwd(parts[0], x, scale, shift, kind, True)
        sums = [None if t is None else s if t.dim() == 2 else s.sum(0) for s, t in zip(sums, rest[2:4], strict=True)]
        expected = dx, parts[1], parts[2], *sums, parts[3]
        for name, got, value in zip(GRADIENTS, grads, expected, strict=True):
            if got is not None:
                assert_bitwise(got, value.to(got.dtype), f"gradient of {name} {memory_format}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_accuracy(backend, layer, dtype):
    interpret_only(backend, dtype is torch.bfloat16 or layer in (0, 5))
    shape, weight_shape, geometry = layers(backend)[layer]
    torch.manual_seed(layer)
    x, w, b = operands(shape, weight_shape, dtype)
    compare(backend, (x, w, b, *coefficients(shape, dtype, per_sample=layer % 3 > 0)), **geometry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend, activation, dtype):
    """Of the input and of the output, with bias and residual."""
    interpret_only(backend, dtype is torch.float32)
    x, w, b = operands((2, 16, 5, 6), (24, 16, 3, 3), dtype)
    r = torch.randn(2, 24, 5, 6).to(dtype)
    tensors = x, w, b, *coefficients(x.shape, dtype), r
    compare(backend, tensors, input_activation=activation, activation="gelu", padding=1)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_each_part_is_optional(backend, scaled, shifted, activation):
    if not (scaled or shifted or activation):
        pytest.skip("no prologue")
    x, w, b = operands((2, 8, 5, 5), (16, 8, 3, 3))
    scale, shift = coefficients(x.shape)
    tensors = x, w, b, scale if scaled else None, shift if shifted else None
    compare(backend, tensors, input_activation=activation, padding=1)


@pytest.mark.parametrize("case", range(len(BORDERS)))
def test_borders(backend, case):
    """Padding modes that repeat pixels repeat those of x'."""
    interpret_only(backend, case % 5 == 0)
    shape, weight_shape, geometry = BORDERS[case]
    x, w, b = operands(shape, weight_shape)
    compare(backend, (x, w, b, *coefficients(shape)), **geometry)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 16, 7, 9), (2, 40, 4, 4)])
def test_coefficients_of_float32(backend, dtype, shape):
    """As a normalisation of half-precision images gives them: they are not rounded."""
    x, w, b = operands(shape, (24, shape[1], 3, 3), dtype)
    compare(backend, (x, w, b, *coefficients(shape)), padding=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_pass(backend, activation, dtype):
    """The prologue alone and its gradient, P1 against float64 and torch."""
    x = torch.randn(2, 64, 20, 20).to(dtype)
    scale, shift = coefficients(x.shape, dtype)
    dy, kind = torch.randn(x.shape).to(dtype), ACTIVATIONS.index(activation)
    truth, exact = truth_of(lambda *t: prologue(*t, activation), x, scale, shift, grad_output=dy)
    peer, others = run(lambda *t: prologue(*t, activation), x, scale, shift, grad_output=dy)
    for memory_format in (torch.contiguous_format, LAST):
        image, s, t, g = on(backend, x.to(memory_format=memory_format), scale, shift, dy)
        y = backend.ops.conv2d_prologue_fwd(image, s, t, kind)
        dx, sums = backend.ops.conv2d_prologue_bwd(g, image, s, t, kind, True)
        assert_relative(y.cpu(), truth, [peer], what="pass")
        for name, got, a, b in zip(("input", "scale", "shift"), (dx, *sums), exact, others, strict=True):
            assert_relative(got.cpu().to(dtype), a, [b], kind="gradient", what=f"gradient of {name} {memory_format}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 8, 16, 20])
def test_zero_padding_stays_zero(backend, dtype, channels):
    """Integers are exact in every dtype, and a shift of 5 would show in every sum that has a padded pixel."""
    interpret_only(backend, dtype in (torch.bfloat16, torch.float32))
    x, w = integers((2, channels, 6, 5), dtype), integers((16, channels, 3, 3), dtype, low=-1, high=1)
    scale, shift = integers((2, channels), dtype, low=1, high=2), torch.full((channels,), 5, dtype=dtype)
    for activation, padding in itertools.product((None, "relu"), ((1, 1), (2, 0))):
        arguments = {"padding": padding, "stride": (1, 2), "input_activation": activation}
        expected = reference(*(t.double() for t in (x, w)), None, scale.double(), shift.double(), **arguments)
        for memory_format in (torch.contiguous_format, LAST):
            operands_ = x.to(memory_format=memory_format), w, None, scale, shift
            y, _ = run_on(backend, lambda *t, a=arguments: ours(*t, **a), *operands_)
            assert_bitwise(y.double(), expected.to(dtype).double(), f"{activation} {padding} {memory_format}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(6, 7), (16, 16)])  # Triton: a block of pixels has one sample in the second
def test_same_bits(backend, dtype, kernel, size):
    """Run to run, for each image alone, in any layout, and as the pass and the convolution one after the other."""
    x, w, b = operands((3, 16, *size), (24, 16, kernel, kernel), dtype)
    x, w, b, scale, shift = on(backend, x, w, b, *coefficients(x.shape))
    arguments = {"padding": kernel // 2}
    y = ours(x, w, b, scale, shift, **arguments)
    assert_bitwise(ours(x, w, b, scale, shift, **arguments), y, "again")
    assert_bitwise(ours(x[1:2], w, b, scale[1:2], shift[1:2], **arguments), y[1:2], "one image")
    strided = torch.stack((x, -x), -1)[..., 0]
    for name, other in (("channels last", x.to(memory_format=LAST)), ("strided", strided)):
        assert_bitwise(ours(other, w, b, scale, shift, **arguments), y, name)
    image = backend.ops.conv2d_prologue_fwd(x, scale, shift, ACTIVATIONS.index("silu"))
    assert_bitwise(conv2d(image, w, b, **arguments), y, "two passes")


def test_gradients_have_the_same_bits(backend):
    interpret_only(backend, False)
    x, w, b = operands((3, 8, 33, 31), (8, 8, 3, 3))
    scale, shift = coefficients(x.shape)
    dy = torch.randn(3, 8, 33, 31)

    def gradients(*t, grad_output=dy):
        return run_on(backend, lambda *t: ours(*t, padding=1), *t, grad_output=grad_output)[1]

    for memory_format in (torch.contiguous_format, LAST):
        tensors = x.to(memory_format=memory_format), w, b, scale, shift
        expected = gradients(*tensors)
        with threads(3):
            for name, a, e in zip(GRADIENTS, gradients(*tensors), expected, strict=False):
                assert_bitwise(a, e, name)
        one = gradients(tensors[0][:1], w, b, scale[:1], shift[:1], grad_output=dy[:1])
        for i in (0, 3, 4):
            assert_bitwise(one[i], expected[i][:1], f"gradient of {GRADIENTS[i]} of one image")


@pytest.mark.parametrize("shape", [(2, 3, 40, 40), (1, 70, 9, 5), (2, 1, 7, 3), (2, 5, 1, 1), (1, 64, 33, 32)])
def test_strides_of_the_pass(backend, shape):
    """The pass and its gradient on views, zero strides and odd sizes."""
    op, gradient = backend.ops.conv2d_prologue_fwd, backend.ops.conv2d_prologue_bwd
    big = torch.randn(shape[0], shape[1], 2 * shape[2], shape[3] + 1, dtype=torch.float64)
    part, dy = big[:, :, : shape[2], : shape[3]], torch.randn(shape, dtype=torch.float64)
    scale, shift = (t[0] for t in coefficients((1, shape[1]), torch.float64))
    for view in (
        big[:, :, ::2, 1:],
        part.to(memory_format=LAST),
        big[:1, :1, :1, :1].expand(shape),
        part.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        for g in (dy, dy.to(memory_format=LAST), dy[:1, :1, :1, :1].expand(shape)):
            x, g_, s, t = on(backend, view, g, scale.expand(shape[:2]), shift.expand(shape[:2]))
            leaves = [v.cpu().contiguous().requires_grad_() for v in (x, s, t)]
            truth = prologue(*leaves, "silu")
            torch.testing.assert_close(op(x, s, t, 3).cpu(), truth.detach())
            dx, sums = gradient(g_, x, s, t, 3, True)
            for got, exact in zip((dx, *sums), torch.autograd.grad(truth, leaves, g), strict=True):
                torch.testing.assert_close(got.cpu(), exact)
            without, empty = gradient(g_, x, s, t, 3, False)
            assert_bitwise(without, dx, "without sums")
            assert empty.numel() == 0


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 0, 5, 5)])
def test_empty(backend, shape):
    x, w = torch.randn(shape), torch.randn(6, shape[1], 3, 3)
    scale, shift = coefficients(shape)
    y, grads = run_on(backend, lambda *t: ours(*t, padding=1), x, w, None, scale, shift,
                      grad_output=torch.randn(shape[0], 6, 5, 5))  # fmt: skip
    torch.testing.assert_close(y, torch.zeros(shape[0], 6, 5, 5))
    for t, g in zip((x, w, scale, shift), (grads[0], grads[1], grads[3], grads[4]), strict=True):
        torch.testing.assert_close(g, torch.zeros_like(t))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradcheck(cpu_kernels, activation, per_sample):
    x, w, b = operands((2, 3, 4, 3), (2, 3, 2, 2), torch.float64)
    r = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (x, w, b, *coefficients(x.shape, torch.float64, per_sample), r)]

    def fn(*t):
        return ours(*t, activation, "silu", padding=1)

    assert gradcheck(fn, tensors)
    assert gradgradcheck(fn, tensors)


@pytest.mark.parametrize("name", ["library", "auto"])
def test_other_backends(name):
    """The library convolves what our pass gives; auto chooses as for the convolution alone."""
    with pynn.backend(name):
        for dtype, (shape, weight_shape, geometry) in itertools.product(DTYPES, LAYERS[:4] + LAYERS[8:]):
            x, w, b = operands(shape, weight_shape, dtype)
            scale, shift = coefficients(shape, dtype)
            y = ours(x, w, b, scale, shift, **geometry)
            image = torch.ops.pynn.conv2d_prologue_fwd(x, scale, shift, ACTIVATIONS.index("silu"))
            assert_bitwise(y, conv2d(image, w, b, **geometry), f"{name} {shape} {dtype}")


@pytest.mark.parametrize("wanted", list(itertools.product((0, 1), repeat=4))[1:])
def test_partial_gradients(cpu_kernels, wanted):
    """Only what is asked for is computed: no x' without a gradient of the weight, no convolution for the shift's."""
    x, w, _ = operands((2, 4, 5, 5), (6, 4, 3, 3), torch.float64, bias=False)
    scale, shift = coefficients(x.shape, torch.float64, per_sample=False)
    tensors = [t.requires_grad_(bool(v)) for t, v in zip((x, w, scale, shift), wanted, strict=True)]
    inputs = [t for t in tensors if t.requires_grad]
    arguments = tensors[0], tensors[1], None, *tensors[2:]
    with pynn.explain() as ran:
        got = torch.autograd.grad(ours(*arguments).sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(reference(*arguments).sum(), inputs))
    into_prologue = wanted[0] or wanted[2] or wanted[3]
    expected = ["prologue_conv2d_fwd"] + ["conv2d_prologue_fwd"] * wanted[1] + ["conv2d_bwd_input"] * into_prologue
    expected += ["conv2d_bwd_weight"] * wanted[1] + ["conv2d_prologue_bwd"] * into_prologue
    assert [call.op for call in ran] == expected


def test_without_a_prologue_nothing_changes(cpu_kernels):
    x, w, b = operands((2, 4, 5, 5), (6, 4, 3, 3))
    with pynn.explain() as ran:
        conv2d(x, w, b, input_scale=None, input_shift=None, input_activation=None)
    assert [call.op for call in ran] == ["conv2d_fwd"]


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_transforms(cpu_kernels, activation, per_sample):
    x, w, b = operands((2, 4, 5, 5), (6, 4, 3, 3), torch.float64)
    scale, shift = coefficients(x.shape, torch.float64, per_sample)
    assert_all(lambda *t: ours(*t, None, activation, "silu", padding=1), x, w, b, scale, shift)


def test_transforms_of_one_image(cpu_kernels):
    x, w, b = operands((4, 5, 5), (6, 2, 3, 3), torch.float64)
    scale, shift = coefficients((1, 4), torch.float64, per_sample=False)
    assert_all(lambda *t: ours(*t, groups=2), x, w, b, scale, shift)


def test_inductor(cpu_kernels):
    x, w, b = operands((2, 4, 5, 5), (6, 4, 3, 3))
    assert_compiles(lambda *t: ours(*t, padding=1) * 2, x, w, b, *coefficients(x.shape), backend="inductor")


def test_vmap_of_any_operands(cpu_kernels):
    x, w, _ = operands((2, 4, 5, 5), (6, 4, 3, 3), torch.float64, bias=False)
    for per_sample in (False, True):
        tensors = x, w, *coefficients(x.shape, torch.float64, per_sample)
        stacks = [torch.stack((t, 2 * t, -t)) for t in tensors]

        def fn(x, w, scale, shift):
            return ours(x, w, None, scale, shift, padding=1)

        for batched in list(itertools.product((False, True), repeat=4))[1:]:
            given = [s if v else t for s, t, v in zip(stacks, tensors, batched, strict=True)]
            dims = tuple(0 if v else None for v in batched)
            alone = [[t[i] if v else t for t, v in zip(given, batched, strict=True)] for i in range(3)]
            torch.testing.assert_close(
                torch.vmap(fn, in_dims=dims)(*given), torch.stack([fn(*operands_) for operands_ in alone])
            )
            gradient = torch.func.grad(lambda *t: fn(*t).square().sum(), argnums=(0, 1, 2, 3))
            got = torch.vmap(gradient, in_dims=dims)(*given)
            for g, expected in zip(got, zip(*(gradient(*operands_) for operands_ in alone), strict=True), strict=True):
                torch.testing.assert_close(g, torch.stack(expected))


def test_autocast(cpu_kernels):
    x, w, b = operands((2, 4, 5, 5), (6, 4, 3, 3))
    scale, shift = (t.requires_grad_() for t in coefficients(x.shape))
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x, w, b, scale, shift)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), reference(x, w, b, scale, shift), rtol=3e-2, atol=3e-2)
    y.sum().backward()
    assert scale.grad.dtype is shift.grad.dtype is torch.float32


def test_opcheck(cpu_kernels):
    x, w, b = operands((2, 4, 5, 5), (6, 4, 3, 3))
    for image, (scale, shift) in itertools.product(
        (x, x.to(memory_format=LAST)), (coefficients(x.shape), coefficients(x.shape, per_sample=False), (None, None))
    ):
        geometry = [1, 1], [1, 1, 1, 1], [1, 1], 1, 0, False
        torch.library.opcheck(torch.ops.pynn.conv2d_prologue_fwd.default, (image, scale, shift, 3))
        for sums in (False, True):
            operands_ = torch.randn(2, 4, 5, 5), image, scale, shift, 3, sums
            torch.library.opcheck(torch.ops.pynn.conv2d_prologue_bwd.default, operands_)
        for namespace in (torch.ops.pynn, torch.ops.pynn_library, torch.ops.pynn_auto):
            operands_ = image, scale, shift, 3, w, b, None, *geometry, 0, True
            torch.library.opcheck(namespace.prologue_conv2d_fwd.default, operands_)


def test_messages():
    x, w, b = operands((2, 4, 5, 5), (6, 4, 3, 3))
    with pytest.raises(ValueError, match="conv2d: expected input_activation to be one of"):
        conv2d(x, w, b, input_activation="elu")
    with pytest.raises(RuntimeError, match=r"conv2d: expected input_scale of shape \[4\] or \[2, 4\], got \[3\]"):
        conv2d(x, w, b, input_scale=torch.ones(3))
    with pytest.raises(RuntimeError, match=r"conv2d: expected input_shift of shape \[4\] or \[2, 4\], got \[1, 4\]"):
        conv2d(x, w, b, input_shift=torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="conv2d: expected input_scale to be float32 like input, got float64"):
        conv2d(x, w, b, input_scale=torch.ones(4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="expected input_shift to be bfloat16 like input, or float32, got float16"):
        conv2d(x.bfloat16(), w.bfloat16(), None, input_shift=torch.ones(4).half())
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 5 channels instead"):
        conv2d(torch.randn(2, 5, 5, 5), w, b, input_scale=torch.ones(5))
    with pytest.raises(RuntimeError, match=r"Expected 3D \(unbatched\) or 4D \(batched\) input to conv2d"):
        conv2d(torch.randn(5, 5), w, b, input_scale=torch.ones(5))


def bad_call(rng: random.Random):
    dtype = rng.choice(DTYPES)
    x, dy, w = torch.randn(2, 4, 6, 6).to(dtype), torch.randn(2, 4, 6, 6).to(dtype), torch.randn(6, 4, 3, 3).to(dtype)
    given, kind = [torch.randn(rng.choice(((4,), (2, 4)))).to(dtype), torch.randn(4).to(dtype)], 3
    which = rng.randrange(6)
    if which == 0:
        given[rng.randrange(2)] = torch.randn(rng.choice(((3,), (1, 4), (2, 4, 1), (), (4, 2), (0,), (2, 5)))).to(dtype)
    elif which == 1:
        others = [d for d in (*DTYPES, torch.int64) if d is not dtype]
        wrong = [d for d in others if not (d is torch.float32 and dtype in (torch.bfloat16, torch.float16))]
        given[rng.randrange(2)] = torch.ones(4).to(rng.choice(wrong))
    elif which == 2:
        kind = rng.choice((-1, 8, 2**40))
    elif which == 3:
        x = torch.randn(rng.choice(((4,), (2, 4), (2, 4, 6), (2, 3, 6, 6), (1, 2, 4, 6, 6)))).to(dtype)
    elif which == 4:
        x, dtype = x.to(rng.choice((torch.int32, torch.complex64, torch.bool))), None
    else:
        dy = rng.choice((dy[:1], dy[..., :5], dy.to(torch.int64), dy[0]))
        return f"gradient {dy.shape}", lambda: torch.ops.pynn.conv2d_prologue_bwd(dy, x, *given, kind, True)
    text = f"{which}: {tuple(x.shape)} {x.dtype} {[(tuple(t.shape), t.dtype) for t in given]} {kind}"
    call = rng.randrange(3)
    if call == 0:
        return text, lambda: torch.ops.pynn.conv2d_prologue_fwd(x, *given, kind)
    if call == 1:
        return text, lambda: torch.ops.pynn.conv2d_prologue_bwd(dy, x, *given, kind, True)
    geometry = [1, 1], [1, 1, 1, 1], [1, 1], 1, 0, False
    return text, lambda: torch.ops.pynn.prologue_conv2d_fwd(x, *given, kind, w, None, None, *geometry, 0, False)


def test_bad_calls():
    assert_rejects("test_conv2d_prologue", 300)
