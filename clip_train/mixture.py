"""Several sources of batches as one, in fixed shares: what a step holds is a pure function of the step."""

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch

from clip_train.settings import UserError


class Source(Protocol):
    """What can be mixed: CaptionedBatches, StreamBatches."""

    def parts(self, wanted: Iterator[np.ndarray]) -> Iterator[dict[str, torch.Tensor]]:
        """A batch for each array of places in the source's own endless order.

        A source with `sequential = True` counts the places of its own rank, and is asked for one after the other.
        """


class Mixture:
    """An endless stream of batches, each with samples of every source. Called with a step, it goes on from that step.

    After n samples, over all ranks and steps, a source has given floor(n * its share) of them (the one with the largest
    share: the rest), so the shares are exact at any time, not on average. Inside a batch the sources are shuffled by
    (seed, step). All ranks together see the same samples whatever their number, if the sources do so.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """weights: of the samples drawn, not of the sources' sizes; their sum is free. batch_size is one rank's.

        UserError: weights that make no sense, or a batch too small for so many sources.
        """
        if len(weights) != len(sources) or not all(0 < weight < float("inf") for weight in weights):
            given = ", ".join(f"{weight:g}" for weight in weights)
            raise UserError(f"weights {given} for {len(sources)} sources: give each a weight above 0")
        self.sources, self.batch_size, self.seed, self.rank, self.world = sources, batch_size, seed, rank, world
        total = sum(map(Fraction, weights))
        self.shares = [Fraction(weight) / total for weight in weights]
        self._largest = max(range(len(weights)), key=lambda s: self.shares[s])
        others = [share for s, share in enumerate(self.shares) if s != self._largest]
        if sum(math.ceil(batch_size * world * share) for share in others) > batch_size * world:
            raise UserError(f"a batch of {batch_size * world} is too small to mix {len(sources)} sources in; raise it")
        self._layout = functools.lru_cache(32)(self._layout_of)

    def __call__(self, start_step: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Yields {"pixels", "tokens", "caption", "group"}, step after step."""
        streams = [source.parts(self._places(s, start_step)) for s, source in enumerate(self.sources)]
        with contextlib.ExitStack() as stack:
            for stream in streams:
                stack.enter_context(contextlib.closing(stream))
            for step in itertools.count(start_step):
                parts = [next(stream) for stream in streams]
                mine, _ = self._layout(step)
                slots = torch.from_numpy(np.argsort(np.argsort(mine, kind="stable"), kind="stable"))
                yield {name: torch.cat([part[name] for part in parts])[slots] for name in parts[0]}

    def taken(self, samples: int) -> list[int]:
        """How many of the first `samples` samples of training each source has given."""
        counts = [math.floor(samples * share) for share in self.shares]
        counts[self._largest] += samples - sum(counts)
        return counts

    def _layout_of(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """For this rank's slots in a step (B,): the source of each, and the sample's place in that source's order."""
        size = self.batch_size * self.world
        before, after = self.taken(step * size), self.taken((step + 1) * size)
        counts = [b - a for a, b in zip(before, after, strict=True)]
        order = np.random.default_rng([self.seed, step]).permutation(size)
        which = np.repeat(np.arange(len(counts)), counts)[order]
        places = np.empty(size, dtype=np.int64)
        for s, (first, count) in enumerate(zip(before, counts, strict=True)):
            places[which == s] = first + np.arange(count)
        own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return which[own], places[own]

    def _places(self, source: int, start_step: int) -> Iterator[np.ndarray]:
        """What to ask a source for, step after step."""
        sequential = getattr(self.sources[source], "sequential", False)
        if sequential:  # it counts what this rank alone has had
            steps = range(start_step if self.world > 1 else 0)
            had = sum(int((self._layout_of(step)[0] == source).sum()) for step in steps)
            had = had if self.world > 1 else self.taken(start_step * self.batch_size)[source]
        for step in itertools.count(start_step):
            which, places = self._layout(step)
            if sequential:
                count = int((which == source).sum())
                yield np.arange(had, had + count)
                had += count
            else:
                yield places[which == source]
