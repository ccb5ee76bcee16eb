"""Sums in the space, found in the shards' own words: "cat with hat - cat" should point at "hat".

One name that is another name and one word more is such a sum, with a known answer. Its terms are embedded as texts, or
as the mean of the pictures that show them; both are ranked against the same words (clip_train.arithmetic).
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_train.arithmetic import COMMON, Term, answer, parse
from diffusion.lab.pairs import Pairs

MOST = 300  # sums tried
FEW = 5  # found among the names; below this, words that stand together are taken too
TOGETHER = 3  # pictures that two such words must share, and that each must have without the other


@dataclass(frozen=True)
class Analogy:
    """A sum of terms, and the word it should point at, if that is known."""

    expression: str
    terms: tuple[Term, ...]
    rest: str | None = None

    @classmethod
    def of(cls, whole: str, base: str, rest: str) -> "Analogy":
        quoted = [
            f'"{text}"' if re.search(r"\s[+\-\u2212]\s|^[\d.+\-\u2212]", text) else text for text in (whole, base)
        ]
        return cls(" - ".join(quoted), (Term(1.0, whole), Term(-1.0, base)), rest)

    @property
    def joined(self) -> bool:
        """Whether it is "A with B" less A."""
        return self.terms[0].text.lower() == f"{self.terms[1].text} with {self.rest}".lower()

    @classmethod
    def asked(cls, expression: str) -> "Analogy":
        """Of what a person typed; the answer is known where it is A - B and A is B and one word more."""
        terms = parse(expression)
        rest = None
        if [term.weight for term in terms] == [1.0, -1.0]:
            more = [word for word in tokens(terms[0].text) if word not in tokens(terms[1].text) and word not in COMMON]
            rest = more[0] if len(more) == 1 and set(tokens(terms[1].text)) <= set(tokens(terms[0].text)) else None
        return cls(expression, tuple(terms), rest)


def tokens(text: str) -> list[str]:
    """The words of a text in small letters."""
    return re.findall(r"[^\W_](?:[\w'’-]*[^\W_])?", text.lower())


def derive(names: Sequence[str], words: Sequence[str], most: int = MOST) -> list[Analogy]:
    """Sums whose answer is one of `words`, the ones to show first in front: "A with B - A", then the commonest words.

    The order knows nothing of the answers. Names are those of the pictures, one each, repeated as they come.
    """
    spoken = {name.lower(): tokens(name) for name in names}
    vocabulary = {word.lower() for word in words}
    counts = Counter(word for name in names for word in set(tokens(name)))
    found: dict[str, Analogy] = {}
    by_tokens = {tuple(said): name for name, said in sorted(spoken.items(), reverse=True)}
    for name, said in sorted(spoken.items()):
        for cut in range(1, len(said)):
            for base, more in ((said[:cut], said[cut:]), (said[cut:], said[:cut])):
                rest = [word for word in more if word not in COMMON]
                if len(rest) == 1 and rest[0] in vocabulary and rest[0] not in base and tuple(base) in by_tokens:
                    one = Analogy.of(name, by_tokens[tuple(base)], rest[0])
                    found.setdefault(one.expression, one)
    made = sorted(found.values(), key=lambda one: (not one.joined, *_rarity(one, counts)))
    if len(made) < FEW:
        made += _together(names, vocabulary, counts, most)
    return made[:most]


def different(found: Sequence[Analogy], count: int) -> list[Analogy]:
    """The first `count` of them that share neither base nor answer with one before."""
    out: list[Analogy] = []
    for one in found:
        if len(out) < count and all(one.rest != other.rest and one.terms[1] != other.terms[1] for other in out):
            out.append(one)
    return out


def _rarity(one: Analogy, counts: Counter) -> tuple[int, str]:
    return -min(counts[word] for term in one.terms for word in tokens(term.text) if word not in COMMON), one.expression


def _together(names: Sequence[str], vocabulary: set[str], counts: Counter, most: int) -> list[Analogy]:
    """ "a with b - a" of words that many names hold together, and many others hold one of."""
    common = [word for word, n in counts.most_common(200) if n >= 2 * TOGETHER and word in vocabulary - COMMON]
    holds = np.array([[word in said for word in common] for said in map(set, map(tokens, names))], dtype=np.float32)
    shared = (holds.T @ holds).astype(int) if len(common) else np.zeros((0, 0), dtype=int)
    alone = np.diag(shared)[:, None] - shared  # [a, b]: names with a that lack b
    places = np.argwhere((shared >= TOGETHER) & (alone >= TOGETHER) & (alone.T >= TOGETHER))
    order = sorted(places.tolist(), key=lambda place: (-shared[place[0], place[1]], place))
    return [Analogy.of(f"{common[a]} with {common[b]}", common[a], common[b]) for a, b in order[:most]]


def row_of(one: Analogy, found: dict[str, Any]) -> dict[str, Any]:
    """An arithmetic.answer() as a line of a table."""
    answers = {each["word"]: round(each["cosine"], 4) for each in found["answers"][:10]}
    numbers = {name: found[name] for name in ("margin", "p_cosine", "p_margin", "words")}
    return {"sum": one.expression, "word": one.rest, "answers": answers, **numbers}


def pictures_of(names: Sequence[str], terms: Sequence[Term]) -> list[np.ndarray] | None:
    """For each term the pictures that show it: those of this name, else those whose name holds all of its words but
    not all of a longer term's. None if a term has no picture."""
    said = [set(tokens(name)) for name in names]
    wanted = [set(tokens(term.text)) - COMMON for term in terms]
    out = []
    for term, own in zip(terms, wanted, strict=True):
        exact = [i for i, name in enumerate(names) if name.lower() == term.text.lower()]
        longer = [other for other in wanted if other > own]
        held = [i for i, has in enumerate(said) if own and own <= has and not any(one <= has for one in longer)]
        if not (exact or held):
            return None
        out.append(np.array(exact or held, dtype=np.int64))
    return out


