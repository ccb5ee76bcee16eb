"""A CLIP training step of ours beside open_clip's own: same weights, same batch, same loss, same run.

    python benchmarks/clip_train.py --shards '../shared/data/emoji/train-*.tar' \\
        --out benchmarks/results/clip-train-2026-11-21.md                                     # CPU: one thread
    python benchmarks/clip_train.py --device cuda --model vit-b-32 --batch 1024 --compile     # GPU
    python benchmarks/clip_train.py --model smoke --batch 8 --rounds 1 --compile              # does it run at all

The peer is open_clip.CLIP, open_clip.ClipLoss and AdamW as open_clip_train sets it up (no decay on gains, biases and
scalars; betas .9 .98; eps 1e-6), in fp32 and in amp_bf16 (autocast). Ours is Clip, contrastive_loss and fused AdamW on
the groups of fit. Rounds are interleaved, so that a busy neighbour hits all alike; the clock on a CPU is this process's
CPU seconds on one thread, on a GPU the wall clock after a synchronize. Figures are medians over the rounds; a ratio is
the median of the rounds' own ratios. FLOPs are dense ones: what ours leaves out counts as done.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F

sys.path.pop(0)  # this folder: the file has the name of the package
from clip_train.fit import parameter_groups
from clip_train.loss import contrastive_loss
from clip_train.model import Clip, preprocess_config
from clip_train.shards import ShardSet

TEXT = {"context_length": 32, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4}
S64 = {"image_size": 64, "layers": 6, "width": 256, "head_width": 64, "patch_size": 8}
SMOKE = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
MODELS: dict[str, dict[str, Any]] = {
    "s64": {"embed_dim": 512, "vision_cfg": S64, "text_cfg": TEXT},
    "smoke": {"embed_dim": 32, "vision_cfg": SMOKE, "text_cfg": TEXT | {"width": 32, "heads": 2, "layers": 2}},
}
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # TFLOP/s of dense bf16 by the makers' data sheets
Step = Callable[[], torch.Tensor]


def model_config(name: str) -> dict[str, Any]:
    """open_clip's model_cfg of a model here, or of a preset."""
    if name in MODELS:
        return MODELS[name]
    from clip_train.presets import preset

    return preset(name)[0].model_config()


