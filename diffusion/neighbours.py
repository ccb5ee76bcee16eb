"""Rows of an embeddings folder to draw from: a sample by its key, and the samples nearest to a text."""

from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from clip_train.settings import UserError
from clip_train.store import EmbeddingStore


@dataclass(frozen=True)
class Neighbours:
    """The k samples nearest to a point."""

    keys: list[str]
    scores: np.ndarray  # (k,) cosines, falling
    rows: np.ndarray  # (k, D) their image embeddings

    @property
    def middle(self) -> np.ndarray:
        """The unit row (D,) of their sum, which has the largest mean cosine with them."""
        total = self.rows.sum(0)
        return total / np.linalg.norm(total)


def key_row(store: EmbeddingStore, key: str) -> np.ndarray:
    """The image embedding (D,) of the sample with this key. UserError if there is none."""
    try:
        return store.image([store.keys.index(key)])[0]
    except ValueError as error:
        near = get_close_matches(key, store.keys, 3, 0.6) or store.keys[:3]
        raise UserError(f"{store.folder}/ has no sample {key!r}; it has {', '.join(near)} ...") from error


def nearest(store: EmbeddingStore, point: np.ndarray, k: int) -> Neighbours:
    """The k samples whose pictures have the largest cosines with a point (D,); exact, all rows are looked at.

    Conditioning a decoder on them: k-NN diffusion (Sheynin et al. 2022, arXiv 2204.02849), where a text has no prior.
    """
    if not 1 <= k <= len(store):
        raise UserError(f"{k} neighbours of {len(store)} samples in {store.folder}/; ask for 1 to {len(store)}")
    point = np.asarray(point, dtype=np.float32)
    point = point / np.linalg.norm(point)
    rows, scores = np.zeros(0, np.int64), np.zeros(0, np.float32)
    for first, block in store.blocks():
        rows = np.concatenate([rows, np.arange(first, first + len(block))])
        scores = np.concatenate([scores, block @ point])
        best = np.argsort(-scores, kind="stable")[:k]
        rows, scores = rows[best], scores[best]
    return Neighbours([store.keys[row] for row in rows], scores, store.image(rows))


def refuse_other_clip(store: EmbeddingStore, clip_fingerprint: str) -> None:
    """UserError unless the embeddings are of the CLIP with this fingerprint, the decoder's."""
    made = store.manifest.inputs.get("clip", {}).get("fingerprint")
    if made != clip_fingerprint:
        raise UserError(
            f"{store.folder}/ was made with another CLIP than the decoder; embed again with the decoder's: "
            f"unclip embed --clip CLIP"
        )
