import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from clip_train.embed import embed
from clip_train.model import Clip
from clip_train.settings import UserError
from diffusion import evaluate_commands, examine
from diffusion.copies import CopyCheck
from diffusion.evaluate import embed_pictures, exam_sheet
from diffusion.evaluate_copies import copies_sheet, find_copies, read_pictures
from diffusion.examine import Exam, Way, open_held
from diffusion.generate import Generated, Sampling
from diffusion.heldout import HeldOut
from diffusion.report_figures import exam_tables, sweep_table
from diffusion.sweep import calls, plan, sweep

SIZE, COUNT = 16, 60
FEW = Exam(count=25, batch_size=10)
MEASURES = {"frechet", "kernel", "precision", "recall", "density", "coverage", "interval"}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("house")
    shards = tiny.shards(root / "shards", COUNT, 30)
    embed(shards, tiny.clip(root / "clip"), root / "emb")
    return root


@pytest.fixture(scope="module")
def held(house):
    return HeldOut.open(house / "emb")


class Painter:
    """Stands for a Generator: paints the real picture of an embedding it knows, more blurred the fewer the steps."""

    prior = guide = None
    device = torch.device("cpu")
    how = Sampling(steps=1000)

    def __init__(self, house, held):
        self.clip = Clip.load(house / "clip")
        self.fingerprints = {"decoder": "sha256:painter", "clip": self.clip.fingerprint}
        self.decoder = SimpleNamespace(network=SimpleNamespace(config=SimpleNamespace(text=False, image_size=SIZE)))
        self.size, self.held, self.drawn = SIZE, held, 0

    def from_embeddings(self, rows, seeds, how, *, batch_size, on_progress=None):
        self.drawn += len(rows)
        best = np.abs(np.asarray(rows)[:, None] - self.held.rows).sum(2).argmin(1)
        strength = 1 - 1 / how.steps
        pictures = [np.asarray(one) for one in self.held.pictures(best, SIZE)]
        made = [Image.fromarray((128 + strength * (one - 128.0)).round().astype(np.uint8)) for one in pictures]
        return [Generated(one, {**RECORD, "seed": seed}) for one, seed in zip(made, seeds, strict=True)]

    def from_captions(self, captions, seeds, how, *, batch_size, on_progress=None):
        rows = [self.held.rows[self.held.captions.index(caption)] for caption in captions]
        return self.from_embeddings(np.stack(rows), seeds, how, batch_size=batch_size)


RECORD = {
    "sampling": {"steps": 1, "sampler": "heun", "guidance": 1.0},
    "size": [SIZE, SIZE],
    "fingerprints": {},
    "version": "0",
}


@pytest.fixture
def painter(house, held):
    return Painter(house, held)


def test_a_perfect_painter_gets_the_figures_of_the_real_pictures_and_a_blind_one_worse(painter, held):
    how = Sampling(steps=100000)
    ways = {"prior": Way(painter, "prior"), "true": Way(painter, "true"), "text": Way(painter, "text")}
    figures, made = examine.examine(ways, held, how, FEW)
    assert figures["ways"]["prior"] == figures["ways"]["true"]
    real, blind = figures["ways"]["real"], figures["ways"]["text"]
    for part, names in (("round_trip", ("top1", "top10", "cosine")), ("variance", ("ratio",))):
        for name in names:  # some of these random pictures look the same to a random CLIP, and are taken for each other
            assert figures["ways"]["true"][part][name] == pytest.approx(real[part][name], rel=0.05)
    assert real["round_trip"]["top1"] > 0.6 > blind["round_trip"]["top1"] + 0.2
    assert real["variance"]["ratio"] == pytest.approx(1, abs=0.3)
    (name,) = real["features"]
    assert set(real["features"][name]) == MEASURES
    assert real["clip_score"][name]["interval"]["score"][0] < real["clip_score"][name]["score"]
    assert (figures["count"], figures["size"]) == (25, SIZE) and set(figures["chance"]) == {
        "top1",
        "top10",
        "median_rank",
    }
    assert {len(one) for one in made.values()} == {25} and exam_sheet(made, figures["captions"]).width > 100
    tables = exam_tables(figures)
    assert [row[0] for row in tables[0][2]] == ["prior", "true", "text", "real", "chance"] and len(tables) == 2


