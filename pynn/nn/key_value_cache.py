"""KeyValueCache: the keys and values that an attention layer has seen, for generation token by token."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of earlier tokens in memory that is taken once; new ones are written behind them, in place.

    What `append` and `stored` give are views of the filled part, (N, Hk, used, D), which
    pynn.ops.scaled_dot_product_attention reads where they lie: a step of generation copies nothing but the new tokens.
    Let it align its diagonal to the last key:

        key, value = cache.append(key, value)
        out = scaled_dot_product_attention(query, key, value, window=(-1, 0), alignment="lower_right", enable_gqa=True)

    Views that were given out before see what is written into their part later (`truncate`, then `append`). Nothing here
    is recorded by autograd: use it under torch.no_grad().

    Args:
        length: the most tokens it will hold. The first `append` decides on batch, heads, widths, dtype and device.
    Attributes:
        length: as given. used: tokens held.
    Raises:
        ValueError: length is negative.
    """

    def __init__(self, length: int) -> None:
        if length < 0:
            raise ValueError(f"KeyValueCache: expected length >= 0, got {length}")
        self.length = length
        self.used = 0
        self._store: tuple[Tensor, Tensor] | None = None

    def stored(self) -> tuple[Tensor, Tensor]:
        """All keys (N, Hk, used, D) and values (N, Hk, used, Dv) so far, as views.

        Raises:
            ValueError: nothing was stored yet.
        """
        if self._store is None:
            raise ValueError("KeyValueCache: nothing was stored yet")
        return self._store[0][:, :, : self.used], self._store[1][:, :, : self.used]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys (N, Hk, L, D) and values (N, Hk, L, Dv) of any strides; returns all so far, as `stored`.

        Raises:
            ValueError: shape, dtype or device differ from what is held, or there are more tokens than `length`.
        """
        if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise ValueError(
                "KeyValueCache: expected key (N, H, L, D) and value (N, H, L, Dv), got "
                f"{tuple(key.shape)} and {tuple(value.shape)}"
            )
        end = self.used + key.shape[2]
        if end > self.length:
            raise ValueError(f"KeyValueCache: expected at most {self.length} tokens, got {end}")
        if self._store is None:
            self._store = self._memory(key), self._memory(value)
        for name, store, new in zip(("key", "value"), self._store, (key, value), strict=True):
            fits = new.shape[:2] == store.shape[:2] and new.shape[3] == store.shape[3]
            if not fits or new.dtype != store.dtype or new.device != store.device:
                batch, heads, _, width = store.shape
                raise ValueError(
                    f"KeyValueCache: expected {name} ({batch}, {heads}, L, {width}) {store.dtype} on {store.device} as "
                    f"before, got {tuple(new.shape)} {new.dtype} on {new.device}"
                )
        with torch.no_grad():
            for store, new in zip(self._store, (key, value), strict=True):
                store[:, :, self.used : end] = new
        self.used = end
        return self.stored()

    def truncate(self, used: int) -> None:
        """Forgets all tokens but the first `used`, as after rejected drafts; 0 starts anew in the same memory.

        Raises:
            ValueError: used is not in [0, self.used].
        """
        if not 0 <= used <= self.used:
            raise ValueError(f"KeyValueCache: expected 0 <= used <= {self.used}, got {used}")
        self.used = used

    def select(self, rows: Tensor) -> None:
        """Takes these samples of the batch instead, (M) int64, as beam search does; copies what is held.

        Raises:
            ValueError: nothing was stored yet.
        """
        own = []
        for held in self.stored():
            store = self._memory(held[rows[:0]], rows.shape[0])
            store[:, :, : self.used] = held.index_select(0, rows)
            own.append(store)
        self._store = own[0], own[1]

    def _memory(self, like: Tensor, batch: int | None = None) -> Tensor:
        shape = (like.shape[0] if batch is None else batch, like.shape[1], self.length, like.shape[3])
        return torch.empty(shape, dtype=like.dtype, device=like.device)
