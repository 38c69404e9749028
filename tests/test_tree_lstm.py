"""tree_lstm against its formula node by node in float64, torch.nn.LSTM on chains, and what breaks kernels."""

import random

import pytest
import torch
import transforms
from adversary import layouts
from bad_input import assert_rejects
from generated import generated
from hypothesis import strategies as st
from policy import DTYPES, FLOAT64_ERROR, FLOOR, LOW_PRECISION, assert_bitwise, relative_error, run, threads, truth_of

import pynn
from pynn.ops import Forest, tree_lstm
from pynn.ops.tree_lstm import _composite

ops = torch.ops.pynn
NAMES = ("h and c", "input", "weight_ih", "weight_hh", "bias")
# Times the error of torch's formula: (results, gradients). In float32 the Triton kernels' sigmoid and tanh, good to 1.5
# units in the last place, meet torch's, good to one.
MARGIN = {torch.float64: (0, 0), torch.float32: (1.2, 1.25), torch.bfloat16: (1, 1), torch.float16: (1, 1)}


def random_parents(nodes: int, seed: int = 0, trees: int = 2) -> torch.Tensor:
    """Parents of random trees, the nodes in random order."""
    rng = random.Random(seed)
    names = rng.sample(range(nodes), nodes)
    of = [-1] * nodes
    for n in range(trees, nodes):
        of[names[n]] = names[rng.randrange(max(0, n - 4), n)]
    return torch.tensor(of)


def operands(nodes=13, size=5, hidden=7, dtype=torch.float64):
    """(input, weight_ih, weight_hh, bias)"""
    shapes = ((nodes, size), (4 * hidden, size), (4 * hidden, hidden), (4 * hidden,))
    return [torch.randn(s).mul(0.5).to(dtype) for s in shapes]


def reference(parents, x, weight_ih, weight_hh, bias=None):
    """(h, c) node by node, children before parents."""
    parents = parents.tolist()
    children = [[k for k, p in enumerate(parents) if p == n] for n in range(len(parents))]
    h, c = {}, {}

    def visit(n):
        for k in children[n]:
            visit(k)
        pre = weight_ih @ x[n] + (0 if bias is None else bias)
        hidden = weight_hh.shape[1]
        u_i, u_f, u_g, u_o = weight_hh.chunk(4)
        x_i, x_f, x_g, x_o = pre.chunk(4)
        s = sum((h[k] for k in children[n]), x.new_zeros(hidden))
        i, g, o = (x_i + u_i @ s).sigmoid(), (x_g + u_g @ s).tanh(), (x_o + u_o @ s).sigmoid()
        c[n] = i * g + sum(((x_f + u_f @ h[k]).sigmoid() * c[k] for k in children[n]), x.new_zeros(hidden))
        h[n] = o * c[n].tanh()

    for n, parent in enumerate(parents):
        if parent < 0:
            visit(n)
    return torch.stack([h[n] for n in range(len(parents))]), torch.stack([c[n] for n in range(len(parents))])


def joined(parents):
    """tree_lstm of these trees, h and c side by side."""
    forest = Forest.from_parents(parents)
    return lambda *tensors: torch.cat([t.to(tensors[0].dtype) for t in tree_lstm(tensors[0], forest, *tensors[1:])], 1)


def joined_reference(parents):
    return lambda *tensors: torch.cat(reference(parents, *tensors), 1)


def joined_peer(parents):
    """The formula level by level in torch operations."""
    f = Forest.from_parents(parents)

    def fn(x, *weights):
        order = [torch.cat([t.chunk(4)[i] for i in (0, 2, 3, 1)]) for t in weights]
        weights = (*order, None) if len(order) == 2 else order
        forest = {"child_offsets": f.child_offsets, "children": f.children, "levels": f.levels}
        results = _composite(x[f.order], *weights, **forest)
        return torch.cat([t[f.place].to(x.dtype) for t in results], 1)

    return fn


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(60, 5, 17), (30, 16, 32), (20, 3, 150)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(backend, dtype, shape, bias):
    """P1 against the same formula in torch operations, over several forests together: one of them is chance."""
    # Level by level is what users of torch write; it computes in float32 for 16-bit input, node by node does not.
    formula = joined_reference if dtype in LOW_PRECISION else joined_peer
    results: dict[str, list] = {}
    for seed in range(6):
        tensors = operands(*shape, dtype)[: 4 if bias else 3]
        parents = random_parents(shape[0], seed)
        grad = torch.randn(shape[0], 2 * shape[2]).to(dtype)
        columns = (
            run(joined(parents), *tensors, grad_output=grad),
            truth_of(joined_reference(parents), *tensors, grad_output=grad),
            run(formula(parents), *tensors, grad_output=grad),
        )
        for name, *triple in zip(NAMES, *((output, *grads) for output, grads in columns), strict=False):
            results.setdefault(name, []).append([t.reshape(-1) for t in triple])
    floor = FLOAT64_ERROR if dtype is torch.float64 else 1.25 * FLOOR[dtype]
    for name, triples in results.items():
        ours, exact, theirs = (torch.cat(tensors) for tensors in zip(*triples, strict=True))
        error, peer = relative_error(ours, exact), relative_error(theirs, exact)
        assert error <= max(MARGIN[dtype][name != NAMES[0]] * peer, floor), (
            f"{name}: error {error:.3e}, torch {peer:.3e}"
        )


