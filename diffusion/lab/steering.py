"""`unclip lab guidance`: a condition, what guidance makes of it, where it goes too far, and what is not wanted.

The three parts of the spiral are the classes. A share of the training labels is drawn blindly, as captions are not
always right: a network that follows its condition as trained is wrong as often, and guidance mends it.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_train.settings import Progress, UserError
from diffusion.guidance import classifier_free
from diffusion.lab.experiment import Experiment, Finding
from diffusion.lab.plane import PlaneConfig, Trained, train_plane
from diffusion.lab.plane_figures import draw_all
from diffusion.lab.spiral import BINS, CLASSES, NOTHING, Spiral, class_of, coverage, nearest
from diffusion.lab.steering_figures import (
    figure_of_arrows,
    figure_of_negative,
    figure_of_precision,
    figure_of_scales,
    mean_over_classes,
)
from diffusion.lab.walks import walk

CAT = CLASSES.index("cat")


@dataclass(frozen=True, kw_only=True)
class SteeringConfig:
    """Everything that decides the numbers of `lab guidance`."""

    plane: PlaneConfig = PlaneConfig(labels=True, wrong_label=0.2)
    points: int = 500  # training points on the spiral
    scales: tuple[float, ...] = (0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0)  # of guidance
    drawn: int = 600  # points a class at each scale
    sampler: str = "ddim"
    draw_steps: int = 32

    def __post_init__(self) -> None:
        if not self.plane.labels:
            raise UserError("lab guidance: its network must know classes; set labels = true")
        if self.drawn < 50 or self.draw_steps < 2:
            raise UserError("lab guidance: needs drawn >= 50 and draw_steps >= 2")
        if missing := {0.0, 1.0, 3.0} - set(self.scales):
            raise UserError(f"lab guidance: its scales must hold 0, 1 and 3; {min(missing):g} is missing")


def steering(config: SteeringConfig, folder: Path, on_progress: Progress | None = None) -> Experiment:
    """Train one network with classes; draw every class at every scale, and "not cat"; measure and draw."""
    seed = config.plane.seed
    spiral = Spiral.of(config.points, seed=seed)
    network = train_plane(config.plane, spiral, on_progress, folder=folder)
    drawn: dict[float, list[Tensor]] = {}
    rows: list[dict[str, Any]] = []
    for done, scale in enumerate(config.scales):
        drawn[scale] = [draw(config, network, label, NOTHING, scale) for label in range(len(CLASSES))]
        rows += [{"scale": scale, "class": name, **class_scores(spiral, points, CLASSES.index(name))}
                 for name, points in zip(CLASSES, drawn[scale], strict=True)]  # fmt: skip
        if on_progress:
            on_progress(done + 1, len(config.scales), stage="scales")
    free = draw(config, network, NOTHING, NOTHING, 0.0)
    others = {scale: draw(config, network, NOTHING, CAT, scale) for scale in (1.0, 2.0, 3.0)}
    negative = [{"scale": scale, **class_shares(points)} for scale, points in others.items()]

    return Experiment(
        title="Steering: the condition, amplified",
        figures=draw_all(
            [
                partial(figure_of_arrows, folder, network),
                partial(figure_of_scales, folder, drawn, rows),
                partial(figure_of_precision, folder, rows),
                partial(figure_of_negative, folder, free, others[3.0]),
            ],
            on_progress,
        ),
        findings=findings(rows, class_shares(free), negative, config.plane.wrong_label),
        tables={"scales": rows, "not_cat": negative, "oversaturated": [{"from_scale": oversaturated(rows)}]},
    )


def draw(config: SteeringConfig, network: Trained, label: int, unwanted: int, scale: float) -> Tensor:
    """Points (drawn, 2) of a class by classifier-free guidance away from another, each the index of one or NOTHING."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        cond, null = ({"label": torch.full((len(x),), one)} for one in (label, unwanted))
        return classifier_free(network, cond, null, scale)(x, sigma)

    seed = (NOTHING + 1) * config.plane.seed + label  # classes do not share their noise: their points would lie on one
    return walk(config.sampler, denoise, config.plane.grid(config.draw_steps), config.drawn, seed).end


