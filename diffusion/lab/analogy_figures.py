"""How sums in the space are drawn: ranked bars, the pictures that were added and taken away, the score of them all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion.lab.analogies import Analogy
from diffusion.lab.pairs import Pairs, ordinal, square, wrapped
from diffusion.lab.style import BLUE, GREY, ORANGE, drawing, panels, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BARS = 6
TILES = 4  # pictures of a term that are shown


def draw_texts(path: Path, answers: Sequence[tuple[Analogy, dict[str, Any]]]) -> None:
    """One panel a sum of texts: the nearest words as ranked bars."""
    with drawing():
        figure, axes = panels(1, len(answers), width=4.6, height=4.4)
        for panel, (one, found) in zip(axes[0], answers, strict=True):
            _bars(panel, one, found, ORANGE)
            panel.set_title(_sum(one) + "\n" + _believed(one, found),
                            parse_math=False)  # fmt: skip
        axes[0, 0].set_ylabel("nearest words")
        figure.suptitle("Sums of captions, and the words nearest to what is left", fontsize=15)
        save(figure, path)


def draw_pictures(
    path: Path, pairs: Pairs, answers: Sequence[tuple[Analogy, dict[str, Any], list[np.ndarray]]]
) -> None:
    """One column a sum of pictures: what is added and taken away above, the nearest words below."""
    with drawing():
        options = {"gridspec_kw": {"height_ratios": [1, 1.5]}}
        figure, axes = panels(2, len(answers), width=4.6, height=3.2, **options)
        for (top, below), (one, found, shown) in zip(axes.T, answers, strict=True):
            _tiles(top, pairs, one, shown)
            _bars(below, one, found, BLUE)
            below.set_title(_believed(one, found), parse_math=False)
        axes[1, 0].set_ylabel("nearest words")
        figure.suptitle("The same sums of pictures, and the words nearest to what is left", fontsize=15)
        save(figure, path)


def draw_scores(path: Path, scores: Mapping[str, Mapping[str, float]], chance: float, count: int) -> None:
    """How often the missing word comes first: "texts" or "pictures" -> words below a bar -> share of the sums."""
    bars = [(kind, label, value) for kind, found in scores.items() for label, value in found.items()]
    places = [n + 0.6 * (kind != bars[0][0]) for n, (kind, _, _) in enumerate(bars)]
    strength = {"A − B": 1.0, "A alone": 0.35}
    with drawing():
        figure, axes = panels(width=1.5 * len(bars) + 1, height=4.2)
        panel = axes[0, 0]
        for place, (kind, label, value) in zip(places, bars, strict=True):
            colour = {"texts": ORANGE, "pictures": BLUE}[kind] if label in strength else GREY
            panel.bar(place, value, 0.8, color=colour, alpha=strength.get(label, 1.0))
            panel.annotate(f"{value:.0%}", (place, value), (0, 6), textcoords="offset points", ha="center",
                           bbox={"facecolor": "white", "edgecolor": "none", "pad": 0})  # fmt: skip
        panel.axhline(chance, color="black", linestyle="--", zorder=0, label=f"answers shuffled: {chance:.1%}")
        panel.set_xticks(places, [f"{kind}:\n{label}" for kind, label, _ in bars])
        panel.tick_params(axis="x", length=0)
        panel.set(ylim=(0, 1.22), ylabel="share of the sums")
        panel.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
        panel.legend(loc="upper right")
        panel.set_title(f"How often the missing word comes first ({count} sums)")
        save(figure, path)


def _bars(panel: "Axes", one: Analogy, found: dict[str, Any], colour: str) -> None:
    best = found["answers"][:BARS][::-1]
    cosines = [each["cosine"] for each in best]
    right = [each["word"].lower() == one.rest for each in best]
    first = [i == len(best) - 1 for i in range(len(best))]
    strong = right if any(right) else first if one.rest is None else [False] * len(best)
    bars = panel.barh(range(len(best)), cosines, color=colour, height=0.72)
    for bar, whole in zip(bars, strong, strict=True):
        bar.set_alpha(1.0 if whole else 0.35)
    panel.bar_label(bars, fmt="%.2f", padding=4, fontsize=12)
    panel.set_yticks(range(len(best)), [wrapped(each["word"], 18, 1) for each in best], fontsize=14)
    for label, whole in zip(panel.get_yticklabels(), strong, strict=True):
        label.set_parse_math(False)
        label.set_fontweight("bold" if whole else "normal")
    panel.tick_params(axis="y", length=0)
    panel.locator_params(axis="x", nbins=5)
    panel.set(xlabel=f"cosine ({found['words']} words ranked)", xlim=(min(0, *cosines), max(cosines) * 1.22))


def _sum(one: Analogy) -> str:
    """The expression in two lines, the second one beginning with a sign."""
    first, *others = (f"{'−' if term.weight < 0 else '+'} {'' if abs(term.weight) == 1 else f'{abs(term.weight):g} × '}"
                      f"{term.text}" for term in one.terms)  # fmt: skip
    return "\n".join(wrapped(line, 34, 2) for line in (first.removeprefix("+ "), " ".join(others)))


def _believed(one: Analogy, found: dict[str, Any]) -> str:
    """The margin of the first word over the second, how often chance has one as large, and a word that was missed."""
    ranked = [each["word"].lower() for each in found["answers"]]
    place = ranked.index(one.rest) + 1 if one.rest in ranked else 1
    missed = f"\n“{one.rest}” comes {ordinal(place)}"
    return f"margin {found['margin']:.2f} (p = {found['p_margin']:.2g})" + (missed if place > 1 else "")


def _tiles(panel: "Axes", pairs: Pairs, one: Analogy, shown: Sequence[np.ndarray]) -> None:
    """Each term's pictures in a square of up to four, its sign before it and its words below."""
    pitch = 1.5
    for n, (term, rows) in enumerate(zip(one.terms, shown, strict=True)):
        rows = rows[:TILES].tolist()
        side = 1 if len(rows) == 1 else 2
        for k, row in enumerate(rows):
            x, y = n * pitch + (k % side) / side, (k // side) / side + (0.25 if len(rows) == 2 else 0)
            tile = np.asarray(square(pairs.thumbnail(row, 128), 128))
            panel.imshow(tile, extent=(x, x + 1 / side, y + 1 / side, y), interpolation="lanczos")
        sign = ("+" if term.weight > 0 else "−") + (f" {abs(term.weight):g} ×" if abs(term.weight) != 1 else "")
        if n or term.weight != 1:
            panel.text(n * pitch - 0.25, 0.5, sign, ha="center", va="center", fontsize=24)
        panel.text(
            n * pitch + 0.5, 1.06, wrapped(term.text, 19, 2), ha="center", va="top", fontsize=12, parse_math=False
        )
    panel.set(xlim=(-0.3, (len(one.terms) - 1) * pitch + 1.3), ylim=(1.42, -0.03))
    panel.set_aspect("equal")
    panel.axis("off")
