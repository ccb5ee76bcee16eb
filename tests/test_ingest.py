import csv
import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from clip_train import ingest
from clip_train.folder import read_manifest
from clip_train.ingest import shard_source
from clip_train.pictures import decode_picture
from clip_train.settings import UserError
from clip_train.shards import ShardSet


def picture(path, color="red", size=(20, 10), **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **how)
    return path


def rejected(folder):
    with open(folder / "rejected.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "reason"]
    return dict(rows)


def captions(folder):
    shards = ShardSet(folder)
    return {shards.label(i, "source"): shards.captions(i) for i in range(len(shards))}


def test_a_folder_with_captions_beside_its_pictures_becomes_shards(tmp_path):
    source = tmp_path / "in"
    for name in ("a.jpg", "b.png", "deep/c.webp", "d.png", "e.png", "f.png", "g.png"):
        picture(source / name)
    (source / "a.txt").write_text("one red thing\n")
    (source / "b.json").write_text(
        json.dumps({"caption": "two", "captions": ["two", "zwei"], "label": "x", "key": "k", "note": None})
    )
    (source / "deep/c.txt").write_text("three")
    (source / "deep/c.json").write_text('["trois"]')
    (source / "e.txt").write_text(" \n")
    (source / "f.json").write_text("{")
    (source / "g.txt").write_bytes(b"caf\xe9")
    (source / "h.png").write_bytes((source / "d.png").read_bytes()[:50])
    (source / "h.txt").write_text("cut short")
    (source / ".hidden.png").write_bytes(b"")
    picture(source / ".cache/thumbnail.png")
    manifest = shard_source(source, tmp_path / "out", per_shard=3)
    assert manifest.result == {"samples": 3, "rejected": 5, "shards": 3}
    assert captions(tmp_path / "out") == {
        "a.jpg": ["one red thing"],
        "b.png": ["two", "zwei"],
        "deep/c.webp": ["three", "trois"],
    }
    reasons = rejected(tmp_path / "out")
    assert reasons.pop("h.png").startswith("not a usable picture: ")
    assert reasons == {
        "d.png": "no caption",
        "e.png": "no caption",
        "f.png": "its .json cannot be read",
        "g.png": "its caption is not UTF-8",
    }
    shards = ShardSet(tmp_path / "out")
    assert shards.keys == ["00000000", "00000001", "00000003"]  # places in the sorted source, with gaps
    assert shards.label(1) == "x" and shards.label(1, "key") == "00000001" and "note" not in shards.read(1).meta
    assert [shards.read(i).ext for i in range(3)] == ["jpg", "png", "webp"]
    assert shards.read(0).image == (source / "a.jpg").read_bytes()
    assert read_manifest(tmp_path / "out", "shards").input_path("source") == source


def test_without_captions_the_folders_names_are_the_labels(tmp_path):
    picture(tmp_path / "in/red_fox/1.png")
    picture(tmp_path / "in/animals/polar-bear/2.png")
    picture(tmp_path / "in/loose.png")
    shard_source(tmp_path / "in", tmp_path / "out")
    assert captions(tmp_path / "out") == {"red_fox/1.png": ["red fox"], "animals/polar-bear/2.png": ["polar bear"]}
    assert {ShardSet(tmp_path / "out").label(i) for i in range(2)} == {"red fox", "polar bear"}
    assert rejected(tmp_path / "out") == {"loose.png": "no caption"}


def write_table(path, rows):
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pandas

        pandas.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_table_gives_the_same_samples(tmp_path, suffix):
    picture(tmp_path / "pics/a.png", "red")
    picture(tmp_path / "pics/ö b.jpg", "blue")
    rows = [
        {"image": "pics/a.png", "caption": 'a "red", thing', "label": "red"},
        {"image": str(tmp_path / "pics/ö b.jpg"), "caption": '["blau", "blue"]', "label": "blue"},
        {"image": "pics/nowhere.png", "caption": "gone", "label": ""},
        {"image": "pics/a.png", "caption": "", "label": ""},
        {"image": "", "caption": "nothing there", "label": ""},
        {"image": "pics", "caption": "a folder", "label": ""},
        {"image": "https://example.org/x.jpg", "caption": "far away", "label": ""},
    ]
    table = write_table(tmp_path / f"table{suffix}", rows)
    manifest = shard_source(table, tmp_path / "out")
    assert manifest.result == {"samples": 2, "rejected": 5, "shards": 1}
    shards = ShardSet(tmp_path / "out")
    assert [shards.captions(i) for i in range(2)] == [['a "red", thing'], ["blau", "blue"]]
    assert [shards.label(i) for i in range(2)] == ["red", "blue"]
    assert decode_picture(shards.read(0).image).getpixel((3, 3)) == (255, 0, 0)
    reasons = rejected(tmp_path / "out")
    assert reasons["pics/nowhere.png"] == "no such file" and reasons["pics/a.png"] == "no caption"
    assert reasons["row 4"] == "nothing in column image" and "Is a directory" in reasons["pics"]
    assert "fetches nothing" in reasons["https://example.org/x.jpg"]


def test_lists_of_captions_and_other_columns_are_kept_and_what_json_cannot_hold_is_dropped(tmp_path):
    import pandas

    data = picture(tmp_path / "a.png").read_bytes()
    frame = pandas.DataFrame(
        {
            "picture": [{"bytes": data, "path": "a.png"}, {"bytes": None, "path": "a.png"}],
            "text": [["one", "two"], ["three"]],
            "score": [0.5, float("nan")],
            "when": pandas.to_datetime(["2026-01-01", "2026-01-02"]),
        }
    )
    frame.to_parquet(tmp_path / "t.parquet")
    shard_source(tmp_path / "t.parquet", tmp_path / "out", image_column="picture", caption_column="text")
    shards = ShardSet(tmp_path / "out")
    assert [shards.captions(i) for i in range(2)] == [["one", "two"], ["three"]]
    assert [shards.label(i, "score") for i in range(2)] == ["0.5", None]
    assert [shards.label(i, "source") for i in range(2)] == ["row 0", "a.png"]
    assert "when" not in shards.read(0).meta and shards.read(0).image == data


def test_rows_that_are_none_are_rejected_one_by_one(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("image,caption\na.png,fine\n\na.png,too,many\na.png\na.png,fine too\n")
    assert shard_source(tmp_path / "t.csv", tmp_path / "out").result["samples"] == 2
    assert rejected(tmp_path / "out") == {
        "row 1": "3 fields where the header has 2",
        "row 2": "1 fields where the header has 2",
    }
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "caption": "x"}\n{"image"\n[1]\n')
    shard_source(tmp_path / "t.jsonl", tmp_path / "out2")
    assert rejected(tmp_path / "out2") == {"row 1": "not a json object", "row 2": "not a json object"}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.csv", "url,caption\nhttp://x/y.jpg,hello\n", "img2dataset"),
        ("t.csv", "file,caption\na.png,hello\n", "columns file, caption, but not 'image'.*--image-column"),
        ("t.csv", "image,title\na.png,hello\n", "columns image, title, but not 'caption'.*--caption-column"),
        ("t.csv", "image,caption\n", "no rows"),
        ("t.csv", b"\xff\xfei\0m\0a\0g\0e\0", "cannot be read as CSV in UTF-8"),
        ("t.csv", "image,caption\nnowhere.png,hello\n", "none of the 1 pictures.*nowhere.png: no such file"),
        ("t.parquet", "no parquet", "cannot be read as Parquet"),
        ("t.xlsx", "", "neither a folder nor a table"),
        ("t.tar", "", "use it as it is: --shards"),
    ],
)
def test_sources_that_cannot_be_used_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        shard_source(tmp_path / name, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_folders_of_tars_of_nothing_and_of_nowhere_are_refused(tmp_path):
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/0.tar").write_bytes(b"")
    with pytest.raises(UserError, match="1 tar files already: use them as they are: --shards"):
        shard_source(tmp_path / "tars", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        shard_source(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        shard_source(tmp_path / "nowhere", tmp_path / "out")


def test_formats_that_shards_do_not_hold_become_png_whatever_the_file_is_called(tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    for kind in ("bmp", "tiff", "gif"):
        path = tmp_path / f"in/{kind}/x.{kind}"
        path.parent.mkdir(parents=True)
        image.save(path)
    jpeg_called_png = tmp_path / "in/jpeg/x.png"
    jpeg_called_png.parent.mkdir()
    image.save(jpeg_called_png, "JPEG")
    shard_source(tmp_path / "in", tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    found = {shards.label(i): shards.read(i) for i in range(4)}
    assert {label: sample.ext for label, sample in found.items()} == dict(bmp="png", tiff="png", gif="png", jpeg="jpg")
    for label in ("bmp", "tiff"):
        assert np.array_equal(np.asarray(decode_picture(found[label].image)), np.asarray(image))


def test_resize_scales_the_short_side_down_but_never_up(tmp_path):
    picture(tmp_path / "in/big/a.jpg", size=(400, 200))
    picture(tmp_path / "in/tall/b.webp", size=(100, 301))
    small = picture(tmp_path / "in/small/c.png", size=(30, 20), compress_level=1)
    shard_source(tmp_path / "in", tmp_path / "out", resize=50)
    shards = ShardSet(tmp_path / "out")
    sizes = {shards.label(i): decode_picture(shards.read(i).image).size for i in range(3)}
    assert sizes == {"big": (100, 50), "tall": (50, 150), "small": (30, 20)}
    assert [shards.read(i).ext for i in range(3)] == ["jpg", "png", "webp"]
    assert shards.read(1).image == small.read_bytes()
    assert shards.label(0, "width") == "100"


def test_a_killed_run_goes_on_where_it_was_and_equals_an_unbroken_one(tmp_path, monkeypatch):
    for i in range(10):
        picture(tmp_path / f"in/n{i}/x.png", (i, 0, 0))
    (tmp_path / "in/n5/x.png").write_bytes(b"broken")
    shard_source(tmp_path / "in", tmp_path / "whole", per_shard=3)
    sample, seen = ingest._sample, []

    def dies_at_the_seventh(key, row, resize):
        seen.append(key)
        if key == "00000007":
            raise KeyboardInterrupt
        return sample(key, row, resize)

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "_sample", dies_at_the_seventh)
        with pytest.raises(KeyboardInterrupt):
            shard_source(tmp_path / "in", tmp_path / "out", per_shard=3)
        assert not (tmp_path / "out").exists()
        seen.clear()
        patch.setattr(ingest, "_sample", lambda key, row, resize: seen.append(key) or sample(key, row, resize))
        manifest = shard_source(tmp_path / "in", tmp_path / "out", per_shard=3)
    assert sorted(seen) == ["00000006", "00000007", "00000008", "00000009"]
    assert manifest.result == {"samples": 9, "rejected": 1, "shards": 4}
    for path in (tmp_path / "whole").iterdir():
        if path.name != "manifest.json":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))


def test_the_same_command_again_does_nothing_and_another_one_is_refused(tmp_path):
    picture(tmp_path / "in/a/x.png")
    first = shard_source(tmp_path / "in", tmp_path / "out")
    assert shard_source(tmp_path / "in", tmp_path / "out").created == first.created
    with pytest.raises(UserError, match="per_shard = 1000, but 5"):
        shard_source(tmp_path / "in", tmp_path / "out", per_shard=5)
    picture(tmp_path / "in/a/y.png")
    with pytest.raises(UserError, match="made from other source"):
        shard_source(tmp_path / "in", tmp_path / "out")


def test_a_prefix_keeps_the_keys_of_two_sources_apart(tmp_path):
    picture(tmp_path / "in/a/x.png")
    for name in ("one", "two"):
        shard_source(tmp_path / "in", tmp_path / name, prefix=f"{name}-")
    assert ShardSet(f"{tmp_path}/one::{tmp_path}/two").keys == ["one-00000000", "two-00000000"]
    with pytest.raises(UserError, match="no dot"):
        shard_source(tmp_path / "in", tmp_path / "three", prefix="a.b")


def test_progress_counts_pictures_and_rejections(tmp_path):
    for i in range(5):
        picture(tmp_path / f"in/n{i}/x.png")
    (tmp_path / "in/n3/x.png").write_bytes(b"")
    seen = []
    note = lambda done, total, **numbers: seen.append((done, total, numbers["rejected"]))  # noqa: E731
    shard_source(tmp_path / "in", tmp_path / "out", per_shard=2, on_progress=note)
    assert seen == [(2, 5, 0), (4, 5, 1), (5, 5, 1)]


def test_emptied_captions_and_long_ones_and_half_surrogates_are_handled(tmp_path):
    picture(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption": c} for c in ("x " * 5000, "\ud800", ["", " "], 7)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shard_source(tmp_path / "t.jsonl", tmp_path / "out")
    assert len(ShardSet(tmp_path / "out").captions(0)[0]) == 9999
    with open(tmp_path / "out/rejected.csv") as file:
        assert [line.split(",")[1].strip() for line in file][1:] == ["its caption is not UTF-8"] + ["no caption"] * 2


def test_pictures_are_checked_whole_not_by_their_headers(tmp_path):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(data, "PNG")
    for name, content in (("good", data.getvalue()), ("cut", data.getvalue()[:-500])):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "x.png").write_bytes(content)
    shard_source(tmp_path / "in", tmp_path / "out")
    assert list(captions(tmp_path / "out")) == ["good/x.png"]
