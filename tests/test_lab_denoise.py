import json
from dataclasses import replace

import pytest
import tiny
import tiny_drawing
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure
from PIL import Image

from clip_train.embed import embed
from clip_train.fit import FitConfig
from clip_train.settings import UserError
from diffusion.decoder import DecoderConfig
from diffusion.examine import open_generator
from diffusion.generate import Sampling
from diffusion.lab import commands, denoise_figures
from diffusion.lab.belief import Real, Track, among_seeds, detail, error, pictures_for, ratio, saturation
from diffusion.lab.denoise import DenoiseConfig, denoise, without_noise
from diffusion.lab.experiment import Finding
from diffusion.samplers import SampleNoise

STD = 0.4  # of the exact decoder's pictures around their guess
PLAIN = Sampling(guidance=1.0, clamp=0.0, steps=16)
FEW = DenoiseConfig(count=12, levels=(0.1, 1.0, 20.0), random_steps=12, seeds=4, untold=6, grid_steps=(1, 8),
                    grid_guidance=(0.0, 1.0, 4.0), belief_steps=8)  # fmt: skip


def real(count: int = 40) -> Real:
    """Pictures of which the exact decoder is the exact denoiser."""
    generator = tiny_drawing.generator()
    rows = generator.rows(tiny.unit_rows(count, 32))
    around = generator.guess(rows)
    noise = SampleNoise(range(1000, 1000 + count), around.shape[1:])()
    return Real(generator, rows, [f"row {n}" for n in range(count)], around + STD * noise)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("denoise")
    return folder, denoise(FEW, folder, real=real(12))


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("house")
    shards, clip = tiny.shards(root / "shards"), tiny.clip(root / "clip")
    embed(shards, clip, root / "emb")
    small = DecoderConfig(image_size=8, widths=(16, 32), blocks=(1, 1), attention=(2,), head_width=16, cond_width=32)
    fit = FitConfig(steps=2, batch_size=4, precision="fp32")
    train_decoder = pytest.importorskip("diffusion.train_decoder").train_decoder
    train_decoder(shards, clip, root / "decoder", small, fit, device="cpu")
    return root


@pytest.mark.parametrize("sigma", [0.2, 1.0, 20.0])
def test_one_step_gives_the_mean_and_a_random_walk_is_twice_as_far_off(sigma):
    pictures = real(60)
    x = pictures.noisy(sigma)
    once = pictures.believed(x, sigma, PLAIN)
    left = STD**2 * sigma**2 / (STD**2 + sigma**2)  # the posterior's variance
    assert error(once, pictures.x0) == pytest.approx(left, rel=0.06)
    how = replace(PLAIN, sampler="ddpm", steps=60)
    assert error(pictures.walked(0, how, x, sigma), pictures.x0) == pytest.approx(2 * left, rel=0.08)


def test_the_mean_is_smoother_than_any_picture_and_the_walk_is_not():
    pictures = real(60)
    x = pictures.noisy(20.0)
    fine = detail(pictures.x0 - pictures.generator.guess(pictures.rows))  # the noise's part of it
    once = pictures.believed(x, 20.0, PLAIN) - pictures.generator.guess(pictures.rows)
    walked = pictures.walked(0, PLAIN, x, 20.0) - pictures.generator.guess(pictures.rows)
    assert detail(once) < 0.01 * fine
    assert detail(walked) == pytest.approx(fine, rel=0.15)


def test_without_its_noise_ddpm_keeps_hardly_any_variance_and_with_it_all():
    pictures = real(2).repeated(30)
    ddpm = replace(PLAIN, sampler="ddpm", steps=200)
    assert among_seeds(pictures.walked(0, ddpm), 30) == pytest.approx(STD**2, rel=0.12)
    bare = among_seeds(pictures.walked(0, replace(ddpm, sampler="ddpm_mean")), 30)
    assert bare == pytest.approx((STD**2 * 20 / (STD**2 + 20**2)) ** 2, rel=0.15)  # see sample_ddpm


def test_variance_among_seeds_leaves_out_what_the_things_differ_in():
    things = torch.tensor([0.0, 0.0, 9.0, 9.0])[:, None, None, None].expand(-1, 3, 4, 4)
    assert among_seeds(things, 2) == 0
    apart = torch.tensor([0.0, 2.0, 9.0, 9.0])[:, None, None, None].expand(-1, 3, 4, 4)
    assert among_seeds(apart, 2) == pytest.approx(1)  # 2 and 0


def test_a_track_holds_where_the_walk_was_and_what_it_believed():
    pictures, track = real(3), Track()
    end = pictures.walked(0, replace(PLAIN, sampler="ddim", steps=10), around=track.around)
    assert len(track.sigmas) == 10 and track.sigmas == sorted(track.sigmas, reverse=True)
    guess, start = pictures.generator.guess(pictures.rows), track.x[0]
    trust = STD**2 / (STD**2 + track.sigmas[0] ** 2)
    assert torch.allclose(track.believed[0], guess + trust * (start - guess), atol=1e-5)
    assert torch.allclose(track.believed[-1], end, atol=1e-5)
    left = track.unsettled(end)
    assert left[0] == 1 and left[-1] < 1e-6 and left == sorted(left, reverse=True)
    assert float(track.shown[0].std()) == pytest.approx(1, abs=0.1) and float(start.std()) > 15


