"""rotary_embedding against its formula in float64, torch's operations, and what breaks kernels."""

import pytest
import torch
import transforms
from adversary import Canary, layouts
from bad_input import assert_rejects
from policy import DTYPES, assert_bitwise, assert_relative, integers, run, threads, truth_of

import pynn
from pynn.ops import rotary_embedding
from pynn.ops.rotary_embedding import checked_tables, turn_in_place

ops = torch.ops.pynn


def formula(x, cos, sin, interleaved=False):
    """In the dtype of x; cos and sin (L, P) or (N, L, P)."""
    pairs = cos.shape[-1]
    if cos.dim() == 3 and x.dim() == 4:
        cos, sin = cos[:, None], sin[:, None]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    a, b = turned.unflatten(-1, (pairs, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    new = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat((torch.stack(new, -1).flatten(-2) if interleaved else torch.cat(new, -1), rest), -1)


def tables(*shape, dtype=torch.float32):
    angles = torch.rand(shape, dtype=dtype) * 9
    return angles.cos(), angles.sin()


GRID = [  # x, cos and sin
    ((2, 3, 17, 64), (17, 32)),
    ((2, 3, 17, 64), (2, 17, 32)),
    ((4, 2, 9, 40), (9, 13)),  # some channels stay
    ((5, 33, 6), (5, 33, 3)),
    ((70, 600), (70, 300)),
    ((2, 2, 50, 7), (50, 1)),
]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", GRID, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(backend, dtype, shape, interleaved):
    """P1: never a larger error than the same in torch's operations; the gradient too."""
    x, grad = torch.randn(shape[0]).to(dtype), torch.randn(shape[0]).to(dtype)
    cos, sin = tables(*shape[1], dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    output, (grad_x,) = run(lambda t: rotary_embedding(t, cos, sin, interleaved=interleaved), x, grad_output=grad)
    truth, (truth_grad,) = truth_of(lambda t: formula(t, cos, sin, interleaved), x, grad_output=grad)
    peer, (peer_grad,) = run(lambda t: formula(t, cos, sin, interleaved), x, grad_output=grad)
    assert_relative(output, truth, [peer], what="output")
    assert_relative(grad_x, truth_grad, [peer_grad], kind="gradient", what="gradient")
    assert_bitwise(output[..., 2 * shape[1][-1] :], x[..., 2 * shape[1][-1] :], "channels that stay")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact(backend, dtype, interleaved):
    """P4: small integers give exact results; turning back by a quarter gives x."""
    x = integers((2, 3, 9, 20), dtype)
    cos, sin = integers((9, 8)), integers((9, 8))
    assert_bitwise(
        rotary_embedding(x, cos, sin, interleaved=interleaved),
        formula(x.double(), cos, sin, interleaved).to(dtype),
    )
    quarter = checked_tables(x, torch.zeros(9, 10), torch.ones(9, 10), x.shape)
    turned = rotary_embedding(x, *quarter, interleaved=interleaved)
    assert not torch.equal(turned, x)
    turn_in_place(turned, *quarter, interleaved, True)
    assert_bitwise(turned + 0, x + 0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise(backend, dtype, interleaved):
    """P5: the same for every layout, number of threads and slice, and in place."""
    x, (cos, sin) = torch.randn(2, 3, 21, 48).to(dtype), tables(21, 20)
    expected = rotary_embedding(x, cos, sin, interleaved=interleaved)
    for name, changed in layouts(x):
        assert_bitwise(rotary_embedding(changed, cos, sin, interleaved=interleaved), expected, name)
    for name, table in layouts(cos):
        assert_bitwise(rotary_embedding(x, table, sin, interleaved=interleaved), expected, f"cos, {name}")
    for count in (1, 2, 3) if backend.name == "cpu" else (1,):
        with threads(count):
            assert_bitwise(rotary_embedding(x, cos, sin, interleaved=interleaved), expected, f"{count} threads")
    assert_bitwise(rotary_embedding(x[1:], cos, sin, interleaved=interleaved), expected[1:], "slice")
    packed = torch.randn(2, 21, 5, 48).to(dtype)  # some heads of a projection
    packed[:, :, 1:4] = x.transpose(1, 2)
    before = packed.clone()
    turn_in_place(packed[:, :, 1:4].transpose(1, 2), cos, sin, interleaved, False)
    assert_bitwise(packed[:, :, 1:4].transpose(1, 2), expected, "in place")
    assert_bitwise(packed[:, :, ::4], before[:, :, ::4], "heads beside")


def test_same_bits_on_every_backend(backend):
    """A product is rounded once into a sum on each of them."""
    for dtype in DTYPES:
        x, (cos, sin) = torch.randn(2, 3, 9, 40).to(dtype), tables(9, 20)
        got = rotary_embedding(x, cos, sin)
        with pynn.backend("cpu"):
            if pynn.backends.cpu_isa != "baseline":  # has no such instruction
                assert_bitwise(got, rotary_embedding(x, cos, sin), str(dtype))


def test_distances_only(backend):
    """The product of a query and a key depends on the distance of their positions."""
    frequencies = 10000.0 ** -(torch.arange(0, 16, 2) / 16).double()
    angles = torch.arange(40)[:, None].double() * frequencies
    q, k = (torch.randn(16, dtype=torch.float64).expand(40, 16) for _ in range(2))
    scores = rotary_embedding(q, angles.cos(), angles.sin()) @ rotary_embedding(k, angles.cos(), angles.sin()).T
    for distance in (-7, 0, 12):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_canaries(backend):
    guarded = [Canary(torch.randn(s)) for s in ((2, 5, 9), (5, 4), (5, 4))]
    for interleaved in (False, True):
        assert rotary_embedding(*(c.tensor for c in guarded), interleaved=interleaved).isfinite().all()
    for c in guarded:
        c.assert_untouched()


def test_gradcheck(backend):
    x = torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    for interleaved in (False, True):
        cos, sin = tables(2, 3, 2, dtype=torch.float64)

        def fn(x, cos=cos, sin=sin, interleaved=interleaved):
            return rotary_embedding(x, cos, sin, interleaved=interleaved)

        fast = backend.name != "cpu"
        assert torch.autograd.gradcheck(fn, (x,), nondet_tol=0.0, fast_mode=fast)
        assert torch.autograd.gradgradcheck(fn, (x,), nondet_tol=0.0, fast_mode=fast)


def test_transforms(backend):
    cos, sin = tables(5, 4)
    transforms.assert_all(lambda x: rotary_embedding(x, cos, sin, interleaved=True), torch.randn(2, 3, 5, 8))


def test_opcheck(backend):
    x, (cos, sin) = torch.randn(2, 3, 5, 8), tables(2, 5, 3)
    torch.library.opcheck(ops.rotary_embedding_fwd.default, (x, cos, sin, True, False))
    torch.library.opcheck(ops.rotary_embedding_in_place.default, (x, cos, sin, False, True))


def test_empty(backend):
    for shape in ((0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)):
        assert rotary_embedding(torch.randn(shape), *tables(shape[2], 4)).shape == shape
    x = torch.randn(2, 3, 8)
    assert_bitwise(rotary_embedding(x, *tables(3, 0)), x)


@pytest.mark.parametrize(
    ("x", "cos", "sin", "message"),
    [
        ((8,), (4, 4), (4, 4), "expected x \\(L, D\\), \\(N, L, D\\) or \\(N, H, L, D\\), got \\(8,\\)"),
        ((1, 1, 1, 4, 8), (4, 4), (4, 4), "expected x"),
        ((2, 3, 4, 8), (5, 4), (5, 4), "expected cos and sin"),
        ((2, 3, 4, 8), (4, 5), (4, 5), "2 P <= D"),
        ((2, 3, 4, 8), (3, 4, 4), (3, 4, 4), "expected cos and sin"),
        ((2, 3, 4, 8), (4, 4), (4, 3), "expected cos and sin"),
        ((4, 8), (1, 4, 4), (1, 4, 4), "expected cos and sin"),
    ],
)
def test_errors(backend, x, cos, sin, message):
    with pytest.raises(RuntimeError, match=message):
        rotary_embedding(torch.randn(x), torch.randn(cos), torch.randn(sin))
    with pytest.raises(RuntimeError, match="cos has no gradient"):
        rotary_embedding(torch.randn(4, 8), torch.randn(4, 4, requires_grad=True), torch.randn(4, 4))


def bad_call(rng):
    """A call of an op with one operand spoiled."""
    operands = [torch.randn(2, 3, 5, 8), *tables(2, 5, 4)]
    i = rng.randrange(3)
    x, kind = operands[i], rng.choice(["rank", "size", "dtype", "device", "huge"])
    in_place = rng.random() < 0.5
    if kind == "rank":
        x = x[(None,) * rng.randint(2, 4)]
    elif kind == "size":
        d = rng.randrange(x.dim())
        if i == 0 and d in (1, 3):  # more heads, or more channels that stay
            d = 2
        x = torch.cat([x] * 3, d)
    elif kind == "dtype":
        x = x.to(rng.choice([torch.int32, torch.complex64, torch.bool]))
    elif kind == "device":
        x = x.to("meta")
    else:
        x = x.reshape(-1)[:1].expand(2**40)
    operands[i] = x
    if in_place and rng.random() < 0.3:  # two elements in one place
        operands, kind = [torch.randn(5, 8).expand(2, 3, 5, 8), *tables(2, 5, 4)], "overlap"
    op = ops.rotary_embedding_in_place if in_place else ops.rotary_embedding_fwd
    return f"{op} operand {i} {kind} {tuple(operands[i].shape)}", lambda: op(*operands, False, False)


def test_bad_input():
    assert_rejects("test_rotary_embedding", 300)
