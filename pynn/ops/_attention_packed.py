"""Sequences packed one behind the other along the length of query, key and value: which keys each query sees."""

from __future__ import annotations

import torch
from torch import Tensor

_NAME = "scaled_dot_product_attention"


def checked(cu_seqlens, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The starts of the sequences of query and of key. Their values are looked at on the CPU only.

    Raises:
        TypeError: cu_seqlens is neither a tensor nor two of them.
        RuntimeError: they are not starts of sequences in query and key.
    """
    starts = (cu_seqlens, cu_seqlens) if isinstance(cu_seqlens, Tensor) else cu_seqlens
    if not isinstance(starts, tuple) or len(starts) != 2 or not all(isinstance(t, Tensor) for t in starts):
        raise TypeError(f"{_NAME}: expected cu_seqlens to be a tensor or a pair of them, got {cu_seqlens!r}")
    for t, operand, name in zip(starts, (query, key), ("query", "key"), strict=True):
        if t.dim() != 1 or t.dtype not in (torch.int32, torch.int64) or t.shape[0] < 1:
            raise RuntimeError(f"{_NAME}: expected cu_seqlens (N + 1), int32 or int64, got {t.dtype} {tuple(t.shape)}")
        if t.device != operand.device:
            raise RuntimeError(f"{_NAME}: expected cu_seqlens on {operand.device} as {name}, got {t.device}")
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            values, length = t.tolist(), operand.shape[-2]
            if values[0] != 0 or values != sorted(values) or values[-1] > length:
                raise RuntimeError(
                    f"{_NAME}: expected cu_seqlens that rise from 0 to at most the length of {name}, {length}, got {t}"
                )
    if starts[0].shape != starts[1].shape:
        raise RuntimeError(
            f"{_NAME}: expected cu_seqlens of as many sequences in query as in key, got "
            f"{starts[0].shape[0] - 1} and {starts[1].shape[0] - 1}"
        )
    return starts


def ranges(starts: tuple[Tensor, Tensor], query: Tensor, key: Tensor, left: int, right: int, lower_right: bool):
    """key_ranges (Lq, 4) and query_ranges (Lk, 2) of the ops: a window in each sequence. Nothing waits for a GPU."""
    query_starts, key_starts = (t.long() for t in starts)
    queries, keys, count = query.shape[-2], key.shape[-2], query_starts.shape[0] - 1
    row = torch.arange(queries, device=query.device)
    column = torch.arange(keys, device=query.device)
    number = torch.searchsorted(query_starts, row, right=True)  # of the sequence, from 1 on; more behind the last one
    next_number = number.clamp(max=count)
    begin, end = key_starts[number - 1].clamp(0, keys), key_starts[next_number].clamp(0, keys)
    diagonal = row - query_starts[number - 1] + begin
    if lower_right:
        diagonal = diagonal + (end - begin) - (query_starts[next_number] - query_starts[number - 1])
    first = begin if left < 0 else torch.minimum(torch.maximum(begin, diagonal - left), end)
    stop = end if right < 0 else torch.maximum(torch.minimum(end, diagonal + right + 1), begin)
    key_ranges = torch.stack((first, stop, diagonal, torch.zeros_like(row)), -1).int()
    seen_from = torch.searchsorted(stop.contiguous(), column, right=True)
    seen_to = torch.searchsorted(first.contiguous(), column, right=True)
    return key_ranges, torch.stack((seen_from, seen_to), -1).int()


def packed(name: str, nested: Tensor) -> tuple[Tensor, Tensor]:
    """(H, T, D) and the starts of the sequences of a jagged nested tensor (N, H, L*, D).

    Raises:
        RuntimeError: it is not of that kind.
    """
    if not nested.is_nested or nested.layout != torch.jagged or nested.dim() != 4:
        raise RuntimeError(
            f"{_NAME}: expected {name} (N, H, L*, D) in torch's jagged layout as the others, got "
            f"{nested.layout} with {nested.dim()} dimensions"
        )
    rows_first = nested.transpose(1, 2)  # (N, L*, H, D): its values lie as (T, H, D)
    return rows_first.values().transpose(0, 1), rows_first.offsets()  # type: ignore[attr-defined]


def unpacked(out: Tensor, starts: Tensor) -> Tensor:
    """The inverse of `packed`."""
    return torch.nested.nested_tensor_from_jagged(out.transpose(0, 1), starts).transpose(1, 2)
