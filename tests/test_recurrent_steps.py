"""Cells in loops, whose steps leave their weight gradients to one product: values, and whose weights they are."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import pytest
import torch
from policy import assert_bitwise, threads
from torch.utils.checkpoint import checkpoint

import pynn
from pynn.ops import _recurrent_steps as steps
from pynn.ops import _recurrent_weights as shared_weights

CELLS = [("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"})]

pytestmark = pytest.mark.usefixtures("cpu_kernels")


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    """Weights of any size are worth it, and few rows are many."""
    monkeypatch.setattr(steps, "_SIZE", 0)
    monkeypatch.setattr(steps, "_TIMES", 0)
    monkeypatch.setattr(shared_weights, "ROWS", 7)


def cells(name, sizes=(5, 6), dtype=torch.float64, **options):
    """torch.nn's cell and ours, with the same weights."""
    torch.manual_seed(3)
    theirs = getattr(torch.nn, name)(*sizes, dtype=dtype, **options)
    mine = getattr(pynn.nn, name)(*sizes, dtype=dtype, **options)
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine


def loop(cell, x, states=None):
    outputs = []
    for step in x:
        states = cell(step, states)
        outputs.append(states[0] if isinstance(states, tuple) else states)
    return torch.stack(outputs)


def gradients(cell, x, **options):
    output = loop(cell, x)
    wanted = [x, *(p for p in cell.parameters() if p.requires_grad)]
    return torch.autograd.grad((output * output.cos()).sum(), wanted, **options)


def sample(length=6, batch=3, size=5, dtype=torch.float64):
    return torch.randn(length, batch, size, dtype=dtype, generator=torch.Generator().manual_seed(4)).requires_grad_()


def assert_same(theirs, mine, x):
    for want, got in zip(gradients(theirs, x), gradients(mine, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), CELLS)
@pytest.mark.parametrize(
    ("length", "batch", "sizes", "bias"), [(6, 3, (5, 6), True), (1, 1, (1, 1), False), (9, 20, (35, 33), True)]
)
def test_gradients_are_torchs(name, options, length, batch, sizes, bias):
    theirs, mine = cells(name, sizes, bias=bias, **options)
    assert_same(theirs, mine, sample(length, batch, sizes[0]))


@pytest.mark.parametrize(("name", "options"), CELLS)
def test_error_is_no_larger_than_torchs(name, options, monkeypatch):
    monkeypatch.setattr(shared_weights, "ROWS", 256)
    theirs, mine = cells(name, (40, 48), torch.float32, **options)
    x = sample(60, 9, 40, torch.float32)
    truth = gradients(theirs.double(), x.double().detach().requires_grad_())
    for want, got, peer in zip(truth, gradients(mine, x), gradients(theirs.float(), x), strict=True):
        assert (got - want).norm() <= max(1.2 * (peer - want).norm(), 1.5e-7 * want.norm())


def test_large_loops_wait_and_small_ones_do_not(monkeypatch):
    monkeypatch.undo()
    assert not steps._waits(torch.zeros(1, 1, 64), tuple(pynn.nn.LSTMCell(64, 64).parameters()))
    assert not steps._waits(torch.zeros(1, 96, 256), tuple(pynn.nn.LSTMCell(256, 256).parameters()))
    assert steps._waits(torch.zeros(1, 16, 512), tuple(pynn.nn.LSTMCell(512, 512).parameters()))


def test_a_weight_has_one_gradient_per_backward_pass():
    _, mine = cells("LSTMCell")
    seen = []
    mine.weight_hh.register_hook(lambda grad: seen.append(grad))
    loop(mine, sample()).sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], mine.weight_hh.grad)


@pytest.mark.parametrize("frozen", [["weight_ih"], ["weight_hh"], ["bias_ih"], ["weight_ih", "weight_hh", "bias_hh"]])
def test_frozen_weights(frozen):
    theirs, mine = cells("GRUCell")
    for name in frozen:
        for cell in (theirs, mine):
            getattr(cell, name).requires_grad_(False)
    assert_same(theirs, mine, sample())
    for name in frozen:  # while a graph lives
        output = loop(mine, sample())
        for cell in (theirs, mine):
            getattr(cell, name).requires_grad_(True)
        assert_same(theirs, mine, sample())
        del output


def test_gradients_that_do_not_come_to_the_weights_leave_nothing():
    _, mine = cells("LSTMCell")
    x = sample()
    output = loop(mine, x)
    (shared,) = (
        reference() for reference in shared_weights._of_graphs.values() if reference().given[1] is mine.weight_hh
    )
    torch.autograd.grad(output.sum(), x, retain_graph=True)
    assert not shared.waiting
    first = torch.autograd.grad(output.sum(), mine.weight_hh, retain_graph=True)
    again = torch.autograd.grad(output.sum(), mine.weight_hh)
    assert_bitwise(first[0], again[0])
    assert not shared.waiting


