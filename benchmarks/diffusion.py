"""The decoder beside DALLE2-pytorch, denoising-diffusion-pytorch and diffusers' UNet2DConditionModel, on one thread.

    python benchmarks/diffusion.py speed    --decoder-preset laptop
    python benchmarks/diffusion.py quality  --train 'D/train-*.tar' --embeddings emb --test-embeddings val --clip c \\
        --out work --core-minutes 8 [--net dalle2]
    python benchmarks/diffusion.py distance --test 'D/val-*.tar' --test-embeddings val --clip c --out work
    python benchmarks/diffusion.py samplers --decoder decoder --test 'D/val-*.tar' --test-embeddings val --clip clip

Run it with a python that has unclip and the peers (`pip install --no-deps dalle2-pytorch denoising-diffusion-pytorch
diffusers`, and what they then miss). All at 64 px; the peers' widths are such that a picture costs about as many
operations forward as in ours. Time is CPU time of one thread, so that what else the machine does decides little.

speed: training steps (forward, backward, AdamW) and DDIM at batch 16, fp32 and bf16, in turns; medians.
quality: trains one network for a budget of CPU time through the same loop (fit.py: batch, AdamW, cosine, clipping, EMA,
bf16), then draws pictures for held-out embeddings, all with the same sampler. DALLE2-pytorch and denoising-diffusion-
pytorch bring a diffusion process of their own (schedule, parametrisation, loss) and keep it; diffusers' network brings
none and gets EDM's. denoising-diffusion-pytorch's network cannot see an embedding and draws unconditionally.
distance: kernel distance of what each drew to held-out pictures, by two feature extractors, with intervals.
samplers: kernel distance of a trained decoder's pictures by DDIM in 50 steps and by higher orders in fewer.

Each prints a markdown table; quality and distance can be called for one network after the other.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

sys.path.pop(0)  # this folder: this file has the name of the package

from clip_train.fit import Batch, FitConfig, autocast, fit  # noqa: E402
from clip_train.folder import Manifest  # noqa: E402
from clip_train.pictures import Batches, Pictures  # noqa: E402
from clip_train.shards import ShardSet  # noqa: E402
from clip_train.sheet import contact_sheet  # noqa: E402
from clip_train.store import EmbeddingStore  # noqa: E402
from clip_train.tensors import load_tensors, save_tensors  # noqa: E402
from diffusion import picture_feed, train_decoder  # noqa: E402
from diffusion.decoder import DecoderConfig, DecoderDenoiser, drop_some, picture_cond  # noqa: E402
from diffusion.denoiser import Cond, Denoiser, Scaling, denoising_loss  # noqa: E402
from diffusion.distances import figure_of, kernel  # noqa: E402
from diffusion.features import open_features  # noqa: E402
from diffusion.generate import Generator, Sampling, to_pixels  # noqa: E402
from diffusion.guidance import clamped  # noqa: E402
from diffusion.samplers import SAMPLERS, SampleNoise, sample, sample_ddim  # noqa: E402
from diffusion.schedule import karras_sigmas, log_normal_sigma, stratified  # noqa: E402
from diffusion.train_decoder import DECODER_PRESETS  # noqa: E402

SIZE, WIDE, BATCH = 64, 512, 16  # pixels a side, width of the embedding, pictures a step
CAPTION = 12  # tokens of a caption, for networks that look at text
FIT = FitConfig(steps=1, batch_size=BATCH, lr=1e-3, weight_decay=0.01, beta2=0.99, ema=0.99, precision="bf16")


class Peer(nn.Module):
    """A peer's network with a diffusion process. loss(): of a batch; denoised(): a Denoiser's forward."""

    conditional = True

    def forward(self, x0: Tensor, image: Tensor, rng: torch.Generator) -> Tensor:
        """x0: (B, 3, S, S) in [-1, 1]; image: (B, D) unit rows. Returns the scalar that the peer trains on."""
        raise NotImplementedError

    def denoised(self, x: Tensor, sigma: Tensor, image: Tensor) -> Tensor:
        raise NotImplementedError

    def bare(self, x: Tensor, image: Tensor) -> Tensor:
        """One call of the network, for timing."""
        raise NotImplementedError

    def grid(self, sigmas: Tensor) -> Tensor:
        """The levels the network knows that are nearest to these."""
        return sigmas


class Stepped(Peer):
    """One that knows 1000 levels of a variance-preserving process."""

    levels: Tensor  # (1000,): sigma of each

    def nearest(self, sigma: Tensor) -> Tensor:
        return (sigma.log()[:, None] - self.levels.log()[None]).abs().argmin(1)

    def grid(self, sigmas: Tensor) -> Tensor:
        known = self.levels[self.nearest(sigmas[:-1])]
        return torch.cat([torch.unique(known).flip(0), sigmas[-1:]])


class Dalle2(Stepped):
    """DALLE2-pytorch's Unet in its Decoder: cosine schedule, eps and learned variance."""

    name = "DALLE2-pytorch Unet dim 32"

    def __init__(self) -> None:
        from dalle2_pytorch import Decoder, Unet

        super().__init__()
        unet = Unet(dim=32, image_embed_dim=WIDE, cond_dim=128, channels=3, dim_mults=(1, 2, 4, 8))
        self.whole = Decoder(unet=(unet,), image_size=SIZE, timesteps=1000)
        self.unet = self.whole.unets[0]
        self.unet.register_forward_hook(lambda module, inputs, out: out.float())  # its loss takes logarithms
        bars = self.whole.noise_schedulers[0].alphas_cumprod.double()
        self.levels = ((1 - bars) / bars).sqrt().float()

    def forward(self, x0, image, rng):
        return self.whole((x0 + 1) / 2, image_embed=image, unet_number=1)

    def denoised(self, x, sigma, image):
        scaled = x / (1 + sigma**2).sqrt()[:, None, None, None]
        eps = self.unet(scaled, self.nearest(sigma), image_embed=image)[:, :3]
        return x - sigma[:, None, None, None] * eps

    def bare(self, x, image):
        return self.unet(x, torch.full((len(x),), 500), image_embed=image)


