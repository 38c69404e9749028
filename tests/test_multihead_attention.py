"""MultiheadAttention: torch.nn.MultiheadAttention in every mode, without its NaN."""

import copy
import itertools
import warnings

import pytest
import torch
import transforms

from pynn.nn.attention import MultiheadAttention
from pynn.ops import multi_head_attention

torch_attention = torch.nn.MultiheadAttention


def pair(*args, **options):
    """torch's module and ours, built from the same seed."""
    torch.manual_seed(7)
    theirs = torch_attention(*args, **options)
    torch.manual_seed(7)
    return theirs, MultiheadAttention(*args, **options)


def compare(theirs, ours, inputs, **options):
    """Outputs, weights and every gradient; the loss reads the weights too."""
    results = []
    for module in (theirs, ours):
        leaves = {id(t): t.detach().clone().requires_grad_() for t in inputs}
        output, weights = module(*(leaves[id(t)] for t in inputs), **options)
        loss = (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum()
        if weights is not None:
            loss = loss + weights.square().sum()
        grads = torch.autograd.grad(loss, [*leaves.values(), *module.parameters()])
        results.append((output, weights, grads))
    (output, weights, grads), (our_output, our_weights, our_grads) = results
    torch.testing.assert_close(our_output, output)
    assert (our_weights is None) == (weights is None)
    if weights is not None:
        torch.testing.assert_close(our_weights, weights)
    for got, expected in zip(our_grads, grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


CONSTRUCTORS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"kdim": 6, "vdim": 10},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "vdim": 10, "bias": False},
]
MASKS = ["none", "bool", "float", "bool per head", "float per head"]
PADDINGS = ["none", "bool", "float"]


def make_masks(mask, padding, batch, heads, queries, keys):
    attn_mask = {
        "none": None,
        "bool": torch.rand(queries, keys) > 0.6,
        "float": torch.randn(queries, keys),
        "bool per head": torch.rand(batch * heads, queries, keys) > 0.6,
        "float per head": torch.randn(batch * heads, queries, keys),
    }[mask]
    key_padding_mask = {"none": None, "bool": torch.rand(batch, keys) > 0.6, "float": torch.randn(batch, keys)}[padding]
    for m in (attn_mask, key_padding_mask):
        if m is not None and m.dtype is torch.bool:
            m[..., 0] = False
    return attn_mask, key_padding_mask


@pytest.mark.parametrize("layout", ["sequence first", "batch first", "unbatched"])
@pytest.mark.parametrize("options", CONSTRUCTORS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_equals_torch(options, layout, training):
    batch, heads, queries, keys, dim = 1 if layout == "unbatched" else 2, 3, 4, 5, 12
    theirs, ours = pair(dim, heads, batch_first=layout == "batch first", **options)
    theirs.train(training), ours.train(training)

    def make(length, width):
        shape = {"sequence first": (length, batch), "batch first": (batch, length), "unbatched": (length,)}[layout]
        return torch.randn(*shape, width)

    query, key, value = make(queries, dim), make(keys, options.get("kdim", dim)), make(keys, options.get("vdim", dim))
    for mask, padding, need_weights in itertools.product(MASKS, PADDINGS, (True, False)):
        attn_mask, key_padding_mask = make_masks(mask, padding, batch, heads, queries, keys)
        if layout == "unbatched" and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compare(
                theirs,
                ours,
                (query, key, value),
                attn_mask=attn_mask,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                average_attn_weights=padding != "bool",
            )
    if "kdim" not in options:
        causal = torch.ones(queries, queries, dtype=torch.bool).triu(1)
        for need_weights in (True, False):
            compare(theirs, ours, (query,) * 3, attn_mask=causal, is_causal=True, need_weights=need_weights)
        compare(theirs, ours, (query, key, key))


@pytest.mark.parametrize("options", CONSTRUCTORS, ids=str)
def test_state_dict(options):
    theirs, ours = pair(12, 3, **options)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for a, b in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True):
        assert torch.equal(a, b), "the same seed must give the same weights"
    torch.manual_seed(8)
    other = MultiheadAttention(12, 3, **options)
    other.load_state_dict(theirs.state_dict())
    copied = copy.deepcopy(other)
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), theirs.parameters(), strict=True))
    assert repr(theirs) == repr(ours)
    assert isinstance(ours, torch_attention)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_fully_masked_row_is_zero(need_weights, training):
    """pytorch#41508, #190486: torch gives NaN for the whole batch, and NaN gradients."""
    module = MultiheadAttention(8, 2, batch_first=True).train(training)
    x = torch.randn(2, 3, 8, requires_grad=True)
    padding = torch.tensor([[True, True, True], [False, False, True]])
    output, weights = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert torch.equal(output[0], module.out_proj.bias.expand(3, 8))
    if need_weights:
        assert (weights[0] == 0).all()
        torch.testing.assert_close(weights[1].sum(-1), torch.ones(3))
    output.square().sum().backward()
    for t in (x, *module.parameters()):
        assert t.grad.isfinite().all()
    assert (x.grad[0] == 0).all()
    with torch.no_grad():
        again = module.eval()(x, x, x, key_padding_mask=padding, need_weights=need_weights)[0]
    assert again.isfinite().all()


