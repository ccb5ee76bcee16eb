"""Generator: captions or image embeddings -> pictures, each with a record of how it was made.

A picture is a function of its record: caption or embedding, seed, the sampling settings, and the weights named by their
fingerprints. The record travels in the PNG, so a picture can be made again from itself.
"""

import base64
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clip_train.fit import autocast, resolved_precision
from clip_train.model import Clip
from clip_train.settings import Progress, UserError, config_from_json, config_to_json
from diffusion.compiled import Compiled
from diffusion.decoder import noised, picture_cond
from diffusion.denoiser import Denoiser
from diffusion.distill import few_sampling
from diffusion.models import open_models
from diffusion.provenance import short
from diffusion.samplers import Denoise, OnStep, SampleNoise, sample
from diffusion.sampling import Sampling
from diffusion.steering import refuse_impossible, steered, target

if TYPE_CHECKING:
    from diffusion.copies import CopyCheck
    from diffusion.prior import Guess
    from diffusion.upsample import UpsamplerDenoiser

# Streams of a seed (SampleNoise) beside the decoder's, 1; the prior's are 0, 2, 4, ..., the upsampler's 3 and 5.
IMAGE_NOISE, CANDIDATES = 1 << 20, 1 << 21


@dataclass(frozen=True)
class Generated:
    """A picture and how it was made."""

    picture: Image.Image
    provenance: dict[str, Any]