def test_graphs_share_and_gradients_accumulate():
    theirs, mine = cells("LSTMCell")
    xs = [sample(length) for length in (3, 5)]
    for cell in (theirs, mine):
        first, second = (loop(cell, x) for x in xs)
        first.sum().backward()
        second.sum().backward()
        (loop(cell, xs[0]) * loop(cell, xs[1]).mean()).sum().backward()
    for want, got in zip(theirs.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), CELLS[:3])
def test_second_derivatives(name, options):
    theirs, mine = cells(name, **options)
    x = sample(3)
    results = []
    for cell in (theirs, mine):
        grads = gradients(cell, x, create_graph=True)
        results.append(torch.autograd.grad(sum((g * g).sum() for g in grads), [x, *cell.parameters()]))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def replace(cell):
    cell.weight_ih.data = cell.weight_ih.data * 1.5


def write_through_data(cell):
    cell.weight_hh.data.mul_(0.7)


def write_without_grad(cell):
    with torch.no_grad():
        cell.weight_hh.mul_(0.7)
        cell.bias_ih.add_(0.1)


def optimize(cell):
    torch.optim.SGD(cell.parameters(), 0.1).step()


def load(cell):
    cell.load_state_dict({name: value * 0.5 for name, value in cell.state_dict().items()})


def new_parameter(cell):
    cell.weight_hh = torch.nn.Parameter(cell.weight_hh.detach() * 2)


CHANGES = [replace, write_through_data, write_without_grad, optimize, load, new_parameter]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("graph_lives", [False, True])
def test_changed_weights_are_seen(change, graph_lives):
    theirs, mine = cells("LSTMCell")
    x, kept = sample(), []
    for cell in (theirs, mine):
        output = loop(cell, x)
        output.sum().backward()
        kept += [output] if graph_lives else []
        change(cell)
    assert_same(theirs, mine, x)


@pytest.mark.parametrize("change", [write_through_data, replace, new_parameter])
def test_weights_changed_between_the_steps(change):
    """The later steps run with the new weights. torch's backward pass would take what lies there by then for all."""
    theirs, mine = cells("LSTMCell")
    x = sample()
    outputs = []
    for cell in (theirs, mine):
        state = cell(x[0])
        change(cell)
        outputs.append(cell(x[1], state)[0])
    torch.testing.assert_close(*outputs)
    if change is new_parameter:
        wants, gots = (torch.autograd.grad(o.sum(), c.weight_hh) for o, c in zip(outputs, (theirs, mine), strict=True))
        torch.testing.assert_close(gots, wants)


def test_weights_written_before_backward_are_an_error():
    _, mine = cells("LSTMCell")
    output = loop(mine, sample())
    write_without_grad(mine)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_weight_that_becomes_another_result_in_place():
    theirs, _ = cells("LSTMCell")
    x = sample()
    results = []
    for function in (torch._VF.lstm_cell, lambda x, hx, *w: pynn.ops.lstm_cell(x, hx, *w)):
        weights = [p.detach().clone().requires_grad_() for p in theirs.parameters()]
        hh = weights[1] * 1.0
        taken = [weights[0], hh, *weights[2:]]
        zeros = torch.zeros(3, 6, dtype=x.dtype)
        factor = torch.tensor(1.1, dtype=x.dtype, requires_grad=True)
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            first = function(x[0], (zeros, zeros), *taken)
            hh.mul_(factor)
            second = function(x[1], first, *taken)
            results.append(torch.autograd.grad(second[0].sum(), [factor, weights[1]]))
    torch.testing.assert_close(*results)


def test_parameters_die_and_others_come_to_their_place():
    before = len(shared_weights._of_graphs)
    for round in range(20):
        theirs, mine = cells("LSTMCell", (5, 6 + round % 2))
        dead = weakref.ref(mine.weight_hh)
        assert_same(theirs, mine, sample())
        del mine
        gc.collect()
        assert dead() is None
    assert len(shared_weights._of_graphs) <= before


def test_a_failed_backward_pass_holds_nothing():
    _, mine = cells("LSTMCell")
    x = sample()

    def fail(grad):
        raise ValueError("on purpose")

    states = mine(x[0])
    states[0].register_hook(fail)
    output = loop(mine, x[1:], states)
    with pytest.raises(ValueError, match="on purpose"):
        output.sum().backward()
    dead = weakref.ref(mine.weight_hh)
    del mine, states, output
    gc.collect()
    assert dead() is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    theirs, mine = cells("LSTMCell")
    x = sample()
    results = []
    for cell in (theirs, mine):
        output = sum(checkpoint(loop, cell, x * factor, use_reentrant=reentrant).sum() for factor in (1, 2))
        results.append(torch.autograd.grad(output, list(cell.parameters())) if not reentrant else [])
        if reentrant:
            output.backward()
            results[-1] = [p.grad for p in cell.parameters()]
    torch.testing.assert_close(*results)


def test_batched_gradients():
    _, mine = cells("GRUCell")
    output = loop(mine, sample())
    seeds = torch.randn(4, *output.shape, dtype=output.dtype)
    batched = torch.autograd.grad(output, mine.weight_hh, seeds, is_grads_batched=True, retain_graph=True)[0]
    each = [torch.autograd.grad(output, mine.weight_hh, seed, retain_graph=True)[0] for seed in seeds]
    torch.testing.assert_close(batched, torch.stack(each))


