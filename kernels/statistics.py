"""Algorithm 1 of Ioffe (2017), per channel: moments, r and d, the running statistics.

A mean is kept as an unevaluated sum ``mean + rest`` of two floats. Rounded to one float, the mean of
a channel at 1e4 with a standard deviation of 1e-2 would be off by 5 % of that deviation.
"""

import triton
import triton.language as tl

from .barrier import arrive
from .tile import channel_sum, counted, split_range, spread


@triton.jit
def two_sum(a, b):
    """a + b as (rounded sum, rounding error), exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@triton.jit
def settled(mean, known):
    """The mean of a channel or, where a sum may be rounded by as much as lies between them, a value that the
    channel has: in one that never varies it is the mean, from which all distances are 0 and stay so, however
    much 1/sigma_B magnifies them. Elsewhere a centre as near as that is as good. known: see ``anchor``."""
    value, x = known
    if x.dtype.element_ty != mean.dtype:  # half precision has no other value so near
        value = mean.to(x.dtype.element_ty).to(mean.dtype)
    ROUNDING: tl.constexpr = 2.0**-45 if mean.dtype == tl.float64 else 2.0**-16
    return tl.where(tl.abs(mean - value) <= ROUNDING * tl.abs(value), value, mean)


@triton.jit
def moments(t, inside, known, count, inner, T: tl.constexpr):
    """mean, rest and M2 = sum((t - mean - rest)^2) of the ``count`` elements of each channel."""
    mean, rest, m2, t, t = centred_moments(t, inside, t, inside, known, count, inner, False, T)
    return mean, rest, m2


@triton.jit
def centred_moments(t, inside, e, e_inside, known, count, inner, BOTH: tl.constexpr, T: tl.constexpr):
    """The moments of a tile or, if BOTH, of a tile and the tile of its edges; then both tiles minus mean.

    known: see ``anchor``.
    """
    s = channel_sum(t, inner, T)
    if BOTH:
        s += channel_sum(e, inner, T)
    mean = settled(s / count, known)
    t -= tl.where(inside, spread(mean, inner, T), 0.0)  # t is 0 where masked
    s = channel_sum(t, inner, T)
    m2 = channel_sum(square(t), inner, T)
    if BOTH:
        e -= tl.where(e_inside, mean, 0.0)
        s += channel_sum(e, inner, T)
        m2 += channel_sum(square(e), inner, T)
    # The corrected two-pass algorithm (Chan, Golub and LeVeque 1983). rest is what rounding left in mean, an
    # ulp or a few: M2 loses digits only where the standard deviation is far below that.
    rest = s / count
    m2 -= rest * (s + (s - count * rest))
    return mean, rest, tl.maximum(m2, 0.0, propagate_nan=tl.PropagateNan.ALL), t, e


@triton.jit
def square(t):
    """t * t, rounded: fused into the sum over threads, it would leave another M2 in each of them."""
    return tl.fma(t, t, tl.zeros_like(t))


@triton.jit
def welford(t, seen, n, mean, m2):
    """Take a tile into the moments of its places (Welford 1962), of which each has seen n elements."""
    n += seen.to(n.dtype)
    delta = tl.where(seen, t - mean, 0.0)
    mean += delta / tl.maximum(n, 1.0)
    return n, mean, m2 + delta * (t - mean)


@triton.jit
def moments_of_places(n, mean, m2, inner, T: tl.constexpr):
    """The moments of each channel, from those of a tile's places; and of how many elements they are."""
    n += tl.zeros_like(mean)
    n_c = channel_sum(n, inner, T)
    mean_c = channel_sum(n * mean, inner, T) / tl.maximum(n_c, 1.0)
    deviation = mean - spread(mean_c, inner, T)
    return n_c, mean_c, channel_sum(m2 + n * deviation * deviation, inner, T)


@triton.jit
def merge(n_a, mean_a, rest_a, m2_a, n_b, mean_b, rest_b, m2_b):
    """The moments of the union of two sets (Chan, Golub and LeVeque 1979); either may be empty."""
    n = n_a + n_b
    share = n_b / tl.maximum(n, 1.0)
    mean_a = tl.where(n_a > 0.0, mean_a, mean_b)  # from 0 to mean_b, delta would lose rest_b
    delta = (mean_b - mean_a) + (rest_b - rest_a)
    mean, rest = two_sum(mean_a, rest_a + delta * share)
    # In this order: far from zero, delta * delta is inf, and NaN where one of the sets is empty.
    return n, mean, rest, m2_a + m2_b + delta * (n_a * share) * delta


