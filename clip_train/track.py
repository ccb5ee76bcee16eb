"""Showing a run: TensorBoard or Weights & Biases while it trains, and curves.png from its metrics.jsonl."""

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from clip_train.folder import write_file
from clip_train.settings import UserError
from clip_train.watch import NUMBERS

LOGS = "logs"  # in the folder of a run: what trackers write; no part of what the folder is for
CURVES = "curves.png"
WAYS = ("auto", "tensorboard", "wandb", "none")


class Tracker(Protocol):
    """Somewhere numbers are shown."""

    def __call__(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """Called with each line of metrics.jsonl as a dict, hands it to every tracker; close it, or use `with`."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers = trackers

    def __call__(self, entry: Mapping[str, float]) -> None:
        numbers = {grouped(name): float(value) for name, value in entry.items() if name != "step"}
        for tracker in self.trackers:
            tracker(int(entry["step"]), numbers)

    def close(self) -> None:
        """Write what is still held back."""
        for tracker in self.trackers:
            tracker.close()

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_trackers(names: Sequence[str], folder: Path | str, config: Mapping[str, Any]) -> Trackers:
    """Trackers for the run in `folder`, which has `config`; call it on the main rank alone.

    names: out of WAYS; "auto" is TensorBoard where it is installed, else nothing. A run that was killed and goes on
    does not show its repeated steps twice. Nothing is written before the first line comes. UserError when one is not
    known or not installed.
    """
    folder, made = Path(folder), []
    for name in dict.fromkeys(names):
        if name not in WAYS:
            raise UserError(f"cannot track with {name!r}; there are: {', '.join(WAYS)}")
        if name in ("tensorboard", "wandb") and not _installed(name):
            install = "pip install 'unclip[track]'" if name == "tensorboard" else "pip install wandb"
            raise UserError(f"{name} is not installed: {install}, or track with something else")
        if name == "tensorboard" or name == "auto" and _installed("tensorboard"):
            made.append(TensorBoard(folder / LOGS, config))
        elif name == "wandb":
            made.append(WandB(folder / LOGS, config, run_name(folder)))
    return Trackers(made)


def _installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a folder that is called wandb is not the package


def grouped(name: str) -> str:
    """train/loss, val/t2i_R@1, watch/gap: the name of a number with the group it is shown in."""
    if name.startswith("val_"):
        return f"val/{name.removeprefix('val_')}"
    return f"{'watch' if name in NUMBERS else 'train'}/{name}"


def run_name(folder: Path) -> str:
    """The folder's name, without the ending it has until it is whole."""
    return folder.name.removesuffix(".partial")


class TensorBoard:
    """Scalars and the config as event files: tensorboard --logdir FOLDER."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.writer = None

    def __call__(self, step: int, numbers: Mapping[str, float]) -> None:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            resumed = self.folder.is_dir() and any(self.folder.glob("events.*"))
            # what an earlier run wrote at this step and later is hidden: it is written again from here on
            self.writer = SummaryWriter(str(self.folder), purge_step=step if resumed else None, flush_secs=10)
            if not resumed:
                self.writer.add_text("config", f"```json\n{json.dumps(self.config, indent=2)}\n```", 0)
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WandB:
    """A Weights & Biases run that a resumed training goes on with; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, folder: Path, config: Mapping[str, Any], name: str) -> None:
        self.folder = folder
        self.config = config
        self.name = name
        self.run = None

    def __call__(self, step: int, numbers: Mapping[str, float]) -> None:
        if self.run is None:
            import wandb

            self.folder.mkdir(exist_ok=True)
            record = self.folder / "wandb_run"
            if not record.exists():
                write_file(record, os.urandom(4).hex().encode())
            self.run = wandb.init(
                project="unclip",
                name=self.name,
                id=record.read_text(),
                resume="allow",  # steps it has already are not taken twice
                config=dict(self.config),
                dir=str(self.folder),
            )
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


