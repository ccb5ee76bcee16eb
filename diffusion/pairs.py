"""Pairs of a caption's and a picture's embedding: what a prior is trained on, dealt out in permutations."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_train import ranks
from clip_train.captions import pick_caption, uniform_of
from clip_train.fit import Batch, FitConfig
from clip_train.settings import UserError
from clip_train.store import EmbeddingStore
from diffusion.words import NO_WORD, bpe_ids


@dataclass(frozen=True)
class Pairs:
    """Caption rows and the picture row that each belongs to, on the CPU."""

    text: np.ndarray  # (M, D)
    image: np.ndarray  # (N, D)
    row: np.ndarray  # (M,): the picture of each caption, in rising order
    mix: Sequence[float] = ()  # weights of a picture's 1st, 2nd, ... caption; (): each comes round equally often
    words: np.ndarray | None = None  # (M, W): byte-pair ids of each caption, see words.bpe_ids

    @classmethod
    def of(cls, store: EmbeddingStore, mix: Sequence[float] = (), words: int = 0) -> "Pairs":
        """All pairs of an embeddings folder. words: how many byte-pair ids of each caption are wanted; 0: none."""
        text, row = store.captions()
        said = store.caption_texts() if words else []
        if words and len(said) != len(text):
            raise UserError(
                f"{store.folder}/metadata/ has {len(said)} captions for the {len(text)} rows of captions_emb/, and a "
                f"prior that reads words needs them all; make it again: unclip embed, or set words=0"
            )
        return cls(text, store.image(), row, mix, bpe_ids(said, words) if words else None)

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
                batch = {"text": text, "image": image}
                if self.words is not None:
                    ids = self.words[some]
                    longest = max(1, int((ids != NO_WORD).any(0).sum()))
                    batch["words"] = torch.from_numpy(ids[:, :longest])
                yield batch
                step += 1

        return from_step

    def _take(self, pairs: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.text[pairs]), torch.from_numpy(self.image[self.row[pairs]])


def blurred(text: Tensor, amount: float, rng: torch.Generator) -> Tensor:
    """Text rows (B, D) moved off their place, each by its own share of `amount`, and made unit rows again.

    A CLIP knows the captions it was trained on far better than others: there its text rows lie next to their pictures,
    and a prior that sees only such rows trusts all text too much. The noise has the covariance of the batch's own rows
    (random mixtures of them), since text fills few of the D dimensions and noise in the others would give itself away.
    amount: standard deviation of the noise in units of that of the rows, at most; each row draws its own below it.
    """
    centre = text - text.mean(0)
    weights = torch.randn(len(text), len(text), generator=rng, device=text.device)
    share = amount * torch.rand(len(text), 1, generator=rng, device=text.device)
    noise = weights @ centre / len(text) ** 0.5
    return F.normalize(text + share * noise, dim=-1)


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
