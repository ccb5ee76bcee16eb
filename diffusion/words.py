"""Captions as byte-pair ids: what a prior reads beside the text embedding, without any text tower."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

NO_WORD = -1  # fills the places after a caption's end


def bpe_ids(captions: Sequence[str], length: int) -> np.ndarray:
    """(N, length) int64: the first `length` ids of each caption, NO_WORD after its end; no start or end marks.

    The vocabulary is OpenAI's byte-pair one (49,408 ids), which comes with open_clip and is that of most CLIPs: the
    prior has a table of its own for it, so a CLIP that reads captions in another way has priors that read them so too.
    """
    out = np.full((len(captions), length), NO_WORD, dtype=np.int64)
    for i, caption in enumerate(captions):
        ids = _encoded(caption[: 32 * length])[:length]
        out[i, : len(ids)] = ids
    return out


@lru_cache(maxsize=100_000)
def _encoded(caption: str) -> tuple[int, ...]:
    return tuple(_tokenizer().encode(caption))


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    import open_clip

    return open_clip.SimpleTokenizer()
