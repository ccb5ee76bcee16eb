"""Searcher: captions, pictures or vectors -> hits."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_train.folder import Manifest, read_manifest
from clip_train.settings import UserError
from clip_train.store import MetadataTable
from retrieval.index import MODALITIES, load_index

if TYPE_CHECKING:
    import faiss
    import torch
    from PIL import Image

    from clip_train.calibration import Calibration
    from clip_train.model import Clip
    from clip_train.shards import ShardSet


@dataclass(frozen=True)
class Hit:
    """One answer to a query."""

    rank: int  # 1 is the best
    score: float  # cosine
    row: int  # of the embeddings and of the index
    key: str  # of the sample in the shards
    caption: str
    meta: dict[str, Any]  # the rest of what the metadata says
    probability: float | None = None  # that picture and caption match; of calibrated CLIPs, between the two kinds only


class Searcher:
    """An index folder, ready to be asked. CLIP and the shards are opened when they are first needed."""

    def __init__(self, manifest: Manifest, clip: Path | None, device: "str | torch.device") -> None:
        self.manifest = manifest
        self.folder = manifest.folder
        self.dim: int = manifest.result["dim"]
        self.table = MetadataTable(self.folder / "metadata")
        self._given = clip
        self._device = device
        self._index = functools.cache(self._open_index)

    @classmethod
    def open(
        cls, index: Path | str, clip: Path | str | None = None, device: "str | torch.device" = "cpu"
    ) -> "Searcher":
        """index: an index folder. clip: the CLIP that made its embeddings; None: where the manifests say it was.

        UserError: not an index folder, or (at once when `clip` is named, else on the first query) another CLIP.
        """
        searcher = cls(read_manifest(index, "index"), None if clip is None else Path(clip), device)
        searcher._index("image")
        if clip is not None:
            searcher.clip  # noqa: B018  (loads and checks it)
        return searcher

    def __len__(self) -> int:
        return len(self.table)

    def text(self, queries: Sequence[str], k: int = 10, modality: str = "image") -> list[list[Hit]]:
        """The k best rows for each caption: by their pictures, or with modality "text" by their captions."""
        hits = self.vectors(self.clip.encode_text(list(queries)).numpy(), k, modality)
        return self._with_probability(hits) if modality == "image" else hits

    def picture(
        self, pictures: "Sequence[Path | str | bytes | Image.Image]", k: int = 10, modality: str = "image"
    ) -> list[list[Hit]]:
        """The k best rows for each picture, given as a file, its bytes, or a PIL image."""
        import torch

        pixels = torch.stack([self._pixels(picture) for picture in pictures])
        hits = self.vectors(self.clip.encode_image(pixels).numpy(), k, modality)
        return self._with_probability(hits) if modality == "text" else hits

    def vectors(self, vectors: np.ndarray, k: int = 10, modality: str = "image") -> list[list[Hit]]:
        """The k best rows for each row of (Q, D), of any length but 0. Fewer than k where the index is smaller."""
        if modality not in MODALITIES:
            raise UserError(f"modality {modality!r} must be one of: {', '.join(MODALITIES)}")
        queries = np.array(vectors, dtype=np.float32, ndmin=2)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise UserError(f"the queries are {queries.shape}, but {self.folder}/ holds rows of width {self.dim}")
        lengths = np.linalg.norm(queries, axis=1, keepdims=True)
        if not np.all(np.isfinite(lengths) & (lengths > 0)):
            wrong = int(np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))[0])
            raise UserError(f"query {wrong} has length {lengths[wrong, 0]:.3g}, so it points nowhere")
        if not len(queries) or k < 1:
            return [[] for _ in queries]
        scores, rows = self._index(modality).search(queries / lengths, min(k, len(self)))
        return [self._hits(*answer) for answer in zip(scores.tolist(), rows.tolist(), strict=True)]

    def picture_of(self, row: int) -> "Image.Image | None":
        """The picture of a row, from the shards; None if they are gone or no longer have it."""
        from clip_train.pictures import PictureError, decode_picture

        shards, place = self._shards
        at = place.get(self.table.row(row)["image_path"])
        if shards is None or at is None:
            return None
        try:
            return decode_picture(shards.read(at).image)
        except (PictureError, OSError):
            return None

    @functools.cached_property
    def clip(self) -> "Clip":
        """The CLIP that the embeddings were made with; UserError if it is gone or another one."""
        from clip_train.model import Clip

        folder = self._given or self.manifest.input_path("clip")
        if folder is None:
            was = self.manifest.inputs.get("clip", {}).get("path", "unknown")
            raise UserError(f"the CLIP of {self.folder}/ is no longer at {self.folder / was}; say where: --clip FOLDER")
        clip = Clip.load(folder, device=self._device)
        again = "make both again: unclip embed, unclip index"
        if clip.embed_dim != self.dim:
            raise UserError(
                f"{self.folder}/ was built from {self.dim}-wide embeddings, but {folder}/ makes {clip.embed_dim}-wide "
                f"ones; {again}"
            )
        made_with = self.manifest.inputs["clip"]["fingerprint"]
        if clip.fingerprint != made_with:
            raise UserError(
                f"{self.folder}/ was built with the CLIP {made_with[:15]}, but {folder}/ is {clip.fingerprint[:15]}; "
                f"name the right one with --clip, or {again}"
            )
        return clip

    @functools.cached_property
    def calibration(self) -> "Calibration | None":
        """The CLIP folder's curve from cosine to probability; None if it has none, or one of other weights."""
        from clip_train.calibration import load

        folder = self._given or self.manifest.input_path("clip")
        curve = load(folder) if folder else None
        return curve if curve and curve.clip == self.manifest.inputs["clip"]["fingerprint"] else None

    def _with_probability(self, hits: list[list[Hit]]) -> list[list[Hit]]:
        """Hits between pictures and captions with the probability of a match. Cosines of two pictures, or of two
        captions, lie elsewhere: the curve says nothing about them."""
        if self.calibration is None:
            return hits
        return [
            [replace(hit, probability=float(self.calibration.probability(hit.score))) for hit in row] for row in hits
        ]

    @functools.cached_property
    def _shards(self) -> "tuple[ShardSet | None, dict[str, int]]":
        from clip_train.shards import ShardSet

        root = self.manifest.input_path("shards")
        paths = [root / name for name in self.manifest.result["shards"]] if root else []
        if not paths or not all(path.exists() for path in paths):
            return None, {}
        shards = ShardSet("::".join(map(str, paths)))
        return shards, {key: i for i, key in enumerate(shards.keys)}

    def _open_index(self, modality: str) -> "faiss.Index":
        index = load_index(self.folder, modality)
        if index.ntotal != len(self.table) or index.d != self.dim:
            raise UserError(
                f"{self.folder}/{modality}.index holds {index.ntotal} rows of width {index.d}, but the folder has "
                f"{len(self.table)} rows of width {self.dim}; make it again: unclip index"
            )
        return index

    def _hits(self, scores: list[float], rows: list[int]) -> list[Hit]:
        hits = []
        for score, row in zip(scores, rows, strict=True):
            if row >= 0:  # -1: the lists that were probed held fewer than k rows
                meta = self.table.row(row)
                key, caption = meta.pop("image_path"), meta.pop("caption", "")
                hits.append(Hit(len(hits) + 1, score, row, key, caption, meta))
        return hits

    def _pixels(self, picture: "Path | str | bytes | Image.Image") -> "torch.Tensor":
        from clip_train.pictures import PictureError, decode_picture, to_pixels

        if isinstance(picture, str | os.PathLike):
            try:
                data = Path(picture).read_bytes()
            except OSError as error:
                raise UserError(f"{picture} cannot be read: {error.strerror}") from error
        else:
            data = picture
        try:
            image = decode_picture(data) if isinstance(data, bytes) else data.convert("RGB")
        except PictureError as error:
            raise UserError(f"{picture if data is not picture else 'the picture'} cannot be read: {error}") from error
        return to_pixels(image, self.clip.image_size)