def test_the_same_noise_lies_on_a_picture_at_every_level_and_other_noise_on_the_next():
    pictures = real(4)
    small, large = (pictures.noisy(sigma, 7) - pictures.x0 for sigma in (0.5, 5.0))
    assert torch.allclose(10 * small, large, atol=1e-4)
    assert abs(float((small[0] * small[1]).mean())) < 0.1 * float(small.var())


def test_detail_is_what_a_blur_takes_away():
    flat = torch.full((1, 3, 16, 16), 0.3)
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    board = ((torch.arange(16)[:, None] + torch.arange(16)) % 2).float().expand(1, 3, 16, 16) * 2 - 1
    assert detail(flat) == pytest.approx(0, abs=1e-10)
    assert detail(ramp) < 0.01 < 0.9 < detail(board) < 1.1


def test_a_ratio_to_nothing_is_no_number_and_no_band_holds_it():
    assert ratio(3, 2) == 1.5
    assert not Finding(name="bare", says="of nothing", value=ratio(0.0, 0.0), high=0.5).holds


def test_saturation_is_none_in_greys_and_all_in_pure_colours():
    assert saturation(torch.full((1, 3, 4, 4), 0.5)) == 0
    assert saturation(torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 4, 4)) == 2


def test_the_findings_of_an_exact_decoder_are_those_of_the_closed_forms(made):
    found = {finding.name: finding for finding in made[1].findings}
    assert found["mean_is_nearer"].value == pytest.approx(2, rel=0.2)
    for name, one in found.items():
        assert one.holds == (name != "guess_is_a_ghost"), one.verdict  # an exact guess is as sharp as the pictures
    assert found["no_noise_collapses"].value < 1 and found["no_noise_collapses_untold"].value < 1


def test_who_is_told_nothing_starts_around_the_guess_at_nothing_whatever_the_picture():
    pictures = real(3)
    starts = pictures.untold(20.0, 7)
    assert torch.equal(starts, pictures.some([2, 0, 1]).untold(20.0, 7))
    nothing = replace(pictures, x0=torch.zeros_like(pictures.x0))  # the exact decoder's guess at it
    assert torch.equal(starts, nothing.noisy(20.0, 7))
    assert not torch.equal(pictures.generator.guess(pictures.rows), nothing.x0)


def test_the_walks_that_are_told_nothing_do_not_depend_on_the_picture(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(denoise_figures, "without_noise", lambda _, made, *__: drawn.append(made) or Figure())
    pictures = real(6)
    tables = [without_noise(FEW, pictures.some(order), tmp_path).tables["no noise"] for order in ([0, 1], [5, 1])]
    for key, pair in drawn[0].items():
        assert torch.equal(pair, drawn[1][key]) == (key[0] == "told nothing")
    assert tables[0][0]["detail"] == pytest.approx(
        detail(drawn[0]["told what to draw", "ddpm"]) / detail(pictures.x0[:1])
    )
    assert tables[0][2]["variance_among_seeds"] == tables[1][2]["variance_among_seeds"]


def test_every_figure_is_written(made):
    folder, experiment = made
    assert {figure.file for figure in experiment.figures} == {path.name for path in folder.iterdir()}
    assert [row["sigma"] for row in experiment.tables["levels"]] == list(FEW.levels)
    assert len(experiment.tables["grid"]) == 6


@pytest.mark.parametrize(
    "wrong", [{"count": 2}, {"levels": (1.0, 0.5)}, {"levels": (0.005, 1.0)}, {"grid_guidance": (2.0, 4.0)}]
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError):
        DenoiseConfig(**wrong)


def test_the_pictures_come_from_embeddings_or_from_what_the_decoder_was_trained_on(house):
    generator = open_generator(house / "decoder")
    own = pictures_for(generator, house / "decoder", None, None, 6, 0)
    held = pictures_for(generator, house / "decoder", house / "emb", None, 6, 0)
    assert len(own) == 6 and len(held) == 10
    for row, key in enumerate(own.keys):
        assert torch.allclose(
            *(torch.from_numpy(a) for a in (own.rows[row], held.rows[held.keys.index(key)])), atol=5e-3
        )
    two = Real.drawn_from(generator, held, 6, 0), Real.drawn_from(generator, held, 6, 1)
    assert two[0].captions != two[1].captions and two[0].x0.shape == (6, 3, 8, 8)
    assert -1 <= float(two[0].x0.min()) < float(two[0].x0.max()) <= 1


def test_the_command_writes_a_folder_with_its_numbers(house, monkeypatch):
    monkeypatch.chdir(house)
    monkeypatch.setattr(denoise_figures, "belief_frames", lambda _: [Image.new("RGB", (8, 8))])  # drawn above
    few = ["--decoder", "decoder", "--count", "5", "--steps", "2", "--device", "cpu", "--out", "out"]
    answer = CliRunner().invoke(commands.lab_denoise, [*few, "--embeddings", "emb"])
    assert answer.exit_code == 0, answer.exception
    assert "blurred guess" in answer.output and "levels.png" in answer.output
    numbers = json.loads((house / "out" / "numbers.json").read_text())
    assert numbers["settings"]["count"] == 5 and len(numbers["figures"]) == 7
