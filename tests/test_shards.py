import gc
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from clip_train.pictures import PictureError
from clip_train.sample import Sample
from clip_train.settings import UserError
from clip_train.shards import ShardSet, list_shards, write_shards


def png(color="red", size=(8, 6)):
    data = io.BytesIO()
    Image.new("RGB", size, color).save(data, "PNG")
    return data.getvalue()


def samples(n, start=0, **meta):
    return [
        Sample(key=f"{i:04d}", image=png((i, 0, 0)), ext="png", captions=[f"picture {i}", f"no. {i}"], meta=meta)
        for i in range(start, start + n)
    ]


def make_tar(path, members, **how):
    """A tar by the standard library alone; members: (name, bytes), or (name, [tarfile type])."""
    with tarfile.open(path, "w", **how) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            else:
                member.type, member.linkname = data[0], "/etc/hostname"
                tar.addfile(member)
    return path


def test_samples_come_back_as_they_were_written_from_the_right_tar(tmp_path):
    written = samples(7, label="red thing")
    assert write_shards(written, tmp_path, samples_per_shard=3, prefix="a-") == [3, 3, 1]
    shards = ShardSet(tmp_path)
    assert [p.name for p in shards.paths] == ["a-000000.tar", "a-000001.tar", "a-000002.tar"]
    assert shards.counts == [3, 3, 1] and len(shards) == 7 and shards.keys == [s.key for s in written]
    for i in (6, 0, 4):
        sample = shards.read(i)
        assert (sample.key, sample.image, sample.ext, sample.captions) == (
            written[i].key,
            written[i].image,
            "png",
            written[i].captions,
        )
        assert shards.shard_of(i) == i // 3
        assert shards.captions(i) == written[i].captions and shards.label(i) == "red thing"
    assert shards.label(0, "width") == "8" and shards.label(0, "nothing") is None


def test_the_json_holds_the_pictures_size_and_hash(tmp_path):
    write_shards(samples(1, source="x.png", key="not mine", width=99), tmp_path)
    with tarfile.open(tmp_path / "000000.tar") as tar:
        assert tar.getnames() == ["0000.png", "0000.txt", "0000.json"]
        meta = json.loads(tar.extractfile("0000.json").read())
    image = png((0, 0, 0))
    assert meta == {
        "key": "0000",
        "caption": "picture 0",
        "captions": ["picture 0", "no. 0"],
        "sha256": hashlib.sha256(image).hexdigest(),
        "source": "x.png",
        "width": 99,  # known better by whoever wrote the sample
    }
    write_shards(samples(1), tmp_path)
    assert (ShardSet(tmp_path).label(0, "width"), ShardSet(tmp_path).label(0, "height")) == ("8", "6")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its tars open
