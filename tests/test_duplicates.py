import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from clip_train.duplicates import colour_grid, group_pictures, near_pairs, perceptual_hashes, small_grey


def scene(seed, size=(160, 120)):
    """A picture of a few shapes."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(rng.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = rng.integers(0, size[0]), rng.integers(0, size[1])
        box = (x, y, x + rng.integers(10, 90), y + rng.integers(10, 90))
        draw = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        draw([int(v) for v in box], fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def hashed(pictures):
    grey = np.stack([small_grey(picture) for picture in pictures])
    return perceptual_hashes(grey), np.stack([colour_grid(picture) for picture in pictures])


def bits(a, b):
    return (int(a) ^ int(b)).bit_count()


def test_the_hash_is_the_one_of_imagehash():
    # str(imagehash.phash(Image.fromarray(grey))) of imagehash 4.3.2, for pictures that need no scaling
    known = ["81070a3f3f7e7162", "9d820a1d1ebf153e", "95020b2e2d757f78"]
    y, x = np.mgrid[:32, :32]
    grey = np.stack([(a * x + b * y * y + x * y) % 251 for a, b in ((3, 1), (7, 5), (1, 2))]).astype(np.uint8)
    assert [f"{int(value):016x}" for value in perceptual_hashes(grey)] == known


def test_the_cosines_are_those_of_the_dct():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (32, 32)).astype(np.uint8)
    place = np.arange(32)
    wave = [np.cos(np.pi * frequency * (2 * place + 1) / 64) for frequency in range(8)]
    low = np.array([[sum(grey[y] @ wave[v] * wave[u][y] for y in place) for v in range(8)] for u in range(8)])
    expected = "".join("1" if value > np.median(low) else "0" for value in low.ravel())
    assert f"{int(perceptual_hashes(grey[None])[0]):064b}" == expected


def test_scaled_compressed_and_retouched_pictures_stay_near_and_others_do_not(tmp_path):
    changes = {
        "smaller": lambda p: p.resize((80, 60), Image.Resampling.BICUBIC),
        "jpeg": lambda p: jpeg(p, tmp_path / "x.jpg"),
        "brighter": lambda p: ImageEnhance.Brightness(p).enhance(1.05),
        "softer": lambda p: p.filter(ImageFilter.GaussianBlur(1)),
    }
    pictures = [scene(seed) for seed in range(40)]
    changed = {name: [change(p) for p in pictures] for name, change in changes.items()}
    everything = pictures + [p for some in changed.values() for p in some]
    group = group_pictures(*hashed(everything))
    together = (group.reshape(5, 40) == np.arange(40)).mean(axis=1)
    assert together[0] == 1  # no two scenes in one group
    assert together.min() > 0.9


def jpeg(picture, path):
    picture.save(path, quality=40)
    return Image.open(path).convert("RGB")


def test_pictures_that_differ_in_colour_alone_are_not_near():
    red, blue = (Image.new("RGB", (64, 64), "white") for _ in range(2))
    ImageDraw.Draw(red).ellipse((8, 8, 40, 40), fill=(220, 40, 40))
    ImageDraw.Draw(blue).ellipse((8, 8, 40, 40), fill=(60, 80, 220))
    hashes, colours = hashed([red, blue])
    assert bits(*hashes) <= 4
    assert group_pictures(hashes, colours).tolist() == [0, 1]
    assert group_pictures(hashes, colours, colour_distance=255).tolist() == [0, 0]


@pytest.mark.parametrize("count, distance", [(400, 0), (400, 4), (400, 9), (20_001, 4), (20_001, 7)])
def test_all_near_pairs_are_found_and_no_others(count, distance):  # few are compared, many looked up by quarters
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    planted = {}
    for n in range(100):  # a copy with some bits turned, at random places
        turned = rng.choice(64, n % 9, replace=False)
        hashes[200 + n] = hashes[n] ^ np.bitwise_or.reduce(
            np.uint64(1) << turned.astype(np.uint64), initial=np.uint64(0)
        )
        planted[n, 200 + n] = len(turned)
    found = {pair for i, j in near_pairs(hashes, distance) for pair in zip(i.tolist(), j.tolist(), strict=True)}
    assert {pair for pair, turned in planted.items() if turned <= distance} <= found
    assert all(i < j and bits(hashes[i], hashes[j]) <= distance for i, j in found)


def test_groups_are_what_hangs_together_named_after_their_first():
    hashes = np.array([0b1111, 2**63 - 1, 0b0011, 0b0000, 2**63 - 1, 0xFF << 30], dtype=np.uint64)
    colours = np.zeros((6, 48), dtype=np.uint8)
    assert group_pictures(hashes, colours, distance=2).tolist() == [0, 1, 0, 0, 1, 5]
    assert group_pictures(hashes, colours, distance=1).tolist() == [0, 1, 2, 3, 1, 5]
    colours[4] = 100
    assert group_pictures(hashes, colours, distance=2).tolist() == [0, 1, 0, 0, 4, 5]


def test_groups_equal_those_of_a_plain_search_through_a_graph():
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**10, 120, dtype=np.uint64)
    near = [[bits(a, b) <= 1 for b in hashes] for a in hashes]
    expected = list(range(120))
    for start in range(120):
        if expected[start] == start:
            stack = [start]
            while stack:
                one = stack.pop()
                fresh = [other for other in range(start + 1, 120) if near[one][other] and expected[other] > start]
                fresh = [other for other in fresh if expected[other] == other]
                for other in fresh:
                    expected[other] = start
                stack += fresh
    assert group_pictures(hashes, np.zeros((120, 48), np.uint8), distance=1).tolist() == expected
