"""torch's scaled_dot_product_attention with pynn as its flash attention."""

import pytest
import torch
import torch.nn.functional as F
from policy import assert_relative

import pynn

attention = pytest.importorskip("torch.nn.attention")
if not hasattr(attention, "register_flash_attention_impl"):
    pytest.skip("this torch has no hook for flash attention", allow_module_level=True)

OPS = ["scaled_dot_product_attention_fwd", "scaled_dot_product_attention_bwd"]


@pytest.fixture
def active():
    attention.activate_flash_attention_impl("pynn")
    yield
    attention.restore_flash_attention_impl()


def operands(dtype=torch.float32, heads=4, key_heads=4, queries=37, keys=53, width=16):
    torch.manual_seed(0)
    shapes = (2, heads, queries, width), (2, key_heads, keys, width), (2, key_heads, keys, width)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def run(tensors, **options):
    output = F.scaled_dot_product_attention(*tensors, **options)
    weights = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view(output.shape)
    return output, *torch.autograd.grad(output, tensors, weights.to(output.dtype))


def called(function):
    with pynn.explain() as calls:
        result = function()
    return result, [call.op for call in calls]


def test_nothing_changes_before_it_is_activated():
    assert "pynn" in attention.list_flash_attention_impls()
    assert attention.current_flash_attention_impl() is None
    before, ops = called(lambda: run(operands()))
    assert not ops
    attention.activate_flash_attention_impl("pynn")
    assert called(lambda: run(operands()))[1] == OPS
    attention.restore_flash_attention_impl()
    after, ops = called(lambda: run(operands()))
    assert not ops
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float", "grouped", "scale"])
def test_accuracy(kind, dtype):
    shapes = {"key_heads": 2} if kind == "grouped" else {}
    tensors = operands(dtype, **shapes)
    mask = torch.randn(2, 1, 37, 53)
    options = {
        "plain": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": mask > -1},
        "float": {"attn_mask": mask.to(dtype)},
        "grouped": {"enable_gqa": True},
        "scale": {"scale": 0.4},
    }[kind]
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in options.items()}
    truth = run([t.detach().double().requires_grad_() for t in tensors], **wide)
    theirs = run(tensors, **options)
    attention.activate_flash_attention_impl("pynn")
    try:
        ours, ops = called(lambda: run(tensors, **options))
    finally:
        attention.restore_flash_attention_impl()
    assert ops == OPS
    for i, (a, b, peer) in enumerate(zip(ours, truth, theirs, strict=True)):
        assert a.dtype is dtype
        assert_relative(a, b, [peer], kind="gradient" if i else "forward", what=f"result {i}")


@pytest.mark.usefixtures("active")
def test_what_flash_attention_does_not_do_stays_torchs():
    tensors = operands()
    mask = torch.randn(37, 53, requires_grad=True)
    assert not called(lambda: run(tensors, attn_mask=mask))[1]
    assert not called(lambda: run(tensors, dropout_p=0.5))[1]


@pytest.mark.usefixtures("active")
def test_layers_of_torch_take_it():
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 9, 32)
    assert called(lambda: layer(x).sum().backward())[1] == OPS


@pytest.mark.usefixtures("active")
def test_compiles():
    tensors = operands()
    expected = run(tensors, is_causal=True)
    compiled = torch.compile(lambda *t: F.scaled_dot_product_attention(*t, is_causal=True), fullgraph=True)
    output = compiled(*tensors)
    weights = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view(output.shape).float()
    results, ops = called(lambda: torch.autograd.grad(output, tensors, weights))
    assert ops == OPS[1:]
    for a, b in zip((output, *results), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gpu_functions_on_emulated_threads():
    """What torch calls on a GPU, on CPU tensors and the kernels of csrc/cuda."""
    if pynn.backends.unavailable["sim"]:
        pytest.skip(pynn.backends.unavailable["sim"])
    from pynn.ops import _attention_provider as provider

    tensors = [t.detach() for t in operands(torch.float16, queries=20, keys=24)]
    wide = [t.double().requires_grad_() for t in tensors]
    truth = F.scaled_dot_product_attention(*wide, is_causal=True)
    grad = torch.linspace(-1, 2, truth.numel()).view(truth.shape).half()
    expected = truth, *torch.autograd.grad(truth, wide, grad.double())
    with pynn.backend("sim"):
        out, lse, *sizes, state, unused, _ = provider._gpu_forward(*tensors, 0.0, True)
        options = (*sizes, 0.0, True, state, unused)
        grads = provider._gpu_backward(grad, *tensors, out, lse, *options)
    assert sizes == [None, None, 20, 24]
    assert (lse.dtype, lse.shape) == (torch.float32, (2, 4, 20))
    for i, (a, b) in enumerate(zip((out, *grads), expected, strict=True)):
        assert_relative(a, b, kind="gradient" if i else "forward", what=f"result {i}")
    with pytest.raises(RuntimeError, match="return_debug_mask is not supported"):
        provider._gpu_forward(*tensors, return_debug_mask=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.usefixtures("active")
def test_on_a_gpu():
    tensors = [t.detach().cuda().requires_grad_() for t in operands(torch.float16, keys=37)]
    with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
        got, ops = called(lambda: run(tensors, is_causal=True))
        assert ops == OPS
        truth = run([t.detach().double().requires_grad_() for t in tensors], is_causal=True)
        for i, (a, b) in enumerate(zip(got, truth, strict=True)):
            assert (a - b).norm() <= 2e-3 * b.norm(), f"result {i}"
        torch.manual_seed(3)
        first = run(tensors, dropout_p=0.3)
        torch.manual_seed(3)
        assert all(torch.equal(a, b) for a, b in zip(first, run(tensors, dropout_p=0.3), strict=True))
        assert not torch.equal(first[0], run(tensors, dropout_p=0.3)[0])