def test_webdataset_reads_the_same_samples_in_the_same_order(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    write_shards(samples(5, label="x"), tmp_path, samples_per_shard=2)
    make_tar(tmp_path / "z.tar", [("dir.1/k.JPG", b"j"), ("dir.1/k.txt", b"t"), ("./m.jpeg", b"k"), ("./m.txt", b"u")])
    shards = ShardSet(tmp_path)
    theirs = list(webdataset.WebDataset([str(p) for p in shards.paths], shardshuffle=False, empty_check=False))
    gc.collect()  # here, where its warnings are expected
    assert shards.keys == [sample["__key__"] for sample in theirs]
    for i, sample in enumerate(theirs):
        mine = shards.read(i)
        assert mine.image == next(sample[e] for e in ("png", "jpg", "jpeg") if e in sample)
        assert mine.caption.encode() == sample["txt"]


def test_equal_samples_give_byte_identical_tars_and_one_fingerprint(tmp_path):
    for name in ("one", "two"):
        write_shards(samples(5, label="x"), tmp_path / name, samples_per_shard=3)
    for n in range(2):
        assert (tmp_path / f"one/00000{n}.tar").read_bytes() == (tmp_path / f"two/00000{n}.tar").read_bytes()
    assert ShardSet(tmp_path / "one").fingerprint == ShardSet(tmp_path / "two").fingerprint
    write_shards(samples(5, label="y"), tmp_path / "two", samples_per_shard=3)
    assert ShardSet(tmp_path / "one").fingerprint != ShardSet(tmp_path / "two").fingerprint


def test_captions_are_the_txt_then_the_jsons_distinct_and_not_empty(tmp_path):
    meta = json.dumps({"caption": "two ", "captions": ["one", " ", "three", 4]}).encode()
    make_tar(
        tmp_path / "a.tar",
        [
            ("a.jpg", b"1"),
            ("a.txt", "\ufeffone\n".encode()),
            ("a.json", meta),
            ("b.webp", b"2"),
            ("b.json", b'{"caption": "alone", "label": 7}'),
        ],
    )
    shards = ShardSet(tmp_path)
    assert shards.captions(0) == ["one", "two", "three"]
    assert shards.captions(1) == ["alone"] and shards.read(1).ext == "webp" and shards.label(1) == "7"


def test_samples_that_cannot_be_used_are_skipped_and_named(tmp_path):
    tar = make_tar(
        tmp_path / "a.tar",
        [
            ("good.jpg", b"1"),
            ("good.txt", b"fine"),
            ("mute.jpg", b"2"),
            ("blank.jpg", b"3"),
            ("blank.txt", b" \n"),
            ("blind.txt", b"no picture here"),
            ("broken.jpg", b"4"),
            ("broken.txt", b"x"),
            ("broken.json", b"{"),
            ("latin.jpg", b"5"),
            ("latin.txt", b"caf\xe9"),
            ("half.jpg", b"6"),
            ("half.json", b'{"caption": "\\ud800"}'),
            ("link.jpg", [tarfile.SYMTYPE]),
            ("link.txt", b"a link is no picture"),
            ("folder", [tarfile.DIRTYPE]),
        ],
    )
    shards = ShardSet(tar)
    assert shards.keys == ["good"]
    assert dict(shards.skipped) == {
        "mute": "no caption",
        "blank": "no caption",
        "blind": "no picture",
        "broken": "json cannot be read",
        "latin": "caption is not UTF-8",
        "half": "caption is not UTF-8",
        "link": "no picture",
    }


def test_what_img2dataset_leaves_is_read_gaps_empty_tars_and_parquet_included(tmp_path):
    for tar, keys in (("00000", ["000000000", "000000007"]), ("00001", []), ("00002", ["000020001"])):
        meta = [(f"{k}.json", json.dumps({"caption": k, "status": "success"}).encode()) for k in keys]
        members = [
            m for k, j in zip(keys, meta, strict=True) for m in ((f"{k}.jpg", b"."), (f"{k}.txt", k.encode()), j)
        ]
        make_tar(tmp_path / f"{tar}.tar", members)
        (tmp_path / f"{tar}.parquet").write_bytes(b"not looked at")
        (tmp_path / f"{tar}_stats.json").write_text("{}")
    shards = ShardSet(tmp_path)
    assert shards.keys == ["000000000", "000000007", "000020001"] and shards.counts == [2, 0, 1]


@pytest.mark.parametrize("lost", [1, 600, 1024, 10240])
def test_a_truncated_tar_is_refused_by_name_wherever_it_was_cut(tmp_path, lost):
    tar = make_tar(tmp_path / "a.tar", [(f"{i}.{e}", b"x" * 700) for i in range(9) for e in ("jpg", "txt")])
    size = tar.stat().st_size
    end = size - size % 512 if lost == 1 else 9 * 2 * (512 + 1024)  # where the last member ends
    os.truncate(tar, {1: end - 10240 - 700, 600: end - 600, 1024: end, 10240: end - 1536}[lost])
    with pytest.raises(UserError, match=r"a\.tar is cut short or damaged: only \d samples"):
        ShardSet(tmp_path)


def test_a_header_damaged_in_the_middle_is_noticed(tmp_path):
    tar = make_tar(tmp_path / "a.tar", [(f"{i}.{e}", b"x") for i in range(9) for e in ("jpg", "txt")])
    data = bytearray(tar.read_bytes())
    data[8 * 1024 : 8 * 1024 + 200] = os.urandom(200)
    tar.write_bytes(data)
    with pytest.raises(UserError, match="only 4 samples"):
        ShardSet(tmp_path)


@pytest.mark.parametrize(
    "members, message",
    [
        ([], "no samples in 1 tar file"),
        ([("a.jpg", b"1"), ("a.cls", b"7"), ("b.jpg", b"2")], r"none of its 2 samples .*no caption.*2 \.jpg, 1 \.cls"),
        ([("a.mp4", b"1"), ("a.txt", b"film")], r"no picture.*1 \.mp4, 1 \.txt"),
    ],
)
def test_tars_without_a_usable_sample_are_refused_with_what_they_hold(tmp_path, members, message):
    make_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message):
        ShardSet(tmp_path)


