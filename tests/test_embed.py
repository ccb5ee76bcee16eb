import csv
import io
import json
import os

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from clip_train import earlier, engines, precision
from clip_train.embed import embed, encode_rows, encode_texts
from clip_train.folder import Manifest, read_manifest
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
    embed(root / "shards", root / "clip", root / "emb", batch_size=3, precision="fp32")
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
        embed(made / "shards", made / "clip", tmp_path / "emb", batch_size=3, precision="fp32", on_progress=kill)
    assert not (tmp_path / "emb").exists()
    encoded, told = [], []
    plain = engines.make_part
    monkeypatch.setattr(engines, "make_part", lambda shard, *rest: encoded.append(shard.part) or plain(shard, *rest))
    embed(
        made / "shards", made / "clip", tmp_path / "emb", batch_size=3, on_progress=lambda *a, **n: told.append((a, n))
    )  # in fp32, as it was begun
    wanted = {0: [0, 1, 2], 1: [0, 1, 2], 4: [1, 2], 7: [1, 2]}[stop_after]
    assert encoded == wanted
    there = 3 - len(wanted)
    assert told[0] == ((4 * there, 10), {"bad": 0, "resumed": there}) and told[-1][0] == (10, 10)
    assert files_of(tmp_path / "emb") == files_of(made / "emb")


def test_running_it_again_does_nothing(made, monkeypatch):
    monkeypatch.setattr(engines, "make_part", None)
    again = embed(made / "shards", f"local-dir:{made / 'clip'}", made / "emb")
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
    monkeypatch.setattr(Clip, "image_rows", lambda self, pixels: broken[: len(pixels)])
    with pytest.raises(UserError, match="no finite embedding of the picture of sample s000"):
        embed(made / "shards", made / "clip", tmp_path / "emb", batch_size=3, precision="fp32")


def test_in_bf16_rows_keep_a_cosine_of_nearly_one_and_the_manifest_says_so(made, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "_multiplies_bf16", lambda device: True)
    manifest = embed(made / "shards", made / "clip", tmp_path / "emb", batch_size=3)
    assert manifest.config["precision"]["text"] == "bf16"
    exact, short = (EmbeddingStore.open(folder / "emb").text() for folder in (made, tmp_path))
    cosines = (exact * short).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(short, axis=1)  # rows are float16
    assert (cosines >= 0.9999).all() and not np.array_equal(exact, short)
    with pytest.raises(UserError, match="made with precision.text = bf16, but fp32 is asked for"):
        embed(made / "shards", made / "clip", tmp_path / "emb", precision="fp32")


def test_a_folder_made_before_precision_was_noted_is_taken_as_it_is(made, tmp_path):
    before = Manifest(**json.loads((made / "emb" / "manifest.json").read_text()) | {"config": {}})
    (tmp_path / "emb").mkdir()
    (tmp_path / "emb" / "manifest.json").write_text(
        json.dumps({k: v for k, v in vars(before).items() if k != "folder"})
    )
    assert embed(made / "shards", made / "clip", tmp_path / "emb").fingerprint == before.fingerprint