def test_threads_and_forked_processes():
    _, mine = cells("LSTMCell")
    x = sample(20)
    want = gradients(mine, x)
    wrong = []

    def work():
        for _ in range(10):
            if not all(torch.equal(a, b) for a, b in zip(gradients(mine, x), want, strict=True)):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    output = loop(mine, x)  # a graph that lives in both
    if (child := os.fork()) == 0:
        equal = all(torch.equal(a, b) for a, b in zip(gradients(mine, x), want, strict=True))
        os._exit(0 if equal else 1)
    assert os.waitpid(child, 0)[1] == 0
    del output


@pytest.mark.parametrize(("name", "options"), CELLS)
def test_any_thread_count(name, options):
    _, mine = cells(name, (33, 40), torch.float32, **options)
    x = sample(12, 5, 33, torch.float32)
    results = []
    for count in (1, 3):
        with threads(count):
            results.append(gradients(mine, x))
    for one, three in zip(*results, strict=True):
        assert_bitwise(one, three)


def operands(cell, batch=3, size=5, hidden=6, dtype=torch.float64):
    gates = (4, 3, 1, 1)[cell]
    make = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    x, h, output = make(1, batch, size), make(batch, hidden), make(1, batch, hidden)
    c, cells = (make(batch, hidden), make(1, batch, hidden)) if cell == 0 else (None, None)
    saved = make(1, batch, 4 * hidden).sigmoid() if cell < 2 else None
    ih, hh = make(gates * hidden, size), make(gates * hidden, hidden)
    return [make(1, batch, hidden), None, None, x, h, c, ih, hh, output, saved, cells, cell, [True, True]]


@pytest.mark.parametrize("cell", range(4))
def test_ops(cell):
    step, weights = torch.ops.pynn.recurrent_step_bwd.default, torch.ops.pynn.recurrent_weights_bwd.default
    given = operands(cell)
    torch.library.opcheck(step, given, test_utils=("test_schema", "test_faketensor"))
    rows = [step(*given)[3], given[3][0], given[4]]
    torch.library.opcheck(weights, (*rows, cell, [True] * 3), test_utils=("test_schema", "test_faketensor"))
    found = weights(*rows, cell, [True, True, True])
    name = ("lstm", "gru", "rnn", "rnn")[cell]
    states, extra = (3, [given[5]]) if cell == 0 else (2, [])
    kept = [t for t in given[9:11] if t is not None]
    none = [None] * (4 if cell == 0 else 3)
    options = [cell == 3, False] if cell > 1 else [False]
    mask = [True] * (6 if cell == 0 else 4)
    zeros = torch.zeros(len(given[6]), dtype=torch.float64)
    whole = getattr(torch.ops.pynn, f"{name}_bwd")(
        *given[:states], *given[3:5], *extra, *given[6:8], zeros, *none[1:], given[8], *kept, *options, mask
    )
    assert_bitwise(step(*given)[0], whole[0])
    for a, b in zip(found[:3], whole[states : states + 3], strict=True):
        assert_bitwise(a, b)


@pytest.mark.parametrize(
    ("place", "value"),
    [(3, torch.zeros(2, 3, 5)), (3, torch.zeros(3, 5)), (4, torch.zeros(3, 7)), (7, torch.zeros(24, 7)), (9, None),
     (9, torch.zeros(1, 3, 5)), (5, None), (11, 7), (11, -1), (12, [True]), (8, torch.zeros(1, 2, 6)),
     (0, torch.zeros(3, 6)), (10, torch.zeros(1, 3, 6, dtype=torch.float64))],
)  # fmt: skip
def test_bad_operands_of_a_step(place, value):
    given = operands(0, dtype=torch.float32)
    given[place] = value
    with pytest.raises(RuntimeError):
        torch.ops.pynn.recurrent_step_bwd(*given)


@pytest.mark.parametrize(
    ("place", "value"),
    [(0, torch.zeros(3, 23)), (0, torch.zeros(2, 24)), (1, torch.zeros(3, 0)), (1, torch.zeros(3, 5).long()),
     (2, torch.zeros(3)), (2, torch.zeros(3, 6).double()), (3, 4), (4, [True] * 4)],
)  # fmt: skip
def test_bad_rows(place, value):
    given = [torch.zeros(3, 24), torch.zeros(3, 5), torch.zeros(3, 6), 0, [True] * 3]
    given[place] = value
    with pytest.raises(RuntimeError):
        torch.ops.pynn.recurrent_weights_bwd(*given)


def test_no_rows():
    found = torch.ops.pynn.recurrent_weights_bwd(
        torch.zeros(0, 24), torch.zeros(0, 5), torch.zeros(0, 6), 0, [True] * 3
    )
    assert [list(g.shape) for g in found] == [[24, 5], [24, 6], [24], [0]]
    assert not any(g.any() for g in found)
    _, mine = cells("LSTMCell")
    assert gradients(mine, sample(3, 0))[1].eq(0).all()
