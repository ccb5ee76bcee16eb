"""Sampling: everything that decides how pictures are drawn, apart from the models, what is asked for and the seed."""

from dataclasses import dataclass

from torch import Tensor

from clip_train.settings import UserError
from diffusion.samplers import SAMPLERS
from diffusion.schedule import GRIDS

MOST = 100_000  # steps or candidates


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are drawn. Part of every picture's record."""

    steps: int = 16  # of the decoder
    sampler: str = "dpmpp_2m"  # samplers.SAMPLERS
    eta: float | None = None  # of ddim and dpmpp_2m_sde: 0 deterministic, 1 as random as ddpm; none: see own_eta
    guidance: float = 2.0  # of the decoder: 1 follows the embedding as trained, more overshoots
    guidance_from: float = 0.0  # sigmas between which guidance acts, of whatever kind
    guidance_to: float = 1e9
    rescale: float = 0.0  # share of the contrast that guidance adds which is taken off again: 0 to 1
    text_guidance: float | None = None  # of the text tokens beside the embedding; none: as guidance, both together
    negative: str = ""  # a caption to move away from, instead of from no caption
    autoguidance: float = 1.0  # away from a weaker decoder's mistakes (--guide): 1 not at all, 2 is much
    self_attention: float = 0.0  # away from what is blurred where the network looks: 0 off, 0.5 is much
    clip_guidance: float = 0.0  # towards a higher CLIP cosine, by so much a pixel and call: 0 off, 0.05 is small
    candidates: int = 1  # pictures drawn for each answer, of which CLIP takes the nearest to what was asked for
    image_noise: float = 0.0  # std of the noise added to the embedding; for decoders trained with noise_image
    clamp: float = 1.0  # 1 cuts guesses off at [-1, 1], 0 does not; between: first scaled until that share of them fits
    prior_steps: int = 16  # 1: the mean of all embeddings that fit the text
    prior_candidates: int = 2  # embeddings drawn for each text, of which the nearest to it is taken
    prior_guidance: float = 1.0
    upsample_steps: int = 12  # of the upsampler, where there is one
    upsample_guidance: float = 1.0
    upsample_noise: float = 0.05  # std of the noise added to a picture before, which hides its flaws; 0 trusts it
    grid: str = "karras"  # of the decoder's noise levels: schedule.GRIDS
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
        for name in ("steps", "prior_steps", "prior_candidates", "candidates", "upsample_steps"):
            if not 1 <= getattr(self, name) <= MOST:
                raise UserError(f"{name} {getattr(self, name)} must be at least 1 and at most {MOST}")
        for name in NOT_NEGATIVE:
            if not 0 <= (getattr(self, name) or 0.0) < float("inf"):
                raise UserError(f"{name} {getattr(self, name)} must be a number of at least 0")
        for name in ("clamp", "eta", "rescale"):
            if not 0 <= (getattr(self, name) or 0.0) <= 1:
                raise UserError(f"{name} {getattr(self, name)} must be between 0 and 1")
        if not 0 < self.sigma_min < self.sigma_max < float("inf"):
            raise UserError(f"sigma_min {self.sigma_min} must be above 0 and below sigma_max {self.sigma_max}")
        if not 0 <= self.guidance_from < self.guidance_to:
            raise UserError(f"guidance_from {self.guidance_from} must be below guidance_to {self.guidance_to}")

    @property
    def own_eta(self) -> float:
        """eta, or the sampler's own where it is not set: 1 for dpmpp_2m_sde, 0 for the rest."""
        return (SAMPLERS[self.sampler].eta or 0.0) if self.eta is None else self.eta

    @property
    def interval(self) -> tuple[float, float]:
        """The sigmas between which guidance acts."""
        return self.guidance_from, self.guidance_to if self.guidance_to < 1e9 else float("inf")

    def sigmas(self, begin: float | None = None) -> Tensor:
        """The grid (steps + 1,), from sigma_max down, or from `begin`: for what is not pure noise any more."""
        begin = self.sigma_max if begin is None else begin
        if not begin > self.sigma_min:
            raise UserError(f"a walk begins above sigma_min {self.sigma_min:g}, not at {begin:g}")
        return GRIDS[self.grid](self.steps, self.sigma_min, begin)


NOT_NEGATIVE = (
    "guidance", "text_guidance", "prior_guidance", "upsample_guidance", "autoguidance", "self_attention",
    "clip_guidance", "image_noise", "upsample_noise",
)  # fmt: skip
