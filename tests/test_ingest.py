import csv
import io
import json
import os
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

import cli
from clip_train import ingest
from clip_train.fetch import FetchConfig, FetchError
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
    reasons = {"no caption": 2, "its .json cannot be read": 1, "its caption is not UTF-8": 1, "not a usable picture": 1}
    assert manifest.result == {"samples": 3, "rejected": 5, "shards": 3, "reasons": reasons}
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
    assert {**manifest.result, "reasons": len(manifest.result["reasons"])} == dict(
        samples=2, rejected=5, shards=1, reasons=5
    )
    shards = ShardSet(tmp_path / "out")
    assert [shards.captions(i) for i in range(2)] == [['a "red", thing'], ["blau", "blue"]]
    assert [shards.label(i) for i in range(2)] == ["red", "blue"]
    assert decode_picture(shards.read(0).image).getpixel((3, 3)) == (255, 0, 0)
    reasons = rejected(tmp_path / "out")
    assert reasons["pics/nowhere.png"] == "no such file" and reasons["pics/a.png"] == "no caption"
    assert reasons["row 4"] == "nothing in column image" and "Is a directory" in reasons["pics"]
    assert "--fetch downloads" in reasons["https://example.org/x.jpg"]


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
    shard_source(tmp_path / "t.parquet", tmp_path / "out", image_column="picture", caption_columns=["text"])
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
        "row 1": "wrong number of fields: 3 where the header has 2",
        "row 2": "wrong number of fields: 1 where the header has 2",
    }
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "caption": "x"}\n{"image"\n[1]\n')
    shard_source(tmp_path / "t.jsonl", tmp_path / "out2")
    assert rejected(tmp_path / "out2") == {"row 1": "not a json object", "row 2": "not a json object"}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.csv", "url,caption\nhttp://x/y.jpg,hello\n", "addresses in 'url'.*--fetch.*img2dataset"),
        ("t.csv", "file,caption\na.png,hello\n", "columns file, caption, but not 'image'.*--image-column"),
        ("t.csv", "image,title\na.png,hello\n", "columns image, title, but not 'caption'.*--caption-column"),
        ("t.csv", "image,caption\n", "no rows"),
        ("t.csv", b"\xff\xfei\0m\0a\0g\0e\0", "cannot be read as CSV in UTF-8"),
        ("t.csv", "image,caption\nnowhere.png,hello\n", "none of the 1 pictures.*nowhere.png: no such file"),
        ("t.parquet", "no parquet", "cannot be read as Parquet"),
        ("t.xlsx", "", "neither a folder, nor a tar, nor a table"),
        ("t.tar", "", "t.tar: damaged tar: no tar"),
        ("t.csv", "image,blip\na.png,hello\n", "columns image, blip, but not 'caption'.*--caption-column"),
    ],
)
def test_sources_that_cannot_be_used_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        shard_source(tmp_path / name, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_folders_of_nothing_and_of_nowhere_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pictures.*no tars and no tables"):
        shard_source(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        shard_source(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="threads = 0"):
        shard_source(tmp_path, tmp_path / "out", threads=0)


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

    def dies_at_the_seventh(key, row, packing):
        seen.append(key)
        if key == "00000007":
            raise KeyboardInterrupt
        return sample(key, row, packing)

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "_sample", dies_at_the_seventh)
        with pytest.raises(KeyboardInterrupt):
            shard_source(tmp_path / "in", tmp_path / "out", per_shard=3, threads=1)
        assert not (tmp_path / "out").exists()
        seen.clear()
        patch.setattr(ingest, "_sample", lambda *args: seen.append(args[0]) or sample(*args))
        manifest = shard_source(tmp_path / "in", tmp_path / "out", per_shard=3, threads=3)
    assert sorted(seen) == ["00000006", "00000007", "00000008", "00000009"]
    assert manifest.result == {"samples": 9, "rejected": 1, "shards": 4, "reasons": {"not a usable picture": 1}}
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
    assert seen == [(0, 5, 0), (2, 5, 0), (4, 5, 1), (5, 5, 1)]


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


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def img2dataset_output(folder):
    """Two shards as img2dataset 1.47 leaves them: key gaps, an empty tar, all rows in the .parquet beside each."""
    import pandas

    folder.mkdir()
    data = picture(folder.parent / "a.webp", "blue").read_bytes()
    for shard, keys in (("00000", ["000000", "000002"]), ("00001", [])):
        members = {}
        for key in keys:
            about = {
                "caption": f"says {key}",
                "url": f"http://x/{key}",
                "key": key,
                "status": "success",
                "alt": "other",
            }
            members |= {f"{key}.webp": data, f"{key}.txt": about["caption"].encode()}
            members |= {f"{key}.json": json.dumps(about | {"error_message": None, "width": 9, "alt": "other"}).encode()}
        write_tar(folder / f"{shard}.tar", members)
        rows = [(f"{shard[-4:]}{n:02d}") for n in range(3)]
        frame = pandas.DataFrame({"key": rows, "url": [f"http://x/{key}" for key in rows]})
        frame["status"] = ["success" if key in keys else "failed_to_download" for key in rows]
        frame["error_message"] = [None if key in keys else "HTTP Error 404: Not Found" for key in rows]
        frame.to_parquet(folder / f"{shard}.parquet")
        (folder / f"{shard}_stats.json").write_text("{}")
    return data


def test_what_img2dataset_made_is_packed_anew_and_its_failed_downloads_are_counted(tmp_path):
    data = img2dataset_output(tmp_path / "in")
    manifest = shard_source(tmp_path / "in", tmp_path / "out", per_shard=4)
    assert manifest.result == {"samples": 2, "rejected": 4, "shards": 2, "reasons": {"failed to download": 4}}
    assert captions(tmp_path / "out") == {"00000.tar/000000": ["says 000000"], "00000.tar/000002": ["says 000002"]}
    assert rejected(tmp_path / "out")["00001.tar/000100"] == "failed to download: HTTP Error 404: Not Found"
    shards = ShardSet(tmp_path / "out")
    assert shards.read(0).image == data and shards.label(1, "url") == "http://x/000002"
    assert shards.label(0, "width") == "20" and shards.label(0, "error_message") is None
    shard_source(tmp_path / "in", tmp_path / "small", resize=5, caption_columns=["alt", "txt"])
    small = ShardSet(tmp_path / "small")
    assert small.captions(0) == ["other", "says 000000"] and small.label(0, "width") == "10"
    shard_source(tmp_path / "out/000000.tar", tmp_path / "again")  # our own shards, too; they know where they came from
    assert captions(tmp_path / "again") == captions(tmp_path / "out")


def test_of_damaged_tars_the_whole_samples_are_kept_and_the_rest_is_told(tmp_path):
    (tmp_path / "in").mkdir()
    data = picture(tmp_path / "a.png").read_bytes()
    members = {f"{n}.{suffix}": value for n in range(9) for suffix, value in (("png", data), ("txt", b"x"))}
    write_tar(tmp_path / "in/cut.tar", members)
    whole = (tmp_path / "in/cut.tar").read_bytes()
    (tmp_path / "in/cut.tar").write_bytes(whole[: 9 * 1024 + 300])  # 1024 bytes a member: four samples and a half
    write_tar(tmp_path / "in/odd.tar", {"a/b.PNG": data, "a/b.txt": b"yes", "c.txt": b"alone", "d.png": data})
    (tmp_path / "in/text.tar").write_text("not a tar, though it is long enough for one\n" * 99)
    manifest = shard_source(tmp_path / "in", tmp_path / "out")
    assert manifest.result["samples"] == 5 and manifest.result["reasons"]["damaged tar"] == 2
    reasons = rejected(tmp_path / "out")
    assert reasons["cut.tar"].startswith("damaged tar: cut short") and reasons["text.tar"] == "damaged tar: no tar"
    assert reasons["cut.tar/4"] == "no caption"
    assert reasons["odd.tar/c"] == "no picture: .txt" and reasons["odd.tar/d"] == "no caption"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_hugging_faces_imagefolder_is_read_split_by_split(tmp_path, kind):
    for name in ("train/a.png", "train/deep/b.jpg", "test/c.png", "test/unnamed.png"):
        picture(tmp_path / "in" / name)
    train = [
        {"file_name": "a.png", "text": "an a", "label": "x"},
        {"file_name": "deep/b.jpg", "text": "a b", "label": "y"},
        {"file_name": "gone.png", "text": "gone", "label": "y"},
    ]
    write_table(tmp_path / f"in/train/metadata.{kind}", train)
    write_table(tmp_path / f"in/test/metadata.{kind}", [{"file_name": "c.png", "caption": "a c", "text": "not this"}])
    manifest = shard_source(tmp_path / "in", tmp_path / "out")
    assert manifest.result["reasons"] == {"no row in a metadata file": 1, "no such file": 1}
    assert captions(tmp_path / "out") == {"c.png": ["a c"], "a.png": ["an a"], "deep/b.jpg": ["a b"]}
    assert [ShardSet(tmp_path / "out").label(i) for i in range(3)] == [None, "x", "y"]
    assert rejected(tmp_path / "out")["test/unnamed.png"] == "no row in a metadata file"
    shard_source(tmp_path / f"in/train/metadata.{kind}", tmp_path / "table")  # the table alone says the same
    assert list(captions(tmp_path / "table")) == ["a.png", "deep/b.jpg"]


def test_metadata_that_names_no_files_and_two_kinds_of_it_are_refused(tmp_path):
    picture(tmp_path / "in/a.png")
    write_table(tmp_path / "in/metadata.csv", [{"filename": "a.png", "text": "an a"}])
    with pytest.raises(UserError, match="columns filename, text, but not 'file_name'.*--image-column"):
        shard_source(tmp_path / "in", tmp_path / "out")
    assert shard_source(tmp_path / "in", tmp_path / "out", image_column="filename").result["samples"] == 1
    write_table(tmp_path / "in/metadata.jsonl", [{"file_name": "a.png", "text": "an a"}])
    with pytest.raises(UserError, match="several kinds"):
        shard_source(tmp_path / "in", tmp_path / "other")


def test_several_caption_columns_give_the_captions_in_their_order(tmp_path):
    picture(tmp_path / "a.png")
    row = {"image": "a.png", "title": "short", "caption": "unused", "long": '["one", "two", "short"]', "by": "me"}
    table = write_table(tmp_path / "t.csv", [row])
    shard_source(table, tmp_path / "out", caption_columns=["long", "title"])
    shards = ShardSet(tmp_path / "out")
    assert shards.captions(0) == ["one", "two", "short"] and shards.label(0, "by") == "me"
    with pytest.raises(UserError, match="but not 'blip'"):
        shard_source(table, tmp_path / "other", caption_columns=["title", "blip"])
    lines = [{"image": "a.png", "title": "short"}, {"image": "a.png", "blip": "a thing", "title": "short"}]
    write_table(tmp_path / "t.jsonl", lines)
    shard_source(tmp_path / "t.jsonl", tmp_path / "lines", caption_columns=["blip", "title"])
    shards = ShardSet(tmp_path / "lines")
    assert [shards.captions(i) for i in range(2)] == [["short"], ["a thing", "short"]]


def test_a_folder_of_tables_is_read_table_by_table(tmp_path):
    data = picture(tmp_path / "x/a.png").read_bytes()
    for n in range(2):
        row = {"image": {"bytes": data, "path": None}, "text": f"number {n}"}
        (tmp_path / "in/data").mkdir(parents=True, exist_ok=True)
        write_table(tmp_path / f"in/data/train-{n}.parquet", [row])
    shard_source(tmp_path / "in", tmp_path / "out")
    assert captions(tmp_path / "out") == {"train-0.parquet row 0": ["number 0"], "train-1.parquet row 0": ["number 1"]}


def test_the_shards_do_not_depend_on_the_number_of_threads(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(40):
        path = tmp_path / f"in/{n:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8 + n, 60, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"noise {n}")
    (tmp_path / "in/07.jpg").write_bytes(b"")
    (tmp_path / "in/30.jpg").write_bytes((tmp_path / "in/03.jpg").read_bytes())
    for threads in (1, 2, 7):
        out = tmp_path / f"out{threads}"
        shard_source(tmp_path / "in", out, threads=threads, per_shard=12, resize=10, drop_duplicates=True)
        for path in (tmp_path / "out1").iterdir():
            if path.name != "manifest.json":
                assert (out / path.name).read_bytes() == path.read_bytes()


def test_duplicates_and_small_pictures_can_be_left_out_also_after_a_kill(tmp_path, monkeypatch):
    for n in range(8):
        picture(tmp_path / f"in/n{n}/x.png", (n % 3, 0, 0), size=(20, 20) if n else (9, 20))
    whole = shard_source(tmp_path / "in", tmp_path / "whole", per_shard=3, drop_duplicates=True, min_size=10)
    assert whole.result["reasons"] == {"duplicate picture": 4, "too small": 1}
    reasons = rejected(tmp_path / "whole")
    assert reasons["n0/x.png"] == "too small: 9 x 20"
    assert reasons["n4/x.png"] == "duplicate picture: the same as n1/x.png"
    with monkeypatch.context() as patch:
        sample = ingest._sample
        patch.setattr(ingest, "_sample", lambda key, *rest: 1 / 0 if key == "00000004" else sample(key, *rest))
        with pytest.raises(ZeroDivisionError):
            shard_source(tmp_path / "in", tmp_path / "out", per_shard=3, drop_duplicates=True, min_size=10)
    shard_source(tmp_path / "in", tmp_path / "out", per_shard=3, drop_duplicates=True, min_size=10)
    for name in ("000000.tar", "000001.tar", "000002.tar", "rejected.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert rejected(tmp_path / "out") == reasons


def test_pictures_are_fetched_only_when_asked_and_not_again_when_their_shard_is_done(tmp_path, monkeypatch):
    data = picture(tmp_path / "a.png").read_bytes()
    rows = [{"URL": f"http://x.org/{n}.png", "TEXT": f"number {n}"} for n in range(6)]
    table = write_table(tmp_path / "t.parquet", rows)
    fetched, dies = [], ["http://x.org/5.png"]

    def fetch(url, config, stopped):
        fetched.append(url)
        if url in dies:
            raise KeyboardInterrupt
        if url.endswith("1.png"):
            raise FetchError("HTTP 404")
        return data

    monkeypatch.setattr(ingest, "fetch", fetch)
    with pytest.raises(KeyboardInterrupt):
        shard_source(table, tmp_path / "out", fetch_config=FetchConfig(), per_shard=2, threads=1)
    assert len(fetched) == 6
    fetched.clear(), dies.clear()
    manifest = shard_source(table, tmp_path / "out", fetch_config=FetchConfig(), per_shard=2, threads=1)
    assert fetched == ["http://x.org/4.png", "http://x.org/5.png"]
    assert (
        manifest.result["samples"] == 5 and rejected(tmp_path / "out")["http://x.org/1.png"] == "not fetched: HTTP 404"
    )
    shards = ShardSet(tmp_path / "out")
    assert shards.captions(0) == ["number 0"] and shards.label(0, "URL") == "http://x.org/0.png"


def test_the_command_ends_with_the_counts_by_reason(tmp_path, monkeypatch, capsys):
    picture(tmp_path / "in/a/x.png")
    picture(tmp_path / "in/loose.png")
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["unclip", "shard", str(tmp_path / "in"), "--out", str(out), "--resize", "5"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    summary = capsys.readouterr().err.splitlines()[-2]
    assert summary == f"{out}/: 1 samples in 1 shards, 1 rejected (1 no caption; see {out}/rejected.csv)"
    monkeypatch.setattr(sys, "argv", ["unclip", "shard", str(tmp_path / "in"), "--fetch-private"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "give --fetch, too" in capsys.readouterr().err