def test_a_clip_that_squashes_pictures_gets_them_as_open_clip_makes_them(tmp_path):
    import open_clip

    tiny.clip(tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= {"resize_mode": "squash", "interpolation": "bilinear"}
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    samples = tiny.samples(3)
    wide = [Image.open(io.BytesIO(one.image)).resize((40, 20)) for one in samples]
    for n, picture in enumerate(wide):
        file = io.BytesIO()
        picture.save(file, "PNG")
        samples[n] = Sample(key=samples[n].key, image=file.getvalue(), ext="png", captions=["x"])
    write_shards(samples, tmp_path / "shards")
    embed(tmp_path / "shards", tmp_path / "clip", tmp_path / "emb", precision="fp32")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    with torch.no_grad():
        wanted = model.eval().encode_image(torch.stack([preprocess(one) for one in wide]), normalize=True).numpy()
    np.testing.assert_allclose(EmbeddingStore.open(tmp_path / "emb").image(), wanted, atol=5e-4)
    with pytest.raises(UserError, match="this model wants bilinear, squash"):
        Clip.pretrained(tmp_path / "clip")  # training would show it other pictures


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


def grown(root, out, shards="{000000..000002}", **options):
    return embed(f"{root}/shards/{shards}.tar", root / "clip", out, batch_size=3, precision="fp32", **options)


def counted(monkeypatch):
    encoded, plain = [], engines.make_part
    monkeypatch.setattr(engines, "make_part", lambda shard, *rest: encoded.append(shard.tar[-5]) or plain(shard, *rest))
    return encoded


def test_more_shards_into_the_same_folder_cost_no_more_than_the_new_ones(made, tmp_path, monkeypatch):
    out = tmp_path / "emb"
    few = grown(made, out, "{000001..000002}")
    encoded = counted(monkeypatch)
    more = grown(made, out)
    assert encoded == ["0"] and more.fingerprint != few.fingerprint
    assert files_of(out) == files_of(made / "emb") and [path.name for path in tmp_path.iterdir()] == ["emb"]
    with pytest.raises(UserError, match="was made from other shards"):  # fewer would lose some
        grown(made, out, "000001")
    with pytest.raises(UserError, match="was made from other clip"):
        embed(made / "shards", tiny.clip(tmp_path / "other", seed=1), out, precision="fp32")
    assert files_of(out) == files_of(made / "emb")


def test_a_run_that_was_killed_goes_on_with_more_shards_and_may_be_killed_again(made, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def after(samples):
        def kill(done, total, **numbers):
            if done > samples:
                raise Killed

        return kill

    out = tmp_path / "emb"
    grown(made, out, "000002")
    with pytest.raises(Killed):
        grown(made, out, "{000001..000002}", on_progress=after(2))
    with pytest.raises(UserError, match="was made from other shards"):  # the finished folder is still there
        grown(made, out, "000000")
    with pytest.raises(Killed):
        grown(made, out, on_progress=after(6))
    encoded = counted(monkeypatch)
    grown(made, out)
    assert encoded == ["1"] and files_of(out) == files_of(made / "emb")
    assert [path.name for path in tmp_path.iterdir()] == ["emb"]


def test_what_another_clip_left_beside_is_neither_used_nor_removed(made, tmp_path):
    out = tmp_path / "emb"
    embed(made / "shards", tiny.clip(tmp_path / "other", seed=1), out, batch_size=3, precision="fp32")
    os.rename(out, tmp_path / "emb.replaced-0")
    grown(made, out, "{000001..000002}")
    grown(made, out)
    assert files_of(out) == files_of(made / "emb")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emb", "emb.replaced-0", "other"]


def test_an_unfinished_run_that_has_finished_nothing_is_in_nobodys_way(made, tmp_path):
    class Killed(BaseException):
        pass

    def kill(done, total, **numbers):
        raise Killed

    out = tmp_path / "emb"
    with pytest.raises(Killed):
        grown(made, out, "000001", on_progress=kill)
    grown(made, out, "000002")
    assert EmbeddingStore.open(out).keys == ["s008", "s009"] and [path.name for path in tmp_path.iterdir()] == ["emb"]


@pytest.mark.parametrize("key", ["shard", "all"])
def test_parts_that_do_not_say_which_shard_they_are_of_are_not_taken_over(made, tmp_path, key):
    out = tmp_path / "emb"
    grown(made, out, "000001")
    notes = json.loads((out / earlier.PARTS).read_text())
    del notes[0]["shard"]
    (out / earlier.PARTS).write_text(json.dumps(notes if key == "shard" else []))
    with pytest.raises(UserError, match="was made from other shards"):
        grown(made, out)


@pytest.mark.parametrize("moment", ["before the new folder has its name", "before the old one is removed"])
def test_killed_while_the_larger_folder_takes_the_place_of_the_smaller_one(made, tmp_path, monkeypatch, moment):
    class Killed(BaseException):
        pass

    out, rename = tmp_path / "emb", os.rename

    def killed_at(old, new):
        if str(old).endswith(".partial") and moment.startswith("before the new"):
            raise Killed
        rename(old, new)

    def killed(*_, **__):
        raise Killed

    grown(made, out, "{000001..000002}")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "rename", killed_at)
        patch.setattr(earlier.Earlier, "remove", killed)
        grown(made, out)
    encoded = counted(monkeypatch)
    grown(made, out)
    assert encoded == [] and files_of(out) == files_of(made / "emb")
    assert [path.name for path in tmp_path.iterdir()] == ["emb"]


def test_the_command_says_what_it_found_what_it_left_out_and_what_its_rank_did(made, tmp_path, monkeypatch):
    from click.testing import CliRunner

    import cli

    write_shards(tiny.samples(4), tmp_path / "shards", samples_per_shard=2)
    write_shards([Sample(key="no", image=b"no", ext="png", captions=["x"], meta={"width": 1})], tmp_path / "more")

    def run(shards, **environment):
        command = ["embed", "--shards", shards, "--clip", str(made / "clip"), "--out", str(tmp_path / "emb")]
        return CliRunner().invoke(cli.cli, [*command, "--precision", "fp32", "--device", "cpu"], env=environment).output

    both = f"{tmp_path}/shards::{tmp_path}/more"
    assert "rank 0 of 2: its shards are embedded" in run(both, RANK="0", WORLD_SIZE="2")
    said = run(both)
    assert "emb/: 2 shards (3 of 5 samples) are embedded already; going on" in said
    assert "emb/: 4 rows of width 32; 1 bad pictures, 0 skipped" in said and "bad.csv" in said