class Lucidrains(Stepped):
    """denoising-diffusion-pytorch's Unet in its GaussianDiffusion: sigmoid schedule, v."""

    name = "denoising-diffusion-pytorch Unet dim 32"
    conditional = False

    def __init__(self) -> None:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet

        super().__init__()
        unet = Unet(dim=32, dim_mults=(1, 2, 4, 8), flash_attn=False)
        self.whole = GaussianDiffusion(unet, image_size=SIZE, timesteps=1000)
        bars = self.whole.alphas_cumprod.double()
        self.levels = ((1 - bars) / bars).sqrt().float()

    def forward(self, x0, image, rng):
        return self.whole((x0 + 1) / 2)

    def denoised(self, x, sigma, image):
        level = self.nearest(sigma)
        scaled = x / (1 + sigma**2).sqrt()[:, None, None, None]
        return self.whole.predict_start_from_v(scaled, level, self.whole.model(scaled, level).float())

    def bare(self, x, image):
        return self.whole.model(x, torch.full((len(x),), 500))


class Diffusers(Peer):
    """diffusers' UNet2DConditionModel, the embedding as its one token, in EDM's preconditioning and loss."""

    name = "diffusers UNet2DConditionModel 32-144"

    class Network(nn.Module):
        def __init__(self) -> None:
            from diffusers import UNet2DConditionModel

            super().__init__()
            self.unet = UNet2DConditionModel(
                sample_size=SIZE,
                layers_per_block=2,
                in_channels=3,
                out_channels=3,
                block_out_channels=(32, 64, 96, 144),
                down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
                cross_attention_dim=WIDE,
                attention_head_dim=4,
                norm_num_groups=16,
            )

        def forward(self, x: Tensor, noise_level: Tensor, cond: dict) -> Tensor:
            time = 250 * (noise_level + 2)  # onto the scale of 0 to 1000 that its embedding of time is made for
            return self.unet(x, time, encoder_hidden_states=WIDE**0.5 * cond["image"][:, None]).sample

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = Denoiser(self.Network(), Scaling("edm", 0.5))

    def forward(self, x0, image, rng):
        dropped = torch.rand(len(x0), generator=rng) < 0.1
        cond = {"image": image.masked_fill(dropped[:, None], 0.0)}
        sigma = log_normal_sigma(stratified(len(x0), rng))
        noise = torch.randn(x0.shape, generator=rng)
        return denoising_loss(self.denoiser, x0, cond, sigma, noise, self.denoiser.scaling.weight(sigma))

    def denoised(self, x, sigma, image):
        return self.denoiser(x, sigma, {"image": image})

    def bare(self, x, image):
        return self.denoiser.network(x, torch.zeros(len(x)), {"image": image})


