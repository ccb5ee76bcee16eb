import csv
import io
import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

import cli
from clip_train import check
from clip_train.check import check_shards, duplicate_sheet, quick_check
from clip_train.sample import Sample
from clip_train.settings import UserError
from clip_train.shards import ShardSet, write_shards


def picture(seed, size=(64, 48), kind="PNG"):
    """A picture of coloured noise, so that no two look alike."""
    rng = np.random.default_rng(seed)
    data = io.BytesIO()
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    small.resize(size, Image.Resampling.NEAREST).save(data, kind)
    return data.getvalue()


def samples(count, start=0, **changes):
    return [
        Sample(key=f"{n:05d}", image=picture(n), ext="png", captions=[f"caption {n} of many words"], **changes)
        for n in range(start, start + count)
    ]


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def found(report):
    return {finding.what: finding for finding in report.findings}


def test_good_shards_give_no_findings_and_tell_what_they_are_like(tmp_path):
    write_shards(samples(20), tmp_path, samples_per_shard=10)
    report = check_shards(tmp_path, batch_size=20, ranks=2, workers=1)
    assert report.findings == [] and report.errors == [] and report.samples == 20
    captions, pictures = report.statistics["captions"], report.statistics["pictures"]
    assert captions["different"] == 20 and captions["tokens"]["least"] == 7  # five words, start, end
    assert pictures["formats"] == {"PNG": 20} and pictures["short side in pixels"]["least"] == 48
    assert pictures["width to height"]["4:3 to 2:1"] == 20
    assert report.statistics["duplicates"] == {"exact copies": 0, "near groups": 0, "in near groups": 0}


def test_every_damage_is_told_not_only_the_first(tmp_path):
    good = [(f"{n}.{s}", d) for n in range(4) for s, d in (("png", picture(n)), ("txt", b"a caption of %d" % n))]
    whole = write_tar(tmp_path / "0.tar", good).read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[:3000])
    (tmp_path / "2.tar").write_bytes(b"x" * 5000)
    write_tar(tmp_path / "3.tar", [*good[:2], ("9.png", picture(9)), ("9.PNG", picture(8)), ("9.txt", b"nine")])
    write_tar(tmp_path / "4.tar", [])
    report = check_shards(tmp_path)
    assert report.errors == [f for f in report.findings if f.severity == "error"]
    by_name = found(report)
    damaged = by_name["damaged tars"]
    assert damaged.count == 2 and damaged.severity == "error"
    assert damaged.examples[0].startswith("1.tar: cut short") and damaged.examples[1] == "2.tar: no tar"
    assert by_name["a member twice in one tar"].examples == ["3.tar/9.PNG"]
    assert by_name["keys that are in two tars"].examples[-1] == "0 in 0.tar and 3.tar"
    assert by_name["tars without a usable sample"].examples == ["2.tar", "4.tar"]
    assert [f.severity for f in report.findings] == sorted(
        (f.severity for f in report.findings), key=check.SEVERITIES.index
    )
    with pytest.raises(UserError):  # and what it calls an error, training refuses
        ShardSet(tmp_path)


def test_members_and_captions_that_cannot_be_used_are_named_with_what_was_expected(tmp_path):
    write_tar(
        tmp_path / "x.tar",
        [
            ("a.png", picture(0)),
            ("b.gif", b""),
            ("a.txt", b"a comes back"),
            ("b.txt", b"a gif"),
            ("c.png", picture(1)),
            ("c.cls", b"3"),
            ("d.png", picture(2)),
            ("d.txt", b"caf\xe9"),
            ("e.png", picture(3)),
            ("e.json", b"{"),
            ("f.png", picture(4)),
            ("f.txt", b"  "),
            ("README", b"hello"),
            ("folder/g.png", picture(5)),
            ("folder/g.json", b'{"captions": ["a g"]}'),
        ],
    )
    report = check_shards(tmp_path)
    by_name = found(report)
    assert report.samples == 2 and report.errors == []
    assert by_name["samples without a picture"].examples == ["x.tar/b: .gif .txt"]
    assert "expected KEY.jpg" in by_name["samples without a picture"].advice
    assert by_name["samples without a caption"].examples == ["x.tar/c: .png .cls", "x.tar/f"]
    assert by_name["samples whose caption is not UTF-8"].examples == ["x.tar/d"]
    assert by_name["samples whose json cannot be read"].examples == ["x.tar/e"]
    assert by_name["members without a suffix"].examples == ["x.tar/README"]
    assert by_name["samples whose members lie apart"].examples == ["x.tar/a", "x.tar/b"]
    assert len(ShardSet(tmp_path)) == report.samples and len(ShardSet(tmp_path).skipped) == 5


