"""`lab space` as a whole: with a CLIP trained for seconds on coloured shapes, and with one that knows nothing."""

import functools
import io
import json

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw

import cli
from clip_train.loss import contrastive_loss
from clip_train.model import Clip, preprocess_config
from clip_train.sample import Sample
from clip_train.settings import UserError
from clip_train.shards import ShardSet, write_shards
from diffusion.lab.bench import Bench
from diffusion.lab.experiment import read_numbers
from diffusion.lab.space import SpaceConfig, space

COLOURS = {"": "#777777", "red": "#e01010", "green": "#10b010", "blue": "#1010e0", "gold": "#e0c010", "pink": "#ff80c0"}
SHAPES = ("disc", "box", "bar", "pole", "wedge", "ring")
STEPS = 150  # of its training
SMALL = {"batch": 32, "mapped": 30, "permutations": 400, "sums": 2}


def drawing(colour: str, shape: str, seed: int) -> Image.Image:
    """A shape of one colour, a little to the side, on nearly white."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (32, 32), tuple(rng.integers(235, 256, 3).tolist()))
    x, y = rng.integers(-2, 3, 2).tolist()
    pen, ink = ImageDraw.Draw(picture), COLOURS[colour]
    box = {"bar": (3, 12, 28, 19), "pole": (12, 3, 19, 28)}.get(shape, (6, 6, 25, 25))
    box = (box[0] + x, box[1] + y, box[2] + x, box[3] + y)
    if shape == "disc":
        pen.ellipse(box, fill=ink)
    elif shape == "ring":
        pen.ellipse(box, outline=ink, width=5)
    elif shape == "wedge":
        pen.polygon([(box[0], box[3]), (box[2], box[3]), (box[0], box[1])], fill=ink)
    else:
        pen.rectangle(box, fill=ink)
    return picture


@functools.cache
def shapes(first: int, each: int) -> list[Sample]:
    made = []
    for i, (colour, shape) in enumerate((colour, shape) for colour in COLOURS for shape in SHAPES):
        for k in range(each):
            file = io.BytesIO()
            drawing(colour, shape, first + i * each + k).save(file, "PNG")
            name = f"{colour} {shape}".strip()
            meta = {"label": name}
            made.append(Sample(key=f"{first}-{i}-{k}", image=file.getvalue(), ext="png", captions=[name], meta=meta))
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards of 36 kinds of coloured shapes, two pictures each, and a CLIP trained on others like them."""
    folder = tmp_path_factory.mktemp("world")
    write_shards(shapes(0, 2), folder / "shards", samples_per_shard=50)
    write_shards(shapes(1000, 6), folder / "train", samples_per_shard=500)
    torch.manual_seed(0)
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "layers": 1, "width": 48, "head_width": 24, "patch_size": 4}
    clip = Clip({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}, preprocess_config(16))
    samples = ShardSet(folder / "train")
    pixels = torch.stack([clip.to_pixels(samples.thumbnail(i, 32)) for i in range(len(samples))])
    names = [samples.label(i) for i in range(len(samples))]
    tokens, kind = clip.tokenize(names), np.unique(names, return_inverse=True)[1]
    clip.train()
    optimizer = torch.optim.AdamW(clip.parameters(), lr=3e-3, weight_decay=0.05)
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        some = rng.choice(len(names), 72, replace=False)
        same = torch.from_numpy(kind[some][:, None] == kind[some][None])
        image, text, scale, *_ = clip(pixels[some], tokens[some])
        loss = contrastive_loss(image, text, scale, same)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clip.clamp_temperature()
    clip.eval()
    (folder / "clip").mkdir()
    clip.save(folder / "clip")
    return folder


def command(world, out):
    options = ["--clip", str(world / "clip"), "--shards", str(world / "shards"), "--out", str(out), "--device", "cpu"]
    done = CliRunner().invoke(cli.cli, ["lab", "space", *options])
    assert done.exit_code == 0, done.output + str(done.exception)
    return done.output


@pytest.fixture(scope="module")
def made(world):
    """What the command says, and where it writes."""
    return command(world, world / "seen"), world / "seen"


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(Bench, "show", lambda self, file, caption, draw: None)


def look(world, clip, folder, **settings):
    return space(SpaceConfig(**SMALL | settings), folder, clip=Clip.load(clip), samples=ShardSet(world / "shards"))


def test_a_clip_that_was_trained_stands_above_chance_everywhere(made):
    output, out = made
    numbers = read_numbers(out)
    found = {one["name"]: one for one in numbers["findings"]}
    assert found.keys() == {
        "diagonal", "picture_to_text", "text_to_picture", "map", "gap", "gap_parted", "texts_sums",
        "texts_sums_learned", "pictures_sums", "zero_shot", "loss",
    }  # fmt: skip
    known = found.keys() - {"gap", "gap_parted", "texts_sums_learned"}  # nothing that one learns; too few words here
    assert all(found[name]["holds"] for name in known), output
    assert found["texts_sums_learned"]["value"] > 15
    assert output.count("yes: ") + output.count("NO: ") == 11 and "map.png" in output
    assert found["picture_to_text"]["value"] > 50 and found["zero_shot"]["value"] > 25


