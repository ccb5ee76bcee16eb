"""Zero-shot labels for a whole set: every row's nearest class, into a Parquet file, block by block.

key | label | score | probability | match | runner_up | margin | given
"""

import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_train import zeroshot
from clip_train.folder import Manifest, read_manifest
from clip_train.settings import Progress, UserError
from clip_train.store import EmbeddingStore, MetadataTable
from retrieval.album import KEY, Album
from retrieval.live import LiveIndex
from retrieval.search import calibration_of, clip_of
from retrieval.where import columns_of, parse

if TYPE_CHECKING:
    import torch

    from clip_train.calibration import Calibration
    from clip_train.model import Clip

BLOCK = 16_384  # rows read at a time
CELLS = 8_000_000  # cosines held at a time
MOST_LABELS = 1000  # labels of the metadata that are taken for classes if none are named
SHOWN = 48  # pictures of a class on its sheet


@dataclass(frozen=True)
class Source:
    """An embeddings or index folder: its rows, and what is known of them."""

    manifest: Manifest
    table: MetadataTable
    usable: np.ndarray  # (rows,) bool: not deleted
    vectors: Callable[[np.ndarray], np.ndarray]  # rows (N,) -> unit rows (N, D) of their pictures
    album: Album

    @classmethod
    def open(cls, folder: Path | str) -> "Source":
        """UserError: neither an embeddings folder nor an index."""
        manifest = read_manifest(folder)
        if manifest.kind == "index":
            live = LiveIndex.open(folder)
            return cls(live.manifest, live.table, live.live, live.vectors, Album.of(live))
        if manifest.kind != "embeddings":
            raise UserError(f"{folder}/ is of kind {manifest.kind}; classify reads what unclip embed or index made")
        store = EmbeddingStore.open(folder)
        return cls(manifest, store.table, np.ones(len(store), dtype=bool), store.image, Album(manifest, store.table))


