"""CLIP's byte-pair tokenizer without its square: a long word costs n log n, so that no caption holds up the others.

open_clip looks through the whole word for each pair that it joins. Words of thousands of letters are no words, but they
come: in captions from the web, and from whoever wants a server to be busy (2,464 random letters took 1.6 s).
"""

import functools
import heapq
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_clip import SimpleTokenizer


def simple_tokenizer(**how: Any) -> "SimpleTokenizer":
    """open_clip's SimpleTokenizer(**how): the same tokens, in time that grows with the text and no faster."""
    import open_clip

    tokenizer = open_clip.SimpleTokenizer(**how)
    tokenizer.bpe = functools.partial(_bpe, tokenizer)
    return tokenizer


def _bpe(tokenizer: "SimpleTokenizer", token: str) -> str:
    """In the place of SimpleTokenizer.bpe: the parts of a word, between spaces."""
    if token not in tokenizer.cache:
        parts = joined([*token[:-1], f"{token[-1]}</w>"], tokenizer.bpe_ranks)
        tokenizer.cache[token] = " ".join(parts)
        return " ".join(parts)  # the cache may be one that is full
    return tokenizer.cache[token]


def joined(symbols: Sequence[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """The symbols with pairs joined as byte-pair encoding does (Sennrich et al. 2016, arXiv 1508.07909, algorithm 1).

    Again and again the pair of the lowest rank is joined wherever it stands, from left to right, until no pair has one.
    """
    parts: list[str | None] = list(symbols)  # None: joined to the one before it
    after, before = list(range(1, len(parts) + 1)), list(range(-1, len(parts) - 1))
    heap: list[tuple[int, int]] = []  # (rank, place of the pair's first part)

    def offer(place: int) -> None:
        if place >= 0 and after[place] < len(parts):
            rank = ranks.get((parts[place], parts[after[place]]))
            if rank is not None:
                heapq.heappush(heap, (rank, place))

    def stands(place: int, rank: int) -> bool:
        second = after[place]
        return parts[place] is not None and second < len(parts) and ranks.get((parts[place], parts[second])) == rank

    for place in range(len(parts)):
        offer(place)
    while heap:
        lowest, changed = heap[0][0], []
        while heap and heap[0][0] == lowest:  # all of them, before a pair that this makes is looked at
            place = heapq.heappop(heap)[1]
            if stands(place, lowest):
                parts[place] += parts[after[place]]
                parts[after[place]] = None
                after[place] = after[after[place]]
                if after[place] < len(parts):
                    before[after[place]] = place
                changed.append(place)
        for place in changed:
            offer(before[place])
            offer(place)
    return [part for part in parts if part is not None]
