"""The autograd Functions of lstm, gru and rnn, forward and backward."""

from __future__ import annotations

import torch

from .. import backends
from . import _recurrent_composite as composite
from . import _recurrent_schemas  # noqa: F401 (defines the ops)
from ._function import call, call_in_backward, double_backward, eager, loop_vmap

# Operands are (input, hx, cx of lstm, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr of lstm, lengths).
_INPUT, _HX, _LENGTHS = 0, 1, -1


def _fold(tensor, dim, size):
    """A mapped dimension, or one of `size` copies, made part of its batch, the last dimension but one."""
    if tensor is None:
        return None
    batch_dim = max(tensor.dim() - (dim is not None) - 2, 0)  # lengths have no more
    if dim is None:
        shape = [*tensor.shape]
        shape.insert(batch_dim, size)
        tensor = tensor.unsqueeze(batch_dim).expand(shape)
    else:
        tensor = tensor.movedim(dim, batch_dim)
    return tensor.flatten(batch_dim, batch_dim + 1)


def _unfold(results, size):
    """(results with the mapped dimension back, its places); a result of 0 elements stands for none and has no place."""
    places = [None if r.dim() == 1 else r.dim() - 2 for r in results]
    unfolded = [r if d is None else r.unflatten(d, (size, -1)) for r, d in zip(results, places, strict=True)]
    return tuple(unfolded), tuple(places)


def _functions(name: str, states: int, saved: int):
    """(Forward, Backward) of an op with this many states and tensors that only backward reads."""
    first_weight = 1 + states
    count = first_weight + (6 if name == "lstm" else 5)  # operands
    weights = slice(first_weight, count - 1)
    separate_biases = name == "gru"
    formula = getattr(composite, name)

    def options_of(options):
        """Of the composite formula; `save` decides nothing there."""
        return {"relu": options[0], "reverse": options[1]} if name == "rnn" else {"reverse": options[0]}

    @eager
    class Backward(torch.autograd.Function):
        """Gradients of input, the states and the weights; its own gradient comes from torch operations."""

        # (gradients of output and states, operands, output and what forward saved, options, output_mask)
        @staticmethod
        def forward(*inputs):
            return backends.op(f"{name}_bwd", inputs[1 + states])(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs[: 1 + states + count])
            ctx.options = inputs[2 + states + count + saved :]
            ctx.count = len(inputs)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *grad_grads):
            grads, operands = ctx.saved_tensors[: 1 + states], ctx.saved_tensors[1 + states :]
            inputs, lengths = list(operands[:-1]), operands[_LENGTHS]
            bias = first_weight + 2
            if not separate_biases:  # one gradient, of the sum
                both = [b for b in inputs[bias : bias + 2] if b is not None]
                inputs[bias : bias + 2] = [sum(both) if both else None]
            wanted = [
                g if g is not None and x is not None and g.shape == x.shape else None
                for g, x in zip(grad_grads, inputs, strict=True)
            ]
            like = _outputs(*operands)
            dy = tuple(o.new_zeros(o.shape) if g is None else g for g, o in zip(grads, like, strict=True))
            options = options_of(ctx.options)
            ddy, dinputs = double_backward(lambda *xs: formula(*xs, lengths=lengths, **options), dy, inputs, wanted)
            dinputs = list(dinputs)
            if not separate_biases:
                dinputs.insert(bias, dinputs[bias])
            to_grads = [None if g is None else d for g, d in zip(grads, ddy, strict=True)]
            to_operands = [None if x is None else d for x, d in zip(operands, dinputs, strict=False)]
            done = (*to_grads, *to_operands)
            return (*done, *(None,) * (ctx.count - len(done)))

        @staticmethod
        def vmap(info, in_dims, *inputs):
            mask = inputs[-1]
            shift = 1 + states
            mapped = any(d is not None for d in in_dims[shift:][weights])
            if mapped or any(mask[1:5]):  # a weight gradient of each sample
                return loop_vmap(Backward, info, in_dims, *inputs)
            folded = list(inputs)
            for i in (*range(shift + first_weight), *range(shift + count - 1, shift + count + 1 + saved)):
                folded[i] = _fold(inputs[i], in_dims[i], info.batch_size)
            return _unfold(call(Backward, *folded), info.batch_size)

    def _outputs(input, hx, *rest):
        """Tensors of the shapes and dtypes of output and the last states."""
        return (hx.reshape(hx.shape[-2:]).expand(input.shape[0], *hx.shape[-2:]), hx, *rest[: states - 1])

    @eager
    class Forward(torch.autograd.Function):
        """(output, last states, what backward reads); only the first two are differentiable."""

        @staticmethod
        def forward(*inputs):
            return backends.op(f"{name}_fwd", inputs[_INPUT])(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            kept = output[1 + states :]
            ctx.save_for_backward(*inputs[:count], output[0], *kept)
            ctx.mark_non_differentiable(*kept)
            ctx.set_materialize_grads(False)
            ctx.options = inputs[count:]

        @staticmethod
        def backward(ctx, *grads):
            grads = grads[: 1 + states]
            needed = ctx.needs_input_grad
            if all(g is None for g in grads):
                return (None,) * len(needed)
            bias = first_weight + 2
            mask = [needed[0], needed[first_weight], needed[first_weight + 1], needed[bias] or needed[bias + 1]]
            if name == "lstm":
                mask += [needed[bias + 2], needed[1] or needed[2]]
            options = ctx.options if name == "rnn" else ctx.options[:1]
            inputs = (*grads, *ctx.saved_tensors, *options, mask)
            results = list(call_in_backward(Backward, *inputs))
            if not separate_biases:
                results.insert(bias, results[bias])
            results += [None] * (len(needed) - len(results))
            return tuple(r if n else None for r, n in zip(results, needed, strict=True))

        @staticmethod
        def vmap(info, in_dims, *inputs):
            if any(d is not None for d in in_dims[weights]):
                return loop_vmap(Forward, info, in_dims, *inputs)
            folded = list(inputs)
            for i in (*range(first_weight), count - 1):
                folded[i] = _fold(inputs[i], in_dims[i], info.batch_size)
            return _unfold(call(Forward, *folded), info.batch_size)

    for function, suffix in ((Forward, ""), (Backward, "Backward")):
        function.__name__ = function.__qualname__ = name.upper() + suffix
    return Forward, Backward


LSTM, LSTMBackward = _functions("lstm", states=2, saved=2)
GRU, GRUBackward = _functions("gru", states=1, saved=1)
RNN, RNNBackward = _functions("rnn", states=1, saved=0)
