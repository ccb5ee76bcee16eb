"""`lab space`: the space that pictures and captions share, seen through one CLIP and a set of captioned pictures.

Bands begin above what chance reaches once in a hundred rearrangements of the same data (chance.py). What asks whether a
picture and its caption belong together no untrained CLIP passes. Some findings are of any network and pass before
training, too: the gap, the map (which only asks whether it shows the space), and sums of texts, since words that share
letters share tokens; therefore these are held against the same network untrained.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_train import arithmetic, zeroshot
from clip_train.embed import encode_texts
from clip_train.model import Clip
from clip_train.pictures import decode_picture
from clip_train.settings import Progress, UserError
from clip_train.shards import ShardSet
from diffusion.lab import choice, gap, neighbours, similarity, sums
from diffusion.lab.bench import Bench
from diffusion.lab.chance import permutations
from diffusion.lab.experiment import Experiment, Finding
from diffusion.lab.pairs import Pairs, square

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """What is looked at; all of it comes from the shards unless it is given."""

    count: int = 2000  # pictures, drawn at random
    batch: int = 128  # of them in the cosine matrix, no two with one name
    mapped: int = 160  # of them on the map
    sums: int = 3  # shown of those that the names hold
    expressions: tuple[str, ...] = ()  # to show instead, such as "person with hat - person"
    words: tuple[str, ...] = ()  # to rank; default: the commonest of names and captions
    most_words: int = 2000
    classes: tuple[str, ...] = ()  # names to choose from for the one picture; default: the commonest
    most_classes: int = 200
    picture: str = ""  # key in the shards, or file, of the one picture; default: one of the batch
    label_field: str = "label"  # of the samples' json; "cls": KEY.cls
    permutations: int = 2000  # by which chance is known
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("count", 8), ("batch", 8), ("mapped", 8), ("sums", 1), ("permutations", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)} must be at least {least}")
        for name in ("words", "classes"):
            given = getattr(self, name)
            if given and len({one.lower() for one in given}) < 2:
                raise UserError(f"{name} {given!r}: give at least two, or none to take those of the shards")
        for expression in self.expressions:
            arithmetic.parse(expression)


def space(
    config: SpaceConfig, folder: Path, on_progress: Progress | None = None, *, clip: Clip, samples: ShardSet
) -> Experiment:
    """Cosine matrix, map, modality gap, arithmetic with texts and pictures, zero-shot choice, temperature."""
    picture = _asked_picture(config, samples)
    report = partial(on_progress, stage="pictures") if on_progress else None
    pairs = Pairs.read(clip, samples, config.count, config.seed, config.label_field, report)
    bench = Bench(config, folder, clip, pairs, picture)
    batch = pairs.batch(config.batch, config.seed)
    if len(batch) < 8:
        raise UserError(f"only {len(batch)} of {len(pairs)} pictures differ in name and caption; 8 are needed")
    parts = (
        ("matrix", _matrix),
        ("map", _map),
        ("gap", _gap),
        ("sums", sums.arithmetic_sums),
        ("zero-shot", _zero_shot),
        ("temperature", _temperature),
    )
    for done, (stage, part) in enumerate(parts):
        if on_progress:
            on_progress(done, len(parts), stage=stage)
        part(bench, batch)
    if on_progress:
        on_progress(len(parts), len(parts), stage="figures")
    title = "One space for pictures and captions"
    return Experiment(title=title, figures=bench.figures, findings=bench.findings, tables=bench.tables)


def _matrix(bench: Bench, batch: np.ndarray) -> None:
    cosines = similarity.similarity(bench.pairs, batch)
    bench.show("pairs.png", "Seven pictures, seven captions, every cosine: own pairs are brightest, on the diagonal.",
               lambda path: similarity.draw_pairs(path, bench.pairs, batch))  # fmt: skip
    bench.show("batch.png", f"The same for a batch of {len(batch)}: training brightens the diagonal, darkens the rest.",
               lambda path: similarity.draw_batch(path, cosines))  # fmt: skip
    null = permutations(bench.config.permutations, len(batch), bench.rng(0))
    bench.above("diagonal", "a picture is nearer to its own caption than to others, by a mean cosine of",
                float(similarity.contrast(cosines)), similarity.contrast(cosines, null))  # fmt: skip
    for name, says, one in (
        ("picture_to_text", "pictures find their own caption in the batch", cosines),
        ("text_to_picture", "captions find their own picture in the batch", cosines.T),
    ):
        bench.above(name, says, float(similarity.matched(one)), similarity.matched(one, null), "%")


def _map(bench: Bench, batch: np.ndarray) -> None:
    config, pairs = bench.config, bench.pairs
    rows = pairs.batch(config.mapped, config.seed)
    image, text = pairs.image[rows], pairs.text[rows]
    image, text = image - image.mean(axis=0), text - text.mean(axis=0)  # or the gap would be all there is to see
    both = np.concatenate([image, text])
    flat, plain = neighbours.tsne(both), neighbours.principal(both)
    size = len(rows)
    k = min(10, size // 4)
    kept, null = neighbours.kept_neighbours(image, flat[:size], k, config.permutations, config.seed)
    by_axes, _ = neighbours.kept_neighbours(image, plain[:size], k)
    bench.show("map.png", "Pictures on a flat map, each joined to its caption's point. Look for kinds that gather: "
               "the map was made from cosines alone.",
               lambda path: neighbours.draw_map(path, pairs, rows, flat[:size], flat[size:]))  # fmt: skip
    bench.above("map", f"of a picture's {k} nearest on the map, so many are among its {k} nearest in the space", kept,
                null, "%")  # fmt: skip
    shares = (("t-SNE", kept), ("two main axes", by_axes), ("chance", k / (size - 1)))
    bench.tables["map"] = [{"map": name, "neighbours_kept": share} for name, share in shares]


def _gap(bench: Bench, batch: np.ndarray) -> None:
    config, pairs = bench.config, bench.pairs
    found = gap.measure(pairs.image, pairs.text, config.permutations, config.seed)
    bench.show("gap.png", "Pictures and captions, seen from the side: two clouds, though every grey line joins a pair. "
               "Line and plane were found with other pairs than those drawn.",
               lambda path: gap.draw(path, found))  # fmt: skip
    bench.above("gap", "pictures and captions have centres that lie apart", found.distance, found.distances_by_chance)
    bench.above("gap_parted", "a plane half way between them parts pictures from captions", found.parted,
                found.parted_by_chance, "%")  # fmt: skip
    moved = gap.closed(pairs.image, pairs.text)
    sides = (("as it is", pairs.image, pairs.text), ("gap closed", *moved))
    bench.tables["gap"] = [
        {"space": name, "picture_to_text": float(similarity.matched(image[batch] @ text[batch].T))}
        for name, image, text in sides
    ]


def _zero_shot(bench: Bench, batch: np.ndarray) -> None:
    config, pairs = bench.config, bench.pairs
    distinct = {name.lower(): name for name in reversed(pairs.names)}
    common = Counter(name.lower() for name in pairs.names).most_common(config.most_classes)
    names = list(config.classes) or [distinct[name] for name, _ in common]
    rows = zeroshot.class_rows(encode_texts(bench.clip, zeroshot.prompts(names)), len(names))
    target = zeroshot.targets(pairs.names, names)
    inside = np.flatnonzero(target >= 0)
    if len(inside) >= 8:
        nearest = (pairs.image[inside] @ rows.T).argmax(axis=1)
        orders = permutations(config.permutations, len(inside), bench.rng(2))
        null = (nearest == target[inside][orders]).mean(axis=1)
        bench.above("zero_shot", f"pictures find their name among {len(names)}, though no classifier was trained",
                    float((nearest == target[inside]).mean()), null, "%")  # fmt: skip
    if bench.picture:
        picture, truth = bench.picture
        row = bench.clip.encode_image(bench.clip.to_pixels(picture)[None]).numpy()[0]
    else:
        first = next((i for i in batch.tolist() if target[i] >= 0), batch[0])
        picture, truth, row = pairs.thumbnail(first, 256), pairs.names[first], pairs.image[first]
    cosines, large = rows @ row, square(picture, 256)
    share = choice.probabilities(cosines, pairs.scale)
    bench.tables["zero_shot"] = [
        {"name": names[i], "cosine": float(cosines[i]), "probability": float(share[i])}
        for i in np.argsort(-cosines, kind="stable")[:10].tolist()
    ]
    bench.show("zero_shot.png", "One picture and the names nearest to it, as probabilities at the CLIP's temperature.",
               lambda path: choice.draw_zero_shot(path, large, names, cosines, pairs.scale, truth))  # fmt: skip


def _temperature(bench: Bench, batch: np.ndarray) -> None:
    pairs = bench.pairs
    cosines = similarity.similarity(pairs, batch)
    (own,) = choice.at_scales(cosines, [pairs.scale])
    curve = choice.at_scales(cosines, choice.SCALES)
    bench.tables["temperature"] = [{**own, "own": True}, *({**row, "own": False} for row in curve)]
    says = f"choosing among {len(batch)} captions at the CLIP's own temperature costs less than a blind guess"
    bench.findings.append(
        Finding(name="loss", says=says, value=own["loss"], high=float(np.log(len(batch))), unit="nats")
    )
    heats = [("hot", pairs.scale / 4), ("its own", pairs.scale), ("cold", pairs.scale * 4)]
    captions = [pairs.captions[i] for i in batch.tolist()]
    picture = square(pairs.thumbnail(batch[0], 256), 256)
    bench.show("temperatures.png", "One picture's choice among the captions at three temperatures: the order never "
               "changes, the confidence does.",
               lambda path: choice.draw_temperatures(path, picture, captions, cosines[0], heats, 0))  # fmt: skip
    bench.show("temperature.png", "What the temperature does to a whole batch: loss at the left, confidence beside "
               "what is right at the right. Where they cross, the CLIP believes as much as it knows.",
               lambda path: choice.draw_curves(path, curve, pairs.scale, len(batch)))  # fmt: skip


def _asked_picture(config: SpaceConfig, samples: ShardSet) -> tuple["Image.Image", str | None] | None:
    """The one picture that was asked for, and its name if it is of the shards."""
    if not config.picture:
        return None
    row, truth = samples.row_of(config.picture), None
    try:
        if row is None:
            data = Path(config.picture).read_bytes()
        else:
            data, (captions, label) = samples.picture(row), samples.about(row, config.label_field)
            truth = label or captions[0]
        return decode_picture(data), truth
    except OSError as error:
        raise UserError(f"--picture {config.picture} is no key of the shards and no file ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"--picture {config.picture}: {error}") from error
