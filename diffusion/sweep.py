"""Sweep: the same pictures drawn with many settings, one row of a table each, so that the settings can be chosen.

All rows are drawn for the same embeddings with the same seeds, and judged against the same real pictures: differences
between rows are surer than each row's interval, which is about other pictures.
"""

import csv
import io
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from clip_train.fit import resolved_precision
from clip_train.folder import Input, Manifest, Workspace, write_file
from clip_train.settings import Progress, UserError, config_to_json
from diffusion.distances import kernel_difference
from diffusion.examine import Exam, Way, draw, extractors
from diffusion.generate import Sampling
from diffusion.heldout import HeldOut
from diffusion.judge import Judge
from diffusion.samplers import SAMPLERS, SampleNoise, sample
from diffusion.steering import passes

AXES = ("sampler", "steps", "eta", "guidance")


def plan(
    how: Sampling,
    samplers: Sequence[str] = (),
    steps: Sequence[int] = (),
    etas: Sequence[float] = (),
    guidances: Sequence[float] = (),
) -> list[Sampling]:
    """Every combination, `how` deciding what is not listed; samplers that know no eta have one row for all of them.

    UserError: a sampler that there is not, a setting out of its range, or nothing to compare.
    """
    rows = []
    for sampler, few, guidance in itertools.product(
        samplers or [how.sampler], steps or [how.steps], guidances or [how.guidance]
    ):
        if sampler not in SAMPLERS:
            raise UserError(f"no sampler {sampler!r}: take {', '.join(SAMPLERS)}")
        takes_eta = SAMPLERS[sampler].eta is not None
        for eta in (etas or [replace(how, sampler=sampler).own_eta]) if takes_eta else [0.0]:
            rows.append(replace(how, sampler=sampler, steps=few, eta=eta, guidance=guidance))
    rows = list(dict.fromkeys(rows))
    if len(rows) < 2:
        raise UserError("a sweep needs at least two settings: --steps 10,20,50, --eta 0,1, --sampler, --guidance")
    return rows


def sweep(
    way: Way,
    held: HeldOut,
    settings: Sequence[Sampling],
    out: Path | str,
    exam: Exam | None = None,
    *,
    on_progress: Progress | None = None,
) -> Manifest:
    """Draw and judge each setting. Writes a folder: table.csv, table.json and plot.png, and a sheet of the first few.

    A row is kept as soon as it is done: a killed sweep goes on with the next one. on_progress counts rows; its text
    says what is being drawn.
    """
    exam, generator = exam or Exam(), way.generator
    settings = [replace(how, precision=resolved_precision(how.precision, generator.device)) for how in settings]
    picked, others = held.split(exam.count, exam.seed)
    seeds = [exam.seed + number for number in range(len(picked))]
    config = {"exam": config_to_json(exam), "start": way.start, "rows": [config_to_json(how) for how in settings]}
    inputs = {name: Input(fingerprint, name) for name, fingerprint in generator.fingerprints.items()}
    inputs["held"] = Input(held.fingerprint, held.shards or held.name)
    space = Workspace.open(out, "sweep", config, inputs, "unclip evaluate sweep")
    if space.done:
        return space.done
    judge = Judge(held, picked, others, generator.clip, extractors(exam, generator), exam.seed)
    folder = space.path / "rows"
    scratch = space.path / "scratch"  # what was seen in each row's pictures; goes when the table is made
    folder.mkdir(exist_ok=True)
    scratch.mkdir(exist_ok=True)
    for number, how in enumerate(settings):
        path = folder / f"{number:04d}.json"
        if not path.exists():
            tell = _within(on_progress, number, len(settings), label(how))
            began = time.perf_counter(), time.process_time()
            pictures = draw(way, held, picked, seeds, how, exam.batch_size, on_progress=tell)
            seconds, core = time.perf_counter() - began[0], time.process_time() - began[1]
            cost = {
                "calls": calls(how),
                "seconds_per_picture": seconds / len(pictures),
                "cpu_seconds_per_picture": core / len(pictures),
            }
            seen = judge.look(pictures)
            row = {axis: getattr(how, axis) for axis in AXES} | cost | judge.figures(seen, pictures[0].width)
            _save_seen(scratch / f"{number:04d}.npz", seen)
            _strip(pictures).save(folder / f"{number:04d}.png")
            write_file(path, json.dumps(row, indent=1).encode())
        if on_progress:
            on_progress(number + 1, len(settings), stage=label(how))
    rows = [json.loads((folder / f"{number:04d}.json").read_text()) for number in range(len(settings))]
    with Image.open(folder / "0000.png") as first:
        size = first.height
    _add_differences(rows, [scratch / f"{number:04d}.npz" for number in range(len(settings))], judge, size)
    table = {
        "count": len(picked),
        "size": size,
        "held": held.name,
        "start": way.start,
        "seed": exam.seed,
        "rows": rows,
        "real": judge.real(size),
        "chance": judge.chance(),
    }
    write_file(space.path / "table.json", json.dumps(table, indent=1).encode())
    write_file(space.path / "table.csv", to_csv(table).encode())
    plot(table).save(space.path / "plot.png")
    _sheet(settings, folder).save(space.path / "sheet.png")
    return space.publish({"rows": len(rows), "count": len(picked)})


