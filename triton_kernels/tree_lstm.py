"""Child-sum tree LSTM in Triton. See csrc/include/tree_lstm.h: the order of rows here is i g o f.

The products of a level are the library's. A program of the kernels owns UNITS neighbouring units of one node and walks
the node's children, so its accesses are runs of elements; what it reads of the tree, all its lanes read together.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from .products import compute_dtype, product
from .recurrent_cells import sigmoid, tanh

UNITS = 128


@triton.jit
def edges_of(p_offsets, i_node, edges):
    """The edges begin <= e < end of a node, whatever the offsets hold."""
    begin = tl.minimum(tl.maximum(tl.load(p_offsets + i_node), 0), edges)
    end = tl.minimum(tl.maximum(tl.load(p_offsets + i_node + 1), 0), edges)
    return begin, end


@triton.jit
def sum_children_kernel(p_h, p_sums, p_offsets, p_children, first, hidden, edges, UNITS: tl.constexpr, A: tl.constexpr):
    """sums[n] = the sum of h over the children of n."""
    i_node = first + tl.program_id(0).to(tl.int64)
    o_unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    valid = o_unit < hidden
    begin, end = edges_of(p_offsets, i_node, edges)
    b_sum = tl.zeros([UNITS], A)
    for edge in range(begin, end):
        child = tl.load(p_children + edge)
        known = (child >= 0) & (child < first)
        b_sum += tl.load(p_h + child * hidden + o_unit, valid & known, 0.0).to(A)
    tl.store(p_sums + i_node * hidden + o_unit, b_sum.to(p_sums.dtype.element_ty), valid)


@triton.jit
def gate(p_gates, p_products, p_bias, o_unit, valid, hidden, GATE: tl.constexpr, A: tl.constexpr):
    """A pre-activation: the input's share, the state's, the bias."""
    b_pre = tl.load(p_gates + GATE * hidden + o_unit, valid, 0.0).to(A)
    if p_bias is not None:
        b_pre += tl.load(p_bias + GATE * hidden + o_unit, valid, 0.0).to(A)
    if p_products is not None:
        b_pre += tl.load(p_products + GATE * hidden + o_unit, valid, 0.0)
    return b_pre


@triton.jit
def forward_kernel(
    p_gates, p_products, p_forgets, p_bias, p_h, p_c, p_offsets, p_children, first, hidden, edges,
    UNITS: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """h, c and the gates of a node, and f of its children."""
    i_level = tl.program_id(0).to(tl.int64)
    i_node = first + i_level
    o_unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    valid = o_unit < hidden
    p_own = p_gates + i_node * 4 * hidden
    if p_products is not None:
        p_products += i_level * 3 * hidden
    b_i = sigmoid(gate(p_own, p_products, p_bias, o_unit, valid, hidden, 0, A))
    b_g = tanh(gate(p_own, p_products, p_bias, o_unit, valid, hidden, 1, A))
    b_o = sigmoid(gate(p_own, p_products, p_bias, o_unit, valid, hidden, 2, A))
    b_share = gate(p_own, None, p_bias, o_unit, valid, hidden, 3, A)
    b_c = b_i * b_g
    begin, end = edges_of(p_offsets, i_node, edges)
    for edge in range(begin, end):
        child = tl.load(p_children + edge)
        known = valid & (child >= 0) & (child < first)
        b_f = sigmoid(b_share + tl.load(p_forgets + child * hidden + o_unit, known, 0.0))
        tl.store(p_gates + (child * 4 + 3) * hidden + o_unit, b_f.to(p_gates.dtype.element_ty), known)
        b_c += b_f * tl.load(p_c + child * hidden + o_unit, known, 0.0)
    tl.store(p_own + o_unit, b_i.to(p_gates.dtype.element_ty), valid)
    tl.store(p_own + hidden + o_unit, b_g.to(p_gates.dtype.element_ty), valid)
    tl.store(p_own + 2 * hidden + o_unit, b_o.to(p_gates.dtype.element_ty), valid)
    tl.store(p_c + i_node * hidden + o_unit, b_c, valid)
    tl.store(p_h + i_node * hidden + o_unit, (b_o * tanh(b_c)).to(p_h.dtype.element_ty), valid)


@triton.jit
def backward_kernel(
    p_grad_h, p_grad_c, p_gates, p_c, p_grad_sums, p_from_forget, p_parents, p_grad_cells, p_grad_gates,
    p_grad_forgets, p_offsets, p_children, first, hidden, edges, UNITS: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Gradients of a node's pre-activations and of c, and of the f of its children, which learn who their parent is."""
    i_level = tl.program_id(0).to(tl.int64)
    i_node = first + i_level
    o_unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    valid = o_unit < hidden
    o_state = i_node * hidden + o_unit
    p_own = p_gates + i_node * 4 * hidden
    b_i = tl.load(p_own + o_unit, valid, 0.0).to(A)
    b_g = tl.load(p_own + hidden + o_unit, valid, 0.0).to(A)
    b_o = tl.load(p_own + 2 * hidden + o_unit, valid, 0.0).to(A)
    b_tanh = tanh(tl.load(p_c + o_state, valid, 0.0))
    b_grad = tl.zeros([UNITS], A)
    b_dc = tl.zeros([UNITS], A)
    if p_grad_h is not None:
        b_grad += tl.load(p_grad_h + o_state, valid, 0.0).to(A)
    if p_grad_c is not None:
        b_dc += tl.load(p_grad_c + o_state, valid, 0.0)
    if p_from_forget is not None:
        parent = tl.load(p_parents + i_node)
        has = valid & (parent >= 0)
        b_grad += tl.load(p_grad_sums + parent * hidden + o_unit, has, 0.0)
        b_grad += tl.load(p_from_forget + i_level * hidden + o_unit, has, 0.0)
        b_forget = tl.load(p_own + 3 * hidden + o_unit, has, 0.0).to(A)
        b_dc += tl.load(p_grad_cells + parent * hidden + o_unit, has, 0.0) * b_forget
    b_dc += b_grad * b_o * (1.0 - b_tanh) * (1.0 + b_tanh)
    tl.store(p_grad_cells + o_state, b_dc, valid)
    b_sum = tl.zeros([UNITS], A)
    begin, end = edges_of(p_offsets, i_node, edges)
    for edge in range(begin, end):
        child = tl.load(p_children + edge)
        known = (child >= 0) & (child < first)
        b_f = tl.load(p_gates + (child * 4 + 3) * hidden + o_unit, valid & known, 0.0).to(A)
        b_child = b_dc * tl.load(p_c + child * hidden + o_unit, valid & known, 0.0) * b_f * (1.0 - b_f)
        tl.store(p_grad_forgets + child * hidden + o_unit, b_child.to(p_grad_forgets.dtype.element_ty), valid & known)
        b_sum += b_child
        tl.store(p_parents + child, i_node, known & (tl.program_id(1) == 0))
    p_to = p_grad_gates + i_node * 4 * hidden
    tl.store(p_to + o_unit, (b_dc * b_g * b_i * (1.0 - b_i)).to(p_grad_gates.dtype.element_ty), valid)
    tl.store(p_to + hidden + o_unit, (b_dc * b_i * (1.0 - b_g) * (1.0 + b_g)).to(p_grad_gates.dtype.element_ty), valid)
    tl.store(p_to + 2 * hidden + o_unit, (b_grad * b_tanh * b_o * (1.0 - b_o)).to(p_grad_gates.dtype.element_ty), valid)
    tl.store(p_to + 3 * hidden + o_unit, b_sum.to(p_grad_gates.dtype.element_ty), valid)


