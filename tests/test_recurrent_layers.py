"""pynn.nn's LSTM, GRU, RNN and their cells against torch.nn: values, layouts, packed sequences, errors, state."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import threading
import warnings

import pytest
import torch
from policy import assert_bitwise
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import pynn

KERNEL = "lstm_fwd"
LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
KINDS = [*((name, {}) for name in LAYERS), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {"proj_size": 3})]

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def pair(name, *args, device="cpu", **options):
    """torch.nn's layer and ours, made from the same seed: with the same weights."""
    theirs = seeded(getattr(torch.nn, name), *args, **options)
    mine = seeded(getattr(pynn.nn, name), *args, **options)
    for (a, x), (b, y) in zip(theirs.named_parameters(), mine.named_parameters(), strict=True):
        assert a == b
        assert_bitwise(x, y, a)
    return theirs, mine.to(device)


def seeded(layer, *args, **options):
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dropout of a single layer
        return layer(*args, **options)


def states_of(layer, batch, unbatched=False):
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [
        layer.proj_size or layer.hidden_size,
        *([layer.hidden_size] if isinstance(layer, (torch.nn.LSTM, pynn.nn.LSTM)) else []),
    ]
    return [torch.randn(rows, size) if unbatched else torch.randn(rows, batch, size) for size in sizes]


def run(layer, x, states, lengths=None, *, pack=None, grads=True):
    """[padded output, last states, gradients of input, states and parameters]."""
    device = next(layer.parameters()).device
    x = x.detach().to(device).requires_grad_(grads)
    states = None if states is None else [s.detach().to(device).requires_grad_(grads) for s in states]
    hx = states if states is None else tuple(states) if isinstance(layer, (torch.nn.LSTM, pynn.nn.LSTM)) else states[0]
    given = x
    if pack is not None:
        given = pack_padded_sequence(x, pack, layer.batch_first, enforce_sorted=pack == sorted(pack, reverse=True))
    output, last = layer(given, hx) if lengths is None else layer(given, hx, lengths=lengths)
    if pack is not None:
        assert isinstance(output, PackedSequence)
        output, _ = pad_packed_sequence(output, layer.batch_first)
    results = [output, *(last if isinstance(last, tuple) else (last,))]
    if not grads:
        return [r.cpu() for r in results]
    weights = [torch.linspace(-1, 1, r.numel(), device=device).view(r.shape) for r in results]
    leaves = [x, *(states or []), *layer.parameters()]
    got = torch.autograd.grad(sum((r * w).sum() for r, w in zip(results, weights, strict=True)), leaves)
    return [t.detach().cpu() for t in (*results, *got)]


def assert_same(theirs, mine, atol=5e-5):
    for a, b in zip(theirs, mine, strict=True):
        torch.testing.assert_close(b, a, atol=atol, rtol=0)


PACKS = {"none": None, "sorted": [7, 5, 5, 3, 2, 1], "unsorted": [2, 7, 1, 5, 3, 5]}


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_grid_of_torchs_rnn_tests(backend, name, options, bias, bidirectional, batch_first, pack):
    """The grid, sizes and tolerance with which torch compares cuDNN's layers with its own."""
    options = {**options, "bias": bias, "bidirectional": bidirectional, "batch_first": batch_first}
    theirs, mine = pair(name, 10, 6, 2, device=backend.device, **options)
    x = torch.randn(6, 7, 10) if batch_first else torch.randn(7, 6, 10)
    for states in (states_of(theirs, 6), None):
        assert_same(run(theirs, x, states, pack=PACKS[pack]), run(mine, x, states, pack=PACKS[pack]))


MKLDNN = list(itertools.product((1, 5), (5, 16), (1, 3), (False, True), (False, True), (1, 2), (1, 3), (False, True)))