def test_keys_with_dots_are_recognised_for_what_they_are(tmp_path):
    members = [(f"img_0.{n}.{s}", d) for n in range(3) for s, d in (("png", picture(n)), ("txt", b"x"))]
    write_tar(tmp_path / "x.tar", members)
    report = check_shards(tmp_path)
    assert "first dot" in found(report)["samples without a picture"].advice
    assert [f.what for f in report.errors] == ["no sample with picture and caption"]


def test_pictures_that_cannot_be_decoded_are_an_error_only_if_most_are(tmp_path):
    broken = [Sample(key=f"bad{n}", image=b"", ext="png", captions=["x"], meta={"width": 1}) for n in range(3)]
    write_shards([*samples(9), *broken], tmp_path / "some")
    write_shards([*samples(2), *broken], tmp_path / "most")
    finding = found(check_shards(tmp_path / "some", threads=2))["pictures that cannot be decoded"]
    assert (finding.severity, finding.count) == ("warning", 3) and finding.examples[0].startswith("000000.tar/bad0: ")
    report = check_shards(tmp_path / "most")
    assert found(report)["pictures that cannot be decoded"].severity == "error"
    write_shards(broken, tmp_path / "all")
    assert check_shards(tmp_path / "all").samples == 3


def test_copies_and_look_alikes_are_grouped_and_drawn(tmp_path):
    made = samples(12)
    jpeg = io.BytesIO()
    Image.open(io.BytesIO(made[3].image)).resize((96, 72)).save(jpeg, "JPEG", quality=80)
    extra = [
        Sample(key="copy", image=made[0].image, ext="png", captions=["the same again"]),
        Sample(key="copy3", image=made[3].image, ext="png", captions=["and this one again"]),
        Sample(key="like", image=jpeg.getvalue(), ext="jpg", captions=["nearly the same"]),
    ]
    write_shards(made, tmp_path, prefix="train-")
    write_shards(extra, tmp_path, prefix="val-")
    report = check_shards(tmp_path)
    assert report.exact == [["00000", "copy"], ["00003", "copy3"]] and report.near == [["00003", "like"]]
    by_name = found(report)
    assert by_name["exact copies of other pictures (13.3 %)"].count == 2
    assert by_name["pictures in 1 groups that look alike (13.3 %)"].count == 2
    assert by_name["groups of copies and look-alikes across tars of other names"].examples == ["3 x train and val"]
    assert duplicate_sheet(report).width > 200
    report.save(tmp_path / "deep/report.json")
    saved = json.loads((tmp_path / "deep/report.json").read_text())
    assert saved["near"] == report.near and len(saved["findings"]) == len(report.findings)
    with pytest.raises(UserError, match="no sheet"):
        duplicate_sheet(check_shards(tmp_path / "train-000000.tar"))


def test_plain_pictures_are_named_but_are_not_each_others_look_alikes(tmp_path):
    plain = []
    for n, colour in enumerate(("red", "white", "white")):
        data = io.BytesIO()
        Image.new("RGB", (20 + n, 20), colour).save(data, "PNG")
        plain.append(Sample(key=f"plain{n}", image=data.getvalue(), ext="png", captions=[f"plain {n}"]))
    write_shards([*samples(4), *plain], tmp_path)
    report = check_shards(tmp_path)
    assert found(report)["pictures of one colour"].examples == ["plain0", "plain1", "plain2"] and report.near == []
    assert found(report)["pictures below 32 pixels"].examples[0] == "plain0: 20 x 20"


