"""scaled_dot_product_attention on a GPU, 16-bit: backend by backend and, on sm_90, the Gluon kernel of the forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn import functional as F

from bench import _gpu
from bench.harness import Case, assert_agrees
from pynn.ops import scaled_dot_product_attention

GPU = "cuda"
KERNEL = "scaled_dot_product_attention_fwd"


class Problem(NamedTuple):
    """Self-attention of `tokens` queries over as many keys."""

    batch: int
    heads: int
    key_heads: int
    tokens: int
    dim: int
    causal: bool
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        groups = f" kv{self.key_heads}" if self.key_heads != self.heads else ""
        return f"{self.batch}x{self.heads}x{self.tokens}x{self.dim}{groups}" + (" causal" if self.causal else "")


# As FlashAttention's figures: 16,384 tokens of 2048 numbers each; and the heads of Llama 3 70B.
SHAPES = (
    (32, 16, 16, 512, 128),
    (4, 16, 16, 4096, 128),
    (1, 16, 16, 16384, 128),
    (16, 32, 32, 1024, 64),
    (4, 32, 32, 4096, 64),
    (1, 64, 8, 4096, 128),
)
PROBLEMS = [Problem(*shape, causal) for shape in SHAPES for causal in (False, True)]
PROBLEMS.append(Problem(4, 16, 16, 4096, 128, True, torch.float16))


def cases(quick: bool = False) -> Iterator[Case]:
    for problem in PROBLEMS[:2] if quick else PROBLEMS:
        yield _case(problem, "forward")
    for problem in PROBLEMS[:2] if quick else PROBLEMS[2:4]:
        yield _case(problem, "forward+backward")


def _case(problem: Problem, mode: str) -> Case:
    """query, key and value are stored as (B, L, H, D), as a projection leaves them."""
    batch, heads, key_heads, tokens, dim, causal, dtype = problem
    backward = mode != "forward"

    def made(count: int) -> torch.Tensor:
        x = torch.randn(batch, tokens, count, dim, device=GPU).to(dtype).transpose(1, 2)
        return x.detach().requires_grad_(backward)

    leaves = query, key, value = made(heads), made(key_heads), made(key_heads)
    grad = made(heads).detach()

    def run(attention: Callable) -> tuple[torch.Tensor, ...]:
        out = attention(query, key, value, is_causal=causal, enable_gqa=heads != key_heads)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad)) if backward else (out,)

    backends = _gpu.backends_with(KERNEL)
    providers: dict[str, Callable[[], object]] = {
        f"pynn {name}": functools.partial(_gpu.on, name, run, scaled_dot_product_attention) for name in backends
    }
    if "triton" in backends and _gpu.architecture() == "sm_90":
        providers["pynn gluon"] = functools.partial(_on_gluon, run, scaled_dot_product_attention)
    providers["torch"] = functools.partial(run, F.scaled_dot_product_attention)

    def check():
        expected = providers["torch"]()
        for name, provider in providers.items():
            for got, reference in zip(provider(), expected, strict=True):
                assert_agrees(got, reference, dtype, name)

    return Case(
        "scaled_dot_product_attention",
        str(problem),
        str(dtype).removeprefix("torch."),
        mode,
        providers,
        check,
        bytes=2.0 * batch * tokens * dim * (2 * heads + 2 * key_heads) * (3 if backward else 1),
        flops=4.0 * batch * heads * tokens**2 * dim * (3.5 if backward else 1) / (2 if causal else 1),
        device=GPU,
    )


def _on_gluon(fn: Callable, *args):
    """fn(*args) on the Triton backend, forwards by the Gluon kernel."""
    from pynn.triton_kernels import scaled_dot_product_attention_configs as configs

    with configs.with_gluon():
        return _gpu.on("triton", fn, *args)
