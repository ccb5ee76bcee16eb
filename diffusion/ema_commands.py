"""The command that averages after the training: ema.

It parses, calls one function, and says what to do next. Heavy imports are inside, so that --help answers at once.
"""

from pathlib import Path

import click

from clip_train.console import (
    CONTEXT,
    Bars,
    Whole,
    device_option,
    numbers_in,
    out_option,
    print_table,
    say,
    shards_option,
)


@click.command(context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--sigma-rel", "widths", default="0.03,0.05,0.08,0.1,0.15", show_default=True, help="Widths to try.")
@shards_option("Shards kept from the training, to measure a decoder or an upsampler on.", required=False)
@click.option("--embeddings", type=click.Path(path_type=Path), help="Embeddings kept from it, to measure a prior on.")
@click.option("--clip", type=click.Path(path_type=Path), help="CLIP folder; by default where FOLDER says it was.")
@click.option("--count", default=1024, show_default=True, type=Whole(2), help="Samples measured on.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of which samples and what noise.")
@out_option("best")
@device_option
def ema(folder: Path, widths: str, shards, embeddings, clip, count: int, seed: int, out: Path, device: str) -> None:
    """Choose how long the weights are averaged, after the training: FOLDER is a prior, a decoder or an upsampler.

    It must have been trained with --set ema_snapshots=16. A width is the average's standard deviation as a share of the
    training (arXiv 2312.02696): 0.05 looks back over the last tenth or so.

    \b
    Example:  unclip ema decoder --sigma-rel 0.03,0.08,0.15 --shards val --out decoder-best
    """
    from clip_train.ranks import pick_device
    from diffusion.posthoc import choose_average

    made = choose_average(
        folder, numbers_in(widths, "--sigma-rel"), out, shards=shards, embeddings=embeddings, clip=clip, count=count,
        seed=seed, device=pick_device(device), on_progress=Bars("ema"),
    )  # fmt: skip
    print_table(("average", "loss", "behind", "error", "profile"), [tuple(_cells(row)) for row in made.result["table"]])
    best = made.result["sigma_rel"]
    say(f"{out}/: {'the weights as they were' if best is None else f'sigma_rel {best:g}'}")


def _cells(row: dict) -> list[str]:
    numbers = ["" if row[name] is None else f"{row[name]:.5f}" for name in ("loss", "behind", "error")]
    return [row["average"], *numbers, "" if row["sigma_rel"] is None else f"{row['profile']:.3f}"]
