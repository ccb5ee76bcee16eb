"""The figures of `unclip lab guidance`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.guidance import classifier_free
from diffusion.lab.experiment import Figure
from diffusion.lab.plane import Trained
from diffusion.lab.plane_figures import draw_cloud, draw_curve, headline
from diffusion.lab.spiral import CLASSES, NOTHING, class_of, nearest
from diffusion.lab.style import COLOURS, drawing, outer_labels, panels, plane, save
from diffusion.lab.walks import at_level

PLACES = ((-1.1, 0.8), (-0.2, 1.3), (1.1, 1.15), (1.35, -0.3), (0.5, -1.25), (-0.85, -1.1))
NAMED_AT = ((0.1, 0.22), (-0.83, -0.1), (0.97, 0.48))  # person, dog, cat
TURNS = 12  # in which the points of a class are drawn


def figure_of_arrows(
    folder: Path, network: Trained, wanted: str = "cat", scale: float = 3.0, sigma: float = 0.5
) -> Figure:
    """The three arrows of classifier-free guidance at a few noisy points."""
    x = torch.tensor(PLACES)
    asked, nothing = ({"label": torch.full((len(x),), label)} for label in (CLASSES.index(wanted), NOTHING))
    null, cond, guided = (
        at_level(classifier_free(network, asked, nothing, one), x, sigma) - x for one in (0.0, 1.0, scale)
    )
    with drawing():
        figure, axes = panels(1, 1, width=6.8, height=7.9)
        headline(figure, f"Guidance {scale:g}: {scale:g} times the way from grey to blue")
        one = axes[0, 0]
        plane(one, f"at noise level {sigma:g}, asked for a {wanted}", reach=1.5)
        draw_curve(one, classes=True, width=9)
        _name_classes(one)
        _arrows(one, x + null, guided - null, "black", width=1.2)
        for way, name in ((null, "unconditional"), (cond, "conditional"), (guided, "guided")):
            _arrows(one, x, way, COLOURS[name])
        one.scatter(*x.T, s=55, c="white", edgecolors="black", linewidths=1.5, zorder=6)
        lines = [
            one.plot([], [], color=COLOURS["unconditional"], label="unconditional")[0],
            one.plot([], [], color=COLOURS["conditional"], label=f'conditional, "{wanted}"')[0],
            one.plot([], [], color="black", linewidth=1.2, label=f"{scale:g} times their difference")[0],
            one.plot([], [], color=COLOURS["guided"], label=f"guided, scale {scale:g}")[0],
        ]
        figure.legend(handles=lines, loc="outside lower center", ncols=2)
        save(figure, folder / "arrows.png")
    return Figure(
        file="arrows.png",
        caption="From each noisy point (white) the network points to its guess without a condition (grey) and with one "
        f"(blue). Guidance goes {scale:g} times as far from the first towards the second (black), and so the point "
        "is led (red).",
    )


def figure_of_scales(folder: Path, drawn: dict[float, list[Tensor]], rows: list[dict[str, Any]]) -> Figure:
    """What is drawn for each class at each scale, in the class's colour."""
    columns = (len(drawn) + 1) // 2
    with drawing():
        figure, axes = panels(2, columns, width=3.3, height=4.2)
        known = (f"{100 * mean_over_classes(rows, scale, 'precision'):.0f} % at {'' if scale else 'guidance '}{scale:g}"
                 for scale in sorted({0.0, 1.0, 3.0, max(drawn)}))  # fmt: skip
        headline(figure, f"Right: {', '.join(known)}")
        for one in axes.flat[len(drawn) :]:
            one.set_axis_off()
        for one, (scale, classes) in zip(axes.flat, drawn.items(), strict=False):
            kind = {0: " (unconditional)", 1: " (conditional)"}.get(scale, "")
            right = 100 * mean_over_classes(rows, scale, "precision")
            plane(one, f"guidance {scale:g}{kind}\n{right:.0f} % right", reach=1.5)
            for turn in range(TURNS):  # in turn, so that no class hides the others
                for name, points in zip(CLASSES, classes, strict=True):
                    draw_cloud(one, points[turn::TURNS], COLOURS[name], size=8, alpha=0.8)
        outer_labels(axes)
        _legend_of_classes(figure, axes[0, 0])
        save(figure, folder / "scales.png")
    return Figure(
        file="scales.png",
        caption="Points asked for as person, dog and cat, at rising guidance. At 0 the condition is ignored; at 1 it "
        "is followed as trained, wrong labels and all. Look at where each colour lies, how much of its part it fills, "
        "and whether points leave the spiral.",
    )