def test_captions_too_long_too_frequent_and_without_words_are_told(tmp_path):
    made = samples(40)
    texts = ["dog"] * 5 + ["IMG_1234.jpg", "https://example.org/a", "DSC-0042"] + ["word " * 30]
    made[: len(texts)] = [
        Sample(key=s.key, image=s.image, ext="png", captions=[text]) for s, text in zip(made, texts, strict=False)
    ]
    write_shards(made, tmp_path)
    report = check_shards(tmp_path, context_length=16)
    by_name = found(report)
    assert by_name["captions that 12 % share"].examples == ["'dog' 5 times"]
    assert set(by_name["captions that are no words"].examples) == set(texts[5:8])
    long = by_name["captions beyond 16 tokens"]
    assert (long.count, long.severity, long.examples) == (1, "note", ["00008: 32 tokens"])
    assert report.statistics["captions"]["most frequent"][0] == ("dog", 5)
    assert report.statistics["captions"]["share that another sample has too"] == 0.125


def test_equal_captions_are_an_error(tmp_path):
    write_shards([Sample(key=s.key, image=s.image, ext="png", captions=["a"]) for s in samples(9)], tmp_path)
    assert [f.what for f in check_shards(tmp_path).errors] == ["all captions are equal"]
    with pytest.raises(UserError, match="all captions are equal \\('a'\\)"):
        quick_check(tmp_path, batch_size=4)


def test_too_few_samples_for_a_batch_and_too_few_shards_for_the_readers_are_told(tmp_path):
    write_shards(samples(10), tmp_path, samples_per_shard=4)
    by_name = found(check_shards(tmp_path, batch_size=11, ranks=2, workers=2))
    assert by_name["fewer samples than one batch"].severity == "error"
    assert by_name["fewer samples than one batch"].examples == ["10 of 11"]
    assert by_name["fewer shards than processes that read"].examples == ["3 shards for 2 ranks x 2 workers"]
    assert check_shards(tmp_path, batch_size=10, ranks=3).findings == []
    with pytest.raises(UserError, match="10 samples are fewer than one batch of 11; lower --batch-size"):
        quick_check(tmp_path, batch_size=11)


def test_uneven_tars_are_noted(tmp_path):
    made = samples(26)
    for name, some in (("a", made[:10]), ("b", made[10:20]), ("c", made[20:24]), ("d", made[24:])):
        write_shards(some, tmp_path, prefix=name)
    finding = found(check_shards(tmp_path))["tars far from the usual 7 samples"]
    assert finding.severity == "note" and finding.examples == ["d000000.tar: 2"]


