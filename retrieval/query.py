"""Query algebra: texts, pictures, keys and vectors with weights -> one unit row to search with.

    "king - man + woman"      "key:train000123 - red + 0.5*blue"      "image:fox.jpg + in the snow"

A sum is taken as it is, pictures and texts together. The two kinds lie apart in the space (the modality gap), but what
sets them apart is nearly the same for all rows that are ranked, so it moves all scores and hardly their order;
benchmarks/query_algebra.py measures this, beside sums of rows from which each kind's mean was taken off.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_train import arithmetic
from clip_train.settings import UserError

KINDS = ("text", "image", "key", "vector")
PREFIX = re.compile(rf"({'|'.join(KINDS)}):\s*(.*)", re.DOTALL)
WEIGHTED = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*\*\s*(.*)", re.DOTALL)
Question = tuple[str, "list[Term]"]  # the name that a query is shown by, and its terms
LEAST = 1e-6  # length of a sum that still points somewhere


class QueryError(UserError):
    """What is wrong with the question itself, not with the index or the machine: whoever asked may read it."""


@dataclass(frozen=True)
class Term:
    """One summand of a query."""

    kind: str  # text, image (a file, its bytes, or a PIL image), key (of a sample: its picture), vector (D numbers)
    value: Any
    weight: float = 1.0  # negative: away from it

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise QueryError(f"a term of kind {self.kind!r}; it must be one of: {', '.join(KINDS)}")
        if not np.isfinite(self.weight) or self.weight == 0:
            raise QueryError(f"the weight {self.weight:g} of a term must be a number other than 0")

    def __str__(self) -> str:
        name = f'"{self.value}"' if self.kind == "text" else f"{self.kind}:{self.shown}"
        size = "" if abs(self.weight) == 1 else f"{abs(self.weight):g}*"
        return f"{'-' if self.weight < 0 else '+'} {size}{name}"

    @property
    def shown(self) -> str:
        """The value, as far as it has a name."""
        return str(self.value) if isinstance(self.value, str | os.PathLike) else "..."


def parse_term(text: str, weight: float = 1.0) -> Term:
    """'a fox', 'image:fox.jpg', 'key:train000123', 'vector:row.npy' or 'text:key:no key', each also as '0.5*a fox'.

    Signs within are part of the text. `weight` is multiplied by the one that the text gives.
    """
    if match := WEIGHTED.fullmatch(text):
        weight, text = weight * float(match[1]), match[2]
    match = PREFIX.fullmatch(text.strip())
    kind, value = (match[1], match[2]) if match else ("text", text)
    if re.fullmatch(r'"[^"]*"', value):
        value = value[1:-1]
    if not value.strip():
        raise QueryError(f"the term {text!r} is empty; write a text, image:FILE, key:KEY or vector:FILE.npy")
    return Term(kind, value, weight)


def parse_algebra(text: str) -> list[Term]:
    """'king - man + 0.5*woman' -> its terms, each as parse_term() reads it; a text without signs is one term.

    A sign is one only between spaces (or first, with a space behind it), so "t-shirt" and "-5 degrees" are texts. Text
    in double quotes is taken as it is, signs, weights and prefixes included: so is the whole of '"t-shirt - red"'.
    """
    led = text if re.match(r"\s*[+\-\u2212]\s", text) else f"+ {text}"
    try:
        terms = arithmetic.parse(led)
    except UserError as error:
        said = str(error).replace(repr(led), repr(text))
        raise QueryError(f"{said}; a text with signs of its own stands in double quotes") from error
    return [Term("text", one.text, one.weight) if one.quoted else parse_term(one.text, one.weight) for one in terms]


def is_sum(terms: Sequence[Term]) -> bool:
    """Whether a query is more than one thing to look for."""
    return len(terms) > 1 or terms[0].weight < 0


def questions(
    texts: Sequence[str] = (),
    *,
    images: Sequence[Path | str] = (),
    keys: Sequence[str] = (),
    vectors: Sequence[tuple[str, np.ndarray]] = (),
    plus: Sequence[str] = (),
    minus: Sequence[str] = (),
    weight: float = 1.0,
    literal: bool = False,
    together: bool = False,
) -> list[Question]:
    """Each text, picture, key and named vector as a query of its own; `together`: all of them as one sum.

    texts are read by parse_algebra(), or not at all if `literal`. plus and minus (terms, see parse_term()) are added to
    every query, times `weight`, and are one by themselves if there is none.
    """
    asked = [(text, [Term("text", text)] if literal else parse_algebra(text)) for text in texts]
    asked += [(str(path), [Term("image", path)]) for path in images]
    asked += [(f"key:{key}", [Term("key", key)]) for key in keys]
    asked += [(name, [Term("vector", row)]) for name, row in vectors]
    change = [parse_term(text, weight) for text in plus] + [parse_term(text, -weight) for text in minus]
    if together and asked:
        asked = [("", [term for _, terms in asked for term in terms])]
    if change:
        asked = [(name, [*terms, *change]) for name, terms in asked or [("", [])]]
    return [(describe(terms) if is_sum(terms) else name or terms[0].shown, terms) for name, terms in asked]


def describe(terms: Sequence[Term]) -> str:
    """The sum as it was read: '"king" - "man" + "woman"'."""
    return " ".join(map(str, terms)).removeprefix("+ ")


def combine(terms: Sequence[Term], rows: np.ndarray) -> np.ndarray:
    """(D,) float32 unit row of the weighted sum of the terms' unit rows (T, D). QueryError if nothing is left of it."""
    if not terms:
        raise QueryError("the query has no terms; give a text, a picture, a key or a vector")
    total = np.array([term.weight for term in terms]) @ np.asarray(rows, dtype=np.float64)
    length = np.linalg.norm(total)
    if not length > LEAST * sum(abs(term.weight) for term in terms):
        raise QueryError(f"the terms of {describe(terms)} cancel out; nothing is left to look for")
    return (total / length).astype(np.float32)