def curves(folder: Path | str) -> Path:
    """Draw metrics.jsonl of a run as curves.png beside it, one panel for each kind of number that it holds.

    Folder: of a run, finished or not. UserError when it has no metrics.jsonl with numbers in it.
    """
    folder = Path(folder)
    history = read_metrics(folder / "metrics.jsonl")
    panels = [(title, found) for title, names in PANELS if (found := _held(history, names))]
    if not panels:
        raise UserError(f"{folder}/metrics.jsonl holds no numbers to draw; train first")

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(4 if len(panels) > 6 else 3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * rows + 0.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(run_name(folder.resolve()), fontsize=11, color=_INK)
    last = max(steps[-1] for steps, _ in history.values())
    for i, (title, names) in enumerate(panels):
        _draw_panel(figure.add_subplot(rows, columns, i + 1), title, {name: history[name] for name in names}, last)
    path = folder / CURVES
    hidden = folder / f".{CURVES}"
    figure.savefig(hidden, format="png")
    os.replace(hidden, path)
    return path


Series = tuple[list[int], list[float]]  # steps and values


def read_metrics(path: Path) -> dict[str, Series]:
    """metrics.jsonl as one series a number; a line that a kill cut short is left out."""
    history: dict[str, Series] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            step = entry.pop("step")
        except (json.JSONDecodeError, KeyError, AttributeError):
            continue
        for name, value in entry.items():
            steps, values = history.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return history


# Title of a panel, and the numbers in it; a trailing * stands for any ending.
PANELS = (
    ("loss, nats", ("loss", "chance", "distill")),
    ("validation", ("val_*",)),
    ("learning rate", ("lr",)),
    ("logit scale (1 / temperature)", ("scale", "bias")),
    ("effective rank", ("rank_image", "rank_text")),
    ("rows: gap and cosines", ("gap", "cos_right", "cos_wrong", "top1")),
    ("gradient norm", ("norm",)),
)
_INK, _PALE = "#1e1e1e", "#8a8a8a"
_COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#b83280", "#6b46c1", "#975a16")


def _held(history: Mapping[str, Series], names: Sequence[str]) -> list[str]:
    """Those of a panel's names that the history has."""
    found = [n for name in names for n in history if n == name or name.endswith("*") and n.startswith(name[:-1])]
    return [] if found == ["chance"] else found


def _draw_panel(axes: Any, title: str, series: Mapping[str, Series], last: int) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    colours = iter(_COLOURS * (1 + len(series) // len(_COLOURS)))
    for name, (steps, values) in series.items():
        label = name.removeprefix("val_").replace("_", " ")
        if name == "chance":
            axes.plot(steps, values, color=_PALE, linewidth=1, linestyle="--")
            where = {"xytext": (0, 2), "textcoords": "offset points", "ha": "right", "fontsize": 8}
            axes.annotate("chance", (steps[-1], values[-1]), color=_PALE, **where)
            continue
        colour = next(colours)
        if name in ("loss", "norm", "distill") and len(values) > 30:
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
            values = _smoothed(values)
        few = len(values) < 40
        axes.plot(steps, values, color=colour, linewidth=1.6, marker="o" if few else None, markersize=3, label=label)
    axes.set_title(title, fontsize=10, color=_INK, loc="left")
    axes.set_xlim(0, last * 1.02)
    axes.set_xlabel("step", fontsize=8, color=_PALE)
    axes.tick_params(labelsize=8, colors=_PALE)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if title.startswith("gradient") and any(value > 0 for _, values in series.values() for value in values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    elif title.startswith(("loss", "validation", "learning", "logit", "effective")) and "bias" not in series:
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    if len([name for name in series if name != "chance"]) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=_INK)


def _smoothed(values: Sequence[float]) -> list[float]:
    """The mean over a window of a thirtieth of the curve around each point, shorter at its ends."""
    half = max(1, len(values) // 60)
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(total[high] - total[low]) / (high - low) for low, high in ends]
