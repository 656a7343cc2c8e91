"""Weighted k-means on the distinct colours of a sample: how a palette is fitted.

Which pixels OpenAI's k-means saw and how it started is [open]; here: all pixels given, each distinct colour once with
its count as weight, greedy k-means++ start. Deterministic: a frozen generator, and sums of bytes and counts, which are
integers below 2^53: exact in any order. So a GPU, which counts the colours and takes the steps, gives the same bits.
"""

import numpy as np
import torch

from igpt import ops
from igpt.palette.lookup import BLOCKS, SIDE, Candidates, colour_codes

MAX_STEPS = 100
MANY = 1 << 22  # pixels: fewer are counted by sorting, more by a histogram of 2^24 colours
TOLERANCE = 1e-4  # stop when a step lowers the inertia by less than this part of it


def distinct_colours(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (..., 3) -> distinct colours uint8 (n, 3), and how often each occurs, fp64 (n,)."""
    flat = pixels.reshape(-1, 3)
    if torch.is_tensor(flat):
        histogram = sum(map(tensor_histogram, flat.split(MANY)))
        codes = histogram.nonzero().flatten()
        codes, counts = codes.cpu().numpy(), histogram[codes].cpu().numpy()
    elif len(flat) <= MANY:
        codes, counts = np.unique(colour_codes(flat), return_counts=True)
    else:
        chunks = np.array_split(flat, -(-len(flat) // MANY))
        histogram = sum(np.bincount(colour_codes(chunk), minlength=1 << 24) for chunk in chunks)
        codes = np.flatnonzero(histogram)
        counts = histogram[codes]
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1).astype(np.uint8), counts.astype(np.float64)


def tensor_histogram(pixels: torch.Tensor) -> torch.Tensor:
    r, g, b = pixels.long().unbind(1)
    return torch.bincount((r << 16) + (g << 8) + b, minlength=1 << 24)


def cluster_sums(colours: np.ndarray, weight: np.ndarray, index: np.ndarray, k: int) -> np.ndarray:
    """Each of k clusters' sums of weight * (1, r, g, b): whole numbers in fp64, (4, k)."""
    return np.stack([np.bincount(index, w, k) for w in (weight, *(weight * colours.T))])


def means(sums: np.ndarray) -> np.ndarray:
    """Each cluster's mean colour in [-1, 1], fp64 (k, 3); of no meaning where a cluster is empty."""
    return (sums[1:] / np.maximum(sums[0], 1)).T / 127.5 - 1


def thin(colours: np.ndarray, weight: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of the colours in cells of 4x4x4, for a quick start; the colours themselves if the cells are too few."""
    _, index = np.unique(colour_codes(colours >> 2), return_inverse=True)
    cells = index.max() + 1
    if cells < 8 * k:
        return colours / 127.5 - 1, weight
    sums = cluster_sums(colours, weight, index, cells)
    return means(sums), sums[0]


def plus_plus(x: np.ndarray, weight: np.ndarray, k: int, rng: np.random.RandomState) -> np.ndarray:
    """Greedy k-means++: each new centre is the best of 2 + ln k points drawn by weight * squared distance."""
    x, weight = np.ascontiguousarray(x.T, np.float32), weight.astype(np.float32)
    nearest = np.full(len(weight), np.inf, np.float32)
    chosen = []
    mass = weight
    for _ in range(k):
        cumulative = np.cumsum(mass, dtype=np.float64)
        drawn = np.searchsorted(cumulative, rng.random_sample(2 + int(np.log(k))) * cumulative[-1], side="right")
        trials = []
        for i in np.unique(drawn.clip(max=len(weight) - 1)):
            distance = np.square(x[0] - x[0, i]) + np.square(x[1] - x[1, i]) + np.square(x[2] - x[2, i])
            np.minimum(distance, nearest, out=distance)
            trials.append(((distance * weight).sum(dtype=np.float64), i, distance))
        _, i, nearest = min(trials, key=lambda trial: trial[:2])
        mass = nearest * weight
        chosen.append(i)
    return x[:, chosen].T


class Blocks:
    """Distinct colours by block of the cube, for Candidates: which blocks there are, and where each colour lies."""

    def __init__(self, colours: np.ndarray):
        self.colours = colours.astype(np.intp)
        shape = (BLOCKS, BLOCKS, BLOCKS)
        ids, self.of_colour = np.unique(np.ravel_multi_index(tuple(self.colours.T // SIDE), shape), return_inverse=True)
        self.r, self.g, self.b = np.unravel_index(ids, shape)

    def nearest(self, centres: np.ndarray) -> np.ndarray:
        """Index of each colour's nearest centre, the lowest on ties."""
        candidates = Candidates(centres)
        count, first, listed = candidates.of(self.r, self.g, self.b)
        count, first = count[self.of_colour], first[self.of_colour]
        index = np.zeros(len(self.colours), np.intp)
        best = np.full(len(self.colours), np.inf, np.float32)
        live = np.arange(len(self.colours))
        for j in range(count.max()):
            live = live[count[live] > j]
            c = listed[first[live] + j]
            red, green, blue = (candidates.squares[axis, c, self.colours[live, axis]] for axis in range(3))
            distance = (red + green) + blue
            closer = distance < best[live]
            index[live[closer]], best[live[closer]] = c[closer], distance[closer]
        return index


def stepper(colours: np.ndarray, weight: np.ndarray, device: torch.device | None):
    """A function of the centres: each colour's nearest, (n,) array or tensor, and cluster_sums. By the exact search
    in numpy, or on a tensor's device."""
    if device is None:
        blocks = Blocks(colours)

        def step(centres):
            index = blocks.nearest(centres)
            return index, cluster_sums(colours, weight, index, len(centres))
    else:
        there = torch.from_numpy(colours).to(device), torch.from_numpy(weight.astype(np.int64)).to(device)

        def step(centres):
            index, sums = ops.palette_sums(*there, torch.from_numpy(centres).to(device))
            return index, sums.cpu().numpy().astype(np.float64)

    return step


def kmeans(pixels: np.ndarray | torch.Tensor, k: int, seed: int) -> np.ndarray:
    """Centres fp32 (k, 3) in [-1, 1] of uint8 pixels (..., 3), fitted on a tensor's device.

    Raises ValueError for fewer than k distinct colours."""
    colours, weight = distinct_colours(pixels)
    if len(colours) < k:
        raise ValueError(f"images: got {len(colours)} distinct colours, expected at least k={k}")
    centres = plus_plus(*thin(colours, weight, k), k, np.random.RandomState(seed)).astype(np.float32)
    step, previous = stepper(colours, weight, pixels.device if torch.is_tensor(pixels) else None), np.inf
    energy = (weight * np.square(colours.astype(np.float64)).sum(1)).sum()
    for _ in range(MAX_STEPS):
        index, sums = step(np.ascontiguousarray(centres))
        # sum of w |x - c|^2 from the sums alone, in bytes squared; the rounding of a perfect fit isn't progress.
        c = (centres.astype(np.float64).T + 1) * 127.5
        inertia = max(energy - 2 * (c * sums[1:]).sum() + (c * c * sums[0]).sum(), 0)
        moved = means(sums)
        if empty := np.flatnonzero(sums[0] == 0).tolist():
            x = colours / 127.5 - 1
            loss = weight * np.square(x - centres[torch.as_tensor(index, device="cpu").numpy()]).sum(1)
            moved[empty] = x[np.argsort(-loss, kind="stable")[: len(empty)]]
        centres = moved.astype(np.float32)
        if not empty and previous - inertia <= TOLERANCE * inertia:
            break
        previous = inertia
    return centres
