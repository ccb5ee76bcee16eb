"""The figures of `lab denoise`. Each is made in style.drawing()."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from diffusion.lab.belief import Real, Track
from diffusion.lab.mosaic import mosaic, to_pictures
from diffusion.lab.noising import preserved
from diffusion.lab.style import BLACK, COLOURS, GREY, frame, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

PICTURES = 2  # of by_level
STRIP = 9  # steps of a strip


def by_level(real: Real, shown: Sequence[tuple[float, Tensor, Tensor, Tensor]], last: Mapping[str, float]) -> "Canvas":
    """Noise levels across; noisy, one step and walk of each of two pictures down; the real one at the left.

    last: what was measured at the highest level.
    """
    rows, names = [], []
    for number in range(min(PICTURES, len(real))):
        (own,) = to_pictures(real.x0[number : number + 1])
        noisy, once, walked = ([_one(part, number) for part in parts] for parts in
                               ([preserved(x, sigma) for sigma, x, _, _ in shown], [one for _, _, one, _ in shown],
                                [walk for *_, walk in shown]))  # fmt: skip
        rows += [[own, *noisy], [None, *once], [None, *walked]]
        names += ["noisy", "one step", "full walk"]
    columns = ["real\nσ 0", *(f"noise\nσ {sigma:g}" for sigma, *_ in shown)]
    colours = [COLOURS["noise"], BLACK, COLOURS["model"]] * min(PICTURES, len(real))
    return mosaic(rows, names, columns, groups=[3], colours=colours,
                  title=f"Detail that one step from σ {last['sigma']:g} has of real pictures': "
                        f"{last['one_step_detail']:.2g}; that a walk has: {last['walk_detail']:.2g}")  # fmt: skip


def detail_and_error(table: Sequence[Mapping[str, float]]) -> "Canvas":
    figure, ((left, right),) = panels(1, 2, width=5.6, height=4.4)
    sigmas = [row["sigma"] for row in table]
    for way, name, colour in (("one_step", "one step", BLACK), ("walk", "full walk", COLOURS["model"])):
        left.plot(sigmas, [row[f"{way}_detail"] for row in table], "o-", color=colour, label=name)
        right.plot(sigmas, [row[f"{way}_error"] for row in table], "o-", color=colour, label=name)
    left.axhline(1, color=COLOURS["data"], linestyle="--", label="real pictures")
    left.set_ylim(bottom=0), left.set_ylabel("fine detail (real = 1)")
    left.set_title("How sharp they are")
    right.set_ylim(bottom=0), right.set_ylabel("squared error to the real picture")
    right.set_title("How near they are")
    for axes in (left, right):
        axes.set_xscale("log"), axes.set_xlabel("noise level σ that it starts from"), axes.legend()
        axes.set_xticks(sigmas, [f"{sigma:g}" for sigma in sigmas]), axes.minorticks_off()
    return figure


def without_noise(real: Real, made: Mapping[tuple[str, str], Tensor], kept: float, untold: float) -> "Canvas":
    """Seeds across; told and untold, with noise and without, down. kept, untold: shares of the variance."""
    names = {"ddpm": "with noise", "ddpm_mean": "no noise"}
    first = to_pictures(real.x0[:1])
    rows = [[*to_pictures(pictures), first[0] if told != "told nothing" and sampler == "ddpm" else None]
            for (told, sampler), pictures in made.items()]  # fmt: skip
    labels = [f"{told},\n{names[sampler]}" for told, sampler in made]
    columns = [*(f"start {n + 1}" for n in range(len(rows[0]) - 1)), "real"]
    colours = [COLOURS["ddpm"], COLOURS["ddpm without noise"]] * 2
    return mosaic(rows, labels, columns, groups=[2], colours=colours,
                  title=f"Variance among starts that DDPM keeps without its noise: told {100 * kept:.0f} %, "
                        f"untold {100 * untold:.0f} %")  # fmt: skip


def by_settings(one: Real, rows: Sequence[Sequence[Image.Image]], steps: Sequence[int], guidance: Sequence[float],
                sharper: float, brighter: float) -> "Canvas":  # fmt: skip
    """Guidance across, steps down. sharper, brighter: detail over all steps, saturation over all guidance."""
    (own,) = to_pictures(one.x0)
    cells = [[*row, own if number == 0 else None] for number, row in enumerate(rows)]
    columns = [*(f"guidance {value:g}" for value in guidance), "real"]
    return mosaic(cells, [f"{n} step{'s' * (n > 1)}" for n in steps], columns,
                  title=f"Steps down: {sharper:.2g} x the detail. "
                        f"Guidance across: {brighter:.2g} x the colour")  # fmt: skip


def beliefs(track: Track, number: int) -> "Canvas":
    """One picture's walk as two rows."""
    chosen = np.unique(np.linspace(0, len(track.sigmas) - 1, STRIP).round().astype(int)).tolist()
    rows = [[_one(parts[step], number) for step in chosen] for parts in (track.shown, track.believed)]
    columns = [f"step {step + 1}\nσ {track.sigmas[step]:.2g}" for step in chosen]
    return mosaic(rows, ["where\nit is", "what it\nbelieves"], columns, colours=[COLOURS["noise"], BLACK],
                  title="A walk, and what the model believes on its way")  # fmt: skip


def belief_frames(track: Track) -> list[Image.Image]:
    """A frame for each step: pictures across, where it is and what it believes down."""
    frames = []
    for step, (shown, believed) in enumerate(zip(track.shown, track.believed, strict=True)):
        figure = mosaic([to_pictures(shown), to_pictures(believed)], ["where\nit is", "what it\nbelieves"],
                        colours=[COLOURS["noise"], BLACK],
                        title=f"step {step + 1} of {len(track.sigmas)}, σ {track.sigmas[step]:.2g}")  # fmt: skip
        frames.append(frame(figure))
    return frames


def from_nothing(few: Real, track: Track, guess: Tensor, end: Tensor) -> "Canvas":
    """Pictures across; noise, linear guess, one step, all steps, the real picture down."""
    parts = [track.shown[0], guess, track.believed[0], end, few.x0]
    names = ["0 steps", "linear\nguess", "1 step", f"{len(track.sigmas)} steps", "real"]
    colours = [COLOURS["noise"], GREY, BLACK, COLOURS["model"], COLOURS["data"]]
    return mosaic([to_pictures(part) for part in parts], names, colours=colours, groups=[1, 4],
                  title="No step at all, the linear guess, one step, and all of them")  # fmt: skip


def _one(pictures: Tensor, number: int) -> Image.Image:
    return to_pictures(pictures[number : number + 1])[0]