def test_the_real_pictures_compared_with_are_none_of_those_drawn(held):
    picked, others = held.split(25, seed=3)
    assert not set(picked) & set(others) and len(picked) == len(others) == 25
    assert len(held.split(1000)[0]) == COUNT // 2
    assert held.groups[0] == held.groups[1] != held.groups[2]  # pairs of samples share a label


def test_pictures_straight_from_tars_are_those_of_the_embeddings(house, held, painter):
    direct = HeldOut.of_shards(str(house / "shards"), painter.clip)
    assert direct.keys == held.keys and direct.captions == held.captions and direct.labels == held.labels
    assert np.allclose(direct.rows, held.rows, atol=1e-3)
    ours, theirs = (np.asarray(one.pictures([7], SIZE)[0]) for one in (direct, held))
    assert np.array_equal(ours, theirs)


def test_kept_pictures_are_not_drawn_again_and_other_settings_are_refused(painter, held, tmp_path, monkeypatch):
    how, ways = Sampling(steps=4), {"true": Way(painter, "true")}
    monkeypatch.setattr(Painter, "from_embeddings", _dies_after(15, Painter.from_embeddings))
    with pytest.raises(KeyboardInterrupt):
        examine.examine(ways, held, how, FEW, keep=tmp_path / "kept")
    monkeypatch.undo()
    painter.drawn = 0
    figures, _ = examine.examine(ways, held, how, FEW, keep=tmp_path / "kept")
    assert painter.drawn == 15  # the first ten were there
    again, _ = examine.examine(ways, held, how, FEW, keep=tmp_path / "kept")
    assert painter.drawn == 15 and again == figures == examine.examine(ways, held, how, FEW)[0]
    with pytest.raises(UserError, match="sampling.steps = 4, but 5"):
        examine.examine(ways, held, Sampling(steps=5), FEW, keep=tmp_path / "kept")


def _dies_after(count, method):
    def from_embeddings(self, rows, seeds, how, **more):
        if self.drawn + len(rows) > count:
            raise KeyboardInterrupt
        return method(self, rows, seeds, how, **more)

    return from_embeddings


def test_a_sweep_goes_on_with_the_row_it_was_killed_in(painter, held, tmp_path, monkeypatch):
    rows = plan(Sampling(precision="fp32"), ["ddim", "heun"], [2, 20], [0.0, 1.0], [1.0])
    assert [(one.sampler, one.steps, one.eta) for one in rows] == [
        ("ddim", 2, 0.0), ("ddim", 2, 1.0), ("ddim", 20, 0.0), ("ddim", 20, 1.0), ("heun", 2, 0.0), ("heun", 20, 0.0)
    ]  # fmt: skip
    assert [calls(one) for one in rows] == [2, 2, 20, 20, 3, 39]
    monkeypatch.setattr(Painter, "from_embeddings", _dies_after(60, Painter.from_embeddings))
    with pytest.raises(KeyboardInterrupt):
        sweep(Way(painter), held, rows, tmp_path / "sweep", FEW)
    monkeypatch.undo()
    painter.drawn = 0
    sweep(Way(painter), held, rows, tmp_path / "sweep", FEW)
    assert painter.drawn == 4 * 25
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {
        "manifest.json", "plot.png", "rows", "sheet.png", "table.csv", "table.json"
    }  # fmt: skip
    table = json.loads((tmp_path / "sweep" / "table.json").read_text())
    name = next(iter(table["real"]["features"]))
    kernels = [row["features"][name]["kernel"] for row in table["rows"]]
    above = [row["features"][name]["above_best"] for row in table["rows"]]
    assert kernels[0] > kernels[2] and np.allclose(above, np.array(kernels) - min(kernels), atol=1e-2)
    assert table["rows"][0]["variance"]["ratio"] == pytest.approx(
        0.25 * table["rows"][2]["variance"]["ratio"] / 0.95**2, rel=0.02
    )
    lines = (tmp_path / "sweep" / "table.csv").read_text().splitlines()
    assert len(lines) == 1 + 6 + 1 and "real pictures" in lines[-1]
    assert len(sweep_table(table)[2]) == 7
    sweep(Way(painter), held, rows, tmp_path / "sweep", FEW)
    assert painter.drawn == 4 * 25


