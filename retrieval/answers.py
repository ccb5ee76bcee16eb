"""What search found, for people and for programs: tables, json, CSV, a contact sheet."""

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_train.settings import UserError
from retrieval.query import Question, Term, is_sum

if TYPE_CHECKING:
    from PIL import Image

    from retrieval.search import Hit, Searcher


def to_json(asked: Sequence[Question], hits: "Sequence[Sequence[Hit]]") -> str:
    """[{"query", "terms" of a sum, "hits": [...]}, ...]; what is no number (NaN, infinite) is null: json has none."""
    found = []
    for (name, terms), some in zip(asked, hits, strict=True):
        said = [{"kind": t.kind, "value": t.shown, "weight": t.weight} for t in terms] if is_sum(terms) else None
        found.append({"query": name} | ({"terms": said} if said else {}) | {"hits": [vars(hit) for hit in some]})
    return json.dumps(_finite(found), indent=1, ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_csv(asked: Sequence[Question], hits: "Sequence[Sequence[Hit]]") -> str:
    """A line a hit: query, rank, score, probability, row, key, caption, then the metadata; lists as json.

    A column of the metadata that is named like one of these is written as meta.rank and so on.
    """
    own = ("rank", "score", "probability", "row", "key", "caption")
    columns = dict.fromkeys(name for some in hits for hit in some for name in hit.meta)
    heads = [f"meta.{name}" if name in ("query", *own) else name for name in columns]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["query", *own, *heads])
    for (name, _), some in zip(asked, hits, strict=True):
        for hit in some:
            writer.writerow([name, *(getattr(hit, n) for n in own), *(_cell(hit.meta.get(n)) for n in columns)])
    return file.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(_finite(value), ensure_ascii=False, default=str) if isinstance(value, list | dict) else value


def tables(hits: "Sequence[Sequence[Hit]]") -> list[tuple[tuple[str, ...], list[tuple]]]:
    """Column names and rows for each query; a column of probabilities where there are some."""
    made = []
    for some in hits:
        sure = [f"{h.probability:.2f}" for h in some if h.probability is not None]  # all of a query have one, or none
        head = ("rank", "score", *(["match"] if sure else []), "key", "caption")
        made.append(
            (head, [(h.rank, f"{h.score:.3f}", *sure[i : i + 1], h.key, h.caption) for i, h in enumerate(some)])
        )
    return made


def save_sheet(
    asked: Sequence[Question], hits: "Sequence[Sequence[Hit]]", searcher: "Searcher", path: Path | None
) -> Path:
    """A PNG with a row a query: its text (or picture, where it is one), then its hits, best first, with captions.

    path: None: a temporary file, which stays. Returns where it is.
    """
    from clip_train.sheet import query_sheet, save_sheet

    shown = [_shown(terms, searcher) for _, terms in asked]
    names = [name if picture is None else picture for (name, _), picture in zip(asked, shown, strict=True)]
    pictures = [[searcher.picture_of(hit.row) for hit in some] for some in hits]
    drawn = query_sheet(names, pictures, [[hit.caption for hit in some] for some in hits])
    if path is None:
        descriptor, name = tempfile.mkstemp(prefix="unclip-", suffix=".png")
        os.close(descriptor)
        path = Path(name)
    save_sheet(drawn, path)
    return path


def _shown(terms: Sequence[Term], searcher: "Searcher") -> "Image.Image | None":
    """The picture that a query is."""
    from clip_train.pictures import decode_picture

    if len(terms) == 1 and terms[0].kind == "image":
        return decode_picture(Path(terms[0].value).read_bytes())
    row = searcher.row_of(terms[0].value) if len(terms) == 1 and terms[0].kind == "key" else None
    return None if row is None else searcher.picture_of(row)


def write(path: Path, asked: Sequence[Question], hits: "Sequence[Sequence[Hit]]") -> None:
    """Keep the answers in a file: .csv, or .json."""
    from clip_train.folder import write_file

    write_file(path, writer_of(path)(asked, hits).encode())


def writer_of(path: Path) -> "Callable[[Sequence[Question], Sequence[Sequence[Hit]]], str]":
    """to_json or to_csv, as the name says; UserError if it says neither: asked before a long search, too."""
    write_as = {".json": to_json, ".csv": to_csv}.get(path.suffix.lower())
    if write_as is None:
        raise UserError(f"--out {path}: the name must end in .json or .csv")
    return write_as
