"""Train CLIP: shards + model + loss -> fit -> a clip/ folder."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_train import ranks, zeroshot
from clip_train.captions import check_mix
from clip_train.check import quick_check
from clip_train.estimate import estimate
from clip_train.evaluate import Validation
from clip_train.feed import Feed, as_input, open_sources
from clip_train.fit import FitConfig, fit
from clip_train.folder import Input, Manifest
from clip_train.gradients import Batch
from clip_train.lora import add_lora, merge_lora
from clip_train.memory import keep_freed_memory
from clip_train.model import Clip, preprocess_config
from clip_train.objective import LOSSES, ClipObjective
from clip_train.settings import Progress, UserError, config_to_json
from clip_train.track import curves, open_trackers
from clip_train.watch import Watcher

SIGMOID_START = {"init_logit_scale": float(np.log(10)), "init_logit_bias": -10.0}  # arXiv 2303.15343, section 3.2


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
    init: str = (
        ""  # start from a clip/ folder or an open_clip tag (ViT-B-32:openai); the model's fields above are its own
    )
    lock: str = ""  # "image" or "text": this tower stays as it is (LiT)
    unlocked_groups: int = 0  # last blocks of the locked tower that train all the same
    lora_rank: int = 0  # above 0: train low-rank changes of the weights only, merged into them at the end
    lora_alpha: float = 16.0  # the changes are scaled by alpha / rank
    layer_decay: float = 1.0  # each block's learning rate is the next one's times this
    patch_dropout: float = 0.0  # share of a ViT's patches left out while training
    checkpointing: bool = False  # make activations again in the backward pass: slower, less memory
    loss: str = "infonce"  # or "siglip"
    smoothing: float = 0.0  # share of infonce's targets that is spread evenly over the batch
    teacher: str = ""  # a clip/ folder or open_clip tag that is imitated
    distill: float = 0.0  # share of the imitation in the loss
    caption_mix: tuple[float, ...] = ()  # weights of a sample's 1st, 2nd, ... caption; the last for all further ones
    augment: float = 1.0  # strength of the random moves of a picture, see augment.py
    label_field: str = "label"  # json field whose equal values are right answers for each other; cls: KEY.cls
    workers: int = 0  # processes that read and decode, when the pictures do not fit the cache
    cache_gb: float = 2.0  # pictures are decoded once and kept as bytes, if they fit
    shuffle: int = 2048  # samples among which streamed ones are shuffled; those of local shards are, over all
    skip_broken: bool = False  # pass over what is left of a streamed shard that stays broken, instead of stopping
    watch_every: int = 50  # steps between looks at the rows' health, see watch.py; 0: never

    def __post_init__(self) -> None:
        check_mix(self.caption_mix)
        lows = {
            "image_size": 8,
            "embed_dim": 1,
            "text_width": 1,
            "text_layers": 1,
            "text_heads": 1,
            "context_length": 3,
        }
        lows |= {"lora_rank": 0, "unlocked_groups": 0, "augment": 0, "workers": 0, "cache_gb": 0, "shuffle": 1}
        for name, low in (lows | {"watch_every": 0}).items():
            if getattr(self, name) < low:
                raise UserError(f"{name} {getattr(self, name):g} must be at least {low}")
        if self.lock not in ("", "image", "text"):
            raise UserError(f"lock {self.lock!r} must be image, text or nothing")
        if self.lock and not self.init:
            raise UserError(f"lock={self.lock} keeps a tower as it is, so it needs one worth keeping: --init")
        if self.lora_rank and not self.init:
            raise UserError(f"lora_rank={self.lora_rank} changes given weights a little, so it needs some: --init")
        if self.unlocked_groups and (self.lora_rank or not self.lock):
            raise UserError(
                f"unlocked_groups={self.unlocked_groups} are of a locked tower: set lock=image or text, no lora_rank"
            )
        if self.loss not in LOSSES:
            raise UserError(f"loss {self.loss!r} must be {' or '.join(LOSSES)}")
        if self.smoothing and self.loss == "siglip":
            raise UserError(f"loss=siglip has no targets to smooth; smoothing is {self.smoothing:g}: set smoothing=0")
        if not 0 <= self.smoothing < 1 or not 0 <= self.distill <= 1:
            raise UserError(
                f"smoothing {self.smoothing:g} must be in [0, 1), and the share distill {self.distill:g} in [0, 1]"
            )
        if bool(self.teacher) != bool(self.distill):
            raise UserError(
                f"teacher={self.teacher or 'nobody'} and distill={self.distill:g} need each other: set both"
            )
        if not 0 < self.layer_decay <= 1 or not 0 <= self.patch_dropout < 1:
            raise UserError(
                f"layer_decay {self.layer_decay:g} must be in (0, 1], patch_dropout {self.patch_dropout:g} in [0, 1)"
            )

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
            **(SIGMOID_START if self.loss == "siglip" else {}),
        }


def dry_run(
    shards: Sequence[str | Path],
    config: ClipConfig,
    fit_config: FitConfig,
    *,
    weights: Sequence[float] = (),
    allow_http: bool = False,
    device: str = "auto",
) -> dict[str, Any]:
    """What train_clip would take, see estimate.estimate(); nothing is trained or written."""
    place, sources = ranks.pick_device(device), open_sources(shards, weights, allow_http)
    clip, teacher = build(config), Clip.pretrained(config.teacher) if config.teacher else None
    config = as_built(config, clip)
    known = [source.samples for source in sources if source.samples is not None]
    some = [samples.captions(i)[0] for samples in known for i in range(0, len(samples), -(-len(samples) // 200))]
    length = round(float(clip.tokenize(some).argmax(1).float().mean())) + 1 if some else None
    return estimate(
        clip,
        config,
        fit_config,
        place,
        teacher=teacher,
        pairs=sum(map(len, known)) if len(known) == len(sources) else None,
        caption_tokens=length,
    )


def build(config: ClipConfig, seed: int = 0) -> Clip:
    """The CLIP that training starts from: fresh, or `init`; towers locked, low-rank changes put in, as configured."""
    torch.manual_seed(seed)
    if config.init:
        clip = Clip.pretrained(config.init)
        if config.loss == "siglip" and getattr(clip.model, "logit_bias", None) is None:
            clip = _with_bias(clip)
    else:
        clip = Clip(config.model_config(), preprocess_config(config.image_size))
    if config.patch_dropout:
        clip.set_patch_dropout(config.patch_dropout)
    if config.checkpointing:
        clip.set_grad_checkpointing(True)
    if config.lock:
        clip.lock(config.lock, config.unlocked_groups)
    if config.lora_rank:
        towers = [tower for tower in ("image", "text") if tower != config.lock]
        add_lora(clip, config.lora_rank, config.lora_alpha, towers=towers)
    return clip


def as_built(config: ClipConfig, clip: Clip) -> ClipConfig:
    """The config with the model's own sizes, which are not the preset's when training goes on from given weights."""
    vision, text = clip.model_cfg["vision_cfg"], clip.model_cfg["text_cfg"]
    found = {f"text_{name}": text[name] for name in ("width", "layers", "heads") if name in text}
    found["context_length"] = text.get("context_length", 77)
    return replace(
        config,
        vision={name: value for name, value in vision.items() if name not in ("image_size", "patch_dropout")},
        image_size=clip.image_size,
        embed_dim=clip.embed_dim,
        **found,
    )


def _with_bias(clip: Clip) -> Clip:
    """The same weights, and SigLIP's bias and temperature as at its start."""
    made = Clip({**clip.model_cfg, **SIGMOID_START}, clip.preprocess_cfg)
    kept = {n: t for n, t in clip.state_dict().items() if n != "model.logit_scale"}
    made.load_state_dict(kept, strict=False)
    made.fingerprint = clip.fingerprint
    return made


