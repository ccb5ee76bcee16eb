"""Where a walk is and what the denoiser believes there, step by step; and how much detail pictures hold."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_train.folder import read_manifest
from clip_train.pictures import PictureError, decode_picture
from clip_train.settings import UserError
from clip_train.shards import ShardSet
from diffusion.decoder import null_cond, picture_cond
from diffusion.examine import open_held
from diffusion.generate import Generator, Sampling
from diffusion.guidance import blurred
from diffusion.heldout import HeldOut
from diffusion.lab.noising import preserved
from diffusion.samplers import Denoise, SampleNoise

NOISE = 1 << 22  # the stream of a seed that noises real pictures, see samplers.SampleNoise


@dataclass(frozen=True)
class Real:
    """Real pictures, and what a generator is told of them."""

    generator: Generator
    rows: Tensor  # (B, D) unit rows
    captions: list[str]
    x0: Tensor  # (B, 3, S, S) in [-1, 1]

    @classmethod
    def drawn_from(cls, generator: Generator, held: HeldOut, count: int, seed: int = 0) -> "Real":
        """`count` pictures, or all where there are fewer, chosen by seed. UserError: fewer than 5."""
        if len(held) < 5:
            raise UserError(f"{held.name} holds {len(held)} pictures; 5 are the fewest to look at")
        chosen = np.random.default_rng(seed).permutation(len(held))[:count].tolist()
        pixels = [np.asarray(picture) for picture in held.pictures(chosen, generator.size)]
        x0 = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return cls(generator, generator.rows(held.rows[chosen]), [held.captions[row] for row in chosen], x0)

    def __len__(self) -> int:
        return len(self.rows)

    def some(self, which: slice | list[int]) -> "Real":
        captions = self.captions[which] if isinstance(which, slice) else [self.captions[n] for n in which]
        return Real(self.generator, self.rows[which], captions, self.x0[which])

    def repeated(self, count: int) -> "Real":
        """Each of them `count` times in a row."""
        return self.some([n for n in range(len(self)) for _ in range(count)])

    @property
    def told(self) -> list[str] | None:
        """The captions, for a decoder that reads text."""
        return self.captions if self.generator.decoder.network.config.text else None

    def noisy(self, sigma: float, seed: int = 0) -> Tensor:
        """x0 + sigma noise, the same noise at every sigma."""
        noise = SampleNoise(range(seed, seed + len(self)), self.x0.shape[1:], stream=NOISE)()
        return self.x0 + sigma * noise

    def untold(self, sigma: float, seed: int = 0) -> Tensor:
        """Where a walk begins that is told nothing: noise around the picture that the decoder guesses at, unasked."""
        with torch.no_grad():
            nothing = null_cond(picture_cond(self.rows.to(self.generator.device)))
            around = self.generator.decoder.network.guess(nothing).float().cpu()
        return replace(self, x0=around).noisy(sigma, seed)

    def believed(self, x: Tensor, sigma: float, how: Sampling) -> Tensor:
        """What the denoiser makes of x at sigma, in one step: the mean of all pictures that x can come from."""
        x = x.to(self.generator.device)
        return self.generator.denoise(self.rows, self.told, how)(x, x.new_full((len(x),), sigma)).float().cpu()

    def walked(self, seed: int, how: Sampling, start: Tensor | None = None, sigma: float | None = None,
               around: Callable[[Denoise], Denoise] | None = None) -> Tensor:  # fmt: skip
        """The full walk from noise, or from x at sigma; picture i with seed + i."""
        seeds = range(seed, seed + len(self))
        rows = self.rows.to(self.generator.device)
        return self.generator.walk(rows, self.told, seeds, how, start=start, sigma=sigma, around=around).float().cpu()


@dataclass
class Track:
    """A walk that was written down: pass `around` to Generator.walk. One entry for each call of the denoiser."""

    sigmas: list[float] = field(default_factory=list)
    x: list[Tensor] = field(default_factory=list)  # (B, 3, S, S) each: where the walk is
    believed: list[Tensor] = field(default_factory=list)  # what it would end in, were this the last step

    def around(self, denoise: Denoise) -> Denoise:
        def watched(x: Tensor, sigma: Tensor) -> Tensor:
            guess = denoise(x, sigma)
            self.sigmas.append(float(sigma[0]))
            self.x.append(x.float().cpu())
            self.believed.append(guess.float().cpu())
            return guess

        return watched

    @property
    def shown(self) -> list[Tensor]:
        """x as the variance-preserving process has it, which fits the range that can be shown."""
        return [preserved(x, sigma) for x, sigma in zip(self.x, self.sigmas, strict=True)]

    def unsettled(self, end: Tensor) -> list[float]:
        """How far each belief still is from the picture the walk ends in: mean square, the first belief being 1."""
        away = [float((guess - end).square().mean()) for guess in self.believed]
        return [one / max(away[0], 1e-12) for one in away]


def detail(pictures: Tensor) -> float:
    """Mean square of what a blur of one pixel takes from pictures (B, 3, S, S): the power of their finest lines."""
    return float((pictures - blurred(pictures, 1.0)).square().mean())


def saturation(pictures: Tensor) -> float:
    """Mean distance of a pixel's strongest from its weakest colour channel: 0 for greys. Pictures (B, 3, S, S)."""
    return float((pictures.amax(1) - pictures.amin(1)).mean())


def error(pictures: Tensor, real: Tensor) -> float:
    """Mean squared difference of pixels in [-1, 1]."""
    return float((pictures - real).square().mean())


def ratio(value: float, of: float) -> float:
    """value / of; NaN, which no band holds, where there is nothing to compare with (a decoder that draws nothing)."""
    return value / of if of > 1e-12 else float("nan")


def among_seeds(pictures: Tensor, count: int) -> float:
    """Variance of a pixel over `count` pictures of one thing that stand in a row, mean over pixels and things."""
    return float(pictures.unflatten(0, (-1, count)).var(dim=1).mean())


def pictures_for(
    generator: Generator, decoder: Path | str, embeddings: Path | str | None, shards: str | None, count: int, seed: int
) -> HeldOut:
    """The embeddings folder's pictures; without one, `count` of the shards (the decoder's own), embedded here and now.

    UserError: the shards are not where they were, or the embeddings are of another CLIP than the decoder.
    """
    if embeddings is not None:
        return open_held(embeddings, shards, generator)
    shards = shards or read_manifest(decoder, "decoder").input_path("shards")
    if shards is None:
        raise UserError(f"the shards that {decoder}/ was trained on are not where they were; say where: --shards")
    samples = ShardSet(str(shards))
    places = np.random.default_rng(seed).permutation(len(samples))[:count].tolist()
    about = [samples.about(place) for place in places]
    held = HeldOut(
        name=Path(str(shards)).name,
        rows=np.zeros((len(places), generator.decoder.network.config.embed_dim), np.float32),
        captions=[captions[0] for captions, _ in about],
        labels=[(label or captions[0]).lower() for captions, label in about],
        keys=[samples.keys[place] for place in places],
        shards=shards,
        fingerprint=samples.fingerprint,
        places=places,
    )
    held.rows[:] = generator.seen([decoded(samples, place) for place in places]).numpy()
    return held


def decoded(samples: ShardSet, place: int) -> Image.Image:
    """One picture of the shards; UserError if it cannot be decoded."""
    try:
        return decode_picture(samples.picture(place))
    except PictureError as error:
        raise UserError(f"{samples.keys[place]} cannot be decoded ({error}); give --embeddings") from error
