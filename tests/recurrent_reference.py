"""Recurrent layers written out, generators of problems, and both libraries as functions of the same arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from policy import FLOOR, relative_error

from pynn.ops.recurrent import gru, lstm, rnn

GATES = {"lstm": 4, "gru": 3, "rnn": 1}


@dataclasses.dataclass
class Problem:
    """Operands of one layer and direction. tensors: input, states and weights, those that have gradients."""

    cell: str
    tensors: dict[str, torch.Tensor | None]
    lengths: torch.Tensor | None = None
    reverse: bool = False
    relu: bool = False

    def __post_init__(self):
        self.names = [name for name, t in self.tensors.items() if t is not None]

    @property
    def input(self):
        return self.tensors["input"]

    def to(self, device=None, dtype=None):
        tensors = {k: None if t is None else t.to(device=device, dtype=dtype) for k, t in self.tensors.items()}
        lengths = None if self.lengths is None else self.lengths.to(device=device)
        return dataclasses.replace(self, tensors=tensors, lengths=lengths)

    def with_leaves(self, frozen=()):
        tensors = {
            k: None if t is None else t.detach().requires_grad_(k not in frozen) for k, t in self.tensors.items()
        }
        return dataclasses.replace(self, tensors=tensors)


def make(
    cell, steps=5, batch=3, size=4, hidden=6, *, dtype=torch.float64, bias=True, proj=0, lengths=None, reverse=False,
    relu=False, states=True, projected_input=False, scale=1.0,
):  # fmt: skip
    """A problem with weights of torch.nn's size. lengths: a list, or True for random ones."""
    rows, state, bound = GATES[cell] * hidden, proj or hidden, scale / hidden**0.5

    def weight(*shape):
        return ((torch.rand(shape, dtype=torch.float64) * 2 - 1) * bound).to(dtype)

    def data(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    tensors = {"input": data(steps, batch, rows if projected_input else size), "hx": data(batch, state)}
    if cell == "lstm":
        tensors["cx"] = data(batch, hidden)
    if not states:
        tensors = {k: v if k == "input" else torch.zeros_like(v) for k, v in tensors.items()}
    tensors["weight_ih"] = None if projected_input else weight(rows, size)
    tensors["weight_hh"] = weight(rows, state)
    tensors["bias_ih"], tensors["bias_hh"] = (weight(rows), weight(rows)) if bias else (None, None)
    if cell == "lstm":
        tensors["weight_hr"] = weight(proj, hidden) if proj else None
    if lengths is True:
        lengths = torch.randint(0, steps + 1, (batch,)).tolist()
    return Problem(cell, tensors, None if lengths is None else torch.tensor(lengths), reverse, relu)


def ours(p: Problem):
    """(output, last states ...) of pynn's op."""
    t = p.tensors
    weights = [t[k] for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    options = {"lengths": p.lengths, "reverse": p.reverse}
    if p.cell == "lstm":
        output, states = lstm(t["input"], (t["hx"], t["cx"]), *weights, t["weight_hr"], **options)
        return output, *states
    if p.cell == "gru":
        return gru(t["input"], t["hx"], *weights, **options)
    return rnn(t["input"], t["hx"], *weights, nonlinearity="relu" if p.relu else "tanh", **options)


def reference(p: Problem, positive: torch.Tensor | None = None):
    """(output, last states ...) row by row and step by step, from the formulas.

    positive: where a relu passes its argument on, instead of deciding by its sign.
    """
    t = {k: None if v is None else v.double() for k, v in p.tensors.items()}
    steps, batch = p.input.shape[:2]
    zero = 0.0
    rows, lasts = [], []
    for b in range(batch):
        length = steps if p.lengths is None else min(max(int(p.lengths[b]), 0), steps)
        h, c = t["hx"][b], t["cx"][b] if p.cell == "lstm" else None
        outputs = [torch.zeros_like(h)] * steps
        for i in range(length):
            at = length - 1 - i if p.reverse else i
            x = t["input"][at, b] if t["weight_ih"] is None else t["weight_ih"] @ t["input"][at, b]
            x = x + (zero if t["bias_ih"] is None else t["bias_ih"])
            y = t["weight_hh"] @ h + (zero if t["bias_hh"] is None else t["bias_hh"])
            if p.cell == "lstm":
                i_, f, g, o = (x + y).chunk(4)
                c = f.sigmoid() * c + i_.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                h = h if t["weight_hr"] is None else t["weight_hr"] @ h
            elif p.cell == "gru":
                (xr, xz, xn), (hr, hz, hn) = x.chunk(3), y.chunk(3)
                z, n = (xz + hz).sigmoid(), (xn + (xr + hr).sigmoid() * hn).tanh()
                h = (1 - z) * n + z * h
            elif p.relu:
                h = (x + y).relu() if positive is None else (x + y) * positive[at, b]
            else:
                h = (x + y).tanh()
            outputs[at] = h
        rows.append(torch.stack(outputs))
        lasts.append((h,) if c is None else (h, c))
    return torch.stack(rows, 1), *(torch.stack(state) for state in zip(*lasts, strict=True))


def torchs(p: Problem):
    """(output, last states ...) of torch's layer; without lengths."""
    t = p.tensors
    weights = [w for k, w in t.items() if k.startswith(("weight", "bias")) and w is not None]
    x = t["input"].flip(0) if p.reverse else t["input"]
    options = (weights, t["bias_ih"] is not None, 1, 0.0, False, False, False)
    if p.cell == "lstm":
        output, h, c = torch._VF.lstm(x, (t["hx"][None], t["cx"][None]), *options)
    else:
        op = torch._VF.gru if p.cell == "gru" else torch._VF.rnn_relu if p.relu else torch._VF.rnn_tanh
        output, h = op(x, t["hx"][None], *options)
    output = output.flip(0) if p.reverse else output
    return (output, h[0], c[0]) if p.cell == "lstm" else (output, h[0])


def gradients(fn, p: Problem, grads, frozen=()):
    """(results, gradients by name) of the sum of results times grads; a grad of None leaves its result out."""
    p = p.with_leaves(frozen)
    results = fn(p)
    # A reference whose rows are all of length 0 has a constant output.
    used = [(r, g.to(r.dtype)) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
    names = [n for n in p.names if n not in frozen]
    leaves = [p.tensors[n] for n in names]
    if not used:
        return [r.detach() for r in results], dict.fromkeys(names)
    got = torch.autograd.grad([r for r, _ in used], leaves, [g for _, g in used], allow_unused=True)
    return [r.detach() for r in results], dict(zip(names, got, strict=True))


def seeds(p: Problem):
    """A random gradient for each result, in the dtype of the results."""
    with torch.no_grad():
        return [torch.randn(r.shape, dtype=torch.float64).to(r.dtype).to(r.device) for r in ours(p)]


# Of torch's error, in the output and in gradients. Those of float32 are of a sum's order, carried on from step to step;
# 16 bits are rounded at every step.
MARGIN = {torch.float32: (1.1, 1.25), torch.bfloat16: (1.0, 1.0), torch.float16: (1.0, 1.0)}


def assert_errors_are_no_larger_than_torchs(backend, problems: Iterable[Problem], dtype: torch.dtype) -> None:
    """P1 of results and all gradients, over several problems together: chance in one result does not decide."""
    # Kernels that get weight_ih x from the library, rounded, are compared with torch's that do: without oneDNN.
    with_onednn = backend.name == "cpu"
    columns: dict = {}
    for p in problems:
        grads = seeds(p)
        for column, fn, problem in (
            ("truth", torchs, p.to(dtype=torch.float64)),  # tied to the formulas by test_matches_the_formulas
            ("torch", torchs, p.to("cpu")),
            ("ours", ours, p),
        ):
            device = problem.input.device
            with torch.backends.mkldnn.flags(enabled=with_onednn or column != "torch"):
                results, got = gradients(fn, problem, [g.to(device) for g in grads])
            for name, tensor in (("output", results[0]), *got.items()):
                columns.setdefault(name, {}).setdefault(column, []).append(tensor.detach().cpu().reshape(-1))
    for name, column in columns.items():
        truth, theirs, mine = (torch.cat(column[c]) for c in ("truth", "torch", "ours"))
        peer, error = relative_error(theirs, truth), relative_error(mine, truth)
        limit = max(MARGIN[dtype][name != "output"] * peer, 1.25 * FLOOR[dtype])
        assert error <= limit, f"{p.cell} {name}: error {error:.3e} > {limit:.3e} (torch {peer:.3e})"
