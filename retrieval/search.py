"""Searcher: captions, pictures, vectors, or sums of them -> hits. One Searcher may be asked from many threads."""

import functools
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_train.folder import Manifest, read_manifest
from clip_train.settings import UserError
from clip_train.store import MetadataTable, read_vectors
from retrieval.album import Album, media_type
from retrieval.index import MODALITIES
from retrieval.live import LiveIndex
from retrieval.query import QueryError, Term, combine
from retrieval.where import Where, columns_of, parse

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from clip_train.calibration import Calibration
    from clip_train.model import Clip

BATCH = 64  # pictures encoded at a time
LOOKED_AT = 10_000  # hits at most among which distinct ones are chosen, or 20 k
BLOCK = 256  # rows that are compared with others at a time
MASK_BYTES = 64_000_000  # of the answers of filters that are kept, a byte a row


@dataclass(frozen=True)
class Hit:
    """One answer to a query."""

    rank: int  # 1 is the best
    score: float  # cosine
    row: int  # of the index
    key: str  # of the sample in the shards
    caption: str
    meta: dict[str, Any]  # the rest of what the metadata says
    probability: float | None = None  # that picture and caption match; of calibrated CLIPs, between the two kinds only


class Searcher:
    """An index folder, ready to be asked. CLIP and the shards are opened when they are first needed.

    `where` of every question is a filter on the metadata (see where.py); it keeps k hits where so many rows pass it.
    `distinct` is a cosine: a hit that is nearer than this to a better one is left out, and the next takes its place.
    """

    def __init__(self, index: LiveIndex, clip: Path | str | None, device: "str | torch.device") -> None:
        self._view = View(index)
        self._given = clip
        self._device = device
        self._loading = threading.RLock()
        self._refreshing = threading.Lock()  # of its own: questions go on while a folder is opened again
        self._encoding = threading.Lock()  # torch uses all cores for one batch, so two at once gain nothing

    @classmethod
    def open(
        cls, index: Path | str, clip: Path | str | None = None, device: "str | torch.device" = "cpu"
    ) -> "Searcher":
        """index: an index folder. clip: the CLIP that made its embeddings; None: where the manifests say it was.

        UserError: not an index folder, or (at once when `clip` is named, else on the first query) another CLIP.
        """
        searcher = cls(LiveIndex.open(index), clip, device)
        for part in searcher.index.parts:
            part.index("image")  # a damaged one is told of now
        if clip is not None:
            searcher.clip  # noqa: B018  (loads and checks it)
        return searcher

    def __len__(self) -> int:
        return len(self.index)

    @property
    def view(self) -> "View":
        """The state of the folder that is searched now. Who holds it sees that one state, whatever refresh() does."""
        return self._view

    @property
    def index(self) -> LiveIndex:
        """What is searched now; refresh() puts another in its place."""
        return self._view.index

    @property
    def manifest(self) -> Manifest:
        return self.index.manifest

    @property
    def folder(self) -> Path:
        return self.index.folder

    @property
    def dim(self) -> int:
        return self.index.dim

    @property
    def table(self) -> MetadataTable:
        return self.index.table

    @property
    def columns(self) -> dict[str, str]:
        """{column of the metadata: kind}, the kinds being those of where.columns_of()."""
        return self._view.columns

    def refresh(self) -> bool:
        """Open the folder again if rows were added to it, deleted or compacted since. Row numbers may mean others then.

        Questions that are being answered go on with what they started with. UserError: the folder is of another CLIP
        now; what was open stays open.
        """
        with self._refreshing:
            if LiveIndex.state_of(self.folder) == self.index.state:
                return False
            self._check_clip(read_manifest(self.folder, "index"))  # before much is read in vain
            index = self.index.reopened()
            self._check_clip(index.manifest)
            self._view = View(index)
            return True

    def text(
        self,
        queries: Sequence[str],
        k: int = 10,
        modality: str = "image",
        *,
        where: str | Where | None = None,
        distinct: float | None = None,
    ) -> list[list[Hit]]:
        """The k best rows for each caption: by their pictures, or with modality "text" by their captions."""
        return self.queries([[Term("text", query)] for query in queries], k, modality, where=where, distinct=distinct)

    def picture(
        self,
        pictures: "Sequence[Path | str | bytes | Image.Image]",
        k: int = 10,
        modality: str = "image",
        *,
        where: str | Where | None = None,
        distinct: float | None = None,
    ) -> list[list[Hit]]:
        """The k best rows for each picture, given as a file, its bytes, or a PIL image."""
        terms = [[Term("image", picture)] for picture in pictures]
        return self.queries(terms, k, modality, where=where, distinct=distinct)

    def vectors(
        self,
        vectors: np.ndarray,
        k: int = 10,
        modality: str = "image",
        *,
        where: str | Where | None = None,
        distinct: float | None = None,
    ) -> list[list[Hit]]:
        """The k best rows for each row of (Q, D), of any length but 0. Fewer than k where the index is smaller."""
        return self._answers(self._view, self._unit(vectors), k, modality, where, distinct)

    def query(
        self,
        terms: Sequence[Term],
        k: int = 10,
        modality: str = "image",
        *,
        where: str | Where | None = None,
        distinct: float | None = None,
    ) -> list[Hit]:
        """The k best rows for a sum of texts, pictures, keys and vectors."""
        return self.queries([terms], k, modality, where=where, distinct=distinct)[0]

    def queries(
        self,
        sums: Sequence[Sequence[Term]],
        k: int = 10,
        modality: str = "image",
        *,
        where: str | Where | None = None,
        distinct: float | None = None,
    ) -> list[list[Hit]]:
        """query() of each sum; all their texts and pictures are encoded together."""
        self._check(modality, distinct)
        view = self._view
        rows = self._encoded([term for terms in sums for term in terms], view)
        asked, low = np.empty((len(sums), self.dim), dtype=np.float32), 0
        for n, terms in enumerate(sums):
            asked[n] = combine(terms, rows[low : low + len(terms)])
            low += len(terms)
        hits = self._answers(view, asked, k, modality, where, distinct)
        return [
            self._with_probability(found) if _across(terms, modality) else found
            for terms, found in zip(sums, hits, strict=True)
        ]

    def encode(self, terms: Sequence[Term], modality: str = "image") -> np.ndarray:
        """(D,) float32 unit row of a sum. UserError: no such key, a picture that cannot be read, no CLIP."""
        self._check(modality, None)
        return combine(terms, self._encoded(terms, self._view))

    def row_of(self, key: str) -> int | None:
        """The row of a sample's key; None if it is not there, or was deleted."""
        row = int(self.index.rows_of([key])[0])
        return None if row < 0 else row

    def picture_of(self, row: int, least: int = 0) -> "Image.Image | None":
        """The picture of a row, from the shards; None if they are gone or no longer have it.

        least: a JPEG may come at a fraction of its size, as long as both sides keep this many pixels; 0: never.
        """
        return self._view.album.picture(row, least)

    def picture_bytes(self, row: int) -> tuple[bytes, str] | None:
        """The picture file of a row as it is in its tar, and its media type; None as for picture_of()."""
        return self._view.picture_bytes(row)

    def tar_of(self, row: int) -> str | None:
        """The name of the tar that holds a row's sample; None if the shards are gone."""
        return self._view.tar_of(row)

    @property
    def clip(self) -> "Clip":
        """The CLIP that the embeddings were made with; UserError if it is gone or another one."""
        with self._loading:
            return self._clip

    @functools.cached_property
    def _clip(self) -> "Clip":
        return clip_of(self.manifest, self._given, self._device)

    @property
    def calibration(self) -> "Calibration | None":
        """The CLIP folder's curve from cosine to probability; None if it has none, or one of other weights."""
        with self._loading:
            return self._calibration

    @functools.cached_property
    def _calibration(self) -> "Calibration | None":
        return calibration_of(self.manifest, self._given)

    def _with_probability(self, hits: list[Hit]) -> list[Hit]:
        """Hits between a picture and a caption with the probability of a match. Cosines of two pictures, of two
        captions, or with a sum, lie elsewhere: the curve says nothing about them."""
        curve = self.calibration
        return hits if curve is None else [replace(h, probability=float(curve.probability(h.score))) for h in hits]

    def _check_clip(self, manifest: Manifest) -> None:
        """CLIP and curve stay loaded over a refresh, so the folder must still be of the same one."""
        ours, theirs = _made_with(self.manifest), _made_with(manifest)
        if theirs != ours:
            raise UserError(
                f"{self.folder}/ is now of another CLIP ({theirs[:15]}, {manifest.result['dim']} wide; it was "
                f"{ours[:15]}, {self.dim} wide); open it anew, as a server does when it is started again"
            )

    def _check(self, modality: str, distinct: float | None) -> None:
        if modality not in MODALITIES:
            raise QueryError(f"modality {modality!r} must be one of: {', '.join(MODALITIES)}")
        if distinct is not None and not 0 < distinct <= 1:
            raise QueryError(f"distinct {distinct:g} is a cosine above 0 and at most 1, such as 0.95")

    def _unit(self, vectors: np.ndarray) -> np.ndarray:
        """(Q, D) float32 unit rows of vectors of any length but 0."""
        queries = np.array(vectors, dtype=np.float32, ndmin=2)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise QueryError(f"the queries are {queries.shape}, but the index holds rows of width {self.dim}")
        lengths = np.linalg.norm(queries, axis=1, keepdims=True)
        if not np.all(np.isfinite(lengths) & (lengths > 0)):
            wrong = int(np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))[0])
            raise QueryError(f"query {wrong} has length {lengths[wrong, 0]:.3g}, so it points nowhere")
        return queries / lengths

    def _encoded(self, terms: Sequence[Term], view: "View") -> np.ndarray:
        """(T, D) float32 unit rows of the terms, whatever their weights."""
        rows = np.empty((len(terms), self.dim), dtype=np.float32)
        of = {kind: [n for n, term in enumerate(terms) if term.kind == kind] for kind in ("text", "image", "key")}
        if of["key"]:
            keys = [str(terms[n].value) for n in of["key"]]
            at = view.index.rows_of(keys)
            if (at < 0).any():
                gone = keys[int(np.flatnonzero(at < 0)[0])]
                raise QueryError(f"the index has no sample with the key {gone!r}; keys are in the hits of a search")
            rows[of["key"]] = view.index.vectors(at)
        if of["image"]:
            pixels = [self._pixels(terms[n].value) for n in of["image"]]
            rows[of["image"]] = self._encoded_pixels(pixels)
        if of["text"]:
            from clip_train.embed import encode_texts

            texts, clip = [str(terms[n].value) for n in of["text"]], self.clip
            with self._encoding:
                rows[of["text"]] = encode_texts(clip, texts)
        for n, term in enumerate(terms):
            if term.kind == "vector":
                is_file = isinstance(term.value, str | os.PathLike)
                vector = self._unit(read_vectors(term.value) if is_file else term.value)
                if len(vector) != 1:
                    raise QueryError(f"a term is one vector, but {term.value} holds {len(vector)}")
                rows[n] = vector[0]
        return rows

    def _encoded_pixels(self, pixels: "Sequence[torch.Tensor]") -> np.ndarray:
        import torch

        clip = self.clip
        with self._encoding:
            pieces = [torch.stack(list(pixels[low : low + BATCH])) for low in range(0, len(pixels), BATCH)]
            return np.concatenate([clip.encode_image(piece).numpy() for piece in pieces])

    def _answers(
        self,
        view: "View",
        asked: np.ndarray,
        k: int,
        modality: str,
        where: str | Where | None,
        distinct: float | None,
    ) -> list[list[Hit]]:
        """Hits of unit rows (Q, D)."""
        self._check(modality, distinct)
        allowed = None if where is None else view.mask(parse(where) if isinstance(where, str) else where)
        k = min(k, len(view.index) if allowed is None else int(np.count_nonzero(allowed & view.index.live)))
        if not len(asked) or k < 1:
            return [[] for _ in asked]
        if distinct is not None:
            found = [view.distinct(row[None], k, modality, allowed, distinct) for row in asked]
        else:
            scores, rows = view.index.search(asked, k, modality, allowed)
            found = zip(scores.tolist(), rows.tolist(), strict=True)
        return [view.hits(scores, rows) for scores, rows in found]

    def _pixels(self, picture: "Path | str | bytes | Image.Image") -> "torch.Tensor":
        from clip_train.pictures import PictureError, decode_picture

        if isinstance(picture, str | os.PathLike):
            try:
                data = Path(picture).read_bytes()
            except OSError as error:
                raise QueryError(f"{picture} cannot be read: {error.strerror}") from error
        else:
            data = picture
        try:
            image = decode_picture(data) if isinstance(data, bytes) else data.convert("RGB")
        except PictureError as error:
            name = picture if data is not picture else "the picture"
            raise QueryError(f"{name} cannot be read: {error}") from error
        return self.clip.to_pixels(image)


