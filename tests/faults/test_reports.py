"""The pages that a run leaves, in a browser: names and captions in them stay text. The server's own: test_page.py."""

import json
import os
import shutil

import pytest
from PIL import Image

from diffusion.lab.page import page_of
from diffusion.lab.story import Chapter
from diffusion.report import write_report

EVIL = '"\'><img src=x onerror="window.hacked=1"></script><script>window.hacked=2</script>'
SPLITS = ("train", "recombined", "unseen")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("UNCLIP_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def lab(folder):
    """lab.html with a hostile text wherever one can be."""
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    finding = {"name": EVIL, "says": EVIL, "value": 1.0, "low": 0.0, "high": 2.0, "unit": EVIL}
    numbers = {"experiment": EVIL, "title": EVIL, "figures": [{"caption": EVIL, "file": "../a.png"}]}
    (folder / "one").mkdir()
    (folder / "one" / "numbers.json").write_text(json.dumps({**numbers, "findings": [finding]}))
    page = folder / "lab.html"
    page.write_text(page_of([Chapter(EVIL, EVIL, ["one", "two"])], folder, EVIL, {"two": EVIL}), encoding="utf-8")
    return page


def report(folder):
    """report.html with a hostile text wherever one can be."""
    shares = {"R@1": 0.1, "R@5": 0.2, "R@10": 0.3}
    recall = {"text_to_image": {"rows": EVIL, "median_rank": 1.0, "recall": shares, "chance": shares}}
    guess, way = {"cosine": 0.5, "top10": 0.5}, {"top1": 0.5, "top10": 0.5, "median_rank": 1.0, "cosine": 0.5}
    ways = {"true": way, "prior": way, "text": way, "chance": {"top10": 0.1}}
    found = {
        "clip": {**dict.fromkeys(SPLITS, recall), "training": {"chance": 1.0}},
        "prior": dict.fromkeys(SPLITS, {"prior": guess, "text": guess, EVIL: guess}),
        "loop": {**dict.fromkeys(SPLITS, ways), EVIL: ways},
        "stages": {EVIL: {"seconds": 1.0, "peak_mb": 1.0}},
        "machine": {EVIL: EVIL},
        "total_seconds": 60.0,
    }
    logs = dict.fromkeys(("clip", "prior", "decoder"), [{"step": n, "loss": 1.0} for n in range(3)])
    names = ("queries_train", "queries_unseen", *(f"generated_{split}" for split in SPLITS))
    sheets = {name: Image.new("RGB", (4, 4)) for name in names}
    return write_report(folder / "report.html", found, logs, sheets, EVIL)


def test_hostile_texts_bring_no_markup_into_pages_and_do_nothing_in_a_browser(tmp_path):
    pages, asked = [lab(tmp_path), report(tmp_path)], []
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert "&lt;script&gt;window.hacked" in text
        assert "<script" not in text and "<img src=x" not in text
    driver = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH; install one, or name it in UNCLIP_CHROMIUM")
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        for path in pages:
            page.goto(path.as_uri())
            assert page.evaluate("window.hacked") is None
            assert page.locator("script, [onerror], img[src=x]").count() == 0
            assert EVIL in page.locator("body").inner_text()
        browser.close()
    assert [url for url in asked if not url.startswith(("data:", *(path.as_uri() for path in pages)))] == []
