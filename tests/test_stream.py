import contextlib
import dataclasses
import functools
import http.server
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from clip_train.captions import CaptionTable, text_id
from clip_train.model import Clip
from clip_train.pictures import to_pixels
from clip_train.sample import Sample
from clip_train.settings import UserError
from clip_train.shards import ShardSet, write_shard
from clip_train.stream import BrokenShard, StreamBatches, is_remote, list_urls, read_shard

SIZES = (7, 1, 12, 0, 5, 9)  # samples of each shard: unequal, one empty


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return Clip.load(tiny.clip(tmp_path_factory.mktemp("clip") / "clip"))


def make_shards(folder, sizes=SIZES, damaged=()):
    """Shards of samples whose only caption is their key; the pictures of the keys in `damaged` are cut short."""
    for shard, size in enumerate(sizes):
        rows = []
        for n in range(size):
            key = f"{shard}-{n}"
            image = tiny.picture(100 * shard + n)
            image = image[: len(image) // 2] if key in damaged else image
            rows.append(Sample(key=key, image=image, ext="png", captions=[key], meta={"width": 20, "height": 20}))
        write_shard(rows, folder / f"{shard:02d}.tar")
    return folder


def keys_of(batch, sizes=SIZES):
    names = {text_id(f"{shard}-{n}"): f"{shard}-{n}" for shard, size in enumerate(sizes) for n in range(size)}
    return [names[caption] for caption in batch["caption"].tolist()]


def take(stream, n):
    with contextlib.closing(stream):
        return [next(stream) for _ in range(n)]


def shown(batches, steps, start=0, sizes=SIZES):
    return [keys_of(batch, sizes) for batch in take(batches(start), steps)]


def test_urls_and_commands_are_remote_and_paths_are_not():
    for spec in ("s3://b/x.tar", "pipe:cat x", "http://h/x.tar", "shards::gs://b/{0..9}.tar", "memory://x"):
        assert is_remote(spec), spec
    for spec in ("shards", "a/{000..010}.tar", "a::b", "C:\\x.tar", "./a:b.tar", Path("x")):
        assert not is_remote(spec), spec


def test_shards_are_listed_in_order_from_ranges_globs_folders_and_lists(tmp_path):
    make_shards(tmp_path, (1, 1, 1))
    files = [f"file://{tmp_path}/{n:02d}.tar" for n in range(3)]
    assert list_urls(f"file://{tmp_path}/{{00..02}}.tar") == files
    assert list_urls(f"file://{tmp_path}/*.tar") == list_urls(f"file://{tmp_path}/") == files
    assert list_urls(f"s3://b/{{0..1}}.tar::{tmp_path}/01.tar") == [
        "s3://b/0.tar",
        "s3://b/1.tar",
        f"{tmp_path}/01.tar",
    ]
    assert list_urls("pipe:get {08..09} | sed 's/{a,b}/x/'") == [
        f"pipe:get {n} | sed 's/{{a,b}}/x/'" for n in ("08", "09")
    ]
    assert list_urls("https://h/{a,b}.tar", allow_http=True) == ["https://h/a.tar", "https://h/b.tar"]


def test_what_cannot_be_listed_or_opened_is_refused_in_one_line(tmp_path, clip):
    for spec, words in (
        ("http://h/x.tar", "only where that is allowed"),
        (f"file://{tmp_path}/*.tar", "names nothing"),
        (f"nowhere.tar::file://{tmp_path}/0.tar", "nowhere.tar does not exist"),
        ("nosuchscheme://x/{0..1}.tar", "nosuchscheme.* cannot be opened"),
        (f"file://{tmp_path}/gone.tar", "gone.tar cannot be read: .*leave it out"),
        ("pipe:exit 3", "pipe:exit 3 cannot be read: the command ended with exit code 3;"),
        ("pipe:false", "pipe:false cannot be read: the command ended with exit code 1;"),
        ("pipe:true", "pipe:true cannot be read: it is no tar, or an empty file;"),
        ("pipe:yes no tar; exit 1", "it is no tar, or an empty file;"),  # it would go on for ever
        (f"pipe:head -c 700 {make_shards(tmp_path / 's', (9,))}/00.tar; exit 4", "ended with exit code 4;"),
        (f"pipe:head -c 700 {tmp_path}/s/00.tar", "cannot be read: cut short or damaged"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            next(StreamBatches(spec, clip, 2, 0, retries=0)())
        assert "\n" not in str(caught.value)


def test_a_driver_that_is_not_installed_is_named(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match="s3://b/0.tar cannot be opened: .*pip install .*s3fs"):
        next(StreamBatches("s3://b/0.tar", clip, 2, 0)())


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order(tmp_path, clip):
    make_shards(tmp_path)
    everything = sorted(f"{shard}-{n}" for shard, size in enumerate(SIZES) for n in range(size))
    for shuffle in (1, 17, 34):  # blocks that end where epochs end
        batches = StreamBatches(f"file://{tmp_path}/", clip, 17, seed=1, shuffle=shuffle)
        order = list(itertools.chain(*shown(batches, 4)))
        assert sorted(order[:34]) == sorted(order[34:]) == everything and order[:34] != order[34:]
    assert [key.split("-")[0] for key in order] != sorted(key.split("-")[0] for key in order)  # across shards too
    assert shown(StreamBatches(f"file://{tmp_path}/", clip, 17, seed=2, shuffle=34), 2) != [order[:17], order[17:34]]


@pytest.mark.parametrize("kind", ["file", "memory", "pipe", "mixed"])
def test_every_kind_of_url_gives_the_same_batches(tmp_path, clip, kind):
    import fsspec

    make_shards(tmp_path)
    name = uuid.uuid4().hex
    for file in sorted(tmp_path.glob("*.tar")):
        fsspec.filesystem("memory").pipe(f"/{name}/{file.name}", file.read_bytes())
    spec = {
        "file": f"file://{tmp_path}/",
        "memory": f"memory://{name}/*.tar",
        "pipe": f"pipe:cat {tmp_path}/{{00..05}}.tar",
        "mixed": f"{tmp_path}/0[01].tar::memory://{name}/02.tar::pipe:cat {tmp_path}/{{03..05}}.tar",
    }[kind]
    local = "::".join(str(file) for file in sorted(tmp_path.glob("*.tar")))
    expected = take(StreamBatches(local, clip, 6, seed=3, shuffle=8)(), 7)
    for mine, theirs in zip(take(StreamBatches(spec, clip, 6, seed=3, shuffle=8)(), 7), expected, strict=True):
        assert mine.keys() == {"pixels", "tokens", "caption", "group"}
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_batch_holds_each_samples_picture_tokens_and_ids(tmp_path, clip):
    from clip_train.pictures import decode_picture

    rows = [dataclasses.replace(s, captions=["first", f"second {n}"]) for n, s in enumerate(tiny.samples(6))]
    write_shard(rows, tmp_path / "0.tar")
    batch = next(StreamBatches(f"file://{tmp_path}/0.tar", clip, 6, seed=0, mix=(0, 1), shuffle=6, fast=False)())
    place = {text_id(f"second {n}"): n for n in range(6)}
    assert sorted(place[c] for c in batch["caption"].tolist()) == list(range(6))
    for pixels, tokens, caption, group in zip(*batch.values(), strict=True):
        n = place[int(caption)]
        assert torch.equal(pixels, to_pixels(decode_picture(rows[n].image), 16))
        assert torch.equal(tokens, clip.tokenize([f"second {n}"])[0]) and group == text_id(f"label {n // 2}")


def test_the_label_cls_is_the_file_of_that_name_as_in_shards_on_this_machine(tmp_path, clip):
    spec = f"file://{tiny.with_cls(tmp_path / 's')}/0.tar"
    samples = {sample.captions[0]: sample for sample in read_shard(spec)}
    assert [sample.label("cls") for sample in samples.values()] == ["7", "7", "3", "in the json", None]
    batch = next(StreamBatches(spec, clip, 5, 0, label_field="cls", shuffle=5)())
    table = CaptionTable(ShardSet(tmp_path / "s"), clip, label_field="cls")
    assert dict(zip(batch["caption"].tolist(), batch["group"].tolist(), strict=True)) == dict(
        zip(table.caption.tolist(), table.group.tolist(), strict=True)
    )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("journal", [True, False])
def test_a_stream_that_is_taken_up_again_goes_on_as_the_unbroken_one(tmp_path, clip, threads, world, journal):
    make_shards(tmp_path / "s")
    work = tmp_path / "work" if journal else None
    for rank in range(world):
        make = functools.partial(
            StreamBatches, f"file://{tmp_path}/s/", clip, 5, 2, rank=rank, world=world, shuffle=6, readers=3
        )
        unbroken = shown(make(), 24)  # several epochs
        assert shown(make(threads=threads, work=work), 10) == unbroken[:10]
        for start in (10, 3, 17):
            assert shown(make(threads=threads, work=work), 7, start) == unbroken[start : start + 7]


def test_ranks_divide_the_shards_and_never_run_dry(tmp_path, clip):
    make_shards(tmp_path)
    spec = f"file://{tmp_path}/"
    ranks = [shown(StreamBatches(spec, clip, 5, 2, rank=r, world=2, shuffle=1), 20) for r in range(2)]
    first = [{key for batch in rank[:2] for key in batch} for rank in ranks]
    assert not first[0] & first[1]
    alone = [shown(StreamBatches(f"{spec}02.tar", clip, 5, 2, rank=r, world=3, shuffle=1), 5) for r in range(3)]
    assert all(len(rank) == 5 for rank in alone)  # fewer shards than ranks: each takes another epoch of the one


def test_a_resumed_stream_opens_no_shard_that_lies_before_it(tmp_path, clip, monkeypatch):
    make_shards(tmp_path / "s")
    opened = []

    def noted(url):
        opened.append(Path(url).stem)
        return read_shard(url)

    make = functools.partial(StreamBatches, f"file://{tmp_path}/s/", clip, 4, 0, shuffle=1, readers=1)
    whole = shown(make(work=tmp_path / "work"), 12)
    monkeypatch.setattr("clip_train.stream.read_shard", noted)
    decoded = []
    monkeypatch.setattr("clip_train.stream.pixels_of", lambda *_: decoded.append(0) or torch.zeros(3, 16, 16))
    batches = make(work=tmp_path / "work")
    last = whole[11][0]
    assert shown(batches, 1, start=11) == whole[11:]
    assert opened[0] == f"{int(last.split('-')[0]):02d}"
    assert len(decoded) <= 4 * (batches.threads + 2)


def test_a_process_that_is_killed_resumes_where_it_was(tmp_path, clip):
    make_shards(tmp_path / "s")
    program = """
import sys, types, torch
from clip_train.stream import StreamBatches
spec, work = sys.argv[1:]
clip = types.SimpleNamespace(image_size=16, tokenize=lambda captions: torch.zeros(len(captions), 3))
for batch in StreamBatches(spec, clip, 5, 2, shuffle=6, work=work)():
    print(batch["caption"].tolist(), flush=True)
"""

    spec = f"pipe:cat {tmp_path}/s/{{00..05}}.tar"
    unbroken = [batch["caption"].tolist() for batch in take(StreamBatches(spec, clip, 5, 2, shuffle=6)(), 16)]
    command = [sys.executable, "-c", program, spec, str(tmp_path / "work")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert [json.loads(process.stdout.readline()) for _ in range(9)] == unbroken[:9]
        process.send_signal(signal.SIGKILL)
    resumed = take(StreamBatches(spec, clip, 5, 2, shuffle=6, work=tmp_path / "work")(9), 7)
    assert [batch["caption"].tolist() for batch in resumed] == unbroken[9:]
    assert list((tmp_path / "work").glob("stream-*-0of1.jsonl"))


def test_half_a_line_at_the_end_of_the_journal_is_taken_off(tmp_path, clip):
    make_shards(tmp_path / "s")
    make = functools.partial(StreamBatches, f"file://{tmp_path}/s/", clip, 5, 2, shuffle=6, work=tmp_path / "work")
    whole = shown(make(), 12)
    [journal] = (tmp_path / "work").iterdir()
    with open(journal, "a") as file:
        file.write('{"shard": 99, "ur')
    assert shown(make(), 4, 8) == whole[8:]
    assert all(json.loads(line)["shard"] < 99 for line in journal.read_text().splitlines())


def test_a_shard_that_changed_since_it_was_noted_is_refused(tmp_path, clip):
    make_shards(tmp_path / "s", (3, 3))
    make = functools.partial(StreamBatches, f"file://{tmp_path}/s/", clip, 2, 0, shuffle=1, work=tmp_path / "work")
    take(make()(), 3)
    make_shards(tmp_path / "s", (4, 4))
    with pytest.raises(UserError, match=r"had 3 samples before, and 4 now"):
        take(make()(0), 9)


def test_samples_that_cannot_be_used_are_left_out_counted_and_named(tmp_path, clip):
    import io
    import tarfile

    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in [
            ("mute.png", tiny.picture(0)),
            ("blind.txt", b"no picture"),
            ("good.png", tiny.picture(1)),
            ("good.txt", b"fine"),
            ("half.png", tiny.picture(2)[:60]),
            ("half.txt", b"half"),
            ("broken.png", tiny.picture(3)),
            ("broken.json", b"{"),
            ("last.cls", b"7"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    batches = StreamBatches(f"file://{tmp_path}/0.tar", clip, 4, 0, shuffle=1)
    batch = take(batches(), 1)[0]
    assert batch["caption"].tolist() == [text_id("fine")] * 4  # the next good one stands in for what cannot be decoded
    reasons = dict(batches.bad)
    assert (reasons["mute"], reasons["blind"], reasons["broken"]) == ("no caption", "no picture", "json cannot be read")
    assert reasons["last"] == "no picture" and "truncated" in reasons["half"].lower()
    assert batches.bad_count >= 6 and len(reasons) == 5


def test_bad_pictures_do_not_change_what_the_other_places_show(tmp_path, clip):
    damaged = ("2-3", "0-1", "5-8")
    make_shards(tmp_path / "good"), make_shards(tmp_path / "bad", damaged=damaged)
    good = shown(StreamBatches(f"file://{tmp_path}/good/", clip, 6, 4, shuffle=10), 12)
    batches = StreamBatches(f"file://{tmp_path}/bad/", clip, 6, 4, shuffle=10)
    for mine, theirs in zip(shown(batches, 12), good, strict=True):
        assert not set(mine) & set(damaged)
        assert all(m == t or t in damaged for m, t in zip(mine, theirs, strict=True))
    assert {key for key, _ in batches.bad} == set(damaged)
    single = StreamBatches(f"file://{tmp_path}/bad/", clip, 1, 4, shuffle=10)
    for mine, theirs in zip(itertools.chain(*shown(single, 72)), itertools.chain(*good), strict=True):
        assert mine not in damaged and (mine == theirs or theirs in damaged)


@pytest.mark.parametrize("what", ["empty", "mute", "undecodable"])
def test_shards_without_anything_usable_are_refused_instead_of_read_for_ever(tmp_path, clip, what):
    if what == "undecodable":
        make_shards(tmp_path, (4, 4), damaged=[f"{s}-{n}" for s in range(2) for n in range(4)])
    else:
        make_shards(tmp_path, (0, 0))
    if what == "mute":
        from clip_train.shards import write_shards

        write_shards([dataclasses.replace(tiny.samples(1)[0], captions=[" "])], tmp_path / "mute")
        spec, words = f"file://{tmp_path}/mute/", "none of the 1 shards holds a picture with a caption .*no caption"
    else:
        spec = f"file://{tmp_path}/"
        words = (
            "12 pictures in a row cannot be decoded; the first: " if what == "undecodable" else "none of the 2 shards"
        )
    with pytest.raises(UserError, match=words):
        next(StreamBatches(spec, clip, 4, 0, shuffle=8)())


def flaky(monkeypatch, url_part, fails, after=2):
    """Makes a shard break after `after` samples, the first `fails` times that it is read."""
    left = {"fails": fails}

    def breaking(url):
        for n, item in enumerate(read_shard(url)):
            if url_part in url and n == after and left["fails"]:
                left["fails"] -= 1
                raise ConnectionResetError("the line went dead")
            yield item

    monkeypatch.setattr("clip_train.stream.read_shard", breaking)
    waits = []
    monkeypatch.setattr("clip_train.stream.time.sleep", waits.append)
    return waits


def test_a_connection_that_breaks_is_taken_up_again_after_growing_waits(tmp_path, clip, monkeypatch):
    make_shards(tmp_path)
    make = functools.partial(StreamBatches, f"file://{tmp_path}/", clip, 5, 2, shuffle=6)
    unbroken = shown(make(), 12)
    waits = flaky(monkeypatch, "02.tar", fails=3)
    assert shown(make(), 12) == unbroken
    assert waits == [1, 2, 4]


def test_a_command_that_does_not_exist_is_tried_once_and_one_that_fails_again(clip, monkeypatch):
    waits = []
    monkeypatch.setattr("clip_train.stream.time.sleep", waits.append)
    with pytest.raises(UserError, match="exit code 127"):
        next(StreamBatches("pipe:no-such-command 2>/dev/null", clip, 2, 0, readers=1)())
    assert waits == []
    with pytest.raises(UserError, match="exit code 1;"):
        next(StreamBatches("pipe:false", clip, 2, 0, readers=1)())
    assert waits[:5] == [1, 2, 4, 8, 16]


def test_a_shard_that_stays_broken_stops_the_stream_or_is_passed_over(tmp_path, clip, monkeypatch):
    make_shards(tmp_path / "s")
    flaky(monkeypatch, "02.tar", fails=10**9)
    make = functools.partial(StreamBatches, f"file://{tmp_path}/s/", clip, 5, 2, shuffle=6, retries=2)
    with pytest.raises(UserError, match=r"02\.tar cannot be read: the line went dead; mend it, or leave it out"):
        take(make()(), 12)
    batches = make(skip_broken=True, work=tmp_path / "work")
    whole = shown(batches, 12)
    assert {key for batch in whole for key in batch if key.startswith("2-")} == {"2-0", "2-1"}
    assert batches.broken[0] == (f"file://{tmp_path}/s/02.tar", "the line went dead")
    monkeypatch.undo()  # the line is well again; what was passed over stays so, or the steps would move
    assert shown(make(skip_broken=True, work=tmp_path / "work"), 12) == whole


@pytest.mark.parametrize("lost", [1, 600, 1024, 10240])
def test_a_shard_that_is_cut_short_is_noticed_wherever_it_was_cut(tmp_path, lost):
    make_shards(tmp_path, (9,))
    tar = tmp_path / "00.tar"
    import tarfile

    with tarfile.open(tar) as whole:
        end = [m.offset_data + (m.size + 511) // 512 * 512 for m in whole][-1]
    os.truncate(tar, {1: end - 300, 600: end - 600, 1024: end, 10240: end - 1536}[lost])
    with pytest.raises(BrokenShard, match="cut short or damaged"):
        list(read_shard(f"file://{tar}"))
    with pytest.raises(BrokenShard, match="exit code 7"):
        list(read_shard(f"pipe:cat {make_shards(tmp_path, (9,))}/00.tar; exit 7"))


def test_shards_come_over_http_where_that_is_allowed(tmp_path, clip):
    make_shards(tmp_path, (3, 4))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        spec = f"http://127.0.0.1:{server.server_port}/{{00..01}}.tar"
        mine = shown(StreamBatches(spec, clip, 7, 0, shuffle=7, allow_http=True), 1, sizes=(3, 4))
        server.shutdown()
    assert sorted(mine[0]) == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2", "1-3"]


def test_no_password_of_an_address_is_kept_or_said(tmp_path, clip, monkeypatch):
    monkeypatch.setattr("clip_train.stream.time.sleep", lambda _: None)
    with pytest.raises(UserError, match="http://127.0.0.1:9/0.tar: a user name or password is not sent over http"):
        list_urls("http://me:secret@127.0.0.1:9/0.tar", allow_http=True)
    tar = make_shards(tmp_path, (3,)) / "00.tar"
    spec = f"pipe:cat {tar} || curl -u me:secret 'https://h.invalid/0.tar?signature=secret'"
    batches = StreamBatches(spec, clip, 3, 0, shuffle=3, work=tmp_path / "work", readers=1)
    take(batches(), 3)
    [journal] = (tmp_path / "work").iterdir()
    assert "-u ... 'https://h.invalid/0.tar'" in journal.read_text() and "secret" not in journal.read_text()
    take(StreamBatches(spec, clip, 3, 0, shuffle=3, work=tmp_path / "work", readers=1)(4), 2)
    failing = StreamBatches("pipe:false http://me:secret@h.invalid/0.tar", clip, 3, 0, readers=1)
    with pytest.raises(UserError, match="pipe:false http://h.invalid/0.tar cannot be read: .*exit code 1") as caught:
        next(failing())
    assert "secret" not in str(caught.value)


def test_places_may_come_in_parts_of_any_size_none_included(tmp_path, clip):
    make_shards(tmp_path)
    batches = StreamBatches(f"file://{tmp_path}/", clip, 1, 2, shuffle=6)
    unbroken = [key for [key] in shown(batches, 12)]
    parts = list(batches.parts(iter([np.arange(0), np.arange(3, 5), np.arange(0), np.arange(5, 12)])))
    assert [keys_of(part) for part in parts] == [[], unbroken[3:5], [], unbroken[5:12]]
    assert parts[0]["pixels"].shape == (0, 3, 16, 16) and parts[0]["tokens"].shape == (0, 16)
