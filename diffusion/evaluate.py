"""Does it work? The round trip: embedding -> picture -> embedding -> rank."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clip_train import metrics
from clip_train.folder import read_manifest
from clip_train.model import Clip
from clip_train.settings import Progress
from clip_train.sheet import contact_sheet
from clip_train.store import EmbeddingStore
from diffusion.generate import Generated, Generator, Sampling
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
    image embedding, from the "prior"'s, and from the "text" embedding as it is.
    Returns numbers (per way top1, top10, median_rank, cosine to the true row; under "chance" what luck gives) and what
    each way made.
    """
    how = how or Sampling()
    picked = np.asarray(picked)
    ways = {"true": np.asarray(rows[picked], np.float32), "prior": None, "text": clip.encode_text(list(captions))}
    if generator.prior is None:
        del ways["prior"]
    numbers, made = {}, {}
    for number, (name, way) in enumerate(ways.items()):
        more = {"batch_size": batch_size, "on_progress": _part(on_progress, number, len(ways), name)}
        if way is None:
            made[name] = generator.from_captions(captions, seeds, how, **more)
        else:
            made[name] = generator.from_embeddings(way, seeds, how, **more)
        seen = embed_pictures(clip, [one.picture for one in made[name]], batch_size)
        numbers[name] = round_trip(seen, picked, rows, labels)
    numbers["chance"] = chance(picked, len(rows), labels)
    return numbers, made


def round_trip(
    seen: np.ndarray, picked: np.ndarray, rows: np.ndarray, labels: Sequence | None = None
) -> dict[str, float]:
    """seen (Q, D): embeddings of generated pictures, meant to be those of rows[picked]."""
    groups = np.arange(len(rows)) if labels is None else np.asarray(labels)
    rank = metrics.ranks(seen, rows, groups[picked], groups)
    return {
        "top1": float((rank == 1).mean()),
        "top10": float((rank <= 10).mean()),
        "median_rank": float(np.median(rank)),
        "cosine": float(metrics.paired_cosines(seen, rows[picked]).mean()),
    }


def chance(picked: np.ndarray, count: int, labels: Sequence | None = None) -> dict[str, float]:
    """What pictures that have nothing to do with their embeddings would reach among `count` rows, on average."""
    groups = np.arange(count) if labels is None else np.asarray(labels)
    values, sizes = np.unique(groups, return_counts=True)
    right = sizes[np.searchsorted(values, groups[picked])].tolist()
    return {
        "top1": float(np.mean([metrics.chance_recall(m, count, 1) for m in right])),
        "top10": float(np.mean([metrics.chance_recall(m, count, 10) for m in right])),
        "median_rank": float(np.median([metrics.chance_rank(m, count) for m in right])),
    }


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
    count: int = 100,
    seed: int = 0,
    how: Sampling | None = None,
    device: str | torch.device = "cpu",
    on_progress: Progress | None = None,
) -> tuple[dict[str, Any], Image.Image]:
    """evaluate_loop on `count` rows of an embeddings folder, chosen by `seed`. Returns the numbers and a sheet."""
    store = EmbeddingStore.open(embeddings)
    generator = Generator.open(decoder, prior, clip, device=device)
    refuse_other_clip(store, embeddings, read_manifest(decoder), decoder)
    picked = np.random.default_rng(seed).choice(len(store), min(count, len(store)), replace=False)
    captions = store.metadata["caption"].iloc[picked].tolist()
    numbers, made = evaluate_loop(
        generator, generator.clip, captions, picked, store.image(), labels=labels_of(store), how=how,
        on_progress=on_progress,
    )  # fmt: skip
    shown = [(caption, [made[way][i] for way in made]) for i, caption in enumerate(captions[:24])]
    pictures = [one.picture for _, row in shown for one in row]
    labels = [f"{way}: {caption}" for caption, row in shown for way, _ in zip(made, row, strict=True)]
    return numbers, contact_sheet(pictures, labels, columns=2 * len(made))


def labels_of(store: EmbeddingStore) -> np.ndarray:
    """(N,) integers: rows of one label (of one caption, where there are no labels) are each other's right answers."""
    table = store.metadata
    names = table["caption"].astype(str)
    if "label" in table:
        names = table["label"].astype(str).where(table["label"].notna(), names)
    return np.unique(names.str.lower(), return_inverse=True)[1]


def _part(on_progress: Progress | None, number: int, of: int, name: str) -> Progress | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(number * total + done, of * total, way=name)