class Ours(Peer):
    """Our decoder of a preset, with its own loss; for one that looks at text, with the states of a caption's tokens."""

    def __init__(self, preset: str) -> None:
        super().__init__()
        self.name = f"unclip decoder, preset {preset}"
        config = replace(decoder_config(preset), embed_dim=WIDE, align=0.0)
        self.config = replace(config, text_width=256) if config.text else config
        self.denoiser = DecoderDenoiser(self.config)

    def cond(self, image: Tensor) -> Cond:
        if not self.config.text:
            return picture_cond(image)
        states = torch.ones(len(image), CAPTION, self.config.text_width)
        return picture_cond(image, states, torch.ones(len(image), CAPTION, dtype=torch.bool))

    def forward(self, x0, image, rng):
        cond = drop_some(self.cond(image), self.config, rng)
        sigma = log_normal_sigma(stratified(len(x0), rng))
        noise = torch.randn(x0.shape, generator=rng)
        return denoising_loss(self.denoiser, x0, cond, sigma, noise, self.denoiser.scaling.weight(sigma))

    def denoised(self, x, sigma, image):
        return self.denoiser(x, sigma, self.cond(image))

    def bare(self, x, image):
        return self.denoiser(x, torch.ones(len(x)), self.cond(image))


PEERS = {"dalle2": Dalle2, "lucidrains": Lucidrains, "diffusers": Diffusers}


def decoder_config(preset: str) -> DecoderConfig:
    if preset != "plain":
        return DECODER_PRESETS[preset].config
    return DecoderConfig(image_size=SIZE, patch=2, widths=(64, 128, 256), blocks=(1, 2, 2), attention=(8,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "quality", "distance", "samplers"))
    parser.add_argument("--net", action="append", choices=("ours", *PEERS), help="only this one; repeatable")
    parser.add_argument("--decoder-preset", default="laptop", help="ours; `plain` is the first network this had")
    parser.add_argument("--train", help="shards")
    parser.add_argument("--embeddings", type=Path, help="of the training pictures, by --clip")
    parser.add_argument("--test", help="shards of held-out pictures")
    parser.add_argument("--test-embeddings", type=Path, help="of the held-out pictures: what is drawn")
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--decoder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("diffusion-benchmark"))
    parser.add_argument("--core-minutes", type=float, default=8.0)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20, help="of the sampler that draws for `quality`")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.net = options.net or ["ours", *PEERS]
    {"speed": speed, "quality": quality, "distance": distance, "samplers": samplers}[options.what](options)


def opened(net: str, options: argparse.Namespace) -> Peer:
    torch.manual_seed(0)
    return Ours(options.decoder_preset) if net == "ours" else PEERS[net]()


# --- speed ---


