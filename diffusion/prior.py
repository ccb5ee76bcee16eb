"""The prior: a text embedding -> an image embedding that such a text could have.

CLIP's text and image embeddings live in one space but apart in it, and a text has many pictures; so unCLIP puts a
diffusion model between them (Ramesh et al. 2022, arXiv 2204.06125, section 2.2): a transformer over
[text embedding, linear guess, noise level, noisy image embedding, query] whose last token says the clean embedding.

Here the diffusion runs on what a ridge regression leaves over (ridge.py). Rows are unit length outside; inside times
sqrt(D).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_train.captions import check_mix
from clip_train.settings import UserError
from diffusion.denoiser import Cond, Denoiser, Scaling, refuse_unknown
from diffusion.guidance import classifier_free
from diffusion.layers import Attention, NoiseLevelEmbedding, silent
from diffusion.ridge import LinearGuess
from diffusion.samplers import SampleNoise, sample
from diffusion.schedule import karras_sigmas


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Everything that decides what the prior is and on what noise it trains. Saved beside the weights."""

    embed_dim: int = 0  # width of the CLIP embedding; 0: what the embeddings say
    width: int = 256  # of the transformer
    depth: int = 4  # blocks
    heads: int = 4
    dropout: float = 0.1  # in the transformer
    drop_text: float = 0.1  # share of pairs that lose their text, so that guidance works
    caption_mix: tuple[float, ...] = ()  # weights of a picture's 1st, 2nd, ... caption, see captions.pick_caption
    predict: str = "x0"  # what the network puts out: x0 (as in unCLIP), edm, v, eps
    density: str = "cosine"  # of sigma in training (schedule.DENSITIES)
    sigma_mean: float = 0.0  # of ln sigma, for log_normal
    sigma_std: float = 1.5
    sigma_data: float = 1.0  # std of a coordinate of what the linear guess leaves over; measured by train_prior
    sigma_min: float = 0.02  # where sampling ends
    sigma_max: float = 30.0  # where it starts: far above the longest axis of the embeddings

    def __post_init__(self) -> None:
        refuse_unknown("prior", self.predict, self.density)
        check_mix(self.caption_mix)
        if min(self.width, self.depth, self.heads) < 1:
            raise UserError(f"prior: width {self.width}, depth {self.depth} and heads {self.heads} must be at least 1")
        if self.width % self.heads:
            raise UserError(f"prior: width {self.width} is not a multiple of heads {self.heads}")


class Prior(nn.Module):
    """The network; see the top of the file. Wrap it in PriorDenoiser to get denoised embeddings."""

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.config = config
        wide, width = config.embed_dim, config.width
        self.linear = LinearGuess(wide, wide)
        self.null_text = nn.Parameter(torch.zeros(wide))
        self.read = nn.ModuleDict({name: nn.Linear(wide, width) for name in ("text", "guess", "noisy")})
        self.noise_level = NoiseLevelEmbedding(width)
        self.query = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(5, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, config.heads, config.dropout) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.say = silent(nn.Linear(width, wide))

    def guess(self, cond: Cond) -> Tensor:
        """The ridge regression's image embedding for a text, or the mean one without a text; (B, D), times sqrt(D)."""
        return self.linear(cond["text"], cond["drop"]) * self.config.embed_dim**0.5

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x: (B, D) of unit size; noise_level (B,); cond: text (B, D) unit rows, drop (B,) bool. Returns raw (B, D)."""
        scale = self.config.embed_dim**0.5
        text = torch.where(cond["drop"][:, None], self.null_text, (cond["text"] - self.linear.input_mean) * scale)
        guess = self.guess(cond) - self.linear.output_mean * scale
        tokens = [
            self.read["text"](text),
            self.read["guess"](guess),
            self.noise_level(noise_level),
            self.read["noisy"](x),
            self.query.expand(len(x), -1),
        ]
        h = torch.stack([token.float() for token in tokens], dim=1) + self.positional_embedding
        for block in self.blocks:
            h = block(h)
        return self.say(self.norm(h[:, -1]))


class TransformerBlock(nn.Module):
    """Attention, then an MLP; each normalised before, dropped out and added after (pre-norm)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm_look, self.look = nn.LayerNorm(width), Attention(width, heads)
        self.norm_think = nn.LayerNorm(width)
        self.think = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), silent(nn.Linear(4 * width, width)))
        self.drop = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.drop(self.look(self.norm_look(h)))
        return h + self.drop(self.think(self.norm_think(h)))


class PriorDenoiser(Denoiser):
    """A Prior as a denoiser of image embeddings times sqrt(D), which it sees relative to its linear guess."""

    def __init__(self, config: PriorConfig):
        super().__init__(Prior(config), Scaling(config.predict, config.sigma_data))
        self.config = config

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        guess = self.network.guess(cond).float()
        return guess + super().forward(x - guess, sigma, cond)


def text_cond(text: Tensor) -> Cond:
    """The prior's condition from unit rows (B, D)."""
    return {"text": text, "drop": torch.zeros(len(text), dtype=torch.bool, device=text.device)}


def null_cond(cond: Cond) -> Cond:
    """The same batch without its texts."""
    return cond | {"drop": torch.ones_like(cond["drop"])}


@torch.no_grad()
def sample_prior(
    prior: PriorDenoiser,
    text: Tensor,
    seeds: Sequence[int],
    *,
    steps: int = 16,
    guidance: float = 1.0,
    sampler: str = "heun",
    eta: float = 0.0,
    candidates: int = 1,
) -> Tensor:
    """Image embeddings for text embeddings: unit rows (B, D) -> unit rows (B, D), row i from seeds[i] alone.

    candidates: how many are drawn for each text; the one nearest to it is kept (unCLIP, section 2.2, takes 2).
    steps: 1 gives the mean of all image embeddings that fit the text, the best single guess by cosine; more give one
    of them, as the decoder knows them from its training, though farther from any particular picture's: where the mean
    has cosine c to the truth, expect c^2.
    """
    if len(seeds) != len(text):
        raise ValueError(f"{len(text)} texts but {len(seeds)} seeds")
    config, device = prior.config, text.device
    cond = text_cond(text)
    denoise = classifier_free(prior, cond, null_cond(cond), guidance)
    sigmas = karras_sigmas(steps, config.sigma_min, config.sigma_max)
    drawn = []
    for number in range(candidates):
        noise = SampleNoise(seeds, (config.embed_dim,), device, stream=2 * number)  # the decoder's stream is odd
        drawn.append(F.normalize(sample(sampler, denoise, sigmas, noise, eta=eta), dim=-1))
    rows = torch.stack(drawn, dim=1)  # (B, candidates, D)
    best = (rows @ text[:, :, None]).squeeze(-1).argmax(1)
    return rows[torch.arange(len(rows), device=device), best]