def clip_of(manifest: Manifest, given: Path | str | None = None, device: "str | torch.device" = "cpu") -> "Clip":
    """The CLIP that made the embeddings which `manifest` (of such a folder, or of an index) speaks of.

    given: where it is; None: where the manifest says it was. UserError if it is gone, or another one.
    """
    from clip_train.model import Clip

    folder, dim = manifest.folder, manifest.result["dim"]
    spec = _clip_spec(manifest, given)
    if spec is None:
        was = manifest.inputs.get("clip", {}).get("path", "unknown")
        raise UserError(f"the CLIP of {folder}/ is no longer at {folder / was}; say where: --clip FOLDER")
    clip = Clip.load(spec, device=device)
    again = "make both again: unclip embed, unclip index"
    if clip.embed_dim != dim:
        raise UserError(
            f"{folder}/ was built from {dim}-wide embeddings, but {spec}/ makes {clip.embed_dim}-wide ones; {again}"
        )
    made_with = _made_with(manifest)
    if clip.fingerprint != made_with:
        raise UserError(
            f"{folder}/ was built with the CLIP {made_with[:15]}, but {spec}/ is {clip.fingerprint[:15]}; "
            f"name the right one with --clip, or {again}"
        )
    return clip


def calibration_of(manifest: Manifest, given: Path | str | None = None) -> "Calibration | None":
    """That CLIP's curve from cosine to probability; None if its folder has none, or one of other weights."""
    from clip_train.calibration import load

    spec = str(_clip_spec(manifest, given) or "").removeprefix("local-dir:")
    curve = load(spec) if spec else None
    return curve if curve and curve.clip == _made_with(manifest) else None


