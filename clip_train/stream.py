"""Remote tar shards -> batches, without an index: what a step shows depends on (seed, step, rank, ranks) alone.

A shard is a URL that fsspec opens (s3://, gs://, memory://, file://), a shell command such as `pipe:aws s3 cp
s3://b/0.tar -`, or http(s):// where that is allowed. The shards of all epochs form one endless sequence, each epoch a
permutation drawn from (seed, epoch); rank r of R takes every R-th of it. So ranks never run dry, however unequal the
shards are. A rank's samples are shuffled inside blocks of `shuffle` samples, which cross the bounds of shards.

How many samples each shard had is noted in a journal in the work folder. A resumed run passes over whole shards by it,
reads on in the block where it stopped, and decodes nothing twice. Without a journal it reads all again: slower, but the
same. webdataset reads such URLs too, but its reader takes a broken connection at a file's end for the end of the shard,
does not ask how a command ended, and cannot go on in the middle of an epoch; so the tars are read by tarfile here.
"""

import contextlib
import functools
import http.client
import itertools
import json
import os
import queue
import subprocess
import tarfile
import threading
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from clip_train.address import ADDRESS, split_parts, without_secrets
from clip_train.captions import check_mix, group_id, pick_caption, text_id, uniform_of
from clip_train.folder import fingerprint_json
from clip_train.model import Clip
from clip_train.pictures import PictureError, pixels_of
from clip_train.sample import PICTURES, Sample, captions_of, json_object, why_no_caption
from clip_train.settings import UserError
from clip_train.shards import expand_braces, list_shards
from clip_train.tars import BROKEN_TAR, split_name

STAND_INS = 8  # samples after a batch that may stand in for bad ones of it
NAMED_BAD = 100  # bad samples that are kept by name; all are counted


def is_remote(spec: str | Path) -> bool:
    """Whether any of the shards that `spec` names is a URL or a command, so that it can only be streamed."""
    return any(ADDRESS.match(part) for part in split_parts(str(spec)))


def list_urls(spec: str, allow_http: bool = False) -> list[str]:
    """The shards that `spec` names, in order: URLs with ranges ({000..099}) or globs, commands, local shards, and
    several of these joined by '::'. UserError if a part names nothing or may not be opened.
    """
    urls = []
    for part in split_parts(str(spec)):
        if part.startswith("pipe:"):
            urls += expand_braces(part, choices=False)  # braces with commas are the shell's own
        elif not ADDRESS.match(part):
            urls += [str(path) for path in list_shards(part)]
        elif part.startswith(("http://", "https://")):
            if not allow_http:
                raise UserError(
                    f"{without_secrets(part)}: shards are fetched over http only where that is allowed: --allow-http"
                )
            if "@" in part.split("/")[2]:  # urllib would send no password, and tell it in its error
                say = f"{without_secrets(part)}: a user name or password is not sent over http"
                raise UserError(f"{say}; fetch it by a command: pipe:curl --netrc ADDRESS")
            urls += expand_braces(part)
        else:
            urls += [url for one in expand_braces(part) for url in _listed(one)]
    return urls


def count_urls(spec: str) -> int | None:
    """How many shards `spec` names; None if only their server could tell, which is not asked."""
    parts = [part for part in split_parts(str(spec)) if ADDRESS.match(part) and not part.startswith(("pipe:", "http"))]
    if any(_is_glob(url) for part in parts for url in expand_braces(part)):
        return None
    return len(list_urls(spec, allow_http=True))


def _is_glob(url: str) -> bool:
    return bool(set(url) & set("*?[")) or url.endswith("/")


def _listed(url: str) -> list[str]:
    """The URL itself, or what is there if it is a glob or a folder (it ends with /)."""
    if not _is_glob(url):
        return [url]
    with _fsspec(url) as fsspec:
        files, _ = fsspec.core.url_to_fs(url)
        scheme = url.split("://")[0]
        found = sorted(files.glob(files._strip_protocol(url + "*.tar" if url.endswith("/") else url)))
    if not found:
        raise UserError(f"no shards: {without_secrets(url)} names nothing")
    return [f"{scheme}://{path}" for path in found]


