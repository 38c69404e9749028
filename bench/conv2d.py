"""conv2d against PyTorch on the convolutions of a small U-Net, forward and backward, interleaved in one process.

    python bench/conv2d.py [threads]

Prints the median time of forward, input gradient, and weight and bias gradient in both layouts, and the ratio of their
sum to PyTorch's in its better layout (below 1 is faster).
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
import torch.nn.functional as F

import pynn  # noqa: F401  registers the ops

# batch, in channels, out channels, height and width, kernel, stride
SHAPES = [
    (64, 1, 32, 28, 3, 1),
    (64, 32, 32, 28, 3, 1),
    (64, 32, 64, 28, 3, 2),
    (64, 64, 64, 14, 3, 1),
    (64, 64, 64, 14, 1, 1),
    (64, 64, 128, 14, 3, 2),
    (64, 128, 128, 7, 3, 1),
    (64, 32, 1, 28, 3, 1),
    (64, 1, 32, 8, 3, 1),
    (64, 32, 32, 8, 3, 1),
    (64, 32, 64, 8, 1, 1),
    (64, 32, 64, 8, 3, 2),
    (64, 64, 64, 8, 3, 1),
    (64, 192, 64, 8, 3, 1),
    (64, 64, 64, 4, 3, 1),
    (64, 128, 128, 4, 3, 1),
    (64, 32, 1, 8, 3, 1),
]


def calls(batch, channels, outputs, size, kernel, stride, memory_format):
    """(ours, torch's): forward, input gradient (not for the first layer), weight and bias gradient."""
    pad = kernel // 2
    x = torch.randn(batch, channels, size, size).contiguous(memory_format=memory_format)
    w = torch.randn(outputs, channels, kernel, kernel).contiguous(memory_format=memory_format)
    b = torch.randn(outputs)
    dy = torch.randn_like(F.conv2d(x, w, b, stride, pad))
    ops, geometry = torch.ops.pynn, ([stride] * 2, [pad] * 4, [1, 1], 1)
    last = memory_format is torch.channels_last

    def backward(mask):
        return torch.ops.aten.convolution_backward(
            dy, x, w, [outputs], [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1, mask
        )

    ours = [
        lambda: ops.conv2d_fwd(x, w, b, None, *geometry, 0, False),
        lambda: ops.conv2d_bwd_input(dy, w, x.shape, *geometry, last),
        lambda: ops.conv2d_bwd_weight(dy, x, [kernel] * 2, *geometry, True),
    ]
    theirs = [
        lambda: F.conv2d(x, w, b, stride, pad),
        lambda: backward([True, False, False]),
        lambda: backward([False, True, True]),
    ]
    if channels == 1:
        del ours[1], theirs[1]
    return ours, theirs


def medians(functions, repeats):
    """Median time of each function in milliseconds, taking turns."""
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, record in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            record.append(time.perf_counter() - start)
    return [1e3 * statistics.median(t) for t in times]


def main(threads: int = 1) -> None:
    torch.set_num_threads(threads)
    totals = {"channels first": 0.0, "channels last": 0.0}
    best_total = 0.0
    for shape in SHAPES:
        sums, peers = [], []
        for name, memory_format in zip(totals, (torch.contiguous_format, torch.channels_last), strict=True):
            ours, theirs = calls(*shape, memory_format)
            times = medians(ours + theirs, 15 if shape[3] > 8 else 31)
            sums.append(sum(times[: len(ours)]))
            peers.append(sum(times[len(ours) :]))
            totals[name] += sums[-1]
            print(f"{shape!s:28} {name:15}", *(f"{t:7.3f}" for t in times), f"  {sums[-1] / peers[-1]:.2f}")
        best_total += min(peers)
        print(f"{'':28} to torch's better layout: {sums[0] / min(peers):.2f} {sums[1] / min(peers):.2f}")
    for name, total in totals.items():
        print(f"all shapes, {name}: {total / best_total:.3f} of torch's better layout")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
