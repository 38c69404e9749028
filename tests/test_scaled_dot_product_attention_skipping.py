"""Tiles of keys that causal masks, windows, padding and packed sequences hide cost the CPU kernels nothing.

CPU time against that of full attention, whatever else the machine does: the least of several rounds of each.
"""

import time

import pytest
import torch
from policy import threads

from pynn.ops.scaled_dot_product_attention import scaled_dot_product_attention as attention

KEYS = 2048
# arguments, and how much of full attention's time they may take; its scores are the share in brackets
HIDDEN = {
    "causal": ({"is_causal": True}, 0.75),  # (1 / 2)
    "causal window": ({"window": (-1, 0)}, 0.75),  # (1 / 2)
    "lower right": ({"is_causal": True, "alignment": "lower_right"}, 0.75),  # (1 / 2)
    "narrow window": ({"window": (127, 0)}, 0.25),  # (1 / 16)
    "padding": ({"attn_mask": torch.arange(KEYS) < KEYS // 2}, 0.75),  # (1 / 2)
    "much padding": ({"attn_mask": torch.arange(KEYS) < KEYS // 8}, 0.4),  # (1 / 8)
    "packed": ({"cu_seqlens": torch.arange(0, KEYS + 1, KEYS // 8)}, 0.4),  # (1 / 8)
}


def least_times(*calls, rounds=5):
    """The least CPU time of each call, in turn."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = time.process_time()
            call()
            best[i] = min(best[i], time.process_time() - start)
    return best


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_tiles_are_skipped(cpu_kernels, dtype, kind, backward):
    """A kernel that computed all tiles and masked them afterwards would take at least as long as without a mask."""
    query, key, value, grad = (torch.randn(1, KEYS, 64).to(dtype) for _ in range(4))
    leaves = [t.requires_grad_(backward) for t in (query, key, value)]
    options, limit = HIDDEN[kind]

    def call(**arguments):
        output = attention(*leaves, **arguments)
        if backward:
            torch.autograd.grad(output, leaves, grad)

    with threads(1):
        full, hidden = least_times(call, lambda: call(**options))
    assert hidden < limit * full, f"{kind}: {hidden * 1e3:.1f} ms, {full * 1e3:.1f} ms without it"


@pytest.mark.parametrize("kind", ["narrow window", "much padding"])
def test_hidden_keys_of_decoding_are_skipped(cpu_kernels, kind):
    """The same for a few queries over a long cache of keys."""
    query, key, value = (torch.randn(4, n, 64) for n in (1, 16 * KEYS, 16 * KEYS))
    options = {"window": (127, 0), "alignment": "lower_right"}
    if kind == "much padding":
        options = {"attn_mask": torch.arange(16 * KEYS) < 2 * KEYS}
    with threads(1):
        full, hidden = least_times(
            lambda: attention(query, key, value), lambda: attention(query, key, value, **options)
        )
    assert hidden < 0.4 * full, f"{kind}: {hidden * 1e3:.1f} ms, {full * 1e3:.1f} ms without it"
