"""The contrastive prior: one step from a text embedding to an image embedding, without diffusion.

A small network guesses the picture's embedding; it is trained to come near it and to be told apart by it from the
other pictures of the batch, as ECLIPSE trains its prior (Patel et al. 2023, arXiv 2312.04655;
there the second loss holds the guess against the batch's texts, here against its pictures, which is what a decoder
sees). It gives one guess per text, near the mean of what fits, at a thousandth of the cost of sampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_train.captions import check_mix
from clip_train.settings import UserError
from diffusion.denoiser import Cond, refuse_absurd
from diffusion.layers import silent
from diffusion.prior import WordTable, text_cond
from diffusion.ridge import LinearGuess
from diffusion.words import NO_WORD, bpe_ids


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Everything that decides what a contrastive prior is and how it trains. Saved beside the weights."""

    kind: str = "contrastive"
    embed_dim: int = 0  # width of the CLIP embedding; 0: what the embeddings say
    width: int = 512  # of the network
    depth: int = 3  # residual blocks
    dropout: float = 0.1
    words: int = 0  # byte-pair ids of the caption whose mean is read beside its embedding; 0: the embedding alone
    vocabulary: int = 0  # how many different ids the training captions hold; counted by train_prior
    drop_word: float = 0.1  # share of words that are shown as unknown
    drop_words: float = 0.2  # share of pairs that lose all their words, so that an embedding alone works as well
    text_noise: float = 0.0  # how far texts are moved in training, see pairs.blurred
    caption_mix: tuple[float, ...] = ()  # weights of a picture's 1st, 2nd, ... caption, see captions.pick_caption
    contrast: float = 0.2  # weight of the contrastive loss beside 1 - cosine (ECLIPSE's lambda)
    temperature: float = 0.05  # of the contrastive loss

    def __post_init__(self) -> None:
        refuse_absurd("prior", self)
        check_mix(self.caption_mix)
        if min(self.width, self.depth) < 1:
            raise UserError(f"prior: width {self.width} and depth {self.depth} must be at least 1")
        if not self.temperature > 0 or min(self.contrast, self.text_noise, self.words) < 0:
            raise UserError(
                f"prior: temperature {self.temperature} must be above 0, contrast {self.contrast}, text_noise "
                f"{self.text_noise} and words {self.words} at least 0"
            )
        for name in ("dropout", "drop_word", "drop_words"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"prior: {name} {getattr(self, name)} must be in [0, 1]")


class ContrastivePrior(nn.Module):
    """Text embedding (and words) -> image embedding: the linear guess plus what an MLP adds to it."""

    name = "contrastive"

    def __init__(self, config: ContrastiveConfig):
        super().__init__()
        self.config = config
        wide, width = config.embed_dim, config.width
        self.linear = LinearGuess(wide, wide)
        self.enter = nn.Linear(2 * wide, width)
        self.words = WordTable(config.vocabulary, width) if config.words else None
        self.blocks = nn.ModuleList(Block(width, config.dropout) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.leave = silent(nn.Linear(width, wide))

    @property
    def embed_dim(self) -> int:
        return self.config.embed_dim

    def forward(self, cond: Cond) -> Tensor:
        """cond as prior.text_cond makes it. Returns unit rows (B, D) float32."""
        scale = self.config.embed_dim**0.5
        guess = self.linear(cond["text"], cond["drop"])
        seen = [(cond["text"] - self.linear.input_mean) * scale, (guess - self.linear.output_mean) * scale]
        h = self.enter(torch.cat(seen, dim=1)).float()
        if self.words is not None and "words" in cond:
            keep = (cond["words"] != NO_WORD)[:, :, None]
            h = h + (self.words(cond["words"]) * keep).sum(1) / keep.sum(1).clamp(min=1) ** 0.5
        for block in self.blocks:
            h = h + block(h)
        return F.normalize(guess + self.leave(self.norm(h)).float() / scale, dim=-1)

    @torch.no_grad()
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
        """See prior.Guess. Nothing is drawn: seeds, steps, guidance and candidates do nothing."""
        words = None
        if self.config.words and captions is not None:
            words = torch.from_numpy(bpe_ids(captions, self.config.words)).to(text.device)
        return self(text_cond(text, words))


class Block(nn.Sequential):
    """What a residual block adds: norm, two layers, dropout; nothing at first."""

    def __init__(self, width: int, dropout: float):
        wide = 2 * width
        super().__init__(
            nn.LayerNorm(width), nn.Linear(width, wide), nn.GELU(), nn.Dropout(dropout), silent(nn.Linear(wide, width))
        )


def contrastive_prior_loss(guess: Tensor, image: Tensor, contrast: float, temperature: float) -> Tensor:
    """1 - cosine, plus `contrast` times the InfoNCE of telling each guess's own picture out of the batch.

    guess, image: (B, D) unit rows. Equal pictures (several captions of one) are all right answers.
    Returns: scalar; the first part starts at 1 - the ridge's cosine, the second is log(B) at chance.
    """
    image = F.normalize(image.float(), dim=-1)  # stored rows are a little off
    with torch.autocast(guess.device.type, enabled=False):
        logits = guess.float() @ image.T / temperature
        right = image @ image.T > 0.9999
    own = torch.logsumexp(logits.masked_fill(~right, float("-inf")), dim=1)
    telling = (torch.logsumexp(logits, dim=1) - own).mean()
    return (1 - (guess * image).sum(1)).mean() + contrast * telling
