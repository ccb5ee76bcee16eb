import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from click.testing import CliRunner
from PIL import Image

from clip_train import calibration, zeroshot
from clip_train.embed import embed
from clip_train.model import Clip
from clip_train.settings import UserError
from clip_train.store import EmbeddingStore
from retrieval import classify as module
from retrieval.classify import Best, Classes, classify
from retrieval.index import build_index

NAMES = ["fox", "a blue square", "picture number 3", "something else"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Ten pictures in three shards, their CLIP, embeddings and index."""
    root = tmp_path_factory.mktemp("world")
    tiny.shards(root / "shards", n=10, per_shard=4)
    tiny.clip(root / "clip")
    embed(root / "shards", root / "clip", root / "emb")
    build_index(root / "emb", root / "index")
    return root


def rows_of(path):
    return pq.read_table(path).to_pylist()


def test_every_row_gets_the_class_that_open_clips_zero_shot_gives_it(world, tmp_path):
    """By hand, as CLIP's notebook does it: a class is the mean of its prompts; softmax of cosine / temperature."""
    clip, store = Clip.load(world / "clip"), EmbeddingStore.open(world / "emb")
    templates = ["{c}", "a photo of {c}."]
    with torch.no_grad():
        weights = []
        for name in NAMES:
            emb = clip.encode_text([template.replace("{c}", name) for template in templates]).mean(dim=0)
            weights.append(emb / emb.norm())
        cosines = torch.from_numpy(store.image()) @ torch.stack(weights).T
        probability = (clip.model.logit_scale.exp() * cosines).softmax(dim=1)
    made = classify(world / "emb", tmp_path / "labels.parquet", NAMES, templates=templates)
    lines = rows_of(tmp_path / "labels.parquet")
    assert [line["key"] for line in lines] == [f"s{n:03d}" for n in range(10)]
    assert [line["label"] for line in lines] == [NAMES[c] for c in cosines.argmax(dim=1)]
    best, order = cosines.sort(dim=1, descending=True)
    assert [line["runner_up"] for line in lines] == [NAMES[c] for c in order[:, 1]]
    np.testing.assert_allclose([line["score"] for line in lines], best[:, 0], atol=1e-5)
    np.testing.assert_allclose([line["margin"] for line in lines], best[:, 0] - best[:, 1], atol=1e-5)
    np.testing.assert_allclose([line["probability"] for line in lines], probability.max(dim=1).values, atol=1e-4)
    assert "match" not in lines[0] and "given" not in lines[0]
    assert sum(made["counts"].values()) == made["rows"] == 10 and made["temperature"] == pytest.approx(0.07, rel=1e-3)


def test_embeddings_and_their_index_get_the_same_labels_in_blocks_of_any_size(world, tmp_path, monkeypatch):
    classify(world / "emb", tmp_path / "emb.parquet", NAMES)
    monkeypatch.setattr(module, "BLOCK", 3)
    classify(world / "index", tmp_path / "index.parquet", NAMES)
    for one, other in zip(rows_of(tmp_path / "emb.parquet"), rows_of(tmp_path / "index.parquet"), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_two_that_write_one_file_at_once_do_not_disturb_each_other(tmp_path):
    one, other = (pa.table({"key": [key] * 100}) for key in ("one", "other"))
    with module.ParquetFile(tmp_path / "labels.parquet", {}) as slow:
        slow.write(one)
        with module.ParquetFile(tmp_path / "labels.parquet", {}) as quick:
            quick.write(other)
        assert pq.read_table(tmp_path / "labels.parquet").column("key").to_pylist() == ["other"] * 100
        slow.write(one)
    assert pq.read_table(tmp_path / "labels.parquet").column("key").to_pylist() == ["one"] * 200
    assert [path.name for path in tmp_path.iterdir()] == ["labels.parquet"]


def test_a_filter_labels_a_part_of_the_set(world, tmp_path):
    classify(world / "emb", tmp_path / "labels.parquet", NAMES, where="source.page in [2, 5, 9]")
    assert [line["key"] for line in rows_of(tmp_path / "labels.parquet")] == ["s002", "s005", "s009"]
    with pytest.raises(UserError, match="emb/: no row passes the filter"):
        classify(world / "emb", tmp_path / "none.parquet", NAMES, where="source.page > 99")
    made = classify(world / "emb", tmp_path / "x.parquet", ["label 0"], where="source.page > 5", label_field="label")
    assert made["labelled"] == 0 and made["without_class"] == 4 and "accuracy" not in made


def test_labels_of_the_metadata_are_compared_with_what_was_found(world, tmp_path):
    names = ["Label 0", "label 1", "label 2", "fox"]  # of the pictures, six have one of these labels
    made = classify(world / "emb", tmp_path / "labels.parquet", names, label_field="label")
    lines = rows_of(tmp_path / "labels.parquet")
    assert [line["given"] for line in lines] == [f"label {n // 2}" for n in range(10)]
    right = [line["given"] == line["label"].lower() for line in lines[:6]]
    assert made["accuracy"] == sum(right) / 6 and made["labelled"] == 6 and made["without_class"] == 4
    assert made["mean_per_class_recall"] == pytest.approx(np.mean(np.array(right).reshape(3, 2).mean(axis=1)))
    assert made["chance"] == 0.25


def test_without_class_names_the_labels_are_the_classes(world, tmp_path):
    made = classify(world / "index", tmp_path / "labels.parquet", label_field="label")
    assert list(made["counts"]) == [f"label {n}" for n in range(5)] and made["labelled"] == 10


def test_one_class_has_no_runner_up(world, tmp_path):
    classify(world / "emb", tmp_path / "labels.parquet", ["fox"])
    line = rows_of(tmp_path / "labels.parquet")[0]
    assert line["label"] == "fox" and line["probability"] == 1 and line["runner_up"] is None
    assert np.isnan(line["margin"])


def test_a_calibrated_clip_says_whether_the_class_is_right_at_all(world, tmp_path):
    for name in ("clip", "emb", "shards"):
        shutil.copytree(world / name, tmp_path / name)
    clip = Clip.load(tmp_path / "clip")
    calibration.save(
        tmp_path / "clip", calibration.Calibration(slope=8.0, offset=-2.0, match_rate=0.5, clip=clip.fingerprint)
    )
    made = classify(tmp_path / "emb", tmp_path / "labels.parquet", NAMES)
    image = EmbeddingStore.open(tmp_path / "emb").image()
    for row, line in zip(image, rows_of(tmp_path / "labels.parquet"), strict=True):
        said = clip.encode_text(zeroshot.prompts([line["label"]])).numpy()
        assert line["match"] == pytest.approx(1 / (1 + np.exp(2 - 8 * np.mean(said @ row))), abs=1e-5)
    assert made["calibrated"]


def test_what_made_the_labels_is_in_the_file(world, tmp_path):
    classify(world / "emb", tmp_path / "labels.parquet", NAMES, templates=["{c}!"])
    about = json.loads(pq.read_schema(tmp_path / "labels.parquet").metadata[b"unclip"])
    assert about["clip"] == Clip.load(world / "clip").fingerprint and about["templates"] == ["{c}!"]
    assert about["source"] == EmbeddingStore.open(world / "emb").fingerprint


def test_a_failure_half_way_leaves_the_old_file_as_it_was(world, tmp_path, monkeypatch):
    classify(world / "emb", tmp_path / "labels.parquet", NAMES)
    before = (tmp_path / "labels.parquet").read_bytes()
    monkeypatch.setattr(module, "BLOCK", 3)
    judge, calls = Classes.judge, []

    def breaks(self, rows):
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return judge(self, rows)

    monkeypatch.setattr(Classes, "judge", breaks)
    with pytest.raises(KeyboardInterrupt):
        classify(world / "emb", tmp_path / "labels.parquet", ["x", "y"])
    assert (tmp_path / "labels.parquet").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["labels.parquet"]


def test_sheets_hold_the_surest_pictures_of_each_class(world, tmp_path):
    made = classify(world / "emb", tmp_path / "labels.parquet", NAMES, sheets=tmp_path / "sheets")
    found = {line["label"] for line in rows_of(tmp_path / "labels.parquet")}
    assert len(made["sheets"]) == len(found)
    for path in made["sheets"]:
        with Image.open(path) as sheet:
            assert sheet.format == "PNG"


def test_the_surest_rows_are_kept_in_order_over_blocks(monkeypatch):
    monkeypatch.setattr(module, "SHOWN", 3)
    rng = np.random.default_rng(0)
    label, margin = rng.integers(0, 4, 100), rng.random(100).astype(np.float32)
    best = Best(4)
    for low in range(0, 100, 7):
        some = np.arange(low, min(low + 7, 100))
        best.add(some, {"label": label[some], "margin": margin[some], "probability": margin[some]})
    for c in range(4):
        mine = np.flatnonzero(label == c)
        expected = mine[np.argsort(-margin[mine])][:3].tolist()
        assert best._kept["row"][best._kept["label"] == c].tolist() == expected


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (None, {}, "there are no classes"),
        ([], {}, "there are no classes"),
        (["fox", "Fox "], {}, "the class 'fox' is there twice"),
        (["fox"], {"templates": ["a photo"]}, "has no place for the class"),
        (["fox"], {"label_field": "lable"}, "emb/ has no column 'lable'; there are: image_path"),
        (["fox"], {"label_field": "captions"}, "holds a list in each row, not one label"),
        (
            ["fox", "dog"],
            {"label_field": "label"},
            "none of the 5 labels in the column 'label' is one of the 2 classes .*; one says 'label 0'",
        ),
        (None, {"label_field": "width"}, "has 1 different labels; as classes, 2 to 1000"),
        (["fox"], {"clip": "gone"}, "gone"),
    ],
)
def test_what_cannot_be_classified_is_one_line(world, tmp_path, names, options, said):
    with pytest.raises(UserError, match=said):
        classify(world / "emb", tmp_path / "labels.parquet", names, **options)
    assert not list(tmp_path.iterdir())


def test_other_folders_are_refused(world, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        classify(tmp_path / "gone", tmp_path / "labels.parquet", NAMES)


def test_the_command_line_labels_a_set_and_counts_the_classes(world, tmp_path):
    import cli

    (tmp_path / "classes.txt").write_text("label 0\nlabel 1\n")
    options = ["--label-field", "label", "--out", str(tmp_path / "labels.parquet"), "--device", "cpu"]
    given = ["classify", "label 2", "--index", str(world / "index"), "--classnames", str(tmp_path / "classes.txt")]
    result = CliRunner().invoke(cli.cli, [*given, *options, "--sheet", str(tmp_path / "sheets")])
    assert result.exit_code == 0, result.output
    assert result.stdout.split()[:3] == ["class", "pictures", "share"]
    assert "of 6 labelled pictures are right (chance 0.333)" in result.stderr
    assert len(rows_of(tmp_path / "labels.parquet")) == 10 and any((tmp_path / "sheets").iterdir())
    result = CliRunner().invoke(cli.cli, [*given, *options, "--embeddings", str(world / "emb")])
    assert "contradict each other" in str(result.exception)
