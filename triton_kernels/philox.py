"""The random generator of csrc/include/philox.h in Triton: the same steps in the same order, so the same bits.

Philox4x32-10 (Salmon et al., SC 2011), then Box-Muller from IEEE + - *, explicit fused multiply-adds, square root and
integer steps. A kernel that uses it must be launched with enable_fp_fusion=False.
"""

import triton
import triton.language as tl


@triton.jit
def philox4x32(seed, counter):
    """Four uint32 words per element of counter: (low, high, 0, 0) of it under the key (low, high) of seed, uint64."""
    # One 64-bit product gives both halves in one instruction; tl.umulhi and * would take two.
    mask: tl.constexpr = 0xFFFFFFFF
    k0, k1 = (seed & mask).to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = (counter & mask).to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = (p1 & mask).to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = (p0 & mask).to(tl.uint32)
        k0 = (k0 + 0x9E3779B9).to(tl.uint32)
        k1 = (k1 + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def log_ieee(x):
    """Natural logarithm of a positive normal float32, about 1 ulp."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    y = tl.fma(f, 7.0376836292e-2, -1.1514610310e-1)
    y = tl.fma(y, f, 1.1676998740e-1)
    y = tl.fma(y, f, -1.2420140846e-1)
    y = tl.fma(y, f, 1.4249322787e-1)
    y = tl.fma(y, f, -1.6668057665e-1)
    y = tl.fma(y, f, 2.0000714765e-1)
    y = tl.fma(y, f, -2.4999993993e-1)
    y = tl.fma(y, f, 3.3333331174e-1)
    y = tl.fma(y, f, -0.5)
    y = tl.fma(f * f, y, f)
    return tl.fma(exponent.to(tl.float32), 0.693147180559945, y)


@triton.jit
def exp_ieee(x):
    """e^x in float32, about 1 ulp; saturates outside [-87, 88]."""
    x = tl.where(x < -87.0, -87.0, tl.where(x > 88.0, 88.0, x))
    n = (x * 1.44269504088896341 + 12582912.0) - 12582912.0  # nearest integer
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    y = r * 1.9875691500e-4 + 1.3981999507e-3
    y = y * r + 8.3334519073e-3
    y = y * r + 4.1665795894e-2
    y = y * r + 1.6666665459e-1
    y = y * r + 5.0000001201e-1
    y = y * (r * r) + r + 1.0
    return y * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def sincos_turn(turn):
    """Sine and cosine of 2 pi turn / 2^32 for uint32 turn: the quadrant is split off exactly in integers."""
    quadrant = (turn + 0x20000000).to(tl.uint32) >> 30
    t = (turn - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-9
    z = t * t
    s = tl.fma(z, -1.9515295891e-4, 8.3321608736e-3)
    s = tl.fma(s, z, -1.6666654611e-1)
    s = tl.fma(s * z, t, t)
    c = tl.fma(z, 2.443315711809948e-5, -1.388731625493765e-3)
    c = tl.fma(c, z, 4.166664568298827e-2)
    c = tl.fma(c, z, -0.5)
    c = tl.fma(c, z, 1.0)
    swap = (quadrant & 1) != 0
    a = tl.where(swap, c, s).to(tl.uint32, bitcast=True) ^ ((quadrant & 2) << 30)
    b = tl.where(swap, s, c).to(tl.uint32, bitcast=True) ^ (((quadrant + 1) & 2) << 30)
    return a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True)


@triton.jit
def box_muller(word0, word1):
    """Two standard normals from two words (Box and Muller 1958)."""
    uniform = tl.fma(word0.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)  # (0, 1]
    radius = tl.sqrt_rn(log_ieee(uniform) * -2.0)
    sine, cosine = sincos_turn(word1)
    return radius * cosine, radius * sine


@triton.jit
def normal4(seed, counter):
    """Normals 4 k .. 4 k + 3 of a draw, k = counter - offset, as four float32 tensors of counter's shape."""
    w0, w1, w2, w3 = philox4x32(seed, counter)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3