@pytest.mark.parametrize(("size", "hidden", "layers", "bidirectional", "bias", "batch", "steps", "training"), MKLDNN)
def test_grid_of_torchs_mkldnn_tests(backend, size, hidden, layers, bidirectional, bias, batch, steps, training):
    if backend.name in ("interpret", "sim") and (hidden == 16 or layers == 3):
        pytest.skip("the small half of the grid where every thread is emulated")
    for dropout, batch_first in ((0.0, False), (1.0, True), (0.4, False)):
        options = {"bidirectional": bidirectional, "bias": bias, "dropout": dropout, "batch_first": batch_first}
        theirs, mine = pair("LSTM", size, hidden, layers, device=backend.device, **options)
        theirs.train(training), mine.train(training)
        if dropout == 0.4 and training and layers > 1:
            continue  # masks have their own test
        x = torch.randn(batch, steps, size) if batch_first else torch.randn(steps, batch, size)
        assert_same(run(theirs, x, None, grads=training), run(mine, x, None, grads=training), atol=1e-5)


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_unbatched_input(backend, name, options):
    for bidirectional, batch_first in itertools.product((False, True), repeat=2):
        extra = {"bidirectional": bidirectional, "batch_first": batch_first}
        theirs, mine = pair(name, 4, 5, 2, device=backend.device, **options, **extra)
        for states in (states_of(theirs, 0, unbatched=True), None):
            x = torch.randn(6, 4)
            assert_same(run(theirs, x, states), run(mine, x, states))


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_lengths_equal_a_packed_sequence(backend, name, options):
    for bidirectional, batch_first in itertools.product((False, True), repeat=2):
        extra = {"bidirectional": bidirectional, "batch_first": batch_first}
        theirs, mine = pair(name, 4, 5, 2, device=backend.device, **options, **extra)
        lengths = [3, 6, 1, 6]
        x, states = torch.randn(4, 6, 4), states_of(theirs, 4)
        x = x if batch_first else x.transpose(0, 1)
        expected = run(theirs, x, states, pack=lengths)
        assert_same(expected, run(mine, x, states, lengths=torch.tensor(lengths)))
        assert_same(expected, run(mine, x, states, lengths=torch.tensor(lengths, dtype=torch.int32)))
        assert_same(expected[:2], run(mine, x, states, lengths=lengths, grads=False)[:2])
    unbatched = mine(torch.randn(6, 4), lengths=torch.tensor(2))[0]
    assert (unbatched[2:] == 0).all()
    assert (unbatched[:2] != 0).any()


def test_pack_sequence_round_trip():
    layer = pynn.nn.GRU(3, 4, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 5, 1)], enforce_sorted=False)
    output, last = layer(packed)
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(output, field), getattr(packed, field))
    assert last.shape == (2, 3, 4)
    with pytest.raises(ValueError, match="no lengths together with a PackedSequence"):
        layer(packed, lengths=torch.tensor([2, 5, 1]))


@pytest.mark.parametrize("p", [0.0, 0.276, 0.731, 1.0])
@pytest.mark.parametrize("name", LAYERS)
def test_dropout_draws_torchs_masks(cpu_kernels, name, p):
    theirs, mine = pair(name, 4, 6, 3, dropout=p, bidirectional=True)
    x = torch.randn(5, 2, 4)
    results = []
    for layer in (theirs, mine):
        for training in (True, False):
            layer.train(training)
            torch.manual_seed(3)
            with torch.backends.mkldnn.flags(enabled=False):
                results.append(layer(x)[0])
    torch.testing.assert_close(results[2], results[0])
    torch.testing.assert_close(results[3], results[1])
    if 0 < p < 1:
        assert not torch.equal(results[2], results[3])


