"""Cosines as a choice: softmax over names (zero-shot) or over a batch's captions, and what the temperature does to it.

CLIP, sections 2.3 and 3.1 (Radford et al. 2021, arXiv 2103.00020): probabilities are softmax(scale x cosines), the
scale, 1 / temperature, is learned with the rest.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_train import metrics
from diffusion.lab.pairs import ordinal, wrapped
from diffusion.lab.style import BLACK, BLUE, GREY, RED, drawing, panels, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

SCALES = np.geomspace(1, 300, 41)
BARS = 7  # of the most probable that are drawn


def probabilities(cosines: np.ndarray, scale: float) -> np.ndarray:
    """(..., C) cosines -> (..., C) probabilities; scale: 1 / temperature."""
    logits = scale * np.asarray(cosines, dtype=np.float64)
    weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weight / weight.sum(axis=-1, keepdims=True)


def candidates(probability: np.ndarray) -> np.ndarray:
    """exp(entropy): among how many equal candidates a choice would be as open. 1: decided; C: nothing known."""
    return np.exp(-(probability * np.log(np.maximum(probability, 1e-300))).sum(axis=-1))


def at_scales(cosines: np.ndarray, scales: Sequence[float]) -> list[dict[str, float]]:
    """Each picture of a batch chooses its caption at each scale. cosines (B, B): own pairs on the diagonal.

    "loss": mean -log probability of the own caption, in nats; a blind guess has log B. "confidence": mean probability
    of the choice; "accuracy": share that is right, the same at every scale; "candidates": mean; "ece": calibration
    error.
    """
    right = cosines.argmax(axis=1) == np.arange(len(cosines))
    rows = []
    for scale in scales:
        share = probabilities(cosines, scale)
        own, best = np.diag(share), share.max(axis=1)
        rows.append(
            {
                "scale": float(scale),
                "temperature": float(1 / scale),
                "loss": float(-np.log(np.maximum(own, 1e-300)).mean()),
                "confidence": float(best.mean()),
                "accuracy": float(right.mean()),
                "candidates": float(candidates(share).mean()),
                "ece": metrics.calibration_error(best, right),
            }
        )
    return rows


def draw_zero_shot(
    path: Path, picture: "Image.Image", names: Sequence[str], cosines: np.ndarray, scale: float, truth: str | None
) -> None:
    """One picture, and the names that CLIP finds most probable for it."""
    share = probabilities(cosines, scale)
    with drawing():
        figure, axes = panels(1, 2, width=4.8, height=4.4, gridspec_kw={"width_ratios": [1, 1.5]})
        left, right = axes[0]
        left.imshow(np.asarray(picture), interpolation="lanczos")
        _frameless(left)
        if truth is not None:
            left.set_title(f"Labelled\n{wrapped(truth, 26, 2)}", parse_math=False)
        _bars(right, names, share, None if truth is None else truth.lower())
        left.set_xlabel(_missed(names, share, truth, BARS, "its name"))
        right.locator_params(axis="x", nbins=5)
        right.axvline(1 / len(names), color=BLACK, linestyle="--", linewidth=1.5)
        right.set_xlabel(f"probability (dashed: a blind guess, 1/{len(names)})")
        right.set_title(f"Which of {len(names)} names? (temperature {1 / scale:.2g})")
        save(figure, path)


def draw_temperatures(
    path: Path,
    picture: "Image.Image",
    captions: Sequence[str],
    cosines: np.ndarray,
    scales: Sequence[tuple[str, float]],
    own: int,
) -> None:
    """One picture's choice among the batch's captions, hot to cold: the order stays, the confidence grows."""
    with drawing():
        widths = [0.75] + [1] * len(scales)
        figure, axes = panels(1, len(widths), width=3.4, height=4.0, gridspec_kw={"width_ratios": widths})
        axes[0, 0].imshow(np.asarray(picture), interpolation="lanczos")
        _frameless(axes[0, 0])
        axes[0, 0].set_xlabel(_missed(captions, probabilities(cosines, 1), captions[own], BARS - 1, "its own caption"))
        for n, (panel, (name, scale)) in enumerate(zip(axes[0, 1:], scales, strict=True)):
            share = probabilities(cosines, scale)
            _bars(panel, captions, share, captions[own].lower(), names=n == 0, count=BARS - 1)
            panel.set(xlim=(0, 1.3), xlabel="probability")
            panel.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            if n:
                panel.set_yticks([])
            panel.set_title(
                f"Temperature {1 / scale:.2g}, {name}:\nas open as {float(candidates(share)):.3g} equal choices"
            )
        save(figure, path)


def draw_curves(path: Path, rows: Sequence[dict[str, float]], own: float, size: int) -> None:
    """Loss, and confidence against accuracy, over the temperature; the CLIP's own is marked."""
    heat = [row["temperature"] for row in rows]
    best = min(rows, key=lambda row: row["loss"])
    mine = min(rows, key=lambda row: abs(np.log(row["scale"] / own)))
    with drawing():
        figure, axes = panels(1, 2, width=5.2, height=4.6)
        left, right = axes[0]
        left.plot(heat, [row["loss"] for row in rows], color=RED)
        left.axhline(np.log(size), color=GREY, linestyle="--")
        left.annotate(f"blind guess: log {size}", (heat[-1], np.log(size)), (0, 5), textcoords="offset points",
                      color="#555555")  # fmt: skip
        left.plot(best["temperature"], best["loss"], "o", color=RED, markersize=9,
                  label=f"least loss: {best['temperature']:.2g}")  # fmt: skip
        left.set(ylabel="loss at the own caption (nats)", ylim=(0, 1.2 * np.log(size)))
        left.set_yticks(range(int(np.log(size)) + 1))
        left.set_title("The loss is least at one temperature")
        right.plot(heat, [row["confidence"] for row in rows], color=RED, label="confidence")
        right.plot(heat, [row["accuracy"] for row in rows], color=BLUE, label="share that is right")
        right.set(ylim=(0, 1.06), ylabel="share of the batch")
        right.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
        right.set_title("Confidence melts, the order stays")
        for panel in (left, right):
            panel.set_xscale("log")
            panel.set_xticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
            panel.set_xlabel("temperature")
            panel.axvline(
                1 / own,
                color=BLACK,
                linestyle="--",
                label=f"the CLIP's own: {1 / own:.2g}",
            )
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
        right.plot(mine["temperature"], mine["confidence"], "o", color=RED, markersize=7)
        save(figure, path)


