"""tree_lstm: the child-sum tree LSTM, all nodes of all trees of a batch, level by level.

    s = sum of h[k] over the children k,     i, o = sigmoid(.), g = tanh(.)   where (.) = W x + U s + b
    f[k] = sigmoid(W x + U h[k] + b),        c = i * g + sum over k of f[k] * c[k],      h = o * tanh(c)

Rows of W and U are lstm's, i f g o: a tree that is a chain is an LSTM. For every level there is one product with U for
s, one for the f of the level's own parents, and one fused pass. Saved for backward: h, c, the gates and s. The paper:
Tai, Socher and Manning, "Improved Semantic Representations From Tree-Structured Long Short-Term Memory Networks",
https://arxiv.org/abs/1503.00075.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .. import backends
from ._forest import Forest
from ._function import autocast, call, call_in_backward, compute_dtype, double_backward, eager, loop_vmap
from ._registry import define

_OPERANDS = "Tensor input, Tensor weight_ih, Tensor weight_hh, Tensor? bias"
_FOREST = "Tensor child_offsets, Tensor children, SymInt[] levels"


@define(f"tree_lstm_fwd({_OPERANDS}, {_FOREST}) -> (Tensor h, Tensor c, Tensor gates, Tensor sums)", triton="tree_lstm")
def _(input, weight_ih, weight_hh, bias, child_offsets, children, levels):
    nodes, hidden = input.shape[0], weight_hh.shape[1]
    h = input.new_empty((nodes, hidden))
    return h, h.new_empty(h.shape, dtype=compute_dtype(input)), h.new_empty((nodes, 4 * hidden)), h.new_empty(h.shape)


@define(
    f"tree_lstm_bwd(Tensor? grad_h, Tensor? grad_c, {_OPERANDS}, {_FOREST}, Tensor h, Tensor c, Tensor gates,"
    " Tensor sums, bool[4] output_mask) -> (Tensor grad_input, Tensor grad_weight_ih, Tensor grad_weight_hh,"
    " Tensor grad_bias)",
    triton="tree_lstm",
)
def _(
    grad_h, grad_c, input, weight_ih, weight_hh, bias, child_offsets, children, levels, h, c, gates, sums, output_mask
):
    like = (input, weight_ih, weight_hh, weight_ih[:, 0] if bias is None else bias)
    wanted = (*output_mask[:3], output_mask[3] and bias is not None)
    return tuple(t.new_empty(t.shape if want else 0) for t, want in zip(like, wanted, strict=True))


def _own_then_forget(tensor: Tensor | None) -> Tensor | None:
    """Rows i f g o as the kernels have them, i g o f: what a node's own state decides lies together."""
    if tensor is None:
        return None
    i, f, g, o = tensor.chunk(4)
    return torch.cat((i, g, o, f))


def _composite(input, weight_ih, weight_hh, bias, *, child_offsets, children, levels):
    """(h, c) in differentiable torch operations; rows of the weights are i g o f."""
    dtype = compute_dtype(input)
    x = torch.nn.functional.linear(input.to(dtype), weight_ih.to(dtype), None if bias is None else bias.to(dtype))
    hidden = weight_hh.shape[1]
    own, forget = weight_hh.to(dtype).split((3 * hidden, hidden))
    h = x.new_zeros((0, hidden))
    c = h
    for first, last in itertools.pairwise(levels):
        counts = child_offsets[first + 1 : last + 1] - child_offsets[first:last]
        parent = torch.repeat_interleave(torch.arange(last - first, device=x.device), counts)  # (edges of the level)
        child = children[child_offsets[first] : child_offsets[last]]
        level = x[first:last]
        sums = x.new_zeros((last - first, hidden)).index_add(0, parent, h[child])
        i, g, o = (level[:, : 3 * hidden] + sums @ own.t()).chunk(3, -1)
        f = (level[:, 3 * hidden :][parent] + h[child] @ forget.t()).sigmoid()
        new = (i.sigmoid() * g.tanh()).index_add(0, parent, f * c[child])
        h, c = torch.cat((h, o.sigmoid() * new.tanh())), torch.cat((c, new))
    return h.to(input.dtype), c


@eager
class TreeLSTMBackward(torch.autograd.Function):
    """Gradients of input, weights and bias; its own gradient comes from torch operations."""

    @staticmethod
    def forward(grad_h, grad_c, input, *operands):
        return backends.op("tree_lstm_bwd", input)(grad_h, grad_c, input, *operands)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:8])
        ctx.levels, ctx.mask = inputs[8], inputs[13]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grad_grads):
        grad_h, grad_c, *inputs, child_offsets, children = ctx.saved_tensors
        like = inputs[0].new_zeros((inputs[0].shape[0], inputs[2].shape[1]))
        dy = (
            like if grad_h is None else grad_h,
            like.to(compute_dtype(like)) if grad_c is None else grad_c,
        )
        wanted = [g if m else None for g, m in zip(grad_grads, ctx.mask, strict=True)]
        forest = {"child_offsets": child_offsets, "children": children, "levels": ctx.levels}
        (to_h, to_c), to_inputs = double_backward(lambda *xs: _composite(*xs, **forest), dy, inputs, wanted)
        to_grads = (None if grad_h is None else to_h, None if grad_c is None else to_c)
        return (*to_grads, *to_inputs, *(None,) * 8)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return loop_vmap(TreeLSTMBackward, info, in_dims, *inputs)


@eager
class TreeLSTM(torch.autograd.Function):
    """(h, c, gates, sums); only the first two are differentiable. Rows of the weights are i g o f."""

    @staticmethod
    def forward(input, weight_ih, weight_hh, bias, child_offsets, children, levels):
        op = backends.op("tree_lstm_fwd", input)  # no *inputs here: torch.compile counts the parameters
        return op(input, weight_ih, weight_hh, bias, child_offsets, children, levels)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6], *output)
        ctx.levels = inputs[6]

    @staticmethod
    def backward(ctx, grad_h, grad_c, _gates, _sums):
        if grad_h is None and grad_c is None:
            return (None,) * 7
        *operands, h, c, gates, sums = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:4])
        inputs = (grad_h, grad_c, *operands, ctx.levels, h, c, gates, sums, mask)
        grads = call_in_backward(TreeLSTMBackward, *inputs)
        return (*(g if m else None for g, m in zip(grads, mask, strict=True)), None, None, None)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return loop_vmap(TreeLSTM, info, in_dims, *inputs)


def tree_lstm(
    input: Tensor, forest: Forest, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Child-sum tree LSTM over every node of a forest.

    Args:
        input: (N, I) float64, float32, float16 or bfloat16, a row for each node in the caller's numbering.
        forest: the trees; on the device of input.
        weight_ih: (4H, I), weight_hh: (4H, H), bias: (4H), rows i f g o.
    Returns:
        h (N, H) in input's dtype and c (N, H), float32 for 16-bit input, of each node in the caller's numbering.
    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    if input.dim() != 2 or input.shape[0] != forest.order.shape[0]:
        raise RuntimeError(f"tree_lstm: expected input of shape [{forest.order.shape[0]}, I], got {list(input.shape)}")
    input, weight_ih, weight_hh, bias = autocast(input, weight_ih, weight_hh, bias)
    weights = (_own_then_forget(t) for t in (weight_ih, weight_hh, bias))
    x = input.index_select(0, forest.order)
    h, c, *_ = call(TreeLSTM, x, *weights, forest.child_offsets, forest.children, list(forest.levels))
    return h.index_select(0, forest.place), c.index_select(0, forest.place)