class Generator:
    """The trained models together. Open one with Generator.open(...), or hand it models that are in memory.

    clip and prior are needed for captions only, guide (a weaker decoder) for autoguidance; upsampler makes every
    picture larger; copies looks for each one's nearest training picture. fingerprints: of all these by name, as their
    manifests have them.
    """

    def __init__(
        self,
        clip: Clip | None,
        prior: "Guess | None",
        decoder: Denoiser,
        *,
        guide: Denoiser | None = None,
        upsampler: "UpsamplerDenoiser | None" = None,
        copies: "CopyCheck | None" = None,
        device: torch.device | str = "cpu",
        fingerprints: dict[str, str] | None = None,
        compile: bool = False,
    ):
        self.clip, self.prior, self.decoder, self.guide = clip, prior, decoder, guide
        self.upsampler, self.copies = upsampler, copies
        self.device, self.fingerprints = torch.device(device), fingerprints or {}
        self.network = Compiled(decoder) if compile else decoder
        self.recall: Callable[[dict[str, Any]], Generated | None] | None = None  # a picture drawn before, by its record

    @classmethod
    def open(
        cls,
        decoder: Path | str,
        prior: Path | str | None = None,
        clip: Path | str | None = None,
        *,
        guide: Path | str | None = None,
        upsampler: Path | str | None = None,
        embeddings: Path | str | None = None,
        copies: Path | str | None = None,
        device: torch.device | str = "cpu",
        compile: bool = False,
    ) -> "Generator":
        """Load the folders. clip: by default the one the decoder was trained with, where it was then, if needed.

        prior: a folder, or the name of a baseline (baselines.py), most of which are fitted to the folder `embeddings`.
        guide: the folder of a weaker decoder, for autoguidance. copies: the embeddings folder of the training pictures,
        to look for the nearest of them. compile: let torch.compile translate the decoder at its
        first batch, which takes a minute and pays for many pictures. UserError if they do not belong together.
        """
        models = open_models(
            decoder, prior, clip, guide=guide, upsampler=upsampler, embeddings=embeddings, copies=copies, device=device
        )
        return cls(**vars(models), device=device, compile=compile)

    @property
    def how(self) -> Sampling:
        """How it draws where it is not told: a decoder distilled to few steps takes these, and needs no guidance."""
        steps = getattr(self.decoder.network.config, "few_steps", 0)
        return few_sampling(steps) if steps else Sampling()

    def from_captions(
        self,
        captions: Sequence[str],
        seeds: Sequence[int] | None = None,
        how: Sampling | None = None,
        *,
        batch_size: int = 16,
        on_progress: Progress | None = None,
        on_step: OnStep = None,
    ) -> list[Generated]:
        """One picture per caption: text -> CLIP -> prior -> decoder. seeds: 0, 1, 2, ... by default.

        on_step(step, denoised): the decoder's guess of the pictures, (B, 3, S, S) in [-1, 1], after each step of each
        candidate.
        """
        how, captions = how or self.how, list(captions)
        seeds = _seeds(seeds, len(captions))
        rows = self.image_embeddings(captions, seeds, how)
        records = [{"caption": caption} for caption in captions]
        return list(self._drawn(rows, captions, records, seeds, how, batch_size, on_progress, on_step))

    def from_embeddings(
        self,
        rows: np.ndarray | Tensor,
        seeds: Sequence[int] | None = None,
        how: Sampling | None = None,
        *,
        captions: Sequence[str] | None = None,
        tasks: Sequence[dict[str, Any]] | None = None,
        batch_size: int = 16,
        on_progress: Progress | None = None,
        on_step: OnStep = None,
    ) -> list[Generated]:
        """One picture per CLIP image embedding, (N, D); they need not be unit rows. on_step: see from_captions.

        captions: what a decoder with text tokens reads beside each embedding. tasks: what the records say was done.
        """
        how, rows = how or self.how, self.rows(rows)
        records = [{"embedding": base64.b64encode(row.numpy().astype("<f4").tobytes()).decode()} for row in rows]
        for name, given in (("caption", captions), ("task", tasks)):
            if given is not None:
                if len(given) != len(rows):
                    raise UserError(f"{len(rows)} embeddings but {len(given)} {name}s; give one each")
                records = [record | {name: one} for record, one in zip(records, given, strict=True)]
        seeds = _seeds(seeds, len(rows))
        known = self.recalled(records, seeds, how)
        if known is not None:
            return known
        return list(self._drawn(rows, captions, records, seeds, how, batch_size, on_progress, on_step))

    def recalled(
        self, records: Sequence[dict[str, Any]], seeds: Sequence[int], how: Sampling | None = None
    ) -> list[Generated] | None:
        """The pictures with these records if `recall` knows every one of them: then there is nothing to draw."""
        if self.recall is None:
            return None
        sampling = config_to_json(self._checked(how))
        found = [
            self.recall(record | {"seed": int(seed), "sampling": sampling})
            for record, seed in zip(records, seeds, strict=True)
        ]
        return None if any(one is None for one in found) else found

    def rows(self, rows: np.ndarray | Tensor) -> Tensor:
        """Embeddings (N, D) of any length as unit rows on the CPU; UserError if the decoder cannot take them."""
        rows = rows.cpu().float() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows, np.float32))
        wide = self.decoder.network.config.embed_dim
        if rows.ndim != 2 or rows.shape[1] != wide:
            raise UserError(f"embeddings must be (N, {wide}) for this decoder, not {tuple(rows.shape)}")
        if not rows.isfinite().all() or not rows.any(dim=1).all():
            raise UserError("embeddings must be finite and not all zero")
        return F.normalize(rows, dim=-1)

    @torch.no_grad()
    def image_embeddings(
        self, captions: Sequence[str], seeds: Sequence[int] | None = None, how: Sampling | None = None
    ) -> Tensor:
        """What the prior makes of captions: unit rows (N, D) on the CPU."""
        if self.clip is None or self.prior is None:
            raise UserError("captions need a CLIP and a prior; pass --prior")
        how = how or self.how
        seeds, out = _seeds(seeds, len(captions)), []
        for start in range(0, len(captions), 256):
            some = list(captions[start : start + 256])
            text = self.clip.encode_text(some).to(self.device)
            with autocast(how.precision, self.device):
                rows = self.prior.rows(
                    text,
                    some,
                    seeds[start : start + 256],
                    steps=how.prior_steps,
                    guidance=how.prior_guidance,
                    candidates=how.prior_candidates,
                )
            out.append(rows.float().cpu())
            if not torch.isfinite(out[-1]).all():
                raise UserError("the prior makes embeddings that are not finite; train it again: unclip train prior")
        return torch.cat(out) if out else torch.zeros(0, self.prior.embed_dim)

    @torch.no_grad()
    def denoise(self, rows: Tensor, captions: Sequence[str] | None = None, how: Sampling | None = None) -> Denoise:
        """denoise(x, sigma) for unit rows (B, D): the decoder told what to draw, guided and clamped as `how` says.

        captions: for a decoder with text tokens. What does not depend on x is computed once, here. With image_noise the
        rows are to be noised already.
        """
        how = self._checked(how, captions)
        with autocast(how.precision, self.device):
            guided = steered(self, rows.to(self.device), captions, how)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            with torch.no_grad(), autocast(how.precision, self.device):
                return guided(x, sigma)

        return denoise

    @torch.no_grad()
    def guess(self, rows: Tensor, how: Sampling | None = None) -> Tensor:
        """The decoder's linear guess at the pictures of unit rows (B, D), noised already: (B, 3, S, S) float32."""
        rows, how = rows.to(self.device), how or self.how
        noise = rows.new_full((len(rows),), how.image_noise)
        return self.decoder.network.guess(picture_cond(rows, image_noise=noise)).float()

    @torch.no_grad()
    def walk(
        self,
        rows: Tensor,
        captions: Sequence[str] | None,
        seeds: Sequence[int],
        how: Sampling | None = None,
        *,
        start: Tensor | None = None,
        sigma: float | None = None,
        around: Callable[[Denoise], Denoise] | None = None,
        on_step: OnStep = None,
    ) -> Tensor:
        """Pictures x0 (B, 3, S, S) for unit rows (B, D), as one batch.

        start: noisy pictures at noise level `sigma`, where the walk then begins, instead of noise at sigma_max. That
        lies around the decoder's linear guess: around nothing, all pictures would come out greyer.
        around: puts something around the guided denoise, as inpainting does. on_step: called in each candidate's walk.
        """
        how = self._checked(how, captions, sigma)
        seeds = _seeds(seeds, len(rows))
        told = rows
        if how.image_noise:
            noise = SampleNoise(seeds, rows.shape[1:], rows.device, stream=IMAGE_NOISE)()
            told = noised(rows, rows.new_full((len(rows),), how.image_noise), noise)
        denoise = self.denoise(told, captions, how)
        denoise = around(denoise) if around else denoise
        sigmas, guess = how.sigmas(sigma), self.guess(told, how) if start is None else None

        def drawn(stream: int) -> Tensor:
            noise = SampleNoise(seeds, (3, self.size, self.size), self.device, stream=stream)
            begin = guess + float(sigmas[0]) * noise() if start is None else start.to(self.device)
            return sample(how.sampler, denoise, sigmas, noise, eta=how.eta, start=begin, on_step=on_step)

        best = drawn(1)
        if how.candidates == 1 or start is not None:  # from one start come pictures that are all alike
            return best
        wanted = target(self.clip, rows.to(self.device), captions).cpu()
        nearness = (self.seen(_pictures(best)) * wanted).sum(1)
        for number in range(1, how.candidates):
            x0 = drawn(CANDIDATES + number)
            its = (self.seen(_pictures(x0)) * wanted).sum(1)
            better = its > nearness
            nearness = torch.where(better, its, nearness)
            best = torch.where(better.to(self.device)[:, None, None, None], x0, best)
        return best

    @torch.no_grad()
    def finished(
        self,
        x0: Tensor,
        records: Sequence[dict[str, Any]],
        seeds: Sequence[int],
        how: Sampling | None = None,
        *,
        rows: Tensor | None = None,
    ) -> list[Generated]:
        """Pictures x0 (B, 3, S, S) in [-1, 1] upsampled, if there is an upsampler, and with their records complete.

        records: what each was made from: a "caption", or an "embedding" (base64 of D little-endian float32), or both.
        rows (B, D): the embeddings, for the upsampler; by default they are found out from the records again.
        """
        how = self._checked(how)
        if self.upsampler is not None:
            from diffusion.upsample import enlarge

            rows = self._rows_of(records, seeds, how) if rows is None else rows
            with autocast(how.precision, self.device):
                x0 = enlarge(
                    self.upsampler, x0.to(self.device), rows.to(self.device), list(seeds), steps=how.upsample_steps,
                    guidance=how.upsample_guidance, noise_level=how.upsample_noise,
                )  # fmt: skip
        if not torch.isfinite(x0).all():
            raise UserError("the decoder draws numbers that are not finite; train it again, or give it less guidance")
        pictures = _pictures(x0)
        found = [{} for _ in pictures]
        if self.copies is not None:
            found = [{"nearest": near.to_json()} for near in self.copies.check(self.seen(pictures).numpy())]
        return [
            Generated(
                picture,
                {
                    **record,
                    "seed": int(seed),
                    "sampling": config_to_json(how),
                    "size": list(picture.size),
                    "fingerprints": self._used(record, how),
                    "version": metadata.version("unclip"),
                    **copied,
                },
            )
            for picture, record, seed, copied in zip(pictures, records, seeds, found, strict=True)
        ]

    def regenerate(self, provenance: dict[str, Any]) -> Generated:
        """The same picture again, from its record. UserError if other weights made it, or it took another picture."""
        made_with = provenance.get("fingerprints")
        if not isinstance(made_with, dict) or not isinstance(provenance.get("caption", ""), str):
            raise UserError("the picture's record is damaged: it names no models")
        for name, fingerprint in made_with.items():
            if self.fingerprints.get(name) != fingerprint:
                raise UserError(
                    f"the picture was made with {name} {short(str(fingerprint))}, but this one is "
                    f"{short(self.fingerprints.get(name, 'none'))}; pass the folder it was made with"
                )
        generator = self
        if self.upsampler is not None and "upsampler" not in made_with:
            generator = copy.copy(self)
            generator.upsampler = None
        try:
            how = config_from_json(Sampling, provenance["sampling"], "the picture's record")
            seeds = [provenance["seed"]]
            if "embedding" not in provenance:
                return generator.from_captions([provenance["caption"]], seeds, how)[0]
            row = np.frombuffer(base64.b64decode(provenance["embedding"]), "<f4")
            more = {name + "s": [provenance[name]] for name in ("caption", "task") if name in provenance}
            return generator.from_embeddings(row[None], seeds, how, **more)[0]
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"the picture's record is damaged: {error!r}") from error

    @property
    def size(self) -> int:
        """Side of the decoder's pictures in pixels, before an upsampler."""
        return self.decoder.network.config.image_size

    def seen(self, pictures: Sequence[Image.Image]) -> Tensor:
        """What CLIP sees in finished pictures, through the transform that pictures from files go through: (B, D)."""
        if self.clip is None:
            raise UserError("to look at its pictures the generator needs the decoder's CLIP; say where: --clip")
        return self.clip.encode_image(torch.stack([self.clip.to_pixels(picture) for picture in pictures]))

    def _drawn(
        self,
        rows: Tensor,
        captions: Sequence[str] | None,
        records: list[dict],
        seeds: Sequence[int],
        how: Sampling,
        batch_size: int,
        on_progress: Progress | None,
        on_step: OnStep,
    ) -> Iterator[Generated]:
        for start in range(0, len(rows), batch_size):
            some = slice(start, start + batch_size)
            x0 = self.walk(rows[some], captions and captions[some], seeds[some], how, on_step=on_step)
            yield from self.finished(x0, records[some], seeds[some], how, rows=rows[some])
            if on_progress:
                on_progress(min(start + batch_size, len(rows)), len(rows))

    def _checked(
        self, how: Sampling | None, captions: Sequence[str] | None = (), begin: float | None = None
    ) -> Sampling:
        """how, or the default, its precision decided on; UserError if it asks for what is not there."""
        how = how or self.how
        refuse_impossible(self, how, captions, begin)
        return replace(how, precision=resolved_precision(how.precision, self.device))

    def _rows_of(self, records: Sequence[dict[str, Any]], seeds: Sequence[int], how: Sampling) -> Tensor:
        """The embeddings that records speak of, (B, D)."""
        rows = []
        for record, seed in zip(records, seeds, strict=True):
            inside = record.get("embedding", record.get("task", {}).get("embedding"))
            if inside is None:
                rows.append(self.image_embeddings([record["caption"]], [seed], how)[0])
            else:
                rows.append(torch.from_numpy(np.frombuffer(base64.b64decode(inside), "<f4").copy()))
        return torch.stack(rows)

    def _used(self, record: dict[str, Any], how: Sampling) -> dict[str, str]:
        """Fingerprints of the models that had a part in a picture."""
        drawn = "caption" in record and "embedding" not in record
        parts = {
            "decoder": True,
            "prior": drawn or how.negative,
            "clip": "caption" in record or how.negative or how.clip_guidance or how.candidates > 1,
            "guide": how.autoguidance != 1,
            "upsampler": self.upsampler is not None,
        }
        return {name: self.fingerprints[name] for name, used in parts.items() if used and name in self.fingerprints}


def to_pixels(x0: Tensor) -> np.ndarray:
    """Pictures (B, 3, S, S) in [-1, 1] as (B, S, S, 3) uint8."""
    return ((x0.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def read_captions(path: Path | str) -> list[str]:
    """The lines of a text file that are not empty. UserError if there are none."""
    try:
        captions = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as captions: {getattr(error, 'strerror', None) or error}") from error
    if not captions:
        raise UserError(f"{path} holds no captions; write one on each line")
    return captions


def _pictures(x0: Tensor) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in to_pixels(x0)]


def _seeds(seeds: Sequence[int] | None, count: int) -> list[int]:
    seeds = list(range(count)) if seeds is None else [int(seed) for seed in seeds]
    if len(seeds) != count:
        raise UserError(f"{count} pictures but {len(seeds)} seeds; give one each")
    if any(seed < 0 for seed in seeds):
        raise UserError(f"seeds are non-negative integers, not {min(seeds)}")
    return seeds
