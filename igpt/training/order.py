"""Which pictures a step trains on: a function of (seed, step) and nothing else, so that to resume takes the step only.

Every epoch is a permutation of its own, epochs follow each other without a seam, and a batch may straddle two.
"""

from functools import lru_cache

import numpy as np


class Order:
    def __init__(self, pictures: int, batch: int, seed: int):
        self.pictures, self.batch, self.seed = pictures, batch, seed
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.pictures)

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of the pictures of update `step` = 0, 1, ..."""
        place = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs = place // self.pictures
        return np.concatenate([self.epoch(e)[place[epochs == e] % self.pictures] for e in np.unique(epochs)])
