"""Captions -> token ids -> batches: every caption is tokenised once, and each step draws one of a sample's captions."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from clip_train import ranks
from clip_train.folder import fingerprint_json, write_file
from clip_train.model import Clip
from clip_train.pictures import Batches, made_ahead
from clip_train.settings import Progress, UserError
from clip_train.shards import ShardSet

TABLE_VERSION = 2
PIECE = 4096  # samples that are read and tokenised together
WORKER_PAYS = 50_000  # samples that keep a process busy for seconds; fewer are not worth starting one
PROBE = "A photo of 3 foxes' cafés,  東京 & <b>🦊</b> unbelievableness"  # tokenised, it tells tokenizers apart


def text_id(text: str) -> int:
    """A caption's or label's id, int64: equal for equal texts, whatever their case, in every source and process.

    64 bits of BLAKE2: two of 40 million different texts agree with a probability of about 4e-5.
    """
    return int.from_bytes(hashlib.blake2b(text.lower().encode(), digest_size=8).digest(), "little", signed=True)


def group_id(label: str | None, captions: Sequence[str]) -> int:
    """Equal for samples that are right answers for each other: the id of the label, or of the first caption."""
    return text_id(label or captions[0])


def check_mix(mix: Sequence[float]) -> tuple[float, ...]:
    """The mix as it is; UserError unless its weights are numbers >= 0 that are not all zero."""
    mix = tuple(float(weight) for weight in mix)
    if not all(0 <= weight < float("inf") for weight in mix) or mix and not sum(mix):
        raise UserError(f"--caption-mix {','.join(f'{w:g}' for w in mix)}: expected weights >= 0, one of them above 0")
    return mix


def pick_caption(count: np.ndarray, mix: Sequence[float], uniform: np.ndarray) -> np.ndarray:
    """Which of its captions each sample shows: int64 (B,), from 0.

    count: (B,) captions that each sample has, >= 1. uniform: (B,) in [0, 1). mix: weight of a sample's 1st, 2nd, ...
    caption; the last weight is shared equally by all further ones; () draws them uniformly. A sample with fewer
    captions than there are weights divides the first weights among what it has; where these are all 0, uniformly.
    """
    if not len(mix):
        return (uniform * count).astype(np.int64)
    chosen = np.empty(len(count), dtype=np.int64)
    for n in np.unique(count).tolist():
        weights = np.array(mix[:n], dtype=np.float64)
        if n > len(mix):
            weights = np.append(weights[:-1], np.full(n - len(mix) + 1, mix[-1] / (n - len(mix) + 1)))
        if not weights.sum():
            weights[:] = 1
        bounds = np.cumsum(weights) / weights.sum()
        bounds[-1] = 1
        chosen[count == n] = np.searchsorted(bounds, uniform[count == n], side="right")
    return chosen


def uniform_of(seed: int, places: np.ndarray) -> np.ndarray:
    """(B,) numbers in [0, 1) that depend on the seed and each sample's place in the order of training alone.

    So what a place draws is the same on any number of ranks, wherever training began. SplitMix64 (Steele et al. 2014).
    """
    with np.errstate(over="ignore"):
        mixed = (np.asarray(places).astype(np.uint64) + np.uint64(fold(seed))) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)) * 2.0**-53


def fold(seed: int) -> int:
    """A seed as 63 well-mixed bits, so that neighbouring seeds do not draw shifted copies of one sequence."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))


