import csv
import io

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from clip_train import embed as module
from clip_train.embed import embed, encode_rows, encode_texts
from clip_train.folder import read_manifest
from clip_train.model import Clip
from clip_train.pictures import Pictures
from clip_train.sample import Sample
from clip_train.settings import UserError
from clip_train.shards import ShardSet, write_shard, write_shards
from clip_train.store import EmbeddingStore


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    tiny.shards(root / "shards", n=10, per_shard=4)
    tiny.clip(root / "clip")
    embed(root / "shards", root / "clip", root / "emb", batch_size=3)
    return root


def files_of(folder):
    skip = {"manifest.json"}
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in skip}


def test_every_row_is_open_clips_embedding_of_the_sample_with_its_key(made):
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{made / 'clip'}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{made / 'clip'}")
    store = EmbeddingStore.open(made / "emb")
    shards = ShardSet(made / "shards")
    assert store.keys == shards.keys == [f"s{i:03d}" for i in range(10)]
    with torch.no_grad():
        for row in (1, 3, 4, 9):
            pixels = preprocess(Image.open(io.BytesIO(shards.read(row).image)))[None]
            image = torch.nn.functional.normalize(model.eval().encode_image(pixels), dim=-1)[0].numpy()
            text = torch.nn.functional.normalize(model.encode_text(tokenize(shards.captions(row)[:1])), dim=-1)[0]
            np.testing.assert_allclose(store.image([row])[0], image, atol=5e-4)
            np.testing.assert_allclose(store.text([row])[0], text.numpy(), atol=5e-4)
            assert np.abs(store.image([row - 1])[0] - image).max() > 0.02  # the neighbour is another picture


def test_all_captions_are_embedded_and_the_json_travels_along(made):
    store = EmbeddingStore.open(made / "emb")
    emb, row = store.captions()
    assert row.tolist() == [i // 2 for i in range(20)]
    assert store.caption_texts()[:2] == ["picture number 0", "one of many"]
    np.testing.assert_array_equal(emb[1], emb[19])  # equal captions of different shards
    assert store.metadata["label"][5] == "label 2" and store.metadata["source.page"].tolist() == list(range(10))


def test_the_manifest_says_what_was_embedded_and_with_what(made):
    manifest = read_manifest(made / "emb", "embeddings")
    assert manifest.inputs["clip"]["fingerprint"] == Clip.load(made / "clip").fingerprint
    assert manifest.inputs["shards"]["fingerprint"] == ShardSet(made / "shards").fingerprint
    assert manifest.input_path("clip") == made / "clip" and manifest.input_path("shards") == made / "shards"
    wanted = {"rows": 10, "captions": 20, "dim": 32, "parts": 3, "bad": 0, "skipped": 0}
    assert {name: manifest.result[name] for name in wanted} == wanted
    assert manifest.result["shards"] == ["000000.tar", "000001.tar", "000002.tar"]


@pytest.mark.parametrize("stop_after", [0, 1, 4, 7])
def test_a_killed_run_resumed_equals_an_unbroken_one_and_skips_what_is_finished(
    made, tmp_path, monkeypatch, stop_after
):
    class Killed(BaseException):
        pass

    def kill(done, total, **numbers):
        assert total == 10
        if done > stop_after:
            raise Killed

    with pytest.raises(Killed):
        embed(made / "shards", made / "clip", tmp_path / "emb", batch_size=3, on_progress=kill)
    assert not (tmp_path / "emb").exists()
    encoded = []
    plain = module._embed_part
    monkeypatch.setattr(
        module, "_embed_part", lambda writer, part, *rest: encoded.append(part) or plain(writer, part, *rest)
    )
    embed(made / "shards", made / "clip", tmp_path / "emb", batch_size=3)
    assert encoded == {0: [0, 1, 2], 1: [0, 1, 2], 4: [1, 2], 7: [1, 2]}[stop_after]
    assert files_of(tmp_path / "emb") == files_of(made / "emb")


def test_running_it_again_does_nothing(made, monkeypatch):
    monkeypatch.setattr(module, "_embed_part", None)
    again = embed(made / "shards", made / "clip", made / "emb")
    assert again.fingerprint == read_manifest(made / "emb").fingerprint


def test_another_clip_into_the_same_folder_is_refused(made, tmp_path):
    tiny.clip(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was made from other clip"):
        embed(made / "shards", tmp_path / "other", made / "emb")


def test_bad_pictures_are_left_out_and_named_and_empty_parts_are_fine(made, tmp_path):
    samples = tiny.samples(6)
    for i in (1, 2, 3):  # 2 and 3 are the whole second shard
        samples[i] = Sample(
            key=samples[i].key, image=b"no picture", ext="png", captions=["x"], meta={"width": 1, "height": 1}
        )
    write_shards(samples, tmp_path / "shards", samples_per_shard=2)
    write_shard([], tmp_path / "shards" / "000000-empty.tar")
    manifest = embed(tmp_path / "shards", made / "clip", tmp_path / "emb")
    store = EmbeddingStore.open(tmp_path / "emb")
    assert store.keys == ["s000", "s004", "s005"] and manifest.result["bad"] == 3
    whole = EmbeddingStore.open(made / "emb")
    np.testing.assert_allclose(store.image(), whole.image([0, 4, 5]), atol=1e-3)
    with open(tmp_path / "emb" / "bad.csv") as file:
        table = list(csv.reader(file))
    assert table[0] == ["key", "reason"] and [key for key, _ in table[1:]] == ["s001", "s002", "s003"]
    assert len(list((tmp_path / "emb" / "img_emb").iterdir())) == 2


def test_nothing_but_bad_pictures_is_one_clear_line(made, tmp_path):
    write_shards(
        [Sample(key="a", image=b"no", ext="png", captions=["x"], meta={"width": 1, "height": 1})], tmp_path / "shards"
    )
    with pytest.raises(UserError, match="none of the 1 pictures can be read; the first: a: "):
        embed(tmp_path / "shards", made / "clip", tmp_path / "emb")


def test_a_clip_that_makes_nan_is_refused_by_sample(made, tmp_path, monkeypatch):
    broken = torch.full((3, 32), torch.nan)
    monkeypatch.setattr(Clip, "encode_image", lambda self, pixels: broken[: len(pixels)])
    with pytest.raises(UserError, match="no finite embedding of the picture of sample s000"):
        embed(made / "shards", made / "clip", tmp_path / "emb", batch_size=3)


def test_encode_rows_gives_the_rows_that_embed_writes(made):
    pictures = Pictures(ShardSet(made / "shards"), 16)
    clip = Clip.load(made / "clip")
    store = EmbeddingStore.open(made / "emb")
    np.testing.assert_allclose(encode_rows(clip, pictures, batch_size=4)[0], store.image(), atol=1e-3)
    np.testing.assert_allclose(encode_rows(clip, pictures, [7, 2])[0], store.image([7, 2]), atol=1e-3)


def test_texts_come_back_in_the_order_asked_for_and_equal_ones_are_encoded_once(made, monkeypatch):
    clip = Clip.load(made / "clip")
    texts = ["a long caption with many words", "b", "a long caption with many words", "cc"]
    one_by_one = np.concatenate([clip.encode_text([text]).numpy() for text in texts])
    seen = []
    plain = clip.encode_text
    monkeypatch.setattr(clip, "encode_text", lambda some: seen.extend(some) or plain(some))
    np.testing.assert_allclose(encode_texts(clip, texts, batch_size=2), one_by_one, atol=1e-5)
    assert sorted(seen) == sorted(set(texts))
    assert encode_texts(clip, []).shape == (0, 32)
