"""report.html: what a run of the whole loop gave, as one page without any other file."""

import base64
import html
import io
from pathlib import Path
from typing import Any

from PIL import Image

from clip_train.folder import write_file

INK, GREY = "#1b3a57", "#9aa5b1"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito's palette: told apart by colour-blind readers

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem; text-align: right }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: #f6f7f8 } th { color: #555 }
img { max-width: 100% } .quiet { color: #667; font-size: .9rem } pre { white-space: pre-wrap; color: #667 }
.cards { display: flex; flex-wrap: wrap; gap: 1rem }
.card { background: #f3f6f9; border-radius: 8px; padding: .8rem 1.2rem }
.card b { display: block; font-size: 1.5rem; color: #1b3a57 } .card span { color: #667; font-size: .85rem }
"""
WAYS = {"true": "its own image embedding", "prior": "its caption, by the prior", "text": "its text embedding as it is"}


def write_report(
    path: Path,
    report: dict[str, Any],
    logs: dict[str, list[dict[str, float]]],
    sheets: dict[str, Image.Image],
    attribution: str,
) -> Path:
    """Write report.html. report: what report.json holds; logs: metrics.jsonl of each training; sheets by name."""
    parts = [
        "<h1>unclip: the whole loop on real pictures</h1>",
        headline(report),
        "<h2>Captions find pictures</h2>",
        "<p>Text &rarr; picture, each split among its own pictures; all drawings of one name are right answers.</p>",
        recall_table(report["clip"]),
        picture(loss_curve(logs["clip"], "contrastive loss, nats", report["clip"]["training"]["chance"])),
        "<p>Captions of what training saw, and the pictures found; right ones are framed.</p>",
        picture(sheets["queries_train"]),
        "<p>Captions of <b>concepts that training never saw</b>, among pictures that it never saw either.</p>",
        picture(sheets["queries_unseen"]),
        "<h2>The prior: from a caption to the embedding of its picture</h2>",
        "<p>Cosine to the true image embedding, and the share with the true picture among the ten nearest.</p>",
        prior_table(report["prior"]),
        picture(loss_curve(logs["prior"], "denoising loss", None)),
        "<h2>The decoder: from an embedding to a picture</h2>",
        picture(loss_curve(logs["decoder"], "denoising loss", 1.0)),
        "<h2>Round trip</h2>",
        "<p>Generate a picture, embed it with CLIP, and look for the true picture among all of its split.</p>",
        loop_table(report["loop"]),
        "<p>Each four: the true picture; generated from its own embedding; from its caption by the prior; "
        "from its text embedding as it is.</p>",
    ]
    for split in ("train", "recombined", "unseen"):
        parts += [f"<h3>{split}</h3>", picture(sheets[f"generated_{split}"])]
    parts += [
        "<h2>Time and memory</h2>",
        stage_table(report),
        f"<p class=quiet>{html.escape(', '.join(f'{k} {v}' for k, v in report['machine'].items()))}</p>",
        "<h2>The pictures</h2>",
        f"<pre>{html.escape(attribution)}</pre>",
    ]
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>unclip report</title><style>{STYLE}</style>"
    write_file(path, (page + "<body>" + "\n".join(parts) + "</body></html>").encode())
    return path


def headline(report: dict[str, Any]) -> str:
    """The five numbers one asks for first."""
    clip, loop, prior = report["clip"], report["loop"]["train"], report["prior"]["unseen"]
    unseen = clip["unseen"]["text_to_image"]
    found, chance = percent(unseen["recall"]["R@10"]), percent(unseen["chance"]["R@10"])
    cards = [
        (percent(clip["train"]["text_to_image"]["recall"]["R@10"]), "captions find their picture in the top 10"),
        (found, f"the same for unseen concepts (chance {chance})"),
        (
            f"{prior['prior']['cosine']:.2f}",
            f"prior's cosine, unseen concepts (text itself {prior['text']['cosine']:.2f})",
        ),
        (
            percent(loop["true"]["top10"]),
            f"recognised after the round trip (chance {percent(loop['chance']['top10'])})",
        ),
        (f"{report['total_seconds'] / 60:.1f} min", "for everything"),
    ]
    shown = "".join(f"<div class=card><b>{big}</b><span>{small}</span></div>" for big, small in cards)
    return f"<div class=cards>{shown}</div>"


def recall_table(clip: dict[str, Any]) -> str:
    """Text -> picture recall beside chance."""
    rows = []
    for split in ("train", "recombined", "unseen"):
        r = clip[split]["text_to_image"]
        cells = [f"{percent(r['recall'][k])} ({percent(r['chance'][k])})" for k in ("R@1", "R@5", "R@10")]
        rows.append([split, r["rows"], *cells, f"{r['median_rank']:.0f}"])
    return table(["split", "pictures", "recall@1 (chance)", "recall@5", "recall@10", "median rank"], rows)


def prior_table(prior: dict[str, Any]) -> str:
    """Every guess, best first by its cosine on unseen concepts."""
    splits = ("train", "recombined", "unseen")
    names = sorted(prior["unseen"], key=lambda n: -prior["unseen"][n]["cosine"])
    head = ["guess", *[f"{s}: cosine" for s in splits], *[f"{s}: top 10" for s in splits]]
    rows = [
        [n, *[f"{prior[s][n]['cosine']:.3f}" for s in splits], *[percent(prior[s][n]["top10"]) for s in splits]]
        for n in names
    ]
    return table(head, rows)


def loop_table(loop: dict[str, Any]) -> str:
    """Round trip per split and way."""
    rows = []
    for split, ways in loop.items():
        for way, about in WAYS.items():
            if way in ways:
                w = ways[way]
                chance = percent(ways["chance"]["top10"])
                numbers = [percent(w["top1"]), f"{percent(w['top10'])} ({chance})", f"{w['median_rank']:.0f}"]
                rows.append([f"{split}: from {about}", *numbers, f"{w['cosine']:.3f}"])
    return table(["generated", "top 1", "top 10 (chance)", "median rank", "cosine"], rows)


def stage_table(report: dict[str, Any]) -> str:
    """Seconds and peak memory of each stage."""
    rows = [[name, f"{s['seconds']:.1f} s", f"{s['peak_mb']:.0f} MB"] for name, s in report["stages"].items()]
    return table(["stage", "time", "peak memory"], [*rows, ["total", f"{report['total_seconds']:.0f} s", ""]])


def table(head: list[str], rows: list[list[Any]]) -> str:
    """An HTML table; every cell is escaped."""
    cells = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table><tr>{top}</tr>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def percent(share: float) -> str:
    """0.123 -> '12 %', small shares with a decimal."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def picture(image: Image.Image) -> str:
    """The picture inside the page."""
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def loss_curve(log: list[dict[str, float]], name: str, chance: float | None) -> Image.Image:
    """The loss of each logged step, a running mean over it, and chance as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    steps, loss = np.array([e["step"] for e in log]), np.array([e["loss"] for e in log])
    wide = max(1, len(loss) // 30)
    mean = np.convolve(loss, np.ones(wide) / wide, "valid")
    figure, axes = plt.subplots(figsize=(8, 2.6), dpi=110)
    axes.plot(steps, loss, color=GREY, linewidth=0.7)
    axes.plot(steps[wide - 1 :], mean, color=BLUE, linewidth=1.8)
    if chance is not None:
        axes.axhline(chance, color=ORANGE, linestyle="--", linewidth=1)
        axes.text(steps[-1], chance, "chance", color=ORANGE, ha="right", va="bottom")
    axes.set_xlabel("step")
    axes.set_ylabel(name)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data, format="png")
    plt.close(figure)
    return Image.open(data).convert("RGB")
