"""Embedding arithmetic: "person with hat - person" against a list of words, and how much to believe the answer."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clip_train.folder import write_file
from clip_train.settings import UserError

TERM = re.compile(r'\s*(?P<weight>\d+(?:\.\d*)?|\.\d+)?\s*(?(weight)\*|)\s*(?:"(?P<quoted>[^"]*)"|(?P<plain>.+?))\s*')
COMMON = frozenset("a an and are as at by for from in is it its of on or that the this to with without".split())


@dataclass(frozen=True)
class Term:
    """One summand: its weight with its sign, and the text that is embedded."""

    weight: float
    text: str
    quoted: bool = field(default=False, compare=False)  # stood in double quotes


def parse(expression: str) -> list[Term]:
    """'person with hat - person + 0.5*fox' -> its terms.

    Signs (+ - or the minus sign U+2212) stand between spaces, so that "t-shirt" is one word; the first term may have
    one too. A term in double quotes
    is taken as it is, signs included. UserError: an empty term, or a weight of 0.
    """
    terms = []
    # what stands in quotes is hidden while the signs are looked for
    hidden = re.sub(r'"[^"]*"', lambda match: "\x00" * len(match[0]), expression)
    found = re.finditer(r"^\s*([+\-\u2212])\s*|\s+([+\-\u2212])\s+", hidden)
    signs = [(match.start(), match.end(), match[1] or match[2]) for match in found]
    if not signs or signs[0][0] > 0:
        signs = [(0, 0, "+"), *signs]
    for (_, start, sign), (end, _, _) in zip(signs, [*signs[1:], (len(expression), 0, "")], strict=True):
        match = TERM.fullmatch(expression[start:end])
        text = (match["quoted"] if match["quoted"] is not None else match["plain"]).strip() if match else ""
        if not text or (match["plain"] and re.fullmatch(r"[+\-\u2212](\s.*)?|.*\*", text)):
            raise UserError(f"{expression!r} has an empty term; write it like 'person with hat - person + 0.5*fox'")
        weight = float(match["weight"] or 1)
        if weight == 0:
            raise UserError(f"{expression!r}: the weight of {text!r} is 0; leave the term out")
        terms.append(Term(weight if sign == "+" else -weight, text, match["quoted"] is not None))
    return terms


def words_of(captions: Iterable[str], most: int = 5000) -> list[str]:
    """The commonest words of captions, each counted once a caption: at least two letters, no "the" and "of"."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update({word for word in re.findall(r"[^\W\d_](?:[\w'’-]*[^\W_])", caption.lower())} - COMMON)
    return [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]]


def answer(
    expression: str,
    terms: Sequence[Term],
    term_rows: np.ndarray,
    words: Sequence[str],
    word_rows: np.ndarray,
    *,
    top: int = 10,
    permutations: int = 1000,
    seed: int = 0,
    pool: np.ndarray | None = None,
    pool_words: np.ndarray | None = None,
) -> dict[str, Any]:
    """The words nearest to the sum, and how often random terms stand as close to a word.

    term_rows (T, D) and word_rows (W, D): unit rows; the sum is made a unit row. Words that are a term themselves are
    left out. "margin": how much the first cosine exceeds the second. "p_cosine", "p_margin": the share of
    `permutations` sums of random words with the same weights (their own words left out) whose first cosine, or margin,
    is as large; (1 + as large) / (1 + permutations), so never 0. UserError: fewer than two words left, or a sum of 0.
    pool (P, D): what the random terms are drawn from where the terms are no texts but, say, pictures; pool_words (P, W)
    bool: the words that are each one's own.
    """
    weights = np.array([term.weight for term in terms])
    used = {term.text.lower() for term in terms}
    kept = np.array([i for i, word in enumerate(words) if word.lower() not in used], dtype=np.int64)
    if len(kept) < max(2, len(terms) + 2):
        raise UserError(f"{len(kept)} words are too few to rank {expression!r} against; give more: --words FILE")
    total = weights @ np.asarray(term_rows, dtype=np.float64)
    length = np.linalg.norm(total)
    if length < 1e-6:
        raise UserError(f"the terms of {expression!r} cancel out; nothing is left to look for")
    cosine = word_rows[kept] @ (total / length).astype(np.float32)
    order = np.argsort(-cosine, kind="stable")
    best, margin = float(cosine[order[0]]), float(cosine[order[0]] - cosine[order[1]])

    rng = np.random.default_rng(seed)
    pool = word_rows if pool is None else pool
    if len(pool) < len(terms):
        raise UserError(f"{len(pool)} are too few to draw the {len(terms)} terms of {expression!r} from by chance")
    as_close = as_clear = 0
    for low in range(0, permutations, 100):
        drawn = np.stack(
            [rng.choice(len(pool), len(terms), replace=False) for _ in range(min(100, permutations - low))]
        )
        sums = np.einsum("t,ptd->pd", weights, pool[drawn].astype(np.float64))
        sums /= np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
        scores = sums.astype(np.float32) @ word_rows.T
        if pool_words is None:
            np.put_along_axis(scores, drawn, -np.inf, axis=1)
        else:
            scores[pool_words[drawn].any(axis=1)] = -np.inf
        two = -np.partition(-scores, 1, axis=1)[:, :2]
        as_close += int((two[:, 0] >= best).sum())
        as_clear += int((two[:, 0] - two[:, 1] >= margin).sum())
    return {
        "expression": expression,
        "terms": [{"weight": term.weight, "text": term.text} for term in terms],
        "words": len(kept),
        "left_out": [word for word in words if word.lower() in used],
        "answers": [{"word": words[kept[i]], "cosine": float(cosine[i])} for i in order[:top].tolist()],
        "margin": margin,
        "p_cosine": (1 + as_close) / (1 + permutations),
        "p_margin": (1 + as_clear) / (1 + permutations),
        "permutations": permutations,
    }


def plot(path: Path | str, answers: Sequence[dict[str, Any]]) -> None:
    """A bar chart of the nearest words of each expression, as a PNG."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.9 + sum(0.75 + 0.24 * len(a["answers"]) for a in answers)), layout="constrained")
    ratios = [max(len(a["answers"]), 2) for a in answers]
    panels = figure.subplots(len(answers), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for panel, one in zip(panels, answers, strict=True):
        words = [a["word"] for a in one["answers"]][::-1]
        cosines = [a["cosine"] for a in one["answers"]][::-1]
        bars = panel.barh(range(len(words)), cosines, color=["#9aa5b1"] * (len(words) - 1) + ["#0072b2"])
        panel.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
        panel.set_yticks(range(len(words)), words, fontsize=9)
        panel.set_xlabel("cosine", fontsize=9)
        panel.margins(x=0.12)
        panel.axvline(0, color="black", linewidth=0.6)
        title = f"{one['expression']}\nmargin {one['margin']:.3f} (p {one['p_margin']:.3f}), {one['words']} words"
        panel.set_title(title, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    write_file(Path(path), file.getvalue())