def test_causal_hint():
    module = MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 4, 8)
    for training in (True, False):  # torch's inference path ignores the hint without a word
        with torch.no_grad(), pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            module.train(training)(x, x, x, is_causal=True)
    mask = torch.zeros(4, 4, dtype=torch.bool)  # a wrong hint is believed when nothing else needs the mask
    hinted = module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    causal = module(x, x, x, attn_mask=~torch.ones_like(mask).tril(), need_weights=False)[0]
    torch.testing.assert_close(hinted, causal)


def test_dropout():
    """The returned weights are those that were used, dropout included; torch.manual_seed repeats them."""
    module = MultiheadAttention(16, 2, dropout=0.5, batch_first=True)
    x = torch.randn(3, 20, 16)
    torch.manual_seed(5)
    output, weights = module(x, x, x, average_attn_weights=False)
    torch.manual_seed(5)
    again = module(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(again, output)
    assert 0.4 < (weights == 0).double().mean() < 0.6
    value = torch.nn.functional.linear(x, module.in_proj_weight[32:], module.in_proj_bias[32:])
    joined = (weights @ value.unflatten(-1, (2, 8)).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module.out_proj(joined), output)
    module.eval()
    assert torch.equal(module(x, x, x)[0], module(x, x, x)[0])


def test_empty():
    module = MultiheadAttention(8, 2, batch_first=True)
    for batch, queries, keys in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        query, key = torch.randn(batch, queries, 8, requires_grad=True), torch.randn(batch, keys, 8)
        output, weights = module(query, key, key)
        assert output.shape == query.shape
        assert weights.shape == (batch, queries, keys)
        output.sum().backward()
        assert query.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype):
    theirs, ours = pair(16, 4, dtype=dtype)
    x = torch.randn(5, 2, 16, dtype=dtype)
    for need_weights in (True, False):
        expected, got = (m(x, x, x, need_weights=need_weights)[0] for m in (theirs, ours))
        tolerance = {"rtol": 0.02, "atol": 0.01} if dtype is torch.bfloat16 else {"rtol": 1e-10, "atol": 1e-12}
        torch.testing.assert_close(got, expected, **tolerance)


def test_autocast():
    module = MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = module(x, x, x, attn_mask=torch.zeros(5, 5))
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output.float(), module(x, x, x)[0], rtol=0.05, atol=0.02)


def test_gradcheck():
    module = MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
    padding = torch.tensor([[False, False, True], [True, True, True]])
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def fn(x, mask):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output, weights = module(x, x, x, padding, attn_mask=mask)
        return output, weights

    assert torch.autograd.gradcheck(fn, (x, mask), nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(fn, (x, mask), nondet_tol=0.0)


@pytest.mark.parametrize("need_weights", [True, False])
def test_transforms(need_weights):
    module = MultiheadAttention(8, 2, batch_first=True)
    x, y = torch.randn(2, 4, 8), torch.randn(2, 5, 8)

    def fn(x, y):
        output, weights = module(x, y, y, need_weights=need_weights)
        return output if weights is None else output + weights.sum()

    transforms.assert_all(fn, x, y)


def test_nested_tensors_go_to_torch():
    module = MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    with torch.no_grad():
        output, _ = module(x, x, x, need_weights=False)
    assert output.is_nested


def test_in_transformer_layer():
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(layer)
    ours.self_attn = MultiheadAttention(16, 4, batch_first=True)
    ours.self_attn.load_state_dict(layer.self_attn.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), layer(x))


def test_constructor_errors():
    with pytest.raises(ValueError, match="must be greater than 0"):
        MultiheadAttention(0, 1)
    with pytest.raises(AssertionError, match="divisible"):
        MultiheadAttention(10, 3)


X = torch.zeros(4, 2, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(8)}, AssertionError, "query should be unbatched 2D or batched 3D"),
        ({"key": torch.zeros(4, 8)}, AssertionError, "expected `key` and `value` to be 3-D"),
        ({"value": torch.zeros(5, 2, 8)}, AssertionError, "does not match value shape"),
        ({"query": torch.zeros(4, 2, 6)}, AssertionError, "was expecting embedding dimension of 8, but got 6"),
        ({"key": X[:, :1], "value": X[:, :1]}, RuntimeError, "same batch size"),
        ({"attn_mask": torch.zeros(1, 4)}, RuntimeError, "2D attn_mask is .* but should be \\(4, 4\\)"),
        ({"attn_mask": torch.zeros(2, 4, 4)}, RuntimeError, "3D attn_mask is .* but should be \\(4, 4, 4\\)"),
        ({"attn_mask": torch.zeros(1, 1, 4, 4)}, AssertionError, "`attn_mask` to be `None`, 2-D or 3-D"),
        (
            {"attn_mask": torch.zeros(4, 4, dtype=torch.int)},
            AssertionError,
            "only bool and floating types",
        ),
        ({"key_padding_mask": torch.zeros(2, 5)}, AssertionError, "key_padding_mask.shape"),
        ({"key_padding_mask": torch.zeros(4)}, AssertionError, "`key_padding_mask` to be `None` or 2-D"),
    ],
)
def test_errors(change, error, message):
    module = MultiheadAttention(8, 2)
    arguments = {"query": X, "key": X, "value": X, **change}
    with pytest.raises(error, match=message):
        module(**arguments)


