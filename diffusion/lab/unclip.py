"""`lab unclip`: from words to a picture through the space: what the prior is for, what an embedding holds.

Ramesh et al. 2022 (arXiv 2204.06125): section 2 the two stages, 3.1 variations, 3.2 interpolations, 5.1 what becomes of
a decoder that is given a caption's embedding in the place of a picture's.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip_train import metrics
from clip_train.settings import Progress, UserError
from diffusion.generate import Generated, Generator
from diffusion.heldout import HeldOut
from diffusion.judge import chance, round_trip, unit
from diffusion.lab import unclip_figures as figures
from diffusion.lab.chance import above_chance, permutations
from diffusion.lab.experiment import Experiment, Figure, Finding
from diffusion.lab.similarity import contrast
from diffusion.lab.style import drawing, save
from diffusion.manipulate import interpolate

CROSSED = 500  # captions that the prior is asked about
TOSSES = 2000  # of coins, by which chance is known


@dataclass(frozen=True, kw_only=True)
class UnclipConfig:
    """Everything that decides what `lab unclip` shows."""

    count: int = 32  # captions drawn, each in three ways
    seeds: int = 5  # pictures of one embedding, and of one caption
    between: int = 7  # pictures from one embedding to another
    strips: int = 4  # such ways
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 8 or self.seeds < 2 or self.between < 3 or self.strips < 1:
            raise UserError(f"count {self.count} must be at least 8, seeds {self.seeds} at least 2, between "
                            f"{self.between} at least 3, strips {self.strips} at least 1")  # fmt: skip


def unclip(
    config: UnclipConfig, folder: Path, on_progress: Progress | None = None, *, generator: Generator, held: HeldOut
) -> Experiment:
    """The generator (with a prior) on captioned pictures: at least 16. See the findings."""
    if len(held) < 16:
        raise UserError(f"{held.name} holds {len(held)} pictures; 16 are the fewest to look at")
    made, parts = [], (crossing, three_ways, seeds, ways_between)
    for part in parts:
        made.append(part(config, generator, held, folder, _staged(on_progress, part.__name__.replace("_", " "))))
    return Experiment(
        title="unCLIP: from words to a picture",
        figures=[figure for part in made for figure in part.figures],
        findings=[finding for part in made for finding in part.findings],
        tables={name: rows for part in made for name, rows in part.tables.items()},
    )


def crossing(
    config: UnclipConfig, generator: Generator, held: HeldOut, folder: Path, tell: Progress | None = None
) -> Experiment:
    """Captions, the prior's guesses and pictures along the line between the captions' and the pictures' centres."""
    rows = np.random.default_rng(config.seed).permutation(len(held))[:CROSSED]
    captions = [held.captions[row] for row in rows]
    image, text = unit(held.rows[rows]), generator.clip.encode_text(captions).cpu().numpy()
    guess = generator.image_embeddings(captions, config.seed + np.arange(len(rows))).numpy()
    if tell:
        tell(1, 1)
    half = len(rows) // 2
    line = image[:half].mean(axis=0) - text[:half].mean(axis=0)
    line /= max(float(np.linalg.norm(line)), 1e-12)
    middle = (image[:half].mean(axis=0) + text[:half].mean(axis=0)) / 2
    along = {name: (one[half:] - middle) @ line for name, one in (("text", text), ("prior", guess), ("true", image))}
    with drawing():
        save(figures.crossing(along), folder / "crossing.png")
    table = [{"rows": name, "from_pictures_centre": metrics.modality_gap(one, image),
              "cosine_to_own_picture": float(metrics.paired_cosines(one, image).mean())}
             for name, one in (("captions", text), ("prior's guesses", guess))]  # fmt: skip
    left = table[1]["from_pictures_centre"] / table[0]["from_pictures_centre"]
    cosines = guess @ image.T
    orders = permutations(TOSSES, len(rows), np.random.default_rng(config.seed))
    null = contrast(cosines, orders)
    return Experiment(
        title="across the gap",
        figures=[Figure(file="crossing.png", caption="Captions, what the prior makes of them, and pictures, along the "
                        "line between the captions' centre and the pictures'. The decoder only ever saw pictures' "
                        "embeddings; the prior brings a caption to where they are.")],
        findings=[
            Finding(name="gap_left", says="distance of the guesses' centre from the pictures', over the captions'",
                    value=left, high=0.7, unit="x"),
            Finding(name="guess_keeps_its_own", says="and each guess is nearer to its own picture than to others, by a "
                    "mean cosine of", value=float(contrast(cosines)), low=above_chance(null)),
        ],
        tables={"crossing": table},
    )  # fmt: skip


