"""The passes of plain PyTorch over x and dy: moments, two sums, and what is then made of them.

torch's kernels for channels side by side, (N, C) and channels_last, keep running float32 sums over all
rows: at 20 million rows of ones they stop at 16,777,216. Their kernels for maps do so inside a map. Here
each kernel is given views with more channels, shorter ones, whose results are then merged.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

aten = torch.ops.aten

# "Loses": the error of a channel's float32 sum, over the sum of its terms' magnitudes (measured, 2026-11).

#: Maximum rows that one call of torch's kernels sums as they are. Random numbers lose 1.5e-6.
AT_ONCE = 512
#: Rows of a part where there are more. Random numbers lose 7e-7, equal ones at most 2e-6.
RUN = 128
#: Minimum elements of x for longer parts: memory is what takes time there, and fewer parts are quicker. They
#: have LONG[0] elements, up to LONG[1] where x is eight such parts. Random numbers lose 1e-6, equal ones
#: 3e-5: where neighbours are equal, parts stay short.
LARGE, LONG = 2**19, (2**19, 2**21)
#: Minimum and maximum rows for which torch's own backward serves large inputs without parts, if a sample of
#: dy has both signs and no equal neighbours, see ``sums_stay_small``.
FEW_ROWS, MOST_ROWS = 2**11, 2**17
#: Elements of a part's row: C, or as many channels' copies side by side. WIDTH: four vectors of them fit in
#: the first cache (short parts). NARROW: what long parts, which the second cache holds, are quickest with.
WIDTH, NARROW = 1024, 128
#: Maximum elements of a map that torch's backward sums at once, in 8 or 16 lanes; eight times as many where
#: no neighbours are equal.
LONGEST = 4096
#: Minimum channels for addcmul to take rows as they are: its inner loop runs over channels.
CHANNELS = 32


def moments(dense: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The mean and the biased variance of each channel.

    Third, scratch memory of the size of ``dense`` that they leave, or None.
    """
    if has_planes(dense):
        return moments_of_planes(dense)
    rows = rows_of(dense) if dense.is_cpu else None
    if rows is None or len(rows) <= AT_ONCE:
        mean, var = torch.batch_norm_update_stats(dense, None, None, 1.0)  # type: ignore[call-arg]
        return mean, var, None
    return (*moments_of_rows(rows), None)


def has_planes(dense: Tensor) -> bool:
    """Whether group norm is the quicker way to the moments: of contiguous maps, not too small."""
    if dense.ndim == 2 or not dense.is_cpu or not dense.is_contiguous():
        return False
    elements = dense.numel()
    return elements >= 2**16 and elements >= 32 * dense.shape[0] * dense.shape[1]