@pytest.mark.parametrize("name", CELLS)
def test_cells(backend, name):
    for bias, nonlinearity in itertools.product((True, False), ("tanh", "relu") if name == "RNNCell" else (None,)):
        options = {"bias": bias} if nonlinearity is None else {"bias": bias, "nonlinearity": nonlinearity}
        theirs, mine = pair(name, 5, 7, device=backend.device, **options)
        assert repr(theirs) == repr(mine)
        for batch in ((), (3,), (0,)):
            x, h, c = torch.randn(*batch, 5), torch.randn(*batch, 7), torch.randn(*batch, 7)
            for hx in (None, (h, c) if name == "LSTMCell" else h):
                expected = theirs(x, hx)
                given = None if hx is None else tuple(t.to(backend.device) for t in (h, c))
                got = mine(x.to(backend.device), given if hx is None or name == "LSTMCell" else given[0])
                torch.testing.assert_close(got, expected, check_device=False)


def test_a_loop_of_cells_is_the_layer(backend):
    _, cell = pair("LSTMCell", 4, 6, device=backend.device)
    layer = pynn.nn.LSTM(4, 6).to(backend.device)
    layer.load_state_dict({f"{k}_l0": v for k, v in cell.state_dict().items()})
    x, state = torch.randn(5, 3, 4, device=backend.device), None
    output, last = layer(x)
    for t in range(5):
        state = cell(x[t], state)
        assert_bitwise(state[0], output[t], f"step {t}")
    assert_bitwise(state[1], last[1][0], "c")


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_constructor_and_state_are_torchs(name, options):
    for more in ({}, {"num_layers": 2, "bidirectional": True, "bias": False, "dropout": 0.5, "batch_first": True}):
        theirs, mine = pair(name, 3, 5, **options, **more)
        assert repr(theirs) == repr(mine)
        assert isinstance(mine, torch.nn.RNNBase)
        mine.load_state_dict({k: v + 0.1 for k, v in theirs.state_dict().items()})
        theirs.load_state_dict(mine.state_dict())
        x = torch.randn(2, 4, 3)
        theirs.eval(), mine.eval()
        assert_same(run(theirs, x, None, grads=False), run(mine, x, None, grads=False))
    assert getattr(pynn.nn, name)(3, 5, dtype=torch.float64).weight_hh_l0.dtype is torch.float64
    assert getattr(pynn.nn, name)(3, 5, device="meta").weight_hh_l0.is_meta


BAD_CONSTRUCTORS = [
    lambda nn: nn.LSTM(0, 3),
    lambda nn: nn.LSTM(3, 0),
    lambda nn: nn.GRU(3, -1),
    lambda nn: nn.RNN(3.5, 2),
    lambda nn: nn.LSTM(3, 4, 0),
    lambda nn: nn.LSTM(3, 4, proj_size=4),
    lambda nn: nn.LSTM(3, 4, proj_size=-1),
    lambda nn: nn.GRU(3, 4, proj_size=2),
    lambda nn: nn.RNN(3, 4, proj_size=2),
    lambda nn: nn.LSTM(3, 4, dropout=1.5),
    lambda nn: nn.LSTM(3, 4, dropout=True),
    lambda nn: nn.LSTM(3, 4, bias=1),
    lambda nn: nn.LSTM(3, 4, batch_first=1),
    lambda nn: nn.RNN(3, 4, nonlinearity="gelu"),
]


@pytest.mark.parametrize("make", BAD_CONSTRUCTORS)
def test_bad_constructors_raise_what_torchs_do(make):
    with pytest.raises((ValueError, TypeError)) as theirs:
        make(torch.nn)
    with pytest.raises(theirs.type) as mine:
        make(pynn.nn)
    assert str(mine.value) == str(theirs.value)


