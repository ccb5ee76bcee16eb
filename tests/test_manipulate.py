import numpy as np
import pytest
import tiny
import torch

from clip_train.settings import UserError
from diffusion.decoder import DecoderConfig, DecoderDenoiser
from diffusion.generate import Generator, Sampling
from diffusion.manipulate import edit, interpolate, slerp, strip, vary

HOW = Sampling(steps=5)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    from clip_train.model import Clip

    torch.manual_seed(0)
    clip = Clip.load(tiny.clip(tmp_path_factory.mktemp("space") / "clip"))
    config = DecoderConfig(
        embed_dim=clip.embed_dim, image_size=8, widths=(16, 32), blocks=(1, 1), attention=(2,), head_width=16,
        cond_width=32, text=False,
    )  # fmt: skip
    decoder = DecoderDenoiser(config)
    for weight in decoder.parameters():  # the output layer starts at zero, which would make all pictures alike
        torch.nn.init.normal_(weight, std=0.15)
    return Generator(clip, None, decoder.eval())


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


def test_a_picture_made_by_a_manipulation_can_be_made_again_from_its_record(generator):
    made = interpolate(generator, rows(generator, 2), 3, how=HOW)[1]
    assert np.abs(pixels([made])[0] - pixels([generator.regenerate(made.provenance)])[0]).max() <= 1


def test_a_strip_shows_the_guesses_and_ends_in_the_picture(generator):
    (row,) = rows(generator, 1)
    guesses = []
    (made,) = generator.from_embeddings(row[None], [4], HOW, on_step=lambda step, x0: guesses.append(x0))
    frames = strip(generator, row, 4, HOW, frames=3)
    assert len(frames) == 3 and frames[-1].tobytes() == made.picture.tobytes()
    first = ((guesses[0][0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(frames[0]), first)
    assert len(strip(generator, row, 4, HOW, frames=40)) == HOW.steps  # never more frames than steps
