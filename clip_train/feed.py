"""What a training is fed with: shards here or elsewhere, one source or a mixture, as batches of captioned pictures."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clip_train import ranks
from clip_train.captions import CaptionedBatches, caption_table
from clip_train.folder import Input, fingerprint_json
from clip_train.mixture import Mixture
from clip_train.model import Clip
from clip_train.pictures import Batches, Pictures
from clip_train.settings import Progress, UserError
from clip_train.shards import ShardSet
from clip_train.stream import StreamBatches, is_remote, list_urls


@dataclass(frozen=True)
class TrainingShards:
    """Shards to train on. `samples` is None for remote ones, which are read through without an index."""

    spec: str
    samples: ShardSet | None
    fingerprint: str  # of the tars' contents; of remote ones only their names are known


def open_sources(
    specs: Sequence[str | Path], weights: Sequence[float] = (), allow_http: bool = False
) -> list[TrainingShards]:
    """The shards that each spec names. Without weights, all are one set.

    UserError: what ShardSet and list_urls refuse, or weights that do not fit.
    """
    specs = [str(spec) for spec in specs]
    if not weights:
        specs = ["::".join(specs)]
    elif len(weights) != len(specs) or not all(0 < w < float("inf") for w in weights):
        shown = ",".join(f"{w:g}" for w in weights)
        raise UserError(f"--mix {shown}: expected a weight above 0 for each of the {len(specs)} --shards")
    sources = []
    for spec in specs:
        if is_remote(spec):
            sources.append(TrainingShards(spec, None, fingerprint_json(list_urls(spec, allow_http))))
        else:
            samples = ShardSet(spec)
            sources.append(TrainingShards(spec, samples, samples.fingerprint))
    return sources


def as_input(sources: Sequence[TrainingShards]) -> Input:
    """What a manifest notes of them."""
    if len(sources) == 1:
        return Input(sources[0].fingerprint, sources[0].spec)
    return Input(fingerprint_json([s.fingerprint for s in sources]), "::".join(s.spec for s in sources))


class Feed:
    """Batches of captioned pictures from step k on, as fit() takes them: a step's batch depends on the step alone."""

    def __init__(
        self,
        sources: Sequence[TrainingShards],
        clip: Clip,
        work: Path,
        *,
        batch_size: int,
        seed: int,
        weights: Sequence[float] = (),
        label_field: str = "label",
        caption_mix: Sequence[float] = (),
        workers: int = 0,
        cache_gb: float = 2.0,
        shuffle: int = 2048,
        skip_broken: bool = False,
        allow_http: bool = False,
        on_progress: Progress | None = None,
    ) -> None:
        """batch_size: of one rank. work: folder in whose scratch/ decoded pictures and token ids are kept."""
        self._pictures: list[Pictures] = []
        self._streams: list[StreamBatches] = []
        rank, world = ranks.rank(), ranks.world_size()
        made: list[CaptionedBatches | StreamBatches] = []
        for n, source in enumerate(sources):
            share = cache_gb / len(sources)
            if source.samples is None:
                threads = max(2, workers)
                stream = StreamBatches(
                    source.spec, clip, batch_size, seed + n, rank=rank, world=world, label_field=label_field,
                    mix=caption_mix, shuffle=shuffle, threads=threads,
                    skip_broken=skip_broken, allow_http=allow_http, work=work / "scratch" / f"stream-{n}",
                )  # fmt: skip
                self._streams.append(stream)
                made.append(stream)
            else:
                pictures = decoded(source.samples, clip.image_size, work, share, on_progress, fast=True)
                table = caption_table(source.samples, clip, work, label_field, caption_mix, on_progress)
                self._pictures.append(pictures)
                order = Batches(pictures, batch_size, seed + n, rank, world, workers)
                made.append(CaptionedBatches(order, table, seed + n))
        self._batches: Callable[[int], Iterator[dict[str, torch.Tensor]]] = made[0]
        if len(made) > 1:
            self._batches = Mixture(made, weights, batch_size, seed, rank, world)

    def __call__(self, start_step: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Yields {"pixels": uint8 (B, 3, S, S), "tokens": int64 (B, T), "caption", "group": int64 (B,)}."""
        return self._batches(start_step)

    @property
    def pairs(self) -> int | None:
        """How many samples there are; None as soon as some are streamed."""
        return None if self._streams else sum(len(pictures) for pictures in self._pictures)

    def trouble(self) -> tuple[int, list[tuple[str, str]], list[tuple[str, str]]]:
        """For all ranks together, which must all ask: how many samples could not be used, the first of them as (key,
        reason), and the streamed shards that were passed over, as (URL, reason)."""
        own = (
            [one for pictures in self._pictures for one in pictures.bad],
            sum(stream.bad_count for stream in self._streams),
            [one for stream in self._streams for one in stream.bad],
            [one for stream in self._streams for one in stream.broken],
        )
        everyone = ranks.collect(own)
        unread = list(dict.fromkeys(tuple(one) for bad, *_ in everyone for one in bad))
        streamed = [tuple(one) for _, _, first, _ in everyone for one in first]
        broken = list(dict.fromkeys(tuple(one) for *_, broken in everyone for one in broken))
        return len(unread) + sum(count for _, count, *_ in everyone), (unread + streamed)[:5], broken


def decoded(
    samples: ShardSet, size: int, work: Path, cache_gb: float, on_progress: Progress | None, fast: bool = False
) -> Pictures:
    """The samples' pictures, decoded once by the main rank into the work folder's scratch/ when they fit.

    fast: see pictures.training_pixels.
    """
    scratch, made = work / "scratch", []

    def make() -> None:
        scratch.mkdir(exist_ok=True)
        made.append(Pictures(samples, size, scratch, cache_gb * 1e9, on_progress, fast=fast))

    ranks.from_main(make)
    return made[0] if made else Pictures(samples, size, scratch, cache_gb * 1e9, fast=fast)
