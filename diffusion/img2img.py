"""A picture drawn over: noise is added to it, and taken off again towards another embedding.

SDEdit (Meng et al. 2021, arXiv 2108.01073): the large shapes survive the noise, the small ones are drawn anew.
"""

import math
from collections.abc import Sequence

import numpy as np

from clip_train.settings import UserError
from diffusion.generate import Generated, Generator, Sampling
from diffusion.inversion import own_records, refuse_choices
from diffusion.samplers import OnStep, SampleNoise
from diffusion.source import Source, to_x0

STREAM = 101  # of the noise that is added to a picture, beside those of the decoder and the prior


def noise_level(strength: float, how: Sampling) -> float:
    """Sigma for a strength in (0, 1]: the cosine schedule's at that time, tan(pi strength / 2), at most how.sigma_max.

    0.3 is sigma 0.5, 0.5 is 1, 0.7 is 2, 0.8 is 3, 0.9 is 6.3; pixels are in [-1, 1].
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength {strength:g} must be above 0, which leaves the picture as it is, and at most 1")
    sigma = math.tan(math.pi / 2 * min(strength, 0.9999))
    if sigma <= how.sigma_min:
        raise UserError(f"strength {strength:g} is a noise of {sigma:.2g}, less than sigma_min {how.sigma_min:g}")
    return min(sigma, how.sigma_max)


def img2img(
    generator: Generator,
    rows: np.ndarray,
    picture: Source,
    seeds: Sequence[int],
    how: Sampling | None = None,
    *,
    captions: Sequence[str] | None = None,
    strength: float = 0.7,
    on_step: OnStep = None,
) -> list[Generated]:
    """The picture drawn over towards embeddings (B, D), with a seed each. captions: for decoders that read text."""
    how = how or generator.how
    refuse_choices(how, "img2img")
    sigma, rows, seeds = noise_level(strength, how), generator.rows(rows), list(seeds)
    records = own_records({"name": "img2img", "strength": strength, "sources": [picture.told]}, rows, captions)
    known = generator.recalled(records, seeds, how)
    if known is not None:
        return known
    x0 = to_x0([picture], generator.size, generator.device)
    start = x0 + sigma * SampleNoise(seeds, x0.shape[1:], generator.device, stream=STREAM)()
    made = generator.walk(rows, captions, seeds, how, start=start, sigma=sigma, on_step=on_step)
    return generator.finished(made, records, seeds, how, rows=rows)
