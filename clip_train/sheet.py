"""Contact sheets: pictures with words, to look at."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from clip_train.folder import write_file

INK, PALE, EMPTY, RIGHT = (30, 30, 30), (110, 110, 110), (240, 240, 240), (26, 150, 65)
LABEL_LINES = 3  # a longer label ends in an ellipsis

Picture = Image.Image | None  # None is drawn as an empty cell


def contact_sheet(
    pictures: Sequence[Picture],
    labels: Sequence[str] | None = None,
    columns: int = 8,
    cell: int = 96,
    title: str | None = None,
) -> Image.Image:
    """Pictures in a grid, row by row, each in a square of `cell` pixels with its label wrapped beneath it."""
    labels = [""] * len(pictures) if labels is None else labels
    cells = [(picture, label, False) for picture, label in zip(pictures, labels, strict=True)]
    columns = max(1, min(columns, len(cells)))
    return _draw([(None, cells[low : low + columns]) for low in range(0, len(cells), columns)], columns, cell, title)


def query_sheet(
    queries: Sequence[str | Image.Image],
    pictures: Sequence[Sequence[Picture]],
    labels: Sequence[Sequence[str]] | None = None,
    right: Sequence[Sequence[bool]] | None = None,
    cell: int = 96,
    title: str | None = None,
) -> Image.Image:
    """One row a query: its text (or picture) at the left, then its hits, best first; right answers in green frames."""
    rows = []
    for i, (query, hits) in enumerate(zip(queries, pictures, strict=True)):
        words = labels[i] if labels else [""] * len(hits)
        marks = right[i] if right else [False] * len(hits)
        rows.append((query, list(zip(hits, words, marks, strict=True))))
    return _draw(rows, max((len(cells) for _, cells in rows), default=0), cell, title)


def fit_picture(picture: Image.Image, size: int) -> Image.Image:
    """The picture as RGB on white, as large as fits a square of `size`.

    Pictures of a few pixels grow by a whole factor, so that their pixels stay visible; the others are resampled.
    """
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    longest = max(picture.size)
    factor = size // longest
    if factor >= 2 and factor * longest >= 0.8 * size:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    scale = size / longest
    shape = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture if shape == picture.size else picture.resize(shape, Image.Resampling.LANCZOS)


Cell = tuple[Picture, str, bool]
Row = tuple[str | Image.Image | None, Sequence[Cell]]


def _draw(rows: Sequence[Row], columns: int, cell: int, title: str | None) -> Image.Image:
    gap = max(6, cell // 12)
    font = ImageFont.load_default(size=max(10, cell // 8))
    large = ImageFont.load_default(size=max(13, cell // 6))
    line = _line_height(font)
    queries = any(query is not None for query, _ in rows)
    left = gap + (2 * cell + gap if queries else 0)  # where the first column starts
    width = max(left + columns * (cell + gap), 3 * cell)

    titles = _wrap(title, large, width - 2 * gap, 3) if title else []
    top = gap + len(titles) * _line_height(large) + (gap if titles else 0)
    wrapped = [[_wrap(label, font, cell, LABEL_LINES) for _, label, _ in cells] for _, cells in rows]
    heights = [cell + gap + max((len(lines) for lines in words), default=0) * line + gap // 2 for words in wrapped]
    sheet = Image.new("RGB", (width, top + sum(heights) + gap // 2), "white")
    pen = ImageDraw.Draw(sheet)
    _write(pen, gap, gap, titles, large, INK)
    for (query, cells), words, height in zip(rows, wrapped, heights, strict=True):
        if isinstance(query, Image.Image):
            _paste(sheet, query, gap + cell // 2, top, cell)
        elif query is not None:
            lines = _wrap(query, large, 2 * cell, max(1, (height - gap) // _line_height(large)))
            _write(pen, gap, top + max(0, (cell - len(lines) * _line_height(large)) // 2), lines, large, INK)
        for i, ((picture, _, right), lines) in enumerate(zip(cells, words, strict=True)):
            x = left + i * (cell + gap)
            if picture is None:
                pen.rectangle((x, top, x + cell - 1, top + cell - 1), fill=EMPTY)
            else:
                _paste(sheet, picture, x, top, cell)
            if right:
                pen.rectangle((x - 3, top - 3, x + cell + 2, top + cell + 2), outline=RIGHT, width=3)
            _write(pen, x, top + cell + 4, lines, font, RIGHT if right else PALE)
        top += height
    return sheet


def _paste(sheet: Image.Image, picture: Image.Image, x: int, y: int, cell: int) -> None:
    fitted = fit_picture(picture, cell)
    sheet.paste(fitted, (x + (cell - fitted.width) // 2, y + (cell - fitted.height) // 2))


def _write(
    pen: ImageDraw.ImageDraw, x: int, y: int, lines: Sequence[str], font: ImageFont.FreeTypeFont, ink: tuple
) -> None:
    for i, line in enumerate(lines):
        pen.text((x, y + i * _line_height(font)), line, font=font, fill=ink)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """The text in at most `most` lines of `width` pixels; words wider than a line are cut."""
    text = " ".join(text[:1000].split())
    lines, line = [], ""
    while text and len(lines) < most:
        word, _, rest = text.partition(" ")
        longer = f"{line} {word}".lstrip()
        if font.getlength(longer) <= width:
            line, text = longer, rest
        elif line:
            lines.append(line)
            line = ""
        else:  # one word, too wide for a line of its own
            cut = max(1, sum(font.getlength(word[: i + 1]) <= width for i in range(len(word))))
            line, text = word[:cut], text[cut:].lstrip()
    if line and len(lines) < most:
        lines.append(line)
        line = ""
    if text or line:  # something is left over
        last = lines[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + "…"
    return lines


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return round(font.size * 1.25)


def save_sheet(sheet: Image.Image, path: Path | str) -> None:
    """Write a sheet as a PNG, whatever the name's suffix says; UserError if that is not possible."""
    data = io.BytesIO()
    sheet.save(data, "PNG", optimize=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_file(Path(path), data.getvalue())
