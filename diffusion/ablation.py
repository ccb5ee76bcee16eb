"""What the prior is worth: the comparison of unCLIP's section 5.1 (Ramesh et al. 2022, arXiv 2204.06125), figure 8.

A decoder can be given the caption's own embedding in the place of an image embedding, or what a prior makes of it, or
the true image embedding, which nobody has who only has a caption; and a decoder can be trained on text embeddings to
begin with. Each row is drawn with the same seeds for the same captions, and judged in the same way.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clip_train.settings import Progress, UserError
from diffusion.examine import Exam, Way, drawing, examine, open_generator, open_held


def ablate(
    decoder: Path | str,
    prior: Path | str,
    clip: Path | str | None = None,
    *,
    text_decoder: Path | str | None = None,
    embeddings: Path | str | None = None,
    shards: str | None = None,
    fit: Path | str | None = None,
    settings: Sequence[str] = (),
    exam: Exam | None = None,
    keep: Path | str | None = None,
    device: str | torch.device = "cpu",
    on_progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, list[Image.Image]]]:
    """Rows "text embedding", "text decoder" (if there is one), "prior", "true embedding" and "real" of examine().

    text_decoder: the folder of a decoder trained on text embeddings (its shards' pictures, with a CLIP of the same
    fingerprint). fit: the embeddings a baseline prior is fitted to.
    """
    generator = open_generator(decoder, prior, clip, embeddings=fit, device=device)
    ways = {"text embedding": Way(generator, "text")}
    if text_decoder is not None:
        other = open_generator(text_decoder, None, clip, device=device)
        if other.fingerprints["clip"] != generator.fingerprints["clip"]:
            raise UserError(
                f"{text_decoder}/ and {decoder}/ were trained with different CLIPs; train one of them again"
            )
        if other.size != generator.size:
            raise UserError(
                f"{text_decoder}/ draws {other.size} px and {decoder}/ {generator.size} px: compare one size"
            )
        ways["text decoder"] = Way(other, "text")
    ways |= {"prior": Way(generator, "prior"), "true embedding": Way(generator, "true")}
    held = open_held(embeddings, shards, generator, on_progress)
    return examine(ways, held, drawing(generator, settings), exam, keep=keep, on_progress=on_progress)
