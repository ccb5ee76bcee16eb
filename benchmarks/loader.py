"""Samples per core-second from a tar to a training batch, beside webdataset + PIL + open_clip's own transform.

    OMP_NUM_THREADS=1 python benchmarks/loader.py --source 'D/train-*.tar' [--samples 1024] [--formats jpg64 jpg256]
    OMP_NUM_THREADS=1 python benchmarks/loader.py --source 'D/train-*.tar' --decoders    # decoding and resizing alone

The pictures of --source are scaled to 64 and 256 pixels and written as JPEG and WebP (quality 90) and PNG, 1,024 to a
tar. One process, one thread, the process's own CPU seconds, so that what else the machine does decides little; the
loaders take turns, and the median of the rounds counts. Batches of 128 pictures of 64 x 64 pixels.

The peer is open_clip's own pipeline in its own parts: webdataset's tar reader and PIL decoder, open_clip's train
transform (RandomResizedCrop, scale 0.9 to 1, bicubic; to float; normalise), its tokenizer, batching. Ours gives uint8
pixels, which are augmented and normalised in the batch on the device that trains: the column "+ augment" adds that
work, done here on the same core. Captions were tokenised once before: the line below the table says what that cost.
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.pop(0)  # this folder: a benchmark beside this one has the name of the package
from clip_train.augment import augment
from clip_train.captions import CaptionedBatches, CaptionTable
from clip_train.model import Clip, preprocess_config
from clip_train.pictures import Batches, Pictures, decode_picture, to_pixels, training_pixels
from clip_train.sample import Sample
from clip_train.shards import ShardSet, write_shards

SIZE, BATCH, CONTEXT = 64, 128, 32
FORMATS = {
    "jpg64": 8,
    "jpg256": 4,
    "png64": 3,
    "webp64": 3,
    "webp256": 1.4,
}  # and how many times the peer's rate is asked
KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


def main() -> None:
    """Parse, measure, print a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="captioned shards whose pictures are used")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), metavar="jpg64")
    parser.add_argument("--decoders", action="store_true", help="compare the decoders instead")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # webdataset leaves its tars open
    torch.set_num_threads(1)
    text = {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": SIZE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 32}
    clip = Clip({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}, preprocess_config(SIZE))
    source = ShardSet(options.source)
    if options.decoders:
        decoders(source, options.formats, options.samples, options.rounds)
        return
    print("| pictures | bytes | webdataset + open_clip | ours | times | floor | + augment | times | off by |")
    print("|---|---|---|---|---|---|---|---|---|")
    tokenising = []
    for name in options.formats:
        with tempfile.TemporaryDirectory() as folder:
            made(source, name, options.samples, Path(folder))
            shards = ShardSet(folder)
            began = time.process_time()
            captions = CaptionTable(shards, clip)
            tokenising.append(1e6 * (time.process_time() - began) / len(shards))
            pictures = Pictures(shards, SIZE, cache_bytes=0, fast=True)
            batches = CaptionedBatches(Batches(pictures, BATCH, seed=0), captions, seed=0)
            pipelines = {
                "peer": lambda paths=shards.paths: peer(paths, clip),
                "ours": lambda batches=batches: ours(batches, options.samples, 0),
                "augment": lambda batches=batches: ours(batches, options.samples, 1),
            }
            seconds = taken(pipelines, options.rounds)
            rate = {which: options.samples / statistics.median(times) for which, times in seconds.items()}
            times = {
                which: statistics.median([p / t for p, t in zip(seconds["peer"], seconds[which], strict=True)])
                for which in rate
            }
            size = np.mean([len(shards.picture(i)) for i in range(len(shards))])
            row = [name, f"{size:.0f}", *(f"{rate[w]:.0f}" for w in ("peer", "ours")), f"{times['ours']:.1f}"]
            floor = f"{FORMATS[name]:g}" if name in FORMATS else ""
            row += [floor, f"{rate['augment']:.0f}", f"{times['augment']:.1f}", f"{off_by(shards):.3f}"]
            print(f"| {' | '.join(row)} |", flush=True)
    print(f"\nTokenising, once per set: {statistics.median(tokenising):.0f} us of one core a sample, reading included.")
    print("off by: mean difference, in grey levels of 255, of the training pixels from the exact ones.")


def made(source: ShardSet, name: str, samples: int, folder: Path) -> None:
    """Shards of `samples` pictures of the source in one format, such as jpg256."""
    kind = name.rstrip("0123456789")
    side = int(name.removeprefix(kind))

    def resized(i: int) -> Sample:
        sample = source.read(i % len(source))
        file = io.BytesIO()
        how = {} if kind == "png" else {"quality": 90}
        decode_picture(sample.image).resize((side, side), Image.Resampling.BICUBIC).save(file, KINDS[kind], **how)
        return Sample(key=f"{i:09d}", image=file.getvalue(), ext=kind, captions=sample.captions)

    write_shards(map(resized, range(samples)), folder, samples_per_shard=1024)


def peer(paths: list[Path], clip: Clip) -> None:
    """One pass through the tars by webdataset, PIL, and open_clip's transform and tokenizer."""
    import webdataset as wds
    from open_clip.transform import image_transform

    mean, std = clip.preprocess_cfg["mean"], clip.preprocess_cfg["std"]
    transform, tokenizer = image_transform((SIZE, SIZE), is_train=True, mean=mean, std=std), clip.tokenizer
    pipeline = wds.DataPipeline(
        wds.SimpleShardList([str(path) for path in paths]),
        wds.tarfile_to_samples(),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;webp", text="txt"),
        wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH),
    )
    for pixels, tokens in pipeline:
        assert pixels.shape[1:] == (3, SIZE, SIZE) and tokens.shape[1:] == (CONTEXT,)