def _frameless(panel: "Axes") -> None:
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)


def _missed(labels: Sequence[str], share: np.ndarray, right: str | None, shown: int, what: str) -> str:
    """Where the right one comes, if it is not among those shown."""
    own = [i for i, label in enumerate(labels) if right is not None and label.lower() == right.lower()]
    place = 1 + int((share > share[own[0]]).sum()) if own else 0
    return f"{what}\ncomes {ordinal(place)}" if place > shown else ""


def _bars(
    panel: "Axes", labels: Sequence[str], share: np.ndarray, right: str | None, names: bool = True, count: int = BARS
) -> None:
    """The most probable as ranked bars, the right one strong."""
    best = np.argsort(-share, kind="stable")[:count][::-1]
    bars = panel.barh(range(len(best)), share[best], color=BLUE, height=0.72)
    panel.bar_label(bars, [f"{value:.0%}" if value >= 0.01 else "<1%" for value in share[best]], padding=4, fontsize=13)
    if names:
        panel.set_yticks(range(len(best)), [wrapped(labels[i], 26, 2) for i in best], fontsize=13)
        for label in panel.get_yticklabels():
            label.set_parse_math(False)
    panel.tick_params(axis="y", length=0)
    for bar, i in zip(bars, best, strict=True):
        strong = labels[i].lower() == right
        bar.set_alpha(1.0 if strong or right is None else 0.35)
    panel.set_xlim(0, max(float(share.max()) * 1.2, 1e-6))