def mean_rows(image: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    """(G, D) unit rows: the mean of each group's picture rows."""
    rows = np.stack([image[group].mean(axis=0, dtype=np.float64) for group in groups])
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def ranked_pictures(
    pairs: Pairs, one: Analogy, words: Sequence[str], word_rows: np.ndarray, **options: Any
) -> tuple[dict[str, Any], list[np.ndarray]] | None:
    """arithmetic.answer() of a sum of pictures, and the pictures; None if a term has none.

    By chance: sums of the mean rows of random names, without the words of these names.
    """
    shown = pictures_of(pairs.names, one.terms)
    if shown is None:
        return None
    groups = pairs.groups
    of_name = [np.flatnonzero(groups == group) for group in range(groups.max() + 1)]
    place = {word.lower(): i for i, word in enumerate(words)}
    own = np.zeros((len(of_name), len(words)), dtype=bool)
    for i, rows in enumerate(of_name):
        own[i, [place[word] for word in tokens(pairs.names[rows[0]]) if word in place]] = True
    pool = mean_rows(pairs.image, of_name)
    found = answer(
        one.expression, one.terms, mean_rows(pairs.image, shown), words, word_rows, pool=pool, pool_words=own, **options
    )
    return found, shown


def nearest_words(
    analogies: Sequence[Analogy], term_rows: np.ndarray, words: Sequence[str], word_rows: np.ndarray, subtract: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(E,) which word is nearest to each sum, and (E,) the rank of the one it should point at.

    term_rows (E, 2, D): whole and base. subtract: take the base away, or (for comparison) leave the whole as it is;
    words that are a term themselves are left out either way. Ties count against.
    """
    place = {word.lower(): i for i, word in enumerate(words)}
    sums = term_rows[:, 0] - (term_rows[:, 1] if subtract else 0)
    sums = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    scores = (sums @ word_rows.T).astype(np.float32)
    for i, one in enumerate(analogies):
        scores[i, [place[term.text.lower()] for term in one.terms if term.text.lower() in place]] = -np.inf
    right = np.array([place[one.rest] for one in analogies])
    own = scores[np.arange(len(right)), right]
    return scores.argmax(axis=1), (scores >= own[:, None]).sum(axis=1)