class CaptionTable:
    """Every caption of every sample as token ids, and which samples are right answers for each other.

    first: int64 (N + 1,), bounds of each sample's captions. tokens: uint16 or int32 (M, context). caption: int64 (M,),
    id of each caption's text. group: int64 (N,), id of each sample's label, or of its first caption. See text_id().
    """

    def __init__(
        self,
        samples: ShardSet,
        clip: Clip,
        label_field: str = "label",
        mix: Sequence[float] = (),
        cache: Path | str | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """cache: folder where the table is kept, memory-mapped and found again; None: in memory, for this run alone.

        on_progress counts samples. UserError: `mix` makes no sense, or the cache cannot be written.
        """
        self.mix = check_mix(mix)
        self._samples, self._clip, self._label_field = samples, clip, label_field
        if cache is None:
            parts = list(self._pieces(on_progress))
            columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        else:
            columns = self._kept(Path(cache), on_progress)
        del self._samples, self._clip
        counts, self.tokens, caption, group = columns
        self.first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.caption, self.group = torch.from_numpy(caption), torch.from_numpy(group)

    def pick(self, rows: np.ndarray, uniform: np.ndarray) -> dict[str, torch.Tensor]:
        """For samples `rows`, the caption that `uniform` (B,) in [0, 1) chooses: tokens, its id, the sample's group."""
        low = self.first[rows]
        chosen = low + pick_caption(self.first[rows + 1] - low, self.mix, uniform)
        tokens = torch.from_numpy(self.tokens[chosen].astype(np.int64))
        chosen, rows = torch.from_numpy(chosen), torch.from_numpy(rows)
        return {"tokens": tokens, "caption": self.caption[chosen], "group": self.group[rows]}

    def _pieces(self, on_progress: Progress | None) -> Iterator[tuple[np.ndarray, ...]]:
        """(counts, tokens, caption ids, groups) of PIECE samples after the other; by several processes if many."""
        total = len(self._samples)
        workers = min((os.cpu_count() or 1) - 1, total // WORKER_PAYS)
        pieces = _Pieces(self._samples, self._clip, self._label_field)
        for n, piece in enumerate(made_ahead(pieces, range(len(pieces)), max(workers, 0)), 1):
            yield piece
            if on_progress:
                on_progress(min(n * PIECE, total), total)

    def _kept(self, folder: Path, on_progress: Progress | None) -> list[np.ndarray]:
        """The table from its cache folder, made if it is not there. The table's own folder gets its name when whole."""
        vocabulary = self._clip.tokenize([PROBE, ""]).tolist()
        what = [TABLE_VERSION, self._samples.fingerprint, self._label_field, vocabulary]
        place = folder / f"captions-{fingerprint_json(what).removeprefix('sha256:')[:16]}"
        try:
            return _open(place)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not there, or damaged: made anew
        temporary = folder / f".{place.name}.{ranks.rank()}.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            notes = {}
            files = [open(temporary / f"{name}.bin", "wb") for name in _COLUMNS]
            try:
                for parts in self._pieces(on_progress):
                    for name, part, file in zip(_COLUMNS, parts, files, strict=True):
                        file.write(part.tobytes())
                        rows = notes[name]["shape"][0] if name in notes else 0
                        notes[name] = {"dtype": str(part.dtype), "shape": [rows + len(part), *part.shape[1:]]}
            finally:
                for file in files:
                    file.close()
            write_file(temporary / "table.json", json.dumps(notes).encode())
            shutil.rmtree(place, ignore_errors=True)
            os.replace(temporary, place)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"cannot write {place}: {error.strerror}") from error
        return _open(place)


_COLUMNS = ("counts", "tokens", "caption", "group")


def _open(place: Path) -> list[np.ndarray]:
    """The columns of a kept table, memory-mapped; an error if a file is not as long as the notes say."""
    notes = json.loads((place / "table.json").read_bytes())
    columns = []
    for name in _COLUMNS:
        file, dtype, shape = place / f"{name}.bin", np.dtype(notes[name]["dtype"]), tuple(notes[name]["shape"])
        if file.stat().st_size != dtype.itemsize * int(np.prod(shape)):
            raise ValueError(f"{file} is cut short")
        columns.append(np.memmap(file, dtype=dtype, mode="c", shape=shape))  # c: private, so torch may wrap it
    return columns


class _Pieces(torch.utils.data.Dataset):
    """Item p: counts, tokens, caption ids and groups of the p-th PIECE samples."""

    def __init__(self, samples: ShardSet, clip: Clip, label_field: str) -> None:
        self.samples, self.clip, self.label_field = samples, clip, label_field

    def __len__(self) -> int:
        return -(-len(self.samples) // PIECE)

    def __getitem__(self, piece: int) -> tuple[np.ndarray, ...]:
        said, groups = [], []
        for i in range(piece * PIECE, min((piece + 1) * PIECE, len(self.samples))):
            captions, label = self.samples.about(i, self.label_field)
            said.append(captions)
            groups.append(group_id(label, captions))
        flat = [caption for captions in said for caption in captions]
        distinct = {caption: n for n, caption in enumerate(dict.fromkeys(flat))}
        tokens = self.clip.tokenize(list(distinct)).numpy()
        vocabulary = self.clip.model_cfg["text_cfg"].get("vocab_size", 2**31)
        tokens = tokens.astype(np.uint16 if vocabulary <= 2**16 else np.int32)
        which = [distinct[caption] for caption in flat]
        ids = np.array([text_id(caption) for caption in distinct], dtype=np.int64)
        counts = np.array([len(captions) for captions in said], dtype=np.int32)
        return counts, tokens[which], ids[which], np.array(groups, dtype=np.int64)


def caption_table(
    samples: ShardSet,
    clip: Clip,
    work: Path,
    label_field: str = "label",
    mix: Sequence[float] = (),
    on_progress: Progress | None = None,
) -> CaptionTable:
    """The samples' CaptionTable, tokenised once by the main rank into the work folder's scratch/; for all ranks."""
    scratch, made = work / "scratch", []

    def make() -> None:
        made.append(CaptionTable(samples, clip, label_field, mix, scratch, on_progress))

    ranks.from_main(make)
    return made[0] if made else CaptionTable(samples, clip, label_field, mix, scratch)


class CaptionedBatches:
    """Batches of pictures, each with one of its captions; what a step shows depends on (seed, step) alone.

    A caption is drawn for a place in the order of training, not for a rank: several ranks train on what one would.
    """

    def __init__(self, pictures: Batches, captions: CaptionTable, seed: int) -> None:
        self.pictures = pictures
        self.captions = captions
        self.seed = seed

    def __call__(self, start_step: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Yields {"pixels", "tokens", "caption", "group"}, step after step."""
        for step, batch in enumerate(self.pictures(start_step), start_step):
            yield self._captioned(batch, self.pictures.places(step))

    def parts(self, wanted: Iterator[np.ndarray]) -> Iterator[dict[str, torch.Tensor]]:
        """A batch for each array of places (int64) in the endless order of training, as Mixture asks for them."""
        asked: list[np.ndarray] = []

        def noted() -> Iterator[np.ndarray]:
            for places in wanted:
                asked.append(places)
                yield places

        for batch in self.pictures.parts(noted()):
            yield self._captioned(batch, asked.pop(0))

    def _captioned(self, batch: dict[str, torch.Tensor], places: np.ndarray) -> dict[str, torch.Tensor]:
        rows = batch.pop("row").numpy()
        return batch | self.captions.pick(rows, uniform_of(self.seed, places))
