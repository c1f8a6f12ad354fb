"""Label Studio's run-length code of brush strokes, packed by numpy; byte for byte as its own encoder."""

import numpy as np
import numpy.typing as npt

from multisa.runtime.sinks.runs import FlatRuns

Int64 = npt.NDArray[np.int64]

_CHANNELS = 4  # a brush mask is RGBA with four equal channels
_ON = 255
_VALUE_BITS = 8
_LENGTH_BITS = np.array([3, 4, 8, 16])  # the four widths a run's length may have
_FLAG_BITS = 3  # "a run follows", and which of the widths
_MAX_PIECE = 2**16
_WORD = 32  # no code is longer
_MAX_PIXELS = (2**32 - 1) // _CHANNELS  # the header counts values in 32 bits


def encode_brush(runs: FlatRuns, pixels: int) -> bytes:
    """Encode the mask of one class of an image of `pixels` pixels: 255 where the class is, 0 elsewhere.

    Raises ValueError for more pixels than the header of the format can count.
    """
    if pixels > _MAX_PIXELS:
        raise ValueError(f"got {pixels} pixels, the format takes at most {_MAX_PIXELS}")
    lengths, values = _pieces(runs, pixels)
    # 1..8, ..16, ..256, longer: the index of the width.
    width = np.searchsorted(2 ** _LENGTH_BITS[:3], lengths)
    width[lengths < 0], lengths = 3, np.abs(lengths)
    bits = _LENGTH_BITS[width]
    codes = (4 + width) << (bits + _VALUE_BITS) | (lengths - 1) << _VALUE_BITS | values
    return _pack(np.concatenate((_header(pixels), codes)), np.concatenate(([32, 21], _FLAG_BITS + bits + 8)))


def _pieces(runs: FlatRuns, pixels: int) -> tuple[Int64, Int64]:
    """Lengths and values of runs cut to what a length can hold; what is left of a cut run is negative.

    Such a remainder is written in the widest form, however short, as by Label Studio's encoder.
    """
    bounds = np.empty(2 * len(runs.starts) + 2, np.int64)
    bounds[0], bounds[1:-1:2], bounds[2:-1:2], bounds[-1] = 0, runs.starts, runs.ends, pixels
    lengths = np.diff(bounds) * _CHANNELS
    values = np.zeros_like(lengths)
    values[1::2] = _ON
    lengths, values = lengths[lengths > 0], values[lengths > 0]
    full = (lengths - 1) // _MAX_PIECE
    last = np.cumsum(full + 1) - 1
    pieces = np.full(int(last[-1]) + 1, _MAX_PIECE)
    rest = lengths - full * _MAX_PIECE
    pieces[last] = np.where(full > 0, -rest, rest)
    return pieces, np.repeat(values, full + 1)


def _header(pixels: int) -> Int64:
    widths = 0
    for bits in _LENGTH_BITS.tolist():
        widths = widths << 4 | (bits - 1)
    return np.array([pixels * _CHANNELS, (_VALUE_BITS - 1) << 16 | widths])


def _pack(codes: Int64, bits: Int64) -> bytes:
    """Write each of `codes` (at most 32 bits) with its number of `bits`, highest first, without gaps.

    Padded as Label Studio does: a whole byte more where none would be needed.
    """
    high_first = (codes << (_WORD - bits)).astype(">u4").view(np.uint8)
    there = np.arange(_WORD) < bits[:, None]
    stream = np.unpackbits(high_first)[there.ravel()]
    return np.packbits(np.append(stream, np.zeros(8 - len(stream) % 8, np.uint8))).tobytes()