def ours(batches: CaptionedBatches, samples: int, strength: float) -> None:
    """As many samples from our loader, in shuffled order; with strength > 0 also augmented and normalised."""
    rng, steps = torch.Generator().manual_seed(0), samples // BATCH
    for _, batch in zip(range(steps), batches(0), strict=False):
        assert batch["pixels"].shape == (BATCH, 3, SIZE, SIZE) and batch["tokens"].shape == (BATCH, CONTEXT)
        if strength:
            augment(batch["pixels"], strength, rng).sub_(120).div_(70)


def taken(pipelines: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each pipeline in each round; the pipelines take turns, and the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(rounds + 1):
        for name, run in pipelines.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
    return {name: times[1:] for name, times in seconds.items()}


def decoders(source: ShardSet, formats: list[str], samples: int, rounds: int) -> None:
    """A table of pictures per core-second: decoding by Pillow, by torchvision, to 64 x 64 pixels in our two ways."""
    from torchvision.io import ImageReadMode, decode_image

    def pillow(file: bytes) -> None:
        np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))

    def torchvision(file: bytes) -> None:
        decode_image(torch.frombuffer(bytearray(file), dtype=torch.uint8), ImageReadMode.RGB)

    ways = {
        "Pillow": pillow,
        "torchvision": torchvision,
        "exact pixels": lambda file: to_pixels(decode_picture(file), SIZE),
        "training pixels": lambda file: training_pixels(file, SIZE),
    }
    print(f"| pictures | {' | '.join(ways)} |\n|---{'|---' * len(ways)}|")
    for name in formats:
        with tempfile.TemporaryDirectory() as folder:
            made(source, name, samples, Path(folder))
            shards = ShardSet(folder)
            files = [shards.picture(i) for i in range(samples)]
        runs = {
            way: lambda decode=decode, files=files: [decode(file) for file in files] for way, decode in ways.items()
        }
        rates = [samples / statistics.median(times) for times in taken(runs, rounds).values()]
        print(f"| {name} | {' | '.join(f'{rate:.0f}' for rate in rates)} |", flush=True)


def off_by(shards: ShardSet, count: int = 200) -> float:
    """Mean difference of the training pixels from the exact ones, in grey levels."""
    files = [shards.picture(i) for i in range(min(count, len(shards)))]
    pairs = [(training_pixels(file, SIZE), to_pixels(decode_picture(file), SIZE)) for file in files]
    return float(np.mean([(mine.float() - exact.float()).abs().mean() for mine, exact in pairs]))


if __name__ == "__main__":
    main()