@triton.jit
def store_partial(partials, split, mean, rest, m2, channel, exists, channels):
    """Hand a split's moments to whoever finalises: partials (splits, 3, C)."""
    p = partials + split * 3 * channels + channel
    tl.store(p, mean, mask=exists)
    tl.store(p + channels, rest, mask=exists)
    tl.store(p + 2 * channels, m2, mask=exists)


@triton.jit
def merge_partials(
    partials, splits, total, group, channel, exists, channels, inner, STAT: tl.constexpr, T: tl.constexpr
):
    """The moments of all splits, always merged in the same order: results are repeatable."""
    n = tl.zeros([1], STAT)
    mean = tl.full([T.channels], 0.0, STAT)
    rest, m2 = mean, mean
    for first in range(0, splits, T.piece):
        split = first + tl.arange(0, T.piece)[:, None]
        begin, end = split_range(split, splits, total, T)
        n_s = tl.where(split < splits, counted(begin, end, group, channels, inner, T), 0).to(STAT)
        mask = (split < splits) & exists[None, :]
        p = partials + split * 3 * channels + channel[None, :]
        mean_s = tl.load(p, mask=mask, other=0.0)
        rest_s = tl.load(p + channels, mask=mask, other=0.0)
        m2_s = tl.load(p + 2 * channels, mask=mask, other=0.0)
        # The piece's moments, as offsets from the mean of its first split.
        n_p = tl.sum(n_s, 0)
        pivot = tl.sum(tl.where(split == first, mean_s, 0.0), 0)
        offset = tl.where(mask, (mean_s - pivot) + rest_s, 0.0)
        rest_p = tl.sum(n_s * offset, 0) / tl.maximum(n_p, 1.0)
        deviation = offset - rest_p
        m2_p = tl.sum(m2_s + n_s * deviation * deviation, 0)
        n, mean, rest, m2 = merge(n, mean, rest, m2, n_p, pivot, rest_p, m2_p)
    return mean, rest, m2


@triton.jit
def exact(number, STAT: tl.constexpr):
    """A host number as a (1,) vector. It arrives as (nearest float32, remainder), whole for float64."""
    return tl.full([1], number[0], STAT) + tl.full([1], number[1], STAT)


@triton.jit
def limit_at(ramp, step, STAT: tl.constexpr):
    """The clipping limit of the batch that ``step`` batches came before; see triton_brn.Ramp."""
    start, stop = exact(ramp[0], STAT), exact(ramp[1], STAT)
    begin, end = exact(ramp[2], STAT), exact(ramp[3], STAT)
    part = tl.maximum(step - begin, 0.0) / tl.maximum(end - begin, 1.0)
    return tl.where(step >= end, stop, start + (stop - start) * part)


@triton.jit
def clip(v, low, high):
    """clip that keeps NaN, as torch.clamp does."""
    v = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_running(running, channel, exists, STAT: tl.constexpr):
    """mu, the running variance, and how many batches came before, as a (1,) vector."""
    running_mean, running_var, counter = running
    mu = tl.load(running_mean + channel, mask=exists, other=0.0)
    v = tl.load(running_var + channel, mask=exists, other=1.0)
    step = tl.zeros([1], STAT)
    if counter is not None:
        step += tl.load(counter).to(STAT)
    return mu, v, step


