"""Where the time of CLIP training goes on this machine, with these shards: each stage timed by itself."""

import itertools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_train.captions import text_id
from clip_train.fit import FitConfig, parameter_groups
from clip_train.model import Clip
from clip_train.objective import ClipObjective
from clip_train.pictures import PictureError, decode_picture, training_pixels
from clip_train.precision import autocast
from clip_train.sample import Sample
from clip_train.settings import Progress, UserError
from clip_train.shards import ShardSet
from clip_train.stream import BrokenShard, is_remote, list_urls, read_shard

STAGES = {  # in the order in which a sample goes through them
    "read": "from the shards",
    "decode": "and resize, per picture",
    "tokenise": "per caption; done once and kept, for local shards",
    "move": "pixels and tokens to the device",
    "forward": "augmentation included",
    "backward": "and optimizer",
}
LOADER, STEP = ("read", "decode"), ("move", "forward", "backward")


def bench(
    shards: str | Path,
    clip: Clip,
    *,
    batch_size: int = 128,
    samples: int = 512,
    seconds: float = 10.0,
    device: str | torch.device = "cpu",
    precision: str = "auto",
    augment: float = 1.0,
    cache_gb: float = 2.0,
    allow_http: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Times of each stage of training `clip` on these shards, what takes longest, and what to change about it.

    batch_size: of one device. samples: so many are read, decoded and tokenised, by one thread. seconds: for the steps
    of the model. The shards may be in the machine's memory from an earlier reading: then "read" is not the disk's
    speed. Returns: stages [{"stage", "what", "microseconds", "share"}] per sample of one core or the device; the rates
    that follow; `workers` that would keep the device busy; `bottleneck`; `advice`. UserError: nothing can be used.
    """
    device = torch.device(device)
    local = None if is_remote(shards) else ShardSet(shards)
    microseconds: dict[str, float] = {}
    read = _read_local(local, samples) if local else _read_remote(str(shards), samples, allow_http)
    microseconds["read"], found = read
    microseconds["decode"], pixels = _decode(found, clip.image_size)
    some = [sample.caption for sample in found]
    microseconds["tokenise"] = _timed(lambda: clip.tokenize(some)) / len(some)
    batch = _batch(clip, found, pixels, batch_size)
    microseconds |= _steps(clip, batch, device, precision, augment, seconds, on_progress)
    size = decode_picture(found[0].image).size
    total = len(local) if local else None
    figures = {
        "shards": str(shards),
        "samples": total,
        "picture": f"{size[0]} x {size[1]} {found[0].ext}, {np.mean([len(s.image) for s in found]) / 1e3:.1f} kB",
        "image_size": clip.image_size,
        "short_side": float(np.median([min(decode_picture(s.image).size) for s in found[:32]])),
        "batch_size": batch_size,
        "device": str(device),
        "cores": os.cpu_count() or 1,
        "cached": bool(total and 3 * clip.image_size**2 * total <= cache_gb * 1e9),
    }
    return figures | conclusions(figures, {stage: 1e6 * microseconds[stage] for stage in STAGES})


def conclusions(figures: dict[str, Any], microseconds: dict[str, float]) -> dict[str, Any]:
    """What follows from the microseconds per sample of each stage: rates, bottleneck, workers, advice."""
    loader, step = sum(microseconds[s] for s in LOADER), sum(microseconds[s] for s in STEP)
    counted = {stage: time for stage, time in microseconds.items() if stage != "tokenise" or figures["samples"] is None}
    if figures["samples"] is None:
        loader += microseconds["tokenise"]
    total = sum(counted.values())
    shares = {stage: counted.get(stage, 0.0) / total for stage in microseconds}
    slow = max(shares, key=shares.get)
    made = {
        "stages": [
            {"stage": s, "what": STAGES[s], "microseconds": round(microseconds[s], 1), "share": round(shares[s], 4)}
            for s in STAGES
        ],
        "loader_per_core_second": round(1e6 / loader, 1),
        "model_per_second": round(1e6 / step, 1),
        "workers": 0 if figures["cached"] else math.ceil(loader / step),
        "bottleneck": slow,
        "bottleneck_share": round(shares[slow], 4),
    }
    return made | {"advice": _advice(figures | made, microseconds, loader, step)}


def _advice(figures: dict[str, Any], microseconds: dict[str, float], loader: float, step: float) -> str:
    size, workers, cores = figures["image_size"], figures["workers"], figures["cores"]
    model = f"the model is what takes the time ({1e6 / step:.0f} samples a second): "
    model += "a larger batch, --set compile=true" if figures["device"] != "cpu" else "a GPU"
    model += " or a smaller preset helps; the loader does not matter"
    if figures["cached"]:
        once = figures["samples"] * loader / 1e6
        return (
            f"the pictures fit the cache: they are decoded once, in about {once:.0f} core-seconds; after that {model}"
        )
    if figures["short_side"] >= 2 * size and microseconds["decode"] > microseconds["read"]:
        smaller = (
            f"store the pictures smaller (short side {figures['short_side']:.0f} now): unclip shard --resize {size}"
        )
    elif microseconds["read"] > microseconds["decode"]:
        smaller = "copy the shards to a disk of this machine"
    else:
        smaller = "use a machine with more cores"
    if figures["device"] == "cpu":
        share = loader / (loader + step)
        return model if share < 0.2 else f"loading takes {share:.0%} of the time that the model leaves it: {smaller}"
    if workers > cores:
        return f"the device waits: {workers} workers would feed it, but there are {cores} cores: {smaller}"
    if workers <= 1:
        return model + ", with --set workers=1"
    return f"--set workers={workers} keeps the device busy; with less than that it waits"


# The stages


def _read_local(shards: ShardSet, samples: int) -> tuple[float, list[Sample]]:
    """Seconds per sample, and the samples, from all over the shards in random order, as training reads them."""
    rows = np.random.default_rng(0).permutation(len(shards))[:samples].tolist()
    began = time.perf_counter()
    for row in rows:
        shards.picture(row)
    seconds = (time.perf_counter() - began) / len(rows)
    return seconds, [shards.read(row) for row in rows]


def _read_remote(spec: str, samples: int, allow_http: bool) -> tuple[float, list[Sample]]:
    began, found = time.perf_counter(), []
    try:
        for url in list_urls(spec, allow_http):
            items = read_shard(url)
            found += itertools.islice((s for s in items if isinstance(s, Sample)), samples - len(found))
            items.close()
            if len(found) == samples:
                break
    except (OSError, BrokenShard) as error:
        raise UserError(f"{url} cannot be read: {error}") from error
    if not found:
        raise UserError(f"{spec}: no sample is a picture with a caption; see: unclip data check")
    return (time.perf_counter() - began) / len(found), found


def _decode(samples: list[Sample], size: int) -> tuple[float, torch.Tensor]:
    """Seconds per picture, and the pixels of those that can be decoded."""
    pixels: list[torch.Tensor] = []

    def run() -> None:
        pixels.clear()
        for sample in samples:
            try:
                pixels.append(training_pixels(sample.image, size).contiguous())
            except PictureError as error:
                reasons.append(f"{sample.key}: {error}")

    reasons: list[str] = []
    run_once = _timed(run)
    if not pixels:
        raise UserError(f"none of {len(samples)} pictures can be decoded; the first: {reasons[0]}")
    return run_once / len(samples), torch.stack(pixels)


def _batch(clip: Clip, samples: list[Sample], pixels: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    """A batch of these pictures and captions, as often as it takes."""
    captions = [sample.caption for sample in itertools.islice(itertools.cycle(samples), size)]
    ids = torch.tensor([text_id(caption) for caption in captions])
    rows = torch.arange(size) % len(pixels)
    return {"pixels": pixels[rows], "tokens": clip.tokenize(captions), "caption": ids, "group": ids}


def _steps(
    clip: Clip,
    batch: dict[str, torch.Tensor],
    device: torch.device,
    precision: str,
    augment: float,
    seconds: float,
    on_progress: Progress | None,
) -> dict[str, float]:
    """Seconds per sample of moving, forward and backward: medians of as many steps as fit into `seconds`, 3 at least.

    The learning rate is 0; only running statistics of `clip`, such as those of batch normalisation, change.
    """
    config = FitConfig(steps=1)
    clip.to(device).train()
    if not any(p.requires_grad for p in clip.parameters()):  # it was loaded for use
        clip.requires_grad_(True)
    groups = parameter_groups(clip, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), fused=True)
    objective = ClipObjective(loss="infonce", augment=augment)
    rng = torch.Generator(device).manual_seed(0)
    taken: list[tuple[float, float, float]] = []
    began = time.perf_counter()
    while len(taken) < 5 or time.perf_counter() - began < seconds:
        marks = [_now(device)]
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        marks.append(_now(device))
        with autocast(precision, device):
            loss, _ = objective.loss(objective.rows(clip, moved, rng), moved)
        marks.append(_now(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(_now(device))
        taken.append(tuple(np.diff(marks).tolist()))
        if on_progress and time.perf_counter() - began < seconds:
            on_progress(round(time.perf_counter() - began, 1), seconds)
    if on_progress:
        on_progress(seconds, seconds)
    middle = np.median(taken[2:], axis=0) / len(batch["pixels"])  # the first two warm up
    return dict(zip(STEP, middle.tolist(), strict=True))


def _timed(run: Callable[[], object]) -> float:
    """Seconds of this core that a run takes: the second one, when everything is loaded and warm."""
    for _ in range(2):
        began = time.thread_time()
        run()
        seconds = time.thread_time() - began
    return seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