def test_mismatched_mask_types_warn():
    module = MultiheadAttention(8, 2)
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask is deprecated"):
        module(X, X, X, key_padding_mask=torch.zeros(2, 4, dtype=torch.bool), attn_mask=torch.zeros(4, 4))


def test_grouped_heads():
    """num_kv_heads: the rows of shared heads, repeated, give torch's layer."""
    torch.manual_seed(3)
    ours = MultiheadAttention(16, 4, num_kv_heads=2, batch_first=True)
    assert ours.in_proj_weight.shape == (4 * (4 + 2 * 2), 16)
    assert ours.in_proj_bias.shape == (32,)
    theirs = torch_attention(16, 4, batch_first=True)
    with torch.no_grad():
        ours.in_proj_bias.normal_()
        for mine, full in ((ours.in_proj_weight, theirs.in_proj_weight), (ours.in_proj_bias, theirs.in_proj_bias)):
            query, key, value = mine.split((16, 8, 8))
            repeated = [t.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1) for t in (key, value)]
            full.copy_(torch.cat([query, *repeated]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x, y = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    for need_weights in (True, False):
        for key in (x, y):
            got, expected = (m(x, key, key, need_weights=need_weights) for m in (ours, theirs))
            torch.testing.assert_close(got[0], expected[0])
            if need_weights:
                torch.testing.assert_close(got[1], expected[1])


def test_window_sinks_rotary_alibi():
    """Each option is that of the op, on the layer's own parameters."""
    module = MultiheadAttention(16, 4, window=(2, 1), sinks=True, batch_first=True)
    assert "sinks" in module.state_dict()
    assert module.sinks.shape == (4,)
    with torch.no_grad():
        module.sinks.normal_()
    x, slopes = torch.randn(2, 6, 16), torch.rand(4)
    tables = tuple(f(torch.rand(6, 2) * 6) for f in (torch.cos, torch.sin))
    output, weights = module(x, x, x, rotary=tables, alibi_slopes=slopes)
    parameters = (module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias)
    expected = multi_head_attention(
        x,
        x,
        x,
        *parameters,
        4,
        window=(2, 1),
        sinks=module.sinks,
        rotary=tables,
        alibi_slopes=slopes,
        need_weights=True,
    )
    assert torch.equal(output, expected[0])
    assert torch.equal(weights, expected[1])
    assert (weights[:, 0, 2:] == 0).all()
    assert (weights.sum(-1) < 1).all(), "the sinks have weight"
    assert (torch.autograd.grad(output.sum(), module.sinks)[0] != 0).any()
    plain = MultiheadAttention(16, 4, batch_first=True)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k != "sinks"})
    assert not torch.allclose(plain(x, x, x)[0], output)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_strict_torch_nan(training, need_weights):
    """With masks the bits are torch's, NaN included: of the output, the weights and the gradients."""
    theirs = torch_attention(8, 2, batch_first=True).train(training)
    ours = MultiheadAttention(8, 2, batch_first=True, strict_torch_nan=True).train(training)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 8)
    padding = torch.tensor([[True, True, True], [False, False, True]])
    results = []
    for module in (theirs, ours):
        output, weights = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        grads = torch.autograd.grad(output.sum(), module.parameters())
        with torch.no_grad():
            again = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)[0]
        results.append([t for t in (output, weights, again, *grads) if t is not None])
    assert any(t.isnan().any() for t in results[0]) or not need_weights
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))
    torch.testing.assert_close(ours(x, x, x)[0], theirs(x, x, x)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads that divide 4, got 3"),
        ({"num_kv_heads": 2, "kdim": 6}, "without add_bias_kv, add_zero_attn, kdim and vdim"),
        ({"num_kv_heads": 2, "add_bias_kv": True}, "without add_bias_kv, add_zero_attn, kdim and vdim"),
        ({"strict_torch_nan": True, "window": (1, 1)}, "torch has no num_kv_heads, window and sinks"),
        ({"strict_torch_nan": True, "sinks": True}, "torch has no num_kv_heads, window and sinks"),
    ],
    ids=str,
)
def test_option_errors(options, message):
    with pytest.raises(ValueError, match=message):
        MultiheadAttention(16, 4, **options)


def test_rotary_needs_one_projection():
    module = MultiheadAttention(8, 2, add_zero_attn=True)
    with pytest.raises(ValueError, match="expected rotary without add_bias_kv, add_zero_attn"):
        module(X, X, X, rotary=(torch.ones(4, 2), torch.ones(4, 2)))


def test_patched_layers_have_the_options():
    """A layer of torch that becomes one of these was built without them."""
    module = torch_attention(8, 2)
    before = module(X + 1, X, X)[0]
    module.__class__ = MultiheadAttention
    assert module.num_kv_heads is None
    torch.testing.assert_close(module(X + 1, X, X)[0], before)