SAME_ERRORS = [  # (layer, call)
    ("LSTM", lambda m: m(torch.randn(4))),
    ("GRU", lambda m: m(torch.randn(1, 2, 3, 4))),
    ("LSTM", lambda m: m(torch.randn(2, 3, 5))),
    ("GRU", lambda m: m(torch.randn(2, 3, 4, dtype=torch.float64))),
    ("LSTM", lambda m: m(torch.randn(2, 3, 4), (torch.randn(1, 3), torch.randn(1, 3, 6)))),
    ("LSTM", lambda m: m(torch.randn(2, 4), (torch.randn(1, 1, 6), torch.randn(1, 1, 6)))),
    ("LSTM", lambda m: m(torch.randn(2, 3, 4), (torch.randn(1, 2, 6), torch.randn(1, 3, 6)))),
    ("LSTM", lambda m: m(torch.randn(2, 3, 4), (torch.randn(1, 3, 6), torch.randn(1, 3, 5)))),
    ("LSTM", lambda m: m(torch.randn(2, 3, 4), (torch.randn(2, 3, 6), torch.randn(2, 3, 6)))),
    ("GRU", lambda m: m(torch.randn(2, 3, 4), torch.randn(3, 6))),
    ("GRU", lambda m: m(torch.randn(2, 4), torch.randn(1, 1, 6))),
    ("GRU", lambda m: m(torch.randn(2, 3, 4), torch.randn(1, 4, 6))),
    ("RNN", lambda m: m(torch.randn(2, 3, 4), torch.randn(1, 3, 7))),
    ("RNN", lambda m: m(torch.randn(0, 3, 4))),
    ("LSTMCell", lambda m: m(torch.randn(1, 2, 4))),
    ("LSTMCell", lambda m: m(torch.randn(2, 5))),
    ("GRUCell", lambda m: m(torch.randn(2, 4), torch.randn(2, 2, 6))),
    ("GRUCell", lambda m: m(torch.randn(2, 4), torch.randn(3, 6))),
    ("LSTMCell", lambda m: m(torch.randn(2, 4), (torch.randn(2, 6), torch.randn(2, 5)))),
    ("LSTMCell", lambda m: m(torch.randn(2, 4), (torch.randn(1, 1, 1, 6), torch.randn(2, 6)))),
]


@pytest.mark.parametrize(("name", "call"), SAME_ERRORS)
def test_errors_are_torchs(cpu_kernels, name, call):
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        call(getattr(torch.nn, name)(4, 6))
    with pytest.raises(theirs.type) as mine:
        call(getattr(pynn.nn, name)(4, 6))
    assert str(mine.value) == str(theirs.value)


OWN_ERRORS = [  # malformed states on which torch.nn crashes, computes something, or raises something unclear
    ("LSTMCell", lambda m: m(torch.randn(4), (torch.zeros(2, 3, 6), torch.zeros(2, 3, 6))), "hx"),
    ("LSTMCell", lambda m: m(torch.randn(4), (torch.zeros(2, 6), torch.zeros(2, 6))), r"hx\[0\] to be 1D like input"),
    ("LSTMCell", lambda m: m(torch.randn(2, 4), (torch.zeros(6), torch.zeros(6))), r"hx\[0\] to be 2D like input"),
    ("LSTMCell", lambda m: m(torch.randn(2, 4), torch.zeros(2, 6)), "pair of tensors"),
    ("LSTMCell", lambda m: m(torch.randn(2, 4), (torch.zeros(2, 6),)), "pair of tensors"),
    ("GRUCell", lambda m: m(torch.randn(4), torch.zeros(1, 6)), "hidden to be 1D like input"),
    ("RNNCell", lambda m: m(torch.randn(2, 4), torch.zeros(6)), "hidden to be 2D like input"),
    ("RNNCell", lambda m: m(torch.randn(2, 4), torch.zeros(2, 6).double()), "expected hx to be float32 like input"),
    ("LSTM", lambda m: m(torch.randn(2, 3, 4), torch.zeros(2, 3, 6)), "pair of tensors"),
    ("LSTM", lambda m: m(torch.randn(2, 3, 4), (torch.zeros(1, 3, 6),) * 3), "pair of tensors"),
    ("LSTM", lambda m: m(torch.randn(2, 3, 4), (torch.zeros(1, 3, 6).half(),) * 2), "expected hx to be float32"),
    ("LSTM", lambda m: m(torch.randn(2, 3, 4), (torch.zeros(1, 3, 6, device="meta"),) * 2), "same device"),
    ("GRU", lambda m: m(torch.randn(2, 3, 4), (torch.zeros(1, 3, 6),)), "hx to be a tensor"),
    ("GRU", lambda m: m(torch.randn(2, 3, 4), lengths=torch.tensor([1, 2])), r"lengths of shape \[3\], got \[2\]"),
    ("GRU", lambda m: m(torch.randn(2, 3, 4), lengths=torch.ones(3)), "lengths to be integers"),
    ("GRU", lambda m: m(torch.randn(2, 3, 4), lengths=torch.ones(3, 1).long()), r"lengths of shape \[3\]"),
    ("GRU", lambda m: m(torch.randn(2, 3, 4), lengths=[[1], [2], [1]]), r"lengths of shape \[3\]"),
]