def test_keys_that_occur_twice_are_refused(tmp_path):
    write_shards(samples(2), tmp_path / "a")
    write_shards(samples(2, start=1), tmp_path / "b")
    with pytest.raises(UserError, match=r"key 0001 is in .*a.000000\.tar and again in .*b.000000\.tar"):
        ShardSet(f"{tmp_path}/a::{tmp_path}/b")
    make_tar(tmp_path / "c.tar", [("k.jpg", b"1"), ("k.txt", b"x"), ("k.jpg", b"2")])
    with pytest.raises(UserError, match=r"k\.jpg twice"):
        ShardSet(tmp_path / "c.tar")


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_a_file_that_is_no_tar_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match="cut short or damaged: only 0 samples"):
        ShardSet(tmp_path)


def test_shards_are_named_by_folder_file_glob_range_choice_and_lists_of_these(tmp_path):
    for n in (8, 9, 10, 11):
        make_tar(tmp_path / f"s-{n:03d}.tar", [])
    (tmp_path / "readme.txt").write_text("")

    def names(spec):
        return [p.name[2:5] for p in list_shards(spec)]

    assert names(tmp_path) == names(f"{tmp_path}/*.tar") == ["008", "009", "010", "011"]
    assert names(f"{tmp_path}/s-{{009..011}}.tar") == ["009", "010", "011"]
    assert names(f"{tmp_path}/s-{{011,008}}.tar") == ["011", "008"]
    assert names(f"{tmp_path}/s-010.tar::{tmp_path}/s-00?.tar") == ["010", "008", "009"]


