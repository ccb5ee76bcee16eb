"""The prior: a text embedding -> an image embedding that such a text could have.

CLIP's text and image embeddings live in one space but apart in it, and a text has many pictures; so unCLIP puts a
diffusion model between them (Ramesh et al. 2022, arXiv 2204.06125, section 2.2): a causal transformer over

    [words of the caption, text embedding, linear guess | noise level, noisy image embedding, query]

whose last token says the clean embedding. Each token looks at itself and at those before it, so what stands before the
bar knows nothing of the noise: it is read once, and sampling walks on with the last three tokens alone.

The diffusion runs on what a ridge regression leaves over (ridge.py). Rows are unit length outside; inside times
sqrt(D).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_train.captions import check_mix
from clip_train.settings import UserError
from diffusion.denoiser import Cond, Denoiser, Scaling, refuse_absurd, refuse_unknown
from diffusion.guidance import classifier_free
from diffusion.layers import NoiseLevelEmbedding, silent
from diffusion.ridge import LinearGuess
from diffusion.samplers import SampleNoise, sample
from diffusion.schedule import karras_sigmas
from diffusion.words import NO_WORD, bpe_ids


class Guess(Protocol):
    """Whatever makes image embeddings of texts: a diffusion prior, a contrastive one, or a baseline (baselines.py)."""

    name: str
    embed_dim: int  # D; 0: any

    def rows(
        self,
        text: Tensor,
        captions: Sequence[str] | None,
        seeds: Sequence[int],
        *,
        steps: int = 16,
        guidance: float = 1.0,
        candidates: int = 2,
    ) -> Tensor:
        """Unit rows (N, D) for text embeddings (unit rows (N, D)) and their captions, if known; row i by seeds[i]."""


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Everything that decides what the prior is and on what noise it trains. Saved beside the weights."""

    kind: str = "diffusion"
    embed_dim: int = 0  # width of the CLIP embedding; 0: what the embeddings say
    width: int = 256  # of the transformer
    depth: int = 4  # blocks
    heads: int = 4
    dropout: float = 0.1  # in the transformer
    words: int = 0  # byte-pair ids of the caption that are read beside its embedding; 0: the embedding alone
    vocabulary: int = 0  # how many different ids the training captions hold; counted by train_prior
    drop_word: float = 0.1  # share of words that are shown as unknown
    drop_words: float = 0.2  # share of pairs that lose all their words, so that an embedding alone works as well
    drop_text: float = 0.1  # share of pairs that lose text embedding and words, so that guidance works
    text_noise: float = 0.0  # how far texts are moved in training, see pairs.blurred
    caption_mix: tuple[float, ...] = ()  # weights of a picture's 1st, 2nd, ... caption, see captions.pick_caption
    draws: int = 1  # noise levels at which each pair of a batch is seen; the words are read once for all
    predict: str = "x0"  # what the network puts out: x0 (as in unCLIP), edm, v, eps, flow
    weighting: str = "even"  # of the loss over noise levels (denoiser.WEIGHTINGS)
    density: str = "cosine"  # of sigma in training (schedule.DENSITIES)
    sigma_mean: float = 0.0  # of ln sigma, for log_normal
    sigma_std: float = 1.5
    sigma_data: float = 1.0  # std of a coordinate of what the linear guess leaves over; measured by train_prior
    sigma_min: float = 0.02  # where sampling ends
    sigma_max: float = 30.0  # where it starts: far above the longest axis of the embeddings

    def __post_init__(self) -> None:
        refuse_unknown("prior", self.predict, self.density, self.weighting)
        refuse_absurd("prior", self)
        check_mix(self.caption_mix)
        if min(self.width, self.depth, self.heads, self.draws) < 1:
            raise UserError(
                f"prior: width {self.width}, depth {self.depth}, heads {self.heads} and draws {self.draws} must be at "
                f"least 1"
            )
        if self.width % self.heads:
            raise UserError(f"prior: width {self.width} is not a multiple of heads {self.heads}")
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(f"prior: sigma_min {self.sigma_min} must be above 0 and below sigma_max {self.sigma_max}")
        if self.words < 0 or self.text_noise < 0:
            raise UserError(f"prior: words {self.words} and text_noise {self.text_noise} must be at least 0")
        for name in ("dropout", "drop_word", "drop_words", "drop_text"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"prior: {name} {getattr(self, name)} must be in [0, 1]")