@pytest.mark.parametrize(("name", "call", "message"), OWN_ERRORS)
def test_malformed_states_raise(cpu_kernels, name, call, message):
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        call(getattr(pynn.nn, name)(4, 6))


def test_weights_edited_in_place(cpu_kernels):
    """No packed copy of a weight outlives an edit, by an optimizer, through .data or by loading."""
    x = torch.randn(3, 2, 4)
    layer = pynn.nn.LSTM(4, 6)
    fresh = torch.nn.LSTM(4, 6)

    def check():
        fresh.load_state_dict(layer.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(layer(x)[0], fresh(x)[0])

    check()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(x)[0].sum().backward()
    optimizer.step()
    check()
    layer.weight_hh_l0.data.mul_(-2)
    check()
    layer.weight_ih_l0.data[0, 0] = 3
    check()
    with torch.no_grad():
        layer.weight_hh_l0.numpy()[1, 1] = 5  # a write that no version counter sees
    check()
    layer.weight_hh_l0 = torch.nn.Parameter(torch.randn(24, 6))
    check()


def test_copies_and_pickles(cpu_kernels):
    x = torch.randn(3, 2, 4)
    for layer in (pynn.nn.LSTM(4, 6, 2, bidirectional=True), pynn.nn.GRU(4, 6), pynn.nn.RNN(4, 6)):
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
            assert_bitwise(twin(x)[0], layer(x)[0])
            with torch.no_grad():
                twin.weight_hh_l0.add_(1)
            assert not torch.equal(twin(x)[0], layer(x)[0])
    cell = pynn.nn.LSTMCell(4, 6)
    assert_bitwise(copy.deepcopy(cell)(x[0])[0], cell(x[0])[0])


def test_no_warnings_and_no_flattening():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = pynn.nn.LSTM(4, 6, proj_size=2)
        layer.flatten_parameters()
        layer = copy.deepcopy(layer).double().float()
        layer(torch.randn(3, 2, 4))


def test_functional_call_and_parametrized_weights(cpu_kernels):
    layer, x = pynn.nn.LSTM(4, 6), torch.randn(3, 2, 4)
    doubled = {k: 2 * v.detach() for k, v in layer.named_parameters()}
    expected = copy.deepcopy(layer)
    expected.load_state_dict(doubled)
    assert_bitwise(torch.func.functional_call(layer, doubled, (x,))[0], expected(x)[0])
    per_weight = torch.vmap(lambda w: torch.func.functional_call(layer, {"weight_hh_l0": w}, (x,))[0])
    stack = torch.stack([layer.weight_hh_l0.detach(), doubled["weight_hh_l0"]])
    assert_bitwise(per_weight(stack)[0], layer(x)[0].detach())

    class Doubled(torch.nn.Module):
        def forward(self, w):
            return 2 * w

    theirs = torch.nn.LSTM(4, 6)
    theirs.load_state_dict(layer.state_dict())
    with torch.no_grad():
        theirs.weight_hh_l0.mul_(2)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", Doubled())
    torch.testing.assert_close(layer(x)[0], theirs(x)[0])
    layer(x)[0].sum().backward()
    assert layer.parametrizations.weight_hh_l0.original.grad is not None


@pytest.mark.parametrize("name", LAYERS)
def test_compiles_to_one_node_per_layer(cpu_kernels, name):
    layer = getattr(pynn.nn, name)(4, 6, 2, bidirectional=True)
    graphs = []

    def inspect(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x, lengths = torch.randn(3, 2, 4), torch.tensor([3, 1])
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, got = layer(x, lengths=lengths)[0], compiled(x, lengths=lengths)[0]
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), list(layer.parameters())),
        torch.autograd.grad(expected.square().sum(), list(layer.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=inspect)(x)[0], layer(x)[0])
    calls = [n for n in graphs[0].graph.nodes if n.op == "call_function" and "pynn" in str(n.target)]
    assert len(calls) == 4
    torch._dynamo.reset()
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x)[0], layer(x)[0])
    kernels = [str(n.target) for n in program.graph.nodes if str(n.target).startswith("pynn.")]
    assert kernels == [f"pynn.{name.lower()}_fwd.default"] * 4


