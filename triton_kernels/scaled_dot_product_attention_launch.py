"""How attention's kernels are launched: strides, options, tiles, statistics and the parts of a mask's gradient."""

from __future__ import annotations

import dataclasses
import functools
import math
import struct

import torch
import triton
import triton.language as tl

from . import scaled_dot_product_attention_configs as configs
from .products import compute_dtype
from .scaled_dot_product_attention_tile import BOOL_MASK, FLOAT_MASK

MOST = 2**31 - 1024  # queries and keys together
# Up to so many queries of a head: keys are split into parts of so many, or more where there were too many parts. They
# follow from one sample's shape alone, so that its result does not depend on its batch.
_FEW_QUERIES, _PART_KEYS, _MOST_PARTS = 16, 256, 128


def new_heads(like: torch.Tensor, width: int) -> torch.Tensor:
    """(..., H, L, width) stored as (..., L, H, width), so that joining the heads afterwards is free."""
    sizes = [*like.shape[:-1], width]
    if like.dim() < 4:
        return like.new_empty(sizes)
    sizes[-3], sizes[-2] = sizes[-2], sizes[-3]
    return like.new_empty(sizes).transpose(-3, -2)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def readable(t: torch.Tensor) -> torch.Tensor:
    """The kernels want the numbers of a row side by side."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def bits(x: float) -> int:
    """Of a float64, see `number` of the tile."""
    return struct.unpack("q", struct.pack("d", x))[0]


def _merged(sizes: torch.Size, strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """(size, stride) of the fewest dimensions that number the same places in the same order."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def _table(t: torch.Tensor) -> torch.Tensor:
    """Where the heads (leading dimensions) of t begin, made on its device."""
    places = torch.zeros((1,), dtype=torch.int64, device=t.device)
    for size, stride in zip(t.shape[:-2], t.stride()[:-2], strict=True):
        places = (places[:, None] + torch.arange(size, device=t.device) * stride).flatten()
    return places


def pack_of(*tensors: torch.Tensor) -> int:
    """Elements of 16 bytes where all rows of the tensors lie in such packs, otherwise 1."""
    pack = 16 // tensors[0].element_size()
    dims = ((t.shape[d], t.stride(d)) for t in tensors for d in range(t.dim() - 1))
    return pack if all(stride % pack == 0 for size, stride in dims if size > 1) else 1


def operand(name: str, t: torch.Tensor, pack: int) -> dict[str, object]:
    """The arguments <name>, <name>_table, _inner, _outer, _step and _row of a kernel."""
    dims, table = _merged(t.shape[:-2], t.stride()[:-2]), None
    if len(dims) > 2:
        dims, table = [], _table(t)
    (_, outer), (inner, step) = [(1, 0)] * (2 - len(dims)) + dims
    return {
        name: t,
        f"{name}_table": table,
        f"{name}_inner": inner,
        f"{name}_outer": outer // pack,
        f"{name}_step": step // pack,
        f"{name}_row": (t.stride(-2) if t.shape[-2] > 1 else 0) // pack,
    }