def dense_flops(cfg: dict[str, Any]) -> float | None:
    """Matrix-product FLOPs (two a multiply-add) of one pair through both towers; None for towers not of patches."""
    v, t = cfg["vision_cfg"], cfg["text_cfg"]
    if "patch_size" not in v:
        return None
    patches = (v["image_size"] // v["patch_size"]) ** 2
    total = 2 * patches * 3 * v["patch_size"] ** 2 * v["width"]
    for side, length in ((v, patches + 1), (t, t["context_length"])):
        width = side["width"]
        total += side["layers"] * (24 * length * width**2 + 4 * length**2 * width) + 2 * width * cfg["embed_dim"]
    return float(total)


def captions(count: int, shards: str | None, context: int) -> tuple[list[str], str]:
    """Captions for a batch, and where they are from: drawn from shards, or words up to two thirds of the context."""
    rng = np.random.default_rng(0)
    if shards:
        samples = ShardSet(shards)
        chosen = [samples.captions(int(row)) for row in rng.integers(0, len(samples), count)]
        return [some[int(rng.integers(len(some)))] for some in chosen], f"captions of {Path(shards).parent.name}"
    lengths = rng.integers(3, max(4, 2 * context // 3), count)
    words = "a the red small old fox house cat on in near with of two three green tall".split()
    return [" ".join(rng.choice(words, length)) for length in lengths], "made-up captions"


class Bench:
    """One model and one batch, ours and the peer's, on one device."""

    def __init__(self, cfg: dict[str, Any], batch: int, device: str, shards: str | None) -> None:
        torch.manual_seed(0)
        size = cfg["vision_cfg"]["image_size"]
        self.cfg, self.batch, self.device = cfg, batch, torch.device(device)
        self.clip = Clip(cfg, preprocess_config(size)).to(device).train()
        self.peer = open_clip.CLIP(**cfg, output_dict=True).to(device).train()
        self.peer.load_state_dict(self.clip.model.state_dict())
        said, self.source = captions(batch, shards, cfg["text_cfg"]["context_length"])
        self.tokens = self.clip.tokenize(said).to(device)
        self.pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(device)
        self.images = (self.pixels - self.clip.mean) / self.clip.std
        self.real = float((self.tokens.argmax(-1) + 1).float().mean())

    def steps(self, compiled: bool, fp32: bool) -> dict[str, Step]:
        """Whole training steps by name."""
        found = {"open_clip fp32": self._theirs(False), "ours fp32": self._ours(False)} if fp32 else {}
        found |= {"open_clip amp_bf16": self._theirs(True), "ours bf16": self._ours(True)}
        if compiled:
            found |= {
                "open_clip amp_bf16 compiled": self._theirs(True, True),
                "ours bf16 compiled": self._ours(True, True),
            }
        return found

    def encoders(self) -> dict[str, Step]:
        """Picture embedding by name, the peer's first."""
        peer, clip = self.peer, self.clip

        def theirs(bf16: bool) -> Step:
            def encode() -> torch.Tensor:
                with torch.inference_mode(), self._autocast(bf16):
                    return peer.encode_image(self.images, normalize=True)

            return encode

        def ours(bf16: bool) -> Step:
            def encode() -> torch.Tensor:
                with self._autocast(bf16):
                    return clip.encode_image(self.pixels)

            return encode

        return {
            "open_clip fp32": theirs(False),
            "open_clip amp_bf16": theirs(True),
            "ours fp32": ours(False),
            "ours bf16": ours(True),
        }

    def difference(self) -> tuple[float, float]:
        """fp32: of the loss, and the largest of a gradient relative to the largest entry of that weight's gradient.

        On a GPU of the first 64 pairs, for the memory.
        """
        count = self.batch if self.device.type == "cpu" else 64
        self.peer.zero_grad()
        theirs = open_clip.ClipLoss()(**self.peer(self.images[:count], self.tokens[:count]))
        theirs.backward()
        self.clip.zero_grad()
        ours = contrastive_loss(*self.clip(self.pixels[:count], self.tokens[:count]))
        ours.backward()
        wanted = {name: p.grad for name, p in self.peer.named_parameters()}
        errors = [
            float((p.grad - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-6))
            for name, p in self.clip.model.named_parameters()
        ]
        return abs(float(ours.detach() - theirs.detach())), max(errors)

    def _autocast(self, bf16: bool):
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()

    def _theirs(self, bf16: bool, compiled: bool = False) -> Step:
        peer, loss = self.peer, open_clip.ClipLoss()
        plain = [p for n, p in peer.named_parameters() if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n]
        ids = {id(p) for p in plain} | {id(peer.logit_scale)}
        groups = [
            {"params": [p for p in peer.parameters() if id(p) in ids], "weight_decay": 0.0},
            {"params": [p for p in peer.parameters() if id(p) not in ids], "weight_decay": 0.2},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.98), eps=1e-6)
        run = torch.compile(peer) if compiled else peer

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            with self._autocast(bf16):
                total = loss(**run(self.images, self.tokens), output_dict=True)["contrastive_loss"]
            total.backward()
            optimizer.step()
            with torch.no_grad():
                peer.logit_scale.clamp_(0, np.log(100))
            return total.detach()

        return step

    def _ours(self, bf16: bool, compiled: bool = False) -> Step:
        clip = self.clip
        optimizer = torch.optim.AdamW(parameter_groups(clip, 0.2), lr=1e-6, betas=(0.9, 0.98), eps=1e-6, fused=True)
        run = torch.compile(clip) if compiled else clip

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            with self._autocast(bf16):
                image, text, scale = run(self.pixels, self.tokens)
            total = contrastive_loss(image, text, scale)
            total.backward()
            optimizer.step()
            clip.clamp_temperature()
            return total.detach()

        return step


def interleaved(steps: dict[str, Step], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each step in each round, after one that does not count."""
    for step in steps.values():
        step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            step()
            taken[name].append(clock() - start)
    return taken


def gemm_limit(device: str, clock: Callable[[], float]) -> float:
    """TFLOP/s of bf16 matrix products of 2048 x 2048 (CPU) or 8192 x 8192: what nothing here can pass."""
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    times = interleaved({"gemm": lambda: torch.mm(a, b, out=out)}, 5, clock)["gemm"]
    return 2 * size**3 / statistics.median(times) / 1e12


def table(
    taken: dict[str, list[float]], batch: int, flops: float | None, limit: float, peak: float | None
) -> list[str]:
    """Markdown rows: rate, ratios to the peer's precisions, share of the limit, and MFU where there is a peak."""
    lines = []
    for name, seconds in taken.items():
        rate = batch / statistics.median(seconds)
        ratios = [
            f"{statistics.median(p / s for p, s in zip(taken[peer], seconds, strict=True)):.2f}"
            if peer in taken
            else ""
            for peer in ("open_clip fp32", "open_clip amp_bf16")
        ]
        reached = rate * flops / 1e12 if flops else None
        shares = [f"{reached / limit:.0%}" if reached else ""]
        shares += [f"{reached / peak:.0%}" if reached else ""] if peak else []
        spread = f"{min(seconds) / statistics.median(seconds):.2f}-{max(seconds) / statistics.median(seconds):.2f}"
        lines.append(f"| {name} | {rate:.1f} | {' | '.join([*ratios, *shares, spread])} |")
    return lines


def report(options: argparse.Namespace) -> str:
    """The whole report as markdown."""
    device = options.device
    gpu = device.startswith("cuda")
    if not gpu:
        torch.set_num_threads(1)

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    clock = synchronised if gpu else time.process_time
    limit = gemm_limit(device, clock)
    machine = torch.cuda.get_device_name(device) if gpu else f"{_cpu()}, one thread, CPU seconds"
    peak = next((value for name, value in PEAKS.items() if gpu and name in machine), None)
    versions = f"torch {torch.__version__}, open_clip {open_clip.__version__}, Python {platform.python_version()}"
    lines = [f"{machine}; {versions}; bf16 gemm limit {limit:.3g} TFLOP/s", ""]
    unit = "pairs/s" if gpu else "pairs/core-s"
    shares = "| of gemm limit |" + (" MFU |" if peak else "") + " spread |"
    for model in options.model:
        cfg = model_config(model)
        flops = dense_flops(cfg)
        for batch in options.batch:
            bench = Bench(cfg, batch, device, options.shards)
            loss, gradient = bench.difference()
            size, said = cfg["vision_cfg"]["image_size"], f"{bench.source}, {bench.real:.1f} tokens of"
            about = f"{size} px, {said} {cfg['text_cfg']['context_length']}"
            lines += [f"## Training step, {model}, batch {batch} ({about})", ""]
            lines += [f"fp32, the same batch: loss differs by {loss:.1e}, gradients by at most {gradient:.1e}", ""]
            lines += [f"| step | {unit} | x fp32 | x amp_bf16 {shares}", "|---" * (shares.count("|") + 3) + "|"]
            taken = interleaved(bench.steps(options.compile, options.fp32 or not gpu), options.rounds, clock)
            lines += [*table(taken, batch, 3 * flops if flops else None, limit, peak), ""]
            if options.encode:
                encoders = bench.encoders()
                bench.clip.eval()
                bench.peer.eval()
                wanted = encoders["open_clip fp32"]().float().cpu()
                cosines = {n: float(F.cosine_similarity(f().float().cpu(), wanted).min()) for n, f in encoders.items()}
                taken = interleaved(encoders, options.rounds, clock)
                lines += [f"## encode_image, {model}, batch {batch}", ""]
                lines += [f"| encoder | {unit.replace('pairs', 'pictures')} | x fp32 | x amp_bf16 | lowest cosine |"]
                lines += ["|---|---|---|---|---|"]
                for row in table(taken, batch, None, limit, None):
                    name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
                    lines.append(f"| {name} | {' | '.join(cells[:3])} | {cosines[name]:.5f} |")
                lines.append("")
    return "\n".join(lines)


def _cpu() -> str:
    """The processor's name."""
    try:
        found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return found[0].split(":")[1].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["s64"], help="s64, smoke, or a preset of unclip train clip")
    parser.add_argument("--batch", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shards", help="take the captions from here; by default they are made up")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fp32", action="store_true", help="fp32 steps on a GPU as well; always on a CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--encode", action="store_true", help="picture embedding as well")
    parser.add_argument("--out", type=Path, help="write the report here as well")
    options = parser.parse_args(arguments)
    command = "python benchmarks/clip_train.py " + " ".join(sys.argv[1:] if arguments is None else arguments)
    text = f"# CLIP training step beside open_clip's\n\n`{command}`\n\n{report(options)}"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