@pytest.mark.parametrize("name", ["h", "c"])
def test_one_of_the_results(backend, name):
    tensors = operands()
    parents = random_parents(13)
    forest = Forest.from_parents(parents)
    index = "hc".index(name)
    grad = torch.randn(13, 7).double()
    _, grads = run(lambda x, *w: tree_lstm(x, forest, *w)[index], *tensors, grad_output=grad)
    _, truth = truth_of(lambda *t: reference(parents, *t)[index], *tensors, grad_output=grad)
    for a, b in zip(grads, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_chain_is_an_lstm(backend):
    lstm = torch.nn.LSTM(5, 7, dtype=torch.float64)
    x = torch.randn(9, 1, 5).double()
    layer = pynn.nn.TreeLSTM(5, 7, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_ih.copy_(lstm.weight_ih_l0)
        layer.weight_hh.copy_(lstm.weight_hh_l0)
        layer.bias.copy_(lstm.bias_ih_l0 + lstm.bias_hh_l0)
    h, c = layer(x[:, 0], torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, -1]))
    output, (_, c_n) = lstm(x)
    torch.testing.assert_close(h, output[:, 0])
    torch.testing.assert_close(c[-1], c_n[0, 0])


def test_numbering_and_batching_do_not_matter(backend):
    """P5: the same bits for nodes in another order and for trees alone; a product of more rows may sum otherwise."""
    tensors = operands(dtype=torch.float32)
    parents = random_parents(13)
    h, c = tree_lstm(tensors[0], Forest.from_parents(parents), *tensors[1:])
    order = torch.randperm(13)
    place = torch.argsort(order)
    moved = torch.where(parents[order] < 0, -1, place[parents[order].clamp(min=0)])
    h2, c2 = tree_lstm(tensors[0][order], Forest.from_parents(moved), *tensors[1:])
    torch.testing.assert_close(h2, h[order], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(c2, c[order], rtol=1e-6, atol=1e-6)
    for count in (1, 2):
        with threads(count):
            again = tree_lstm(tensors[0], Forest.from_parents(parents), *tensors[1:])
        assert_bitwise(again[0], h)
        assert_bitwise(again[1], c)


def test_strides(backend):
    tensors = operands(dtype=torch.float32)
    parents = random_parents(13)
    fn = joined(parents)
    truth = fn(*tensors)
    for i, tensor in enumerate(tensors):
        for name, view in layouts(tensor):
            got = fn(*tensors[:i], view, *tensors[i + 1 :])
            torch.testing.assert_close(got, truth, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_gradcheck(backend):
    tensors = [t.requires_grad_() for t in operands(6, 2, 3)]
    fn = joined(random_parents(6))
    torch.autograd.gradcheck(fn, tensors, fast_mode=backend.name != "cpu")
    if backend.name == "cpu":
        torch.autograd.gradgradcheck(fn, tensors)


def test_transforms(backend):
    forest = Forest.from_parents(random_parents(6))
    transforms.assert_all(lambda *t: tree_lstm(t[0], forest, *t[1:])[0], *operands(6, 2, 3))


def test_opcheck(backend):
    forest = Forest.from_parents(random_parents(6))
    arguments = (*operands(6, 2, 3), forest.child_offsets, forest.children, list(forest.levels))
    torch.library.opcheck(backend.ops.tree_lstm_fwd.default, arguments)
    h, c, gates, sums = backend.ops.tree_lstm_fwd(*arguments)
    backward = (torch.randn_like(h), None, *arguments, h, c, gates, sums, [True, True, False, True])
    torch.library.opcheck(backend.ops.tree_lstm_bwd.default, backward)


@generated(st.integers(1, 20), st.integers(1, 4), st.integers(1, 20), st.integers(1, 6), st.integers(0, 10**6))
def test_generated(backend, nodes, size, hidden, trees, seed):
    torch.manual_seed(seed)
    tensors = operands(nodes, size, hidden)
    parents = random_parents(nodes, seed, trees)
    h, c = tree_lstm(tensors[0], Forest.from_parents(parents), *tensors[1:])
    expected = reference(parents, *tensors)
    torch.testing.assert_close(h, expected[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(c, expected[1], rtol=1e-9, atol=1e-11)


def test_no_nodes(backend):
    tensors = [t.requires_grad_() for t in operands(0)]
    h, c = tree_lstm(tensors[0], Forest.from_parents(torch.empty(0, dtype=torch.int64)), *tensors[1:])
    assert h.shape == c.shape == (0, 7)
    grads = torch.autograd.grad(h.sum() + c.sum(), tensors)
    assert all(not g.any() for g in grads)


def test_forest():
    forest = Forest.from_parents(torch.tensor([2, 2, -1, -1, 3]))
    assert forest.levels == (0, 3, 5)
    assert forest.order.tolist() == [0, 1, 4, 2, 3]
    assert forest.place.tolist() == [0, 1, 3, 4, 2]
    assert forest.child_offsets.tolist() == [0, 0, 0, 0, 2, 3]
    assert forest.children.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        (torch.tensor([1, 0]), "circle"),
        (torch.tensor([0]), "circle"),
        (torch.tensor([5, -1]), "expected parents from -1 to 1, got -1 to 5"),
        (torch.tensor([-2]), "expected parents from -1"),
        (torch.tensor([0.5]), "integers"),
        (torch.zeros(1, 1, dtype=torch.int64), "integers"),
    ],
)
def test_bad_parents(parents, message):
    with pytest.raises(ValueError, match=message):
        Forest.from_parents(parents)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
def test_bad_layer(sizes):
    with pytest.raises(ValueError, match="greater than 0"):
        pynn.nn.TreeLSTM(*sizes)


def bad_call(rng: random.Random):
    """(description, call) of the op itself with one operand spoiled."""
    torch.manual_seed(rng.randrange(10**6))
    nodes = rng.randint(2, 6)
    forest = Forest.from_parents(random_parents(nodes, rng.randrange(100), 1))
    x, weight_ih, weight_hh, bias = operands(nodes, 2, 3)
    arguments = [x, weight_ih, weight_hh, bias, forest.child_offsets, forest.children, list(forest.levels)]
    names = ["input", "weight_ih", "weight_hh", "bias", "child_offsets", "children", "levels"]
    i = rng.randrange(7)
    if i < 4:
        ways = [lambda t: t[:-1], lambda t: t.float(), lambda t: t.long(), lambda t: t.unsqueeze(0)]
    elif i == 4:
        ways = [lambda t: t[1:], lambda t: t + 1, lambda t: t.flip(0), lambda t: t.int(), lambda t: t[None]]
    elif i == 5:
        ways = [lambda t: t + nodes, lambda t: t - nodes, lambda t: t[:-1], lambda t: t.double(), lambda t: t[None]]
        if nodes > 2:
            ways.append(lambda t: t[:1].expand(t.shape))
    else:
        ways = [
            lambda v: [],
            lambda v: v[1:],
            lambda v: v[:-1],
            lambda v: [*v, v[-1]],
            lambda v: [0, nodes, nodes // 2],
        ]
    way = rng.randrange(len(ways))
    arguments[i] = ways[way](arguments[i])
    if rng.random() < 0.5:
        return f"tree_lstm_fwd {names[i]} {way}", lambda: ops.tree_lstm_fwd(*arguments)
    h, wide = torch.zeros(nodes, 3).double(), torch.zeros(nodes, 12).double()
    arguments = [h, None, *arguments, h, h, wide, h, [True] * 4]
    return f"tree_lstm_bwd {names[i]} {way}", lambda: ops.tree_lstm_bwd(*arguments)


def test_bad_calls():
    assert_rejects("test_tree_lstm", 500)
