"""Embedding beside open_clip's own loop and beside clip-retrieval's inference, per core.

    export OMP_NUM_THREADS=1
    python benchmarks/embed.py --shards '../shared/data/emoji/train-*.tar'                    # the image tower alone
    python benchmarks/embed.py --shards '../shared/data/emoji/train-*.tar' --peer PEER/bin/python     # end to end, too
    python benchmarks/embed.py --shards shards --clip clip --rounds 3                         # on a CLIP of yours
    python benchmarks/embed.py --shards shards --device cuda --compile                        # on a GPU, by the clock

PEER is a virtual environment with clip-retrieval, 'setuptools<81' and 'numpy<2'.

The tower: open_clip.encode_image on pictures that are already normalised, in fp32 and in amp_bf16, and
Clip.for_inference on uint8 pictures; same weights, interleaved rounds, medians; a ratio is the median of the rounds'
own. The clock on a CPU is this process's CPU seconds. --keep-memory: with freed memory kept (clip_train/memory.py), as
unclip embed runs; open_clip's loop, which frees and takes large blocks all the time, gains most by it.

End to end: tar shards of 64-pixel JPEG files to .npy files, by unclip embed and by clip_retrieval.clip_inference (its
reader, transform, batches of 256 and writer; its loader of models replaced by one that builds the same tower), CPU
seconds of the whole process tree at two sizes, whose difference leaves the start out.
"""

import argparse
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.pop(0)  # this folder: another file here has the name of the package
from clip_train.embed import embed
from clip_train.memory import keep_freed_memory
from clip_train.model import Clip, preprocess_config
from clip_train.pictures import decode_picture
from clip_train.sample import Sample
from clip_train.shards import ShardSet, write_shards

BATCH, PER_SHARD = 256, 1024
SIZES = (1024, 3072)  # samples of the two runs end to end
TEXT = {"context_length": 32, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4}
S64 = {"image_size": 64, "layers": 6, "width": 256, "head_width": 64, "patch_size": 8}
CONFIG = {"embed_dim": 512, "vision_cfg": S64, "text_cfg": TEXT}


def towers(clip: Clip, shards: ShardSet, options: argparse.Namespace) -> None:
    """Print the table of the image tower alone."""
    device = torch.device(options.device)
    peer = open_clip.CustomTextCLIP if clip.model_cfg.get("custom_text") else open_clip.CLIP
    peer = peer(**{k: v for k, v in clip.model_cfg.items() if k != "custom_text"}).eval().to(device)
    peer.load_state_dict(clip.model.state_dict())
    some = [decode_picture(shards.picture(i % len(shards))) for i in range(options.batch)]
    pixels = torch.stack([clip.to_pixels(picture) for picture in some])
    images = ((pixels.to(device) - clip.mean) / clip.std).to(device)
    exact, short = clip.for_inference("fp32"), clip.for_inference("auto")

    def theirs(bf16: bool) -> Callable[[], torch.Tensor]:
        def encode() -> torch.Tensor:
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                return F.normalize(peer.encode_image(images).float(), dim=-1).cpu()

        return encode

    ways = {
        "open_clip fp32": theirs(False),
        "open_clip amp_bf16": theirs(True),
        "ours fp32": lambda: exact.encode_image(pixels),
        f"ours {short.precision['image']}": lambda: short.encode_image(pixels),
    }
    if options.compile:
        compiled = clip.for_inference("auto").compile()
        ways["ours, compiled"] = lambda: compiled.encode_image(pixels)
    wanted = ways["open_clip fp32"]()
    cosines = {name: float(F.cosine_similarity(encode(), wanted).min()) for name, encode in ways.items()}
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, encode in ways.items():
            began = clock()
            encode()
            taken[name].append(clock() - began)
    unit = "pictures/core-s" if device.type == "cpu" else "pictures/s"
    print(f"| encoder, batch {options.batch} | {unit} | x fp32 | x amp_bf16 | lowest cosine to fp32 |")
    print("|---|---|---|---|---|")
    for name, seconds in taken.items():
        ratios = [
            statistics.median(p / s for p, s in zip(taken[f"open_clip {other}"], seconds, strict=True))
            for other in ("fp32", "amp_bf16")
        ]
        rate = options.batch / statistics.median(seconds)
        print(f"| {name} | {rate:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {cosines[name]:.6f} |", flush=True)


def end_to_end(clip: Clip, source: ShardSet, peer: str) -> None:
    """Print pairs per core-second from shards to .npy files, ours and clip-retrieval's."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        clip_folder, data = root / "clip", root / "shards"
        clip_folder.mkdir()
        clip.save(clip_folder)
        (root / "config.json").write_text(json.dumps(CONFIG))
        write_shards((_jpeg(source, i) for i in range(max(SIZES))), data, samples_per_shard=PER_SHARD)
        ShardSet(data)  # the offset indexes, which are made once
        rates = {}
        for name, command in (
            ("clip-retrieval", [peer, str(Path(__file__).with_name("embed_peer.py")), str(root / "config.json")]),
            ("ours fp32", [sys.executable, __file__, "--child", "fp32", str(clip_folder)]),
            ("ours bf16", [sys.executable, __file__, "--child", "bf16", str(clip_folder)]),
        ):
            seconds = [_cpu_seconds([*command, _range(data, n), str(root / f"{name}-{n}")]) for n in SIZES]
            rates[name] = (SIZES[1] - SIZES[0]) / (seconds[1] - seconds[0])
    print("\n| shards to .npy, 64 px, one caption a picture | pairs/core-s | x clip-retrieval |\n|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.1f} | {rate / rates['clip-retrieval']:.2f} |")


def _jpeg(source: ShardSet, i: int) -> Sample:
    sample, file = source.read(i % len(source)), io.BytesIO()
    picture = decode_picture(sample.image).resize((64, 64), Image.Resampling.BICUBIC)
    picture.save(file, "JPEG", quality=90)
    return Sample(key=f"{i:09d}", image=file.getvalue(), ext="jpg", captions=[sample.caption])


def _range(data: Path, samples: int) -> str:
    return f"{data}/{{000000..{samples // PER_SHARD - 1:06d}}}.tar"


def _cpu_seconds(command: list[str]) -> float:
    """User and system time of a command and all its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="captioned shards whose pictures are used")
    parser.add_argument(
        "--clip", help="a CLIP, as unclip embed takes it; by default a 64-pixel ViT with random weights"
    )
    parser.add_argument("--peer", help="the python of an environment with clip-retrieval: measure end to end, too")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument(
        "--keep-memory", action="store_true", help="keep freed memory, for open_clip's loop as for ours"
    )
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child or options.keep_memory:
        keep_freed_memory()
    if options.child:
        precision, clip, shards, out = options.child
        embed(shards, clip, out, precision=precision, batch_size=BATCH)
        return
    torch.manual_seed(0)
    source = ShardSet(options.shards)
    clip = Clip.load(options.clip, options.device) if options.clip else Clip(CONFIG, preprocess_config(64))
    clip = clip.to(options.device).eval().requires_grad_(False)
    about = options.clip or json.dumps(CONFIG)
    print(f"{about}\n{platform.machine()}, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, ", end="")
    print(f"torch {torch.__version__}, open_clip {open_clip.__version__}\n")
    towers(clip, source, options)
    if options.peer:
        end_to_end(clip, source, options.peer)


if __name__ == "__main__":
    main()