def _save_seen(path: Path, seen: dict[str, np.ndarray]) -> None:
    file = io.BytesIO()
    np.savez(file, **{name: rows.astype(np.float32) for name, rows in seen.items() if name != "pixels"})
    write_file(path, file.getvalue())


def _add_differences(rows: list[dict[str, Any]], paths: list[Path], judge: Judge, size: int) -> None:
    """Under each row's features, "above_best": the kernel distance above that of the row with the least."""
    for one in judge.features:
        measure = one.called("kernel")
        best = min(range(len(rows)), key=lambda number: rows[number]["features"][one.name][measure])
        real = judge.reference(size)[one.name]
        least = np.load(paths[best])[one.name]
        for row, path in zip(rows, paths, strict=True):
            above = kernel_difference(real, np.load(path)[one.name], least, judge.seed)
            figures = row["features"][one.name]
            figures["above_best"] = above.value
            figures["interval"]["above_best"] = [above.low, above.high]


def calls(how: Sampling) -> int:
    """Samples that go through the networks for a picture: guidance takes two and more a step, each as others do."""
    met: list[float] = []

    def guess(x: Tensor, sigma: Tensor) -> Tensor:
        met.append(float(sigma[0]))
        return x * 0

    sample(how.sampler, guess, how.sigmas(), SampleNoise([0], (1,)), eta=how.eta)
    low, high = how.interval
    return how.candidates * sum(passes(how) if low <= sigma <= high else 1 for sigma in met)


def label(how: Sampling) -> str:
    """A row's name."""
    eta = f" eta {how.own_eta:g}" if SAMPLERS[how.sampler].eta is not None else ""
    return f"{how.sampler}{eta}, {how.steps} steps, guidance {how.guidance:g}"