def test_a_clip_that_was_not_trained_fails_all_that_asks_whether_pairs_belong_together(world, tmp_path, undrawn):
    found = {one.name: one for one in look(world, tiny.clip(tmp_path / "clip"), tmp_path).findings}
    for name in ("diagonal", "picture_to_text", "text_to_picture", "texts_sums_learned", "pictures_sums", "zero_shot"):
        assert not found[name].holds, found[name].verdict
    assert found["gap"].holds and found["gap_parted"].value > 90  # Liang et al. 2022: it is there from the start


def test_every_figure_is_a_picture_of_its_own(made):
    _, out = made
    files = [one["file"] for one in read_numbers(out)["figures"]]
    assert files == [
        "pairs.png", "batch.png", "map.png", "gap.png", "text_sums.png", "picture_sums.png", "all_sums.png",
        "zero_shot.png", "temperatures.png", "temperature.png",
    ]  # fmt: skip
    for file in files:
        with Image.open(out / file) as picture:
            assert min(picture.size) > 300 and len(picture.convert("P").getcolors()) > 10


def test_tables_hold_what_the_figures_plot(made):
    tables = read_numbers(made[1])["tables"]
    assert len(tables["all_sums"]) == 30 and {line["word"] for line in tables["all_sums"]} == set(COLOURS) - {""}
    assert [line["terms"] for line in tables["sums_scores"]] == ["texts", "pictures"]
    (own,) = [line for line in tables["temperature"] if line["own"]]
    assert own["temperature"] == pytest.approx(1 / own["scale"]) and own["candidates"] >= 1
    assert all(0 < line["p_margin"] <= 1 for line in tables["text_sums"] + tables["picture_sums"])


def test_what_a_person_asks_for_is_shown(world, tmp_path, monkeypatch):
    settings = {
        "expressions": ("red disc - disc", "red disc - red + blue", "dragon - disc"),
        "words": ("red", "blue", "disc", "box", "fire", "ring", "gold", "green"),
        "classes": ("red disc", "blue disc"),
        "picture": "0-0-1",
    }
    show = Bench.show
    monkeypatch.setattr(Bench, "show", lambda self, file, *rest: "sums" in file and show(self, file, *rest))
    tables = look(world, world / "clip", tmp_path, **settings).tables
    assert (tmp_path / "picture_sums.png").exists()
    assert [line["sum"] for line in tables["text_sums"]] == list(settings["expressions"])
    assert [line["sum"] for line in tables["picture_sums"]] == list(settings["expressions"][:2])  # no dragon is there
    assert tables["text_sums"][0]["word"] == "red" and tables["text_sums"][1]["word"] is None
    assert {line["name"] for line in tables["zero_shot"]} == set(settings["classes"])
    assert sum(line["probability"] for line in tables["zero_shot"]) == pytest.approx(1)


def test_captions_alone_are_enough(tmp_path, undrawn):
    """Pictures whose captions hold no sums at all, and no label that names anything."""
    tiny.with_cls(tmp_path / "few")
    clip = Clip.load(tiny.clip(tmp_path / "clip"))
    config = SpaceConfig(**SMALL, label_field="nothing")
    with pytest.raises(UserError, match="5 usable pictures are too few"):
        space(config, tmp_path, clip=clip, samples=ShardSet(tmp_path / "few"))
    names = {
        one.name
        for one in space(config, tmp_path, clip=clip, samples=ShardSet(tiny.shards(tmp_path / "s", 12))).findings
    }
    assert "diagonal" in names and "texts_sums" not in names


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"batch": 4}, "batch 4 must be at least 8"),
        ({"classes": ("fox", "Fox")}, "at least two"),
        ({"expressions": ("fox - ",)}, "empty term"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        SpaceConfig(**settings)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(world, made, undrawn):
    _, out = made
    first = read_numbers(out)
    again, other = (
        space(SpaceConfig(seed=seed), out, clip=Clip.load(world / "clip"), samples=ShardSet(world / "shards"))
        for seed in (0, 1)
    )
    assert json.loads(json.dumps([one.to_json() for one in again.findings])) == first["findings"]
    assert json.loads(json.dumps(again.tables)) == first["tables"] != json.loads(json.dumps(other.tables))


def test_a_picture_that_is_not_there_is_one_line(world, tmp_path):
    with pytest.raises(UserError, match="no key of the shards and no file"):
        look(world, world / "clip", tmp_path, picture="nowhere.png")