@contextlib.contextmanager
def _fsspec(url: str) -> Iterator[Any]:
    """fsspec; UserError with what to install if it, or its driver for this URL, is not there."""
    try:
        import fsspec

        yield fsspec
    except ImportError as error:
        raise UserError(
            f"{without_secrets(url)} cannot be opened: {error} (pip install fsspec, s3fs for s3://, gcsfs for gs://)"
        ) from error
    except ValueError as error:  # an unknown scheme
        raise UserError(f"{without_secrets(url)} cannot be opened: {error}") from error


# One shard


class BrokenShard(Exception):
    """A shard could not be read to its end; the message says why."""


class _NoCommand(BrokenShard):
    """The shell found no such command, or may not run it: there is no use in trying again."""


@contextlib.contextmanager
def _opened(url: str) -> Iterator[IO[bytes]]:
    """The bytes of a shard. A command must end with exit code 0."""
    if url.startswith("pipe:"):
        command = url.removeprefix("pipe:")
        process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        try:
            try:
                yield process.stdout
            except BrokenShard:
                if not process.stdout.read(1):  # it ended before its tar did: perhaps it failed
                    _succeeded(process)
                raise
            process.stdout.read()
            _succeeded(process)
        finally:
            process.stdout.close()
            process.terminate()
            process.wait()
    elif url.startswith(("http://", "https://")):
        with urllib.request.urlopen(url, timeout=60) as reply:
            yield reply
    elif not ADDRESS.match(url):
        with open(url, "rb") as file:
            yield file
    else:
        with _fsspec(url) as fsspec, fsspec.open(url, "rb") as file:
            yield file


def _succeeded(process: subprocess.Popen) -> None:
    if code := process.wait():
        raise (_NoCommand if code in (126, 127) else BrokenShard)(f"the command ended with exit code {code}")