def speed(options: argparse.Namespace) -> None:
    """Images per core-second of training, and core-seconds of 50 DDIM steps, the networks taking turns."""
    rng = torch.Generator().manual_seed(0)
    x0 = torch.randn(BATCH, 3, SIZE, SIZE, generator=rng).clamp(-1, 1)
    image = F.normalize(torch.randn(BATCH, WIDE, generator=rng), dim=-1)
    peers = {net: opened(net, options) for net in options.net}
    optimizers = {net: torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=True) for net, peer in peers.items()}
    times: dict[tuple, list[float]] = {}

    def train(net: str, precision: str) -> None:
        peers[net].train()
        with autocast(precision, torch.device("cpu")):
            loss = peers[net](x0, image, rng)
        loss.backward()
        optimizers[net].step()
        optimizers[net].zero_grad(set_to_none=True)

    def draw(net: str, precision: str) -> None:
        """5 steps of DDIM: a tenth of 50."""
        peer = peers[net].eval()
        with autocast(precision, torch.device("cpu")):
            sample_ddim(lambda x, sigma: peer.denoised(x, sigma, image), 80 * x0, torch.tensor([80, 20, 5, 1, 0.1, 0]))

    for turn in range(options.rounds + 1):  # the first one warms up
        for net in peers:
            for precision in ("fp32", "bf16"):
                for work in (train, draw):
                    began = time.process_time()
                    work(net, precision)
                    if turn:
                        times.setdefault((net, precision, work.__name__), []).append(time.process_time() - began)

    def median(net: str, precision: str, work: str) -> float:
        return float(np.median(times[net, precision, work]))

    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread, medians of {options.rounds} rounds\n")
    print("| network | M parameters | GFLOP a picture, forward | train, pictures a core-second fp32 | bf16 |", end="")
    print(" 50 DDIM steps x 16, core-seconds fp32 | bf16 |\n|---|---|---|---|---|---|---|")
    for net, peer in peers.items():
        rates = [f"{BATCH / median(net, p, 'train'):.2f}" for p in ("fp32", "bf16")]
        drawn = [f"{10 * median(net, p, 'draw'):.1f}" for p in ("fp32", "bf16")]
        size = sum(p.numel() for p in peer.parameters()) / 1e6
        print(f"| {peer.name} | {size:.1f} | {flops(peer, x0, image):.2f} | {' | '.join(rates + drawn)} |")


