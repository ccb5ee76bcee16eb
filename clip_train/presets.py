"""Models and schedules that belong together, by name."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from clip_train.fit import FitConfig
from clip_train.settings import UserError, override
from clip_train.train import ClipConfig

# of ClipConfig: what given weights have of their own
MODEL_FIELDS = {
    "vision",
    "image_size",
    "embed_dim",
    "text_width",
    "text_layers",
    "text_heads",
    "context_length",
}


@dataclass(frozen=True)
class Preset:
    """A model and a schedule that belong together, and what they are for."""

    about: str
    clip: ClipConfig
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=1))


PRESETS = {
    # python benchmarks/clip_quality.py --preset tiny --core-minutes 40, 14,319 emoji: recall@1 .91 on new drawings of
    # trained concepts, recall@10 .43 on untrained ones; benchmarks/results/clip-quality-2026-11-21.md
    "tiny": Preset(
        "CPU, minutes: convolutional tower at 48 px, one-layer text tower",
        ClipConfig(
            vision={"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"},
            image_size=48,
            text_width=256,
            text_layers=1,
            text_heads=4,
            context_length=24,
            smoothing=0.2,
        ),
        FitConfig(minutes=20.0, batch_size=256, lr=2e-3, weight_decay=0.5, ema=0.99),
    ),
    # unclip train clip --preset small; no score: no GPU has been lent to this project yet
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
    # torchrun --nproc-per-node 8 --no-python unclip train clip --preset vit-b-32; open_clip reached 62.9 % on ImageNet
    # with this model on LAION-400M (4,600 A100-hours); not run here
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
    # the same with --preset vit-b-16: 67.1 % there (10,700 A100-hours); not run here
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


def preset(name: str, pairs: Sequence[str] = ()) -> tuple[ClipConfig, FitConfig]:
    """A preset's two configs with --set pairs applied; with init, a schedule for weights that were trained before."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; there are: {', '.join(PRESETS)}")
    named = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if named.get("loss") == "siglip":  # it has no targets to smooth
        pairs = ["smoothing=0", *pairs]
    if named.get("init"):
        own = sorted(set(named) & MODEL_FIELDS)
        if own:
            raise UserError(
                f"{own[0]}={named[own[0]]} does not go with init: {named['init']} has its own; leave it out"
            )
        rate = 1e-4 if named.get("lora_rank", "0") != "0" else 1e-5
        pairs = [f"lr={rate}", "weight_decay=0.1", "smoothing=0", *pairs]
    return tuple(override([PRESETS[name].clip, PRESETS[name].fit], pairs))