@dataclasses.dataclass(frozen=True)
class Problem:
    """The operands of scaled_dot_product_attention_fwd, validated, and what they say about every kernel."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None
    dropout_key: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    key_ranges: torch.Tensor | None
    query_ranges: torch.Tensor | None
    dropout_p: float
    left: int
    right: int
    lower_right: bool
    scale: float
    softcap: float

    @property
    def batch(self) -> torch.Size:
        return self.query.shape[:-2]

    @property
    def heads(self) -> int:
        return math.prod(self.batch)

    @property
    def group(self) -> int:
        return max(1, self.query.shape[-3] // self.key.shape[-3]) if self.query.dim() > 2 else 1

    @property
    def queries(self) -> int:
        return self.query.shape[-2]

    @property
    def keys(self) -> int:
        return self.key.shape[-2]

    @property
    def is_split(self) -> bool:
        return self.queries <= _FEW_QUERIES and self.keys > _PART_KEYS

    @property
    def part_keys(self) -> int:
        return _PART_KEYS * max(1, triton.cdiv(self.keys, _PART_KEYS * _MOST_PARTS))

    @property
    def is_empty(self) -> bool:
        return self.heads == 0 or self.queries == 0 or self.keys == 0

    @property
    def kind(self) -> str:
        return {2: "half", 4: "fp32", 8: "fp64"}[self.query.element_size()]

    @property
    def compute(self) -> torch.dtype:
        return compute_dtype(self.query)

    @property
    def is_plain(self) -> bool:
        """Whether nothing but causality makes one score another than the next."""
        options = (self.attn_mask, self.dropout_key, self.alibi_slopes, self.key_ranges)
        return all(t is None for t in options) and self.left < 0 and self.softcap == 0

    def tile(self, name: str) -> configs.Tile:
        owned, streamed = (self.keys, self.queries) if name == "keys" else (self.queries, self.keys)
        owned *= self.group if name == "split" else 1
        return configs.tile_of(self.kind, name, max(self.query.shape[-1], self.value.shape[-1]), owned, streamed)

    @functools.cached_property
    def _rows(self) -> tuple[torch.Tensor, ...]:
        return tuple(readable(t) for t in (self.query, self.key, self.value))

    @functools.cached_property
    def window(self) -> tuple[int, int, int]:
        """lower, upper and diagonal: query i sees the keys i + lower .. i + upper. As in AttentionShape of C++."""
        queries, keys = self.queries, self.keys
        diagonal = keys - queries if self.lower_right else 0
        most = queries + keys
        lower = -queries if self.left < 0 else max(diagonal - min(self.left, most), -queries)
        upper = keys if self.right < 0 else min(diagonal + min(self.right, most), keys)
        return lower, upper, diagonal

    @functools.cached_property
    def mask(self) -> torch.Tensor | None:
        """The mask with the rank of the scores, of the sizes it has; a bool as bytes."""
        m = self.attn_mask
        if m is None:
            return None
        m = m[(None,) * (self.query.dim() - m.dim())]
        return m.view(torch.uint8) if m.dtype is torch.bool else m

    def arguments(self, grad_out: torch.Tensor | None = None) -> dict[str, object]:
        """What the kernels have in common: operands, sizes and options."""
        q, k, v = self._rows
        wide = self._rows if grad_out is None else (*self._rows, grad_out)
        pack = pack_of(*wide)
        ranged, (lower, upper, diagonal) = self.key_ranges is not None, self.window
        dropped = self.dropout_key is not None and self.dropout_p > 0
        log_unit = math.log2(math.e) if self.kind == "half" else 1.0
        capped = self.softcap > 0
        factor = self.scale / self.softcap if capped else self.scale * log_unit
        mask, masks = self.mask, {"m_column": 0, "MASK": 0, "MASK_COLUMN": 0}
        m = q if mask is None else mask.expand(*self.batch, -1, -1)
        if mask is not None:
            column = mask.stride(-1) if mask.shape[-1] > 1 else 0
            kind = BOOL_MASK.value if mask.dtype is torch.uint8 else FLOAT_MASK.value
            masks = {"m_column": column, "MASK": kind, "MASK_COLUMN": column if column in (0, 1) else 2}
        masks |= {f"m{name[1:]}" if name != "m" else "mask": x for name, x in operand("m", m, 1).items()}
        if mask is None:
            masks |= {"mask": None, "m_table": None}
        arguments = {
            **operand("q", q, pack), **operand("k", k, pack), **operand("v", v, pack), **masks,
            "dropout_key": self.dropout_key.contiguous() if dropped else None,
            "slopes": None if self.alibi_slopes is None else self.alibi_slopes.contiguous(),
            "key_ranges": self.key_ranges.contiguous() if ranged else None,
            "queries": self.queries, "keys": self.keys, "group": self.group,
            "lower": lower, "upper": upper, "diagonal": diagonal,
            "factor": bits(factor), "softcap": bits(self.softcap * log_unit),
            "threshold": int(self.dropout_p * 2**32),
            "kept": bits(1 / (1 - self.dropout_p) if self.dropout_p < 1 else 0.0),
            "dim": q.shape[-1], "value_dim": v.shape[-1],
            "DIM": q.shape[-1], "VALUE_DIM": v.shape[-1], "PACK": pack,
            "COMPUTE": tl.float64 if self.kind == "fp64" else tl.float32, "BASE2": self.kind == "half",
            "LEFT": not ranged and lower > 1 - self.queries, "RIGHT": not ranged and upper < self.keys - 1,
            "SOFTCAP": capped, "QUADS": self.keys % 4 == 0,
        }  # fmt: skip
        return arguments | ({} if grad_out is None else operand("g", grad_out, pack))

    def blocks(self, tile: configs.Tile) -> dict[str, object]:
        """The sizes of a tile, with columns of the results that a program owns."""
        dim, value_dim = (max(16, triton.next_power_of_2(t.shape[-1])) for t in (self.query, self.value))
        return {
            "ROWS": tile.rows, "COLS": tile.columns, "STEP": tile.step,
            "BLOCK_D": min(dim, tile.width), "BLOCK_V": min(value_dim, tile.width),
        }  # fmt: skip

    def launch(self, kernel, programs: int, widths: tuple[int, int], tile: configs.Tile, arguments: dict) -> None:
        """Runs a kernel in programs x parts; the parts cut results of the given head dimensions."""
        sizes = self.blocks(tile)
        parts = max(1, triton.cdiv(widths[0], sizes["BLOCK_D"]), triton.cdiv(widths[1], sizes["BLOCK_V"]))
        if programs >= 2**31 or self.queries + self.keys >= MOST:
            raise RuntimeError("scaled_dot_product_attention: too large for one launch")
        known = set(kernel.arg_names)
        with torch.cuda.device_of(self.query):
            kernel[(programs, parts)](
                **{name: x for name, x in (arguments | sizes).items() if name in known}, **tile.options
            )
