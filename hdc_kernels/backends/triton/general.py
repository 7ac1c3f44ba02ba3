"""The launches for problems of any size, pair after pair of the same shape.

    forward:   pack → logsumexp (→ logsumexp of the columns) → terms
    backward:  pack → weights → gradient of x → gradient of y → unpack
    step:      pack → logsumexp (→ …) → terms with weights → gradient of x → gradient of y → unpack

and a sum of what the programs of terms and of unpack leave.

Memory besides the results: unit vectors in the inputs' dtype, their gradients in float32, and a few
numbers a row; never a matrix of logits.
"""

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from hdc_kernels.backends import Problems
from hdc_kernels.backends.outputs import Rows
from hdc_kernels.backends.triton import tiles
from hdc_kernels.backends.triton.arithmetic import LOG2_E
from hdc_kernels.backends.triton.gradient import gradient_kernel
from hdc_kernels.backends.triton.logsumexp import (
    ONE_PASS,
    fixed_shift,
    logsumexp_kernel,
)
from hdc_kernels.backends.triton.memory import precision, strides
from hdc_kernels.backends.triton.pack import pack_kernel
from hdc_kernels.backends.triton.terms import terms_kernel, weights_kernel
from hdc_kernels.backends.triton.unpack import unpack_kernel

ROWS = 128  # of one program that does nothing but arithmetic on rows
ELEMENTS = 2048  # of one program that reads embeddings


class Side(NamedTuple):
    """The rows, or the columns, of G problems of one shape."""

    units: Tensor  # [G, padded, D padded], packed
    length: int  # of a problem, without padding
    ids: Tensor | None  # [G, length]


class Units(NamedTuple):
    """Both sides, and the positives' logits if there are any."""

    x: Side
    y: Side
    positive: Tensor | None  # [G, M] float32


class Weights(NamedTuple):
    """What `gradient_kernel` multiplies exponentials with; see `terms.py`."""

    pull: Tensor | None  # [1 or 2, G, padded], if there are positives
    share: Tensor  # [1 or 2, G, padded]
    shift: Tensor
    largest: Tensor  # [G, blocks]


def same_shapes(problems: Problems) -> list[Problems]:
    """Runs of pairs that differ in their number of problems alone; each run is launched at once."""
    runs: list[list[int]] = []
    shape = None
    for pair, (x, y) in enumerate(zip(problems.x, problems.y, strict=True)):
        if (x.shape[1:], y.shape[1:]) != shape:
            shape = (x.shape[1:], y.shape[1:])
            runs.append([])
        runs[-1].append(pair)
    return [
        problems._replace(
            x=problems.x[run[0] : run[-1] + 1],
            y=problems.y[run[0] : run[-1] + 1],
            weights=problems.weights[run[0] : run[-1] + 1],
        )
        for run in runs
    ]