class _Member(tarfile.TarInfo):
    """Notes on its tar that the block of zeros at the end was reached; tarfile stops at anything else in silence."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            tar.whole = True
            raise


def read_shard(url: str) -> Iterator[Sample | tuple[str, str]]:
    """The samples of one shard, in tar order; (key, reason) in the place of one that cannot be used.

    As webdataset groups them: files that follow one another and share a key. BrokenShard if the tar does not end as
    one should; OSError and whatever else the connection raises.
    """
    with _opened(url) as stream:
        try:
            tar = tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member)
        except BROKEN_TAR as error:
            raise BrokenShard("it is no tar, or an empty file") from error
        key, parts = "", {}
        try:
            for member in tar:
                tar.members = []  # tarfile would keep them all
                own, suffix = split_name(member.name)
                if not own or not member.isreg() or member.issparse():
                    continue
                if own != key and parts:
                    yield _sample(key, parts)
                    parts = {}
                key = own
                wanted = suffix in ("txt", "json", "cls", *PICTURES)
                parts[suffix] = tar.extractfile(member).read() if wanted else b""
        except BROKEN_TAR as error:
            raise BrokenShard(f"cut short or damaged ({error})") from error
        if not getattr(tar, "whole", False):
            raise BrokenShard("cut short or damaged")
        if parts:
            yield _sample(key, parts)


def _sample(key: str, parts: dict[str, bytes]) -> Sample | tuple[str, str]:
    ext = next((suffix for suffix in PICTURES if suffix in parts), None)
    if ext is None:
        return key, "no picture"
    text, meta = parts.get("txt"), parts.get("json")
    if reason := why_no_caption(text, meta):
        return key, reason
    meta = json_object(meta)
    return Sample(key=key, image=parts[ext], ext=ext, captions=captions_of(text, meta), meta=meta, cls=parts.get("cls"))


def _steadily(url: str, retries: int) -> Iterator[Sample | tuple[str, str]]:
    """read_shard(url) that opens the shard again where it broke, after 1, 2, 4 ... seconds; then BrokenShard."""
    given = failures = 0
    while True:
        try:
            for item in itertools.islice(read_shard(url), given, None):
                yield item
                given, failures = given + 1, 0
            return
        except UserError:
            raise
        except (OSError, http.client.HTTPException, BrokenShard, EOFError) as error:
            failures += 1
            hopeless = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | _NoCommand)
            if failures > retries or hopeless or not ADDRESS.match(url):
                raise BrokenShard(" ".join(str(error).split()) or type(error).__name__) from error
            time.sleep(min(2.0 ** (failures - 1), 60))


class _Ahead:
    """Runs an iterator in a thread of its own, at most `size` items ahead of whoever iterates over this."""

    def __init__(self, items: Iterator[Any], size: int) -> None:
        self._items, self._queue, self._stopped = items, queue.Queue(size), threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        end: tuple[bool, Any] = (False, None)
        try:
            for item in self._items:
                if not self._put((True, item)):
                    break
        except BaseException as error:  # it is raised again where the items are wanted
            end = (False, error)
        finally:
            self._items.close()
        self._put(end)

    def _put(self, entry: tuple[bool, Any]) -> bool:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(entry, timeout=0.1)
                return True
        return False

    def __iter__(self) -> Iterator[Any]:
        while True:
            is_item, value = self._queue.get()
            if is_item:
                yield value
            elif value is not None:
                raise value
            else:
                return

    def close(self) -> None:
        """Let the thread end at its next item."""
        self._stopped.set()


# All shards


class StreamBatches:
    """An endless stream of batches from shards that are read once through. Called with a step, it gives the batches
    from that step on, the same whether or not the stream began there, and for any number of threads.

    bad: (key, reason) of the first samples that could not be used, bad_count of all; broken: (URL, reason) of shards
    that were passed over. Both count a sample each time it comes round.
    """

    sequential = True  # Mixture may ask for the next samples only, not for any

    def __init__(
        self,
        spec: str,
        clip: Clip,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        label_field: str = "label",
        mix: Sequence[float] = (),
        shuffle: int = 2048,
        threads: int = 2,
        readers: int = 2,
        retries: int = 5,
        skip_broken: bool = False,
        allow_http: bool = False,
        fast: bool = True,
        work: Path | str | None = None,
    ) -> None:
        """clip: says how to tokenise, and the side of the pictures. batch_size is one rank's. shuffle: samples in a
        block; about three blocks of undecoded samples are held in memory, and a block that is larger than a rank's
        share of an epoch holds samples of several epochs. threads decode, readers open shards ahead.
        skip_broken: pass over what is left of a shard that stays broken after `retries`, instead of stopping. fast:
        training_pixels(). work: folder for the journal. UserError: what list_urls refuses.
        """
        self.urls = list_urls(spec, allow_http)
        self.fingerprint: str = fingerprint_json(self.urls)  # of the shards' names: their contents are not known
        self.clip, self.size, self.batch_size, self.seed = clip, clip.image_size, batch_size, seed
        self.rank, self.world, self.label_field, self.mix = rank, world, label_field, check_mix(mix)
        self.shuffle, self.threads, self.readers = max(shuffle, 1), max(threads, 1), max(readers, 1)
        self.retries, self.skip_broken, self.fast = retries, skip_broken, fast
        self.bad: list[tuple[str, str]] = []
        self.bad_count = self._looked_at = self._undecodable = 0
        self.broken: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._orders: dict[int, np.ndarray] = {}
        self._journal = _Journal(Path(work) if work else None, fingerprint_json([self.urls, seed]), rank, world)

    def __call__(self, start_step: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Yields {"pixels": uint8 (B, 3, S, S), "tokens": int64 (B, T), "caption", "group": int64 (B,)}.

        UserError: a shard that stays broken, or no sample, or fewer than half of the pictures, can be used.
        """
        first = start_step * self.batch_size
        return self.parts(np.arange(at, at + self.batch_size) for at in itertools.count(first, self.batch_size))

    def parts(self, wanted: Iterator[np.ndarray]) -> Iterator[dict[str, torch.Tensor]]:
        """A batch for each array of this rank's places, which must follow one another without a gap."""
        wanted = iter(wanted)
        first = []
        for places in wanted:
            first.append(places)
            if len(places):
                break
        samples = self._samples(int(places[0]) if first and len(places) else 0)
        pending: deque[Future] = deque()
        with ThreadPoolExecutor(self.threads) as pool, contextlib.closing(samples):
            try:
                coming: list[Sample] = []
                for places in itertools.chain(first, wanted):
                    coming += itertools.islice(samples, len(places) + STAND_INS - len(coming))
                    pending.append(pool.submit(self._batch, coming, places))
                    coming = coming[len(places) :]
                    if len(pending) > self.threads:
                        yield self._counted(*pending.popleft().result())
            except UserError:
                while pending:  # what was read before the stream broke
                    yield self._counted(*pending.popleft().result())
                raise
            while pending:
                yield self._counted(*pending.popleft().result())

    def _batch(self, coming: list[Sample], places: np.ndarray) -> tuple[dict[str, torch.Tensor], list[tuple[str, str]]]:
        """The batch of the first of the coming samples, one for each place, and the (key, reason) of bad pictures.

        In the place of a picture that cannot be decoded stands the next that can; the coming ones reach a little
        further than the batch, so that even a batch of one finds a stand-in.
        """
        bad: list[tuple[str, str]] = []

        @functools.cache
        def decoded(n: int) -> torch.Tensor | None:
            try:
                return pixels_of(coming[n].image, self.size, self.fast)
            except PictureError as error:
                if n < len(places):  # else it is named when its own turn comes
                    bad.append((coming[n].key, str(error)))
                return None

        pixels = torch.empty((len(places), 3, self.size, self.size), dtype=torch.uint8)
        samples = []
        for place in range(len(places)):
            n = next((n for n in range(place, len(coming)) if decoded(n) is not None), None)
            if n is None:
                n = next((n for n in range(place) if decoded(n) is not None), None)
            if n is None:
                (key, reason), count = bad[0], len(coming)
                raise UserError(f"{count} pictures in a row cannot be decoded; the first: {key}: {reason}")
            pixels[place] = decoded(n)
            samples.append(coming[n])
        count = np.array([len(sample.captions) for sample in samples], dtype=np.int64)
        picked = pick_caption(count, self.mix, uniform_of([self.seed, self.rank], places))
        said = [sample.captions[n] for sample, n in zip(samples, picked.tolist(), strict=True)]
        groups = [group_id(sample.label(self.label_field), sample.captions) for sample in samples]
        batch = {
            "pixels": pixels,
            "tokens": self.clip.tokenize(said) if said else self.clip.tokenize([""])[:0],
            "caption": torch.tensor([text_id(text) for text in said], dtype=torch.int64),
            "group": torch.tensor(groups, dtype=torch.int64),
        }
        return batch, bad

    def _counted(self, batch: dict[str, torch.Tensor], bad: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
        for key, reason in bad:
            self._note_bad(key, reason)
        self._looked_at += len(batch["pixels"])
        self._undecodable += len(bad)
        if 2 * self._undecodable > self._looked_at >= 256:
            first = "; ".join(f"{key}: {reason}" for key, reason in self.bad[:3])
            raise UserError(f"{self._undecodable} of {self._looked_at} pictures cannot be decoded ({first})")
        return batch

    def _note_bad(self, key: str, reason: str) -> None:
        with self._lock:  # two threads find bad ones: that which reads, and that which wants the batches
            self.bad_count += 1
            if len(self.bad) < NAMED_BAD and (key, reason) not in self.bad:
                self.bad.append((key, reason))

    def _samples(self, start: int) -> Iterator[Sample]:
        """This rank's samples in the order of training, from place `start` on."""
        first, skip = divmod(start, self.shuffle)
        with contextlib.closing(_Ahead(self._blocks(first), 1)) as blocks:
            for number, block in enumerate(blocks, first):
                for n in np.random.default_rng([self.seed, self.rank, number]).permutation(len(block))[skip:].tolist():
                    sample, block[n] = block[n], None  # it is not wanted again
                    yield sample
                skip = 0

    def _blocks(self, number: int) -> Iterator[list[Sample]]:
        with contextlib.closing(self._in_tar_order(number * self.shuffle)) as samples:
            while True:
                yield list(itertools.islice(samples, self.shuffle))

    def _in_tar_order(self, start: int) -> Iterator[Sample]:
        """The samples of this rank's shards, one shard after the other, from the start-th on, for ever."""
        first, drop = self._find(start)
        coming = itertools.count(first)
        ahead: deque[_Ahead] = deque()
        reasons: Counter[str] = Counter()
        barren = 0
        try:
            for shard in itertools.count(first):
                while len(ahead) < self.readers:
                    ahead.append(_Ahead(self._read(self._url(next(coming))), 64))
                url, given, limit = self._url(shard), 0, self._journal.cut_at(shard)
                broken = None
                with contextlib.closing(ahead.popleft()) as items:
                    for item in items:
                        if isinstance(item, BrokenShard):
                            broken = item
                        elif isinstance(item, Sample):
                            if given == limit:
                                break
                            given += 1
                            if given > drop:
                                yield item
                        else:
                            self._note_bad(*item)
                            reasons[item[1]] += 1
                if broken and not self.skip_broken:
                    raise UserError(f"{without_secrets(url)} cannot be read: {broken}; mend it, or leave it out")
                if broken:
                    self.broken.append((without_secrets(url), str(broken)))
                    reasons[str(broken)] += 1
                self._journal.note(shard, url, given, cut=broken is not None)
                drop = max(drop - given, 0)
                barren = 0 if given else barren + 1
                if barren >= len(self.urls):
                    why, n = next(iter(reasons.most_common(1)), ("all are empty", len(self.urls)))
                    raise UserError(f"none of the {len(self.urls)} shards holds a picture with a caption ({n}: {why})")
        finally:
            for items in ahead:
                items.close()

    def _find(self, start: int) -> tuple[int, int]:
        """Which of this rank's shards to open to reach its start-th sample, and how many of its samples lie before."""
        shard, drop = 0, start
        while drop and (length := self._journal.length(shard, self._url(shard))) is not None and length <= drop:
            shard, drop = shard + 1, drop - length
        return shard, drop

    def _url(self, shard: int) -> str:
        """The URL of this rank's n-th shard in the endless sequence of all epochs."""
        epoch, place = divmod(shard * self.world + self.rank, len(self.urls))
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 2}
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self.urls))
        return self.urls[self._orders[epoch][place]]

    def _read(self, url: str) -> Iterator[Sample | tuple[str, str] | BrokenShard]:
        try:
            yield from _steadily(url, self.retries)
        except BrokenShard as error:
            yield error


