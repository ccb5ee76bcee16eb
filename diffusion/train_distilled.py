"""train_distilled: a decoder folder + shards + a CLIP -> fit, stage after stage -> a decoder folder for a few steps."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_train import ranks
from clip_train.fit import Batch, FitConfig, FitResult, fit
from clip_train.folder import Input, Manifest
from clip_train.model import Clip
from clip_train.settings import Progress, UserError, config_to_json
from clip_train.shards import ShardSet
from diffusion.decoder import null_cond
from diffusion.denoiser import Denoiser
from diffusion.distill import DistillConfig, distillation_loss
from diffusion.guidance import clamped, classifier_free
from diffusion.picture_feed import PictureFeed
from diffusion.schedule import stratified
from diffusion.train_decoder import shown
from diffusion.trained import load_decoder, publish

DISTILLED_FIT = FitConfig(minutes=4.0, batch_size=32, lr=1e-3, weight_decay=0.0, beta2=0.98, ema=0.99)


def train_distilled(
    decoder: Path | str,
    shards: Path | str,
    clip: Path | str,
    out: Path | str,
    config: DistillConfig | None = None,
    fit_config: FitConfig = DISTILLED_FIT,
    *,
    device: str | torch.device = "auto",
    on_progress: Progress | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Manifest:
    """Teach a copy of the decoder to draw in config.few_steps steps what it draws in many, on the pictures of `shards`.

    clip: the one the decoder was trained with. fit_config: of all stages together, each takes an equal part. Writes a
    decoder/ folder whose config says few_steps; run again to resume, or to find it done. on_progress counts pictures
    while they are encoded (stage="encode"), then the optimizer steps of each stage (stage="to 2 steps").
    """
    place, config = ranks.start(device), config or DistillConfig()
    samples = ShardSet(str(shards))
    teacher, made = load_decoder(decoder, place)
    encoder = Clip.load(clip, place)
    if encoder.fingerprint != made.inputs["clip"]["fingerprint"]:
        raise UserError(f"{decoder}/ was trained with another CLIP than {clip}/; pass that one with --clip")
    if teacher.config.few_steps:
        raise UserError(
            f"{decoder}/ is distilled already, to {teacher.config.few_steps} steps; pass the decoder it was made from"
        )
    inputs = {
        "shards": Input(samples.fingerprint, shards),
        "clip": Input(encoder.fingerprint, clip),
        "teacher": Input(made.fingerprint, decoder),
    }
    settings = {"distill": config_to_json(config), "fit": config_to_json(fit_config)}
    space = ranks.open_workspace(out, "decoder", settings, inputs, command="unclip train distilled")
    if space.done:
        return space.done

    mix = config.caption_mix if teacher.config.text else None
    feed = PictureFeed.prepare(samples, encoder, teacher.config.image_size, space.path, on_progress, caption_mix=mix)
    batches = feed.batches(fit_config)
    share, start, result = _share(fit_config, len(config.chain)), config.teacher_steps, None
    for number, steps in enumerate(config.chain):
        last = number + 1 == len(config.chain)
        folder = space.path if last else space.path / "scratch" / f"to-{steps}"
        ranks.from_main(lambda folder=folder: folder.mkdir(parents=True, exist_ok=True))
        student = copy.deepcopy(teacher).train().requires_grad_(True)
        student.features.requires_grad_(False)  # of align.py: no gradient comes by there
        loss = stage_loss(teacher, encoder, start, steps, config, guided=number == 0)
        torch.manual_seed(fit_config.seed)
        part = replace(share, seed=fit_config.seed + number)
        tell = _named(on_progress, steps)
        result = fit(student, batches, loss, part, folder, device=place, on_progress=tell, on_warning=on_warning)
        teacher, start = taught(student, result), steps
    return publish(
        space, teacher, replace(teacher.config, few_steps=config.few_steps), result, {"pictures": len(feed.pictures)}
    )


def stage_loss(
    teacher: Denoiser, encoder: Clip | None, teacher_steps: int, steps: int, config: DistillConfig, guided: bool
) -> Callable[[nn.Module, Batch, torch.Generator], tuple[Tensor, dict]]:
    """The loss of a student of `steps` steps under this teacher: the decoder itself, by Heun's method and with the
    guidance that is to be baked in, or the student before, by the DDIM steps it has learned.

    encoder: for teachers that look at text.
    """

    def loss(model: nn.Module, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict]:
        x0 = batch["pixels"].float() / 127.5 - 1
        cond = shown(batch, replace(teacher.config, drop_image=0.0), encoder, rng)  # without an embedding none is drawn
        denoise = classifier_free(teacher, cond, null_cond(cond), config.guidance if guided else 1.0)
        quantile = config.clamp if guided and config.clamp < 1 else None
        denoise = clamped(denoise, quantile=quantile) if config.clamp else denoise
        noise = torch.randn(x0.shape, generator=rng, device=x0.device)
        uniform = stratified(len(x0), rng)
        return distillation_loss(
            model, denoise, x0, cond, noise, uniform, teacher.scaling.weight,
            steps=steps, teacher_steps=teacher_steps, second_order=guided, guess=teacher.network.guess(cond),
        ), {}  # fmt: skip

    return loss


def taught(student: Denoiser, result: FitResult) -> Denoiser:
    """The student with its averaged weights, as a teacher."""
    if result.averaged:
        student.load_state_dict(result.averaged)
    return student.eval().requires_grad_(False)


def _share(fit_config: FitConfig, stages: int) -> FitConfig:
    return replace(fit_config, steps=-(-fit_config.steps // stages), minutes=fit_config.minutes / stages)


def _named(on_progress: Progress | None, steps: int) -> Progress | None:
    if on_progress is None:
        return None
    return lambda done, total, **numbers: on_progress(done, total, stage=f"to {steps} steps", **numbers)
