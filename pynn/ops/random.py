"""normal: standard normals from a counter-based key, the same bits on every device, instruction set and thread count.

Element i of a draw with key (seed, offset) comes from word i % 4 of Philox4x32-10(key=seed, counter=offset + i // 4)
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the integer stream of torch.func._random),
through a Box-Muller transform made of IEEE additions, multiplications, fused multiply-adds and square roots only. Every
dtype gets the same float32 normals, widened or rounded once.
"""

from __future__ import annotations

import torch

from .. import backends
from ._registry import define


@define("normal(Tensor like, Tensor key) -> Tensor", triton="diffusion")
def _(like, key):
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def make_key(
    device: torch.device,
    *,
    generator: torch.Generator | None = None,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """A Philox key as int64 (2,) = (seed, offset), or (B, 2) with one key per sample.

    For a CUDA graph make it before the capture and pass it as `seed`: a replay then reads the tensor's new values.
    A key from an int or a CPU generator is a copy from the host, which cannot be captured.

    Args:
        device: where the key is needed.
        generator: a seed is drawn from it; torch's default generator when both arguments are None, so that
            torch.manual_seed makes everything reproducible.
        seed: an int, or an int64 tensor of shape (2,), (B, 2), or (B,) (one seed per sample, offset 0).
    Raises:
        ValueError: both arguments given, or a seed of another shape or dtype.
    """
    if seed is None:
        source = generator.device if generator is not None else torch.device("cpu")
        key = torch.randint(2**63 - 1, (2,), generator=generator, device=source)
        key[1] = 0
        return key.to(device)
    if generator is not None:
        raise ValueError("pynn: expected generator= or seed=, got both")
    if isinstance(seed, int):
        return torch.tensor([(seed + 2**63) % 2**64 - 2**63, 0], device=device)
    if not isinstance(seed, torch.Tensor) or seed.dtype is not torch.int64 or seed.dim() not in (1, 2):
        raise ValueError(
            f"pynn: expected seed as an int or an int64 tensor of shape (2,), (B, 2) or (B,), got {_describe(seed)}"
        )
    if seed.dim() == 1 and seed.shape[0] != 2:
        seed = torch.stack((seed, torch.zeros_like(seed)), dim=1)
    return seed.to(device)


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} tensor of shape {tuple(value.shape)}"
    return type(value).__name__


def normal(
    shape: tuple[int, ...],
    *,
    generator: torch.Generator | None = None,
    seed: int | torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Standard normal noise, bit-identical on every device.

    Args:
        shape: of the result.
        generator, seed: where the key comes from, see `make_key`; per-sample keys count elements from the start of
            each sample, so that a sample's noise does not depend on the batch it is in.
        dtype: float64, float32, float16 or bfloat16.
        device: of the result.
    Returns:
        Tensor of this shape.
    """
    like = torch.empty((), dtype=dtype, device=device).expand(shape if shape else (1,))
    key = make_key(like.device, generator=generator, seed=seed)
    return backends.op("normal", like)(like, key).reshape(shape)
