import io
import random
import tarfile

import pytest

from clip_train.tars import read_members, read_span

MEMBERS = {
    "a/0001.PNG": b"p" * 700,
    "a/0001.txt": b"one",
    "a/0002.seg.png": b"s" * 10,
    "0003.jpg": b"j" * 1500,
    "0003.json": b"{}",
    "ö" * 120 + ".txt": b"a name that needs an extended header",
}


def write(path, members, **how):
    with tarfile.open(path, "w", **how) as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its tars open
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_grouped_as_webdataset_groups_them(tmp_path, kind):
    webdataset = pytest.importorskip("webdataset")
    path = write(tmp_path / "x.tar", MEMBERS.items(), format=kind)
    found = read_members(path)
    ours = {key: {s: read_span(path, span) for s, span in parts.items()} for key, parts in found.samples.items()}
    read = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    theirs = {one["__key__"]: {name: data for name, data in one.items() if name[0] != "_"} for one in read}
    assert ours == theirs and len(ours) == 4
    assert (found.twice, found.apart, found.other, found.damage) == ([], [], [], "")


def test_what_is_odd_is_listed(tmp_path):
    members = [("a.png", b"1"), ("b.png", b"2"), ("a.txt", b"3"), ("a.PNG", b"4"), ("README", b"5"), (".hidden", b"6")]
    path = write(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    found = read_members(path)
    assert found.samples.keys() == {"a", "b"} and read_span(path, found.samples["a"]["png"]) == b"1"
    assert (found.twice, found.apart, found.other) == (["a.PNG"], ["a"], ["README", ".hidden", "b.txt"])


def test_an_empty_tar_is_whole_and_other_files_are_no_tars(tmp_path):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    assert read_members(tmp_path / "empty.tar").damage == ""
    for name, data in (("nothing", b""), ("text", b"words " * 999), ("zip", b"PK\3\4" * 500)):
        (tmp_path / name).write_bytes(data)
        assert read_members(tmp_path / name).damage == "no tar"
    assert read_members(tmp_path / "nowhere").damage == "No such file or directory"


def test_of_a_tar_cut_anywhere_exactly_the_whole_members_are_found(tmp_path):
    path = write(tmp_path / "x.tar", MEMBERS.items())
    data = path.read_bytes()
    spans = [span for parts in read_members(path).samples.values() for span in parts.values()]
    end = max(offset + size for offset, size in spans) // 512 * 512 + 512  # where the closing zeros begin
    for cut in range(0, end, 100):
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        found = read_members(tmp_path / "cut.tar")
        kept = [span for parts in found.samples.values() for span in parts.values()]
        assert kept == [(offset, size) for offset, size in spans if offset + size <= cut]
        assert found.damage


def test_damaged_headers_never_raise(tmp_path):
    data = write(tmp_path / "x.tar", MEMBERS.items()).read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(3):
            place = rng.randrange(0, 6000)
            broken[place] = rng.randrange(256)
            header = place // 512 * 512  # with a checksum that is right again, so that the damage is believed
            block = broken[header : header + 148] + b" " * 8 + broken[header + 156 : header + 512]
            broken[header + 148 : header + 156] = b"%06o\0 " % sum(block)
        (tmp_path / "x.tar").write_bytes(broken)
        found = read_members(tmp_path / "x.tar")
        for parts in found.samples.values():
            for span in parts.values():
                assert len(read_span(tmp_path / "x.tar", span)) == span[1]
