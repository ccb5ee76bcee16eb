import io
import json
import os
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from clip_train.pictures import Batches, PictureError, Pictures, decode_picture, to_pixels, training_pixels
from clip_train.sample import Sample
from clip_train.settings import UserError
from clip_train.shards import ShardSet, write_shards


def saved(picture, kind="PNG", **how):
    data = io.BytesIO()
    picture.save(data, kind, **how)
    return data.getvalue()


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_shards(folder, n, bad=(), size=(9, 7)):
    """n pictures, of which those in `bad` are cut short (their header is whole)."""
    rows = []
    for i in range(n):
        data = saved(noise(*size, seed=i))
        data = data[: len(data) // 2] if i in bad else data
        meta = {"width": size[0], "height": size[1]}
        rows.append(Sample(key=f"{i:03d}", image=data, ext="png", captions=[str(i)], meta=meta))
    write_shards(rows, folder, samples_per_shard=max(2, n // 3))
    return ShardSet(folder)


@pytest.mark.parametrize("size", [32, 64, 65])
@pytest.mark.parametrize(
    "shape", [(64, 64), (72, 72), (65, 64), (100, 67), (67, 100), (33, 34), (31, 200), (640, 333), (1, 90), (64, 95)]
)
def test_pixels_are_bit_equal_to_open_clips_validation_transform(shape, size):
    from open_clip.transform import image_transform

    picture = noise(*shape)
    theirs = image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(picture)
    mine = to_pixels(picture, size)
    assert mine.dtype == torch.uint8 and mine.shape == (3, size, size)
    assert torch.equal(mine / 255, theirs)


def test_transparency_is_put_on_white_in_every_mode_that_has_it():
    half = Image.new("RGBA", (2, 1))
    half.putpixel((0, 0), (255, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 128))
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    cases = {
        "RGBA": (saved(half), 127),
        "webp": (saved(half, "WEBP", lossless=True), 127),
        "palette with one clear colour": (saved(palette, transparency=1), 255),
        "palette with shares of clearness": (saved(palette, transparency=b"\xff\x80"), None),
        "LA": (saved(half.convert("LA")), 127),
    }
    for name, (data, grey) in cases.items():
        picture = decode_picture(data)
        assert picture.mode == "RGB", name
        if grey is not None:
            assert picture.getpixel((1, 0)) == (grey, grey, grey), name
        assert picture.getpixel((0, 0)) == ((76, 76, 76) if name == "LA" else (255, 0, 0)), name
    grey = decode_picture(cases["palette with shares of clearness"][0]).getpixel((1, 0))
    assert all(abs(value - (9 * 128 + 255 * 127) / 255) <= 1 for value in grey)


def test_sixteen_bit_grey_keeps_its_range():
    ramp = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert [decode_picture(saved(ramp)).getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (100,) * 3, (255,) * 3]


def test_cmyk_and_grey_become_rgb():
    white, black = Image.new("CMYK", (8, 8)), Image.new("CMYK", (8, 8), (0, 0, 0, 255))
    assert decode_picture(saved(white, "JPEG")).getpixel((3, 3)) == (255, 255, 255)
    assert decode_picture(saved(black, "JPEG")).getpixel((3, 3)) == (0, 0, 0)
    assert decode_picture(saved(Image.new("L", (2, 2), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert decode_picture(saved(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == (255, 255, 255)


def test_a_picture_on_its_side_is_turned_upright_as_its_exif_says():
    picture = Image.new("RGB", (4, 2), "blue")
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned: the file's left edge is the top
    picture.paste("red", (0, 0, 2, 2))
    turned = decode_picture(saved(picture, exif=exif))
    assert turned.size == (2, 4)
    assert turned.getpixel((0, 0)) == (255, 0, 0) and turned.getpixel((0, 3)) == (0, 0, 255)


def test_a_broken_exif_block_does_not_cost_the_picture():
    data = saved(Image.new("RGB", (4, 2), "blue"), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffrubbish")
    assert decode_picture(data).size == (4, 2)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not a JPEG"),
        (b"hello", "not a JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a JPEG"),
        (saved(noise(30, 30))[:-400], "(?i)truncated"),
        (saved(noise(30, 30), "JPEG")[:400], "(?i)truncated"),
        (saved(noise(30, 30), "WEBP")[:200], "[a-z]"),
        (saved(noise(300, 2)), "too long and thin"),
    ],
)
def test_damaged_or_foreign_bytes_are_refused_with_a_reason(data, reason):
    with pytest.raises(PictureError, match=reason) as caught:
        decode_picture(data)
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


def bomb(width, height):
    """A PNG of 100 bytes that says it is this large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])  # below, above and far above where Pillow itself complains
def test_decompression_bombs_are_refused_before_they_are_decoded(side):
    with pytest.raises(PictureError, match="million pixels"):
        decode_picture(bomb(side, side))
    with pytest.raises(PictureError, match="30 x 30 is more than 0.0005 million"):
        decode_picture(saved(noise(30, 30)), max_pixels=500)


def smooth(width, height, seed=0):
    """A picture such as JPEG is made for: few colours that run into each other."""
    return noise(6, 6, seed).resize((width, height), Image.Resampling.BICUBIC)


EASY = {  # format -> how it is saved: what torchvision decodes in Pillow's place
    "JPEG": [{"quality": 90}, {"quality": 75, "progressive": True}, {"quality": 90, "subsampling": 0}],
    "WEBP": [{"quality": 90}, {"lossless": True}],
    "PNG": [{}],
}


@pytest.mark.parametrize("kind, how", [(kind, how) for kind, hows in EASY.items() for how in hows])
def test_training_pixels_of_the_size_wanted_are_those_of_pillow(kind, how):
    for seed in range(5):
        data = saved(smooth(32, 32, seed), kind, **how)
        difference = (training_pixels(data, 32).float() - to_pixels(decode_picture(data), 32).float()).abs()
        assert difference.max() <= (2 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind, how", [(kind, how) for kind, hows in EASY.items() for how in hows])
@pytest.mark.parametrize("shape", [(48, 40), (40, 61), (20, 24), (100, 90), (200, 130)])
def test_training_pixels_differ_little_from_the_exact_ones(kind, how, shape):
    data = saved(smooth(*shape), kind, **how)
    mine, exact = training_pixels(data, 32), to_pixels(decode_picture(data), 32)
    assert mine.shape == exact.shape and mine.dtype == torch.uint8
    scaled = kind == "JPEG" and min(shape) >= 64  # by the decoder: 1/2, 1/4 or 1/8
    assert (mine.float() - exact.float()).abs().mean() < (2.5 if scaled else 0.1)


def test_training_pixels_of_what_needs_more_than_decoding_are_exact():
    half = smooth(16, 16).convert("RGBA")
    half.putalpha(100)
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = smooth(16, 16).quantize(16)
    hard = {
        "alpha": saved(half),
        "webp alpha": saved(half, "WEBP", lossless=True),
        "webp lossy alpha": saved(half, "WEBP"),
        "webp exif": saved(smooth(16, 16), "WEBP", exif=exif),
        "webp animation": saved(smooth(16, 16), "WEBP", save_all=True, append_images=[noise(16, 16)]),
        "gif animation": saved(smooth(16, 16), "GIF", save_all=True, append_images=[noise(16, 16)]),
        "palette": saved(palette, transparency=3),
        "jpeg on its side": saved(smooth(16, 16), "JPEG", exif=exif),
        "cmyk": saved(smooth(16, 16).convert("CMYK"), "JPEG"),
        "grey jpeg": saved(smooth(16, 16).convert("L"), "JPEG"),
        "rgb jpeg": saved(smooth(16, 16), "JPEG", keep_rgb=True),
        "16 bits": saved(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)),
        "bmp": saved(smooth(16, 16), "BMP"),
    }
    for name, data in hard.items():
        assert torch.equal(training_pixels(data, 16), to_pixels(decode_picture(data), 16)), name


def test_training_pixels_of_damaged_files_are_those_of_pillow_or_its_reason():
    rng = np.random.default_rng(0)
    refused = 0
    for kind, hows in EASY.items():
        for trial in range(120):
            data = bytearray(saved(smooth(24, 24, trial % 7), kind, **hows[trial % len(hows)]))
            if trial % 3:
                data[rng.integers(0, len(data))] ^= 1 << int(rng.integers(0, 8))
            else:
                data = data[: rng.integers(0, len(data))]
            try:
                exact = to_pixels(decode_picture(bytes(data)), 24)
            except PictureError as error:
                with pytest.raises(PictureError) as caught:
                    training_pixels(bytes(data), 24)
                assert str(caught.value) == str(error)
                refused += 1
            else:
                difference = (training_pixels(bytes(data), 24).float() - exact.float()).abs()
                assert difference.max() <= 2 or exact.shape != difference.shape or decode_picture(data).size != (24, 24)
    assert 60 < refused < 300


def test_training_pixels_of_a_bomb_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr("clip_train.pictures._decode_plain", None)  # decoding would fail
    jpeg, webp = saved(noise(16, 16), "JPEG"), bytearray(saved(noise(16, 16), "WEBP", lossless=True))
    start = jpeg.index(b"\xff\xc0")
    jpeg = jpeg[: start + 5] + struct.pack(">HH", 60_000, 60_000) + jpeg[start + 9 :]
    webp[21:25] = struct.pack("<I", 16383 << 14 | 16383)
    for data in (jpeg, bytes(webp), bomb(60_000, 60_000)):
        with pytest.raises(PictureError, match="million pixels"):
            training_pixels(data, 16)


def test_fast_pictures_are_training_pixels_and_have_a_cache_of_their_own(tmp_path):
    shards = make_shards(tmp_path / "s", 6, bad=(1,))
    for cache, size in ((None, 0), (None, 1e9), (tmp_path / "cache", 1e9)):
        fast = Pictures(shards, 5, cache, cache_bytes=size, fast=True)
        pixels, rows = fast.load(range(6))
        assert rows.tolist() == [0, 2, 3, 4, 5] and [key for key, _ in fast.bad] == ["001"]
        for row, one in zip(rows.tolist(), pixels, strict=True):
            assert torch.equal(one, training_pixels(shards.picture(row), 5))
    Pictures(shards, 5, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


def test_no_warning_of_pillow_gets_through_from_any_thread(recwarn):
    warnings.simplefilter("always")
    data = bomb(9_400, 9_600)  # Pillow warns from 89 million pixels on

    def refused(_):
        with pytest.raises(PictureError, match="million pixels"):
            decode_picture(data)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(refused, range(200)))
    assert not recwarn.list
    warnings.warn("still heard", UserWarning, stacklevel=1)
    assert len(recwarn.list) == 1


def test_cached_in_memory_in_a_file_and_on_demand_give_the_same_pixels(tmp_path):
    shards = make_shards(tmp_path / "s", 10, bad=(3, 7))
    memory = Pictures(shards, 6)
    file = Pictures(shards, 6, tmp_path / "cache")
    demand = Pictures(shards, 6, cache_bytes=0)
    assert memory.cached and file.cached and not demand.cached
    for pictures in (memory, file, demand):
        assert pictures.rows.tolist() == [0, 1, 2, 4, 5, 6, 8, 9] and len(pictures) == 8
        assert [key for key, _ in pictures.bad] == ["003", "007"] and "truncated" in pictures.bad[0][1]
        pixels = pictures.pixels([9, 0, 4])
        for got, row in zip(pixels, (9, 0, 4), strict=True):
            assert torch.equal(got, to_pixels(noise(9, 7, seed=row), 6))
        pixels, rows = pictures.load([2, 3, 2])
        assert rows.tolist() == [2, 2] and torch.equal(pixels[0], pixels[1])
        with pytest.raises(PictureError, match="003: .*truncated"):
            pictures.pixels([2, 3])


def test_the_cache_file_is_found_again_and_belongs_to_its_shards_and_size(tmp_path, monkeypatch):
    shards = make_shards(tmp_path / "s", 6, bad=(1,))
    other = make_shards(tmp_path / "t", 6)
    Pictures(shards, 6, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("clip_train.pictures.decode_picture", None)  # decoding anything would fail
        again = Pictures(shards, 6, tmp_path / "cache")
        assert again.bad[0][0] == "001" and again.rows.tolist() == [0, 2, 3, 4, 5]
    assert torch.equal(Pictures(other, 6, tmp_path / "cache").pixels([1])[0], to_pixels(noise(9, 7, seed=1), 6))
    assert Pictures(shards, 5, tmp_path / "cache").pixels([0]).shape == (1, 3, 5, 5)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 3


def test_a_cache_that_was_being_written_when_the_run_was_killed_is_made_anew(tmp_path):
    shards = make_shards(tmp_path / "s", 6)
    whole = Pictures(shards, 6, tmp_path / "cache").pixels(range(6))
    [array], [notes] = (tmp_path / "cache").glob("*.npy"), (tmp_path / "cache").glob("*.json")
    array.write_bytes(array.read_bytes()[:-100])
    assert torch.equal(Pictures(shards, 6, tmp_path / "cache").pixels(range(6)), whole)
    np.save(array, np.zeros((6, 3, 6, 6), np.uint8))
    notes.unlink()
    assert torch.equal(Pictures(shards, 6, tmp_path / "cache").pixels(range(6)), whole)


@pytest.mark.parametrize("cache_bytes", [0, 1e9])
def test_shards_of_which_more_than_half_cannot_be_decoded_are_refused_by_name(tmp_path, cache_bytes):
    half = make_shards(tmp_path / "a", 10, bad=range(5))
    assert len(Pictures(half, 4, cache_bytes=cache_bytes)) == 5
    most = make_shards(tmp_path / "b", 10, bad=range(1, 7))
    with pytest.raises(UserError, match="6 of 10 pictures cannot be decoded .001: .*; 002: .*; 003"):
        Pictures(most, 4, cache_bytes=cache_bytes)


def test_progress_ends_at_the_number_of_pictures(tmp_path):
    seen = []
    shards = make_shards(tmp_path / "s", 70, bad=(5,))
    Pictures(shards, 4, on_progress=lambda done, total, **numbers: seen.append((done, total, numbers)))
    assert seen[-1] == (70, 70, {"bad": 1}) and len(seen) == 3


def test_an_epoch_shows_every_picture_once_and_the_next_in_another_order(tmp_path):
    pictures = Pictures(make_shards(tmp_path / "s", 12, bad=(4,)), 4)
    batches = Batches(pictures, 3, seed=0)
    order = np.concatenate([batches.rows(step) for step in range(11)])  # three epochs of eleven pictures
    epochs = order.reshape(3, 11)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == pictures.rows.tolist()
    assert epochs[0].tolist() != epochs[1].tolist() != epochs[2].tolist()
    assert Batches(pictures, 3, seed=1).rows(0).tolist() != order[:3].tolist()


def test_the_batch_of_a_step_is_the_same_wherever_the_stream_starts(tmp_path):
    pictures = Pictures(make_shards(tmp_path / "s", 12), 4)
    stream = Batches(pictures, 5, seed=3)(0)
    unbroken = [next(stream) for _ in range(9)]
    for start in (0, 4, 7):
        stream = Batches(pictures, 5, seed=3)(start)
        for batch in unbroken[start:]:
            resumed = next(stream)
            assert torch.equal(resumed["row"], batch["row"]) and torch.equal(resumed["pixels"], batch["pixels"])
    batch = unbroken[8]
    assert batch["pixels"].dtype == torch.uint8 and batch["row"].dtype == torch.int64
    for row, pixels in zip(batch["row"].tolist(), batch["pixels"], strict=True):
        assert torch.equal(pixels, to_pixels(noise(9, 7, seed=row), 4))


def test_ranks_share_the_batch_of_one_process_between_them(tmp_path):
    pictures = Pictures(make_shards(tmp_path / "s", 12), 4)
    one = Batches(pictures, 6, seed=3)
    ranks = [Batches(pictures, 2, seed=3, rank=r, world=3) for r in range(3)]
    for step in range(7):
        assert np.concatenate([r.rows(step) for r in ranks]).tolist() == one.rows(step).tolist()


def test_a_batch_larger_than_the_set_repeats_it(tmp_path):
    pictures = Pictures(make_shards(tmp_path / "s", 4), 4)
    rows = Batches(pictures, 10, seed=0).rows(0)
    assert sorted(np.bincount(rows).tolist()) == [2, 2, 3, 3]


def test_a_picture_that_turns_out_bad_is_replaced_by_the_next_with_its_own_row(tmp_path):
    shards = make_shards(tmp_path / "s", 300, bad=(100, 101), size=(4, 4))
    pictures = Pictures(shards, 4, cache_bytes=0)
    assert len(pictures) == 300  # not among those that were looked at
    for step in range(3):
        batch = Batches(pictures, 100, seed=0).batch(step)
        assert not {100, 101} & set(batch["row"].tolist())
        for row, pixels in zip(batch["row"].tolist(), batch["pixels"], strict=True):
            assert torch.equal(pixels, to_pixels(noise(4, 4, seed=row), 4))
    assert sorted(key for key, _ in pictures.bad) == ["100", "101"]
    everything = torch.cat([Batches(pictures, 100, seed=0).batch(step)["row"] for step in range(3)])
    assert torch.bincount(everything, minlength=300)[102] == 3


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_worker_processes_give_the_same_batches_in_the_same_order(tmp_path):
    pictures = Pictures(make_shards(tmp_path / "s", 12), 4, cache_bytes=0)
    alone = Batches(pictures, 5, seed=3)(2)
    helped = Batches(pictures, 5, seed=3, workers=2)(2)
    for _ in range(5):
        mine, theirs = next(alone), next(helped)
        assert torch.equal(mine["row"], theirs["row"]) and torch.equal(mine["pixels"], theirs["pixels"])
    helped.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_goes_wrong_in_a_worker_process_is_said_in_one_line(tmp_path):
    shards = make_shards(tmp_path / "s", 6)
    stream = Batches(Pictures(shards, 4, cache_bytes=0), 6, seed=0, workers=2)(0)
    os.utime(shards.paths[0], (0, 0))
    with pytest.raises(UserError) as caught:
        next(stream)
    assert str(caught.value) == f"{shards.paths[0]} changed while it was being used; run the same command again"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_worker_processes_find_bad_is_told_to_the_parent(tmp_path):
    shards = make_shards(tmp_path / "s", 300, bad=(100, 101, 200), size=(4, 4))
    pictures = Pictures(shards, 4, cache_bytes=0)
    stream = Batches(pictures, 100, seed=0, workers=2)(0)
    batches = [next(stream) for _ in range(6)]
    stream.close()
    assert sorted(key for key, _ in pictures.bad) == ["100", "101", "200"]
    assert all("truncated" in reason.lower() for _, reason in pictures.bad)
    alone = Batches(Pictures(shards, 4, cache_bytes=0), 100, seed=0)(0)
    for batch in batches:
        assert torch.equal(batch["row"], next(alone)["row"])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_process_killed_in_an_epoch_is_taken_up_by_any_number_of_workers_and_ranks(tmp_path, workers):
    program = """
import sys
from clip_train.pictures import Batches, Pictures
from clip_train.shards import ShardSet
shards = ShardSet(sys.argv[1])
for batch in Batches(Pictures(shards, 4, cache_bytes=0), 6, seed=3, workers=int(sys.argv[2]))(0):
    print("[" + ", ".join(f'"{shards.keys[row]}"' for row in batch["row"].tolist()) + "]", flush=True)
"""
    shards = make_shards(tmp_path / "s", 35)
    pictures = Pictures(shards, 4, cache_bytes=0)
    stream = Batches(pictures, 6, seed=3)(0)
    unbroken = [[shards.keys[row] for row in next(stream)["row"].tolist()] for _ in range(14)]
    assert len({key for keys in unbroken[:6] for key in keys}) == 35  # an epoch ends inside the sixth step
    command = [sys.executable, "-c", program, str(tmp_path / "s"), str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert [json.loads(process.stdout.readline()) for _ in range(8)] == unbroken[:8]
        process.send_signal(signal.SIGKILL)
    for world in (1, 2):
        ranks = [Batches(pictures, 6 // world, 3, rank, world, workers)(8) for rank in range(world)]
        for keys in unbroken[8:]:
            assert [shards.keys[row] for rank in ranks for row in next(rank)["row"].tolist()] == keys
        for rank in ranks:
            rank.close()
