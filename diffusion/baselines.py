"""What a prior must beat: simpler guesses of a text's image embedding, each fitted at once from an embeddings folder.

text   the text embedding as it is
shift  the text embedding, moved from the mean of the texts to the mean of the pictures
ridge  linear regression (ridge.py)
knn    a mean of the pictures whose captions are nearest, weighted by a softmax of the similarities
mean   the mean picture, whatever the text says
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_train.folder import Manifest, fingerprint_json, read_manifest
from clip_train.settings import UserError
from clip_train.store import EmbeddingStore
from diffusion.contrastive import ContrastiveConfig, ContrastivePrior
from diffusion.heldout import labels_of
from diffusion.pairs import Pairs
from diffusion.prior import Guess
from diffusion.ridge import Linear, ridge_regression
from diffusion.trained import kind_of, load_prior, ready, saved

BASELINES = ("text", "shift", "ridge", "knn", "mean")
SCORES = 2**24  # similarities held at a time


class Baseline:
    """A Guess that draws nothing: seeds, captions, steps, guidance and candidates make no difference to it."""

    name: str
    embed_dim: int

    def guess(self, text: Tensor) -> Tensor:
        """(N, D) unit rows -> (N, D), of any length."""
        raise NotImplementedError

    def rows(
        self, text: Tensor, captions: Sequence[str] | None = None, seeds: Sequence[int] = (), **how: Any
    ) -> Tensor:
        """See prior.Guess."""
        with torch.autocast(text.device.type, enabled=False):  # bf16 would change who is nearest
            return F.normalize(self.guess(text.float()), dim=-1)


class TextItself(Baseline):
    """The text embedding as it is."""

    name, embed_dim = "text", 0

    def guess(self, text: Tensor) -> Tensor:
        return text


class LinearBaseline(Baseline):
    """Ridge regression, or a simpler map with its means: "shift" keeps the direction, "mean" forgets the text."""

    def __init__(self, linear: Linear, name: str = "ridge", device: torch.device | str = "cpu"):
        self.name, self.embed_dim = name, len(linear.output_mean)
        self.input_mean, self.output_mean = linear.input_mean.to(device), linear.output_mean.to(device)
        self.weight = linear.weight.to(device)

    def guess(self, text: Tensor) -> Tensor:
        moved = text - self.input_mean
        if self.name == "ridge":
            return self.output_mean + moved @ self.weight
        return self.output_mean + moved if self.name == "shift" else self.output_mean.expand_as(text)


class Knn(Baseline):
    """The mean of the pictures of the k nearest captions, weighted by softmax(similarity / temperature).

    captions (M, D), image (N, D): unit rows; row (M,): the picture of each caption. Exact: every caption is looked at.
    """

    name = "knn"

    def __init__(self, captions: Tensor, image: Tensor, row: Tensor, k: int, temperature: float):
        self.captions, self.image, self.row = captions, image, row
        self.k, self.temperature, self.embed_dim = min(k, len(captions)), temperature, image.shape[1]

    def guess(self, text: Tensor) -> Tensor:
        size = max(1, SCORES // len(self.captions))
        blocks = [text[low : low + size] for low in range(0, len(text), size)]
        return torch.cat([self.mean_of(*(some @ self.captions.T).topk(self.k)) for some in blocks]) if blocks else text

    def mean_of(self, score: Tensor, which: Tensor) -> Tensor:
        """(B, k) similarities, falling, and numbers of captions -> (B, D)."""
        weight = (score[:, : self.k] / self.temperature).softmax(-1)
        return F.embedding_bag(self.row[which[:, : self.k]], self.image, per_sample_weights=weight, mode="sum")


@dataclass(frozen=True)
class KnnChoice:
    """What choose_knn found."""

    k: int
    temperature: float
    cosine: float  # mean to the true picture, on the pairs held out
    held_out: int  # queries


KS = (1, 4, 16, 64, 256, 1024)
TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def choose_knn(
    pairs: Pairs, groups: np.ndarray, queries: int = 300, seed: int = 0, device: torch.device | str = "cpu"
) -> KnnChoice:
    """The k and temperature with the highest mean cosine on training pairs whose whole group is held out.

    groups (N,): pictures of one group (label) leave together, as a new caption's group would be unknown.
    """
    rng = np.random.default_rng(seed)
    names = np.unique(groups)
    out = np.isin(groups, rng.permutation(names)[: max(1, len(names) // 10)])
    if out.all() or not out.any():
        return KnnChoice(min(16, len(pairs.row)), 0.05, float("nan"), 0)
    asked = np.flatnonzero(out[pairs.row])
    asked = rng.permutation(asked)[:queries]
    kept = np.flatnonzero(~out[pairs.row])
    text, image, row = (torch.from_numpy(part).to(device) for part in (pairs.text, pairs.image, pairs.row))
    truth = image[row[asked]]
    knn = Knn(text[kept], image, row[kept], max(KS), 1.0)
    score, which = (text[asked] @ knn.captions.T).topk(knn.k)
    best = None
    for k in sorted({min(k, knn.k) for k in KS}):
        for temperature in TEMPERATURES:
            knn.k, knn.temperature = k, temperature
            cosine = F.cosine_similarity(knn.mean_of(score, which), truth).mean().item()
            if best is None or cosine > best.cosine:
                best = KnnChoice(k, temperature, cosine, len(asked))
    return best


def fit_baseline(name: str, store: EmbeddingStore, device: torch.device | str = "cpu") -> Baseline:
    """One of BASELINES, from all pairs of an embeddings folder."""
    if name == "text":
        return TextItself()
    pairs = Pairs.of(store)
    if name == "knn":
        chosen = choose_knn(pairs, labels_of(store), device=device)
        parts = (torch.from_numpy(part).to(device) for part in (pairs.text, pairs.image, pairs.row))
        return Knn(*parts, chosen.k, chosen.temperature)
    return LinearBaseline(ridge_regression(pairs.blocks(), independent=len(store)), name, device)


def open_prior(
    spec: Path | str, device: torch.device | str = "cpu", embeddings: Path | str | None = None
) -> tuple[Guess, dict[str, str], Manifest | None]:
    """A prior folder of either kind, or a baseline by its name, fitted to an embeddings folder.

    Returns the guess, the fingerprints of what it comes from ("prior", and "clip" if known), and the folder's manifest
    (None for a baseline). A folder that is called like a baseline is written with a slash: ./text.
    """
    if str(spec) in BASELINES:
        return _baseline(str(spec), device, embeddings)
    manifest = read_manifest(spec, "prior")
    guess: Guess
    if kind_of(spec) == "contrastive":
        _, config = saved(spec, "prior", ContrastiveConfig)
        guess = ready(ContrastivePrior(config), spec, device)
    else:
        guess, _ = load_prior(spec, device)
    return guess, {"prior": manifest.fingerprint, "clip": manifest.inputs["clip"]["fingerprint"]}, manifest


def _baseline(name: str, device: torch.device | str, embeddings: Path | str | None) -> tuple[Guess, dict, None]:
    if embeddings is None:
        if name == "text":
            return TextItself(), {"prior": fingerprint_json(name)}, None
        raise UserError(
            f"the prior {name!r} is fitted to embeddings; pass --embeddings emb (made by unclip embed), or a folder "
            f"made by unclip train prior"
        )
    store = EmbeddingStore.open(embeddings)
    made = {"prior": fingerprint_json([name, store.fingerprint]), "clip": store.manifest.inputs["clip"]["fingerprint"]}
    return fit_baseline(name, store, device), made, None
