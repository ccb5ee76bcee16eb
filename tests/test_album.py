import io
import os

import pytest
import tiny
from PIL import Image

from clip_train.embed import embed
from clip_train.store import EmbeddingStore
from retrieval.album import Album, media_type


@pytest.fixture
def world(tmp_path):
    tiny.shards(tmp_path / "shards", n=6, per_shard=4)
    tiny.clip(tmp_path / "clip")
    embed(tmp_path / "shards", tmp_path / "clip", tmp_path / "emb")
    return tmp_path


def album_of(folder):
    store = EmbeddingStore.open(folder)
    return Album(store.manifest, store.table)


def test_a_picture_is_the_file_in_the_tar(world):
    album = album_of(world / "emb")
    assert album.file(5) == tiny.picture(5) and album.tar(5) == "000001.tar"
    assert album.picture(5).size == (20, 20)


def test_tars_that_are_gone_have_no_pictures(world):
    album = album_of(world / "emb")
    (world / "shards" / "000001.tar").unlink()
    assert album.file(5) is None and album.picture(5) is None and album.tar(5) is None
    assert album.file(0) == tiny.picture(0)  # its own tar is still there
    (world / "shards" / "000000.tar").unlink()
    assert album_of(world / "emb").file(0) is None


def test_a_tar_that_was_written_anew_while_the_album_is_open_has_its_pictures(world):
    album = album_of(world / "emb")
    assert album.file(0) == tiny.picture(0)
    tar = world / "shards" / "000000.tar"
    os.utime(tar, ns=(1, 1))  # the same tar, copied here again
    assert album.file(0) == tiny.picture(0) and album.file(1) == tiny.picture(1)


def test_tars_of_other_samples_have_no_pictures(world):
    tiny.write_shards(tiny.samples(2, "other"), world / "new", samples_per_shard=1)
    for n in range(2):
        (world / "new" / f"{n:06d}.tar").replace(world / "shards" / f"{n:06d}.tar")
    assert album_of(world / "emb").file(0) is None


@pytest.mark.parametrize(("kind", "said"), [("JPEG", "image/jpeg"), ("PNG", "image/png"), ("WEBP", "image/webp")])
def test_the_media_type_is_that_of_the_bytes(kind, said):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, kind)
    assert media_type(file.getvalue()) == said


def test_a_file_of_no_known_kind_is_no_picture():
    assert media_type(b"<script>") == media_type(b"") == "application/octet-stream"
