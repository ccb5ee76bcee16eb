"""lab.html: chapters of experiments as one page that needs no other file."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from diffusion.lab.experiment import Finding, read_numbers

if TYPE_CHECKING:
    from diffusion.lab.story import Chapter

VIEWPORT = '<meta name=viewport content="width=device-width, initial-scale=1">'
STYLE = """
body { font: 17px/1.55 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.9rem } h2 { margin-top: 3rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem }
h3 { margin-top: 2rem } nav a { margin-right: 1rem; white-space: nowrap } a { color: #0072b2 }
figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto; display: block; margin: auto }
figcaption { color: #445; font-size: .95rem; margin: .4rem auto 0; max-width: 760px }
table { border-collapse: collapse; margin: 1rem 0; width: 100%; font-size: .95rem }
td, th { padding: .3rem .6rem; text-align: left; vertical-align: top } th { color: #555 }
@media (min-width: 700px) { td:nth-child(2), td:nth-child(3) { white-space: nowrap } }
tr:nth-child(even) { background: #f6f7f8 }
.yes { color: #00664a; font-weight: 600 } .no { color: #b03a00; font-weight: 600 }
.quiet { color: #667; font-size: .9rem } code { background: #f3f6f9; padding: .1rem .3rem; border-radius: 4px }
"""


def page_of(chapters: "Sequence[Chapter]", folder: Path, about: str, missing: Mapping[str, str]) -> str:
    """The page's text. folder: each experiment's numbers.json and figures in a folder of its name.

    about: what models these are. missing: experiment -> why it was not run.
    """
    titles = [html.escape(chapter.title) for chapter in chapters]
    links = " ".join(f'<a href="#chapter{n}">{n}. {title}</a>' for n, title in enumerate(titles, 1))
    body = [f"<h1>The lab</h1><p>{html.escape(about)}</p><nav>{links}</nav>"]
    for number, chapter in enumerate(chapters, 1):
        body.append(f'<h2 id="chapter{number}">{number}. {titles[number - 1]}</h2>')
        body.append(f"<p>{html.escape(chapter.text)}</p>")
        for name in chapter.experiments:
            why = missing.get(name)
            left_out = f"<p class=quiet><code>unclip lab {name}</code> was left out: {html.escape(why or '')}</p>"
            body.append(_section(folder / name) if why is None else left_out)
    head = f"<meta charset=utf-8>{VIEWPORT}<title>unclip: the lab</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en>{head}<body>{''.join(body)}</body></html>"


def _section(folder: Path) -> str:
    """One experiment: figures with what to see in them, then findings."""
    numbers = read_numbers(folder)
    figures = (
        f'<figure><img alt="{html.escape(one["caption"])}" src="{_inline(folder / one["file"])}">'
        f"<figcaption>{html.escape(one['caption'])}</figcaption></figure>"
        for one in numbers["figures"]
    )
    rows = "".join(_row(Finding.from_json(one)) for one in numbers["findings"])
    return (
        f"<h3>{html.escape(numbers['title'])}</h3>{''.join(figures)}"
        f"<table><tr><th>claim<th>found<th>asked for<th></tr>{rows}</table>"
        f"<p class=quiet>again: <code>unclip lab {html.escape(numbers['experiment'])}</code></p>"
    )


def _row(finding: Finding) -> str:
    cells = (finding.says, finding.found, finding.asked)
    verdict = "<td class=yes>yes" if finding.holds else "<td class=no>no"
    return f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}{verdict}</td></tr>"


def _inline(path: Path) -> str:
    """A figure as an address that holds it: animations as they are, pictures as WebP, which is a third as large."""
    if path.suffix == ".gif":
        kind, data = "gif", path.read_bytes()
    else:
        file = io.BytesIO()
        with Image.open(path) as picture:
            picture.convert("RGB").save(file, "WEBP", quality=90, method=4)
        kind, data = "webp", file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
