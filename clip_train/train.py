"""Train CLIP: shards + model + loss -> fit -> a clip/ folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clip_train import ranks
from clip_train.augment import augment
from clip_train.fit import Batch, FitConfig, fit
from clip_train.folder import Input, Manifest
from clip_train.loss import contrastive_loss, same_caption
from clip_train.model import Clip, preprocess_config
from clip_train.pictures import Batches, Pictures
from clip_train.settings import Progress, UserError, config_to_json
from clip_train.shards import ShardSet


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Everything but the schedule that decides what train_clip produces. Saved in the manifest."""

    vision: dict[str, Any]  # open_clip's vision_cfg without image_size
    image_size: int = 64  # side of the square pictures, in pixels
    embed_dim: int = 512  # width of the space
    text_width: int = 256
    text_layers: int = 2
    text_heads: int = 4
    context_length: int = 32  # tokens of a caption that are read, start and end included
    augment: float = 1.0  # strength of the random moves of a picture, see augment.py
    label_field: str = "label"  # json field of a sample whose equal values are right answers for each other
    workers: int = 0  # processes that read and decode, when the pictures do not fit the cache
    cache_gb: float = 2.0  # pictures are decoded once and kept as bytes, if they fit

    def model_config(self) -> dict[str, Any]:
        """open_clip's model_cfg."""
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": {**self.vision, "image_size": self.image_size},
            "text_cfg": {
                "context_length": self.context_length,
                "vocab_size": 49408,
                "width": self.text_width,
                "heads": self.text_heads,
                "layers": self.text_layers,
            },
        }


@dataclass(frozen=True)
class Preset:
    """A model and a schedule that belong together, and what they are for."""

    about: str
    clip: ClipConfig
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=1))


PRESETS = {
    "tiny": Preset(
        "CPU, minutes: convolutional tower at 48 px, one-layer text tower",
        ClipConfig(
            vision={"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"},
            image_size=48,
            text_width=512,
            text_layers=1,
            text_heads=8,
            context_length=24,
        ),
        FitConfig(minutes=20.0, batch_size=256, lr=2e-3, weight_decay=0.5, ema=0.99),
    ),
    "small": Preset(
        "one GPU, an hour: ResNet-50 at 96 px, six-layer text tower",
        ClipConfig(
            vision={"timm_model_name": "resnet50d", "timm_pool": "avg", "timm_proj": "linear"},
            image_size=96,
            text_width=512,
            text_heads=8,
            text_layers=6,
            context_length=48,
            workers=8,
            cache_gb=16.0,
        ),
        FitConfig(minutes=60.0, batch_size=1024, lr=1e-3, weight_decay=0.1),
    ),
    "vit-b-32": Preset(
        "cluster: ViT-B/32 at 224 px, as OpenAI and LAION trained it",
        ClipConfig(
            vision={"layers": 12, "width": 768, "patch_size": 32},
            image_size=224,
            text_width=512,
            text_heads=8,
            text_layers=12,
            context_length=77,
            augment=0.3,
            workers=8,
        ),
        FitConfig(steps=390_000, batch_size=32_768, lr=5e-4, warmup=0.005, weight_decay=0.2),
    ),
    "vit-b-16": Preset(
        "cluster: ViT-B/16 at 224 px, as OpenAI and LAION trained it",
        ClipConfig(
            vision={"layers": 12, "width": 768, "patch_size": 16},
            image_size=224,
            text_width=512,
            text_heads=8,
            text_layers=12,
            context_length=77,
            augment=0.3,
            workers=8,
        ),
        FitConfig(steps=390_000, batch_size=32_768, lr=5e-4, warmup=0.005, weight_decay=0.2),
    ),
}


