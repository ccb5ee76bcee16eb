"""How sums of pictures and texts are best made: each kind's rows as they are, or with its mean taken off first?

    python benchmarks/query_algebra.py --embeddings emb-val --clip clip

Questions whose answers are known from the labels: a picture (or caption) of "red heart" - "red" + "blue" is to find the
pictures of "blue heart". Families: colour, skin tone, woman and man. The picture
asked with is not counted. The figures are the mean of 1 / rank of the first right picture.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable

import numpy as np

sys.path.pop(0)  # this folder: a benchmark beside this one has the name of the package
from clip_train.embed import encode_texts  # noqa: E402
from clip_train.model import Clip  # noqa: E402
from clip_train.store import EmbeddingStore  # noqa: E402

COLOURS = "red blue green orange yellow purple brown black white".split()
TONES = [f"{tone} skin tone" for tone in ("medium-light", "medium-dark", "light", "medium", "dark")]
WEIGHTS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
Row = np.ndarray
Sum = Callable[[Row, Row, Row | None, float], Row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", required=True)
    parser.add_argument("--clip", required=True)
    parser.add_argument("--questions", type=int, default=300, help="at most, of each family")
    parser.add_argument("--out", help="write the figures to this json file")
    options = parser.parse_args()
    store, clip = EmbeddingStore.open(options.embeddings), Clip.load(options.clip)
    image, labels = store.image(), store.table.column("label")
    mean_image, mean_text = image.mean(axis=0), store.text().mean(axis=0)
    asked = questions(labels, options.questions)
    said = sorted({text for some in asked.values() for one in some for text in one})
    rows = dict(zip(said, encode_texts(clip, said), strict=True))
    places = {label: np.flatnonzero(np.array(labels) == label) for label in set(labels)}

    def plain(x: Row, plus: Row, minus: Row | None, weight: float) -> Row:
        return x + weight * (plus if minus is None else plus - minus)

    def centred(x: Row, plus: Row, minus: Row | None, weight: float) -> Row:
        start = x - (mean_image if x_is_image else mean_text)
        return start + weight * (plus - mean_text if minus is None else plus - minus)

    def unit_centred(x: Row, plus: Row, minus: Row | None, weight: float) -> Row:
        start = unit(x - (mean_image if x_is_image else mean_text))
        return start + weight * (unit(plus - mean_text) - (0 if minus is None else unit(minus - mean_text)))

    sums: dict[str, Sum] = {"plain": plain, "centred": centred, "unit centred": unit_centred}
    gap = float(np.linalg.norm(mean_image - mean_text))
    figures = {"rows": len(image), "gap": gap, "questions": {name: len(some) for name, some in asked.items()}}
    print(f"{len(image)} pictures, gap {gap:.3f}, questions {figures['questions']}")
    print("from     change     sum           weight  " + "  ".join(f"{name:>7}" for name in asked) + "      all")
    for x_is_image in (True, False):
        for change in ("+b -a", "+b"):
            for name, make in sums.items():
                for weight in WEIGHTS:
                    found = []
                    for some in asked.values():
                        draw = random.Random(0)
                        at = [int(draw.choice(places[label])) for label, *_ in some]
                        starts = image[at] if x_is_image else np.stack([rows[label] for label, *_ in some])
                        minus = [rows[a] if change == "+b -a" else None for _, _, a, _ in some]
                        made = [
                            make(x, rows[b], less, weight) for x, less, (*_, b) in zip(starts, minus, some, strict=True)
                        ]
                        found.append(reciprocal_rank(image, np.stack(made), at, places, some, x_is_image))
                    start = "picture" if x_is_image else "text"
                    figures[f"{start}, {change}, {name}, {weight}"] = found
                    found.append(float(np.average(found, weights=[len(some) for some in asked.values()])))
                    cells = "  ".join(f"{value:7.3f}" for value in found)
                    print(f"{start:8} {change:10} {name:13} {weight:6}  {cells}")
    if options.out:
        with open(options.out, "w") as file:
            json.dump(figures, file, indent=1)


def reciprocal_rank(image, made, at, places, some, x_is_image) -> float:
    """The mean of 1 / rank of the first right picture for the sums `made` (Q, D)."""
    ranks = []
    for n, score in enumerate((image @ made.T).T):
        if x_is_image:
            score[at[n]] = -np.inf  # the picture asked with
        ranks.append(1 + np.count_nonzero(score > score[places[some[n][1]]].max()))
    return float(np.mean(1 / np.array(ranks)))


def questions(labels: list[str], most: int) -> dict[str, list[tuple[str, str, str, str]]]:
    """(label asked with, label that is right, word to take off, word to add), by family."""
    there = sorted(set(labels))
    families = {
        "colour": changed(there, COLOURS, r"\b{}\b"),
        "tone": changed(there, TONES, r"(?<=with ){}$"),
        "gender": changed(there, ["man", "woman"], r"\b{}\b"),
    }
    for some in families.values():
        random.Random(0).shuffle(some)
    return {name: some[:most] for name, some in families.items()}


def changed(labels: list[str], words: list[str], pattern: str) -> list[tuple[str, str, str, str]]:
    out = []
    for label in labels:
        for a in words:
            if re.search(pattern.format(re.escape(a)), label):
                swapped = [(b, re.sub(pattern.format(re.escape(a)), b, label)) for b in words if b != a]
                out += [(label, other, a, b) for b, other in swapped if other in labels]
                break
    return out


def unit(row: Row) -> Row:
    return row / np.linalg.norm(row)


if __name__ == "__main__":
    main()