def three_ways(
    config: UnclipConfig, generator: Generator, held: HeldOut, folder: Path, tell: Progress | None = None
) -> Experiment:
    """The same captions from the true picture's embedding, the prior's and the caption's own."""
    picked = different(held, config.count, config.seed)
    captions, noise = [held.captions[row] for row in picked], config.seed + np.arange(len(picked))
    told = {"captions": captions} if generator.decoder.network.config.text else {}
    one, two, three = (_part(tell, number, 3) for number in range(3))
    made = {
        "true": generator.from_embeddings(held.rows[picked], noise, **told, **one),
        "prior": generator.from_captions(captions, noise, **two),
        "text": generator.from_embeddings(generator.clip.encode_text(captions), noise, **told, **three),
    }
    seen = {way: look(generator, made[way]) for way in figures.WAYS}
    with drawing():
        real = held.pictures(picked[: figures.SHOWN], generator.size)
        save(figures.three_ways(real, made, captions), folder / "ways.png")
    rank = {way: np.log(metrics.ranks(seen[way], held.rows, held.groups[picked], held.groups)) for way in figures.WAYS}
    prior_gain, true_gain = rank["text"] - rank["prior"], rank["prior"] - rank["true"]
    tables = [{"way": way, **_plain(round_trip(seen[way], picked, held.rows, held.groups))} for way in figures.WAYS]
    return Experiment(
        title="three ways to a picture",
        figures=[Figure(file="ways.png", caption="One decoder, one seed a column. From the real picture's own "
                        "embedding; from the caption through the prior; from the caption's embedding as it is, which "
                        "lies where no picture does.")],
        findings=[
            _gain("prior_beats_text", "among all pictures CLIP finds the true one by what the prior's way drew sooner "
                  "than by what the caption's own embedding drew: ranks are smaller", prior_gain, config.seed),
            _gain("true_beats_prior", "and sooner still by what the true picture's embedding drew", true_gain,
                  config.seed),
        ],
        tables={"ways": [*tables, {"way": "chance", **chance(picked, len(held), held.groups)}]},
    )  # fmt: skip


def seeds(
    config: UnclipConfig, generator: Generator, held: HeldOut, folder: Path, tell: Progress | None = None
) -> Experiment:
    """What an embedding leaves open, and what a caption does."""
    (row, *_), count = different(held, 2, config.seed + 1), config.seeds
    noise, caption = [config.seed + n for n in range(count)], held.captions[row]
    told = {"captions": [caption] * count} if generator.decoder.network.config.text else {}
    embedding = np.repeat(held.rows[row][None], count, axis=0)
    one, two = (_part(tell, number, 2) for number in range(2))
    groups = {
        "one embedding": generator.from_embeddings(embedding, noise, **told, **one),
        "one caption": generator.from_captions([caption] * count, noise, **two),
    }
    others = different(held, min(config.count, len(held)), config.seed)
    spread = {name: scatter(look(generator, made)) for name, made in groups.items()}
    spread["real pictures of other things"] = scatter(unit(held.rows[others]))
    with drawing():
        save(figures.seeds(held.pictures([row], generator.size)[0], groups, caption), folder / "seeds.png")
    fixed, real = spread["one embedding"], spread["real pictures of other things"]
    return Experiment(
        title="what a seed decides",
        figures=[Figure(file="seeds.png", caption=f'Above: "{caption}" drawn from one embedding with {count} seeds. '
                        "Below: from the caption alone, so that the prior's guess differs, too. An embedding holds "
                        "what the picture is of; the seed decides what is left.")],
        findings=[
            Finding(name="embedding_fixes", says="to CLIP the pictures of one embedding differ by no more than a part "
                    "of what different things differ by", value=fixed / real, high=0.6, unit="x"),
        ],
        tables={"seeds": [{"pictures of": name, "cosine_distance": one} for name, one in spread.items()]},
    )  # fmt: skip


