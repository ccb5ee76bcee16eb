"""Zero-shot classification: class names and templates -> one text row per class -> each picture's nearest class.

CLIP, section 3.1 (Radford et al. 2021, arXiv 2103.00020): a class is the mean of the rows of its prompts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_train import metrics
from clip_train.settings import UserError

# Plain ways to say a class, for pictures of any kind; CLIP's own list speaks of photos.
TEMPLATES = ("{c}", "a {c}", "a picture of {c}", "a picture of a {c}", "an image of {c}", "this is {c}")
PLACES = ("{c}", "{}")  # where the class name goes: CLIP_benchmark's way, and open_clip's


def read_lines(path: Path | str, what: str) -> list[str]:
    """The lines of a UTF-8 text file, stripped, without empty ones. `what` they are is named in the errors."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8, with one of the {what} on each line") from error
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{path} is empty; write one of the {what} on each line")
    return lines


def checked_templates(templates: Sequence[str]) -> list[str]:
    """The templates; UserError for one that has no place for the class, or for none at all."""
    for template in templates:
        if not any(place in template for place in PLACES):
            raise UserError(f"the template {template!r} has no place for the class; write {{c}} where it goes")
    if not templates:
        raise UserError("there are no templates; give at least '{c}'")
    return list(templates)


def prompts(classnames: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """(C * T) prompts, all templates of the first class first."""
    templates = checked_templates(templates)
    return [_filled(template, name) for name in classnames for template in templates]


def _filled(template: str, name: str) -> str:
    for place in PLACES:
        if place in template:
            return template.replace(place, name)
    raise ValueError(f"{template!r} has no place for the class")


def class_rows(prompt_rows: np.ndarray, classes: int) -> np.ndarray:
    """Unit rows (C * T, D) of prompts(...) -> (C, D) unit rows: the mean over a class's templates, made unit again."""
    rows = np.asarray(prompt_rows, dtype=np.float32)
    mean = rows.reshape(classes, -1, rows.shape[1]).mean(axis=1)
    length = np.linalg.norm(mean, axis=1, keepdims=True)
    return mean / np.where(length > 0, length, 1)


def targets(labels: Sequence[str | None], classnames: Sequence[str]) -> np.ndarray:
    """(N,) int64: which class each label names, -1 for None and for labels that are no class.

    A label is a class's name in any case, or its number from 0, as CLIP_benchmark's KEY.cls holds it. Numbers are read
    as numbers only if no label is a name.
    """
    place = {name.lower(): i for i, name in reversed(list(enumerate(classnames)))}
    found = np.array([-1 if label is None else place.get(label.lower(), -1) for label in labels], dtype=np.int64)
    if (found < 0).all():
        numbers = (int(label) if label is not None and label.isdecimal() else -1 for label in labels)
        found = np.array([n if n < len(classnames) else -1 for n in numbers], dtype=np.int64)
    return found


def zero_shot(image: np.ndarray, rows: np.ndarray, target: np.ndarray, classnames: Sequence[str]) -> dict[str, Any]:
    """How often the right class's row is the nearest: accuracy, mean per class recall, and the worst classes.

    image (N, D), rows (C, D): unit rows. target (N,): the right class of each picture, none below 0.
    Returns "samples", "classes" (of which "classes_seen" have pictures), "acc1", "acc5" and "chance" of acc1 (1 / C),
    "mean_per_class_recall" (over the classes that have pictures), and "worst": up to ten classes, worst first, each
    with its "recall", its "pictures", and what they were taken for instead ("confused_with": name -> share).
    A tie with a wrong class counts as wrong.
    """
    rank = metrics.ranks(image, rows, target, np.arange(len(rows)))
    predicted = metrics.nearest(image, rows)
    recall = metrics.class_recalls(rank == 1, target, len(rows))
    seen = np.flatnonzero(~np.isnan(recall))
    worst = []
    for c in sorted(seen.tolist(), key=lambda c: (recall[c], -np.count_nonzero(target == c)))[:10]:
        own = predicted[target == c]
        names, counts = np.unique(own[own != c], return_counts=True)
        order = np.argsort(-counts, kind="stable")[:3]
        mistakes = {classnames[names[i]]: float(counts[i] / len(own)) for i in order}
        worst.append(
            {"class": classnames[c], "recall": float(recall[c]), "pictures": len(own), "confused_with": mistakes}
        )
    return {
        "samples": len(target),
        "classes": len(rows),
        "classes_seen": len(seen),
        "acc1": float((rank <= 1).mean()),
        "acc5": float((rank <= 5).mean()),
        "chance": 1 / len(rows),
        "mean_per_class_recall": float(recall[seen].mean()),
        "worst": [one for one in worst if one["recall"] < 1],
    }
