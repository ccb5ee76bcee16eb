"""The figures of `unclip lab guidance`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.lab.experiment import Figure
from diffusion.lab.plane import Trained
from diffusion.lab.plane_figures import draw_cloud, draw_curve
from diffusion.lab.spiral import CLASSES, NOTHING, class_of, nearest
from diffusion.lab.style import COLOURS, drawing, outer_labels, panels, plane, save
from diffusion.lab.walks import at_level

PLACES = ((-1.1, 0.75), (-0.15, 1.25), (1.05, 0.95), (1.3, -0.2), (0.55, -1.2), (-0.75, -1.0), (-0.1, -0.1))


def figure_of_arrows(
    folder: Path, network: Trained, wanted: str = "cat", scale: float = 3.0, sigma: float = 0.5
) -> Figure:
    """The three arrows of classifier-free guidance at a few noisy points."""
    x = torch.tensor(PLACES)

    def towards(label: int) -> Tensor:
        return at_level(lambda x, s: network(x, s, {"label": torch.full((len(x),), label)}), x, sigma) - x

    null, cond = towards(NOTHING), towards(CLASSES.index(wanted))
    guided = null + scale * (cond - null)
    with drawing():
        figure, axes = panels(1, 1, width=6.6, height=7.9)
        one = axes[0, 0]
        plane(one, f"at noise level {sigma:g}, asked for a {wanted}", reach=1.75)
        draw_curve(one, classes=True, width=9)
        for start, way, colour, style in (
            (x, null, COLOURS["unconditional"], "-"),
            (x, cond, COLOURS["conditional"], "-"),
            (x, guided, COLOURS["guided"], "-"),
        ):
            _arrows(one, start, way, colour, style)
        for begin, end in zip(x + null, x + guided, strict=True):
            one.plot(*torch.stack([begin, end]).T, color="black", linewidth=1.2, linestyle=":", zorder=3)
        one.scatter(*x.T, s=55, c="white", edgecolors="black", linewidths=1.5, zorder=6)
        lines = [
            one.plot([], [], color=COLOURS["unconditional"], label="unconditional")[0],
            one.plot([], [], color=COLOURS["conditional"], label=f'conditional, "{wanted}"')[0],
            one.plot([], [], color="black", linestyle=":", linewidth=1.2, label=f"their difference, {scale:g} times")[
                0
            ],
            one.plot([], [], color=COLOURS["guided"], label=f"guided, scale {scale:g}")[0],
            *(one.plot([], [], color=COLOURS[name], alpha=0.35, linewidth=9, label=name)[0] for name in CLASSES),
        ]
        figure.legend(handles=lines, loc="outside lower center", ncols=2)
        save(figure, folder / "arrows.png")
    return Figure(
        file="arrows.png",
        caption="From each noisy point (white) the network points to its guess without a condition (grey) and with one "
        f"(blue). Guidance goes {scale:g} times as far from the first towards the second (red).",
    )


def figure_of_scales(folder: Path, drawn: dict[float, list[Tensor]], rows: list[dict[str, Any]]) -> Figure:
    """What is drawn for each class at each scale, in the class's colour."""
    columns = (len(drawn) + 1) // 2
    with drawing():
        figure, axes = panels(2, columns, width=3.3, height=3.95)
        for one in axes.flat[len(drawn) :]:
            one.set_axis_off()
        for one, (scale, classes) in zip(axes.flat, drawn.items(), strict=False):
            right = [row["precision"] for row in rows if row["scale"] == scale]
            plane(one, f"guidance {scale:g}: {100 * sum(right) / len(right):.0f} % right", reach=1.5)
            for name, points in zip(CLASSES, classes, strict=True):
                draw_cloud(one, points, COLOURS[name], size=6, alpha=0.7)
        outer_labels(axes)
        _legend_of_classes(figure, axes[0, 0])
        save(figure, folder / "scales.png")
    return Figure(
        file="scales.png",
        caption="Points asked for as person, dog and cat, at rising guidance. At 0 the condition is ignored; at 1 it "
        "is followed as trained, wrong labels and all; at 3 each class keeps to its part; at 10 points are thrown off "
        "the spiral.",
    )


def figure_of_precision(folder: Path, rows: list[dict[str, Any]]) -> Figure:
    """Precision and coverage of each class against the scale."""
    scales = sorted({row["scale"] for row in rows})
    with drawing():
        figure, axes = panels(1, 2, width=4.9, height=4.4)
        measures = (("precision", "right class, on the spiral, %"), ("coverage", "part of the class drawn, %"))
        for one, (measure, label) in zip(axes[0], measures, strict=True):
            for name, mark in zip(CLASSES, "os^", strict=True):
                values = [100 * row[measure] for scale in scales for row in rows
                          if row["scale"] == scale and row["class"] == name]  # fmt: skip
                one.plot(range(len(scales)), values, color=COLOURS[name], marker=mark, markersize=7, label=name)
            one.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
            one.set_ylim(0, 105)
            one.set_xlabel("guidance"), one.set_ylabel(label)
        axes[0, 0].legend(loc="lower right")
        save(figure, folder / "precision.png")
    return Figure(
        file="precision.png",
        caption="Guidance buys precision (left) with variety (right). Beyond a few times it loses both: the points "
        "leave the spiral.",
    )


def figure_of_negative(folder: Path, free: Tensor, others: Tensor) -> Figure:
    """All classes, and all but cats."""
    with drawing():
        figure, axes = panels(1, 2, width=4.2, height=5.1)
        for one, points, head in ((axes[0, 0], free, "no condition"), (axes[0, 1], others, '"not cat", scale 3')):
            label = class_of(nearest(points)[1])
            cats = (label == CLASSES.index("cat")).float().mean().item()
            plane(one, f"{head}: {100 * cats:.2g} % cats", reach=1.3)
            draw_curve(one, classes=True)
            for number, name in enumerate(CLASSES):
                draw_cloud(one, points[label == number], COLOURS[name], size=12, alpha=0.9)
        outer_labels(axes)
        _legend_of_classes(figure, axes[0, 0])
        save(figure, folder / "negative.png")
    return Figure(
        file="negative.png",
        caption='A negative condition: guidance from "cat" to nothing and beyond. The cats are gone, and what '
        "is left keeps away from them.",
    )


def _arrows(axes, start: Tensor, way: Tensor, colour: str, style: str) -> None:
    for (x, y), (dx, dy) in zip(start.tolist(), way.tolist(), strict=True):
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 2.2, "linestyle": style, "mutation_scale": 16,
                 "shrinkA": 0, "shrinkB": 0}  # fmt: skip
        axes.annotate("", xy=(x + dx, y + dy), xytext=(x, y), arrowprops=arrow, zorder=4)


def _legend_of_classes(figure, axes) -> None:
    handles = [axes.scatter([], [], s=60, c=COLOURS[name], label=name) for name in CLASSES]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(CLASSES))