def flops(peer: Peer, x: Tensor, image: Tensor) -> float:
    """GFLOP (two for a multiply-add) of a picture's forward pass, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        peer.eval().bare(x, image)
    return counter.get_total_flops() / len(x) / 1e9


# --- quality ---


def quality(options: argparse.Namespace) -> None:
    """Train each for the same CPU time, then draw. Leaves OUT/NET/{pictures.npy, sheet.png, record.json}."""
    for net in options.net:
        out = options.out / net
        if not (out / "record.json").exists():
            out.mkdir(parents=True, exist_ok=True)
            record = (train_ours if net == "ours" else train_peer)(net, out, options)
            (out / "record.json").write_text(json.dumps(record, indent=1))
        print(f"{net}: {json.loads((out / 'record.json').read_text())}", flush=True)
        if not (out / "pictures.npy").exists():
            began = time.process_time()
            pixels = drawn_by_ours(out, options) if net == "ours" else drawn_by_peer(net, out, options)
            np.save(out / "pictures.npy", pixels)
            contact_sheet([Image.fromarray(one) for one in pixels[:64]], [""] * 64, columns=8).save(out / "sheet.png")
            print(f"{net}: {len(pixels)} pictures drawn in {time.process_time() - began:.0f} CPU seconds", flush=True)


def train_peer(net: str, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    samples = ShardSet(options.train)
    pictures = Pictures(samples, SIZE, cache=options.out / "cache")
    rows = embeddings_of(samples, options)
    order = Batches(pictures, FIT.batch_size, FIT.seed)

    def batches(step: int) -> Iterator[Batch]:
        for batch in order(step):
            yield batch | {"image": torch.from_numpy(rows[batch["row"].numpy()])}

    def loss(model: nn.Module, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict]:
        return model(batch["pixels"].float() / 127.5 - 1, batch["image"], rng), {}

    def run(folder: Path, steps: int) -> tuple[Peer, Any, list[float]]:
        ticks, peer = [], opened(net, options)
        folder.mkdir()
        tick = lambda done, total, **numbers: ticks.append(time.process_time())  # noqa: E731
        return peer, fit(peer, batches, loss, replace(FIT, steps=steps), folder, on_progress=tick), ticks

    _, _, ticks = run(fresh(out / "probe"), 8)
    budget = 60 * options.core_minutes
    steps = int(budget / float(np.median(np.diff(ticks[2:]))))
    began = time.process_time()
    peer, result, _ = run(fresh(out / "fit"), steps)
    used = time.process_time() - began
    peer.load_state_dict(result.averaged)
    save_tensors(out / "weights.safetensors", peer.state_dict())
    return {"steps": steps, "cpu_seconds": round(used), "loss": result.loss, "pictures_seen": steps * FIT.batch_size}


def train_ours(net: str, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """train_decoder itself. It finds the embeddings as the peers find theirs; its linear guess is counted."""
    plain = replace(DECODER_PRESETS["tiny"].fit, lr=2e-3, ema=0.995)
    schedule = plain if options.decoder_preset == "plain" else DECODER_PRESETS[options.decoder_preset].fit
    schedule = replace(schedule, steps=1, minutes=0.0, precision="bf16", batch_size=BATCH)
    config, marks = decoder_config(options.decoder_preset), []
    picture_feed.picture_embeddings = lambda samples, *_: embeddings_of(samples, options)

    def mark(done: int, total: int, stage: str = "fit", **numbers: object) -> None:
        marks.append((stage, time.process_time()))

    def run(folder: Path, steps: int) -> Manifest:
        marks.clear()
        fitted = replace(schedule, steps=steps)
        return train_decoder.train_decoder(
            options.train, options.clip, folder, config, fitted, device="cpu", on_progress=mark
        )

    run(fresh(out / "probe"), 8)
    ticks = [when for stage, when in marks if stage == "fit"]
    step = float(np.median(np.diff(ticks[2:])))
    guess = ticks[0] - step - max(when for stage, when in marks if stage != "fit")
    steps = int((60 * options.core_minutes - guess) / step)
    made = run(fresh(out / "decoder"), steps)
    used = time.process_time() - max(when for stage, when in marks if stage != "fit")
    result = {"steps": steps, "cpu_seconds": round(used), "of_them_linear_guess": round(guess)}
    return result | {"loss": made.result["loss"], "pictures_seen": steps * BATCH}


def embeddings_of(samples: ShardSet, options: argparse.Namespace) -> np.ndarray:
    """(N, D) float32: the embeddings of the training pictures, in the order of the shards."""
    store = EmbeddingStore.open(options.embeddings)
    place = {key: row for row, key in enumerate(store.keys)}
    return store.image()[[place[key] for key in samples.keys]].astype(np.float32)


def fresh(folder: Path) -> Path:
    """The name of a folder that is not there: what an earlier run left is not measured on."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True)
    return folder


def wanted(options: argparse.Namespace) -> np.ndarray:
    """The embeddings to be drawn: the first of a fixed shuffle of the held-out ones."""
    store = EmbeddingStore.open(options.test_embeddings)
    return store.image()[shuffle(len(store))[: options.pictures]].astype(np.float32)