def moments_of_planes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By torch's group norm, whose sums are vectorised: those of batch norm take four times as long.

    Its groups are single planes; their moments are merged by Chan, Golub and LeVeque's formula (1979).
    """
    n, c = x.shape[:2]
    planes = x.view(n, c, -1)  # of three axes: else torch takes one channel for channels_last, less exactly
    scratch, means, rstds = torch.native_group_norm(planes, None, None, n, c, planes.shape[2], c, 0.0)
    mean = means.mean(0)
    deviations = means.sub_(mean)
    var = rstds.pow_(-2).addcmul_(deviations, deviations).mean(0)
    return mean, var, scratch.as_strided_(x.shape, x.stride())  # in place: y must be nobody's view


def moments_of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of (M, C), by the same formula."""
    count, c = rows.shape
    run, width = (RUN, WIDTH) if has_short_runs(rows, zeros=True) else long_run(rows, 2 * NARROW)
    means, variances, shares = [], [], []
    for (part,) in backwards(parts((rows,), run, width)):
        mean, var = torch.batch_norm_update_stats(part, None, None, 1.0)  # type: ignore[call-arg]
        means.append(mean)
        variances.append(var)
        shares += [len(part) / count] * (part.shape[1] // c)
    groups = torch.cat(means).view(-1, c)
    if len(groups) > 64:
        groups = groups.double()
    share = torch.tensor(shares, dtype=groups.dtype).unsqueeze_(0)
    exact = share @ groups
    var = share @ groups.sub_(exact).square_().add_(torch.cat(variances).view(-1, c))
    return exact[0].to(rows.dtype), var[0].to(rows.dtype)


def sums(dy: Tensor, dense: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """sum(dy (x - mean)) rstd and sum(dy)."""
    rows = rows_of(dense)
    if rows is None:
        planes = (dy.view(*dy.shape[:2], -1), dense.view(*dense.shape[:2], -1))
        return sums_of_planes(*planes, mean, rstd)
    dy = side_by_side(dy)
    if len(rows) <= AT_ONCE:
        return _sums(dy, rows, mean, rstd)
    c, repeated, groups = rows.shape[1], Repeated(mean, rstd), []
    run, width = (RUN, WIDTH) if has_short_runs(dy, zeros=False) else long_run(rows, NARROW)
    for dy_part, part in backwards(parts((dy, rows), run, width)):
        groups.append(_sums(dy_part, part, *repeated(part.shape[1] // c)))
    products, totals = (torch.cat(g).view(-1, c).sum(0) for g in zip(*groups, strict=True))
    return products, totals


def has_short_runs(rows: Tensor, zeros: bool) -> bool:
    """Whether running sums of (M, C) are to be short: there are few, or many of the numbers are equal."""
    return rows.numel() < LARGE or has_equals(sample(rows, 17), zeros)


def long_run(rows: Tensor, width: int) -> tuple[int, int]:
    """Rows and elements of a row of long parts of (M, C)."""
    elements = min(max(LONG[0], rows.numel() // 8), LONG[1])
    return elements // max(rows.shape[1], width), width


def has_equals(some: Tensor, zeros: bool) -> bool:
    """Whether one in twenty neighbours in a channel of (B, M, C) is equal: all are rounded the same way.
    ``zeros``: also those that are 0, which a plain sum does not feel."""
    equal = some[:, 1:] == some[:, :-1]
    if not zeros:
        equal.logical_and_(some[:, 1:])
    return int(equal.sum((0, 1)).max()) > 0.05 * equal.shape[0] * equal.shape[1]


def sample(rows: Tensor, length: int) -> Tensor:
    """Eight times ``length`` rows of (M, C), or what there is, of at most 127 channels."""
    some = rows[: len(rows) // 8 * 8].view(8, -1, rows.shape[1])
    return some[:, :length, :: max(rows.shape[1] // 64, 1)]


def sums_of_planes(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Of (N, C, L): channels are cut into several shorter ones."""
    n, c, length = x.shape
    cuts = cuts_of(length)
    whole = length - length % cuts
    shape = (n, c * cuts, whole // cuts)
    dy_part, part = (t[:, :, :whole].reshape(shape) for t in (dy, x))  # views, where the cuts leave nothing
    vectors = mean.repeat_interleave(cuts), rstd.repeat_interleave(cuts)
    product, total = (v.view(c, cuts).sum(1) for v in _sums(dy_part, part, *vectors))
    if whole < length:
        rest = _sums(dy[:, :, whole:].contiguous(), x[:, :, whole:].contiguous(), mean, rstd)
        return product.add_(rest[0]), total.add_(rest[1])
    return product, total


def needs_parts(dy: Tensor, dense: Tensor, mean: Tensor) -> bool:
    """Whether torch's kernel for the backward would keep sums too long, of dy as it is."""
    if not dense.is_cpu:
        return False
    rows = rows_of(dense)
    if rows is None:
        planes = dy.view(dense.shape[0] * dense.shape[1], -1).t()
        if not LONGEST < len(planes) <= 8 * LONGEST:
            return len(planes) > LONGEST
        return has_equals(planes[None, :64], zeros=False)
    if not AT_ONCE < len(rows) <= MOST_ROWS:
        return len(rows) > MOST_ROWS
    if len(rows) <= FEW_ROWS:
        return has_equals(sample(side_by_side(dy), 17), zeros=False)
    return rows.numel() < LARGE or not sums_stay_small(side_by_side(dy), rows, mean)


def sums_stay_small(dy: Tensor, rows: Tensor, mean: Tensor) -> bool:
    """Whether a sample shows terms of both signs, none often repeated: torch's running sums then lose 4e-6
    at most, in a fifth less time."""
    some = sample(dy, 64)
    mean = mean[:: max(len(mean) // 64, 1)]
    terms = torch.cat((some, (sample(rows, 64) - mean).mul_(some)), 2).flatten(0, 1)
    small = terms.sum(0).abs_() < terms.abs_().sum(0).mul_(0.3)
    return bool(small.all()) and not has_equals(some[:, :17], zeros=False)


def affine(rows: Tensor, base: Tensor, slope: Tensor) -> Tensor:
    """base + x slope of (M, C)."""
    if len(base) >= CHANNELS or rows.numel() < LARGE:
        return torch.addcmul(base, rows, slope)
    out, repeated = torch.empty_like(rows), Repeated(base, slope)
    for part, result in parts((rows, out), len(rows), WIDTH):
        bases, slopes = repeated(part.shape[1] // len(base))
        torch.addcmul(bases, part, slopes, out=result)
    return out


def combined(dy: Tensor, dense: Tensor, a: Tensor, k: Tensor, c: Tensor) -> Tensor:
    """a dy + k x + c."""
    if dense.ndim == 2 and len(a) >= CHANNELS:
        return torch.addcmul(c, dense, k).addcmul_(dy, a)
    out = torch.empty_like(dense)
    rows = rows_of(dense)
    if rows is None:
        n, channels = dense.shape[:2]
        planes = (t.view(n * channels, -1) for t in (dy, dense, out))
        _combine(*planes, *(v.repeat(n).unsqueeze_(1) for v in (a, k, c)))
        return out
    views, repeated = (side_by_side(dy), rows, side_by_side(out)), Repeated(a, k, c)
    for part in [views] if len(a) >= CHANNELS else parts(views, len(rows), WIDTH):
        _combine(*part, *repeated(part[0].shape[1] // len(a)))
    return out


def parts(tensors: tuple[Tensor, ...], run: int, width: int) -> Iterator[tuple[Tensor, ...]]:
    """Views of rows (M, C), the same of each: at most ``run`` long, with several rows side by side, as many
    as ``width`` holds if they are many enough.

    The last is one row of all that is left.
    """
    count, c = tensors[0].shape
    side = max(min(width // c, -(-count // run)), 1) if run < count else max(width // c, 1)
    whole = count - count % side
    yield from zip(*(t[:whole].view(-1, side * c).split(run) for t in tensors), strict=True)
    if whole < count:
        yield tuple(t[whole:].view(1, -1) for t in tensors)


def backwards(views: Iterator[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """The last part first: the pass that comes after finds the first in the caches."""
    return reversed(list(views))


class Repeated:
    """Vectors (C,) for views that have several rows side by side."""

    def __init__(self, *vectors: Tensor) -> None:
        self.of = {1: vectors}

    def __call__(self, side: int) -> tuple[Tensor, ...]:
        if side not in self.of:
            self.of[side] = tuple(v.repeat(side) for v in self.of[1])
        return self.of[side]


def rows_of(dense: Tensor) -> Tensor | None:
    """The view (M, C) of a tensor whose channels lie side by side; None of any other."""
    if dense.ndim > 2 and dense.is_contiguous() and dense.numel() > dense.shape[0] * dense.shape[1]:
        return None
    return side_by_side(dense)


def side_by_side(dense: Tensor) -> Tensor:
    return dense if dense.ndim == 2 else dense.movedim(1, -1).view(-1, dense.shape[1])


@functools.lru_cache(maxsize=256)
def cuts_of(length: int) -> int:
    """Into how many parts a map is cut: a divisor, if there is one that leaves parts of 32 at least."""
    least = -(-length // (LONGEST // 2))
    return next((n for n in range(least, length // 32 + 1) if length % n == 0), least)


def expanded_sum(dy: Tensor) -> Tensor | None:
    """sum(dy) of a gradient that is expanded, as from ``.sum()``: exact; None of any other."""
    if 0 not in dy.stride():
        return None
    count = 1
    for axis, (size, stride) in enumerate(zip(dy.shape, dy.stride(), strict=True)):
        if stride == 0 and axis != 1:
            dy, count = dy.narrow(axis, 0, 1), count * size
    return dy.sum([0, *range(2, dy.ndim)], dtype=torch.float64).mul_(count)


def _sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    mask = [False, True, True]
    return aten.native_batch_norm_backward(dy, x, None, None, None, mean, rstd, True, 0.0, mask)[1:]


def _combine(dy: Tensor, x: Tensor, out: Tensor, a: Tensor, k: Tensor, c: Tensor) -> None:
    torch.addcmul(c, x, k, out=out).addcmul_(dy, a)