def ways_between(
    config: UnclipConfig, generator: Generator, held: HeldOut, folder: Path, tell: Progress | None = None
) -> Experiment:
    """From one picture's embedding to another's, on the great circle."""
    ends = different(held, 2 * config.strips, config.seed + 2)
    strips, table = [], []
    for number in range(config.strips):
        pair = ends[2 * number : 2 * number + 2]
        made = interpolate(generator, held.rows[pair], config.between, config.seed)
        cosines = look(generator, made) @ unit(held.rows[pair]).T  # (between, 2)
        first, last = held.pictures(pair, generator.size)
        strips.append(([first, *(one.picture for one in made), last], cosines))
        table += [{"strip": number, "share": n / (config.between - 1), "to_first": float(a), "to_last": float(b)}
                  for n, (a, b) in enumerate(cosines)]  # fmt: skip
        if tell:
            tell(number + 1, config.strips)
    with drawing():
        save(figures.strips(strips), folder / "between.png")
    nearer = np.stack([cosines[:, 1] - cosines[:, 0] for _, cosines in strips])  # (strips, between)
    found = trend(nearer).mean()
    orders = permutations(TOSSES * config.strips, config.between, np.random.default_rng(config.seed))
    orders = orders.reshape(TOSSES, config.strips, config.between)
    null = trend(np.take_along_axis(nearer[None], orders, axis=2)).mean(axis=1)
    return Experiment(
        title="between two pictures",
        figures=[Figure(file="between.png", caption="Real pictures at both ends; between them what the decoder draws "
                        "from points on the way from one embedding to the other, all with one seed. Below each: the "
                        "cosine of what CLIP sees in it to the first and to the last.")],
        findings=[
            Finding(name="on_the_way", says="the farther on the way, the more the picture looks to CLIP like the "
                    "second end and the less like the first: correlation, mean over the ways", value=float(found),
                    low=above_chance(null)),
        ],
        tables={"between": table},
    )  # fmt: skip


def different(held: HeldOut, count: int, seed: int) -> np.ndarray:
    """Up to `count` rows, no two with one label as long as there are labels left."""
    order = np.random.default_rng(seed).permutation(len(held))
    first = np.unique(held.groups[order], return_index=True)[1]
    return np.concatenate([order[np.sort(first)], np.delete(order, first)])[:count]


def look(generator: Generator, made: list[Generated]) -> np.ndarray:
    """Unit rows (N, D) of what CLIP sees in the pictures."""
    return unit(generator.seen([one.picture for one in made]).cpu().numpy())


def trend(values: np.ndarray) -> np.ndarray:
    """Pearson correlation of values (..., N) with their places 0 .. N - 1."""
    place = np.arange(values.shape[-1]) - (values.shape[-1] - 1) / 2
    away = values - values.mean(axis=-1, keepdims=True)
    return away @ place / np.maximum(np.linalg.norm(away, axis=-1) * np.linalg.norm(place), 1e-12)


def scatter(rows: np.ndarray) -> float:
    """Mean of 1 - cosine over all pairs of unit rows (N, D)."""
    cosines = rows @ rows.T
    return float(1 - cosines[np.triu_indices(len(rows), 1)].mean())


def _gain(name: str, says: str, gains: np.ndarray, seed: int) -> Finding:
    """gains (N,): logarithms of how many times smaller a rank is. Chance: the same with their signs tossed."""
    signs = np.random.default_rng(seed).choice([-1, 1], (TOSSES, len(gains)))
    null = np.exp((signs * gains).mean(axis=1))
    return Finding(name=name, says=says, value=float(np.exp(gains.mean())), low=above_chance(null), unit="x")


def _staged(on_progress: Progress | None, stage: str) -> Progress | None:
    return on_progress and (lambda done, total, **more: on_progress(done, total, stage=stage))


def _part(tell: Progress | None, number: int, of: int) -> dict[str, Progress]:
    """on_progress of the drawing that is the number-th of `of` equal ones."""
    return {} if tell is None else {"on_progress": lambda done, total: tell(number * total + done, of * total)}


def _plain(figures: dict) -> dict:
    return {key: value for key, value in figures.items() if key != "interval"}
