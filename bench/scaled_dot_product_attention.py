"""scaled_dot_product_attention against torch.nn.functional's, and MultiheadAttention against torch.nn's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench._attention_gpu import cases as gpu_cases  # noqa: F401  python -m bench --device cuda
from bench.harness import Case, assert_agrees
from pynn.nn import MultiheadAttention
from pynn.ops import scaled_dot_product_attention

UNET = [(64, 4, tokens, dim) for tokens in (16, 49, 64, 196) for dim in (16, 32)]  # batch, heads, tokens, head dim
LONG = [(1, 4, 512, 64), (2, 12, 197, 64), (1, 2, 2048, 64), (1, 2, 1024, 128)]
OPTIONS = ("causal", "padding", "bias", "shared bias", "dropout")
WINDOW = 256  # keys that a query sees; torch gets a mask


def cases(quick: bool = False) -> Iterator[Case]:
    for shape in UNET[2:6:2] if quick else UNET:
        for mode in ("forward", "forward+backward"):
            yield _case(*shape, torch.float32, mode)
    if quick:
        return
    for shape in LONG:
        for mode in ("forward", "forward+backward"):
            yield _case(*shape, torch.float32, mode)
        yield _case(*shape, torch.bfloat16, "forward+backward")
    for option in OPTIONS:
        yield _case(1, 4, 512, 64, torch.float32, "forward+backward", option)
    for mode in ("forward", "forward+backward"):
        yield _case(1, 2, 2048, 64, torch.float32, mode, "window")
    for tokens, batch in ((64, 4), (128, 2)):
        yield _case(batch, 12, tokens, 64, torch.bfloat16, "forward+backward")
    yield _case(1, 2, 2048, 64, torch.bfloat16, "forward")
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(2, 8, 1024, 64, dtype, "forward", queries=1)
        yield _case(1, 8, 4096, 128, dtype, "forward", queries=1)
        yield _case(1, 16, 4096, 128, dtype, "forward", queries=1, key_heads=4)
    for need_weights in (False, True):
        for dropout in (0.0, 0.1):
            yield _multihead_case(4, 256, 256, 8, need_weights, dropout)


def _case(batch, heads, tokens, dim, dtype, mode, option="", queries=None, key_heads=None) -> Case:
    """query, key and value are slices of one (B, L, 3, H, D) projection, as a layer makes them."""
    packed = torch.randn(batch, tokens, 3, heads, dim).to(dtype)
    query, key, value = (t.transpose(1, 2).detach() for t in packed.unbind(2))
    query = query[:, :, :queries] if queries else query
    key, value = (t[:, :key_heads] for t in (key, value))
    mask = None
    if option == "padding":
        mask = (torch.arange(tokens) < tokens // 2).expand(batch, 1, 1, tokens)
    elif option.endswith("bias"):
        mask = torch.randn(1, 1 if option == "shared bias" else heads, tokens, tokens).to(dtype).requires_grad_()
    elif option == "window":
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(1 - WINDOW)
    arguments = {"attn_mask": mask, "is_causal": option == "causal", "dropout_p": 0.1 if option == "dropout" else 0.0}
    arguments["enable_gqa"] = key_heads is not None
    own = {"window": (WINDOW - 1, 0), "attn_mask": None} if option == "window" else {}
    backward = mode == "forward+backward"
    leaves = [t.requires_grad_(backward) for t in (query, key, value)] + ([mask] if option.endswith("bias") else [])
    grad = torch.randn(batch, query.shape[2], heads, dim).to(dtype).transpose(1, 2)

    def call(attention, **more):
        output = attention(query, key, value, **{**arguments, **more})
        return (output, *torch.autograd.grad(output, leaves, grad)) if backward else (output,)

    def ours():
        return call(scaled_dot_product_attention, **own)

    def theirs():
        return call(F.scaled_dot_product_attention)

    def theirs_in_parts():  # what torch has beside its flash attention, and does not choose by itself
        with sdpa_kernel(SDPBackend.MATH):
            return call(F.scaled_dot_product_attention)

    def check():
        if option == "dropout":
            return  # the two draw different masks
        for got, expected in zip(ours(), theirs(), strict=True):
            assert_agrees(got, expected, dtype, "scaled_dot_product_attention")

    scores = batch * heads * query.shape[2] * (WINDOW if option == "window" else tokens)
    return Case(
        "scaled_dot_product_attention",
        f"{batch}x{heads}x{queries or tokens}x{tokens}x{dim}"
        + (f" {key_heads} key heads" if key_heads else "")
        + (f" {option}" if option else ""),
        str(dtype).removeprefix("torch."),
        mode,
        {"pynn": ours, "torch": theirs, "torch math": theirs_in_parts},
        check,
        flops=4.0 * scores * dim * (3.5 if backward else 1) / (2 if option == "causal" else 1),
    )


def _multihead_case(batch, tokens, width, heads, need_weights, dropout) -> Case:
    theirs = torch.nn.MultiheadAttention(width, heads, dropout, batch_first=True)
    ours = MultiheadAttention(width, heads, dropout, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(batch, tokens, width)

    def call(module):
        output, _ = module(x, x, x, need_weights=need_weights)
        return (output, *torch.autograd.grad(output.sum(), module.parameters()))

    def check():
        if dropout:
            return  # the two draw different masks
        for got, expected in zip(call(ours), call(theirs), strict=True):
            assert_agrees(got, expected, torch.float32, "MultiheadAttention")

    return Case(
        "MultiheadAttention",
        f"{batch}x{tokens}x{width} h{heads}" + (" weights" if need_weights else "") + (" dropout" if dropout else ""),
        "float32",
        "forward+backward",
        {"pynn": lambda: call(ours), "torch": lambda: call(theirs)},
        check,
    )
