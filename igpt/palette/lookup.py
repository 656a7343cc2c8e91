"""Exact nearest-colour look-up for uint8 pixels on a CPU: a table of all 2^24 colours, filled block by block on sight.

A pixel has one of 256 values a channel, so ((r-r')^2 + (g-g')^2) + (b-b')^2 is a sum of three table entries, rounded
as the reference rounds it. Rounded addition is monotonic, so the sum of a block's three smallest (largest) entries
bounds from below (above) what the reference computes anywhere in the block, without slack: a centre whose lower bound
exceeds some centre's upper bound is never the answer there. About 4 of 512 centres survive in a block of 8x8x8
colours; these are compared in index order with a strict <, so that ties go to the lowest index.
"""

import numpy as np
import torch

from igpt.kernels import reference

BLOCKS, SIDE = 32, 8  # a channel, and a block's side: 32 * 8 = 256
FILL = 256  # blocks handled at once: 512 KB of bounds or distances, which stay in the cache
CHUNK = 1 << 16  # pixels looked up at once


def colour_codes(pixels: np.ndarray) -> np.ndarray:
    """uint8 (n, 3) -> r * 65536 + g * 256 + b, (n,)."""
    code = pixels[:, 0].astype(np.intp)
    for channel in (1, 2):
        code <<= 8
        code |= pixels[:, channel]
    return code


class Candidates:
    """The centres fp32 (k, 3) that can be nearest in each block of colours.

    squares[channel, centre, value] are the squared differences that the reference sums."""

    def __init__(self, centres: np.ndarray):
        values = reference.palette_pixels(torch.arange(256, dtype=torch.uint8, device="cpu")).numpy()
        self.squares = np.square(values - centres.astype(np.float32).T[:, :, None])  # [3, k, 256]
        blocks = self.squares.reshape(3, len(centres), BLOCKS, SIDE)
        # [3, BLOCKS, k]: a block's bounds are then sums of whole rows.
        self.lowest = np.ascontiguousarray(blocks.min(-1).swapaxes(1, 2))
        self.highest = np.ascontiguousarray(blocks.max(-1).swapaxes(1, 2))

    def of(self, r: np.ndarray, g: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For blocks at (r, g, b): how many candidates each has, where its first one stands, and all of them, block
        after block in ascending order."""
        counts, centres = [], []
        for start in range(0, len(r), FILL):
            i, j, l = (axis[start : start + FILL] for axis in (r, g, b))
            lower, upper = ((bound[0][i] + bound[1][j]) + bound[2][l] for bound in (self.lowest, self.highest))
            possible = lower <= upper.min(1, keepdims=True)  # [FILL, k]
            counts.append(possible.sum(1))
            centres.append(np.nonzero(possible)[1])
        count = np.concatenate(counts)
        return count, np.cumsum(count) - count, np.concatenate(centres)


class ColourTable:
    """`table(pixels)`: uint8 (..., 3) -> uint16 index of the nearest centre, the lowest on ties, bit-equal to
    reference.palette_encode. Safe to share between threads: two that fill a block write the same values."""

    def __init__(self, centres: np.ndarray):
        self.candidates = Candidates(centres)
        # Index + 1; 0 is a colour not seen yet. Memory that is never touched is never allocated by the system.
        self.table = np.zeros((BLOCKS, SIDE, BLOCKS, SIDE, BLOCKS, SIDE), np.uint16)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        flat, table = pixels.reshape(-1, 3), self.table.reshape(-1)
        out = np.empty(len(flat), np.uint16)
        for start in range(0, len(flat), CHUNK):
            code = colour_codes(flat[start : start + CHUNK])
            found = table[code]
            if not found.all():
                self._fill(code[found == 0])
                found = table[code]
            np.subtract(found, 1, out=out[start : start + CHUNK])
        return out.reshape(pixels.shape[:-1])

    def _fill(self, codes: np.ndarray) -> None:
        """Fills the blocks that hold these colours."""
        wanted = np.zeros((BLOCKS, BLOCKS, BLOCKS), bool)
        wanted[codes >> 19, codes >> 11 & 31, codes >> 3 & 31] = True
        r, g, b = np.nonzero(wanted)
        for start in range(0, len(r), FILL):
            stop = start + FILL
            self._fill_blocks(r[start:stop], g[start:stop], b[start:stop])

    def _fill_blocks(self, r: np.ndarray, g: np.ndarray, b: np.ndarray) -> None:
        count, first, centres = self.candidates.of(r, g, b)
        # Blocks with the most candidates first: those that still have a j-th one are a prefix.
        order = np.argsort(-count, kind="stable")
        r, g, b, count, first = r[order], g[order], b[order], count[order], first[order]
        red, green, blue = self.candidates.squares.reshape(3, -1, BLOCKS, SIDE)
        best = np.full((len(r), SIDE, SIDE, SIDE), np.inf, np.float32)
        index = np.zeros(best.shape, np.uint16)
        for j in range(count[0]):
            n = np.count_nonzero(count > j)
            c = centres[first[:n] + j]
            plane = red[c, r[:n]][:, :, None] + green[c, g[:n]][:, None, :]
            distance = plane[..., None] + blue[c, b[:n]][:, None, None, :]
            entry = (c + 1).astype(np.uint16)[:, None, None, None]
            np.copyto(index[:n], entry, where=distance < best[:n])
            np.minimum(best[:n], distance, out=best[:n])
        self.table[r, :, g, :, b, :] = index