@pytest.mark.parametrize("spec", ["nowhere", "x/*.tar", "s-{000..002}.tar", "s-000.tar::", ""])
def test_shards_that_are_not_there_are_named_in_the_refusal(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    make_tar(tmp_path / "s-000.tar", [])
    with pytest.raises(UserError, match="s-001.tar" if ".." in spec else "no shards"):
        list_shards(spec)


def test_a_folder_of_folders_of_shards_is_refused_with_their_names(tmp_path):
    write_shards(samples(1), tmp_path / "train")
    with pytest.raises(UserError, match="train do: name one"):
        list_shards(tmp_path)


def test_the_saved_index_is_used_until_the_tar_changes(tmp_path, monkeypatch):
    write_shards(samples(3), tmp_path)
    first = ShardSet(tmp_path)
    assert (tmp_path / "000000.tar.index.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)  # parsing a tar would fail
        again = ShardSet(tmp_path)
        assert again.fingerprint == first.fingerprint and again.read(2).captions == ["picture 2", "no. 2"]
    write_shards(samples(4), tmp_path)
    assert len(ShardSet(tmp_path)) == 4
    with pytest.raises(UserError, match=r"000000\.tar changed"):
        first.read(0)


@pytest.mark.parametrize("damage", ["cut", "old", "numbers", "keys", "fields"])
def test_a_damaged_or_old_index_is_made_anew(tmp_path, damage):
    write_shards(samples(3), tmp_path)
    ShardSet(tmp_path)
    file = tmp_path / "000000.tar.index.json"
    whole = file.read_text()
    index = json.loads(whole)
    other = {"old": {"version": 1}, "numbers": {"numbers": index["numbers"][:-8]}, "keys": {"keys": ["0000"]}}
    if damage == "fields":
        del index["mute"]
    file.write_text(whole[:30] if damage == "cut" else json.dumps(index | other.get(damage, {})))
    assert ShardSet(tmp_path).read(2).captions == ["picture 2", "no. 2"]
    assert file.read_text() == whole and json.loads(whole)["keys"] == ["0000", "0001", "0002"]


def test_a_read_only_folder_is_left_as_it_is_and_the_index_goes_to_the_cache(tmp_path, monkeypatch):
    write_shards(samples(3), tmp_path / "s")
    before = sorted(os.listdir(tmp_path / "s"))
    os.chmod(tmp_path / "s", 0o555)
    try:
        monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
        assert len(ShardSet(tmp_path / "s")) == 3
        assert sorted(os.listdir(tmp_path / "s")) == before
        assert len(list((tmp_path / "cache").rglob("*.index.json"))) == 1
        monkeypatch.setattr(tarfile, "open", None)
        assert len(ShardSet(tmp_path / "s")) == 3
    finally:
        os.chmod(tmp_path / "s", 0o755)


def test_pictures_without_captions_are_taken_where_that_is_asked_for(tmp_path):
    members = [
        ("a.jpg", b"1"),
        ("a.cls", b" 7\n"),
        ("b.jpg", b"2"),
        ("b.txt", b"said"),
        ("b.json", b'{"cls": 3}'),
        ("c.jpg", b"3"),
        ("d.jpg", b"4"),
        ("d.json", b"{"),
        ("e.cls", b"5"),
    ]
    make_tar(tmp_path / "a.tar", members)
    shards = ShardSet(tmp_path, captions=False)
    assert shards.keys == ["a", "b", "c"]
    assert [shards.captions(i) for i in range(3)] == [[], ["said"], []]
    assert [shards.label(i, "cls") for i in range(3)] == ["7", "3", None]  # KEY.cls, else the json
    assert [shards.read(i).image for i in range(3)] == [b"1", b"2", b"3"]
    assert dict(shards.skipped) == {"d": "json cannot be read", "e": "no picture"}
    captioned = ShardSet(tmp_path)
    assert captioned.keys == ["b"] and captioned.read(0).image == b"2" and captioned.fingerprint == shards.fingerprint


def test_a_sample_is_found_by_its_key(tmp_path):
    write_shards(samples(50), tmp_path, samples_per_shard=7)
    shards = ShardSet(tmp_path)
    for found in (shards, pickle.loads(pickle.dumps(shards))):
        assert [found.row_of(key) for key in shards.keys] == list(range(50))
        assert found.row_of("0050") is None and found.row_of("") is None


def test_a_thumbnail_comes_from_the_tar_at_most_as_large_as_asked(tmp_path):
    wide, small = io.BytesIO(), png("blue", (3, 5))
    Image.new("RGB", (640, 320), "red").save(wide, "JPEG")
    rows = [("wide", wide.getvalue(), "jpg"), ("small", small, "png"), ("broken", b"x", "jpg")]
    members = [m for key, data, ext in rows for m in ((f"{key}.{ext}", data), (f"{key}.txt", b"x"))]
    shards = ShardSet(make_tar(tmp_path / "a.tar", members))
    thumbnail = shards.thumbnail(0, 64)
    assert (thumbnail.mode, thumbnail.size) == ("RGB", (64, 32)) and thumbnail.getpixel((9, 9))[0] > 250
    assert shards.thumbnail(1, 64).size == (3, 5)
    with pytest.raises(PictureError, match="not a JPEG"):
        shards.thumbnail(2, 64)


@pytest.mark.parametrize(
    "what, name, words",
    [(png((2, 0, 0)), "0002", "its picture changed"), (b"no. 3", "000000.tar", "captions or names")],
)
def test_bytes_that_changed_without_size_or_time_are_named(tmp_path, what, name, words):
    write_shards(samples(4), tmp_path)
    tar = tmp_path / "000000.tar"
    assert ShardSet(tmp_path).damaged() == []
    stat, data = tar.stat(), bytearray(tar.read_bytes())
    data[data.index(what) + len(what) // 2] ^= 1
    tar.write_bytes(data)
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    [(named, reason)] = ShardSet(tmp_path).damaged()
    assert named == name and words in reason


def test_the_index_knows_the_crc32_of_every_picture(tmp_path):
    write_shards(samples(4), tmp_path)
    assert ShardSet(tmp_path).picture_crc32().tolist() == [zlib.crc32(png((i, 0, 0))) for i in range(4)]


@pytest.mark.parametrize("spec", ["s3://bucket/{000..009}.tar", "pipe:cat x.tar", "https://h/x.tar"])
def test_shards_elsewhere_have_no_index_and_are_refused_as_such(spec):
    with pytest.raises(UserError, match="is not on this machine; only training reads such shards"):
        ShardSet(spec)


def test_a_tar_that_is_written_over_while_it_is_open_is_noticed(tmp_path):
    write_shards(samples(4), tmp_path)
    shards = ShardSet(tmp_path)
    shards.read(0)
    tar = tmp_path / "000000.tar"
    tar.write_bytes(tar.read_bytes() + bytes(512))
    with pytest.raises(UserError, match=r"000000\.tar changed"):
        shards.picture(1)


def test_no_more_tars_are_held_open_than_allowed_and_none_when_the_shards_are_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_train.shards.OPEN_TARS", 3)
    write_shards(samples(20), tmp_path, samples_per_shard=2)

    def held():
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return sum(os.path.lexists(f) and os.readlink(f).startswith(str(tmp_path)) for f in links)

    shards = ShardSet(tmp_path)
    with ThreadPoolExecutor(6) as pool:
        images = list(pool.map(lambda i: shards.picture(i * 7 % 20), range(500)))
    assert images == [png((i * 7 % 20, 0, 0)) for i in range(500)]
    if os.path.isdir("/proc/self/fd"):
        assert 1 <= held() <= 3 + 6
        del shards
        gc.collect()
        assert held() == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_reads_from_the_tars_its_parent_had_open(tmp_path):
    write_shards(samples(20), tmp_path, samples_per_shard=10)
    shards = ShardSet(tmp_path)
    shards.read(0), shards.read(15)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        theirs = pool.map(shards.picture, range(20))
    assert theirs == [shards.picture(i) for i in range(20)]


def test_names_in_a_tar_never_become_paths(tmp_path):
    make_tar(tmp_path / "in.tar", [("../../evil.jpg", b"1"), ("../../evil.txt", b"x"), ("/abs/k.jpg", b"2")])
    shards = ShardSet(tmp_path / "in.tar")
    assert shards.keys == ["../../evil"] and shards.read(0).image == b"1"
    assert sorted(os.listdir(tmp_path)) == ["in.tar", "in.tar.index.json"]


def test_reading_is_the_same_from_threads_and_after_pickling(tmp_path):
    write_shards(samples(40), tmp_path, samples_per_shard=7)
    shards = ShardSet(tmp_path)
    copy = pickle.loads(pickle.dumps(shards))
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda i: copy.read(i % 40).image, range(400)))
    assert images == [shards.read(i % 40).image for i in range(400)]


def test_progress_counts_tars(tmp_path):
    write_shards(samples(5), tmp_path, samples_per_shard=2)
    seen = []
    ShardSet(tmp_path, on_progress=lambda done, total, **_: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_killed_write_leaves_no_tar_behind(tmp_path):
    def dying():
        yield from samples(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(dying(), tmp_path, samples_per_shard=2)
    assert [p.name for p in tmp_path.glob("*.tar")] == ["000000.tar"] and len(ShardSet(tmp_path)) == 2


def test_a_caption_of_ten_thousand_characters_and_a_key_beyond_ascii_survive(tmp_path):
    long = Sample(key="käse/" + "k" * 120, image=png(), ext="png", captions=["word " * 2000], meta={"ü": "é"})
    write_shards([long], tmp_path)
    sample = ShardSet(tmp_path).read(0)
    assert sample.key == long.key and sample.caption == long.caption.strip() and sample.meta["ü"] == "é"
