"""How closely a picture comes back from its own noise, and what text diffs do to it.

    python benchmarks/picture_edits.py --decoder decoder --clip clip --edits edits.txt --sheet edits.png \\
        [--prior knn --embeddings emb]

edits.txt has a line for each edit: PICTURE | what it is | what it is to become. Printed: PSNR of the round trip by DDIM
inversion, for each number of steps (median and least of the pictures); then for each strength the mean cosines of what
came out with the text it was to become, with the text it was, and with the picture, and its PSNR to that; once through
the picture's own noise, once from a seed. On the CPU, one thread; docs/pictures.md has the figures.
"""

import argparse
import json
import sys
from dataclasses import replace

import numpy as np
import torch

sys.path.pop(0)  # this folder: a benchmark beside this one has the name of the package
from clip_train.sheet import contact_sheet, save_sheet  # noqa: E402
from diffusion.generate import Generator, Sampling  # noqa: E402
from diffusion.inversion import FAITHFUL, picture_noise  # noqa: E402
from diffusion.manipulate import slerp, text_difference  # noqa: E402
from diffusion.source import Source, to_x0  # noqa: E402

STRENGTHS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7)
CHANGES = {
    "ddim": {},
    "clamp=1": {"clamp": 1.0},
    "clamp=0.995": {"clamp": 0.995},
    "heun": {"sampler": "heun"},
    "dpmpp_2m": {"sampler": "dpmpp_2m"},
    "guidance 1.5": {"guidance": 1.5, "clamp": 1.0},
    "guidance 2": {"guidance": 2.0, "clamp": 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", required=True)
    parser.add_argument("--clip", required=True)
    parser.add_argument("--edits", required=True)
    parser.add_argument("--prior", help="a prior folder, or a baseline with --embeddings: edits by its guesses")
    parser.add_argument("--embeddings")
    parser.add_argument("--steps", default="20,50", help="of the round trips")
    parser.add_argument("--sheet", help="write the edited pictures to this PNG")
    parser.add_argument("--out", help="write the figures to this json file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = Generator.open(options.decoder, options.prior, options.clip, embeddings=options.embeddings)
    with open(options.edits, encoding="utf-8") as file:
        edits = [[part.strip() for part in line.split("|")] for line in file if line.strip()]
    pictures = [Source.open(path) for path, _, _ in edits]
    rows = np.stack([picture.row(generator.clip) for picture in pictures])
    steps = [int(number) for number in options.steps.split(",") if number]
    figures = {"psnr": {number: round_trips(generator, rows, pictures, number) for number in steps}}
    figures["edits"], made = text_diffs(generator, rows, pictures, edits)
    print(json.dumps(figures, indent=1))
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)
    if options.sheet:
        cells = [made[strength][n] for n in range(len(edits)) for strength in STRENGTHS]
        labels = [to if s == STRENGTHS[-1] else f"{s:g}" for _, _, to in edits for s in STRENGTHS]
        save_sheet(contact_sheet(cells, labels, columns=len(STRENGTHS)), options.sheet)


def psnr(x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """Of pictures in [-1, 1], dB, (B,)."""
    return -10 * torch.log10(((x.clamp(-1, 1) - x0) / 2).square().flatten(1).mean(1))


def round_trips(generator: Generator, rows: np.ndarray, pictures: list[Source], steps: int) -> dict:
    """PSNR (median, least) of pictures inverted, then drawn by each way of CHANGES."""
    how, x0 = Sampling(**FAITHFUL | {"steps": steps}), to_x0(pictures, generator.size, "cpu")
    x, found = picture_noise(generator, rows, pictures, how), {}
    for name, change in CHANGES.items():
        back = generator.walk(
            torch.from_numpy(rows), None, [0] * len(rows), replace(how, **change), start=x, sigma=how.sigma_max
        )
        values = psnr(back, x0)
        found[name] = [round(values.median().item(), 1), round(values.min().item(), 1)]
    return found


def text_diffs(generator: Generator, rows: np.ndarray, pictures: list[Source], edits: list) -> tuple[dict, dict]:
    """Mean cosines by noise and strength, and the pictures through their own noise by strength."""
    how, found, pictured = Sampling(**FAITHFUL), {}, {}
    was, wanted = (generator.clip.encode_text([edit[n] for edit in edits]) for n in (1, 2))
    own = {"start": picture_noise(generator, rows, pictures, how), "sigma": how.sigma_max}
    x0 = to_x0(pictures, generator.size, "cpu")
    original = generator.seen([one.picture for one in generator.finished(x0, [{}] * len(rows), [0] * len(rows), how)])
    for noise, start in (("own", own), ("seed", {})):
        for strength in STRENGTHS:
            turned = [
                slerp(row, text_difference(generator, to, source), strength)
                for row, (_, source, to) in zip(rows, edits, strict=True)
            ]
            made = generator.walk(torch.from_numpy(np.stack(turned)), None, [0] * len(rows), how, **start)
            shown = [one.picture for one in generator.finished(made, [{}] * len(rows), [0] * len(rows), how)]
            seen = generator.seen(shown)
            if noise == "own":
                pictured[strength] = shown
            cosines = [(seen * other).sum(1).mean().item() for other in (wanted, was, original)]
            found[f"{noise} {strength:g}"] = [*(round(c, 3) for c in cosines), round(psnr(made, x0).median().item(), 1)]
    return found, pictured


if __name__ == "__main__":
    main()