def class_scores(spiral: Spiral, points: Tensor, label: int) -> dict[str, float]:
    """How well points (N, 2) are of a class.

    precision: share of them that lie on the curve, in the class's part; coverage: share of that part that has points;
    distance: mean way to the curve; outside: share beyond the curve's reach.
    """
    distance, arc = nearest(points)
    good = (distance < spiral.reach) & (class_of(arc) == label)
    bins = torch.arange(BINS)[class_of((torch.arange(BINS) + 0.5) / BINS) == label]
    return {
        "precision": good.float().mean().item(),
        "coverage": coverage(arc[good], bins, len(points)),
        "distance": distance.mean().item(),
        "outside": (distance >= spiral.reach).float().mean().item(),
    }


def class_shares(points: Tensor) -> dict[str, float]:
    """Share of the points (N, 2) that are nearest to each class's part of the curve."""
    label = class_of(nearest(points)[1])
    return {name: (label == number).float().mean().item() for number, name in enumerate(CLASSES)}


def oversaturated(rows: list[dict[str, Any]], share: float = 0.05) -> float | None:
    """The lowest scale above 1 at which more than `share` of the points lie off the curve; None if there is none."""
    scales = sorted({row["scale"] for row in rows if row["scale"] > 1})
    return next((scale for scale in scales if mean_over_classes(rows, scale, "outside") > share), None)


def right_share(scale: float, wrong: float) -> float:
    """Share of points of one class at the odds of its label raised to the scale: p(x) p(label | x)^scale, normalized.

    wrong: share of the labels drawn blindly, so that 1 - 2/3 wrong of them are right.
    """
    right, other = 1 - wrong * (1 - 1 / len(CLASSES)), wrong / len(CLASSES)
    if scale < 0:  # the same, of finite numbers alone
        return other**-scale / (other**-scale + (len(CLASSES) - 1) * right**-scale)
    return right**scale / (right**scale + (len(CLASSES) - 1) * other**scale)


def findings(
    rows: list[dict[str, Any]], free: dict[str, float], negative: list[dict[str, Any]], wrong: float
) -> list[Finding]:
    """The claims of the experiment. wrong: share of the labels drawn blindly."""

    def mean(scale: float, measure: str) -> float:
        return mean_over_classes(rows, scale, measure)

    top = max(row["scale"] for row in rows)
    once, thrice, left = (100 * right_share(scale, wrong) for scale in (1.0, 3.0, 1 - negative[-1]["scale"]))
    slack = 8 + 20 * wrong  # blind labels lie unevenly along the curve, and guidance amplifies that, too
    return [
        Finding(name="precision_0", unit="%", value=100 * mean(0.0, "precision"), low=23, high=40,
                says="without guidance (scale 0) a third of the points are of the class asked for, by chance"),
        Finding(name="precision_1", unit="%", value=100 * mean(1.0, "precision"), low=once - 17,
                high=min(once + 8, 100),
                says="following the condition as trained (scale 1), points are right about as often as the labels"),
        Finding(name="precision_3", unit="%", value=100 * mean(3.0, "precision"), low=thrice - slack,
                says="guidance 3 makes them right about as often as the labels' odds, cubed, say"),
        *([] if thrice - once < 5 else [
            Finding(name="precision_gain", unit="points", low=0.4 * (thrice - once),
                    value=100 * (mean(3.0, "precision") - mean(1.0, "precision")),
                    says="guidance 1 -> 3 raises the precision of the classes")]),
        Finding(name="coverage_gain", unit="points", value=100 * (mean(3.0, "coverage") - mean(1.0, "coverage")),
                high=0, says="and the part of its class that is drawn shrinks"),
        Finding(name="coverage_top", unit="%", value=100 * mean(top, "coverage"), high=80,
                says=f"at scale {top:g} only a part of each class is still drawn"),
        Finding(name="outside_top", unit="%", value=100 * mean(top, "outside"), low=5,
                says=f"and points are thrown off the spiral at scale {top:g}: over-saturated"),
        Finding(name="cats_unguided", unit="%", value=100 * free["cat"], low=23, high=43,
                says="a third of all points drawn without a condition are cats"),
        *([] if left > 5 else [
            Finding(name="cats_not_wanted", unit="%", value=100 * negative[-1]["cat"], high=10,
                    says='with "not cat" as the negative condition, at scale 3, hardly any are')]),
    ]  # fmt: skip
