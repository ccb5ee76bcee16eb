"""Every kind of guidance at a few strengths, on embeddings of held-out pictures: what docs/guidance.md shows.

    python benchmarks/guidance_sweep.py --decoder decoder --clip clip --embeddings emb-val \
        --guide weaker-decoder --judge other-clip --judge-embeddings other-emb-val --count 64

Each picture is drawn from the embedding of a true one. cosine, top1, top10: as the decoder's own CLIP sees the picture,
to the asked embedding, and its rank among all. judge cosine, judge top10, kernel: as another CLIP sees it, which had no
part in the drawing; guidance by CLIP can please its own CLIP without making a better picture. contrast: std of the
pixels over that at guidance 1. calls: samples that go through the networks for a picture, as diffusion.sweep counts.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip_train.model import Clip  # noqa: E402
from clip_train.store import EmbeddingStore  # noqa: E402
from diffusion.distances import kernel  # noqa: E402
from diffusion.evaluate import embed_pictures, round_trip  # noqa: E402
from diffusion.generate import Generator, Sampling  # noqa: E402
from diffusion.heldout import labels_of  # noqa: E402
from diffusion.sweep import calls  # noqa: E402

SETTINGS = [
    {"guidance": 1.0},
    {"guidance": 0.0},
    *({"guidance": scale} for scale in (1.5, 2.0, 3.0, 5.0, 8.0)),
    {"guidance": 5.0, "rescale": 0.7},
    {"guidance": 5.0, "guidance_from": 0.1, "guidance_to": 2.0},
    {"guidance": 5.0, "guidance_from": 0.5, "guidance_to": 20.0},
    *({"guidance": 1.0, "autoguidance": scale} for scale in (1.5, 2.0, 3.0)),
    {"guidance": 2.0, "autoguidance": 1.5},
    *({"guidance": 1.0, "self_attention": scale} for scale in (0.25, 0.5, 1.0)),
    *({"guidance": 1.0, "clip_guidance": scale} for scale in (0.02, 0.05, 0.1)),
    {"guidance": 2.0, "clip_guidance": 0.05},
    *({"guidance": 2.0, "candidates": count} for count in (2, 4)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("decoder", "clip", "embeddings", "judge", "judge-embeddings"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--guide", help="folder of a weaker decoder; autoguidance is left out without it")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--out", default="guidance_sweep.jsonl", help="one line of json for each setting")
    options = parser.parse_args()

    store, other = EmbeddingStore.open(options.embeddings), EmbeddingStore.open(options.judge_embeddings)
    picked = np.sort(np.random.default_rng(0).choice(len(store), options.count, replace=False))
    place = {key: row for row, key in enumerate(other.keys)}
    judged = np.array([place[key] for key in store.keys])
    rows, labels, truth = store.image(), labels_of(store), other.image()[judged]
    generator = Generator.open(options.decoder, clip=options.clip, guide=options.guide)
    judge, base, plain_std = Clip.load(options.judge), Sampling(), None
    base = replace(base, steps=options.steps, sampler=options.sampler, precision=options.precision)
    print("| setting | cosine | top1 | top10 | judge cosine | judge top10 | kernel x 1000 | contrast | calls | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with open(options.out, "w") as log:
        for change in SETTINGS:
            if "autoguidance" in change and not options.guide:
                continue
            how = replace(base, **change)
            began = time.process_time()
            made = generator.from_embeddings(rows[picked], how=how, batch_size=32)
            spent = (time.process_time() - began) / len(made)
            pictures = [one.picture for one in made]
            own = round_trip(embed_pictures(generator.clip, pictures), picked, rows, labels)
            seen = embed_pictures(judge, pictures)
            theirs, size = round_trip(seen, picked, truth, labels), seen.shape[1] ** 0.5
            contrast = float(np.mean([np.std(picture) for picture in pictures]))
            plain_std = plain_std or contrast
            line = {
                "setting": change,
                "cosine": own["cosine"],
                "top1": own["top1"],
                "top10": own["top10"],
                "judge": theirs["cosine"],
                "judge_top10": theirs["top10"],
                "kernel": 1000 * kernel(size * truth.astype(np.float32), size * seen),
                "contrast": contrast / plain_std,
                "calls": calls(how),
                "seconds": spent,
            }
            log.write(json.dumps(line) + "\n")
            log.flush()
            name = ", ".join(f"{key} {value:g}" for key, value in change.items())
            print(
                f"| {name} | {line['cosine']:.3f} | {line['top1']:.2f} | {line['top10']:.2f} | {line['judge']:.3f} "
                f"| {line['judge_top10']:.2f} | {line['kernel']:.1f} | {line['contrast']:.2f} | {line['calls']:.0f} "
                f"| {line['seconds']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
