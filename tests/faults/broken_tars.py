"""Tars made bad by structure or contents: a function of a random generator each, by kind."""

import io
import json
import random
import tarfile
from collections.abc import Callable

import tiny

Members = list[tuple[tarfile.TarInfo, bytes]]
PICTURE_FILES = [tiny.picture(seed) for seed in range(5)]
JSONS = [
    b"",
    b"{",
    b"\xff\xfe{",
    b"[" * 100_000,
    b'{"a":' * 60_000,
    b'{"captions": 7}',
    b'{"captions": [1, null, {}]}',
    b'{"x": NaN, "y": -Infinity}',
    b'{"x": ' + b"9" * 5000 + b"}",
    b'{"x": 1e999}',
    b'{"x": ' + b"9" * 40 + b"}",
    b'{"caption": "\\ud800"}',
    b'{"label": "\\udfff"}',
    b'{"\\ud800": 1}',
    b'{"a\\u0000b": "c\\u0000"}',
    b'{"image_path": "stolen", "key": "stolen", "caption": {"a": 1}}',
    b"7",
    b"null",
    b'"text"',
    b"[]",
    b'["one", "two"]',
    b'{"": "", ".": {".": {}}}',
    b'{"a": {"b": 1}, "a.b": 2}',
    b'{"a": [1, "x", {"y": []}], "b": {}}',
    b"\xef\xbb\xbf{}",
    b"\0\0\0",
]
NAMES = [
    "/etc/{}",
    "../../{}",
    "a/../{}",
    "./{}",
    "~/{}",
    "é/{}",
    "a b\n{}",
    "x" * 300 + "/{}",
    "\udcff{}",
    ".{}",
    "{}/",
]


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def good(count: int = 5) -> Members:
    """A tar's members: KEY.png, KEY.txt, KEY.json of `count` samples."""
    said = [{"label": f"l{n}", "captions": [f"caption {n}", "one more"]} for n in range(count)]
    return [
        member(f"k{n}.{suffix}", data)
        for n in range(count)
        for suffix, data in (
            ("png", PICTURE_FILES[n]), ("txt", f"caption {n}".encode()), ("json", json.dumps(said[n]).encode())
        )
    ]  # fmt: skip


def packed(members: Members, format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def truncated(rng: random.Random) -> bytes:
    data = packed(good())
    return data[: rng.choice([rng.randrange(len(data)), rng.randrange(40) * 512])]


def reordered(rng: random.Random) -> bytes:
    members = good()
    rng.shuffle(members)
    return packed(members)


def twice(rng: random.Random) -> bytes:
    members = good()
    again = rng.choice([members[3:6], members[:1], [member("K1.PNG", PICTURE_FILES[0])], [member("k1.PNG", b"x")]])
    return packed(members + again)


def odd_names(rng: random.Random) -> bytes:
    form = rng.choice(NAMES)
    for info, _ in (members := good()):
        if rng.random() < 0.7:
            info.name = form.format(info.name)
    return packed(members)


def links(rng: random.Random) -> bytes:
    kind = rng.choice(
        [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z", b"S"]
    )
    target = rng.choice(["/etc/passwd", "k0.png", "../../x", "", "k2.png"])
    members = good()
    place = rng.randrange(len(members))
    extra = member(rng.choice(["k2.png", "k9.png", "k9.txt", "k9"]), kind=kind, link=target)
    return packed(members[:place] + [extra] + members[place:])


def sizes(rng: random.Random) -> bytes:
    """A header that declares another size than its member has, with a right checksum."""
    data = bytearray(packed(good()))
    heads = [at for at in range(0, len(data) - 1024, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(heads)
    size = rng.choice([2**33 - 1, 2**60, -1, -(2**40), 0, 1, 511, 513, 10**6])
    field = b"%011o\0" % size if 0 <= size < 8**11 else bytes([0x80 if size >= 0 else 0xFF]) + (
        size % 2**88).to_bytes(11, "big")  # fmt: skip
    data[at + 124 : at + 136] = field
    return resummed(data, at)


def resummed(data: bytearray, at: int) -> bytes:
    """The tar with the checksum of the header at `at` made right."""
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def empty(rng: random.Random) -> bytes:
    members = [(info, data) for info, data in good()]
    for n in rng.sample(range(len(members)), rng.randrange(1, len(members) + 1)):
        members[n] = member(members[n][0].name)
    nothing = [b"", bytes(512), bytes(1024), bytes(10240), b"\0", bytes(1023), b"no tar at all" * 99, b"PK\3\4" * 300]
    return rng.choice([packed(members), *nothing])


def compressed(rng: random.Random) -> bytes:
    import bz2
    import gzip
    import lzma

    data = rng.choice([gzip.compress, bz2.compress, lzma.compress])(packed(good()), *())
    return data[: rng.choice([len(data), len(data) // 2])]


def flipped(rng: random.Random) -> bytes:
    data = bytearray(packed(good()))
    heads = [at for at in range(0, len(data) - 1024, 512) if data[at + 257 : at + 262] == b"ustar"]
    right = rng.random() < 0.5
    at = rng.choice(heads)
    place = at + rng.choice([rng.randrange(512), 156, rng.randrange(100), rng.randrange(124, 136)])
    data[place] ^= 1 << rng.randrange(8)
    return resummed(data, at) if right else bytes(data)


def jsons(rng: random.Random) -> bytes:
    members = good()
    for n in rng.sample(range(5), rng.randrange(1, 6)):
        members[3 * n + 2] = member(f"k{n}.json", rng.choice(JSONS))
    return packed(members)


def incomplete(rng: random.Random) -> bytes:
    lost = rng.choice(["png", "txt", "json", "txt json", "png txt json", ""])
    keep = {n for n in range(5) if rng.random() < 0.5}
    return packed([m for m in good() if int(m[0].name[1]) in keep or m[0].name[3:] not in lost])


def headers(rng: random.Random) -> bytes:
    """Records of the PAX and GNU formats that say odd things of the member after them."""
    members = good()
    info = members[rng.randrange(len(members))][0]
    info.pax_headers = rng.choice(
        [{"size": "-5"}, {"size": "99999999999"}, {"size": "x"}, {"path": "../k"}, {"GNU.sparse.map": "1,x"},
         {"GNU.sparse.size": "9999999", "GNU.sparse.numblocks": "-1"}, {"mtime": "nan"}, {"uid": "1e999"},
         {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, {"hdrcharset": "BINARY"}, {"path": "\0"}, {"path": ""}]
    )  # fmt: skip
    data = packed(members)
    return data if rng.random() < 0.7 else data.replace(b" size=", b" sizf=").replace(b"path=", b"pa=h=")


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "truncated": truncated,
    "members in another order": reordered,
    "a key twice": twice,
    "absolute, ../ and odd names": odd_names,
    "links, devices, fifos": links,
    "false sizes": sizes,
    "0-byte members and tars": empty,
    "gz, bz2, xz": compressed,
    "bit flips in headers": flipped,
    "broken, deep, odd json": jsons,
    "no picture or caption": incomplete,
    "odd PAX records": headers,
}