class _Journal:
    """How many samples each shard had that a rank read to its end: a line of json each, kept in a folder if given."""

    def __init__(self, folder: Path | None, fingerprint: str, rank: int, world: int) -> None:
        name = f"stream-{fingerprint.removeprefix('sha256:')[:16]}"
        self._file = folder / f"{name}-{rank}of{world}.jsonl" if folder else None
        self._own: dict[int, dict[str, Any]] = {}
        self._of_url: dict[str, int] = {}
        for path in sorted(folder.glob(f"{name}-*.jsonl")) if folder else []:
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1  # a kill may have left half a line
            if path == self._file and whole < len(data):
                os.truncate(path, whole)
            for line in map(json.loads, data[:whole].splitlines()):
                if path == self._file:
                    self._own[line["shard"]] = line
                if not line["cut"]:
                    self._of_url[line.get("of", fingerprint_json(line["url"]))] = line["samples"]

    def length(self, shard: int, url: str) -> int | None:
        """Samples of the rank's n-th shard; None if it is not known."""
        return self._own[shard]["samples"] if shard in self._own else self._of_url.get(fingerprint_json(url))

    def cut_at(self, shard: int) -> int | None:
        """After how many samples the rank's n-th shard broke off and was left, if it was."""
        entry = self._own.get(shard)
        return entry["samples"] if entry and entry["cut"] else None

    def note(self, shard: int, url: str, samples: int, cut: bool) -> None:
        """UserError if the shard was noted before and had another number of samples then."""
        if shard in self._own:
            before = self._own[shard]["samples"]
            if before != samples:
                say = f"{before} samples before, and {samples} now; start again with another --out"
                raise UserError(f"{without_secrets(url)} had {say}")
            return
        of = fingerprint_json(url)  # the address itself may hold a password
        entry = {"shard": shard, "url": without_secrets(url), "of": of, "samples": samples, "cut": cut}
        self._own[shard] = entry
        if not cut:
            self._of_url[of] = samples
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a") as file:
                file.write(json.dumps(self._own[shard]) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._file}: {error.strerror}") from error
