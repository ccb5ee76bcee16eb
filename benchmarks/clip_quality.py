"""What a CLIP preset reaches in a fixed amount of computing, beside open_clip's own way of training, in one table.

    python benchmarks/clip_quality.py --train 'D/train-*.tar' --test seen='D/seen-*.tar' --test val='D/val-*.tar' \\
        --out clip --core-minutes 40 [--peer] [--preset tiny] [--set key=value]

Both train on one thread and stop after the same CPU time, so that what else the machine does decides little. The peer
is what open_clip's trainer does with its default settings, in open_clip's own parts: a small ViT (64 px, width 256,
6 layers, patch 8; text width 256, 4 layers), its train transform (RandomResizedCrop, scale 0.9 to 1) in PIL, InfoNCE
over batches of 128 pairs with one of the sample's captions each, amp_bf16, AdamW at 1e-3 with 5 % warm-up and a cosine.

Multi-positive: all pictures of a caption's label are right. Queries are the samples' first captions and, as a second
row, their labels. Prints a markdown table.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.pop(0)  # this folder: a benchmark beside this one has the name of the package

from clip_train import metrics, presets, train  # noqa: E402
from clip_train.embed import encode_rows, encode_texts  # noqa: E402
from clip_train.fit import FitConfig, learning_rate  # noqa: E402
from clip_train.model import Clip, preprocess_config  # noqa: E402
from clip_train.pictures import Pictures, decode_picture  # noqa: E402
from clip_train.shards import ShardSet  # noqa: E402

PEER = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 64, "layers": 6, "width": 256, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", action="append", required=True, metavar="NAME=SHARDS")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--core-minutes", type=float, default=40.0)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--peer", action="store_true", help="train open_clip's ViT its way instead")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peer:
        clip, what = train_peer(options.train, options.core_minutes * 60), "open_clip's ViT and loop"
    else:
        clip, what = train_ours(options), f"unclip, preset {options.preset}"
    print(f"{what}\n")
    print("| split | queries | R@1 | R@5 | R@10 | chance R@10 |\n|---|---|---|---|---|---|")
    for test in options.test:
        name, _, spec = test.partition("=")
        for kind, found in retrieval(clip, spec):
            shares = " | ".join(f"{found.recall[k]:.3f}" for k in (1, 5, 10))
            print(f"| {name} ({found.rows}) | {kind} | {shares} | {found.chance[10]:.3f} |")


def retrieval(clip: Clip, spec: str) -> Iterator[tuple[str, metrics.Recall]]:
    """Text -> picture, asked by captions and by labels."""
    samples = ShardSet(spec)
    image, rows = encode_rows(clip, Pictures(samples, clip.image_size))
    captions = [samples.captions(row)[0] for row in rows.tolist()]
    labels = [samples.label(row) or captions[i] for i, row in enumerate(rows.tolist())]
    groups = np.unique(labels, return_inverse=True)[1]
    for kind, texts in (("captions", captions), ("labels", labels)):
        yield kind, metrics.retrieval_recall(encode_texts(clip, texts), image, groups, groups)


def train_ours(options: argparse.Namespace) -> Clip:
    """Our preset; the number of steps follows from the CPU time of its first ones."""
    used, budget = time.process_time(), options.core_minutes * 60
    probe = options.out.with_name(options.out.name + "-probe")
    ticks: list[float] = []
    pairs = ["minutes=0", *options.settings]

    def tick(done: int, total: int, loss: float | None = None, **numbers: object) -> None:
        if loss is not None:
            ticks.append(time.process_time())

    if not options.out.exists() and not options.out.with_name(options.out.name + ".partial").exists():
        train.train_clip(
            options.train, probe, *presets.preset(options.preset, [*pairs, "steps=40"]), device="cpu", on_progress=tick
        )
        step = float(np.median(np.diff(ticks[5:])))
        steps = int((budget - (time.process_time() - used)) / (step * 1.02))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_name(options.out.name + "-steps.json").write_text(json.dumps(steps))
    steps = json.loads(options.out.with_name(options.out.name + "-steps.json").read_text())
    config, schedule = presets.preset(options.preset, [*pairs, f"steps={steps}"])
    made = train.train_clip(options.train, options.out, config, schedule, device="cpu")
    print(
        f"{time.process_time() - used:.0f} CPU seconds (a probe of 40 steps included), {made.result['steps']} steps, "
        f"{made.result['pairs_seen']} pairs seen; the wall clock, shared with other jobs, took "
        f"{made.result['seconds']:.0f} s"
    )
    return Clip.load(options.out)


def train_peer(shards: str, budget: float) -> Clip:
    """open_clip's model, transform, loss and schedule; stops after `budget` CPU seconds."""
    import open_clip
    from open_clip.loss import ClipLoss
    from open_clip.transform import AugmentationCfg, image_transform

    used, began = time.process_time(), time.monotonic()
    samples, rng = ShardSet(shards), np.random.default_rng(0)
    torch.manual_seed(0)
    model = open_clip.CLIP(**PEER)
    transform = image_transform(64, is_train=True, aug_cfg=AugmentationCfg())
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    gains = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    rest = [p for _, p in named if not any(p is g for g in gains)]
    groups = [{"params": gains, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    loss_fn, step, order = ClipLoss(), 0, np.empty(0, dtype=np.int64)
    while (done := (time.process_time() - used) / budget) < 1:
        if len(order) < 128:  # open_clip drops what does not fill a batch
            order = rng.permutation(len(samples))
        rows, order = order[:128], order[128:]
        read = [samples.read(row) for row in rows.tolist()]
        pixels = torch.stack([transform(decode_picture(sample.image)) for sample in read])
        tokens = tokenizer([sample.captions[rng.integers(len(sample.captions))] for sample in read])
        schedule = FitConfig(steps=100_000, lr=1e-3, min_lr=0.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(int(done * 100_000), schedule)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            image, text, scale = model(pixels, tokens)
            loss = loss_fn(image, text, scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        step += 1
    print(
        f"{time.process_time() - used:.0f} CPU seconds, {step} steps, {step * 128} pairs seen; the wall clock, shared "
        f"with other jobs, took {time.monotonic() - began:.0f} s"
    )
    clip = Clip(PEER, preprocess_config(64))
    clip.model.load_state_dict(model.state_dict())
    return clip.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