def shuffle(count: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(count)


@torch.no_grad()
def drawn_by_peer(net: str, out: Path, options: argparse.Namespace) -> np.ndarray:
    peer, rows, made = opened(net, options).eval(), torch.from_numpy(wanted(options)), []
    peer.load_state_dict(load_tensors(out / "weights.safetensors")[0])
    sigmas = peer.grid(karras_sigmas(options.steps, 0.01, 80.0))
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        noise = SampleNoise(range(start, start + len(some)), (3, SIZE, SIZE))
        denoise: Callable = clamped(lambda x, sigma, some=some: peer.denoised(x, sigma, some))
        with autocast("bf16", torch.device("cpu")):
            made.append(to_pixels(sample("dpmpp_2m", denoise, sigmas, noise)))
    return np.concatenate(made)


def drawn_by_ours(out: Path, options: argparse.Namespace) -> np.ndarray:
    how = Sampling(sampler="dpmpp_2m", steps=options.steps, guidance=1.0, precision="bf16")
    made = Generator.open(out / "decoder").from_embeddings(wanted(options), None, how, batch_size=BATCH)
    return np.stack([np.asarray(one.picture) for one in made])


def distance(options: argparse.Namespace) -> None:
    """Kernel distance x 1000 to held-out pictures that were not drawn, beside that of real ones from them."""
    real = held_out(options, SIZE)
    drawn = {"real pictures": real[: options.pictures]}
    names = {"ours": f"unclip decoder, preset {options.decoder_preset}"}
    names |= {net: peer.name + ("" if peer.conditional else ", unconditional") for net, peer in PEERS.items()}
    for net in (net for net in options.net if (options.out / net / "pictures.npy").exists()):
        drawn[names[net]] = torch.from_numpy(np.load(options.out / net / "pictures.npy")).permute(0, 3, 1, 2)
    extractors = [open_features(f"clip:{options.clip}"), open_features("efficientnet-lite0")]
    rest = [features(real[options.pictures :]) for features in extractors]
    print(f"| drawn by | pictures | {' | '.join(f.name for f in extractors)} |\n|---|---|{'---|' * len(extractors)}")
    for name, pictures in drawn.items():
        cells = [shown(features(pictures), other) for features, other in zip(extractors, rest, strict=True)]
        print(f"| {name} | {len(pictures)} | {' | '.join(cells)} |")


def held_out(options: argparse.Namespace, size: int) -> Tensor:
    """uint8 (N, 3, size, size): the held-out pictures as `wanted` shuffles them, so the first are those that are drawn.

    As many more as are drawn, but at least 512, are compared with.
    """
    store, samples = EmbeddingStore.open(options.test_embeddings), ShardSet(options.test)
    count = options.pictures + max(512, options.pictures)
    rows = [samples.row_of(store.keys[row]) for row in shuffle(len(store))[:count]]
    return Pictures(samples, size).pixels(rows)


def shown(made: np.ndarray, real: np.ndarray) -> str:
    figure = figure_of(lambda a, b: 1000 * kernel(a, b), real, made)
    return f"{figure.value:.1f} ({figure.low:.1f} to {figure.high:.1f})"


def samplers(options: argparse.Namespace) -> None:
    """A trained decoder's pictures by DDIM in 50 steps and by higher orders in fewer: distance and CPU time."""
    generator = Generator.open(options.decoder)
    real = held_out(options, generator.decoder.config.image_size)
    extractors = [open_features(f"clip:{options.clip}"), open_features("efficientnet-lite0")]
    rest = [features(real[options.pictures :]) for features in extractors]
    print("| sampler | network calls | core-seconds a picture |", " | ".join(f.name for f in extractors), "|")
    print(f"|---|---|---|{'---|' * len(extractors)}")
    for name, steps in (("ddim", 50), ("heun", 9), ("dpmpp_2m", 16), ("dpmpp_2m", 18), ("unipc", 16)):
        how = Sampling(sampler=name, steps=steps, precision="bf16")
        began = time.process_time()
        made = generator.from_embeddings(wanted(options), None, how, batch_size=BATCH)
        spent = (time.process_time() - began) / len(made)
        cells = [shown(f([one.picture for one in made]), other) for f, other in zip(extractors, rest, strict=True)]
        calls = SAMPLERS[name].calls(steps)
        print(f"| {name}, {steps} steps | {calls} | {spent:.3f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