def figure_of_precision(folder: Path, rows: list[dict[str, Any]]) -> Figure:
    """Precision, coverage and over-saturation of each class against the scale."""
    scales = sorted({row["scale"] for row in rows})
    with drawing():
        figure, axes = panels(1, 3, width=4.3, height=4.5)
        top, off = scales[-1], mean_over_classes(rows, scales[-1], "outside")
        before, after = (
            [100 * mean_over_classes(rows, scale, name) for name in ("precision", "coverage")] for scale in (1.0, 3.0)
        )
        headline(
            figure,
            f"Guidance 1 → 3: right {before[0]:.0f} → {after[0]:.0f} %, drawn {before[1]:.0f} → "
            f"{after[1]:.0f} %; at {top:g}, {100 * off:.0f} % are off the spiral",
        )
        measures = (
            ("precision", "right class, on the spiral, % of points"),
            ("coverage", "part of the class drawn, %"),
            ("outside", "off the spiral, % of points"),
        )
        for one, (measure, label) in zip(axes[0], measures, strict=True):
            for name, mark in zip(CLASSES, "os^", strict=True):
                values = [100 * row[measure] for scale in scales for row in rows
                          if row["scale"] == scale and row["class"] == name]  # fmt: skip
                one.plot(range(len(scales)), values, color=COLOURS[name], marker=mark, markersize=7, label=name)
            one.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
            one.set_ylim(0, 105)
            one.set_xlabel("guidance scale"), one.set_ylabel(label)
        axes[0, 2].legend(loc="upper left")
        save(figure, folder / "precision.png")
    return Figure(
        file="precision.png",
        caption="What guidance buys and what it costs: precision (left), variety (middle), and points driven off the "
        "spiral (right), which count as wrong.",
    )


def figure_of_negative(folder: Path, free: Tensor, others: Tensor) -> Figure:
    """All classes, and all but cats."""
    with drawing():
        figure, axes = panels(1, 2, width=4.2, height=5.3)
        labels = [class_of(nearest(points)[1]) for points in (free, others)]
        share = [(label == CLASSES.index("cat")).float().mean().item() for label in labels]
        headline(
            figure, f'Cats without a condition and with "not cat": {100 * share[0]:.0f} and {100 * share[1]:.0f} %'
        )
        heads = "no condition", '"not cat", scale 3'
        for one, points, head, label, cats in zip(axes[0], (free, others), heads, labels, share, strict=True):
            plane(one, f"{head}: {100 * cats:.0f} % cats", reach=1.3)
            draw_curve(one, classes=True)
            for number, name in enumerate(CLASSES):
                draw_cloud(one, points[label == number], COLOURS[name], size=12, alpha=0.9)
        outer_labels(axes)
        _legend_of_classes(figure, axes[0, 0])
        save(figure, folder / "negative.png")
    return Figure(
        file="negative.png",
        caption='A negative condition: guidance from "cat" to nothing and beyond. Look at how many cats are left, and '
        "at how far from them the others keep.",
    )


def mean_over_classes(rows: list[dict[str, Any]], scale: float, measure: str) -> float:
    """Mean of a measure over the classes at one scale."""
    values = [row[measure] for row in rows if row["scale"] == scale]
    return sum(values) / len(values)


def _arrows(axes, start: Tensor, way: Tensor, colour: str, width: float = 2.4) -> None:
    for (x, y), (dx, dy) in zip(start.tolist(), way.tolist(), strict=True):
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "mutation_scale": 8 + 4 * width,
                 "shrinkA": 0, "shrinkB": 0}  # fmt: skip
        axes.annotate("", xy=(x + dx, y + dy), xytext=(x, y), arrowprops=arrow, zorder=4)


def _name_classes(axes) -> None:
    """Each class's name beside its part of the curve, where no arrow is."""
    for name, place in zip(CLASSES, NAMED_AT, strict=True):
        axes.text(*place, name, color=COLOURS[name], fontsize=15, fontweight="bold", ha="center", va="center", zorder=2)


def _legend_of_classes(figure, axes) -> None:
    handles = [axes.scatter([], [], s=60, c=COLOURS[name], label=name) for name in CLASSES]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(CLASSES))
