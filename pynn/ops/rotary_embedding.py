"""rotary_embedding: pairs of channels turned by angles that grow with the position, in one pass.

Shapes: x (..., L, D), cos and sin (L, P) or (N, L, P) with 2 P <= D -> as x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ._function import call, call_in_backward, check_devices, compute_dtype, eager, loop_vmap
from ._registry import define

_NAME = "rotary_embedding"
_ARGUMENTS = "Tensor cos, Tensor sin, bool interleaved, bool inverse"


@define(f"rotary_embedding_fwd(Tensor x, {_ARGUMENTS}) -> Tensor", triton="rotary_embedding")
def _(x, cos, sin, interleaved, inverse):
    check_devices(_NAME, x, cos, sin)
    return x.new_empty(x.shape)


@define(f"rotary_embedding_in_place(Tensor(a!) x, {_ARGUMENTS}) -> ()", triton="rotary_embedding")
def _(x, cos, sin, interleaved, inverse):
    check_devices(_NAME, x, cos, sin)


@eager
class RotaryEmbedding(torch.autograd.Function):
    """x turned by cos and sin, or back by `inverse`, which is also the gradient; differentiable any number of times."""

    @staticmethod
    def forward(x, cos, sin, interleaved, inverse):
        return backends.op("rotary_embedding_fwd", x)(x, cos, sin, interleaved, inverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:3])
        ctx.interleaved, ctx.inverse = inputs[3:]

    @staticmethod
    def backward(ctx, grad):
        inputs = (grad, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
        to_x = call_in_backward(RotaryEmbedding, *inputs)
        return to_x, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return loop_vmap(RotaryEmbedding, info, in_dims, *inputs)


def turn_in_place(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> None:
    """Turns x, which nothing else reads and no graph knows; tables from `checked_tables`."""
    backends.op("rotary_embedding_in_place", x)(x, cos, sin, interleaved, inverse)


def checked_tables(like: Tensor, cos: Tensor, sin: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """cos and sin in the precision of sums, for an x of this shape and the dtype of `like`."""
    for name, table in (("cos", cos), ("sin", sin)):
        if table.requires_grad:
            raise RuntimeError(f"{_NAME}: {name} has no gradient, expected it not to require one")
        fits = table.dim() == 2 or (table.dim() == 3 and len(shape) > 2 and table.shape[0] == shape[0])
        if not fits or table.shape[-2] != shape[-2] or 2 * table.shape[-1] > shape[-1] or table.shape != cos.shape:
            raise RuntimeError(
                f"{_NAME}: expected cos and sin (L, P) or (N, L, P) with 2 P <= D for x {tuple(shape)}, got "
                f"{tuple(cos.shape)} and {tuple(sin.shape)}"
            )
    dtype = compute_dtype(like)
    return cos.to(dtype), sin.to(dtype)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turns pairs of channels by angles: (a, b) becomes (a cos - b sin, b cos + a sin).

    With the angle p theta_i for pair i at position p, the product of a query and a key depends on the distance of
    their positions only (Su et al. 2021, arXiv 2104.09864). The gradient is the turn by the negative angle.

    Args:
        x: (L, D), (N, L, D) or (N, H, L, D) float64, float32, float16 or bfloat16. Rows are read where they lie;
            only an x whose channels do not lie one after the other is copied.
        cos: (L, P), or (N, L, P) for positions of each sample, with 2 P <= D: channels from 2 P on stay as they are.
            Taken in float32 (float64 for float64) whatever the dtype of x. No gradient.
        sin: as cos.
        interleaved: pair i is the channels (2 i, 2 i + 1), as in the paper; otherwise (i, i + P), as in GPT-NeoX and
            Hugging Face's models.
    Returns:
        as x, contiguous.
    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; cos or sin requires a gradient.
    """
    check_devices(_NAME, x, cos, sin)
    if x.dim() < 2 or x.dim() > 4:
        raise RuntimeError(f"{_NAME}: expected x (L, D), (N, L, D) or (N, H, L, D), got {tuple(x.shape)}")
    return call(RotaryEmbedding, x, *checked_tables(x, cos, sin, tuple(x.shape)), interleaved, False)
