from dataclasses import replace

import numpy as np
import pytest
import tiny_drawing
import torch

from clip_train.settings import UserError
from diffusion.again import make_again
from diffusion.baselines import Baseline
from diffusion.generate import Generator, Sampling
from diffusion.inversion import FAITHFUL, slerp_noise
from diffusion.manipulate import edit, interpolate, slerp, strip, vary

HOW = Sampling(steps=5)
OWN = Sampling(**FAITHFUL | {"steps": 8})  # for walks through a picture's own noise


@pytest.fixture(scope="module")
def generator():
    return tiny_drawing.generator()


def rows(generator, n):
    made = np.random.default_rng(3).standard_normal((n, generator.clip.embed_dim)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def pixels(made):
    return [np.asarray(one.picture).astype(int) for one in made]


def test_slerp_goes_along_the_great_circle_at_constant_speed():
    a, b = np.array([1.0, 0, 0]), np.array([0, 2.0, 0])  # lengths do not matter
    quarter = slerp(a, b, 0.25)
    assert np.allclose(quarter, [np.cos(np.pi / 8), np.sin(np.pi / 8), 0])
    assert np.allclose(slerp(a, b, 0), a) and np.allclose(slerp(a, b, 1), b / 2)


def test_slerp_of_nearly_equal_vectors_stays_a_unit_vector():
    a = np.array([1.0, 0])
    assert np.allclose(slerp(a, a, 0.5), a)
    assert np.isclose(np.linalg.norm(slerp(a, [1, 1e-5], 0.5)), 1)


def test_slerp_between_opposite_points_is_refused():
    with pytest.raises(UserError, match="opposite"):
        slerp([1, 0], [-1, 0], 0.5)


def test_one_picture_is_no_way_from_one_end_to_the_other(generator):
    with pytest.raises(UserError, match="make 2 or more"):
        interpolate(generator, rows(generator, 2), 1, how=HOW)


def test_what_is_told_of_the_steps_may_end_the_drawing(generator):
    """A server gives a drawing up by raising from on_step."""
    (row, other), told = rows(generator, 2), []

    def stop(step, denoised):
        told.append(step)
        raise InterruptedError

    for draw in (
        lambda: vary(generator, row, 2, how=HOW, on_step=stop),
        lambda: interpolate(generator, np.stack([row, other]), 2, how=HOW, on_step=stop),
        lambda: edit(generator, row, "a dog", how=HOW, on_step=stop),
        lambda: strip(generator, row, how=HOW, on_step=stop),
    ):
        with pytest.raises(InterruptedError):
            draw()
    assert told == [0] * 4


def test_variations_differ_and_begin_with_the_picture_of_their_seed(generator):
    (row,) = rows(generator, 1)
    made = vary(generator, row, 3, seed=5, how=HOW)
    assert [one.provenance["seed"] for one in made] == [5, 6, 7]
    first = generator.from_embeddings(row[None], [5], HOW)
    assert np.abs(pixels(made)[0] - pixels(first)[0]).max() <= 1
    assert np.abs(pixels(made)[0] - pixels(made)[1]).max() > 5


def test_an_interpolation_starts_and_ends_at_its_ends(generator):
    ends = rows(generator, 2)
    made = interpolate(generator, ends, 4, seed=2, how=HOW)
    alone = generator.from_embeddings(ends, [2, 2], HOW)
    assert np.abs(pixels(made)[0] - pixels(alone)[0]).max() <= 1
    assert np.abs(pixels(made)[-1] - pixels(alone)[1]).max() <= 1
    assert [round(one.provenance["task"]["share"], 3) for one in made] == [0, 0.333, 0.667, 1]


def test_an_edit_turns_the_embedding_towards_the_difference_of_the_texts(generator):
    (row,) = rows(generator, 1)
    (same,) = edit(generator, row, "a dog", how=HOW, source="a cat", strength=0)
    assert np.abs(pixels([same])[0] - pixels(generator.from_embeddings(row[None], [0], HOW))[0]).max() <= 1
    (whole,) = edit(generator, row, "a dog", how=HOW, source="a cat", strength=1)
    dog, cat = generator.clip.encode_text(["a dog", "a cat"]).numpy()
    assert np.abs(pixels([whole])[0] - pixels(generator.from_embeddings((dog - cat)[None], [0], HOW))[0]).max() <= 1
    with pytest.raises(UserError, match="nothing to change"):
        edit(generator, row, "a cat", how=HOW, source="a cat")


class Turned(Baseline):
    """A prior whose guess is the text, turned."""

    name, embed_dim = "turned", 32

    def guess(self, text):
        return text @ self.turn


def test_an_edit_with_a_prior_goes_along_the_difference_of_its_guesses(generator):
    (row,) = rows(generator, 1)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    prior = Turned()
    prior.turn = turn
    with_prior = Generator(generator.clip, prior, generator.decoder)
    (whole,) = edit(with_prior, row, "a dog", how=HOW, source="a cat", strength=1)
    dog, cat = (generator.clip.encode_text(["a dog", "a cat"]) @ turn).numpy()
    assert np.abs(pixels([whole])[0] - pixels(generator.from_embeddings((dog - cat)[None], [0], HOW))[0]).max() <= 1


def test_a_picture_made_by_a_manipulation_can_be_made_again_from_its_record(generator):
    made = interpolate(generator, rows(generator, 2), 3, how=HOW)[1]
    again = generator.regenerate(made.provenance)
    assert np.abs(pixels([made])[0] - pixels([again])[0]).max() <= 1 and again.provenance == made.provenance


def test_a_strip_shows_the_guesses_and_ends_in_the_picture(generator):
    (row,) = rows(generator, 1)
    guesses = []
    (made,) = generator.from_embeddings(row[None], [4], HOW, on_step=lambda step, x0: guesses.append(x0))
    frames = strip(generator, row, 4, HOW, frames=3)
    assert len(frames) == 3 and frames[-1].tobytes() == made.picture.tobytes()
    first = ((guesses[0][0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(frames[0]), first)
    assert len(strip(generator, row, 4, HOW, frames=40)) == HOW.steps  # never more frames than steps
    several = strip(generator, row, 4, replace(HOW, candidates=3), frames=3)  # a strip is of one walk
    assert [one.tobytes() for one in several] == [one.tobytes() for one in frames]


def away(made, picture):
    """Largest difference of a pixel, in grey levels."""
    return np.abs(
        np.asarray(made.picture).astype(int) - ((picture.pixels(8).permute(1, 2, 0) + 1) * 127.5).numpy()
    ).max()


def own_row(generator, picture):
    return picture.row(generator.clip)


def test_the_way_between_two_noises_keeps_their_length():
    """On the straight way, half way between independent ones has 0.7 of it."""
    a, b = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for share in (0.25, 0.5, 0.75):
        long = (1 - share) * a.norm() + share * b.norm()
        assert torch.isclose(slerp_noise(a, b, share).norm(), long)
    assert torch.allclose(slerp_noise(a, b, 0), a) and torch.allclose(slerp_noise(a, b, 1), b)
    assert torch.allclose(slerp_noise(a, a + 1e-9, 0.5), a, atol=1e-8)
    x, y = torch.tensor([1.0, 0]), torch.tensor([0, 1.0])
    assert torch.allclose(slerp_noise(x, y, 1 / 3), torch.tensor([3**0.5 / 2, 0.5]))  # 30 degrees


def test_a_picture_comes_back_from_its_own_noise(generator):
    picture = tiny_drawing.source(1)
    (made,) = vary(generator, own_row(generator, picture), 1, 0, OWN, picture=picture)
    assert away(made, picture) <= 2
    (other,) = vary(generator, own_row(generator, picture), 1, 0, HOW)  # without its noise: another picture
    assert away(other, picture) > 20


def test_eta_says_how_much_of_a_pictures_noise_is_drawn_anew(generator):
    picture = tiny_drawing.source(1)
    row, changed = own_row(generator, picture), []
    for eta in (0.0, 0.3, 1.0):
        how = Sampling(**FAITHFUL | {"steps": 8, "eta": eta})
        made = vary(generator, row, 1, 3, how, picture=picture)[0]
        changed.append(
            np.abs(
                np.asarray(made.picture).astype(float) - 127.5 * (picture.pixels(8).permute(1, 2, 0).numpy() + 1)
            ).mean()
        )
    assert changed[0] < 1 < changed[1] < changed[2]
    with pytest.raises(UserError, match="set eta above 0"):
        vary(generator, row, 2, 0, OWN, picture=picture)


def test_an_interpolation_of_embedding_and_noise_begins_and_ends_in_the_pictures(generator):
    ends = [tiny_drawing.source(1), tiny_drawing.source(2)]
    points = np.stack([own_row(generator, end) for end in ends])
    made = interpolate(generator, points, 3, 0, OWN, kind="both", pictures=ends)
    assert away(made[0], ends[0]) <= 2 and away(made[-1], ends[1]) <= 2
    assert [one.provenance["task"]["share"] for one in made] == [0, 0.5, 1]
    with pytest.raises(UserError, match="take embedding, noise, both"):
        interpolate(generator, points, 3, 0, OWN, kind="colour", pictures=ends)


def test_an_interpolation_of_noise_goes_from_one_seed_to_the_next_and_keeps_the_embedding(generator):
    points = rows(generator, 2)
    made = interpolate(generator, points, 3, seed=6, how=HOW, kind="noise")
    alone = generator.from_embeddings(points[[0, 0]], [6, 7], HOW)
    assert np.abs(pixels(made)[0] - pixels(alone)[0]).max() <= 1
    assert np.abs(pixels(made)[-1] - pixels(alone)[1]).max() <= 1


def test_an_edit_of_a_picture_goes_away_from_it_with_its_strength(generator):
    picture = tiny_drawing.source(1)
    made = edit(
        generator, own_row(generator, picture), "a dog", 0, OWN, source="a cat", strength=[0, 0.3, 0.6], picture=picture
    )
    assert away(made[0], picture) <= 2
    changes = [np.abs(p - pixels(made)[0]).mean() for p in pixels(made)]
    assert 0 == changes[0] < changes[1] < changes[2]
    assert [one.provenance["task"]["strength"] for one in made] == [0, 0.3, 0.6]


def test_what_was_made_through_a_pictures_noise_is_made_again_with_the_picture(generator):
    one, two = tiny_drawing.source(1), tiny_drawing.source(2)
    points = np.stack([own_row(generator, one), own_row(generator, two)])
    eta = Sampling(**FAITHFUL | {"steps": 8, "eta": 0.5})
    made = [
        vary(generator, points[0], 2, 4, eta, picture=one)[1],
        edit(generator, points[0], "a dog", 0, OWN, strength=[0.2, 0.4], picture=one)[1],
        interpolate(generator, points, 3, 0, OWN, kind="both", pictures=[one, two])[1],
        interpolate(generator, points, 3, 0, OWN, kind="noise", pictures=[None, two])[1],
    ]
    for picture in made:
        again = make_again(generator, picture.provenance, [two, one])
        assert np.abs(pixels([picture])[0] - pixels([again])[0]).max() <= 1
        assert again.provenance == picture.provenance
    with pytest.raises(UserError, match=r"made from picture1.png \(sha256 .*pass that file: --source picture1.png"):
        make_again(generator, made[0].provenance, [two])
    with pytest.raises(UserError, match="damaged"):  # and never another picture
        generator.regenerate(made[0].provenance)


def test_a_record_that_is_damaged_or_of_other_weights_is_one_line(generator):
    picture = tiny_drawing.source(1)
    (made,) = vary(generator, own_row(generator, picture), 1, 0, OWN, picture=picture)
    for change in ({"task": {**made.provenance["task"], "embedding": "!"}}, {"seed": "x"}, {"fingerprints": None}):
        with pytest.raises(UserError, match="damaged"):
            make_again(generator, {**made.provenance, **change}, [picture])
    with pytest.raises(UserError, match="made with decoder 0123"):
        make_again(generator, {**made.provenance, "fingerprints": {"decoder": "sha256:0123456"}}, [picture])
    with pytest.raises(UserError, match="'paint'"):
        make_again(generator, {**made.provenance, "task": {**made.provenance["task"], "name": "paint"}}, [picture])
