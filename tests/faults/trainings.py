"""Every training's loss and gradients, on random models and batches: float32 and bf16 against float64.

The models are small, their weights random throughout (layers that start silent, too); a batch may be degenerate: equal
pictures, one caption for all, rows of one direction, a temperature at its limits. (Equal pictures are not shown to
towers with BatchNorm: it divides their differences, which are rounding, by their spread, which is rounding. And where
the input of a ReLU is within rounding of 0, so that one type takes it for positive and another does not, gradients of
a ResNet leap: those have bands of their own.)
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tiny
import torch
import torch.nn.functional as F
from double import doubled, in_double, wide
from torch import nn

from clip_train.gradients import Batch, LossFunction, RowsLoss, make_gradients
from clip_train.loss import SIGMOID_CHUNK, contrastive_loss, distillation_loss, same_caption, sigmoid_loss
from clip_train.model import MAX_LOGIT_SCALE, Clip, preprocess_config
from clip_train.objective import ClipObjective
from clip_train.parallel import Team
from diffusion.contrastive import ContrastiveConfig, ContrastivePrior, contrastive_prior_loss
from diffusion.decoder import DecoderConfig, DecoderDenoiser
from diffusion.denoiser import KINDS, WEIGHTINGS
from diffusion.levels import PLANS
from diffusion.prior import PriorConfig, PriorDenoiser
from diffusion.schedule import DENSITIES
from diffusion.train_decoder import diffusion_loss as decoder_loss
from diffusion.train_prior import contrastive_loss as contrastive_prior_training
from diffusion.train_prior import diffusion_loss as prior_loss
from diffusion.train_upsampler import crop_loss, random_crops
from diffusion.upsample import UpsamplerConfig, UpsamplerDenoiser
from diffusion.words import NO_WORD

WORDS = "a red blue small fox cat house on in the snow of many".split()
LEAST = 0.1  # errors of a loss are shares of the loss, or of this where it is less

Gradients = tuple[torch.Tensor, torch.Tensor]  # the loss, and all gradients as one row


@dataclass
class Training:
    """A model, its loss, a batch. loss_of(*others): others are further models that the loss asks."""

    model: nn.Module
    loss_of: Callable[..., LossFunction | RowsLoss]
    batch: Batch
    others: tuple[nn.Module, ...] = ()
    parts: int = 1  # that the batch is cut into
    what: str = ""
    least: float = 0.01  # errors of gradients are shares of their norm, or of this where that is less
    special: str = ""  # what has bands of its own: ", scale 100", ", equal rows" or ", ResNet"

    def gradients(self, precision: str) -> Gradients:
        """Of the very code that trains, in fp32 or bf16."""
        return _gradients(self.model, self.loss_of(*self.others), self.batch, self.parts, precision)

    def truth(self) -> Gradients:
        """The same in float64: same weights, same draws."""
        with in_double():
            loss = self.loss_of(*map(doubled, self.others))
            return _gradients(doubled(self.model), loss, wide(self.batch), self.parts, "fp32")

    def errors(self, name: str) -> dict[str, float]:
        """Relative errors by the names of their bands."""
        true, found = self.truth(), {}
        for precision in ("fp32", "bf16"):
            pairs = zip(("loss", "gradients"), self.gradients(precision), true, (LEAST, self.least), strict=True)
            for what, made, wanted, least in pairs:
                share = (made.double() - wanted).norm() / wanted.norm().clamp(min=least)
                found[f"{name}{self.special}: {what}, {precision}"] = float(share)
        return found


def _gradients(model: nn.Module, loss: LossFunction | RowsLoss, batch: Batch, parts: int, precision: str) -> Gradients:
    model.zero_grad()
    team = Team(model, "ddp", torch.device("cpu"))
    made, _ = make_gradients(team, loss, dict(batch), accumulate=parts, precision=precision, seed=1, step=2)
    every = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    return made.detach(), torch.cat([gradient.flatten() for gradient in every])


def rows(count: int, dim: int, rng: random.Random) -> torch.Tensor:
    """(count, dim) unit rows: far apart, near each other, some the same, or all the same."""
    made = torch.randn(count, dim)
    how = rng.choice(("apart", "apart", "near", "some", "same"))
    if how == "near":
        made = made[:1] + rng.choice((1e-3, 1e-1)) * made
    elif how == "some":
        made[count // 2 :] = made[0]
    elif how == "same":
        made = made[:1].repeat(count, 1)
    return F.normalize(made, dim=-1)


def ids(count: int, rng: random.Random) -> torch.Tensor:
    """(count,) which captions are the same: none, some, or all."""
    return torch.randint(0, rng.choice((1, max(2, count // 3), 10**6)), (count,))


def captions(count: int, rng: random.Random) -> list[str]:
    """Of any length; now and then all the same, or empty."""
    made = [" ".join(rng.choices(WORDS, k=rng.choice((0, 1, 3, 8, 30)))) for _ in range(count)]
    return made[:1] * count if rng.random() < 0.15 else made


SHOWN = ("noise", "soft", "soft", "same", "flat")


def pictures(count: int, size: int, rng: random.Random, kinds: Sequence[str] = SHOWN) -> torch.Tensor:
    """(count, 3, size, size) uint8: noise, soft colours, one of them for all, or one colour each."""
    how = rng.choice(kinds)
    if how == "noise":
        return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    soft = F.interpolate(255 * torch.rand(count, 3, 3, 3), (size, size), mode="bilinear").byte()
    soft = soft[:1].repeat(count, 1, 1, 1) if how == "same" else soft
    return soft[:, :, :1, :1].repeat(1, 1, size, size) if how == "flat" else soft


def awake(model: nn.Module, size: float = 0.5) -> nn.Module:
    """All weights and buffers of a network moved at random, so that nothing is silent any more."""
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if weight.is_floating_point() and not name.endswith("waves"):
                inputs = weight[0].numel() if weight.ndim > 1 else 16
                weight.add_(torch.randn_like(weight), alpha=size / inputs**0.5)
    return model


# CLIP

TOWERS = {
    "ViT": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "ViT, averaged": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "pool_type": "avg"},
    "ResNet": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
    "timm ResNet": {"timm_model_name": "resnet10t"},
    "attentional pool": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "attentional_pool": True},
}
TEXTS = ({}, {}, {"pool_type": "last"}, {"no_causal_mask": True}, {"embed_cls": True})


def clip(rng: random.Random, tower: str = "ViT", **more: object) -> Clip:
    """A small CLIP; its image tower as named, its text tower of any kind."""
    text, size = rng.choice(TEXTS), 32
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": size, **TOWERS[tower]},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, **text},
        **({"custom_text": True} if text else {}),
        **more,
    }
    made = Clip(config, preprocess_config(size))
    with torch.no_grad():  # captions and pictures lie well apart
        getattr(made.model, "text", made.model).token_embedding.weight.mul_(20)
    return made


def clip_training(rng: random.Random, loss: str) -> Training:
    """Of pictures and captions: in parts, smoothed, moved, distilled, at any temperature."""
    tower = rng.choice(("ViT", "ViT", "ViT, averaged", "ResNet", "attentional pool"))
    model = clip(rng, tower, **({"init_logit_bias": rng.choice((-10.0, 0.0))} if loss == "siglip" else {}))
    scale = rng.choice((1.0, 1 / 0.07, 1 / 0.07, MAX_LOGIT_SCALE))
    with torch.no_grad():
        model.model.logit_scale.fill_(torch.tensor(scale).log())
    norms = tower == "ResNet"
    parts, each = rng.choice((1, 1, 2, 3)), 24 if norms else rng.choice((4, 7, 12))
    count = parts * each
    batch = {
        "pixels": pictures(count, 32, rng, ("noise", "soft") if norms else SHOWN),
        "tokens": model.tokenize(captions(count, rng)),
        "caption": ids(count, rng),
        "group": torch.arange(count),
    }
    teacher, how = (), {"augment": rng.choice((0.0, 0.0, 1.0))}
    if loss == "infonce":
        how["smoothing"] = rng.choice((0.0, 0.0, 0.1))
    if rng.random() < 0.25:
        teacher, how["distill"] = (clip(rng),), rng.choice((0.5, 1.0))

    def loss_of(*others: Clip) -> ClipObjective:
        return ClipObjective(loss=loss, teacher=others[0] if others else None, **how)

    equal = any(bool((batch[name] == batch[name][:1]).all()) for name in ("pixels", "tokens"))
    special = ", ResNet" if norms else ", equal rows" if equal else ", scale 100" if scale == MAX_LOGIT_SCALE else ""
    what = f"{tower}, {count} in {parts} parts, scale {scale:g}, {how}{', equal rows' * equal}"
    least = max(1.0, scale) * (1.0 if equal else 0.01)  # equal rows: the gradients of the pairs cancel
    return Training(model, loss_of, batch, teacher, parts, what, least, special)


class Rows(nn.Module):
    """Rows themselves as what is trained, with a temperature and a bias."""

    def __init__(self, image: torch.Tensor, text: torch.Tensor, scale: float, bias: float) -> None:
        super().__init__()
        self.image, self.text = nn.Parameter(image), nn.Parameter(text)
        self.scale, self.bias = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(bias))

    def forward(self) -> tuple[torch.Tensor, ...]:
        return self.image, self.text, self.scale, self.bias


def row_training(rng: random.Random) -> Training:
    """Of rows alone, in large batches, chunks of any size, saturated or flat."""
    which = rng.choice(("infonce", "infonce with groups", "siglip", "distillation", "contrastive prior"))
    count, dim = rng.choice((2, 3, 17, 64, 300)), rng.choice((8, 64, 512))
    image = rows(count, dim, rng)
    text = image + 0.05 * torch.randn(count, dim) / dim**0.5 if rng.random() < 0.3 else rows(count, dim, rng)
    scale, bias = rng.choice((0.1, 1.0, 1 / 0.07, MAX_LOGIT_SCALE)), rng.choice((-10.0, 0.0, 10.0))
    model = Rows(image, F.normalize(text, dim=-1), scale, bias)
    batch = {"caption": ids(count, rng), "one": rows(count, 16, rng), "two": rows(count, 16, rng)}
    smoothing, chunk = rng.choice((0.0, 0.1)), rng.choice((1, 5, SIGMOID_CHUNK))

    def loss(model: nn.Module, batch: Batch, rng: torch.Generator) -> tuple[torch.Tensor, dict]:
        image, text, scale, bias = model()
        with torch.autocast("cpu", enabled=False):  # as ClipObjective has it
            if which == "siglip":
                return sigmoid_loss(image, text, scale, bias, [batch["caption"]], chunk), {}
            if which == "distillation":
                return distillation_loss(image, text, scale, batch["one"], batch["two"], torch.tensor(20.0)), {}
            if which == "contrastive prior":
                return contrastive_prior_loss(image, text.detach(), 0.2, 1 / float(scale.detach())), {}
            same = same_caption(batch["caption"]) if "groups" in which else None
            return contrastive_loss(image, text, scale, same, smoothing), {}

    what = f"{which}, {count} x {dim}, scale {scale:g}, bias {bias:g}"
    special, least = ", scale 100" if scale == MAX_LOGIT_SCALE else "", 0.01 * max(1.0, scale)
    return Training(model, lambda: loss, batch, what=what, least=least, special=special)


# Diffusion


def _noise(rng: random.Random) -> dict[str, str]:
    return {"predict": rng.choice(KINDS), "density": rng.choice(("log_normal", *DENSITIES))}


def prior_training(rng: random.Random) -> Training:
    """The diffusion prior's."""
    words, count = rng.choice((0, 0, 6)), rng.choice((2, 9, 32))
    how = {"weighting": rng.choice(WEIGHTINGS), "sigma_data": rng.choice((1.0, 0.3)), "draws": rng.choice((1, 3))}
    config = PriorConfig(
        embed_dim=16, width=32, depth=2, heads=2, dropout=0.0, words=words, vocabulary=20 if words else 0,
        text_noise=rng.choice((0.0, 0.5)), drop_text=rng.choice((0.1, 1.0)), **_noise(rng), **how,
    )  # fmt: skip
    model = awake(PriorDenoiser(config))
    batch = _pairs(model.network, count, words, rng)
    return Training(model, lambda: prior_loss(config, model), batch, what=str(config))