def pack(problems: Problems) -> Units:
    """Normalise the embeddings of pairs of one shape."""
    G = sum(x.shape[0] for x in problems.x)
    x, y = problems.x[0], problems.y[0]
    M, N, D = x.shape[1], y.shape[1], x.shape[2]
    depth = tiles.padded_dimensions(D)
    x_units = x.new_empty(G, _padded(M), depth)
    y_units = x.new_empty(G, _padded(N), depth)
    positive = _float32(x, G, M) if problems.function == "info_nce" else None
    x_ids, y_ids = problems.mask.ids or (None, None)
    block_d = triton.next_power_of_2(depth)
    rows = max(1, ELEMENTS // block_d)
    longer = max(x_units.shape[1], y_units.shape[1])
    pack_kernel[(G * triton.cdiv(longer, rows),)](
        problems.x,
        problems.y,
        strides(problems.x),
        strides(problems.y),
        _firsts(problems),
        x_units,
        y_units,
        positive,
        problems.temperature,
        M,
        N,
        D,
        x_units.shape[1],
        y_units.shape[1],
        depth,
        LEARNED=isinstance(problems.temperature, Tensor),
        NORMALIZE=problems.normalize,
        ROWS=rows,
        BLOCK_D=block_d,
    )
    return Units(Side(x_units, M, x_ids), Side(y_units, N, y_ids), positive)


def _float32(like: Tensor, *shape: int) -> Tensor:
    """Room beside `like`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _firsts(problems: Problems) -> tuple[int, ...]:
    """Each pair's first problem."""
    firsts = [0]
    for x in problems.x[:-1]:
        firsts.append(firsts[-1] + x.shape[0])
    return tuple(firsts)


def _padded(rows: int) -> int:
    """A multiple of every tile that `rows` rows are given."""
    block = min(128, tiles.block_size(rows))
    return triton.cdiv(rows, block) * block


def _sums_diagonal(problems: Problems) -> bool:
    """Whether j = i is among the columns that row i sums over."""
    return problems.mask.diagonal and problems.function != "info_nce"


def _sums(
    problems: Problems, own: Side, other: Side, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `logsumexp_kernel`: highest, total [splits, G, padded], diagonal, and column totals."""
    units = own.units
    G, own_padded, depth = units.shape
    other_padded = other.units.shape[1]
    shift = fixed_shift(problems, other.length)
    tile = tiles.fitted(
        tiles.forward_tiles(depth, units.dtype, own.ids is not None), own.length, other.length
    )
    blocks = triton.cdiv(own.length, tile.own)
    splits = tiles.splits(blocks * G, triton.cdiv(other.length, tile.other), units.device)
    highest, total = _float32(units, 2, splits, G, own_padded)
    diagonal = _float32(units, G, own_padded)
    column_total = _float32(units, blocks, G, other_padded) if columns else total
    logsumexp_kernel[(blocks * splits * G,)](
        units,
        other.units,
        own.ids,
        other.ids,
        problems.bias,
        highest,
        total,
        diagonal,
        column_total,
        problems.temperature,
        0.0 if shift is None else shift * LOG2_E.value,
        own.length,
        other.length,
        blocks,
        splits,
        G,
        own_padded,
        other_padded,
        FUNCTION=problems.function,
        DIAGONAL=_sums_diagonal(problems),
        SAME=problems.mask.same,
        LEARNED=isinstance(problems.temperature, Tensor),
        RUNNING=shift is None,
        COLUMNS=columns,
        PRECISION=precision(),
        DEPTH=tile.depth,
        CHUNKS=depth // tile.depth,
        OWN=tile.own,
        OTHER=tile.other,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return highest, total, diagonal, column_total


def _empty_weights(problems: Problems, units: Units) -> Weights:
    """Room for the weights of pairs of one shape."""
    G, padded, _ = units.x.units.shape
    per_row = (1 + problems.symmetric, G, padded)
    share, shift = _float32(units.x.units, 2, *per_row)
    pull = None if units.positive is None else _float32(units.x.units, *per_row)
    return Weights(pull, share, shift, _float32(units.x.units, G, triton.cdiv(padded, ROWS)))


def _weights(
    problems: Problems, units: Units, lse: Tensor, upstream: Tensor | None, weights: Weights
) -> None:
    """Fill in the weights of pairs of one shape."""
    G, padded, _ = units.x.units.shape
    weights_kernel[(weights.largest.numel(),)](
        units.positive,
        lse[0],
        lse[-1],
        upstream,
        problems.bias,
        *weights,
        units.x.length,
        G,
        padded,
        FUNCTION=problems.function,
        SYMMETRIC=problems.symmetric,
        ROWS=ROWS,
    )


def _terms(problems: Problems, units: Units, terms: Rows, weights: Weights | None) -> Tensor:
    """Fill in the terms, and weights, of pairs of one shape; parts of their weighted sum."""
    x, y, positive = units
    shift = fixed_shift(problems, y.length)
    running = shift is None
    few = triton.cdiv(x.length, ROWS) <= ONE_PASS
    one_pass = problems.symmetric and not running and few
    highest, total, diagonal, column_total = _sums(problems, x, y, one_pass)
    column_highest = highest
    if problems.symmetric and not one_pass:
        column_highest, column_total, _, _ = _sums(problems, y, x, False)
    G = x.units.shape[0]
    programs = G * triton.cdiv(x.length, ROWS)
    weighted = _float32(x.units, programs)
    terms_kernel[(programs,)](
        highest,
        total,
        diagonal,
        column_highest,
        column_total,
        positive,
        problems.weights,
        _firsts(problems),
        problems.temperature,
        0.0 if shift is None else shift * LOG2_E.value,
        terms.loss,
        terms.hits,
        terms.lse[0],
        terms.lse[-1],
        weighted,
        problems.bias,
        *(weights or (None, None, None, None)),
        x.length,
        total.shape[0],
        column_total.shape[0],
        G,
        x.units.shape[1],
        y.units.shape[1],
        FUNCTION=problems.function,
        LEARNED=isinstance(problems.temperature, Tensor),
        RUNNING=running,
        SYMMETRIC=problems.symmetric,
        ROWS=ROWS,
    )
    return weighted


def _sums_gradient(
    problems: Problems,
    own: Side,
    other: Side,
    own_term: tuple[Tensor, Tensor] | None,
    other_term: tuple[Tensor, Tensor] | None,
    largest: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Launch `gradient_kernel`: the sums' gradient by `own` [splits, G, padded, D padded], and by a row's bias.

    A term is the share and the shift of its vectors, [G, padded] each.
    """
    units = own.units
    G, own_padded, depth = units.shape
    tile = tiles.fitted(
        tiles.gradient_tiles(depth, units.dtype, own.ids is not None), own.length, other.length
    )
    blocks = triton.cdiv(own.length, tile.own)
    parts = depth // tile.width
    splits = tiles.splits(blocks * parts * G, triton.cdiv(other.length, tile.other), units.device)
    gradient = _float32(units, splits, G, own_padded, depth)
    of_rows = problems.bias is not None and own_term is not None
    bias_gradient = _float32(units, splits, G, own_padded) if of_rows else None
    unused = (largest, largest)
    gradient_kernel[(blocks * parts * splits * G,)](
        units,
        other.units,
        *(own_term or unused),
        *(other_term or unused),
        largest,
        own.ids,
        other.ids,
        gradient,
        bias_gradient,
        problems.temperature,
        own.length,
        other.length,
        blocks,
        splits,
        largest.shape[1],
        G,
        own_padded,
        other.units.shape[1],
        FUNCTION=problems.function,
        DIAGONAL=_sums_diagonal(problems),
        SAME=problems.mask.same,
        OWN_TERM=own_term is not None,
        OTHER_TERM=other_term is not None,
        LEARNED=isinstance(problems.temperature, Tensor),
        PRECISION=precision(),
        DEPTH=tile.depth,
        CHUNKS=depth // tile.depth,
        WIDTH=tile.width,
        OWN=tile.own,
        OTHER=tile.other,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return gradient, bias_gradient


def _gradients(
    problems: Problems,
    units: Units,
    weights: Weights,
    dx: tuple[Tensor, ...],
    dy: tuple[Tensor, ...],
    d_bias: Tensor | None,
) -> Tensor:
    """Fill in the gradients of pairs of one shape; parts of the temperature's."""
    x, y, _ = units
    G, padded, depth = x.units.shape
    pull, share, shift, largest = weights
    of_rows = share[0], shift[0]
    of_columns = (share[1], shift[1]) if problems.symmetric else None
    dx_units, bias_gradient = _sums_gradient(problems, x, y, of_rows, of_columns, largest)
    dy_units, _ = _sums_gradient(problems, y, x, of_columns, of_rows, largest)

    block_d = triton.next_power_of_2(depth)
    rows = max(1, ELEMENTS // block_d)
    programs = G * triton.cdiv(max(x.length, y.length), rows)
    d_temperature = _float32(x.units, programs)
    unpack_kernel[(programs,)](
        problems.x,
        problems.y,
        dx,
        dy,
        strides(problems.x),
        strides(problems.y),
        strides(dx),
        strides(dy),
        _firsts(problems),
        dx_units,
        dy_units,
        bias_gradient,
        pull,
        d_temperature,
        d_bias,
        problems.temperature,
        x.length,
        y.length,
        problems.x[0].shape[2],
        padded,
        y.units.shape[1],
        depth,
        G,
        dx_units.shape[0],
        dy_units.shape[0],
        LEARNED=isinstance(problems.temperature, Tensor),
        SYMMETRIC=problems.symmetric,
        NORMALIZE=problems.normalize,
        ROWS=rows,
        BLOCK_D=block_d,
    )
    return d_temperature


def contrast(
    problems: Problems,
    terms: Rows,
    upstream: Tensor | None,
    dx: tuple[Tensor, ...] | None,
    dy: tuple[Tensor, ...] | None,
    d_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Fill in the terms; with dx and dy, and d_bias if there is a bias, the gradients of their total.

    With `upstream`, the gradients of Σ upstream · terms, whose lse is given. Returns the total and the
    temperature's gradient; what was not asked for is not filled in.
    """
    totals, d_temperatures = [], []
    pair, start = 0, 0
    for run in same_shapes(problems):
        pairs = slice(pair, pair + len(run.x))
        rows = slice(start, start + sum(x.shape[0] * x.shape[1] for x in run.x))
        bias_here, upstream_here, d_bias_here = (
            None if t is None else t[rows] for t in (problems.bias, upstream, d_bias)
        )
        run = run._replace(bias=bias_here)
        units = pack(run)
        here = Rows(terms.loss[rows], terms.hits[rows], terms.lse[:, rows])
        weights = None if dx is None else _empty_weights(run, units)
        if upstream is None:
            totals.append(_terms(run, units, here, weights))
        elif weights is not None:
            _weights(run, units, here.lse, upstream_here, weights)
        if weights is not None and dx is not None and dy is not None:
            d_temperatures.append(
                _gradients(run, units, weights, dx[pairs], dy[pairs], d_bias_here)
            )
        pair, start = pairs.stop, rows.stop
    return _sum(totals, terms.loss), _sum(d_temperatures, terms.loss)


def _sum(parts: list[Tensor], like: Tensor) -> Tensor:
    """Of all the parts, in one launch where there is one run of shapes; not filled in without parts."""
    if not parts:
        return like.new_empty(())
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).sum()
