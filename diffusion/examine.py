"""Examine: draw held-out pictures in one or several ways, and put the same figures on each way and on the real ones."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_train.fit import resolved_precision
from clip_train.folder import Input, Workspace, read_manifest
from clip_train.model import Clip
from clip_train.settings import Progress, UserError, config_to_json, override
from diffusion.features import Features, open_features
from diffusion.generate import Generated, Generator, Sampling
from diffusion.heldout import HeldOut
from diffusion.judge import Judge
from diffusion.provenance import save_png, short

STARTS = ("true", "prior", "text")


@dataclass(frozen=True)
class Way:
    """A way to a picture: the generator, and what it starts from.

    "true": the picture's own image embedding. "prior": its caption, through the prior. "text": its caption's embedding
    in the place of an image embedding. A decoder that reads text reads the caption in all of them.
    """

    generator: Generator
    start: str = "true"

    def draw(self, held: HeldOut, rows: Sequence[int], seeds: Sequence[int], how: Sampling) -> list[Generated]:
        """The pictures of some rows, as one batch."""
        generator, captions = self.generator, [held.captions[row] for row in rows]
        more = {"batch_size": max(1, len(rows))}
        if self.start == "prior":
            return generator.from_captions(captions, seeds, how, **more)
        if generator.decoder.network.config.text:
            more["captions"] = captions
        vectors = held.rows[np.asarray(rows)] if self.start == "true" else generator.clip.encode_text(captions)
        return generator.from_embeddings(vectors, seeds, how, **more)


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What is asked of every way."""

    count: int = 500  # pictures drawn; as many real ones are compared with
    seed: int = 0  # decides which, and each one's noise
    features: tuple[str, ...] = ("clip",)  # see features.py; "clip": the decoder's own
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.count < 20 or self.batch_size < 1 or self.seed < 0:
            raise UserError(
                f"count {self.count} must be at least 20, batch_size and seed {self.seed} not below 1 and 0"
            )


def examine(
    ways: Mapping[str, Way],
    held: HeldOut,
    how: Sampling | None = None,
    exam: Exam | None = None,
    *,
    keep: Path | str | None = None,
    on_progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, list[Image.Image]]]:
    """Draw and judge each way. keep: a folder for the pictures; a killed run goes on from it.

    Returns figures: count, size in pixels, sampling, fingerprints, "ways" (Judge's figures of each, and of "real": the
    real pictures in their place), "chance"; and the pictures of each way in the order of the rows drawn, "real" too.
    """
    exam = exam or Exam()
    first = next(iter(ways.values())).generator
    how = how or first.how
    how = replace(how, precision=resolved_precision(how.precision, first.device))
    picked, others = held.split(exam.count, exam.seed)
    seeds = [exam.seed + number for number in range(len(picked))]
    judge = Judge(held, picked, others, first.clip, extractors(exam, first), exam.seed, on_progress)
    fingerprints = {name: dict(way.generator.fingerprints) for name, way in ways.items()}
    space = keep and Workspace.open(
        keep,
        "pictures",
        {"sampling": config_to_json(how), "count": len(picked), "seed": exam.seed, "models": fingerprints}
        | {"starts": {name: way.start for name, way in ways.items()}},
        {"held": Input(held.fingerprint, held.shards or held.name)},
        "unclip evaluate --pictures",
    )
    made, figures = {}, {}
    for name, way in ways.items():
        folder = space.path / name.replace(" ", "-") if space else None
        made[name] = draw(way, held, picked, seeds, how, exam.batch_size, folder, _staged(on_progress, f"draw {name}"))
    if space and not space.done:
        space.publish({"pictures": sum(map(len, made.values()))})
    for name, pictures in made.items():
        figures[name] = judge(pictures)
    size = next(iter(made.values()))[0].size[0]
    figures["real"] = judge.real(size)
    made["real"] = held.pictures(picked, size)
    asked = {"count": len(picked), "size": size, "held": held.name, "seed": exam.seed}
    asked["captions"] = [held.captions[row] for row in picked]
    told = {"sampling": config_to_json(how), "fingerprints": fingerprints}
    return asked | {"ways": figures, "chance": judge.chance()} | told, made


def draw(
    way: Way,
    held: HeldOut,
    rows: Sequence[int],
    seeds: Sequence[int],
    how: Sampling,
    batch_size: int = 64,
    folder: Path | None = None,
    on_progress: Progress | None = None,
) -> list[Image.Image]:
    """The pictures of some rows, those that `folder` holds already from there."""
    out: list[Image.Image] = []
    for start in range(0, len(rows), batch_size):
        some = range(start, min(start + batch_size, len(rows)))
        paths = [folder / f"{number:06d}.png" for number in some] if folder else []
        found = [_read(path) for path in paths]
        if not found or None in found:
            made = way.draw(held, [int(rows[i]) for i in some], [int(seeds[i]) for i in some], how)
            found = [one.picture for one in made]
            for one, path in zip(made, paths, strict=bool(paths)):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_png(one.picture, path.with_suffix(".part"), one.provenance)
                os.replace(path.with_suffix(".part"), path)
        out += found
        if on_progress:
            on_progress(len(out), len(rows))
    return out


def open_generator(
    decoder: Path | str,
    prior: Path | str | None = None,
    clip: Path | str | None = None,
    *,
    embeddings: Path | str | None = None,
    device: Any = "cpu",
    **more: Any,
) -> Generator:
    """Generator.open with the decoder's CLIP in any case, since the judge looks through it."""
    clip = clip or read_manifest(decoder, "decoder").input_path("clip")
    if clip is None:
        raise UserError(f"the CLIP that {decoder}/ was trained with is not where it was; say where: --clip")
    return Generator.open(decoder, prior, clip, embeddings=embeddings, device=device, **more)


def open_held(
    embeddings: Path | str | None, shards: str | None, generator: Generator, on_progress: Progress | None = None
) -> HeldOut:
    """The pictures to examine on, of the generator's CLIP; UserError if their rows are of another."""
    if embeddings is None:
        if shards is None:
            raise UserError("say what to examine on: --embeddings (made by unclip embed), or --shards")
        return HeldOut.of_shards(shards, generator.clip, on_progress)
    clip = read_manifest(embeddings, "embeddings").inputs["clip"]["fingerprint"]
    if clip != generator.fingerprints["clip"]:
        raise UserError(
            f"{embeddings}/ is of CLIP {short(clip)}, the decoder of {short(generator.fingerprints['clip'])}; embed "
            f"again with the latter: unclip embed"
        )
    return HeldOut.open(embeddings, shards)


def drawing(generator: Generator, settings: Sequence[str] = ()) -> Sampling:
    """How a generator draws by itself, with KEY=VALUE settings of Sampling on top."""
    return override([generator.how], settings)[0]


def extractors(exam: Exam, generator: Generator) -> list[Features]:
    """The features that the exam asks for, those of the generator's own CLIP by its name \"clip\"."""
    own: Clip = generator.clip
    return [open_features(own if spec == "clip" else spec, generator.device) for spec in exam.features]


def _read(path: Path) -> Image.Image | None:
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None


def _staged(on_progress: Progress | None, stage: str) -> Progress | None:
    return None if on_progress is None else lambda done, total: on_progress(done, total, stage=stage)
