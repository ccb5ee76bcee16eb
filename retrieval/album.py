"""Album: the pictures of an index's rows, straight from the tars that they were embedded from."""

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_train.folder import Manifest
from clip_train.settings import UserError
from clip_train.store import MetadataTable
from retrieval.vectors import sources_of

if TYPE_CHECKING:
    from PIL import Image

    from clip_train.shards import ShardSet
    from retrieval.live import LiveIndex

KEY = "image_path"  # the metadata's column of keys
KINDS = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif", b"RIFF": "image/webp"}


class Album:
    """Tars are looked for when a picture of theirs is first wanted. Safe to use from several threads."""

    def __init__(self, manifest: Manifest, table: MetadataTable) -> None:
        """The pictures of an embeddings folder, or of an index folder without segments."""
        self._table = table
        self._sources = sources_of(manifest)
        self._source_of = None
        self._sets: dict[str, ShardSet | None] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, index: "LiveIndex") -> "Album":
        """The pictures of an index and its segments, each from its own tars: a key may have had another one before."""
        album = cls(index.manifest, index.table)
        album._sources = index.sources()
        first = np.cumsum([0, *(len(sources_of(part.manifest)) for part in index.parts)])

        def source_of(row: int) -> int:
            part = int(np.searchsorted(index.starts, row, side="right")) - 1
            within, _ = index.parts[part].vectors.places(np.array([row - index.starts[part]]))
            return int(first[part] + within[0])

        album._source_of = source_of
        return album

    def file(self, row: int) -> bytes | None:
        """The picture file of a row as it is in its tar; None if the tars are gone or no longer have it."""
        for _ in range(2):
            shards, at = self._place(row)
            try:
                return None if at is None else shards.picture(at)
            except UserError:  # a tar went away, or was written anew: what there is now is opened
                self._forget(shards)
        return None

    def tar(self, row: int) -> str | None:
        """The name of the tar that holds a row's sample; None if the tars are gone."""
        shards, at = self._place(row)
        return None if at is None else shards.paths[shards.shard_of(at)].name

    def picture(self, row: int, least: int = 0) -> "Image.Image | None":
        """The decoded picture; None if there is none. least: see clip_train.pictures.decode_picture."""
        from clip_train.pictures import PictureError, decode_picture

        data = self.file(row)
        try:
            return None if data is None else decode_picture(data, least=least)
        except PictureError:
            return None

    def _place(self, row: int) -> "tuple[ShardSet | None, int | None]":
        """The shards of a row, and its sample's row there."""
        shards = self._shards(self._sources[self._source_of(row) if self._source_of else 0])
        return shards, None if shards is None else shards.row_of(self._table.row(row)[KEY])

    def _shards(self, source: Manifest) -> "ShardSet | None":
        root = source.input_path("shards")
        spec = "::".join(str(root / name) for name in source.result.get("shards", [])) if root else ""
        with self._lock:
            if spec not in self._sets:
                self._sets[spec] = _opened(spec)
            return self._sets[spec]

    def _forget(self, shards: "ShardSet") -> None:
        with self._lock:
            self._sets = {spec: opened for spec, opened in self._sets.items() if opened is not shards}


def media_type(file: bytes) -> str:
    """What kind of picture a file's first bytes say it is; application/octet-stream if they say nothing known."""
    return next((kind for magic, kind in KINDS.items() if file.startswith(magic)), "application/octet-stream")


def _opened(spec: str) -> "ShardSet | None":
    """Those of the tars that are still there."""
    from clip_train.shards import ShardSet

    there = [path for path in spec.split("::") if Path(path).is_file()]
    try:
        return ShardSet("::".join(there)) if there else None
    except UserError:  # tars of other contents by now
        return None