def flat_rows(table: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows and the real pictures' with one number a column: NAME, NAME_low, NAME_high."""
    real = {axis: "" for axis in AXES} | {"sampler": "real pictures"} | table["real"]
    return [_flat_row(row) for row in [*table["rows"], real]]


def to_csv(table: dict[str, Any]) -> str:
    """The table as text, a line a row and the real pictures last."""
    rows = flat_rows(table)
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def plot(table: dict[str, Any]) -> Image.Image:
    """Kernel distance in each of the features over the network's calls (over guidance, where only that varies).

    One line for each sampler, eta and (where calls are the axis) guidance, with intervals; the floor is dashed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = table["rows"]
    over = (
        "calls"
        if len({row["steps"] for row in rows}) > 1 or len({row["guidance"] for row in rows}) == 1
        else "guidance"
    )
    names = list(table["real"]["features"])
    figure, axes = plt.subplots(1, len(names), figsize=(1 + 4.6 * len(names), 4.2), dpi=110, squeeze=False)
    several = len({row["guidance"] for row in rows}) > 1 and over == "calls"
    lines: dict[str, list[dict]] = {}
    for row in rows:
        eta = f" eta {row['eta']:g}" if SAMPLERS[row["sampler"]].eta is not None else ""
        lines.setdefault(row["sampler"] + eta + (f" g {row['guidance']:g}" if several else ""), []).append(row)
    for panel, name in zip(axes[0], names, strict=True):
        measure = next(m for m in ("kernel", "KID") if m in table["real"]["features"][name])
        for mark, (title, some) in zip(itertools.cycle("osv^D*Xph"), lines.items(), strict=False):
            some = sorted(some, key=lambda row: row[over])
            value = [row["features"][name][measure] for row in some]
            low, high = zip(
                *(row["features"][name]["interval"][measure] or (v, v) for row, v in zip(some, value, strict=True)),
                strict=True,
            )
            error = [
                [v - a for v, a in zip(value, low, strict=True)],
                [b - v for v, b in zip(value, high, strict=True)],
            ]
            style = {"marker": mark, "markersize": 4, "capsize": 2, "linewidth": 1.2, "elinewidth": 0.6}
            panel.errorbar([row[over] for row in some], value, error, label=title, **style)
        real = table["real"]["features"][name]
        floor = (real["interval"][measure] or [0, real[measure]])[1]
        panel.axhline(max(floor, 0), color="grey", linestyle="--", linewidth=1)
        panel.text(0.99, max(floor, 0), "real from real, upper end ", color="grey", ha="right", va="bottom", fontsize=7,
                   transform=panel.get_yaxis_transform())  # fmt: skip
        panel.set_xlabel("network calls a picture" if over == "calls" else "guidance")
        panel.set_ylabel(f"{measure} distance x 1000" if measure == "kernel" else "KID x 1000")
        panel.set_title(name, fontsize=9)
        if over == "calls":
            panel.set_xscale("log")
            ticks = sorted({row["calls"] for row in rows})
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.set_xticks([], minor=True)
        values = [row["features"][name][measure] for row in rows]
        if min(values) > 0 and max(values) > 8 * min(values):
            panel.set_yscale("log")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][-1].legend(fontsize=7, frameon=False)
    figure.suptitle(f"{table['count']} pictures of {table['held']}, {table['size']} px; bars: 95 %", fontsize=9)
    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data, format="png")
    plt.close(figure)
    return Image.open(data).convert("RGB")


def _flat_row(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in row.items():
        if name == "interval":
            for of, ends in value.items():
                low, high = ends or (None, None)
                out |= {f"{prefix}{of}_low": low, f"{prefix}{of}_high": high}
        elif isinstance(value, dict):
            out |= _flat_row(
                value, f"{prefix}{name}." if name not in ("features", "round_trip", "variance") else prefix
            )
        else:
            out[f"{prefix}{name}"] = value
    return out


def _strip(pictures: Sequence[Image.Image], most: int = 12) -> Image.Image:
    """The first pictures beside one another."""
    wide, high = pictures[0].size
    strip = Image.new("RGB", (wide * min(most, len(pictures)), high), "white")
    for number, picture in enumerate(pictures[:most]):
        strip.paste(picture, (number * wide, 0))
    return strip


def _sheet(settings: Sequence[Sampling], folder: Path) -> Image.Image:
    from clip_train.sheet import query_sheet

    rows = []
    for number in range(len(settings)):
        with Image.open(folder / f"{number:04d}.png") as strip:
            size = strip.height
            rows.append([strip.crop((left, 0, left + size, size)) for left in range(0, strip.width, size)])
    return query_sheet([label(how) for how in settings], rows, cell=64)


def _within(on_progress: Progress | None, number: int, of: int, text: str) -> Progress | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(number, of, stage=text, pictures=done)