def test_a_sweep_of_nothing_or_of_what_there_is_not_is_refused():
    with pytest.raises(UserError, match="at least two settings"):
        plan(Sampling(), ["heun"], [4], [0.0, 0.5, 1.0])
    with pytest.raises(UserError, match="no sampler 'plms'"):
        plan(Sampling(), ["plms", "heun"])


def test_copied_pictures_are_found_by_embedding_and_by_pixels_and_new_ones_are_not(house, painter):
    training = HeldOut.open(house / "emb")
    check = CopyCheck.open(house / "emb")
    rows = [5, 20, 41]
    copies = training.pictures(rows, SIZE)
    across, down = np.indices((SIZE, SIZE))
    boards = [255 * ((across // wide + down // high) % 2) for wide in range(1, 6) for high in (1, 2)]
    new = [Image.fromarray(board.astype(np.uint8)).convert("RGB") for board in boards]
    known = embed_pictures(painter.clip, new)
    names = [str(number) for number in range(13)]
    figures, verdicts = find_copies([*copies, *new], names, painter.clip, check, training, held_rows=known)
    assert [one.key for one in verdicts[:3]] == [training.keys[row] for row in rows]
    assert all(one.is_copy and one.pixel_rms == 0 for one in verdicts[:3])
    assert not any(one.is_copy for one in verdicts[3:])
    assert figures["copied"]["share"] == pytest.approx(3 / 13) and figures["count"] == 13
    false_alarms = figures["near_among_real_ones_kept_from_training"]["share"]
    assert false_alarms == pytest.approx(np.mean([one.near for one in verdicts[3:]]))
    assert copies_sheet([*copies, *new], verdicts, training).width > 100


def test_the_commands_draw_and_tell(house, held, painter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("diffusion.evaluate.open_generator", lambda *a, **k: painter)
    monkeypatch.setattr("diffusion.ablation.open_generator", lambda *a, **k: painter)
    monkeypatch.setattr(examine, "open_generator", lambda *a, **k: painter)
    common = ["--decoder", "d", "--embeddings", house / "emb", "--count", 20, "--device", "cpu"]

    def run(command, *words):
        getattr(evaluate_commands, command).main([str(word) for word in words], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    kept = tmp_path / "kept"
    figures = run("evaluate_decoder", *common, "--steps", 9, "--pictures", kept, "--sheet", tmp_path / "s.png")
    assert set(figures["ways"]) == {"true", "real"} and figures["sampling"]["steps"] == 9
    assert (tmp_path / "s.png").exists() and len(list(kept.rglob("*.png"))) == 20
    ways = run("evaluate_ablation", *common, "--prior", "p", "--out", tmp_path / "a.json")["ways"]
    assert list(ways) == ["text embedding", "prior", "true embedding", "real"] and (tmp_path / "a.json").exists()
    table = run("evaluate_sweep", *common, "--steps", "2,3", "--eta", "0", "--out", tmp_path / "sweep")
    assert [row["steps"] for row in table["rows"]] == [2, 3]
    copies = run("evaluate_copies", kept, "--train", house / "emb", "--sheet", tmp_path / "c.png", "--device", "cpu")
    assert len(copies["pictures"]) == 20 and (tmp_path / "c.png").exists()


def test_folders_that_do_not_belong_together_are_refused(house, painter, tmp_path):
    tiny.store(tmp_path / "other", tiny.unit_rows(30, 32))
    with pytest.raises(UserError, match="the decoder of"):
        open_held(tmp_path / "other", None, painter)
    with pytest.raises(UserError, match="--embeddings .* or --shards"):
        open_held(None, None, painter)
    with pytest.raises(UserError, match="say where: --shards"):
        HeldOut.open(tmp_path / "other").pictures([0], SIZE)
    with pytest.raises(UserError, match="has no sample k00000"):
        HeldOut.open(tmp_path / "other", str(house / "shards")).pictures([0], SIZE)
    with pytest.raises(UserError, match="no PNG"):
        read_pictures([tmp_path])
    (tmp_path / "made").mkdir()
    for name, size in (("00000.png", (8, 8)), ("00000-steps.png", (30, 10)), ("grid.png", (20, 30))):
        Image.new("RGB", size).save(tmp_path / "made" / name)
    assert read_pictures([tmp_path / "made"])[1] == ["00000.png"]
    with pytest.raises(UserError, match="give square pictures"):
        read_pictures([tmp_path / "made" / "00000.png", tmp_path / "made" / "grid.png"])
