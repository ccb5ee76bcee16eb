"""What prior and decoder reach on captioned pictures: figures as json, a markdown page, and sheets to look at.

    python benchmarks/unclip_quality.py --train 'D/train-*.tar' --seen 'D/seen-*.tar' --val 'D/val-*.tar' --clip clip \\
        --work DIR [--prior-set minutes=5] [--decoder-preset laptop] [--decoder-set minutes=60] [--decoder-init DIR] \\
        [--count 400] [--upsampler upsampler] [--sheet-prior knn]

All of it by the command line that a user has, one command after the other; each is resumed or found done when this is
started again. `seen`: new drawings of trained concepts; `val`: concepts that training never saw. Sheets: 64 concepts of
each in three styles, variations, interpolations, text diffs; DIR/figures.md holds the tables.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.pop(0)  # this folder: a benchmark beside this one has the name of the package

from diffusion.report_figures import exam_tables, sweep_table  # noqa: E402

STYLES = ("a flat picture of a {}", "a glossy picture of a {}", "a 3d rendered picture of a {}")
DRAWN = ("--sampler", "dpmpp_2m", "--steps", "12", "--set", "precision=auto")
DIFFS = ("crying face", "relieved face"), ("green square", "red square"), ("peach", "green apple"), ("cow", "goat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("train", "seen", "val"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prior-set", action="append", default=[])
    parser.add_argument("--decoder-preset", default="laptop")
    parser.add_argument("--decoder-set", action="append", default=[])
    parser.add_argument("--decoder-init", type=Path, help="a decoder folder to go on from")
    parser.add_argument("--upsampler", type=Path)
    parser.add_argument("--sheet-prior", help="a baseline to draw the captions of the sheets with, e.g. knn")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    work = options.work
    work.mkdir(parents=True, exist_ok=True)

    def unclip(*words: object, out: str | None = None) -> Path | None:
        """Run a command; one that writes a file `out` is left out if the file is there."""
        path = work / out if out else None
        if path is None or not path.exists():
            command = [sys.executable, "-m", "cli", *map(str, words), "--device", options.device]
            print("unclip", *command[3:], file=sys.stderr, flush=True)
            subprocess.run([*command, *(["--out", str(path)] if path else [])], check=True)
        return path

    for name in ("train", "seen", "val"):
        spec = getattr(options, name)
        unclip("embed", "--shards", spec, "--clip", options.clip, "--out", work / f"emb-{name}")
    pairs = [word for pair in options.prior_set for word in ("--set", pair)]
    unclip("train", "prior", "--embeddings", work / "emb-train", "--out", work / "prior", *pairs)
    pairs = [word for pair in options.decoder_set for word in ("--set", pair)]
    pairs += ["--init", options.decoder_init] if options.decoder_init else []
    unclip(
        "train", "decoder", "--shards", options.train, "--clip", options.clip, "--preset", options.decoder_preset,
        "--out", work / "decoder", *pairs,
    )  # fmt: skip

    models = ("--prior", work / "prior", "--decoder", work / "decoder")
    made: dict[str, dict] = {}
    for name in ("seen", "val"):
        held = ("--embeddings", work / f"emb-{name}")
        prior = unclip("evaluate", "prior", *held, "--prior", work / "prior", out=f"prior-{name}.json")
        made[f"prior-{name}"] = json.loads(prior.read_text())
        drawn = unclip(
            "evaluate", "ablation", *held, *models, "--features", "clip", "--features", "efficientnet-lite0",
            "--count", options.count, *DRAWN, "--pictures", work / f"drawn-{name}",
            "--sheet", work / f"ablation-{name}.png", out=f"ablation-{name}.json",
        )  # fmt: skip
        made[f"ablation-{name}"] = json.loads(drawn.read_text())
    unclip(
        "evaluate", "sweep", "--embeddings", work / "emb-val", *models, "--guidance", "1,1.5,2,3", *DRAWN,
        "--count", options.count // 2, "--features", "clip", "--features", "efficientnet-lite0",
        "--out", work / "guidance",
    )  # fmt: skip
    sheets(unclip, options, models)
    page = [f"# What the {options.decoder_preset} decoder and its prior reach\n"]
    for name, figures in made.items():
        page.append(f"## {name}\n")
        tables = exam_tables(figures) if "ways" in figures else [prior_table(figures)]
        page += [markdown(*table) for table in tables]
        page += [figures["best"] + "\n"] if "best" in figures else []
    page += ["## guidance, val\n", markdown(*sweep_table(json.loads((work / "guidance" / "table.json").read_text())))]
    (work / "figures.md").write_text("\n".join(page))
    print("\n".join(page))


def prior_table(figures: dict) -> tuple[str, tuple, list]:
    """The figures of `evaluate prior` as rows, intervals in brackets."""
    names = ("cosine", "top1", "top10", "median_rank", "gap")
    rows = []
    for guess, numbers in figures.items():
        if isinstance(numbers, dict):
            cells = [f"{numbers[name]:.3f}" if name in numbers else "" for name in names]
            between = numbers.get("interval", {})
            more = [" [{:.3f}, {:.3f}]".format(*between[name]) if name in between else "" for name in names]
            rows.append((guess, *(cell + extra for cell, extra in zip(cells, more, strict=True))))
    return "guesses of the image embedding; [95 % interval over labels]", ("guess", *names), rows


def markdown(title: str, head: tuple, rows: list) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return f"{title}\n\n" + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def sheets(unclip, options: argparse.Namespace, models: tuple) -> None:
    """Pictures to look at: eight by eight concepts in three styles; what one does in the space."""
    work = options.work
    more = ("--upsampler", options.upsampler) if options.upsampler else ()
    with_prior = models
    if options.sheet_prior:
        with_prior = ("--prior", options.sheet_prior, "--embeddings", work / "emb-train", *models[2:])
    for split in ("seen", "val"):
        labels = sorted(set(metadata(work / f"emb-{split}")["label"].dropna()))
        chosen = [labels[i * len(labels) // 64] for i in range(64)]
        for style in STYLES:
            name = f"{split}-{style.split()[1]}"
            (work / f"captions-{name}.txt").write_text("\n".join(style.format(label) for label in chosen))
            unclip(
                "generate", "--file", work / f"captions-{name}.txt", *with_prior, *more, *DRAWN,
                "--out", work / f"pictures-{name}", "--sheet", work / f"sheet-{name}.png",
            )  # fmt: skip
    for name in ("seen", "val"):
        table = metadata(work / f"emb-{name}")
        keys = [table["image_path"].iloc[i * len(table) // 6] for i in range(6)]
        held = ("--embeddings", work / f"emb-{name}")
        for key in keys[:3]:
            unclip("vary", "--key", key, *held, *models[2:], "--count", 8, *DRAWN, "--out", work / f"vary-{key}",
                   "--sheet", work / f"vary-{key}.png")  # fmt: skip
        for a, b in zip(keys[::2], keys[1::2], strict=True):
            unclip("interpolate", f"key:{a}", f"key:{b}", *held, *models[2:], "--frames", 8,
                   "--out", work / f"way-{a}-{b}", "--sheet", work / f"way-{a}-{b}.png")  # fmt: skip
    edits(unclip, options, with_prior)


def edits(unclip, options: argparse.Namespace, models: tuple) -> None:
    """Text diffs of pictures of `seen`, through their own noise."""
    from clip_train.shards import ShardSet

    work, table = options.work, metadata(options.work / "emb-seen")
    shards = ShardSet(options.seen)
    for source, target in DIFFS:
        found = table["image_path"][table["label"] == source]
        if len(found):
            picture = work / f"{source.replace(' ', '-')}.png"
            picture.write_bytes(shards.picture(shards.row_of(found.iloc[0])))
            unclip("edit", picture, "--from", source, "--to", target, *models, "--clip", options.clip,
                   "--out", work / f"edit-{picture.stem}", "--sheet", work / f"edit-{picture.stem}.png")  # fmt: skip


def metadata(embeddings: Path):
    import pandas as pd

    return pd.concat(pd.read_parquet(path) for path in sorted((embeddings / "metadata").glob("*.parquet")))


if __name__ == "__main__":
    main()
