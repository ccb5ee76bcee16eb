"""The whole loop through the command line, on a handful of generated pictures: folder -> ... -> picture and back."""

import json
import re
import sys

import numpy as np
import pytest
import tiny
from PIL import Image

import cli
from clip_train.folder import read_manifest

CLIP = [
    'vision={"layers": 1, "width": 32, "head_width": 16, "patch_size": 8}', "image_size=16", "text_width=32",
    "text_heads=2", "text_layers=1", "context_length=16", "precision=fp32",
]  # fmt: skip
PRIOR = ["width=32", "depth=1", "heads=2", "precision=fp32"]
DECODER = [
    "image_size=8", "widths=[16, 32]", "blocks=[1, 1]", "attention=[2]", "head_width=16", "cond_width=32",
    "precision=fp32",
]  # fmt: skip


def sets(pairs):
    return [word for pair in pairs for word in ("--set", pair)]


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


class Shell:
    """Runs `unclip ...` in this process, in a folder of its own."""

    def __init__(self, monkeypatch, capsys):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *words, code=0):
        self.monkeypatch.setattr(sys, "argv", ["unclip", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        told = self.capsys.readouterr()
        assert (exit.value.code or 0) == code, told.err
        return told.out if code == 0 else told.err


@pytest.fixture
def unclip(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return Shell(monkeypatch, capsys)


def test_the_whole_loop_runs_and_every_room_refuses_what_does_not_fit(unclip, tmp_path):
    (tmp_path / "pictures").mkdir()
    for sample in tiny.samples(12):
        (tmp_path / "pictures" / f"{sample.key}.png").write_bytes(sample.image)
        (tmp_path / "pictures" / f"{sample.key}.json").write_text(json.dumps({"captions": sample.captions}))
    (tmp_path / "pictures" / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "pictures" / "broken.txt").write_text("a caption")

    unclip("shard", "pictures", "--out", "shards", "--per-shard", 5)
    assert read_manifest("shards", "shards").result == {
        "samples": 12,
        "rejected": 1,
        "reasons": {"not a usable picture": 1},
        "shards": 3,
    }
    unclip("train", "clip", "--shards", "shards", "--steps", 4, "--batch-size", 8, *sets(CLIP), "--device", "cpu")
    unclip("embed", "--shards", "shards", "--clip", "clip", "--device", "cpu")
    unclip("index", "--embeddings", "emb")
    quick = ["--steps", 3, "--batch-size", 4, "--device", "cpu"]
    unclip("train", "prior", "--embeddings", "emb", *quick, *sets(PRIOR))
    unclip("train", "decoder", "--shards", "shards", "--clip", "clip", *quick, *sets(DECODER))

    # search: a table, json, a sheet; a caption, a picture, a vector
    table = unclip("search", "picture number 3", "-k", 3, "--sheet", "hits.png", "--device", "cpu")
    lines = table.splitlines()
    assert re.match(r"rank +score +key +caption", lines[0]) and len(lines) == 4
    hits = json.loads(unclip("search", "--image", "pictures/s005.png", "-k", 2, "--json", "--device", "cpu"))
    assert hits[0]["hits"][0]["score"] == pytest.approx(1.0, abs=1e-3)
    assert hits[0]["hits"][0]["caption"] == "picture number 5"
    rows = np.load(min((tmp_path / "emb" / "img_emb").glob("*.npy"))).astype(np.float32)
    np.save("rows.npy", rows[:2])
    found = json.loads(unclip("search", "--vector", "rows.npy", "--json", "-k", 1, "--device", "cpu"))
    assert [hit["hits"][0]["row"] for hit in found] == [0, 1]
    assert pixels("hits.png").shape[1] > 300

    # generate: captions, vectors, a picture from itself
    models = ["--prior", "prior", "--decoder", "decoder", "--device", "cpu"]
    folders = [*models, "--set", "steps=3", "--set", "prior_steps=2"]
    unclip("generate", "picture number 3", *folders, "--out", "one.png", "--sheet", "sheet.png")
    unclip(
        "generate",
        "--again",
        "one.png",
        "--prior",
        "prior",
        "--decoder",
        "decoder",
        "--out",
        "two.png",
        "--device",
        "cpu",
    )
    assert np.array_equal(pixels("one.png"), pixels("two.png"))
    (tmp_path / "captions.txt").write_text("one of many\n\npicture number 1\n")
    made = unclip("generate", "--file", "captions.txt", "--count", 2, *folders, "--out", "many").split()
    assert len(made) == 4 == len(list((tmp_path / "many").glob("*.png")))
    assert len(unclip("generate", "--embedding", "rows.npy", *folders, "--out", "rows").split()) == 2

    # figures
    asked = ["--embeddings", "emb", "--count", 4, "--sheet", "loop.png"]
    figures = json.loads(unclip("evaluate", "loop", *asked, *models))
    assert {"true", "prior", "text", "chance"} <= figures.keys() and (tmp_path / "loop.png").exists()
    assert "prior" in json.loads(
        unclip("evaluate", "prior", "--embeddings", "emb", "--prior", "prior", "--device", "cpu")
    )
    recall = json.loads(unclip("evaluate", "clip", "--shards", "shards", "--clip", "clip", "--device", "cpu"))
    assert recall["samples"] == 12

    # a second run of a finished stage changes nothing
    before = (tmp_path / "emb" / "manifest.json").read_bytes()
    unclip("embed", "--shards", "shards", "--clip", "clip", "--device", "cpu")
    assert (tmp_path / "emb" / "manifest.json").read_bytes() == before

    # another CLIP, of another width: every door says so in one line
    unclip("train", "clip", "--shards", "shards", "--out", "other", "--steps", 2, "--batch-size", 4, *sets(CLIP),
           "--set", "embed_dim=64", "--device", "cpu")  # fmt: skip
    for words in (
        ["search", "a", "--clip", "other", "--device", "cpu"],
        ["generate", "a", *folders, "--clip", "other"],
        ["embed", "--shards", "shards", "--clip", "other", "--out", "emb", "--device", "cpu"],
        ["train", "decoder", "--shards", "shards", "--clip", "other", *quick, *sets(DECODER)],
    ):
        told = unclip(*words, code=2)
        assert told.count("\n") == 1 and "other" in told and "unclip:" in told