def train_clip(
    shards: str | Path,
    out: str | Path,
    config: ClipConfig,
    fit_config: FitConfig,
    *,
    device: str = "auto",
    on_progress: Progress | None = None,
) -> Manifest:
    """Train a CLIP on tar shards and write a clip/ folder; run again to resume, or to find it done.

    Every caption a sample has is used, one at random each time it comes round. Raises UserError on unusable input.
    """
    place = ranks.start(device)
    samples = ShardSet(shards)
    settings = config_to_json(config) | {"fit": config_to_json(fit_config)}
    work = ranks.open_workspace(out, "clip", settings, {"shards": Input(samples.fingerprint, shards)})
    if work.done:
        return work.done

    torch.manual_seed(fit_config.seed)
    clip = Clip(config.model_config(), preprocess_config(config.image_size))
    pictures = decoded(samples, config.image_size, work.path, config.cache_gb, on_progress)
    per_rank = fit_config.batch_size // ranks.world_size()
    if per_rank // fit_config.accumulate < 2:
        raise UserError(f"batch_size {fit_config.batch_size} leaves fewer than 2 pairs to tell apart; raise it")
    batches = CaptionedBatches(
        Batches(pictures, per_rank, fit_config.seed, ranks.rank(), ranks.world_size(), config.workers),
        CaptionTable(samples, clip, config.label_field),
        fit_config.seed,
    )

    def loss_fn(model: nn.Module, batch: Batch, rng: torch.Generator) -> tuple[torch.Tensor, dict[str, Any]]:
        image_emb, text_emb, scale = model(augment(batch["pixels"], config.augment, rng), batch["tokens"])
        image_emb, text_emb = ranks.gather_rows(image_emb), ranks.gather_rows(text_emb)
        same = same_caption(ranks.gather_rows(batch["group"]), ranks.gather_rows(batch["caption"]))
        with torch.autocast(image_emb.device.type, enabled=False):
            loss = contrastive_loss(image_emb, text_emb, scale, same)
        return loss, {"chance": np.log(len(image_emb)), "scale": scale.detach()}

    result = fit(
        clip,
        batches,
        loss_fn,
        fit_config,
        work.path,
        device=place,
        on_progress=on_progress,
        after_step=clip.clamp_temperature,
    )
    manifest = None
    if ranks.is_main():
        averaged = {n.removeprefix("model."): t for n, t in (result.averaged or {}).items()}
        clip.save(work.path, averaged)
        summary = {
            "steps": result.steps,
            "seconds": result.seconds,
            "loss": result.loss,
            "chance": float(np.log(fit_config.batch_size // fit_config.accumulate)),
            "pairs": len(pictures),
            "pairs_seen": result.steps * fit_config.batch_size,
            "bad_pictures": len(pictures.bad),
            "bad_first": pictures.bad[:5],
        }
        manifest = work.publish(summary)
    return ranks.broadcast(manifest)


def decoded(samples: ShardSet, size: int, work: Path, cache_gb: float, on_progress: Progress | None) -> Pictures:
    """The samples' pictures, decoded once by the main rank into the work folder's scratch/ when they fit."""
    scratch = work / "scratch"
    if ranks.is_main():
        scratch.mkdir(exist_ok=True)
        pictures = Pictures(samples, size, scratch, cache_gb * 1e9, on_progress)
    ranks.barrier()
    return pictures if ranks.is_main() else Pictures(samples, size, scratch, cache_gb * 1e9)


class CaptionTable:
    """Every caption of every sample as token ids, and which samples are right answers for each other."""

    def __init__(self, samples: ShardSet, clip: Clip, label_field: str = "label") -> None:
        captions = [samples.captions(i) for i in range(len(samples))]
        self.first = np.cumsum([0] + [len(c) for c in captions])  # (N + 1,) bounds of each sample's captions
        tokens = clip.tokenize([caption for c in captions for caption in c])
        self.tokens = tokens.to(torch.int32)  # (M, context)
        ids: dict[str, int] = {}
        self.caption = torch.tensor([ids.setdefault(c.lower(), len(ids)) for own in captions for c in own])  # (M,)
        groups: dict[str, int] = {}
        labels = [samples.label(i, label_field) or captions[i][0] for i in range(len(samples))]
        self.group = torch.tensor([groups.setdefault(label.lower(), len(groups)) for label in labels])  # (N,)

    def pick(self, rows: np.ndarray, uniform: np.ndarray) -> Batch:
        """For samples `rows`, the caption that `uniform` (B,) in [0, 1) chooses: tokens, its id, the sample's group."""
        low, high = self.first[rows], self.first[rows + 1]
        chosen = torch.from_numpy(low + (uniform * (high - low)).astype(np.int64))
        tokens = self.tokens[chosen].long()
        return {"tokens": tokens, "caption": self.caption[chosen], "group": self.group[torch.from_numpy(rows)]}


class CaptionedBatches:
    """Batches of pictures, each with one of its captions; what a step draws depends on (seed, step) alone.

    The ranks share one draw, so that several of them train on what one alone would.
    """

    def __init__(self, pictures: Batches, captions: CaptionTable, seed: int) -> None:
        self.pictures = pictures
        self.captions = captions
        self.seed = seed

    def __call__(self, start_step: int) -> Iterator[Batch]:
        for step, batch in enumerate(self.pictures(start_step), start_step):
            rows = batch.pop("row").numpy()
            uniform = np.random.default_rng((self.seed, step)).random((ranks.world_size(), len(rows)))
            yield batch | self.captions.pick(rows, uniform[ranks.rank()])


def preset(name: str, pairs: Sequence[str] = ()) -> tuple[ClipConfig, FitConfig]:
    """A preset's two configs with --set pairs applied."""
    from clip_train.settings import override

    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; there are: {', '.join(PRESETS)}")
    return tuple(override([PRESETS[name].clip, PRESETS[name].fit], pairs))
