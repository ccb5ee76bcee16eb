import asyncio
import base64
import io
import json
import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from clip_train.embed import embed
from clip_train.model import Clip
from clip_train.settings import UserError
from retrieval import changes, clip_api, encoder
from retrieval.asked import Refused
from retrieval.encoder import Encoder
from retrieval.index import build_index
from retrieval.search import Searcher
from retrieval.served import Found, ServedIndex, without_copies
from retrieval.telemetry import Telemetry


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    tiny.shards(root / "shards", n=10, per_shard=4)
    tiny.clip(root / "clip")
    embed(root / "shards", root / "clip", root / "emb")
    build_index(root / "emb", root / "index")
    return root


@pytest.fixture(scope="module")
def clip(world):
    return Clip.load(world / "clip")


def served(index):
    threads = {"threads": ThreadPoolExecutor(4), "one_thread": ThreadPoolExecutor(1)}
    return ServedIndex("tiny", Searcher.open(index), None, telemetry=Telemetry(), batch=8, seconds=30.0, **threads)


def reader(clip, **how):
    threads = {"threads": ThreadPoolExecutor(4), "large_thread": ThreadPoolExecutor(1)}
    threads |= {"one_thread": ThreadPoolExecutor(1), "telemetry": Telemetry()}
    return Encoder(clip, "tiny", batch=8, seconds=30.0, **threads, **{"max_pixels": 1e6} | how)


# Changes of the folder


def test_an_index_of_another_clip_is_not_taken_in_and_that_is_said_once(world, tmp_path, caplog):
    shutil.copytree(world / "index", tmp_path / "index")
    tiny.clip(tmp_path / "clip2", seed=3)
    embed(world / "shards", tmp_path / "clip2", tmp_path / "emb2")
    index = served(tmp_path / "index")
    query = index.searcher.view.index.vectors([4])[0]
    shutil.rmtree(tmp_path / "index")
    build_index(tmp_path / "emb2", tmp_path / "index")

    async def ask():
        assert [await index.refresh() for _ in range(3)] == [False] * 3
        return await index.search(query, 1)

    with caplog.at_level(logging.WARNING, "unclip.serve"):
        found = asyncio.run(ask())
    assert found.rows.tolist() == [4] and found.scores[0] == pytest.approx(1, abs=2e-3)
    assert caplog.text.count("is now of another CLIP") == 1


def test_an_answer_that_held_one_state_is_given_however_often_the_index_changes_meanwhile(world, tmp_path):
    for name in ("shards", "emb", "index"):
        shutil.copytree(world / name, tmp_path / name)
    index = served(tmp_path / "index")
    query = index.searcher.view.index.vectors([9])[0]

    async def work():
        found = await index.search(query, 1)
        for n in range(4):
            changes.delete(tmp_path / "index", [f"s00{n}"])
            changes.compact(tmp_path / "index")
            assert await index.refresh()
        return json.loads(clip_api._rows(index, found, "image", 1, False))

    (hit,) = asyncio.run(index.whole(work))
    assert (hit["id"], hit["image_path"]) == (9, "s009")  # as it was when the question was asked
    assert base64.b64decode(hit["image"]) == tiny.picture(9)
    assert index.searcher.row_of("s009") == 5


def test_work_that_failed_in_an_old_state_is_done_again_and_else_its_error_is_told(world):
    index, tried = served(world / "index"), []

    async def fails_once():
        tried.append(1)
        if len(tried) == 1:
            index.searcher._view = type(index.searcher.view)(index.searcher.index)  # as after a reload
            raise OSError("gone")
        return "done"

    async def fails():
        raise UserError("damaged")

    assert asyncio.run(index.whole(fails_once)) == "done" and len(tried) == 2
    with pytest.raises(UserError, match="damaged"):
        asyncio.run(index.whole(fails))


# Answers


def test_copies_are_left_out_of_many_rows_as_of_few():
    rows = tiny.unit_rows(600, 16)
    rows[300:] = rows[:300]
    live = SimpleNamespace(vectors=lambda at, modality: rows[at])
    order = np.random.default_rng(0).permutation(600)
    found = Found(SimpleNamespace(index=live), np.linspace(1, 0, 600, dtype=np.float32), order)
    left = without_copies(found, "image")
    assert sorted(left.rows % 300) == list(range(300))
    firsts = sorted(np.unique(order % 300, return_index=True)[1])  # the better one of each two
    assert left.rows.tolist() == order[firsts].tolist() and left.scores.tolist() == found.scores[firsts].tolist()


def test_an_answer_carries_only_so_many_bytes_of_pictures(world, monkeypatch):
    index = served(world / "index")
    monkeypatch.setattr(clip_api, "MOST_INLINE", 4 * len(base64.b64encode(tiny.picture(0))) // 3)
    for rows in (
        [known["metadata"] for known in json.loads(clip_api._described(index, list(range(10))))],
        json.loads(clip_api._rows(index, asyncio.run(index.search(np.eye(32)[0], 10)), "image", 9, False))[:9],
    ):
        assert ["image" in row for row in rows] == [True] * 2 + [False] * (len(rows) - 2)
        assert all(row["caption"] for row in rows)


# Encoding


def test_large_pictures_are_decoded_one_after_the_other(clip, monkeypatch):
    at_once, most, lock, wait = [0], [0], threading.Lock(), threading.Event()
    decoded = Encoder._decoded

    def watched(self, data):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        wait.wait(0.03)
        try:
            return decoded(self, data)
        finally:
            with lock:
                at_once[0] -= 1

    monkeypatch.setattr(Encoder, "_decoded", watched)

    async def ask(side, room):
        see, most[0] = reader(clip, max_pixels=room), 0
        rows = await asyncio.gather(*(see.picture(tiny.picture(n, side)) for n in range(4)))
        return np.stack(rows)

    few = asyncio.run(ask(20, 500))
    assert most[0] == 1
    many = asyncio.run(ask(20, 1e6))
    assert most[0] > 1
    np.testing.assert_allclose(few, many, atol=1e-6)
    alone = clip.encode_image(clip.to_pixels(Image.open(io.BytesIO(tiny.picture(2))))[None]).numpy()
    np.testing.assert_allclose(few[2:3], alone, atol=1e-6)


def test_a_picture_that_is_too_large_or_damaged_is_refused(clip):
    async def ask():
        see = reader(clip, max_pixels=1000)
        asked = [tiny.picture(0, 40), b"no picture", tiny.picture(0)[:-40], tiny.picture(0, 20)]
        return await asyncio.gather(*map(see.picture, asked), return_exceptions=True)

    *wrong, right = asyncio.run(ask())
    assert all(isinstance(one, Refused) and one.status == 400 for one in wrong) and right.shape == (32,)
    assert "40 x 40 is more than" in str(wrong[0])


def test_the_tokenizer_remembers_no_more_than_so_many_words_and_reads_all_the_same(world, monkeypatch):
    monkeypatch.setattr(encoder, "WORDS", 20)
    clip = Clip.load(world / "clip")
    words = [f"{a}{b}ish" for a in "abcdefgh" for b in "aeiou"]
    plain = Clip.load(world / "clip").tokenize([*words, "x" * 300, "<start_of_text> cat"])
    reader(clip)
    for _ in range(2):
        assert (clip.tokenize([*words, "x" * 300, "<start_of_text> cat"]) == plain).all()
    assert len(clip.tokenizer.cache) <= 20 and max(map(len, clip.tokenizer.cache)) <= encoder.LONG_WORD
