"""What is to be drawn: captions or embeddings, each with what its record is to say; drawn into a gallery in batches."""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_train.fit import resolved_precision
from clip_train.settings import Progress, UserError, config_to_json
from clip_train.sheet import contact_sheet, save_sheet
from clip_train.store import EmbeddingStore, read_vectors
from diffusion.gallery import Gallery
from diffusion.generate import Generated, Generator, Sampling
from diffusion.manipulate import frames_of
from diffusion.neighbours import key_row, nearest
from diffusion.samplers import OnStep

FRAMES = 8  # of a strip


@dataclass(frozen=True)
class Asked:
    """N pictures to draw. rows None: the prior makes them of the captions; else the captions stand beside them."""

    labels: list[str]
    captions: list[str] | None = None
    rows: np.ndarray | None = None  # (N, D)
    tasks: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of_captions(cls, captions: Sequence[str]) -> "Asked":
        """Through the prior."""
        return cls(list(captions), captions=list(captions))

    @classmethod
    def of_vectors(cls, path: Path | str) -> "Asked":
        """The rows of a .npy file."""
        rows = read_vectors(path)
        return cls([f"{Path(path).name} {n}" for n in range(len(rows))], rows=rows)

    @classmethod
    def of_keys(cls, store: EmbeddingStore, keys: Sequence[str]) -> "Asked":
        """Samples of an embeddings folder."""
        rows = np.stack([key_row(store, key) for key in keys])
        return cls(list(keys), rows=rows, tasks=[{"name": "key", "key": key} for key in keys])

    @classmethod
    def of_neighbours(cls, generator: Generator, store: EmbeddingStore, captions: Sequence[str], k: int) -> "Asked":
        """The middle of the k pictures nearest to each caption, in the prior's place; see neighbours.py."""
        if generator.clip is None:
            raise UserError(
                "neighbours of a caption need the CLIP that the decoder was trained with; say where: --clip"
            )
        found = [nearest(store, row, k) for row in generator.clip.encode_text(list(captions)).numpy()]
        tasks = [{"name": "neighbours", "keys": one.keys} for one in found]
        return cls(list(captions), list(captions), np.stack([one.middle for one in found]), tasks)

    def repeated(self, count: int) -> "Asked":
        """Each of them `count` times in a row."""
        return self.some([n for n in range(len(self)) for _ in range(count)])

    def some(self, which: Sequence[int]) -> "Asked":
        """Those with these numbers."""
        picked = [None if part is None else [part[n] for n in which] for part in (self.captions, self.tasks)]
        rows = None if self.rows is None else self.rows[list(which)]
        return Asked([self.labels[n] for n in which], picked[0], rows, picked[1])

    def records(self, generator: Generator, seeds: Sequence[int], how: Sampling) -> list[dict[str, Any]]:
        """What the pictures' records will say, as far as it is known before they are drawn."""
        sampling = config_to_json(replace(how, precision=resolved_precision(how.precision, generator.device)))
        records = [{"seed": int(seed), "sampling": sampling} for seed in seeds]
        for n, record in enumerate(records):
            if self.captions is not None:
                record["caption"] = self.captions[n]
            if self.tasks is not None:
                record["task"] = self.tasks[n]
        if self.rows is not None:
            for record, row in zip(records, generator.rows(self.rows).numpy(), strict=True):
                record["embedding"] = base64.b64encode(row.astype("<f4").tobytes()).decode()
        return records

    def draw(
        self, generator: Generator, seeds: Sequence[int], how: Sampling, on_step: OnStep = None
    ) -> list[Generated]:
        """The pictures, as one batch."""
        more = {"batch_size": len(self), "on_step": on_step}
        if self.rows is None:
            return generator.from_captions(self.captions, seeds, how, **more)
        return generator.from_embeddings(self.rows, seeds, how, captions=self.captions, tasks=self.tasks, **more)


def fill(
    gallery: Gallery,
    generator: Generator,
    asked: Asked,
    seeds: Sequence[int],
    how: Sampling,
    *,
    batch_size: int = 16,
    strips: bool = False,
    on_progress: Progress | None = None,
) -> Iterator[Path]:
    """Draw what the gallery does not have yet. Yields the file of each picture, in order, when it is there.

    strips: draw one at a time, and write what its steps looked like beside it, NAME-steps.png.
    """
    if strips and how.candidates > 1:
        raise UserError("the steps of several candidates are no strip; leave out one of --strip and --candidates")
    size = 1 if strips else batch_size
    for low in range(0, len(asked), size):
        numbers = range(low, min(low + size, len(asked)))
        some, mine = asked.some(numbers), list(seeds[low : low + size])
        paths = [gallery.find(record) for record in some.records(generator, mine, how)]
        missing = [n for n, path in enumerate(paths) if path is None or (strips and not steps_of(path).exists())]
        if missing:
            guesses: list = []
            keep = (lambda step, denoised, kept=guesses: kept.append(denoised[:1].cpu())) if strips else None
            made = some.some(missing).draw(generator, [mine[n] for n in missing], how, on_step=keep)
            for n, one in zip(missing, made, strict=True):
                paths[n] = paths[n] or gallery.add(one)
            if strips:
                save_strip([*frames_of(guesses, FRAMES - 1), made[0].picture], steps_of(paths[0]))
        yield from paths
        if on_progress:
            on_progress(numbers.stop, len(asked))


def drawn(asked: Asked, generator: Generator, gallery: Gallery | None, seed: int, how: Sampling) -> Generated:
    """One picture, from the gallery if it is there, and put there if not."""
    (record,) = asked.records(generator, [seed], how)
    known = gallery and gallery.recall(record)
    if known:
        return known
    (made,) = asked.draw(generator, [seed], how)
    if gallery:
        gallery.add(made)
    return made


def steps_of(path: Path) -> Path:
    """The strip's file beside a picture's."""
    return path.with_name(f"{path.stem}-steps.png")


def save_strip(frames: Sequence[Image.Image], path: Path) -> None:
    """The frames in one row."""
    save_sheet(contact_sheet(frames, columns=len(frames), cell=max(96, *frames[0].size)), path)