class Prior(nn.Module):
    """The network; see the top of the file. Wrap it in PriorDenoiser to get denoised embeddings."""

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.config = config
        wide, width = config.embed_dim, config.width
        self.linear = LinearGuess(wide, wide)
        self.null_text = nn.Parameter(torch.zeros(wide))
        self.read = nn.ModuleDict({name: nn.Linear(wide, width) for name in ("text", "guess", "noisy")})
        self.words = WordTable(config.vocabulary, width) if config.words else None
        self.noise_level = NoiseLevelEmbedding(width)
        self.query = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(config.words + 5, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, config.heads, config.dropout) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.say = silent(nn.Linear(width, wide))

    def guess(self, cond: Cond) -> Tensor:
        """The ridge regression's image embedding for a text, or the mean one without a text; (B, D), times sqrt(D)."""
        return self.linear(cond["text"], cond["drop"]) * self.config.embed_dim**0.5

    def past(self, cond: Cond) -> Cond:
        """What the tokens before the noise leave behind: "past" (B, depth, 2, heads, P, C) keys and values, and
        "past_keep" (B, P) bool, False where a caption has no word.

        cond: text (B, D) unit rows; drop (B,) bool; words (B, W) byte-pair ids, NO_WORD after a caption's end.
        """
        scale = self.config.embed_dim**0.5
        text = torch.where(cond["drop"][:, None], self.null_text, (cond["text"] - self.linear.input_mean) * scale)
        guess = self.guess(cond) - self.linear.output_mean * scale
        h = torch.stack([self.read["text"](text).float(), self.read["guess"](guess).float()], dim=1)
        h, keep = h + self.positional_embedding[-5:-3], cond["drop"].new_ones(h.shape[:2])
        if self.words is not None:
            words = cond.get("words")
            if words is None or not words.shape[1]:
                words = cond["text"].new_full((len(h), 1), NO_WORD, dtype=torch.int64)
            read = self.words(words).float() + self.positional_embedding[: words.shape[1]]
            h = torch.cat([read, h], dim=1)
            keep = torch.cat([(words != NO_WORD) & ~cond["drop"][:, None], keep], dim=1)
        kept = []
        for number, block in enumerate(self.blocks):
            h, past = block(h, keep=keep, speaks=number + 1 < len(self.blocks))
            kept.append(past)
        return {"past": torch.stack(kept, dim=1), "past_keep": keep}

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x: (n B, D) of unit size, n for each of B conditions; noise_level (n B,). Returns raw (n B, D).

        cond: as past() takes it, or with what past() returned in it, which saves reading it again.
        """
        known = cond if "past" in cond else self.past(cond)
        past, keep, each = known["past"], known["past_keep"], len(x) // len(known["past"])
        if each > 1:
            past, keep = past.repeat_interleave(each, 0), keep.repeat_interleave(each, 0)
        tokens = [self.noise_level(noise_level), self.read["noisy"](x), self.query.expand(len(x), -1)]
        h = torch.stack([token.float() for token in tokens], dim=1) + self.positional_embedding[-3:]
        keep = torch.cat([keep, keep.new_ones(h.shape[:2])], dim=1)
        for number, block in enumerate(self.blocks):
            h, _ = block(h, past[:, number], keep)
        return self.say(self.norm(h[:, -1]))


class WordTable(nn.Module):
    """Byte-pair ids (B, W) -> (B, W, width), through the ids that training met; all others are one unknown word."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.register_buffer("known", torch.zeros(vocabulary, dtype=torch.int64))  # rising
        self.table = nn.Embedding(vocabulary + 1, width)  # the unknown word last
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, words: Tensor) -> Tensor:
        place = torch.searchsorted(self.known, words).clamp(max=max(0, len(self.known) - 1))
        met = self.known[place] == words if len(self.known) else torch.zeros_like(words, dtype=torch.bool)
        return self.table(place.where(met, len(self.known)))


UNKNOWN = 2**31 - 1  # an id that no vocabulary has: how training hides a word


class TransformerBlock(nn.Module):
    """Causal attention, then an MLP; each normalised before, dropped out and added after (pre-norm)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm_look, self.look = nn.LayerNorm(width), CausalAttention(width, heads)
        self.norm_think = nn.LayerNorm(width)
        self.think = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), silent(nn.Linear(4 * width, width)))
        self.drop = nn.Dropout(dropout)

    def forward(
        self, h: Tensor, past: Tensor | None = None, keep: Tensor | None = None, speaks: bool = True
    ) -> tuple[Tensor, Tensor]:
        """See CausalAttention. speaks: False only makes keys and values, and returns h as it was."""
        seen = self.norm_look(h)
        if not speaks:
            return h, self.look.keys(seen)
        added, own = self.look(seen, past, keep)
        h = h + self.drop(added)
        return h + self.drop(self.think(self.norm_think(h))), own


class CausalAttention(nn.Module):
    """Each token looks at itself and at those before it; starts by adding nothing."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), silent(nn.Linear(width, width))

    def forward(self, h: Tensor, past: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """h: (B, N, width) tokens that follow those of past (B, 2, heads, P, C), their keys and values.

        keep: (B, P + N) bool, False where a token is not to be looked at. Returns what is to be added (B, N, width),
        and h's own keys and values (B, 2, heads, N, C).
        """
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        own = torch.stack([k, v], dim=1)
        if past is not None:
            k, v = (torch.cat([old.to(new.dtype), new], dim=2) for old, new in zip(past.unbind(1), (k, v), strict=True))
        mask = causal(h.shape[1], k.shape[2], h.device)
        if keep is not None:  # each token sees itself, so that no row of the softmax is empty
            itself = torch.eye(k.shape[2], dtype=torch.bool, device=h.device)[-h.shape[1] :]
            mask = ((mask & keep[:, None, :]) | itself)[:, None]
        return self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2)), own

    def keys(self, h: Tensor) -> Tensor:
        """The second of what forward() returns, alone."""
        return self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)[1:].transpose(0, 1)