def contrastive_training(rng: random.Random) -> Training:
    """The contrastive prior's."""
    words, count = rng.choice((0, 6)), rng.choice((2, 9, 64))
    config = ContrastiveConfig(
        embed_dim=16, width=32, depth=2, dropout=0.0, words=words, vocabulary=20 if words else 0,
        text_noise=rng.choice((0.0, 0.5)), temperature=rng.choice((0.01, 0.05, 1.0)),
    )  # fmt: skip
    model = awake(ContrastivePrior(config))
    batch = _pairs(model, count, words, rng)
    return Training(model, lambda: contrastive_prior_training(config), batch, what=str(config))


def _pairs(network: nn.Module, count: int, words: int, rng: random.Random) -> Batch:
    batch = {"text": rows(count, 16, rng), "image": rows(count, 16, rng)}
    if words:
        network.words.known.copy_(torch.arange(20))
        batch["words"] = torch.randint(0, 25, (count, words))  # some unknown
        batch["words"][torch.rand(count, words).cumsum(1) > words / 3] = NO_WORD
    return batch


def decoder_training(rng: random.Random) -> Training:
    """The decoder's, of all networks."""
    text, align = rng.random() < 0.3, rng.choice((0.0, 0.0, 0.5))
    config = DecoderConfig(
        embed_dim=32, image_size=16, widths=(16, 32), blocks=(1, 1), attention=(4,), head_width=16, cond_width=32,
        network=rng.choice(list(PLANS)), noise_image=rng.choice((0.0, 0.3)), sigma_data=rng.choice((0.5, 0.1)),
        weighting=rng.choice(WEIGHTINGS), text=text, text_width=32, align=align, align_width=32, **_noise(rng),
    )  # fmt: skip
    with torch.random.fork_rng():  # it is seeded when it is made, which is the first time only
        encoder = tiny._random_clip(32, 0).eval().requires_grad_(False)
    model = awake(DecoderDenoiser(config))
    count = rng.choice((1, 4, 8))
    batch = {"pixels": pictures(count, 16, rng), "image": rows(count, 32, rng)}
    if text:
        batch["tokens"] = encoder.tokenize(captions(count, rng))
    return Training(model, lambda clip: decoder_loss(config, model, clip), batch, (encoder,), what=str(config))


