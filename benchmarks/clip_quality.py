"""Train a CLIP preset for some minutes and measure retrieval on splits it did not see.

    python benchmarks/clip_quality.py --train 'D/train-*.tar' --test seen='D/seen-*.tar' --test val='D/val-*.tar' \\
        --out clip --minutes 20 [--preset tiny] [--set key=value]

Multi-positive: all pictures of a caption's label are right. Queries are the samples' captions and, as a second row,
their labels. Prints a markdown table.
"""

import argparse
from pathlib import Path

import numpy as np

from clip_train import metrics, ranks, train
from clip_train.embed import encode_rows, encode_texts
from clip_train.model import Clip
from clip_train.pictures import Pictures
from clip_train.shards import ShardSet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", action="append", required=True, metavar="NAME=SHARDS")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", default="20")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    options = parser.parse_args()
    pairs = [f"minutes={options.minutes}", "steps=0", *options.settings]
    config, fit_config = train.preset(options.preset, pairs)
    made = train.train_clip(options.train, options.out, config, fit_config, device=options.device)
    clip = Clip.load(options.out, ranks.pick_device(options.device))
    seen = made.result["pairs_seen"]
    print(f"{options.preset}, {made.result['seconds']:.0f} s, {made.result['steps']} steps, {seen} pairs seen\n")
    print("| split | queries | R@1 | R@5 | R@10 | chance R@10 |\n|---|---|---|---|---|---|")
    for test in options.test:
        name, _, spec = test.partition("=")
        samples = ShardSet(spec)
        pictures = Pictures(samples, clip.image_size)
        image, rows = encode_rows(clip, pictures)
        captions = [samples.captions(row)[0] for row in rows.tolist()]
        labels = [samples.label(row) or captions[i] for i, row in enumerate(rows.tolist())]
        groups = np.unique(labels, return_inverse=True)[1]
        for kind, texts in (("captions", captions), ("labels", labels)):
            found = metrics.retrieval_recall(encode_texts(clip, texts), image, groups, groups)
            shares = " | ".join(f"{found.recall[k]:.3f}" for k in (1, 5, 10))
            print(f"| {name} ({len(image)}) | {kind} | {shares} | {found.chance[10]:.3f} |")


if __name__ == "__main__":
    main()
