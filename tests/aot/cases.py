"""The calls whose kernels are compiled: for each op the dtypes, alignments and options that lead to other code.

A case calls the Python function of a Triton op on CPU tensors that nothing reads. Rows of whole 16-byte packs
promise loads and stores of 16 bytes; `exact` promises the bits of the CPU kernels. A new op adds a function to CASES.

CUDA C++ kernels need no cases, their instantiations are in the source; _CUDA_PROMISES holds what they promise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import torch

from .cases_additive_attention import additive_attention
from .cases_attention import attention
from .cases_conv2d import conv2d
from .cases_layer_norm_lstm import layer_norm_lstm
from .cases_recurrent import recurrent
from .cases_rotary_embedding import rotary_embedding
from .cases_tree_lstm import tree_lstm
from .labels import LABELS
from .ratchet import Case, Promise


def _int64(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def diffusion() -> Iterator[Case]:
    from pynn.triton_kernels import diffusion as ops  # type: ignore[attr-defined]

    batch = 16
    tables = {columns: torch.zeros(100, columns, dtype=torch.float64) for columns in (2, 3, 7)}
    one_key, keys = _int64(2), _int64(batch, 2)
    one_t, t = _int64(1), _int64(batch)

    def jump(x, *, t=t, s=None, noise=None, key=one_key, noise_out=False):
        return lambda: ops.forward_jump_fwd(x, t, s, tables[2], noise, key, noise_out)

    def reverse(x, *, t=t, v=None, clip=1.0, noise=None, key=one_key, x0_out=False):
        low = None if clip is None else -clip
        return lambda: ops.reverse_step_fwd(x, x, v, t, tables[7], low, clip, noise, key, x0_out)

    def reverse_bwd(x, *, v=None, clip=1.0):
        return lambda: ops.reverse_step_bwd(x, x, x, v, t, tables[7], -clip, clip, None, one_key)

    def loss(x, *, noise=None, key=one_key):
        return lambda: ops.diffusion_loss_fwd(x, x, t, tables[3], noise, key)

    def loss_bwd(x, *, key=one_key, dx0=False):
        losses = torch.zeros(batch, dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)
        return lambda: ops.diffusion_loss_bwd(losses, x, x, t, tables[3], None, key, dx0)

    exact, wide, writes, sums = NARROW, _BOTH, _WRITES, _READS
    for dtype, label in LABELS.items():
        x = torch.empty(batch, 3072, dtype=dtype)
        yield Case(f"{label}", partial(ops.normal, x, one_key), writes)
        yield Case(f"{label}", jump(x), wide)
        yield Case(f"{label}", partial(ops.forward_jump_bwd, x, t, None, tables[2], False), wide)
        yield Case(f"{label} clip", reverse(x), wide)
        yield Case(f"{label} clip", reverse_bwd(x), wide)
        yield Case(f"{label}", loss(x), sums)
        yield Case(f"{label}", loss_bwd(x), wide)
    for dtype in (torch.float32, torch.bfloat16):
        label, x = LABELS[dtype], torch.empty(batch, 3072, dtype=dtype)
        yield Case(f"{label} shared t", jump(x, t=one_t), wide)
        yield Case(f"{label} s, keys, noise_out", jump(x, s=t, key=keys, noise_out=True), wide)
        yield Case(f"{label} given noise", jump(x, noise=x, key=None), wide)
        yield Case(f"{label} shared t", reverse(x, t=one_t, clip=None), wide)
        yield Case(f"{label} clip, learned, keys, x0_out", reverse(x, v=x, key=keys, x0_out=True), wide)
        yield Case(f"{label} clip, learned", reverse_bwd(x, v=x), wide)
        yield Case(f"{label} dx0, keys", loss_bwd(x, key=keys, dx0=True), wide)
        narrow = torch.empty(batch, 37, dtype=dtype)
        yield Case(f"{label} rows of 37", jump(narrow), exact)
        yield Case(f"{label} rows of 37, clip, learned", reverse_bwd(narrow, v=narrow), exact)
        yield Case(f"{label} rows of 37", loss(narrow), exact)


def group_norm() -> Iterator[Case]:
    from pynn.triton_kernels import group_norm as ops

    def forward(x, groups, silu=True):
        parameter = torch.empty(x.shape[1])
        return lambda: ops.group_norm_fwd(x, parameter, parameter, groups, 1e-5, silu)

    def backward(x, groups, silu=True):
        parameter, statistic = torch.empty(x.shape[1]), torch.empty(x.shape[0], groups)
        return lambda: ops.group_norm_bwd(x, x, parameter, parameter, statistic, statistic, groups, silu)

    exact, reads = Promise(exact=True), Promise(exact=True, wide_loads=True)
    wide = Promise(exact=True, wide_loads=True, wide_stores=True)
    small, large, odd = ((4, 64, 16, 16), 8), ((2, 64, 64, 64), 2), ((2, 30, 7, 7), 3)
    for dtype, label in LABELS.items():
        for layout, memory_format in (("", torch.contiguous_format), (" nhwc", torch.channels_last)):
            for size, (shape, groups), promise in (("groups", small, wide), ("tiles", large, reads)):
                if dtype is not torch.bfloat16 and layout + size not in ("groups", "tiles"):
                    continue
                x = torch.empty(shape, dtype=dtype, memory_format=memory_format)
                name = f"{label}{layout} {size}"
                yield Case(f"{name}, silu", forward(x, groups), promise)
                yield Case(f"{name}, backward, silu", backward(x, groups), promise)
                if dtype is torch.bfloat16 and not layout:
                    yield Case(name, forward(x, groups, silu=False), promise)
                    yield Case(f"{name}, backward", backward(x, groups, silu=False), promise)
    # As large as fits registers: (channels, pixels) of the forward, the backward takes half or a quarter of it.
    for dtype, width in ((torch.float32, 16), (torch.float64, 8)):
        for layout, memory_format in (("", torch.contiguous_format), (" nhwc", torch.channels_last)):
            name = f"{LABELS[dtype]}{layout} largest groups"
            x = torch.empty((2, width, 32, 32), dtype=dtype, memory_format=memory_format)
            yield Case(f"{name}, silu", forward(x, 1), wide)
            x = torch.empty((2, 8 if dtype is torch.float32 else 2, 32, 32), dtype=dtype, memory_format=memory_format)
            yield Case(f"{name}, backward, silu", backward(x, 1), wide)
    shape, groups = odd
    yield Case("bf16 odd groups", forward(torch.empty(shape, dtype=torch.bfloat16), groups), exact)
    yield Case("bf16 odd groups, backward", backward(torch.empty(shape, dtype=torch.bfloat16), groups), exact)


# Kernels that only finish a reduction touch a few numbers.
NARROW_KERNELS = (
    "loss_rows_kernel", "combine_kernel", "combine_gradient_kernel", "add_samples_kernel", "add_splits_kernel"
)  # fmt: skip
NARROW = Promise(exact=True)

CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "additive_attention": additive_attention,
    "diffusion": diffusion,
    "group_norm": group_norm,
    "conv2d": conv2d,
    "recurrent": recurrent,
    "tree_lstm": tree_lstm,
    "layer_norm_lstm": layer_norm_lstm,
    "rotary_embedding": rotary_embedding,
    "scaled_dot_product_attention": attention,
}

# The first pattern that matches the whole short name of a kernel counts.
_READS, _WRITES = Promise(exact=True, wide_loads=True), Promise(exact=True, wide_stores=True)
_BOTH = Promise(exact=True, wide_loads=True, wide_stores=True)
_CUDA_PROMISES = {
    r"elementwise_kernel<NormalOp<.*": _WRITES,
    r"elementwise_kernel<.*": _BOTH,
    r"loss_segments_kernel<.*": _READS,
    r"gradient_kernel<(Mma|Fma)Engine<.*": NARROW,  # attention: asynchronous copies, stores as the products lie
    r"(apply|fused|gradient)_kernel<.*": _BOTH,  # group_norm
    r"(gradient_sums|moments)_kernel<.*": _READS,
    r"activation_gradient_packs_kernel<.*": _BOTH,  # conv2d
    r"depthwise(_strided_gradient)?_kernel<(float, 4|double, 2),.*": _BOTH,
    r"depthwise_weight_kernel<(float, 4|double, 2),.*": _READS,
}


def cuda_promise(kernel: str) -> Promise:
    """What the CUDA C++ kernel of this short name promises; all are built with --fmad=false."""
    found = (promise for pattern, promise in _CUDA_PROMISES.items() if re.fullmatch(pattern, kernel))
    return next(found, NARROW)