def upsampler_training(rng: random.Random) -> Training:
    """The upsampler's."""
    config = UpsamplerConfig(
        embed_dim=16, factor=2, crop=16, widths=(16, 24), blocks=(1, 1), cond_width=16,
        sigma_data=rng.choice((0.15, 0.02)), **_noise(rng),
    )  # fmt: skip
    model, count = awake(UpsamplerDenoiser(config)), rng.choice((1, 4, 8))

    def loss(model: nn.Module, batch: Batch, rng: torch.Generator) -> tuple[torch.Tensor, dict]:
        x0 = random_crops(batch["pixels"], config.crop, rng)
        return crop_loss(model, x0, batch["image"], config, rng, drop=True), {}

    batch = {"pixels": pictures(count, 24, rng), "image": rows(count, 16, rng)}
    return Training(model, lambda: loss, batch, what=str(config))


TRAININGS: dict[str, Callable[[random.Random], Training]] = {
    "InfoNCE training of a CLIP": lambda rng: clip_training(rng, "infonce"),
    "sigmoid training of a CLIP": lambda rng: clip_training(rng, "siglip"),
    "contrastive losses of rows": row_training,
    "prior": prior_training,
    "contrastive prior": contrastive_training,
    "decoder": decoder_training,
    "upsampler": upsampler_training,
}
