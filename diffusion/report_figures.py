"""Figures as tables for a terminal: value and 95 % interval in one cell."""

from collections.abc import Mapping
from typing import Any

Table = tuple[str, tuple[str, ...], list[tuple]]


def exam_tables(figures: Mapping[str, Any]) -> list[Table]:
    """Of examine(): one table of what was recognised, and one of the distances in each of the features."""
    ways, luck = figures["ways"], figures["chance"]
    scores = list(next(iter(ways.values()))["clip_score"])
    head = ("", "top 1", "top 10", "median rank", "cosine", *(f"CLIP score ({name})" for name in scores), "variance")
    rows = [
        (
            name,
            *(cell(row["round_trip"], key) for key in ("top1", "top10", "median_rank", "cosine")),
            *(cell(row["clip_score"][one], "score") for one in scores),
            cell(row["variance"], "ratio"),
        )
        for name, row in ways.items()
    ]
    rows.append(("chance", *(number(luck[key]) for key in ("top1", "top10", "median_rank")), *[""] * (len(scores) + 2)))
    title = f"{figures['count']} pictures of {figures['held']}, {figures['size']} px; (95 % interval)"
    tables = [(title, head, rows)]
    for feature in next(iter(ways.values()))["features"]:
        names = [name for name in ways["real"]["features"][feature] if name != "interval"]
        rows = [(name, *(cell(row["features"][feature], one) for one in names)) for name, row in ways.items()]
        said = tuple(f"{name} x 1000" if name in ("kernel", "KID") else name for name in names)
        tables.append((f"distances in the features of {feature}; 'real' is the floor", ("", *said), rows))
    return tables


def loop_tables(figures: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Of evaluate_loop_folders, by the folder's name."""
    keys = ("top1", "top10", "median_rank", "cosine")
    tables = []
    for folder, numbers in figures.items():
        rows = [
            (name, *(cell(row, key) if "interval" in row else number(row[key]) if key in row else "" for key in keys))
            for name, row in numbers.items()
        ]
        count = next(iter(numbers.values()))
        title = f"{folder}: {count['count']} captions, {count['rows']} pictures to tell apart; (95 % interval)"
        tables.append((title, ("from", "top 1", "top 10", "median rank", "cosine"), rows))
    return tables


def sweep_table(table: Mapping[str, Any]) -> Table:
    """Of sweep()'s table.json: a line a row, the real pictures last."""
    features = list(table["real"]["features"])
    kernel = {name: next(m for m in ("kernel", "KID") if m in table["real"]["features"][name]) for name in features}
    head = ("sampler", "steps", "eta", "guidance", "calls", "s/picture", "top 10", "variance")
    head += tuple(f"{kernel[name]} x 1000 ({name})" for name in features)
    rows = []
    for row in [*table["rows"], {"sampler": "real pictures"} | table["real"]]:
        given = [row.get(key, "") for key in ("sampler", "steps", "eta", "guidance", "calls")]
        cost = f"{row['seconds_per_picture']:.3f}" if "seconds_per_picture" in row else ""
        figures = [cell(row["round_trip"], "top10"), cell(row["variance"], "ratio")]
        figures += [cell(row["features"][name], kernel[name]) for name in features]
        rows.append((*given, cost, *figures))
    return (f"{table['count']} pictures of {table['held']}, {table['size']} px; (95 % interval)", head, rows)


def cell(row: Mapping[str, Any], name: str) -> str:
    """ "0.350 (0.310-0.392)"."""
    if row["interval"][name] is None:
        return number(row[name])
    low, high = row["interval"][name]
    return f"{number(row[name])} ({number(low)} to {number(high)})"


def number(value: float) -> str:
    """Three or four digits, whatever the size."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