def _launch(kernel, level: tuple[int, int], like: torch.Tensor, hidden: int, *args) -> None:
    """Runs kernel(*args, first, hidden, edges) for every node of a level; the last of args are the tree's tensors."""
    first, last = level
    compute = tl.float64 if like.dtype is torch.float64 else tl.float32
    units = min(UNITS, max(16, triton.next_power_of_2(hidden)))
    with torch.cuda.device_of(like):
        kernel[(last - first, triton.cdiv(hidden, units))](
            *args, first, hidden, args[-1].numel(), UNITS=units, A=compute, num_warps=1
        )


def tree_lstm_fwd(input, weight_ih, weight_hh, bias, child_offsets, children, levels):
    """tree_lstm_fwd(Tensor input, Tensor weight_ih, Tensor weight_hh, Tensor? bias, Tensor child_offsets,
    Tensor children, SymInt[] levels) -> (Tensor h, Tensor c, Tensor gates, Tensor sums)"""
    nodes, hidden = input.shape[0], weight_hh.shape[1]
    h = input.new_empty((nodes, hidden))
    c, forgets = (h.new_empty(h.shape, dtype=compute_dtype(h)) for _ in range(2))
    sums = torch.zeros_like(h)  # of the leaves, which no launch writes
    gates = product(input, weight_ih.t())
    tree = (child_offsets.contiguous(), children.contiguous())
    bias = None if bias is None else bias.contiguous()
    own, forget = weight_hh.split((3 * hidden, hidden))
    for number, (first, last) in enumerate(itertools.pairwise(levels)):
        products = None
        if number > 0:
            _launch(sum_children_kernel, (first, last), h, hidden, h, sums, *tree)
            products = product(sums[first:last], own.t(), c.dtype)
        _launch(forward_kernel, (first, last), h, hidden, gates, products, forgets, bias, h, c, *tree)
        if last < nodes:
            forgets[first:last] = product(h[first:last], forget.t(), c.dtype)
    return h, c, gates, sums