def test_large_jpegs_are_sized_by_their_files_not_by_how_they_were_decoded(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    data = io.BytesIO()
    Image.open(io.BytesIO(picture(0, (1600, 1200)))).save(data, "JPEG", exif=exif)
    write_shards([Sample(key="a", image=data.getvalue(), ext="jpg", captions=["a big one"])], tmp_path)
    report = check_shards(tmp_path)
    assert report.statistics["pictures"]["short side in pixels"]["median"] == 1200
    assert report.statistics["pictures"]["width to height"]["3:4 to 4:3"] == 1
    assert found(report)["pictures above 1024 pixels"].examples == ["a"]


def test_the_quick_check_warns_without_decoding(tmp_path, monkeypatch):
    made = samples(30) + [Sample(key="x", image=picture(3), ext="png", captions=["a copy"])]
    made[:10] = [Sample(key=s.key, image=s.image, ext="png", captions=["dog"]) for s in made[:10]]
    write_shards(made, tmp_path)
    write_tar(tmp_path / "1.tar", [("y.png", b""), ("z.txt", b"alone")])
    monkeypatch.setattr(check, "decode_picture", lambda *_, **__: pytest.fail("decoded"))
    lines = quick_check(tmp_path, batch_size=8, ranks=2)
    assert [line.split(":")[0] for line in lines] == [
        "32 % of the captions are 'dog'",
        "1 samples cannot be used, no caption",
        "1 samples cannot be used, no picture",
        "1 pictures are copies of others",
        "more",
    ]
    assert quick_check(ShardSet(tmp_path), batch_size=8)[:3] == lines[:3]
    write_shards(samples(9), tmp_path / "good")
    assert quick_check(tmp_path / "good", batch_size=9) == []


def test_of_remote_shards_only_their_number_is_checked(tmp_path):
    spec = "memory://nowhere/{00..03}.tar"
    assert quick_check(spec, batch_size=8, ranks=4) == []
    assert quick_check(spec, batch_size=8, ranks=8) == [
        "4 shards for 8 ranks: several read the same one at a time; make at least 8"
    ]
    with pytest.raises(UserError, match="only tars on this machine"):
        check_shards(spec)


@pytest.mark.parametrize("spec", ["pipe:cat x.tar", "http://h/x.tar", "nosuchscheme://b/x.tar"])
def test_the_quick_check_of_remote_shards_opens_nothing(monkeypatch, spec):
    for opener in ("stream._opened", "stream._fsspec"):
        monkeypatch.setattr(f"clip_train.{opener}", lambda url: pytest.fail(f"opened {url}"))
    [line] = quick_check(spec, batch_size=8, ranks=2)
    assert line.startswith("1 shard for 2 ranks: ")
    assert quick_check(spec, batch_size=8) == []
    assert quick_check("s3://b/*.tar", batch_size=8, ranks=2) == []  # how many there are, only the server knows


def test_the_command_prints_a_table_and_ends_with_2_only_after_errors(tmp_path, monkeypatch, capsys):
    write_shards([*samples(6), Sample(key="x", image=picture(3), ext="png", captions=["a copy"])], tmp_path / "s")
    arguments = ["unclip", "data", "check", str(tmp_path / "s"), "--out", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr()
    assert not ended.value.code
    header, first = told.out.splitlines()[:2]
    assert header.split() == ["severity", "finding", "count", "examples", "what", "to", "do"]
    assert first.startswith("warning") and "--drop-duplicates" in first
    assert json.loads((tmp_path / "r.json").read_text())["samples"] == 7
    monkeypatch.setattr(sys, "argv", [*arguments, "--batch-size", "8"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("training cannot work: fewer samples than one batch")


def test_progress_names_the_stage(tmp_path):
    write_shards(samples(40), tmp_path, samples_per_shard=20)
    seen = []
    check_shards(tmp_path, on_progress=lambda done, total, **n: seen.append((n["stage"], done, total)))
    assert seen[:2] == [("tars", 1, 2), ("tars", 2, 2)]
    assert seen[2:] == [
        ("pictures", 32, 40),
        ("pictures", 40, 40),
        ("near duplicates", 0, 1),
        ("near duplicates", 1, 1),
    ]


def test_what_check_advises_mends_the_shards(tmp_path):
    from clip_train.ingest import shard_source

    made = samples(5) + [Sample(key="x", image=picture(3), ext="png", captions=["a copy"])]
    write_shards(made, tmp_path / "s")
    whole = (tmp_path / "s/000000.tar").read_bytes()
    (tmp_path / "s/000001.tar").write_bytes(whole[: len(whole) // 3])
    assert {f.what for f in check_shards(tmp_path / "s").errors} == {"damaged tars", "keys that are in two tars"}
    shard_source(tmp_path / "s", tmp_path / "new", drop_duplicates=True)
    assert check_shards(tmp_path / "new").findings == [] and len(ShardSet(tmp_path / "new")) == 5
    with open(tmp_path / "new/rejected.csv", newline="") as file:
        assert len(list(csv.reader(file))) > 3