class Classes:
    """The classes' unit rows, and the scale between cosines and the model's logits."""

    def __init__(self, names: Sequence[str], templates: Sequence[str], clip: "Clip", curve: "Calibration | None"):
        from clip_train.embed import encode_texts

        self.names = list(names)
        said = encode_texts(clip, zeroshot.prompts(names, templates))
        self.rows = zeroshot.class_rows(said, len(self.names))  # (C, D)
        # a class's row is the mean of its prompts' rows made unit: so much longer is its cosine than their mean one
        self._shorter = np.linalg.norm(said.reshape(len(self.names), len(templates), -1).mean(axis=1), axis=1)
        self.scale = float(clip.model.logit_scale.exp().flatten()[0])
        self._curve = curve

    def judge(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Each picture's class: label, runner_up int; score, probability, match, margin float32: (N,) each.

        score: cosine with the class's row. margin: what it has more than the runner-up. probability: softmax over the
        classes at the model's temperature: how sure, if one of them is right. match (calibrated CLIPs only): that it
        is right at all, by the curve at the mean cosine of the class's prompts. With one class, the runner-up is -1.
        """
        cosines = rows @ self.rows.T
        at = np.arange(len(cosines))
        label = cosines.argmax(axis=1)
        score = cosines[at, label]
        odds = np.exp(self.scale * (cosines - score[:, None])).sum(axis=1)
        made = {"label": label, "score": score, "probability": 1 / odds}
        if self._curve is not None:
            made["match"] = self._curve.probability(score * self._shorter[label])
        cosines[at, label] = -np.inf
        second = cosines.argmax(axis=1) if len(self.names) > 1 else np.full(len(cosines), -1)
        made["runner_up"] = second
        made["margin"] = score - cosines[at, second] if len(self.names) > 1 else np.full(len(cosines), np.nan)
        return {name: v if name in ("label", "runner_up") else v.astype(np.float32) for name, v in made.items()}


def classify(
    source: Path | str,
    out: Path | str,
    classnames: Sequence[str] | None = None,
    *,
    templates: Sequence[str] = zeroshot.TEMPLATES,
    clip: Path | str | None = None,
    label_field: str | None = None,
    where: str | None = None,
    sheets: Path | str | None = None,
    device: "str | torch.device" = "cpu",
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Label every picture of an embeddings or index folder, and write the Parquet file `out`, whole or not at all.

    classnames: None: the values of `label_field`, if there are 2 to 1000. templates, classnames: see zeroshot.py.
    clip: where the CLIP is now. where: a filter on the metadata (see where.py). label_field: a column that holds the
    right classes: it comes along as "given", and what is returned has "accuracy", "mean_per_class_recall", "labelled"
    rows and "chance". sheets: a folder for a contact sheet of each class: its surest pictures, by margin.
    Returns rows, classes, counts (class -> rows), temperature (1 / the model's scale), calibrated, and the above.
    """
    given = Source.open(source)
    labels = _label_kinds(given, label_field) if label_field else {}
    names = _checked(classnames, labels, label_field)
    templates = zeroshot.checked_templates(templates)
    curve = calibration_of(given.manifest, clip)
    classes = Classes(names, templates, clip_of(given.manifest, clip, device), curve)
    chosen = given.usable if where is None else given.usable & parse(where).mask(given.table)
    total = int(np.count_nonzero(chosen))
    if not total:
        raise UserError(f"{source}/: no row {'passes the filter' if where else 'is left'}")

    counts, pairs, best, done = np.zeros(len(names), dtype=np.int64), Counter(), Best(len(names)), 0
    about = {
        "command": "unclip classify",
        "source": given.manifest.fingerprint,
        "clip": given.manifest.inputs["clip"]["fingerprint"],
        "templates": templates,
        "where": where,
    }
    with ParquetFile(Path(out), about) as file:
        for rows, keys, truth in _blocks(given, chosen, label_field, len(names)):
            found = classes.judge(given.vectors(rows))
            file.write(_table(keys, found, names, truth if label_field else None))
            counts += np.bincount(found["label"], minlength=len(names))
            pairs.update(zip(truth, found["label"].tolist(), strict=True) if label_field else ())
            if sheets is not None:
                best.add(rows, found)
            done += len(rows)
            if on_progress:
                on_progress(done, total)
    figures = {
        "rows": total,
        "classes": len(names),
        "counts": dict(zip(names, counts.tolist(), strict=True)),
        "temperature": 1 / classes.scale,
        "calibrated": curve is not None,
    }
    if label_field:
        figures |= agreement(pairs, names, label_field)
    if sheets is not None:
        figures["sheets"] = [str(path) for path in best.save(Path(sheets), given, names, counts)]
    return figures


def agreement(pairs: Counter, names: Sequence[str], label_field: str) -> dict[str, Any]:
    """How often a given label is the class that was found. pairs: (label or None, found class) -> rows.

    Without "accuracy" and "mean_per_class_recall" if no label is a class.
    """
    said = list({label for label, _ in pairs})
    target = dict(zip(said, zeroshot.targets(said, names).tolist(), strict=True))
    of, right = np.zeros(len(names), dtype=np.int64), np.zeros(len(names), dtype=np.int64)
    for (label, found), rows in pairs.items():
        if target[label] >= 0:
            of[target[label]] += rows
            right[target[label]] += rows * (found == target[label])
    figures = {"label_field": label_field, "labelled": int(of.sum()), "chance": 1 / len(names)}
    figures["without_class"] = sum(pairs.values()) - figures["labelled"]
    if of.any():
        seen = of > 0
        figures["accuracy"] = float(right.sum() / of.sum())
        figures["mean_per_class_recall"] = float((right[seen] / of[seen]).mean())
    return figures


class Best:
    """The surest rows of every class, by margin, while the blocks go by."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._kept = {"row": np.empty(0, np.int64), "label": np.empty(0, np.int64), "by": np.empty(0, np.float32)}
        self._kept["probability"] = np.empty(0, np.float32)

    def add(self, rows: np.ndarray, found: dict[str, np.ndarray]) -> None:
        by = found["margin"] if self._classes > 1 else found["score"]
        new = {"row": rows, "label": found["label"], "by": by, "probability": found["probability"]}
        both = {name: np.concatenate([old, new[name]]) for name, old in self._kept.items()}
        order = np.lexsort((-both["by"], both["label"]))
        label = both["label"][order]
        place = np.arange(len(order)) - np.searchsorted(label, label)  # within its class
        self._kept = {name: values[order[place < SHOWN]] for name, values in both.items()}

    def save(self, folder: Path, source: Source, names: Sequence[str], counts: np.ndarray) -> Iterator[Path]:
        """A contact sheet of each class that has pictures; the paths, as they are written."""
        from clip_train.sheet import contact_sheet, save_sheet

        digits = len(str(len(names) - 1))
        for c in np.unique(self._kept["label"]).tolist():
            mine = self._kept["label"] == c
            rows, sure = self._kept["row"][mine].tolist(), self._kept["probability"][mine].tolist()
            words = [f"{p:.2f} {source.table.row(row).get('caption', '')}" for row, p in zip(rows, sure, strict=True)]
            title = f"{names[c]}: {counts[c]} pictures"
            path = folder / f"{c:0{digits}d}-{re.sub(r'[^0-9a-z]+', '-', names[c].lower()).strip('-')[:60]}.png"
            save_sheet(contact_sheet([source.album.picture(row) for row in rows], words, title=title), path)
            yield path


class ParquetFile:
    """A Parquet file that is written table by table, and has its name only when it is whole."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path, self._about = path, about
        self._temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")  # of this run, not of another
        self._writer = None

    def __enter__(self) -> "ParquetFile":
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.touch()
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error
        return self

    def write(self, table: Any) -> None:
        """The tables must be of one schema."""
        import pyarrow.parquet as pq

        table = table.replace_schema_metadata({"unclip": json.dumps(self._about)})
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._temporary, table.schema)
        self._writer.write_table(table)

    def __exit__(self, kind: type | None, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()
        if kind is None:
            os.replace(self._temporary, self._path)
        else:
            self._temporary.unlink(missing_ok=True)


def _blocks(
    source: Source, chosen: np.ndarray, label_field: str | None, classes: int
) -> Iterator[tuple[np.ndarray, Any, list[str | None]]]:
    """(rows, their keys, their labels): blocks of the chosen rows, part of the metadata after part."""
    size = max(1, min(BLOCK, CELLS // classes))
    columns = (KEY, label_field) if label_field else (KEY,)
    for part, (first, end) in enumerate(zip(source.table.starts, source.table.starts[1:], strict=False)):
        mine = np.flatnonzero(chosen[first:end])
        if not len(mine):
            continue
        table = source.table._read(part, columns)
        for low in range(0, len(mine), size):
            some = mine[low : low + size]
            there = label_field in table.column_names
            labels = table.column(label_field).take(some).to_pylist() if there else [None] * len(some)
            truth = [None if label is None else str(label) for label in labels]
            yield some + int(first), table.column(KEY).take(some), truth


def _table(keys: Any, found: dict[str, np.ndarray], names: Sequence[str], truth: list[str | None] | None) -> Any:
    import pyarrow as pa

    choices = pa.array(list(names))
    columns = {"key": keys.cast(pa.string())}
    for name, values in found.items():
        if name in ("label", "runner_up"):
            values = choices.take(pa.array(values, mask=values < 0))
        columns[name] = values
    order = ["key", "label", "score", "probability", "match", "runner_up", "margin"]
    columns = {name: columns[name] for name in order if name in columns}
    return pa.table(columns if truth is None else columns | {"given": pa.array(truth, pa.string())})


def _label_kinds(source: Source, label_field: str) -> Counter:
    """How many rows have each value of the label column."""
    kinds = columns_of(source.table)
    if label_field not in kinds:
        raise UserError(f"{source.manifest.folder}/ has no column {label_field!r}; there are: {', '.join(kinds)}")
    if "list" in kinds[label_field] or kinds[label_field] == "other":
        raise UserError(f"the column {label_field!r} holds a {kinds[label_field]} in each row, not one label")
    counts: Counter[str] = Counter()
    for part in range(len(source.table.counts)):
        table = source.table._read(part, (label_field,))
        if label_field in table.column_names:
            for entry in table.column(label_field).value_counts().to_pylist():
                if entry["values"] is not None:
                    counts[str(entry["values"])] += entry["counts"]
    return counts


def _checked(classnames: Sequence[str] | None, labels: Counter, label_field: str | None) -> list[str]:
    if classnames is None:
        if label_field is None:
            raise UserError("there are no classes; name them, or the column that holds them: --label-field")
        classnames = sorted({label.lower(): label for label in sorted(labels) if label.strip()}.values())
        if not 2 <= len(classnames) <= MOST_LABELS:
            raise UserError(
                f"the column {label_field!r} has {len(classnames)} different labels; as classes, 2 to {MOST_LABELS} "
                "are taken: write those that are meant into a file, --classnames FILE"
            )
    names = [name.strip() for name in classnames]
    twice = [name for name, n in Counter(name.lower() for name in names).items() if n > 1]
    if twice:
        raise UserError(f"the class {twice[0]!r} is there twice; classes must differ")
    if not names or not all(names):
        raise UserError("there are no classes, or one is empty; write a name each")
    if label_field is not None and (zeroshot.targets(list(labels), names) < 0).all():
        raise UserError(
            f"none of the {len(labels)} labels in the column {label_field!r} is one of the {len(names)} classes "
            f"({names[0]!r}, ...){_for_example(labels)}; write the classes as the labels are, or name another column"
        )
    return names


def _for_example(labels: Counter) -> str:
    return f"; one says {next(iter(labels))!r}" if labels else ""
