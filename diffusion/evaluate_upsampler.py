"""Is an upsampler better than interpolation? Nearness to the true picture, and likeness to true pictures, side by side.

The two pull apart (Blau and Michaeli 2018, arXiv 1711.06077): the mean of all pictures that could be meant is nearest
by squared error and looks like none of them; a sample looks like one of them and errs by about 3 dB more. So both are
measured: the one-step mean, and samples.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_train.model import Clip
from clip_train.pictures import Pictures
from clip_train.settings import Progress, UserError
from clip_train.shards import ShardSet
from clip_train.sheet import contact_sheet
from diffusion.distances import compare
from diffusion.features import Features, open_features
from diffusion.intervals import Figure, flat, of_mean
from diffusion.train_upsampler import load_upsampler, random_crops
from diffusion.upsample import UpsamplerDenoiser, enlarge

LEAST = 40  # two sets of 20
Way = Callable[[Tensor, Tensor, list[int]], Tensor]  # small (B, 3, h, w), rows (B, D), seeds -> large


def evaluate_upsampler_folder(
    folder: Path | str,
    shards: Path | str,
    *,
    clip: Path | str | None = None,
    features: str = "",
    count: int = 256,
    seed: int = 0,
    steps: int = 8,
    noise_level: float = 0.05,
    guidance: float = 1.0,
    device: str | torch.device = "cpu",
    on_progress: Progress | None = None,
) -> tuple[dict[str, Any], Image.Image]:
    """One crop out of each of `count` pictures of `shards`, made small and enlarged in every way: numbers and a sheet.

    features: see features.open_features; "": the CLIP that the upsampler was trained with. Crops are as large as in
    training and are made small by Pillow's bicubic filter, in whole grey levels, as pictures are before a decoder.
    """
    upsampler, made = load_upsampler(folder, device)
    where = clip or made.input_path("clip")
    if where is None:
        raise UserError(f"the CLIP that {folder}/ was trained with is not where it was; say where: --clip")
    encoder, config = Clip.load(where, device), upsampler.config
    if encoder.fingerprint != made.inputs["clip"]["fingerprint"]:
        raise UserError(f"{where}/ is not the CLIP that {folder}/ was trained with; pass that with --clip")
    samples = ShardSet(str(shards))
    rows = np.random.default_rng(seed).permutation(len(samples))[:count]
    pixels, rows = Pictures(samples, config.picture_size, cache_bytes=0).load(np.sort(rows))
    if len(rows) < LEAST:
        raise UserError(f"{shards} has {len(rows)} pictures to measure on; at least {LEAST} are needed")
    true = random_crops(pixels, config.crop, torch.Generator().manual_seed(seed))
    views = [encoder.to_pixels(picture) for picture in pictures_of(pixels.float() / 127.5 - 1)]
    embeddings = torch.cat(
        [encoder.encode_image(torch.stack(views[i : i + 64])).cpu() for i in range(0, len(views), 64)]
    )
    ways = ways_of(upsampler, steps, noise_level, guidance)
    eye = open_features(features or encoder, device)
    figures, large = evaluate_upsampler(ways, true, embeddings, config.factor, eye, seed, on_progress)
    figures |= {"count": len(rows), "features": eye.name, "steps": steps, "trained_on": made.inputs["shards"]["path"]}
    shown = [large[way][i] for i in range(min(12, len(rows))) for way in large]
    labels = [way for _ in range(min(12, len(rows))) for way in large]
    return figures, contact_sheet(shown, labels, columns=len(large), cell=2 * config.crop)


def evaluate_upsampler(
    ways: dict[str, Way],
    true: Tensor,
    embeddings: Tensor,
    factor: int,
    features: Features,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, list[Image.Image]]]:
    """true (N, 3, S, S) in [-1, 1], whole grey levels; embeddings (N, D) unit rows of the pictures they are from.

    Returns for each way psnr (dB), cosine (of the features to the true crop's own), kernel (x 1000) and the other
    distances of every other enlarged crop to the true crops of the rest, with intervals; and the pictures: "small",
    each way's, "true".
    """
    small = [picture.resize((picture.width // factor,) * 2, Image.Resampling.BICUBIC) for picture in pictures_of(true)]
    seen = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in small]).float() / 127.5 - 1
    large, figures = {"small": small}, {}
    real = features(pictures_of(true))
    for number, (name, way) in enumerate(ways.items()):
        made = []
        for start in range(0, len(seen), 32):
            some = slice(start, start + 32)
            made.append(way(seen[some], embeddings[some], [seed + i for i in range(start, start + len(seen[some]))]))
            if on_progress:
                on_progress(number * len(seen) + start + len(made[-1]), len(ways) * len(seen), way=name)
        large[name] = pictures_of(torch.cat(made))
        found = features(large[name])
        # likeness to other pictures' true crops: beside its own, a crop would count as a near copy
        likeness = compare(real[1::2], found[::2], seed)
        figures[name] = flat({"psnr": psnr(true, large[name]), "cosine": of_mean(_cosines(found, real))} | likeness)
    return {"ways": figures}, large | {"true": pictures_of(true)}


def ways_of(upsampler: UpsamplerDenoiser, steps: int, noise_level: float, guidance: float = 1.0) -> dict[str, Way]:
    """bicubic, lanczos; the upsampler's mean (one step), its samples, and samples with noise on the small picture."""

    def resized(how: Image.Resampling) -> Way:
        def way(small: Tensor, rows: Tensor, seeds: list[int]) -> Tensor:
            size = small.shape[3] * upsampler.config.factor, small.shape[2] * upsampler.config.factor
            large = [np.array(picture.resize(size, how)) for picture in pictures_of(small)]
            return torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2).float() / 127.5 - 1

        return way

    def drawn(steps: int, level: float, guidance: float = guidance) -> Way:
        return lambda small, rows, seeds: enlarge(
            upsampler, small, rows, seeds, steps=steps, guidance=guidance, noise_level=level
        ).cpu()

    ways = {"bicubic": resized(Image.Resampling.BICUBIC), "lanczos": resized(Image.Resampling.LANCZOS)}
    ways |= {"mean": drawn(1, 0.0, 1.0), "samples": drawn(steps, 0.0)}
    return ways | ({f"samples, noise {noise_level:g}": drawn(steps, noise_level)} if noise_level else {})


