"""normal: the same bits everywhere, and the right distribution."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from policy import assert_bitwise, threads

import pynn
from pynn.ops.random import make_key

KERNEL = "normal"
SEED = 0x123456789ABCDEF
# SHA-256 of 2^20 float32 normals of this seed. Every kernel on every device must reproduce it.
DIGEST = "c1d06f7a9ef25c581faa9d732da4b254f3c84e9f18d43966b2fca6c77298437a"


def digest(x: torch.Tensor) -> str:
    return hashlib.sha256(x.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def philox(seed: int, counter: int) -> list[int]:
    """Philox4x32-10 in Python integers, from the paper."""
    mask = 0xFFFFFFFF
    c = [counter & mask, counter >> 32, 0, 0]
    k = [seed & mask, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def test_digest(backend):
    assert digest(pynn.ops.normal((1 << 20,), seed=SEED, device=backend.device)) == DIGEST


@pytest.mark.parametrize("isa", pynn.backends.CPU_ISAS)
def test_digest_of_every_instruction_set(isa):
    if not pynn.backends._cpu_supports(isa):
        pytest.skip(f"this CPU has no {isa}")
    program = f"import pynn, test_random as t; print(t.digest(pynn.ops.normal((1 << 20,), seed={SEED})))"
    environment = {
        **os.environ,
        "PYNN_CPU_ISA": isa,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
    }
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == DIGEST


def test_follows_the_definition(backend):
    """Against Philox in Python integers and Box-Muller in float64."""
    z = pynn.ops.normal((64,), seed=torch.tensor([SEED, 7]), device=backend.device).double()
    for i in range(0, 64, 4):
        words = philox(SEED, 7 + i // 4)
        for pair in (0, 2):
            u = words[pair] / 2**32 + 2**-33
            radius, angle = (-2 * torch.tensor(u).double().log()).sqrt(), words[pair + 1] / 2**32 * 2 * torch.pi
            expected = radius * torch.tensor([angle, angle - torch.pi / 2]).double().cos()
            torch.testing.assert_close(z[i + pair : i + pair + 2].cpu(), expected, rtol=2e-6, atol=2e-6)


def test_distribution():
    z = pynn.ops.normal((1 << 22,), seed=1).double()
    count = z.numel()
    moments = [z.mean(), z.var() - 1, (z**3).mean(), (z**4).mean() - 3]
    deviations = [1, 2**0.5, 15**0.5, 96**0.5]  # standard deviations of the sample moments, times sqrt(count)
    for moment, deviation in zip(moments, deviations, strict=True):
        assert abs(moment.item()) < 5 * deviation / count**0.5
    # Kolmogorov-Smirnov: sup |F_n - F| < 1.95 / sqrt(n) at the 0.1 % level.
    empirical = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    assert (torch.special.ndtr(z.sort().values) - empirical).abs().max() < 1.95 / count**0.5
    assert z.abs().max() > 4.9  # the tail is there
    lag = (z[1:] * z[:-1]).mean()
    assert abs(lag.item()) < 5 / count**0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_rounds_the_same_normals(backend, dtype):
    reference = pynn.ops.normal((5, 77), seed=3, device=backend.device)
    assert_bitwise(pynn.ops.normal((5, 77), seed=3, dtype=dtype, device=backend.device), reference.to(dtype))


def test_threads_and_splits(backend):
    whole = pynn.ops.normal((37, 1003), seed=9, device=backend.device)
    with threads(2):
        assert_bitwise(pynn.ops.normal((37, 1003), seed=9, device=backend.device), whole, "two threads")
    # One key numbers the elements of the whole draw: an offset of 1 skips four of them.
    tail = pynn.ops.normal((37 * 1003 - 8,), seed=torch.tensor([9, 2]), device=backend.device)
    assert_bitwise(tail, whole.flatten()[8:], "offset")
    # A key per sample: the sample's noise is its own, whatever the batch.
    keys = torch.randint(2**62, (6, 2))
    batch = pynn.ops.normal((6, 3, 5), seed=keys, device=backend.device)
    assert_bitwise(pynn.ops.normal((2, 3, 5), seed=keys[3:5], device=backend.device), batch[3:5], "batch slice")
    assert_bitwise(pynn.ops.normal((1, 3, 5), seed=keys[5], device=backend.device), batch[5:], "single sample")


def test_sources_of_the_key():
    torch.manual_seed(4)
    first = pynn.ops.normal((8,))
    torch.manual_seed(4)
    assert_bitwise(pynn.ops.normal((8,)), first, "manual_seed")
    generator = torch.Generator().manual_seed(4)
    assert_bitwise(pynn.ops.normal((8,), generator=generator), first, "generator")
    assert not torch.equal(pynn.ops.normal((8,), generator=generator), first)
    assert_bitwise(pynn.ops.normal((8,), seed=-1), pynn.ops.normal((8,), seed=2**64 - 1), "seeds are modulo 2^64")
    per_sample = pynn.ops.normal((3, 8), seed=torch.tensor([4, 5, 6]))
    assert_bitwise(per_sample[1], pynn.ops.normal((8,), seed=5), "one seed per sample")
    with pytest.raises(ValueError, match="got both"):
        make_key(torch.device("cpu"), generator=generator, seed=1)
    with pytest.raises(ValueError, match="int64"):
        make_key(torch.device("cpu"), seed=torch.zeros(3))
