"""The commands that measure: evaluate prior, evaluate loop.

Each parses, calls one function, and says what to do next. Heavy imports are inside, so that --help answers at once.
"""

from pathlib import Path

import click

from clip_train.console import (
    CONTEXT,
    Bars,
    device_option,
    say,
    write_figures,
)


@click.command("prior", context_settings=CONTEXT)
@click.option("--embeddings", required=True, type=click.Path(path_type=Path), help="Embeddings kept from training.")
@click.option("--prior", required=True, type=click.Path(path_type=Path), help="Prior folder.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures to this json file.")
@device_option
def evaluate_prior(embeddings: Path, prior: Path, out: Path | None, device: str) -> None:
    """The prior beside what it must beat: cosine to the true image embedding, and the true picture's rank.

    \b
    Example:  unclip evaluate prior --embeddings emb-val --prior prior
    """
    from clip_train.ranks import pick_device
    from diffusion.evaluate_prior import evaluate_prior_folder

    write_figures(evaluate_prior_folder(embeddings, prior, device=pick_device(device)), out)


@click.command("loop", context_settings=CONTEXT)
@click.option("--embeddings", required=True, type=click.Path(path_type=Path), help="Rows to generate from and to rank.")
@click.option("--prior", required=True, type=click.Path(path_type=Path), help="Prior folder.")
@click.option("--decoder", required=True, type=click.Path(path_type=Path), help="Decoder folder.")
@click.option("--clip", type=click.Path(path_type=Path), help="CLIP folder; by default where the decoder says it was.")
@click.option("--count", default=100, show_default=True, type=click.IntRange(1), help="Captions tried.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Decides which captions.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures to this json file.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write the pictures of all three ways to this PNG.")
@device_option
def evaluate_loop(embeddings, prior, decoder, clip, count, seed, out, sheet, device) -> None:
    """The round trip: generate, embed the picture, rank the true one; from true, prior and text embeddings.

    \b
    Example:  unclip evaluate loop --embeddings emb --prior prior --decoder decoder
    """
    from clip_train.ranks import pick_device
    from diffusion.evaluate import evaluate_loop_folders

    figures, drawn = evaluate_loop_folders(
        embeddings, prior, decoder, clip, count=count, seed=seed, device=pick_device(device), on_progress=Bars("loop")
    )
    if sheet:
        from clip_train.sheet import save_sheet

        save_sheet(drawn, sheet)
        say(f"wrote {sheet}")
    write_figures(figures, out)