def pictures_of(x0: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in [-1, 1] as pictures of whole grey levels."""
    levels = ((x0.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one) for one in levels]


def psnr(true: Tensor, made: list[Image.Image]) -> Figure:
    """Peak signal-to-noise ratio of pictures to the true ones (N, 3, H, W) in [-1, 1]: 10 log10(255^2 / mean squared
    error) dB, the mean over pictures; at most 60 each, as much as equal to rounding."""
    errors = []
    for one, picture in zip(true, made, strict=True):
        grey = (one.permute(1, 2, 0).double().numpy() + 1) * 127.5
        errors.append(((grey - np.array(picture, dtype=np.float64)) ** 2).mean())
    return of_mean(np.minimum(10 * np.log10(255**2 / np.maximum(errors, 1e-9)), 60))


def table_of(figures: dict[str, Any]) -> tuple[str, tuple[str, ...], list[tuple]]:
    """Title, head and rows for console.print_table."""
    title = f"{figures['count']} crops, features: {figures['features']}; kernel x 1000; after +-: 95 %"
    rows = []
    for way, numbers in figures["ways"].items():
        cells = [way]
        for name, digits in (("psnr", 2), ("cosine", 4), ("kernel", 3)):
            low, high = numbers["interval"][name]
            cells.append(f"{numbers[name]:.{digits}f} +- {(high - low) / 2:.{digits}f}")
        rows.append(tuple(cells))
    return title, ("way", "PSNR dB", "cosine to the true", "kernel distance"), rows


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
