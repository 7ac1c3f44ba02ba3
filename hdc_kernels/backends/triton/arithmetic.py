# Triton types its kernels itself.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

"""What several kernels compute alike: unit vectors, matrix products, roundings and logarithms.

Logits are kept as cosines (or dot products) and meet the temperature only inside an exponent, in base
2: exp(S/τ − lse) = exp2(S·k − lse·log2 e) with k = log2(e)/τ. That is one fused multiply-add and one
instruction of the special-function unit.
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from hdc_kernels import reference

# Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported) multiplies the raw bits of bfloat16
# and truncates when it converts to it; both are mended where this is set.
INTERPRET = tl.constexpr(not isinstance(tl.sum, triton.runtime.JITFunction))

EXACT = tl.constexpr("ieee")  # how products are taken where nothing else is said
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
ZERO_NORM = tl.constexpr(reference.ZERO_NORM)


@triton.jit
def inverse_temperature(temperature, LEARNED: tl.constexpr):
    """1/τ of a number, or of a pointer to one: a learnable τ is read without synchronising."""
    if LEARNED:
        temperature = tl.load(temperature).to(tl.float32)
    return 1.0 / temperature


@triton.jit
def unit_rows(x, NORMALIZE: tl.constexpr):
    """x [R, D] float32 -> x̂ [R, D] and 1/|x| [R], both 0 for a zero vector; x and 1 if not NORMALIZE."""
    if NORMALIZE:
        # The squares of a vector beyond 1e19 overflow. A power of two shrinks it without rounding.
        shrink = tl.where(tl.max(tl.abs(x), 1) > 2.0**40, 2.0**-70, 1.0)
        shrunk = x * shrink[:, None]
        norm = tl.sqrt(tl.sum(shrunk * shrunk, 1))
        inverse = tl.where(norm <= ZERO_NORM, 0.0, shrink / norm)  # NaN stays NaN
        return x * inverse[:, None], inverse
    else:  # noqa: RET505 - Triton compiles whatever follows an if
        return x, tl.full((x.shape[0],), 1.0, tl.float32)


@triton.jit
def load_units(elements, mask, NORMALIZE: tl.constexpr):
    """`unit_rows` of embeddings [R, D] in memory, whatever their dtype."""
    return unit_rows(tl.load(elements, mask, 0.0).to(tl.float32), NORMALIZE)


@triton.jit
def unit_rows_backward(unit, inverse, gradient, NORMALIZE: tl.constexpr):
    """Gradient by x̂ [R, D] -> gradient by x [R, D], and x̂ · gradient [R]."""
    along = tl.sum(unit * gradient, 1)
    if NORMALIZE:
        gradient = (gradient - unit * along[:, None]) * inverse[:, None]
    return gradient, along


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x float32 rounded to the nearest of `dtype`."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr = EXACT):
    """total [R, C] float32 plus a [R, K] times b [K, C]."""
    if INTERPRET and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def product(a, b, PRECISION: tl.constexpr = EXACT):
    """a [R, K] times b [K, C], accumulated in float32."""
    return add_product(tl.zeros((a.shape[0], b.shape[1]), tl.float32), a, b, PRECISION)


@triton.jit
def gain(dtype: tl.constexpr):
    """What probabilities are multiplied by before they are rounded to `dtype`, and divided by after.

    float16 has no normal number below 6e-5, where most of a softmax over 65,536 columns lies; 2**14
    lifts it by 14 bits and leaves a factor of 4 to the largest number. The others have enough range.
    """
    if dtype == tl.float16:
        return 16384.0
    else:  # noqa: RET505
        return 1.0


@triton.jit
def softplus(z):
    """log(1 + exp(z)) to full relative accuracy, also where it is 1e-9: there log(1 + t) would be 0."""
    t = tl.exp(-tl.abs(z))
    u = 1.0 + t
    log1p = tl.where(u == 1.0, t, tl.log(u) * (t / (u - 1.0)))  # the rounding of u cancels
    return tl.maximum(z, 0.0) + log1p


@triton.jit
def sigmoid(z):
    """exp(z) / (1 + exp(z)); 0 at −∞."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def softplus2(z):
    """log(1 + 2^z), of every logit: `softplus` would take a logarithm, and branch, for each."""
    t = tl.exp2(-tl.abs(z))
    ratio = t / (2.0 + t)
    square = ratio * ratio
    # log(1 + t) = 2 atanh(ratio), here a Chebyshev fit with a relative error of 4e-9.
    series = 0.2815777836310908 * square + 0.2796515774519727
    series = series * square + 0.40024595230703748
    series = series * square + 0.66666321641377773
    series = series * square + 2.0000000076817588
    return tl.maximum(z, 0.0) * LN_2 + ratio * series


@triton.jit
def sigmoid2(z):
    """2^z / (1 + 2^z); 0 at −∞."""
    return 1.0 / (1.0 + tl.exp2(-z))


@triton.jit
def finite_shift(lse):
    """+∞ where there was nothing to sum (lse = −∞), so that exp(logit − shift) is 0 and not NaN."""
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def add_exponentials(highest, total, cosine, k):
    """Take the columns of cosine [R, C] into Σ exp2((cosine − highest)·k) [R] and its running maximum."""
    higher = tl.maximum(highest, tl.max(cosine, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    total *= tl.exp2((highest - base) * k)
    total += tl.sum(tl.exp2((cosine - base[:, None]) * k), 1)
    return higher, total
