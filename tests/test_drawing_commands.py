"""The commands that draw, each on the smallest real folders."""

import json

import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from PIL import Image, ImageDraw

from clip_train.embed import embed
from clip_train.fit import FitConfig
from clip_train.settings import UserError
from diffusion import changing_commands, drawing_commands
from diffusion.copies import CopyCheck
from diffusion.decoder import DecoderConfig
from diffusion.gallery import read_record
from diffusion.generate import Generator
from diffusion.train_decoder import train_decoder

DECODER = DecoderConfig(image_size=8, widths=(16, 32), blocks=(1, 1), attention=(2,), head_width=16, cond_width=32)
FEW = ["--steps", "2"]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Shards, CLIP, embeddings and decoder, a picture and a mask."""
    root = tmp_path_factory.mktemp("house")
    shards, clip = tiny.shards(root / "shards"), tiny.clip(root / "clip")
    embed(shards, clip, root / "emb")
    train_decoder(
        shards, clip, root / "decoder", DECODER, FitConfig(steps=2, batch_size=4, precision="fp32"), device="cpu"
    )
    (root / "fox.png").write_bytes(tiny.picture(1))
    mask = Image.new("L", (20, 20))
    ImageDraw.Draw(mask).rectangle((10, 0, 20, 20), fill=255)
    mask.save(root / "mask.png")
    return root


@pytest.fixture
def run(house, monkeypatch):
    """Run a command in the house; its lines on stdout, or the UserError that it ends in."""
    monkeypatch.chdir(house)

    def run(name, *arguments):
        command = getattr(changing_commands, name, None) or getattr(drawing_commands, name)
        more = ["--decoder", "decoder", "--device", "cpu", *([] if "--again" in arguments else FEW)]
        answer = CliRunner().invoke(command, [*map(str, arguments), *more])
        if isinstance(answer.exception, UserError):
            raise answer.exception
        assert answer.exit_code == 0, answer.exception or answer.output
        return answer.stdout.splitlines()

    return run


RIDGE = ["--prior", "ridge", "--embeddings", "emb"]


def same(a, b):
    with Image.open(a) as one, Image.open(b) as two:
        return one.size == two.size and np.abs(np.asarray(one).astype(int) - np.asarray(two)).max() <= 1


@pytest.mark.parametrize(
    "arguments, count, task, sources",
    [
        (["generate", "a", "b", *RIDGE], 2, None, []),
        (["generate", "--key", "s003", "--embeddings", "emb", "--count", 2], 2, "key", []),
        (["generate", "a", "--neighbours", 3, "--embeddings", "emb"], 1, "neighbours", []),
        (["vary", "fox.png", "--count", 2], 2, "vary", ["fox.png"]),
        (["vary", "--key", "s003", "--embeddings", "emb", "--count", 2], 2, "vary", []),
        (
            ["interpolate", "fox.png", "--key", "s003", "--embeddings", "emb", "--frames", 3],
            3,
            "interpolate",
            ["fox.png"],
        ),
        (["interpolate", "a", "b", "--in", "embedding", *RIDGE, "--frames", 2], 2, "interpolate", []),
        (["reconstruct", "fox.png", "--pca", "2,5", "--embeddings", "emb"], 2, "reconstruct", []),
        (["edit", "fox.png", "--from", "a", "--to", "b", "--strength", "0.2,0.4"], 2, "edit", ["fox.png"]),
        (["edit", "--key", "s003", "--embeddings", "emb", "--to", "b", "--strength", "0.2"], 1, "edit", []),
        (["img2img", "fox.png", "a", *RIDGE], 1, "img2img", ["fox.png"]),
        (["inpaint", "fox.png", "--mask", "mask.png", "--count", 2], 2, "inpaint", ["fox.png", "mask.png"]),
        (["outpaint", "fox.png", "--right", 10, "--repeats", 1], 1, "outpaint", ["fox.png"]),
        (["outpaint", "fox.png", "a", "--factor", 1.5, "--repeats", 1, *RIDGE], 1, "outpaint", ["fox.png"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_every_task_writes_pictures_that_are_made_again_from_their_records(
    run, tmp_path, monkeypatch, arguments, count, task, sources
):
    paths = run(*arguments, "--out", tmp_path / "out", "--sheet", tmp_path / "sheet.png")
    assert len(paths) == count and (tmp_path / "sheet.png").is_file()
    record = read_record(paths[-1])
    assert record.get("task", {}).get("name") == task and record["sampling"]["steps"] == 2
    given = [part for name in sources for part in ("--source", name)]
    models = RIDGE if "ridge" in arguments else []
    again = ["generate", "--again", paths[-1], *models, "--out", tmp_path / "again.png"]
    if sources:
        with pytest.raises(UserError, match=f"made from {sources[0]}.*--source {sources[0]}"):
            run(*again)
    assert run(*again, *given) == [str(tmp_path / "again.png")]
    assert same(paths[-1], tmp_path / "again.png") and read_record(tmp_path / "again.png") == record
    monkeypatch.setattr(Generator, "denoise", lambda *_: pytest.fail("drawn again"))
    assert run(*arguments, "--out", tmp_path / "out") == paths  # they are there: nothing is added
    assert len(list((tmp_path / "out").iterdir())) == count


def test_a_grid_is_a_labelled_sheet_and_the_pictures_in_it(run, tmp_path):
    axes = ["--grid", "guidance=1,2,4", "seed=0,1"]  # the second axis stands where a caption could
    (sheet,) = run("generate", "a", *RIDGE, *axes, "--out", tmp_path / "out")
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == [f"{n:05d}.png" for n in range(6)] + ["grid.png"] and sheet.endswith("grid.png")
    settings = [read_record(tmp_path / "out" / name) for name in made[:-1]]
    assert [(one["sampling"]["guidance"], one["seed"]) for one in settings] == [
        (g, s) for s in (0, 1) for g in (1.0, 2.0, 4.0)
    ]
    assert run("generate", "a", *RIDGE, *axes, "--out", tmp_path / "one.png") == [str(tmp_path / "one.png")]
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "out" / "grid.png").read_bytes()


def test_an_interpolation_can_be_an_animation(run, tmp_path):
    ends = ["fox.png", "--key", "s003", "--embeddings", "emb"]
    run("interpolate", *ends, "--frames", 4, "--animation", tmp_path / "a.gif", "--out", tmp_path / "out")
    with Image.open(tmp_path / "a.gif") as made:
        assert made.n_frames == 6  # there and back


def test_a_drawing_can_be_compiled_and_looked_at_for_copies(run, tmp_path, monkeypatch):
    translated = []
    monkeypatch.setattr("diffusion.generate.Compiled", lambda decoder: translated.append(decoder) or decoder)
    rows = np.repeat(tiny.unit_rows(1, 32), 30, axis=0) + 0.1 * tiny.unit_rows(30, 32, 1)
    check = CopyCheck.fit(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    monkeypatch.setattr(CopyCheck, "open", lambda folder: check if str(folder) == "emb" else None)
    key = ["--key", "s003", "--embeddings", "emb", "--out", tmp_path / "out"]
    plain = [*run("vary", *key, "--count", 1), *run("generate", *key)]
    assert not translated and not any("nearest" in read_record(path) for path in plain)
    checked = [run(name, *key, "--count", 1, "--copies", "emb", "--compile") for name in ("vary", "generate")]
    assert len(translated) == 2 and {path for (path,) in checked}.isdisjoint(plain)  # those had not been looked at
    assert all(read_record(path)["nearest"]["threshold"] == check.threshold for (path,) in checked)


def test_a_file_of_captions_is_gone_on_with(run, tmp_path):
    (tmp_path / "captions.txt").write_text("a\nb\nc\n")
    first = run("generate", "a", "b", *RIDGE, "--out", tmp_path / "out", "--format", "webp")
    times = [(tmp_path / "out" / f"{n:05d}.webp").stat().st_mtime_ns for n in range(2)]
    paths = run("generate", "--file", tmp_path / "captions.txt", *RIDGE, "--out", tmp_path / "out", "--format", "webp")
    assert paths[:2] == first and len(paths) == 3 and read_record(paths[2])["caption"] == "c"
    assert [(tmp_path / "out" / f"{n:05d}.webp").stat().st_mtime_ns for n in range(2)] == times


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["generate"], "one of the four"),
        (["generate", "a"], "--prior"),
        (["generate", "a", "--key", "b"], "one of the four"),
        (["generate", "--key", "s003"], "--embeddings emb"),
        (["generate", "--key", "s3x", "--embeddings", "emb"], "no sample 's3x'; it has s"),
        (["generate", "a", "--neighbours", 99, "--embeddings", "emb"], "99 neighbours of 10"),
        (["generate", "a", *RIDGE, "--grid", "colour=1,2"], "expected SETTING=VALUE"),
        (["generate", "a", "b", *RIDGE, "--grid", "seed=1,2"], "not of 2"),
        (["generate", "a", *RIDGE, "--grid", "guidance=1,2", "--count", 2], "leave --count and --strip out"),
        (["generate", "a", *RIDGE, "--source", "fox.png"], "goes with --again"),
        (["generate", "--again", "fox.png"], "does not say how it was made"),
        (["generate", "--again", "fox.png", "--seed", 1], "leave the other options"),
        (["generate", "--again", "fox.png", "--guidance", 0], "leave the other options"),
        (["generate", "a", "b", *RIDGE, "--out", "x.png"], "name of one picture"),
        (["generate", "a", "--prior", "ridge"], "--embeddings"),
        (["vary"], "one of the two"),
        (["vary", "owl.png"], "no file owl.png"),
        (["vary", "fox.png", "--eta", 0], "set eta above 0"),
        (["vary", "fox.png", "--sampler", "heun"], "heun draws no noise: take ddim"),
        (["vary", "fox.png", "--out", "x.png"], "name of one picture, but 4"),
        (["interpolate", "a" * 300, "b"], "pass --prior"),
        (
            ["interpolate", "fox.png", "mask.png", "--animation", "a.gif", "--out", "x.png"],
            "name of one picture, but 9",
        ),
        (["vary", "--key", "s003", "--embeddings", "emb", "--eta", 0.5], "--eta is of a picture"),
        (["interpolate", "fox.png"], "between two points, not 1"),
        (["interpolate", "fox.png", "mask.png", "--animation", "a.avi"], "a.avi: an animation"),
        (["reconstruct", "fox.png"], "--embeddings emb"),
        (["reconstruct", "fox.png", "--embeddings", "emb", "--pca", "1.5"], "expected whole numbers"),
        (["reconstruct", "fox.png", "--embeddings", "emb", "--pca", "nan"], "expected whole numbers"),
        (["reconstruct", "fox.png", "--embeddings", "emb", "--pca", "1000"], "1000 of 32 axes"),
        (["edit", "fox.png", "--to", "b", "--strength", "2"], "between 0 and 1"),
        (["edit", "fox.png", "--from", "b", "--to", "b"], "nothing to change"),
        (["edit", "fox.png", "--to", "b", "--set", "eta=2"], "eta 2.0"),
        (["img2img", "none.png"], "none.png cannot be read: No such file"),
        (["img2img", "fox.png", "a"], "pass --prior"),
        (["inpaint", "fox.png", "--mask", "fox.png"], "is grey|marks"),
        (["outpaint", "fox.png"], "how far"),
        (["edit", "fox.png", "--to", "b", "--out", "fox.png"], "another name"),
        (["interpolate", "image:fox.png", "mask.png", "--sheet", "mask.png"], "another name"),
        (["outpaint", "fox.png", "--factor", 2, "--left", 1], "contradict"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_cannot_be_drawn_is_one_line_and_leaves_nothing(run, house, arguments, words):
    before = sorted(house.iterdir())
    with pytest.raises(UserError, match=words) as error:
        run(*arguments)
    assert "\n" not in str(error.value) and sorted(house.iterdir()) == before


def test_the_picture_to_be_changed_is_turned_upright_and_put_on_white(run, house, tmp_path):
    """EXIF 6: the camera lay on its side. What the task sees is the upright picture, so two forms of it agree."""
    colours = np.zeros((20, 20, 4), np.uint8)
    colours[:10, :, 0], colours[:, :, 3] = 200, 255
    colours[15:, :, 3] = 0  # transparent: white
    picture = Image.fromarray(colours)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    white = Image.new("RGBA", picture.size, "white")
    Image.alpha_composite(white, picture).convert("RGB").save(tmp_path / "upright.png")
    made = [
        run("img2img", tmp_path / f"{name}.png", "--out", tmp_path / f"{name}-made.png")
        for name in ("turned", "upright")
    ]
    assert same(made[0][0], made[1][0])
    assert json.dumps(read_record(made[0][0])["task"]["sources"]) != json.dumps(
        read_record(made[1][0])["task"]["sources"]
    )
