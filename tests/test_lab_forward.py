import io
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure
from PIL import Image

from clip_train.settings import UserError
from diffusion.lab import commands, cube, forward_figures, noising
from diffusion.lab import forward as forward_module
from diffusion.lab.forward import ForwardConfig, forward, preserving_walk
from diffusion.source import Source

SMALL = ForwardConfig(size=64, steps=40, arrows=4, walks=1500)


def painted() -> bytes:
    """A PNG of 32 pixels: a white one, half of it blue, with a yellow corner."""
    pixels = np.full((32, 32, 3), 255, np.uint8)
    pixels[:, 16:], pixels[:10, :10] = (20, 40, 220), (250, 230, 20)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forward")
    return folder, forward(SMALL, folder, source=Source.read(painted()))


def test_every_finding_about_the_way_to_static_holds(made):
    for finding in made[1].findings:
        assert finding.holds, finding.verdict


def test_every_figure_is_there_and_the_animation_shows_each_step(made):
    folder, experiment = made
    assert {figure.file for figure in experiment.figures} == {path.name for path in folder.iterdir()}
    for figure in experiment.figures:
        with Image.open(folder / figure.file) as picture:
            assert picture.width > 500
            if figure.file.endswith(".gif"):
                assert picture.n_frames >= SMALL.arrows + 1


def test_every_schedule_s_shares_are_one_whole(made):
    rows = made[1].tables["schedules"]
    assert len(rows) == 9
    for row in rows:
        assert sum(value for name, value in row.items() if name != "schedule") == pytest.approx(1, abs=1e-3)


def test_a_red_pixel_s_mean_goes_straight_to_grey():
    sigmas = noising.rising(SMALL.schedule, SMALL.arrows, **SMALL.ends)
    walks = preserving_walk(torch.tensor([[1.0, -1.0, -1.0]]).expand(4000, -1), sigmas, seed=0)
    assert walks.shape == (5, 4000, 3)
    mean = cube.levels(walks.mean(1))
    assert mean[0].tolist() == [255, 0, 0]
    assert mean[-1] == pytest.approx([127.5] * 3, abs=10)
    assert mean[1, 0] > mean[2, 0] > mean[3, 0] - 8 and mean[1, 1] < mean[2, 1] < mean[3, 1] + 8
    assert float(walks[-1].var(0).mean()) == pytest.approx(1, rel=0.05)


def test_red_comes_first_then_the_picture_s_most_colourful_pixels():
    picture = Source.read(painted()).pixels(32)
    pixels, places = cube.three_pixels(picture)
    assert cube.levels(pixels).round().tolist() == [[255, 0, 0], [250, 230, 20], [20, 40, 220]]
    for (column, row), pixel in zip(places, pixels[1:], strict=True):
        assert torch.equal(picture[:, row, column], pixel)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(undrawn, tmp_path):
    tiny = ForwardConfig(size=16, steps=8, arrows=2, walks=10)
    values = []
    for n, config in enumerate((tiny, tiny, ForwardConfig(size=16, steps=8, arrows=2, walks=10, seed=1))):
        (tmp_path / str(n)).mkdir()
        found = forward(config, tmp_path / str(n), source=Source.read(painted())).findings
        values.append([one.value for one in found])
    assert values[0] == values[1] != values[2]


def test_a_picture_of_one_colour_has_nothing_to_lose(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(file, "PNG")
    with pytest.raises(UserError, match="one colour"):
        forward(SMALL, tmp_path, source=Source.read(file.getvalue(), "red.png"))


@pytest.fixture
def undrawn(monkeypatch):
    for name in ("static", "frames", "colours", "variances", "ratios"):
        monkeypatch.setattr(forward_figures, name, lambda *_: [Image.new("RGB", (8, 8))])
    monkeypatch.setattr(forward_module, "save", lambda *_: None)


@pytest.mark.parametrize("options", [{"size": 8}, {"size": 24}, {"size": 24, "steps": 8}, {"size": 16, "seed": 5}])
def test_findings_hold_for_few_pixels_and_few_steps_too(undrawn, tmp_path, options):
    made = forward(ForwardConfig(arrows=20, **options), tmp_path, source=Source.read(painted()))
    assert [one.verdict for one in made.findings if not one.holds] == []


def test_two_greys_in_few_steps_of_which_a_schedule_takes_none_in_the_middle(undrawn, tmp_path):
    pixels = np.full((32, 32, 3), 100, np.uint8)
    pixels[:, 16:] = 106
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    made = forward(ForwardConfig(size=32, steps=8), tmp_path, source=Source.read(file.getvalue()))
    assert "schedules_differ" not in {one.name for one in made.findings}
    assert [one.verdict for one in made.findings if not one.holds] == []


def test_a_walk_that_forgets_nothing_or_adds_too_much_is_found_out(undrawn, tmp_path, monkeypatch):
    walk = noising.random_walk

    def loud(x0, sigmas, noise):
        return walk(x0, sigmas, lambda: 1.1 * noise())

    def kept(x0, sigmas, noise):
        return (x + 0.3 * sigma * x0 for x, sigma in zip(walk(x0, sigmas, noise), sigmas, strict=True))

    for wrong, names in ((loud, {"steps_add_up", "variance_at_end"}), (kept, {"picture_forgotten"})):
        monkeypatch.setattr(noising, "random_walk", wrong)
        found = forward(ForwardConfig(size=48, steps=40, walks=100), tmp_path, source=Source.read(painted())).findings
        assert {one.name for one in found if not one.holds} >= names


@pytest.mark.parametrize("wrong", [{"size": 4}, {"schedule": "none"}, {"sigma_max": 0.001}, {"walks": 1}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError):
        ForwardConfig(**wrong)


def test_the_command_writes_a_folder_with_its_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forward_figures, "frames", lambda *_: [Image.new("RGB", (8, 8))])  # drawn above
    monkeypatch.setattr(forward_figures, "colours", lambda *_: Figure())
    (tmp_path / "$a_$.png").write_bytes(painted())
    few = ["--size", "16", "--steps", "8", "--out", "out"]
    answer = CliRunner().invoke(commands.lab_forward, ["$a_$.png", *few])
    assert answer.exit_code == 0, answer.exception
    assert "variance 1" in answer.output and "static.png" in answer.output
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert numbers["settings"]["size"] == 16 and numbers["findings"]
    (tmp_path / "$a_$.png").write_bytes(painted()[:-4] + b"xxxx")
    other = CliRunner().invoke(commands.lab_forward, ["$a_$.png", *few])
    assert isinstance(other.exception, UserError)  # another picture into the same folder