def _made_with(manifest: Manifest) -> str:
    """The fingerprint of the CLIP that made the embeddings; equal ones make rows of equal width."""
    return manifest.inputs["clip"]["fingerprint"]


def _clip_spec(manifest: Manifest, given: Path | str | None) -> Path | str | None:
    """The CLIP that was given, else where the manifest says it was: a folder, or a name like ViT-B-32:openai."""
    recorded = Path(manifest.inputs.get("clip", {}).get("path", "")).name
    return given or manifest.input_path("clip") or (recorded if ":" in recorded else None)


class View:
    """One state of an index folder, and what was found out about it. A question sees one view from start to end."""

    def __init__(self, index: LiveIndex) -> None:
        self.index = index
        self.album = Album.of(index)
        self._masks: dict[Where, np.ndarray] = {}
        self._lock = threading.Lock()

    @functools.cached_property
    def columns(self) -> dict[str, str]:
        return columns_of(self.index.table)

    def mask(self, where: Where) -> np.ndarray:
        """where.mask() of the table; those of the last few filters are kept."""
        with self._lock:
            mask = self._masks.pop(where, None)
        if mask is None:
            mask = where.mask(self.index.table)
        with self._lock:
            self._masks[where] = mask  # now the newest
            while len(self._masks) > max(1, MASK_BYTES // max(1, mask.nbytes)):
                del self._masks[next(iter(self._masks))]
        return mask

    def picture_bytes(self, row: int) -> tuple[bytes, str] | None:
        """The picture file of a row as it is in its tar, and its media type; None as for Searcher.picture_of()."""
        file = self.album.file(row)
        return None if file is None else (file, media_type(file))

    def tar_of(self, row: int) -> str | None:
        """The name of the tar that holds a row's sample; None if the shards are gone."""
        return self.album.tar(row)

    def hits(self, scores: Sequence[float], rows: Sequence[int]) -> list[Hit]:
        hits = []
        for score, row in zip(scores, rows, strict=True):
            if row >= 0:  # -1: fewer than k rows were found
                meta = self.index.table.row(row)
                key, caption = meta.pop("image_path"), meta.pop("caption", "")
                hits.append(Hit(len(hits) + 1, score, row, key, caption, meta))
        return hits

    def distinct(
        self, query: np.ndarray, k: int, modality: str, allowed: np.ndarray | None, cosine: float
    ) -> tuple[list[float], list[int]]:
        """The k best rows for one query (1, D) of which no two are nearer to each other than `cosine`.

        Twice as many are fetched as long as too few are left, up to LOOKED_AT.
        """
        most = min(len(self.index), max(LOOKED_AT, 20 * k))
        fetched = min(2 * k, most)
        while True:
            scores, rows = self.index.search(query, fetched, modality, allowed)
            scores, rows = scores[0][rows[0] >= 0], rows[0][rows[0] >= 0]
            kept = apart(self.index.vectors(rows, modality), cosine, k)
            if len(kept) == k or len(rows) < fetched or fetched == most:
                return scores[kept].tolist(), rows[kept].tolist()
            fetched = min(2 * fetched, most)


def apart(rows: np.ndarray, cosine: float, most: int) -> list[int]:
    """Which unit rows (N, D) are at most at this cosine to all that were kept before them; the first `most` such.

    BLOCK rows are compared with one another and what is kept of them with all that follow, so memory stays small."""
    free = np.ones(len(rows), dtype=bool)
    kept: list[int] = []
    for low in range(0, len(rows), BLOCK):
        block = low + np.flatnonzero(free[low : low + BLOCK])
        alike = rows[block] @ rows[block].T > cosine
        chosen: list[int] = []
        for n in range(len(block)):
            if not alike[n, chosen].any():
                chosen.append(n)
        kept += block[chosen].tolist()
        if len(kept) >= most:
            break
        later = low + BLOCK + np.flatnonzero(free[low + BLOCK :])
        for some in np.array_split(later, -(-len(later) // BLOCK)) if len(later) else ():
            free[some] = ~(rows[some] @ rows[block[chosen]].T > cosine).any(axis=1)
    return kept[:most]


def _across(terms: Sequence[Term], modality: str) -> bool:
    """Whether a query is one caption for pictures, or one picture for captions: what the curve was fitted to."""
    if len(terms) != 1 or terms[0].weight < 0:
        return False
    return terms[0].kind == "text" if modality == "image" else terms[0].kind in ("image", "key")
