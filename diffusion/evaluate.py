"""Does it work? The round trip, embedding -> picture -> embedding -> rank, and figures of pictures held out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clip_train.folder import read_manifest
from clip_train.model import Clip
from clip_train.settings import Progress, UserError
from clip_train.sheet import contact_sheet
from clip_train.store import EmbeddingStore
from diffusion.examine import Exam, Way, drawing, examine, open_generator, open_held
from diffusion.generate import Generated, Generator, Sampling
from diffusion.heldout import label_names
from diffusion.judge import chance, round_trip
from diffusion.trained import refuse_other_clip


def evaluate_loop(
    generator: Generator,
    clip: Clip,
    captions: Sequence[str],
    picked: Sequence[int],
    rows: np.ndarray,
    *,
    labels: Sequence | None = None,
    how: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    batch_size: int = 64,
    on_progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, list[Generated]]]:
    """Generate, look at the picture with CLIP, and find the true picture's rank among all: the round trip.

    captions[i] describes the picture of rows[picked[i]]; rows (N, D): the embeddings of all pictures to be told apart.
    labels (N,): pictures with the label of the right one are right as well. Three ways to the picture: from the "true"
    image embedding, from the "prior"'s, and from the "text" embedding as it is. A decoder that reads text reads the
    caption in all of them.
    Returns numbers (per way top1, top10, median_rank, cosine to the true row, each with its interval; under "chance"
    what luck gives) and what each way made.
    """
    picked = np.asarray(picked)
    reads = {"captions": list(captions)} if generator.decoder.network.config.text else {}
    ways = {"true": np.asarray(rows[picked], np.float32), "prior": None, "text": clip.encode_text(list(captions))}
    if generator.prior is None:
        del ways["prior"]
    numbers, made = {}, {}
    for number, (name, way) in enumerate(ways.items()):
        more = {"batch_size": batch_size, "on_progress": _part(on_progress, number, len(ways), name)}
        if way is None:
            made[name] = generator.from_captions(captions, seeds, how, **more)
        else:
            made[name] = generator.from_embeddings(way, seeds, how, **reads, **more)
        seen = embed_pictures(clip, [one.picture for one in made[name]], batch_size)
        numbers[name] = round_trip(seen, picked, rows, labels)
    numbers["chance"] = chance(picked, len(rows), labels)
    return numbers, made


def embed_pictures(clip: Clip, pictures: Sequence[Image.Image], batch_size: int = 64) -> np.ndarray:
    """PIL pictures -> CLIP image embeddings (N, D), through the same transform as pictures from shards."""
    batches = [pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size)]
    rows = [clip.encode_image(torch.stack([clip.to_pixels(one) for one in some])) for some in batches]
    return torch.cat(rows).numpy() if rows else np.zeros((0, clip.embed_dim), np.float32)


def evaluate_loop_folders(
    embeddings: Path | str,
    prior: Path | str,
    decoder: Path | str,
    clip: Path | str | None = None,
    *,
    among: Sequence[Path | str] = (),
    fit: Path | str | None = None,
    count: int = 100,
    seed: int = 0,
    how: Sampling | None = None,
    settings: Sequence[str] = (),
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    on_progress: Progress | None = None,
) -> tuple[dict[str, Any], Image.Image]:
    """evaluate_loop on `count` rows of an embeddings folder, chosen by `seed`. Returns the numbers and a sheet.

    among: further embeddings folders whose pictures the right one must be told from as well, such as the training set.
    fit: the embeddings that a baseline, named in the place of a prior folder, is fitted to. how: how to draw; by
    default as the decoder does by itself, with KEY=VALUE `settings` on top.
    """
    store, *more = (EmbeddingStore.open(folder) for folder in (embeddings, *among))
    generator = Generator.open(decoder, prior, clip, device=device, **({"embeddings": fit} if fit else {}))
    made_by = read_manifest(decoder)
    for folder, one in zip((embeddings, *among), (store, *more), strict=True):
        refuse_other_clip(one, folder, made_by, decoder)
    picked = np.random.default_rng(seed).choice(len(store), min(count, len(store)), replace=False)
    captions = np.array(store.first_captions(), dtype=object)[picked].tolist()
    names = [name for one in (store, *more) for name in label_names(one)]
    numbers, made = evaluate_loop(
        generator,
        generator.clip,
        captions,
        picked,
        np.concatenate([one.image() for one in (store, *more)]),
        labels=np.unique(names, return_inverse=True)[1],
        how=how or drawing(generator, settings),
        batch_size=batch_size,
        on_progress=on_progress,
    )
    shown = [(caption, [made[way][i] for way in made]) for i, caption in enumerate(captions[:24])]
    pictures = [one.picture for _, row in shown for one in row]
    labels = [f"{way}: {caption}" for caption, row in shown for way, _ in zip(made, row, strict=True)]
    return numbers, contact_sheet(pictures, labels, columns=2 * len(made))


def evaluate_decoder_folders(
    decoder: Path | str,
    clip: Path | str | None = None,
    *,
    embeddings: Path | str | None = None,
    shards: str | None = None,
    upsampler: Path | str | None = None,
    settings: Sequence[str] = (),
    exam: Exam | None = None,
    keep: Path | str | None = None,
    device: str | torch.device = "cpu",
    on_progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, list[Image.Image]]]:
    """The decoder alone: pictures from the true embeddings of pictures held out. Returns what examine() does."""
    more = {"upsampler": upsampler} if upsampler else {}
    generator = open_generator(decoder, None, clip, device=device, **more)
    held = open_held(embeddings, shards, generator, on_progress)
    return examine(
        {"true": Way(generator, "true")}, held, drawing(generator, settings), exam, keep=keep, on_progress=on_progress
    )


def evaluate_generation_folders(
    decoder: Path | str,
    prior: Path | str,
    clip: Path | str | None = None,
    *,
    embeddings: Path | str | None = None,
    shards: str | None = None,
    fit: Path | str | None = None,
    upsampler: Path | str | None = None,
    settings: Sequence[str] = (),
    exam: Exam | None = None,
    keep: Path | str | None = None,
    device: str | torch.device = "cpu",
    on_progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, list[Image.Image]]]:
    """The whole of it: pictures from the captions of pictures held out, through a prior. Returns what examine() does.

    prior: a folder, or a baseline's name (baselines.py), most of which are fitted to the folder `fit`.
    """
    more = {"upsampler": upsampler} if upsampler else {}
    generator = open_generator(decoder, prior, clip, embeddings=fit, device=device, **more)
    held = open_held(embeddings, shards, generator, on_progress)
    return examine(
        {"prior": Way(generator, "prior")}, held, drawing(generator, settings), exam, keep=keep, on_progress=on_progress
    )


def exam_sheet(made: dict[str, list[Image.Image]], captions: Sequence[str], most: int = 24) -> Image.Image:
    """The real picture and what each way drew in its place, side by side, of the first `most` rows."""
    order = ["real", *(name for name in made if name != "real")]
    count = min(most, len(captions))
    if not count:
        raise UserError("there are no pictures to show")
    pictures = [made[name][i] for i in range(count) for name in order]
    labels = [f"{name}: {captions[i]}" for i in range(count) for name in order]
    return contact_sheet(pictures, labels, columns=len(order) * max(1, 8 // len(order)))


def _part(on_progress: Progress | None, number: int, of: int, name: str) -> Progress | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(number * total + done, of * total, way=name)
