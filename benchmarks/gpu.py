"""Training samples/s with their share of the device's matrix rate (MFU), and sampling images/s, in one table.

    python benchmarks/gpu.py [--device cuda] [--clip small --clip vit-b-32] [--prior small] [--decoder small] \\
        [--steps 60] [--pictures 4096] [--work DIR]

For one GPU; `--device cpu --clip tiny --prior tiny --decoder tiny --steps 12 --pictures 256` tries it out anywhere.
Needs neither network nor data: the pictures are noise with a grain, their captions numbers. All three trainings are
the commands' own functions, so their rates hold everything that a step costs: loading, augmenting, optimizer, average
of the weights. A rate is that of the median step of the last two thirds; MFU = rate x training FLOPs of a sample
(3 x forward, counted by torch) / the rate of a large matrix product in bf16, timed in the same run.
"""

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.pop(0)  # this folder: a benchmark beside this one has the name of the package

from clip_train import presets, train  # noqa: E402
from clip_train.embed import embed  # noqa: E402
from clip_train.estimate import count_flops, matmul_rate  # noqa: E402
from clip_train.ingest import shard_source  # noqa: E402
from clip_train.model import Clip  # noqa: E402
from clip_train.precision import resolved_precision  # noqa: E402
from diffusion.generate import Generator, Sampling  # noqa: E402
from diffusion.prior import text_cond  # noqa: E402
from diffusion.train_decoder import DECODER_PRESETS, train_decoder  # noqa: E402
from diffusion.train_prior import PRIOR_PRESETS, train_prior  # noqa: E402
from diffusion.trained import load_decoder, load_prior, settings  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--clip", action="append", help="presets of CLIP, each measured; the first serves the rest")
    parser.add_argument("--prior", default="small")
    parser.add_argument("--decoder", default="small")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pictures", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, help="of CLIP; by default the preset's, at most the pictures")
    parser.add_argument("--work", type=Path, help="folder to keep what was trained; a temporary one by default")
    options = parser.parse_args()
    device = torch.device(options.device)
    work = options.work or Path(tempfile.mkdtemp(prefix="unclip-gpu-"))
    peak = matmul_rate(device, resolved_precision("auto", device))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}; matrix product {peak / 1e12:.2f} TFLOP/s\n")
    print("| what | batch | GFLOP a sample | samples/s | MFU |\n|---|---|---|---|---|", flush=True)

    shards = work / "shards"
    if not shards.exists():
        made_up(work / "pictures", options.pictures)
        shard_source(work / "pictures", shards)
    for preset in options.clip or ["small", "vit-b-32"]:
        _, fit = presets.preset(preset)
        batch = min(options.batch_size or fit.batch_size, options.pictures)
        pairs = ["minutes=0", f"steps={options.steps}", f"batch_size={batch}", "watch_every=0", "accumulate=1"]
        rate = timed(
            lambda tell, preset=preset, pairs=pairs: train.train_clip(
                shards, work / preset, *presets.preset(preset, pairs), device=device, on_progress=tell
            )
        )
        counted = count_flops(Clip.load(work / preset))
        row(f"train clip, {preset}", batch, 3 * (counted["image"] + counted["text"]), rate * batch, peak)
    clip = work / (options.clip or ["small"])[0]

    embed(shards, clip, work / "emb", device=str(device))
    config, fit = settings(PRIOR_PRESETS, options.prior, ["minutes=0", f"steps={options.steps}"])
    rate = timed(lambda tell: train_prior(work / "emb", work / "prior", config, fit, device=device, on_progress=tell))
    prior = load_prior(work / "prior")[0]
    text = torch.nn.functional.normalize(torch.randn(2, prior.config.embed_dim), dim=-1)
    flops = flops_of(lambda: prior(torch.randn_like(text), torch.ones(2), text_cond(text))) / 2
    row(f"train prior, {options.prior}", fit.batch_size, 3 * flops, rate * fit.batch_size, peak)

    config, fit = settings(DECODER_PRESETS, options.decoder, ["minutes=0", f"steps={options.steps}"])
    rate = timed(
        lambda tell: train_decoder(shards, clip, work / "decoder", config, fit, device=device, on_progress=tell)
    )
    decoder = load_decoder(work / "decoder")[0]
    generator = Generator(None, None, decoder)
    rows = torch.nn.functional.normalize(torch.randn(2, decoder.config.embed_dim), dim=-1)
    size = decoder.config.image_size
    follow = Sampling(guidance=1.0, clamp=1.0)
    denoise = generator.denoise(rows, None, follow)
    flops = flops_of(lambda: denoise(torch.randn(2, 3, size, size), torch.ones(2))) / 2
    row(f"train decoder, {options.decoder}", fit.batch_size, 3 * flops, rate * fit.batch_size, peak)

    count = 256 if device.type == "cuda" else 32
    rows = torch.nn.functional.normalize(torch.randn(count, decoder.config.embed_dim), dim=-1)
    for compiled in (False, True) if device.type == "cuda" else (False,):
        generator = Generator.open(work / "decoder", clip=clip, device=device, compile=compiled)
        for sampler, steps, calls in (("heun", 18, 35), ("dpmpp_2m", 16, 16), ("ddim", 50, 50)):
            for precision in ("fp32", "bf16"):
                how = Sampling(sampler=sampler, steps=steps, precision=precision)
                seconds = []
                for _ in range(3):
                    began = time.monotonic()
                    generator.from_embeddings(rows, how=how, batch_size=count)
                    seconds.append(time.monotonic() - began)
                words = f"sample {sampler} {steps}, guidance 2, {precision}{', compiled' if compiled else ''}"
                row(words, count, 2 * calls * flops, count / min(seconds), peak)
    if device.type == "cuda":
        print(f"\npeak memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB; kept in {work}")


def made_up(folder: Path, count: int) -> None:
    """`count` PNGs of 96 px, noise of several grains, each with a caption beside it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        grain = int(rng.choice([2, 4, 8]))
        small = rng.integers(0, 256, (96 // grain, 96 // grain, 3), dtype=np.uint8)
        Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC).save(folder / f"{i:06d}.png")
        (folder / f"{i:06d}.txt").write_text(f"picture {i} of grain {grain}")


def timed(work: Callable) -> float:
    """Steps a second of a training that is handed its on_progress: the median of the last two thirds."""
    ticks: list[float] = []

    def tell(done: int, total: int, **numbers: object) -> None:
        if "loss" in numbers:  # an optimizer step; its loss has been read, so a GPU has finished
            ticks.append(time.monotonic())

    work(tell)
    return 1 / float(np.median(np.diff(ticks)[len(ticks) // 3 :]))


def flops_of(work: Callable) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def row(what: str, batch: int, flops: float, rate: float, peak: float) -> None:
    print(f"| {what} | {batch} | {flops / 1e9:.2f} | {rate:.1f} | {rate * flops / peak:.1%} |", flush=True)


if __name__ == "__main__":
    main()