def tree_lstm_bwd(
    grad_h, grad_c, input, weight_ih, weight_hh, bias, child_offsets, children, levels, h, c, gates, sums, output_mask
):
    """tree_lstm_bwd(Tensor? grad_h, Tensor? grad_c, Tensor input, Tensor weight_ih, Tensor weight_hh, Tensor? bias,
    Tensor child_offsets, Tensor children, SymInt[] levels, Tensor h, Tensor c, Tensor gates, Tensor sums,
    bool[4] output_mask)
    -> (Tensor grad_input, Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias)"""
    nodes, hidden = h.shape
    h, c, gates, sums = (t.contiguous() for t in (h, c, gates, sums))
    grad_h, grad_c = (None if t is None else t.contiguous() for t in (grad_h, grad_c))
    grad_gates = torch.empty_like(gates)
    grad_forgets = torch.zeros_like(h)  # of the nodes without a parent, which no launch writes
    grad_sums, grad_cells = torch.empty_like(c), torch.empty_like(c)
    parents = children.new_full((nodes,), -1)
    tree = (child_offsets.contiguous(), children.contiguous())
    own, forget = weight_hh.split((3 * hidden, hidden))
    for first, last in reversed(list(itertools.pairwise(levels))):
        from_forget = product(grad_forgets[first:last], forget, c.dtype) if last < nodes else None
        _launch(
            backward_kernel, (first, last), h, hidden, grad_h, grad_c, gates, c, grad_sums, from_forget, parents,
            grad_cells, grad_gates, grad_forgets, *tree,
        )  # fmt: skip
        if first > 0:
            grad_sums[first:last] = product(grad_gates[first:last, : 3 * hidden], own, c.dtype)
    nothing = input.new_empty(0)
    grad_weight_hh = nothing
    if output_mask[2]:
        grad_weight_hh = torch.cat((product(grad_gates[:, : 3 * hidden].t(), sums), product(grad_forgets.t(), h)))
    return (
        product(grad_gates, weight_ih) if output_mask[0] else nothing,
        product(grad_gates.t(), input) if output_mask[1] else nothing,
        grad_weight_hh,
        grad_gates.sum(0, dtype=c.dtype).to(input.dtype) if output_mask[3] and bias is not None else nothing,
    )