@triton.jit
def finalise(
    count,
    moments,
    old,
    running,
    affine,
    saved,
    channel,
    exists,
    channels,
    settings,
    AVERAGE_STD: tl.constexpr,
):
    """From a channel's moments to r and d; then, and only then, the running statistics.

    moments: mean, rest, M2. old: ``load_running`` of these channels. running: (running_mean (C,),
    running_var (C,), step scalar or None), the first two are written. affine: (weight, bias). saved:
    (5, C), receives mean, rest, 1/sigma_B, r, d. Returns a and b of ``line``.
    A channel whose moments are not finite keeps its running statistics.
    """
    STAT: tl.constexpr = saved.dtype.element_ty
    mean, rest, m2 = moments
    mu, v, step = old
    momentum, eps, r_ramp, d_ramp = settings
    eps = exact(eps, STAT)

    v_batch = m2 / count
    std = tl.sqrt(v_batch + eps)
    sigma = tl.sqrt(v + eps)
    r_max, d_max = limit_at(r_ramp, step, STAT), limit_at(d_ramp, step, STAT)
    r = clip(std / sigma, 1.0 / r_max, r_max)
    d = clip(((mean - mu) + rest) / sigma, -d_max, d_max)

    alpha = exact(momentum, STAT)
    alpha = tl.where(alpha < 0.0, 1.0 / (step + 1.0), alpha)  # negative: the cumulative average
    if AVERAGE_STD:
        # (sigma + alpha (std - sigma))^2 - eps without subtracting eps: averaged is u = sigma - root.
        root = tl.sqrt(eps)
        u = v / tl.maximum(sigma + root, 1e-30)
        u += alpha * (v_batch / tl.maximum(std + root, 1e-30) - u)
        v_new = u * (u + 2.0 * root)
    else:
        v_new = v + alpha * (m2 / (count - 1.0) - v)
    update = exists & (v_new < float("inf"))  # where the mean is not finite, m2 is NaN or inf
    update &= alpha > 0.0  # from v to u and back is no identity
    tl.debug_barrier()  # every warp has read what one of them is about to overwrite
    tl.store(running[0] + channel, mu + alpha * ((mean - mu) + rest), mask=update)
    tl.store(running[1] + channel, v_new, mask=update)

    rstd = 1.0 / std
    store_saved(saved, mean, rest, rstd, r, d, channel, exists, channels)
    gamma, beta = load_affine(affine, channel, exists, STAT)
    return line(rest, rstd, r, d, gamma, beta)


@triton.jit
def count_batch(running, word, groups):
    """Count the batch, once every one of the ``groups`` has read the counter for its ramps."""
    counter = running[2]
    if counter is not None:  # noqa: SIM102 (a constexpr and a run-time condition)
        if arrive(word) == groups - 1:
            tl.atomic_add(counter, 1, sem="relaxed")  # of a cluster, one program does it
            tl.store(word, 0)


@triton.jit
def store_saved(saved, mean, rest, rstd, r, d, channel, exists, channels):
    """Save what the apply phase and the backward need: saved (5, C)."""
    tl.store(saved + channel, mean, mask=exists)
    tl.store(saved + channels + channel, rest, mask=exists)
    tl.store(saved + 2 * channels + channel, rstd, mask=exists)
    tl.store(saved + 3 * channels + channel, r, mask=exists)
    tl.store(saved + 4 * channels + channel, d, mask=exists)


@triton.jit
def load_saved(saved, channel, exists, channels):
    """What ``store_saved`` stored of these channels."""
    mean = tl.load(saved + channel, mask=exists, other=0.0)
    rest = tl.load(saved + channels + channel, mask=exists, other=0.0)
    rstd = tl.load(saved + 2 * channels + channel, mask=exists, other=0.0)
    r = tl.load(saved + 3 * channels + channel, mask=exists, other=0.0)
    d = tl.load(saved + 4 * channels + channel, mask=exists, other=0.0)
    return mean, rest, rstd, r, d


@triton.jit
def load_affine(affine, channel, exists, STAT: tl.constexpr):
    """gamma and beta of these channels; (1, 0) where the layer has none."""
    weight, bias = affine
    gamma = tl.full([1], 1.0, STAT)
    beta = tl.zeros([1], STAT)
    if weight is not None:
        gamma = tl.load(weight + channel, mask=exists, other=0.0).to(STAT)
    if bias is not None:
        beta = tl.load(bias + channel, mask=exists, other=0.0).to(STAT)
    return gamma, beta


@triton.jit
def line(rest, rstd, r, d, gamma, beta):
    """a and b of y = (x - mean) * a + b, which is gamma * ((x - mean - rest) / sigma_B * r + d) + beta.

    Not x * a + c: at mean 1e4 and standard deviation 1e-2 that cancels six digits.
    """
    a = gamma * r * rstd
    return a, gamma * d + beta - rest * a