def test_checkpointed_and_under_autocast(cpu_kernels):
    layer, x = pynn.nn.LSTM(4, 6, 2), torch.randn(3, 2, 4, requires_grad=True)
    expected = torch.autograd.grad(layer(x)[0].square().sum(), [x, *layer.parameters()])
    again = torch.utils.checkpoint.checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.square().sum(), [x, *layer.parameters()]), expected, strict=True):
        assert_bitwise(a, b)
    for module in (layer, pynn.nn.GRU(4, 6), pynn.nn.RNN(4, 6), pynn.nn.LSTMCell(4, 6), pynn.nn.GRUCell(4, 6)):
        with torch.autocast("cpu", torch.bfloat16):
            output = module(x[0] if isinstance(module, torch.nn.RNNCellBase) else x)
        assert output[0].dtype is torch.bfloat16
        output[0].float().sum().backward()
        assert all(p.grad.dtype is torch.float32 for p in module.parameters())


def test_double_backward_of_layers(cpu_kernels):
    layer = pynn.nn.GRU(2, 3, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x, lengths=[3, 1])[0], (x,))


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batch(backend, name):
    layer = getattr(pynn.nn, name)(4, 6, 2, bidirectional=True).to(backend.device)
    output, last = layer(torch.randn(3, 0, 4, device=backend.device))
    assert output.shape == (3, 0, 12)
    assert (last[0] if isinstance(last, tuple) else last).shape == (4, 0, 6)
    output.sum().backward()
    assert all((p.grad == 0).all() for p in layer.parameters())


def test_many_threads_share_a_layer(cpu_kernels):
    from concurrent.futures import ThreadPoolExecutor

    layer = pynn.nn.LSTM(8, 16)
    inputs = [torch.randn(n % 5 + 1, n % 3 + 1, 8) for n in range(40)]
    with torch.no_grad():
        expected = [layer(x)[0] for x in inputs]

    def work(x):
        with torch.no_grad():
            return layer(x)[0]

    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(work, inputs), expected, strict=True):
            assert_bitwise(got, want)


def test_large_gradients_have_memory_of_their_own(cpu_kernels):
    """Memory of gradients that are gone serves later ones, never one that is held, whoever lets go of it."""
    layer, x = pynn.nn.LSTM(192, 192), torch.randn(2, 3, 192)

    def gradient(scale):
        output, _ = layer(x)
        return torch.autograd.grad(output, [layer.weight_ih_l0, layer.weight_hh_l0], scale * torch.ones_like(output))

    held = gradient(1)
    copies = [g.clone() for g in held]
    for _ in range(3):
        passing = [gradient(2)]
        thread = threading.Thread(target=passing.clear)
        thread.start()
        thread.join()
    both = gradient(3), gradient(4)
    pointers = {g.data_ptr() for grads in (held, *both) for g in grads}
    assert len(pointers) == 6
    for got, want in zip(held, copies, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(both[1], copies, strict=True):
        torch.testing.assert_close(got, 4 * want)
