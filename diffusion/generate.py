"""Generator: captions or image embeddings -> pictures, each with a record of how it was made.

A picture is a function of its record: caption or embedding, seed, the sampling settings, and the weights named by their
fingerprints. The record travels in the PNG, so a picture can be made again from itself.
"""

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch import Tensor

from clip_train.fit import autocast, resolved_precision
from clip_train.model import Clip
from clip_train.settings import Progress, UserError, config_from_json, config_to_json
from diffusion import decoder as decoder_side
from diffusion.denoiser import Denoiser
from diffusion.guidance import clamped, classifier_free
from diffusion.prior import PriorDenoiser, sample_prior
from diffusion.samplers import SAMPLERS, OnStep, SampleNoise, sample
from diffusion.schedule import GRIDS
from diffusion.trained import load_decoder, load_prior

MAX_PIXELS = 64e6  # of a picture whose record is read
CHUNK = "unclip"  # name of the PNG text chunk that holds the record


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are drawn. Part of every picture's record."""

    steps: int = 18  # of the decoder
    sampler: str = "heun"  # heun, ddim, ddpm, euler
    eta: float = 0.0  # of ddim: 0 deterministic, 1 as random as ddpm
    guidance: float = 2.0  # of the decoder: 1 follows the embedding as trained, more overshoots
    guidance_from: float = 0.0  # sigmas between which guidance acts
    guidance_to: float = 1e9
    clamp: float = 0.995  # share of a guess's values that must fit into [-1, 1]; 1 only cuts off, 0 does neither
    prior_steps: int = 16  # 1: the mean of all embeddings that fit the text
    prior_candidates: int = 2  # embeddings drawn for each text, of which the nearest to it is taken
    prior_guidance: float = 1.0
    grid: str = "karras"  # of the decoder's noise levels: karras, cosine
    sigma_min: float = 0.01
    sigma_max: float = 20.0
    precision: str = "fp32"  # bf16, or auto, is about twice as fast; then a picture varies a little with the batch

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UserError(f"no sampler {self.sampler!r}: take {', '.join(SAMPLERS)}")
        if self.grid not in GRIDS:
            raise UserError(f"no grid {self.grid!r}: take {', '.join(GRIDS)}")
        if self.precision not in ("fp32", "bf16", "auto"):
            raise UserError(f"precision {self.precision!r} must be fp32, bf16 or auto")
        for name in ("steps", "prior_steps", "prior_candidates"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be at least 1")
        if self.guidance < 0 or self.prior_guidance < 0 or not 0 <= self.clamp <= 1 or not 0 <= self.eta <= 1:
            raise UserError(
                f"guidance {self.guidance} must be at least 0, eta {self.eta} and clamp {self.clamp} in [0, 1]"
            )
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(f"sigma_min {self.sigma_min} must be above 0 and below sigma_max {self.sigma_max}")


@dataclass(frozen=True)
class Generated:
    """A picture and how it was made."""

    picture: Image.Image
    provenance: dict[str, Any]


class Generator:
    """The trained models together. Open one with Generator.open(...), or hand it models that are in memory.

    clip and prior are needed for captions only. fingerprints: of clip, prior and decoder, as their manifests have them.
    """

    def __init__(
        self,
        clip: Clip | None,
        prior: PriorDenoiser | None,
        decoder: Denoiser,
        *,
        device: torch.device | str = "cpu",
        fingerprints: dict[str, str] | None = None,
    ):
        self.clip, self.prior, self.decoder = clip, prior, decoder
        self.device, self.fingerprints = torch.device(device), fingerprints or {}

    @classmethod
    def open(
        cls,
        decoder: Path | str,
        prior: Path | str | None = None,
        clip: Path | str | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> "Generator":
        """Load the folders. clip: by default the one the decoder was trained with, where it was then, if needed.

        UserError if prior, decoder and clip do not belong together.
        """
        decoder_model, made = load_decoder(decoder, device)
        fingerprints = {"decoder": made.fingerprint, "clip": made.inputs["clip"]["fingerprint"]}
        prior_model = None
        if prior is not None:
            prior_model, prior_made = load_prior(prior, device)
            fingerprints["prior"] = prior_made.fingerprint
            if prior_made.inputs["clip"]["fingerprint"] != fingerprints["clip"]:
                raise UserError(
                    f"{prior}/ and {decoder}/ were trained with different CLIPs "
                    f"({_short(prior_made.inputs['clip']['fingerprint'])} and {_short(fingerprints['clip'])}); "
                    f"train one of them again with the other's"
                )
        wanted = prior is not None or clip is not None or decoder_model.config.text
        folder = (clip or made.input_path("clip")) if wanted else None
        if folder is None and wanted:
            raise UserError(f"the CLIP that {decoder}/ was trained with is not where it was; say where: --clip")
        clip_model = Clip.load(folder, device) if folder else None
        if clip_model and clip_model.fingerprint != fingerprints["clip"]:
            raise UserError(
                f"{decoder}/ was trained with CLIP {_short(fingerprints['clip'])}, but {folder}/ is "
                f"{_short(clip_model.fingerprint)}; pass the former with --clip, or train again: unclip train decoder"
            )
        return cls(clip_model, prior_model, decoder_model, device=device, fingerprints=fingerprints)

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

        on_step(step, denoised): the decoder's guess of the pictures, (B, 3, S, S) in [-1, 1], after each step.
        """
        how = how or Sampling()
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
        batch_size: int = 16,
        on_progress: Progress | None = None,
        on_step: OnStep = None,
    ) -> list[Generated]:
        """One picture per CLIP image embedding, (N, D); they need not be unit rows. on_step: see from_captions."""
        how = how or Sampling()
        rows = rows.cpu().float() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows, np.float32))
        wide = self.decoder.network.config.embed_dim
        if rows.ndim != 2 or rows.shape[1] != wide:
            raise UserError(f"embeddings must be (N, {wide}) for this decoder, not {tuple(rows.shape)}")
        if not rows.isfinite().all() or not rows.any(dim=1).all():
            raise UserError("embeddings must be finite and not all zero")
        rows = F.normalize(rows, dim=-1)
        records = [{"embedding": base64.b64encode(row.numpy().astype("<f4").tobytes()).decode()} for row in rows]
        return list(self._drawn(rows, None, records, _seeds(seeds, len(rows)), how, batch_size, on_progress, on_step))

    @torch.no_grad()
    def image_embeddings(
        self, captions: Sequence[str], seeds: Sequence[int] | None = None, how: Sampling | None = None
    ) -> Tensor:
        """What the prior makes of captions: unit rows (N, D) on the CPU."""
        if self.clip is None or self.prior is None:
            raise UserError("captions need a CLIP and a prior; pass --prior")
        how = how or Sampling()
        seeds, out = _seeds(seeds, len(captions)), []
        for start in range(0, len(captions), 256):
            some = slice(start, start + 256)
            text = self.clip.encode_text(list(captions[some])).to(self.device)
            with autocast(how.precision, self.device):
                rows = sample_prior(
                    self.prior,
                    text,
                    seeds[some],
                    steps=how.prior_steps,
                    guidance=how.prior_guidance,
                    candidates=how.prior_candidates,
                )
            out.append(rows.cpu())
        return torch.cat(out) if out else torch.zeros(0, self.prior.config.embed_dim)

    def regenerate(self, provenance: dict[str, Any]) -> Generated:
        """The same picture again, from its record. UserError if other weights made it."""
        made_with = provenance.get("fingerprints")
        if not isinstance(made_with, dict) or not isinstance(provenance.get("caption", ""), str):
            raise UserError("the picture's record is damaged: it names no models")
        for name, fingerprint in made_with.items():
            if self.fingerprints.get(name) != fingerprint:
                raise UserError(
                    f"the picture was made with {name} {_short(fingerprint)}, but this one is "
                    f"{_short(self.fingerprints.get(name, 'none'))}; pass the folder it was made with"
                )
        try:
            how = config_from_json(Sampling, provenance["sampling"], "the picture's record")
            seeds = [provenance["seed"]]
            if "caption" in provenance:
                return self.from_captions([provenance["caption"]], seeds, how)[0]
            row = np.frombuffer(base64.b64decode(provenance["embedding"]), "<f4")
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"the picture's record is damaged: {error}") from error
        return self.from_embeddings(row[None], seeds, how)[0]

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
        how = replace(how, precision=resolved_precision(how.precision, self.device))
        for start in range(0, len(rows), batch_size):
            some = slice(start, start + batch_size)
            pixels = self._pixels(rows[some], captions[some] if captions else None, seeds[some], how, on_step)
            for picture, record, seed in zip(pixels, records[some], seeds[some], strict=True):
                known = {
                    name: self.fingerprints[name]
                    for name in ("clip", "prior", "decoder")
                    if name in self.fingerprints and (name == "decoder" or "caption" in record)
                }
                yield Generated(
                    Image.fromarray(picture),
                    {
                        **record,
                        "seed": int(seed),
                        "sampling": config_to_json(how),
                        "size": list(picture.shape[1::-1]),
                        "fingerprints": known,
                        "version": metadata.version("unclip"),
                    },
                )
            if on_progress:
                on_progress(min(start + batch_size, len(rows)), len(rows))

    @torch.no_grad()
    def _pixels(
        self, rows: Tensor, captions: Sequence[str] | None, seeds: Sequence[int], how: Sampling, on_step: OnStep
    ) -> np.ndarray:
        """(B, S, S, 3) uint8."""
        config = self.decoder.network.config
        text = self.clip.text_states(list(captions)) if captions and config.text and self.clip else ()
        cond = decoder_side.picture_cond(rows.to(self.device), *text)
        within = (how.guidance_from, how.guidance_to)
        denoise = classifier_free(self.decoder, cond, decoder_side.null_cond(cond), how.guidance, within)
        if how.clamp:
            denoise = clamped(denoise, quantile=how.clamp if how.clamp < 1 else None)
        noise = SampleNoise(seeds, (3, config.image_size, config.image_size), self.device, stream=1)
        sigmas = GRIDS[how.grid](how.steps, how.sigma_min, how.sigma_max)
        with autocast(how.precision, self.device):
            x0 = sample(how.sampler, denoise, sigmas, noise, eta=how.eta, on_step=on_step)
        return to_pixels(x0)


def to_pixels(x0: Tensor) -> np.ndarray:
    """Pictures (B, 3, S, S) in [-1, 1] as (B, S, S, 3) uint8."""
    return ((x0.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_png(picture: Image.Image, path: Path | str, provenance: dict[str, Any]) -> None:
    """Write a PNG with its record: as json under "unclip", and as the "parameters" line that picture viewers show."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(CHUNK, json.dumps(provenance, ensure_ascii=False))
    chunks.add_itxt("parameters", _parameters(provenance))
    try:
        picture.save(path, "PNG", pnginfo=chunks)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read_provenance(path: Path | str) -> dict[str, Any]:
    """The record inside a PNG. UserError if it is no PNG or has none."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels")
            picture.load()  # the text may stand after the pixels
            record = json.loads(picture.info[CHUNK])
    except KeyError as error:
        raise UserError(f"{path} does not say how it was made: it has no {CHUNK!r} text chunk") from error
    except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a PNG with a record: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: its {CHUNK!r} text chunk is not an object")
    return record


def read_captions(path: Path | str) -> list[str]:
    """The lines of a text file that are not empty. UserError if there are none."""
    try:
        captions = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as captions: {getattr(error, 'strerror', None) or error}") from error
    if not captions:
        raise UserError(f"{path} holds no captions; write one on each line")
    return captions


def _parameters(provenance: dict[str, Any]) -> str:
    """The record in the words that Stable Diffusion web UI made common: the prompt, then a line of settings."""
    how, size = provenance["sampling"], provenance["size"]
    settings = {
        "Steps": how["steps"],
        "Sampler": how["sampler"].capitalize(),
        "CFG scale": how["guidance"],
        "Seed": provenance["seed"],
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": _short(provenance["fingerprints"].get("decoder", "none")),
        "Version": f"unclip {provenance['version']}",
    }
    return f"{provenance.get('caption', '')}\n" + ", ".join(f"{name}: {value}" for name, value in settings.items())


def _seeds(seeds: Sequence[int] | None, count: int) -> list[int]:
    seeds = list(range(count)) if seeds is None else [int(seed) for seed in seeds]
    if len(seeds) != count:
        raise UserError(f"{count} pictures but {len(seeds)} seeds; give one each")
    if any(seed < 0 for seed in seeds):
        raise UserError(f"seeds are non-negative integers, not {min(seeds)}")
    return seeds


def _short(fingerprint: str) -> str:
    return fingerprint.removeprefix("sha256:")[:10]
