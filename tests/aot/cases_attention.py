"""The calls of scaled_dot_product_attention whose Triton kernels are compiled: every tile, dtype and option."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import torch

from .ratchet import Case, Promise

_BF16, _FP16, _FP32, _FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class _Call:
    """Attention of 256 queries of 8 heads over 256 keys of 2 heads."""

    def __init__(
        self, dtype, dim, value_dim=None, *, queries=256, keys=256, mask=None, dropout=False, alibi=False, sinks=False,
        ranges=False, left=-1, right=-1, softcap=0.0,
    ):  # fmt: skip
        self.q = torch.empty(2, queries, 8, dim, dtype=dtype).transpose(1, 2)
        self.k = torch.empty(2, keys, 2, dim, dtype=dtype).transpose(1, 2)
        self.v = torch.empty(2, keys, 2, value_dim or dim, dtype=dtype).transpose(1, 2)
        compute = torch.float64 if dtype is _FP64 else torch.float32
        number = torch.empty(2, 8, dtype=compute)
        self.tensors = (
            self.q, self.k, self.v, mask, torch.zeros(2, dtype=torch.int64) if dropout else None,
            number if alibi else None, number if sinks else None,
            torch.zeros(queries, 4, dtype=torch.int32) if ranges else None,
            torch.zeros(keys, 2, dtype=torch.int32) if ranges else None,
        )  # fmt: skip
        self.options = (0.5 if dropout else 0.0, left, right, True, 0.125)
        self.options += (softcap,)
        self.mask_gradient = mask is not None and mask.is_floating_point()
        self.sinks_gradient = sinks

    def forward(self) -> Callable:
        from pynn.triton_kernels.scaled_dot_product_attention import scaled_dot_product_attention_fwd

        return lambda: scaled_dot_product_attention_fwd(*self.tensors, *self.options)

    def gluon(self) -> Callable:
        from pynn.triton_kernels.scaled_dot_product_attention_launch import Problem, new_heads

        from pynn.triton_kernels import scaled_dot_product_attention_gluon as gluon

        p = Problem(*self.tensors, *self.options)
        lse = self.q.new_empty(self.q.shape[:-1], dtype=torch.float32)
        return lambda: gluon.forward(p, new_heads(self.q, self.v.shape[-1]), lse)

    def spoiled(self) -> Callable:
        """The Triton kernel for the tiles of which the Gluon kernel says that values have spoiled them."""
        from pynn.triton_kernels import scaled_dot_product_attention as attention

        def run():
            wanted = torch.zeros(16, 4, dtype=torch.int32)
            with (
                mock.patch.object(attention.configs, "runs_gluon", return_value=True),
                mock.patch.object(attention.gluon, "forward", return_value=wanted),
            ):
                self.forward()()

        return run

    def backward(self) -> Callable:
        from pynn.triton_kernels.scaled_dot_product_attention import scaled_dot_product_attention_bwd

        grad = self.q.new_empty(2, self.q.shape[2], 8, self.v.shape[-1]).transpose(1, 2)
        lse = self.q.new_empty(self.q.shape[:-1], dtype=torch.float32 if self.q.element_size() == 2 else torch.float64)
        rest = (grad, lse, *self.options, self.mask_gradient, self.sinks_gradient)
        return lambda: scaled_dot_product_attention_bwd(grad, lse, *self.tensors, *rest)

    def weights(self, average: bool) -> Callable:
        from pynn.triton_kernels.attention_weights import attention_weights

        lse = self.q.new_empty(self.q.shape[:-1], dtype=torch.float32 if self.q.element_size() == 2 else torch.float64)
        return lambda: attention_weights(self.q, self.k, *self.tensors[3:], lse, *self.options, average)


def attention() -> Iterator[Case]:
    from pynn.triton_kernels.scaled_dot_product_attention import scaled_dot_product_attention_keep

    float_mask, row_mask = torch.empty(2, 1, 256, 256), torch.empty(2, 1, 1, 256, dtype=_BF16)
    column_mask = torch.empty(8, 256, 1, dtype=_FP16)
    bool_mask = torch.empty(77, 255, dtype=torch.bool)
    everything = {"dropout": True, "alibi": True, "sinks": True, "left": 100, "right": 0, "softcap": 30.0}
    calls = {
        "bf16 64": _Call(_BF16, 64),
        "bf16 64, causal": _Call(_BF16, 64, right=0),
        "bf16 128, causal": _Call(_BF16, 128, right=0),
        "bf16 256, window": _Call(_BF16, 256, left=100, right=10),
        "fp16 40, 24 values, bool mask, odd lengths": _Call(_FP16, 40, 24, mask=bool_mask, queries=77, keys=255),
        "bf16 80, 320 values, ranges, dropout": _Call(_BF16, 80, 320, ranges=True, dropout=True),
        "bf16 128, ranges, alibi": _Call(_BF16, 128, ranges=True, alibi=True),
        "bf16 64, float mask": _Call(_BF16, 64, mask=float_mask),
        "bf16 128, row mask, everything": _Call(_BF16, 128, mask=row_mask, **everything),
        "fp16 64, column mask, dropout": _Call(_FP16, 64, mask=column_mask, dropout=True),
        "fp32 64, causal": _Call(_FP32, 64, right=0),
        "fp32 128, everything": _Call(_FP32, 128, mask=float_mask, **everything),
        "fp32 256": _Call(_FP32, 256),
        "fp64 128, everything": _Call(_FP64, 128, mask=float_mask.double(), **everything),
    }
    for label, call in calls.items():
        yield Case(label, call.forward(), Promise())
        yield Case(f"{label}, backward", call.backward(), Promise())
    few = {"queries": 2, "keys": 1024}
    split = {
        "bf16 64": _Call(_BF16, 64, **few),
        "bf16 128, everything": _Call(_BF16, 128, mask=torch.empty(1024, dtype=_BF16), **few, **everything),
        "fp16 128, bool mask": _Call(_FP16, 128, mask=torch.empty(2, 8, 1, 1024, dtype=torch.bool), **few),
        "bf16 256, window": _Call(_BF16, 256, left=500, right=0, **few),
        "bf16 80, 320 values, ranges": _Call(_BF16, 80, 320, ranges=True, **few),
        "fp32 64": _Call(_FP32, 64, **few),
        "fp32 128, everything": _Call(_FP32, 128, mask=torch.empty(8, 2, 1024), **few, **everything),
        "fp32 256": _Call(_FP32, 256, **few),
        "fp64 128, everything": _Call(_FP64, 128, mask=torch.empty(8, 2, 1024).double(), **few, **everything),
    }
    for label, call in split.items():
        yield Case(f"split {label}", call.forward(), Promise())
    for label in ("bf16 64, causal", "bf16 128, row mask, everything", "fp32 128, everything", "fp64 128, everything"):
        yield Case(f"weights {label}", calls[label].weights(label.startswith("bf16")), Promise())
    for label in ("bf16 64", "bf16 64, causal", "bf16 128, causal"):
        yield Case(f"{label}, Gluon", calls[label].gluon(), Promise(contains=("wgmma", "tma")), only_for=("sm_90",))
        if label.endswith("causal"):
            yield Case(f"{label}, spoiled tiles", calls[label].spoiled(), Promise(), only_for=("sm_90",))
    yield Case("fp16 128, Gluon", _Call(_FP16, 128).gluon(), Promise(contains=("wgmma", "tma")), only_for=("sm_90",))
    key = torch.zeros(2, dtype=torch.int64)
    q, k = calls["bf16 64"].q, calls["bf16 64"].k
    yield Case("mask", lambda: scaled_dot_product_attention_keep(q, k, key, 0.5), Promise())