class Watched:
    """An objective whose rows a Watcher looks at now and then; its numbers are logged, its warnings passed on."""

    def __init__(
        self,
        objective: ClipObjective,
        feed: Feed,
        watcher: Watcher,
        log_every: int,
        on_warning: Callable[[str], None],
    ) -> None:
        """log_every: steps between lines of the log."""
        self.objective, self.feed, self.watcher = objective, feed, watcher
        self.log_every, self.on_warning = log_every, on_warning
        self.rows = objective.rows
        self._step = 0
        self._seen: dict[str, float] = {}

    def batches(self, start_step: int) -> Iterator[Batch]:
        """The feed's batches, while their step is noted."""
        for step, batch in enumerate(self.feed(start_step), start_step):
            self._step = step
            yield batch

    def loss(self, rows: tuple[torch.Tensor, ...], batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
        """The objective's; every rank looks at its own rows, the main one's numbers and warnings are shown."""
        loss, numbers = self.objective.loss(rows, batch)
        image, text = self.objective.last_rows
        self.watcher.begin(image, text)
        own, d = loss.detach(), self.objective.distill
        if d == 1:  # imitation alone knows no chance level
            return loss, numbers
        if d:
            own = (own - d * numbers["distill"]) / (1 - d)
        ids = batch["group"], batch["caption"]
        seen, warnings = self.watcher(self._step, own, numbers["scale"], image, text, chance=numbers["chance"], ids=ids)
        if ranks.is_main():
            for line in warnings:
                self.on_warning(line)
        self._seen = seen or self._seen
        if (self._step + 1) % self.log_every == 0:  # this step gets a line: what was seen goes into it, once
            numbers, self._seen = numbers | self._seen, {}
        return loss, numbers


def _watcher(clip: Clip, config: ClipConfig, fit_config: FitConfig) -> Watcher:
    copied = fit_config.parallel == "fsdp" and ranks.world_size() > 1  # then the weights of this one stand still
    return Watcher(
        fit_config.batch_size,
        kind=config.loss,
        warmup=int(fit_config.warmup * fit_config.steps),
        lr=fit_config.lr,
        clip=None if copied else clip,
        trained=bool(config.init),
        every=max(1, config.watch_every),
    )


def _last(metrics: Path, prefix: str) -> dict[str, float]:
    """The numbers whose names begin so, of the last line of metrics.jsonl that has some."""
    for line in reversed(metrics.read_text().splitlines()):
        found = {name: value for name, value in json.loads(line).items() if name.startswith(prefix)}
        if found:
            return found
    return {}


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a training is checked on now and then: shards that it does not see."""

    shards: str | Path
    classnames: Sequence[str] | None = None  # for zero-shot; None: the labels, where they can serve
    templates: Sequence[str] = zeroshot.TEMPLATES


def train_clip(
    shards: str | Path | Sequence[str | Path],
    out: str | Path,
    config: ClipConfig,
    fit_config: FitConfig,
    *,
    weights: Sequence[float] = (),
    kept: Kept | None = None,
    track: Sequence[str] = (),
    allow_http: bool = False,
    device: str = "auto",
    on_progress: Progress | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Manifest:
    """Train a CLIP on tar shards and write a clip/ folder; run again to resume, or to find it done.

    shards: one source or several, here or remote (see stream.py); weights: their shares of each batch, without them all
    are one set. kept: what to validate on, every fit_config.validate_every steps and at the end. track: names for
    track.open_trackers. on_warning gets a line for each thing that looks wrong (see check.py and watch.py).
    Raises UserError on unusable input.
    """
    place = ranks.start(device)
    if place.type == "cpu":
        keep_freed_memory()
    sources = open_sources([shards] if isinstance(shards, str | Path) else list(shards), weights, allow_http)
    inputs = {"shards": as_input(sources)}
    teacher = Clip.pretrained(config.teacher) if config.teacher else None
    clip = build(config, fit_config.seed) if config.init else None
    settings = config_to_json(as_built(config, clip) if clip else config) | {"fit": config_to_json(fit_config)}
    if len(sources) > 1:
        settings["mix"] = list(weights)
    for name, spec, found in (("init", config.init, clip), ("teacher", config.teacher, teacher)):
        if spec and found.fingerprint:
            inputs[name] = Input(found.fingerprint, spec)
    work = ranks.open_workspace(out, "clip", settings, inputs)
    if work.done:
        return work.done

    clip = clip or build(config, fit_config.seed)
    warn = on_warning or (lambda line: None)
    for source, weight in zip(sources, weights or [1.0], strict=True):
        share = int(fit_config.batch_size * weight / sum(weights or [1.0]))
        for line in quick_check(source.samples or source.spec, batch_size=share, ranks=ranks.world_size()):
            warn(line)
    per_rank = fit_config.batch_size // ranks.world_size()
    if per_rank < 2:
        raise UserError(f"batch_size {fit_config.batch_size} leaves fewer than 2 pairs to tell apart; raise it")
    objective = ClipObjective(
        loss=config.loss,
        augment=config.augment,
        teacher=teacher,
        distill=config.distill,
        smoothing=config.smoothing,
    )
    validation = None
    if kept:
        names, said = kept.classnames, kept.templates
        validation = Validation(kept.shards, clip, label_field=config.label_field, classnames=names, templates=said)
    trackers = open_trackers(track if ranks.is_main() else (), work.path, settings)
    feed = Feed(
        sources,
        clip,
        work.path,
        batch_size=per_rank,
        seed=fit_config.seed,
        weights=weights,
        label_field=config.label_field,
        caption_mix=config.caption_mix,
        workers=config.workers,
        cache_gb=config.cache_gb,
        shuffle=config.shuffle,
        skip_broken=config.skip_broken,
        allow_http=allow_http,
        on_progress=on_progress,
    )
    watched = Watched(objective, feed, _watcher(clip, config, fit_config), fit_config.log_every, warn)

    def show(entry: dict[str, float]) -> None:
        trackers(entry)
        if any(name.startswith("val_") for name in entry):
            curves(work.path)

    with trackers:
        result = fit(
            clip,
            watched.batches if config.watch_every else feed,
            watched if config.watch_every else objective,
            fit_config,
            work.path,
            device=place,
            on_progress=on_progress,
            after_step=clip.clamp_temperature,
            lr_scales=clip.lr_scales(config.layer_decay) if config.layer_decay < 1 else None,
            on_log=show,
            validate=(lambda model, step: validation(model)) if validation else None,
            on_warning=warn,
        )
    manifest, (count, first, broken) = None, feed.trouble()
    if ranks.is_main():
        if result.averaged:
            clip.load_state_dict(result.averaged)
        merge_lora(clip)
        clip.save(work.path)
        curves(work.path)
        for url, why in broken:
            warn(f"{url} was passed over: {why}")
        summary = {
            "steps": result.steps,
            "seconds": result.seconds,
            "loss": result.loss,
            "chance": _last(work.path / "metrics.jsonl", "chance").get("chance"),
            "pairs": feed.pairs,
            "pairs_seen": result.steps * fit_config.batch_size,
            "bad_pictures": count,
            "bad_first": first,
            "validation": _last(work.path / "metrics.jsonl", "val_"),
        }
        manifest = work.publish(summary)
    return ranks.broadcast(manifest)
