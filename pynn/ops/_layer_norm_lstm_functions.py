"""The dispatcher ops of layer_norm_lstm, and their autograd Functions, forward and backward."""

from __future__ import annotations

import torch

from .. import backends
from . import _layer_norm_lstm_composite as composite
from ._function import call_in_backward, check_devices, compute_dtype, double_backward, eager, loop_vmap
from ._registry import define

_OPERANDS = (
    "Tensor input, Tensor hx, Tensor cx, Tensor weight_ih, Tensor weight_hh, Tensor? bias, Tensor? norm_ih,"
    " Tensor? norm_hh, Tensor? norm_cell, Tensor? norm_cell_bias, Tensor? peephole, Tensor? lengths, Tensor? key"
)
_OPTIONS = (
    "bool coupled, float eps, float zoneout_hidden, float zoneout_cell, float dropout, bool training, bool reverse"
)
_NAMES = [part.split()[1] for part in _OPTIONS.split(", ")]
_DIFFERENTIABLE, _TENSORS = 11, 13  # the first operands have gradients
STATISTICS = 6  # of csrc/include/layer_norm_lstm.h


@define(
    f"layer_norm_lstm_fwd({_OPERANDS}, {_OPTIONS}, bool save) -> (Tensor output, Tensor h_n, Tensor c_n,"
    " Tensor products_ih, Tensor products_hh, Tensor cells, Tensor statistics)",
    triton="layer_norm_lstm",
)
def _(input, hx, cx, weight_ih, weight_hh, *rest):
    tensors, save = rest[:8], rest[-1]
    check_devices("layer_norm_lstm", input, hx, cx, weight_ih, weight_hh, *tensors)
    steps, batch, _ = input.shape
    width, hidden = weight_hh.shape
    normed = tensors[1] is not None

    def saved(columns, wanted, dtype):
        return input.new_empty((steps, batch, columns) if save and wanted else 0, dtype=dtype)

    return (
        input.new_empty((steps, batch, hidden)),
        hx.new_empty(hx.shape),
        cx.new_empty(cx.shape),
        *(saved(width, True, input.dtype) for _ in range(2)),
        saved(hidden, True, compute_dtype(input)),
        saved(STATISTICS, normed, compute_dtype(input)),
    )


@define(
    f"layer_norm_lstm_bwd(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, {_OPERANDS}, Tensor output,"
    f" Tensor products_ih, Tensor products_hh, Tensor cells, Tensor statistics, {_OPTIONS}, bool[{_DIFFERENTIABLE}]"
    " output_mask) -> (Tensor grad_input, Tensor grad_hx, Tensor grad_cx, Tensor grad_weight_ih, Tensor grad_weight_hh,"
    " Tensor grad_bias, Tensor grad_norm_ih, Tensor grad_norm_hh, Tensor grad_norm_cell, Tensor grad_norm_cell_bias,"
    " Tensor grad_peephole)",
    triton="layer_norm_lstm",
)
def _(*arguments):
    operands, mask = arguments[3:][:_DIFFERENTIABLE], arguments[-1]
    check_devices("layer_norm_lstm", *arguments[:21])
    states = (1, 2)  # their gradients come with the others, wanted or not
    return tuple(
        operands[0].new_empty(0) if t is None or not (m or i in states) else t.new_empty(t.shape)
        for i, (t, m) in enumerate(zip(operands, mask, strict=True))
    )


@eager
class LayerNormLSTMBackward(torch.autograd.Function):
    """Gradients of the operands; its own gradient comes from torch operations."""

    @staticmethod
    def forward(*inputs):
        return backends.op("layer_norm_lstm_bwd", inputs[3])(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[: 3 + _TENSORS])
        ctx.options, ctx.mask, ctx.count = inputs[-1 - len(_NAMES) : -1], inputs[-1], len(inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grad_grads):
        grads, (*inputs, lengths, key) = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        input, hx, cx = inputs[:3]
        like = (hx.reshape(hx.shape[-2:]).expand(input.shape[0], *hx.shape[-2:]), hx, cx)
        dy = tuple(o.new_zeros(o.shape) if g is None else g for g, o in zip(grads, like, strict=True))
        wanted = [
            g if g is not None and x is not None and g.shape == x.shape else None
            for g, x in zip(grad_grads, inputs, strict=True)
        ]
        options = {"lengths": lengths, "key": key, **dict(zip(_NAMES, ctx.options, strict=True))}
        ddy, dinputs = double_backward(lambda *xs: composite.layer_norm_lstm(*xs, **options), dy, inputs, wanted)
        done = (*(None if g is None else d for g, d in zip(grads, ddy, strict=True)), *dinputs)
        return (*done, *(None,) * (ctx.count - len(done)))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return loop_vmap(LayerNormLSTMBackward, info, in_dims, *inputs)


@eager
class LayerNormLSTM(torch.autograd.Function):
    """(output, h_n, c_n, what backward reads); only the first three are differentiable."""

    @staticmethod
    def forward(*inputs):
        return backends.op("layer_norm_lstm_fwd", inputs[0])(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:_TENSORS], output[0], *output[3:])
        ctx.options = inputs[_TENSORS:-1]

    @staticmethod
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad
        grads = grads[:3]
        if all(g is None for g in grads):
            return (None,) * len(needed)
        inputs = (*grads, *ctx.saved_tensors, *ctx.options, list(needed[:_DIFFERENTIABLE]))
        results = call_in_backward(LayerNormLSTMBackward, *inputs)
        results = (*results, *(None,) * (len(needed) - len(results)))
        return tuple(r if n else None for r, n in zip(results, needed, strict=True))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return loop_vmap(LayerNormLSTM, info, in_dims, *inputs)
