"""Which network draws best after equal computing: the decoder's networks beside each other, in one table.

    python benchmarks/decoder_networks.py --train 'D/train-*.tar' --test seen='D/seen-*.tar' --test val='D/val-*.tar' \\
        --clip clip --core-minutes 8 --work networks [--network hybrid-2 ...] [--set sigma_mean=-0.4]

Each trains on one thread and stops after the same CPU time; the learning rate falls with the share of that time that is
used up, so every network gets a whole schedule. Then it draws pictures for true embeddings it was not trained on.
Reported: images per core-second in training; loss on held-out pictures at four noise levels, the same pictures and
noise for all (and five times on the way, to stderr, in time that does not count); kernel distance x 1000 of the CLIP's
embeddings of drawn and real pictures; round trip (rank of the right label among all pictures of the split); roughness,
the mean difference of neighbouring pixels, as a share of the real pictures' (below 1 they are blurred). Prints a row of
a markdown table for each and writes a sheet of each, work/NAME.png: real and drawn pictures in turn.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.pop(0)  # this folder: a benchmark beside this one has the name of the package

from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from clip_train.ema import Average  # noqa: E402
from clip_train.fit import autocast, parameter_groups  # noqa: E402
from clip_train.model import Clip  # noqa: E402
from clip_train.pictures import Pictures  # noqa: E402
from clip_train.settings import override  # noqa: E402
from clip_train.shards import ShardSet  # noqa: E402
from clip_train.sheet import contact_sheet  # noqa: E402
from clip_train.tensors import save_tensors  # noqa: E402
from diffusion.decoder import DecoderConfig, DecoderDenoiser, drop_some, noised, null_cond, picture_cond  # noqa: E402
from diffusion.denoiser import denoising_loss, loss_weight  # noqa: E402
from diffusion.evaluate import embed_pictures, round_trip  # noqa: E402
from diffusion.guidance import clamped, classifier_free  # noqa: E402
from diffusion.pairs import shuffled  # noqa: E402
from diffusion.ridge import ridge_regression  # noqa: E402
from diffusion.samplers import SampleNoise, sample  # noqa: E402
from diffusion.schedule import karras_sigmas, stratified  # noqa: E402
from diffusion.trained import density_of  # noqa: E402

CPU = torch.device("cpu")
NETWORKS: dict[str, dict[str, Any]] = {
    "hybrid-2": {"patch": 2, "widths": (64, 128, 256), "blocks": (1, 2, 2), "attention": (8,)},
    "hybrid-4": {"patch": 4, "widths": (192, 320), "blocks": (2, 2), "attention": (16, 8)},
    "unet-1": {"network": "unet", "patch": 1, "widths": (32, 64, 128, 256), "blocks": (1, 1, 2, 2), "attention": (8,)},
    "uvit-2": {"network": "uvit", "patch": 2, "widths": (64, 128, 256), "blocks": (1, 1, 4), "attention": ()},
    "dit-4": {"network": "dit", "patch": 4, "widths": (256,), "blocks": (5,), "attention": (16,)},
    "dit-8": {"network": "dit", "patch": 8, "widths": (384,), "blocks": (6,), "attention": (8,)},
}
COMMON = {"image_size": 64, "embed_dim": 512, "head_width": 32, "cond_width": 256}
RECIPE = {"batch": 16, "lr": 2e-3, "ema": 0.995, "seed": 0}
LEVELS = (0.05, 0.2, 0.8, 3.0)  # sigmas of the held-out losses
SHOWN = 96  # pictures drawn of each split
GUIDANCE = (1.0,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", action="append", required=True, metavar="NAME=SHARDS")
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--core-minutes", type=float, default=8.0)
    parser.add_argument("--network", action="append", choices=NETWORKS)
    parser.add_argument("--set", dest="settings", action="append", default=[], help="of the decoder, for all networks")
    parser.add_argument("--recipe", default="{}", help=f"json, over {json.dumps(RECIPE)}")
    parser.add_argument("--tag", default="", help="after the names of what is written")
    parser.add_argument("--guidance", type=float, action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    clip = Clip.load(options.clip)
    data = {"train": split(options.train, clip, options.work / "train.npz")}
    for test in options.test:
        name, _, spec = test.partition("=")
        data[name] = split(spec, clip, options.work / f"{name}.npz")
    recipe = RECIPE | json.loads(options.recipe)
    names = [name for name in data if name != "train"]
    columns = ["network", "M", "img/core-s", "steps", f"loss at {LEVELS}", "guidance", "kernel x 1000", "roughness"]
    columns += [f"{name} top-{n}" for name in names for n in (1, 10)] + ["img/core-s drawn"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for name in options.network or NETWORKS:
        config = DecoderConfig(**COMMON | NETWORKS[name])
        [config] = override([config], options.settings)
        denoiser, facts = trained(config, data, recipe, options.core_minutes * 60)
        name += options.tag
        save_tensors(options.work / f"{name}.safetensors", denoiser.state_dict())
        for guidance in options.guidance or GUIDANCE:
            row = [name, *facts, f"{guidance:g}", *judged(denoiser, clip, data, guidance, options.work, name)]
            print(f"| {' | '.join(row)} |", flush=True)


def split(spec: str, clip: Clip, cache: Path) -> dict[str, Any]:
    """Pictures (N, 3, 64, 64) uint8, their embeddings (N, D) and labels; kept in `cache`."""
    if not cache.exists():
        samples = ShardSet(spec)
        small, rows = Pictures(samples, clip.image_size).load(np.arange(len(samples)))
        pixels, _ = Pictures(samples, COMMON["image_size"]).load(rows)
        image = torch.cat([clip.encode_image(some) for some in small.split(256)])
        labels = [samples.label(row) or samples.captions(row)[0] for row in rows.tolist()]
        np.savez(cache, x=pixels.numpy(), i=image.numpy(), label=np.array(labels))
    kept = np.load(cache)
    return {"x": torch.from_numpy(kept["x"]), "i": torch.from_numpy(kept["i"]), "label": kept["label"]}


def trained(
    config: DecoderConfig, data: dict[str, Any], recipe: dict[str, Any], budget: float
) -> tuple[DecoderDenoiser, list[str]]:
    """A decoder trained for `budget` CPU seconds, with its averaged weights."""
    pixels, image = data["train"]["x"], data["train"]["i"]
    small = torch.nn.functional.interpolate(pixels.float() / 127.5 - 1, config.guess_size, mode="area").flatten(1)
    linear = ridge_regression([(image, small)])
    moved = config.sigma_mean + math.log(linear.spread / config.sigma_data)
    config = replace(config, sigma_data=linear.spread, sigma_mean=moved)
    torch.manual_seed(recipe["seed"])
    denoiser = DecoderDenoiser(config).train()
    denoiser.network.linear.take(linear)
    if config.noise_image:
        denoiser.network.wiener.take([image], linear.penalty)
    density, batch = density_of(config), recipe["batch"]
    optimizer = torch.optim.AdamW(parameter_groups(denoiser, 0.01), lr=1.0, betas=(0.9, 0.98), fused=True)
    average = Average(denoiser, recipe["ema"])
    began, step, used, told = time.process_time(), 0, 0.0, 0
    while used < 1:
        if used * 6 >= told:  # how it goes on, to look at; not counted
            paused, told = time.process_time(), told + 1
            with average.in_place_of_weights(denoiser):
                losses = held_out_losses(denoiser.eval(), data)
            denoiser.train()
            print(f"{used:.2f} {step} {losses}", file=sys.stderr, flush=True)
            began += time.process_time() - paused
        shape = min(1.0, used / 0.05 + 0.01) * (0.01 + 0.99 * (1 + math.cos(math.pi * used)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = recipe["lr"] * shape
        some = shuffled(step * batch, batch, len(pixels), recipe["seed"])
        rng = torch.Generator().manual_seed(step)
        with autocast("auto", CPU):
            x0, rows, levels = pixels[some].float() / 127.5 - 1, image[some], torch.zeros(batch)
            if config.noise_image:
                levels = config.noise_image * stratified(batch, rng) ** 2
                rows = noised(rows, levels, torch.randn(rows.shape, generator=rng))
            cond = drop_some(picture_cond(rows, image_noise=levels), config, rng)
            sigma = density(stratified(batch, rng))
            noise = torch.randn(x0.shape, generator=rng)
            weight = loss_weight(denoiser.scaling, sigma, config.weighting)
            loss = denoising_loss(denoiser, x0, cond, sigma, noise, weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        average.update(denoiser, step)
        used = (time.process_time() - began) / budget
    denoiser.load_state_dict(average.tensors)
    millions = sum(p.numel() for p in denoiser.parameters()) / 1e6
    denoiser.eval()
    losses = held_out_losses(denoiser, data)
    return denoiser, [f"{millions:.1f}", f"{step * batch / budget:.1f}", str(step), losses]


@torch.no_grad()
def held_out_losses(denoiser: DecoderDenoiser, data: dict[str, Any], count: int = 48) -> str:
    """Denoising loss at each of LEVELS on pictures of the test splits, the same and with the same noise for all."""
    rng, losses = torch.Generator().manual_seed(1), []
    for level in LEVELS:
        total = 0.0
        tests = [part for name, part in data.items() if name != "train"]
        for part in tests:
            x0, sigma = part["x"][:count].float() / 127.5 - 1, torch.full((count,), level)
            noise, weight = torch.randn(x0.shape, generator=rng), denoiser.scaling.weight(sigma)
            with autocast("auto", CPU):
                total += float(denoising_loss(denoiser, x0, picture_cond(part["i"][:count]), sigma, noise, weight))
        losses.append(f"{total / len(tests):.3f}")
    return " / ".join(losses)


def judged(
    denoiser: DecoderDenoiser, clip: Clip, data: dict[str, Any], guidance: float, work: Path, name: str
) -> list[str]:
    """Kernel distance, roughness, round trips and speed of SHOWN drawn pictures of each test split; writes a sheet."""
    made, real, trips, spent, shown = [], [], [], 0.0, []
    for split_name in [n for n in data if n != "train"]:
        part = data[split_name]
        picked = np.random.default_rng(0).choice(len(part["x"]), SHOWN, replace=False)
        began = time.process_time()
        drawn = draw(denoiser, part["i"][picked], guidance)
        spent += time.process_time() - began
        pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in drawn]
        seen = embed_pictures(clip, pictures)
        groups = np.unique(part["label"], return_inverse=True)[1]
        trip = round_trip(seen, picked, part["i"].numpy(), groups)
        trips += [f"{trip['top1']:.2f}", f"{trip['top10']:.2f}"]
        made.append((seen, roughness(drawn)))
        rest = np.random.default_rng(1).choice(len(part["x"]), 4 * SHOWN, replace=False)
        real.append((part["i"][rest].numpy(), roughness(part["x"][picked])))
        for place, picture in zip(picked[:32], pictures, strict=False):
            shown += [Image.fromarray(part["x"][place].permute(1, 2, 0).numpy()), picture]
    contact_sheet(shown, None, 16, cell=64).save(work / f"{name}-{guidance:g}.png")
    distance = kernel(np.concatenate([m for m, _ in made]), np.concatenate([r for r, _ in real]))
    rough = np.mean([m for _, m in made]) / np.mean([r for _, r in real])
    return [f"{1000 * distance:.1f}", f"{rough:.2f}", *trips, f"{SHOWN * len(made) / spent:.1f}"]


@torch.no_grad()
def draw(denoiser: DecoderDenoiser, rows: Tensor, guidance: float, steps: int = 8) -> Tensor:
    """(N, D) -> pictures (N, 3, 64, 64) uint8; picture i has seed i."""
    out = []
    for start in range(0, len(rows), 32):
        some = rows[start : start + 32]
        cond = picture_cond(some)
        denoise = clamped(classifier_free(denoiser, cond, null_cond(cond), guidance))
        noise = SampleNoise(range(start, start + len(some)), (3, 64, 64), stream=1)
        sigmas = karras_sigmas(steps, 0.01, 20.0)
        with autocast("auto", CPU):
            begin = denoiser.network.guess(cond).float() + sigmas[0] * noise()
            x0 = sample("heun", denoise, sigmas, noise, start=begin)
        out.append(((x0.clamp(-1, 1) + 1) * 127.5).round().byte())
    return torch.cat(out)


def kernel(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared distance of two sets of unit rows under the kernel (1 + cosine)^3 (KID, arXiv 1801.01401)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    inner = [(1 + one @ other.T) ** 3 for one, other in ((a, a), (b, b), (a, b))]
    own = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in inner[:2]]
    return float(sum(own) - 2 * inner[2].mean())


def roughness(pixels: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels."""
    x = pixels.float()
    return float(((x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()) / 2)


if __name__ == "__main__":
    main()