def causal(tokens: int, total: int, device: torch.device | str = "cpu") -> Tensor:
    """(tokens, total) bool: the last `tokens` of `total` tokens, and which of all each may look at."""
    return torch.ones(tokens, total, dtype=torch.bool, device=device).tril(total - tokens)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention. q (B, H, Q, C); k, v (B, H, K, C); mask (Q, K) or (B, 1, Q, K) bool, False = not looked at.

    On CPU as plain matrix products, which bf16 has a fast path for there.
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


class PriorDenoiser(Denoiser):
    """A Prior as a denoiser of image embeddings times sqrt(D), which it sees relative to its linear guess."""

    name = "prior"

    def __init__(self, config: PriorConfig):
        super().__init__(Prior(config), Scaling(config.predict, config.sigma_data))
        self.config = config

    @property
    def embed_dim(self) -> int:
        return self.config.embed_dim

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """x (n B, D), sigma (n B,): n noisy embeddings for each of B conditions, one condition's next to each other."""
        guess = (cond["guess"] if "guess" in cond else self.network.guess(cond)).float()
        guess = guess.repeat_interleave(len(x) // len(guess), 0)
        return guess + super().forward(x - guess, sigma, cond)

    def prepared(self, cond: Cond) -> Cond:
        """The condition with all that does not depend on the noise worked out: its tokens are read once, not at each
        step of sampling."""
        return {"guess": self.network.guess(cond), **self.network.past(cond)}

    def rows(
        self,
        text: Tensor,
        captions: Sequence[str] | None,
        seeds: Sequence[int],
        *,
        steps: int = 16,
        guidance: float = 1.0,
        candidates: int = 2,
        temperature: float = 1.0,
    ) -> Tensor:
        """See Guess. steps: 1 for the mean of all embeddings that fit; see sample_prior."""
        how = {"steps": steps, "guidance": guidance, "candidates": candidates, "temperature": temperature}
        return sample_prior(self, text, seeds, captions=captions, **how)


def text_cond(text: Tensor, words: Tensor | None = None) -> Cond:
    """The prior's condition from unit rows (B, D) and byte-pair ids (B, W), if any."""
    cond = {"text": text, "drop": torch.zeros(len(text), dtype=torch.bool, device=text.device)}
    return cond if words is None else cond | {"words": words}


def null_cond(cond: Cond) -> Cond:
    """The same batch without its texts."""
    return cond | {"drop": torch.ones_like(cond["drop"])}


@torch.no_grad()
def sample_prior(
    prior: PriorDenoiser,
    text: Tensor,
    seeds: Sequence[int],
    *,
    captions: Sequence[str] | None = None,
    steps: int = 16,
    guidance: float = 1.0,
    sampler: str = "dpmpp_2m",
    eta: float = 0.0,
    candidates: int = 1,
    temperature: float = 1.0,
) -> Tensor:
    """Image embeddings for text embeddings: unit rows (B, D) -> unit rows (B, D), row i from seeds[i] alone.

    captions: the texts themselves, for a prior that reads words. candidates: how many are drawn for each text; the one
    nearest to it is kept (unCLIP, section 2.2, takes 2). temperature: factor on the starting noise, and so, nearly, on
    how far a sample lies from the mean; 0 gives something like the mean.
    steps: 1 gives the mean of all image embeddings that fit the text, the best single guess by cosine; more give one
    of them, as the decoder knows them from its training, though farther from any particular picture's: where the mean
    has cosine c to the truth, expect c^2.
    """
    if len(seeds) != len(text):
        raise ValueError(f"{len(text)} texts but {len(seeds)} seeds")
    config, device = prior.config, text.device
    if not len(text):
        return text.clone()
    words = None
    if config.words and captions is not None:
        words = torch.from_numpy(bpe_ids(captions, config.words)).to(device)
    cond = text_cond(text, words)
    follow = prior.prepared(cond)
    denoise = classifier_free(prior, follow, follow if guidance == 1 else prior.prepared(null_cond(cond)), guidance)
    candidates = 1 if steps == 1 else candidates  # a single step forgets its noise: all would be alike
    sigmas = karras_sigmas(steps, config.sigma_min, config.sigma_max)
    each = [SampleNoise(seeds, (config.embed_dim,), device, stream=2 * n) for n in range(candidates)]  # odd: decoder's

    def noise() -> Tensor:
        return torch.stack([one() for one in each], dim=1).flatten(0, 1) * temperature

    rows = F.normalize(sample(sampler, denoise, sigmas, noise, eta=eta), dim=-1)
    rows = rows.unflatten(0, (len(text), candidates))
    best = (rows @ text[:, :, None]).squeeze(-1).argmax(1)
    return rows[torch.arange(len(rows), device=device), best]
