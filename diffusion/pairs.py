"""Pairs of a caption's and a picture's embedding: what a prior is trained on, dealt out in permutations."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from clip_train import ranks
from clip_train.captions import pick_caption, uniform_of
from clip_train.fit import Batch, FitConfig
from clip_train.store import EmbeddingStore


@dataclass(frozen=True)
class Pairs:
    """Caption rows and the picture row that each belongs to, on the CPU."""

    text: np.ndarray  # (M, D)
    image: np.ndarray  # (N, D)
    row: np.ndarray  # (M,): the picture of each caption, in rising order
    mix: Sequence[
        float
    ] = ()  # weights of a picture's 1st, 2nd, ... caption; (): every caption comes round equally often

    @classmethod
    def of(cls, store: EmbeddingStore, mix: Sequence[float] = ()) -> "Pairs":
        text, row = store.captions()
        return cls(text, store.image(), row, mix)

    def blocks(self, size: int = 8192) -> Iterator[tuple[Tensor, Tensor]]:
        """(text (n, D), image (n, D)), each pair once."""
        for start in range(0, len(self.row), size):
            yield self._take(np.arange(start, min(start + size, len(self.row))))

    def batches(self, config: FitConfig) -> Callable[[int], Iterator[Batch]]:
        """This rank's share of every step's batch: permutations of all pairs, one after the other.

        With a mix: permutations of the pictures that have captions, each with one of them.
        """
        pictures, first, count = np.unique(self.row, return_index=True, return_counts=True)
        mine = config.batch_size // ranks.world_size()

        def from_step(step: int) -> Iterator[Batch]:
            while True:
                start = step * config.batch_size + ranks.rank() * mine
                if len(self.mix):
                    some = shuffled(start, mine, len(pictures), config.seed)
                    uniform = uniform_of(config.seed, np.arange(start, start + mine))
                    some = first[some] + pick_caption(count[some], self.mix, uniform)
                else:
                    some = shuffled(start, mine, len(self.row), config.seed)
                text, image = self._take(some)
                yield {"text": text, "image": image}
                step += 1

        return from_step

    def _take(self, pairs: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.text[pairs]), torch.from_numpy(self.image[self.row[pairs]])


def shuffled(start: int, count: int, total: int, seed: int) -> np.ndarray:
    """Items start .. start + count of the endless row of permutations of range(total), each from (seed, its number)."""
    taken = []
    while count:
        epoch, at = divmod(start, total)
        part = _permutation(total, seed, epoch)[at : at + count]
        taken.append(part)
        start, count = start + len(part), count - len(part)
    return np.concatenate(taken)


@lru_cache(maxsize=2)
def _permutation(total: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(total)
