"""Pictures that look alike: a perceptual hash, the pairs of hashes that differ in few bits, the groups they form."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

SIDE = 32  # pixels of the small grey picture that is hashed
COLOURS = 4  # cells of the colour grid, per side
PLAIN = 4.0  # grey levels (std over the small picture) below which a picture is of one colour, and its hash is noise
BLOCK = 512  # hashes that are looked up together


def small_grey(picture: Image.Image) -> np.ndarray:
    """uint8 (32, 32): the picture, squeezed, in grey: what its hash is made of."""
    return np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def colour_grid(picture: Image.Image) -> np.ndarray:
    """uint8 (48,): mean red, green and blue of 4 x 4 cells: what a hash of grey does not see."""
    return np.asarray(picture.resize((COLOURS, COLOURS), Image.Resampling.BOX)).reshape(-1)


def perceptual_hashes(grey: np.ndarray) -> np.ndarray:
    """uint64 (N,): one bit for each of the 8 x 8 lowest frequencies of (N, 32, 32): whether it is above their median.

    The DCT hash ("pHash") of C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010,
    section 3.2.1; bit for bit what imagehash.phash gives. Scaling, compression and small retouches change few bits.
    """
    place, frequency = np.arange(SIDE), np.arange(8)[:, None]
    cosines = np.cos(np.pi * frequency * (2 * place + 1) / (2 * SIDE))  # (8, 32): DCT-II, its lowest 8 rows
    low = (cosines @ grey.astype(np.float64) @ cosines.T).reshape(len(grey), 64)
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64).reshape(-1)


def near_pairs(hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of (i, j), i < j: all pairs of hashes that differ in at most `distance` bits.

    Few hashes are compared one with all. Of many, those are looked up that agree in one of several bands of bits: two
    hashes that differ in 3 bits agree in one of 4 bands, up to one bit if they differ in 7, so none is missed (Norouzi,
    Punjani, Fleet, Fast Search in Hamming Space with Multi-Index Hashing, CVPR 2012).
    """
    import faiss

    codes = np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 8)
    if len(codes) < 20_000 or distance > 7:
        index = faiss.IndexBinaryFlat(64)
    else:
        bands, bits, flips = (4, 16, 0) if distance < 4 else (5, 12, 0) if distance == 4 else (4, 16, 1)
        index = faiss.IndexBinaryMultiHash(64, bands, bits)
        index.nflip = flips
    index.add(codes)
    for start in range(0, len(codes), BLOCK):
        limits, _, found = index.range_search(codes[start : start + BLOCK], distance + 1)  # nearer than, not as near as
        asked = start + np.repeat(np.arange(len(limits) - 1), np.diff(limits.astype(np.int64)))
        yield asked[found > asked], found[found > asked]


def group_pictures(
    hashes: np.ndarray, colours: np.ndarray, distance: int = 4, colour_distance: float = 12
) -> np.ndarray:
    """int64 (N,): the first picture of the group that each belongs to; alone, a picture is its own group.

    hashes: uint64 (N,). colours: uint8 (N, 48). Two pictures are near when their hashes differ in at most `distance`
    of 64 bits and their colour grids by at most `colour_distance` of 255 levels on average; groups are what hangs
    together by such pairs.
    """
    own = np.dtype([("hash", "<u8"), ("colour", "u1", colours.shape[1])])
    rows = np.empty(len(hashes), own)
    rows["hash"], rows["colour"] = hashes, colours
    _, first, which = np.unique(rows.view(f"V{own.itemsize}"), return_index=True, return_inverse=True)
    group = np.arange(len(first))
    colours = colours[first].astype(np.int16)
    for i, j in near_pairs(hashes[first], distance):
        alike = np.abs(colours[i] - colours[j]).mean(axis=1) <= colour_distance
        _join(group, i[alike], j[alike])
    names = np.full(len(first), len(hashes), dtype=np.int64)
    np.minimum.at(names, group[which], np.arange(len(hashes)))
    return names[group[which]]


def _join(group: np.ndarray, i: np.ndarray, j: np.ndarray) -> None:
    """Connected components, in place: group[x] is the lowest member that x hangs together with."""
    while True:
        one, other = group[i], group[j]
        apart = one != other
        if not apart.any():
            return
        low, high = np.minimum(one, other)[apart], np.maximum(one, other)[apart]
        np.minimum.at(group, high, low)
        while not np.array_equal(group, above := group[group]):
            group[:] = above
