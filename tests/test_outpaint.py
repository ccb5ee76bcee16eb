import numpy as np
import pytest
import tiny_drawing
import torch

from clip_train.settings import UserError
from diffusion.again import make_again
from diffusion.generate import Sampling
from diffusion.outpaint import canvas, margins_of, outpaint, through_windows, windows


def test_the_canvas_has_the_picture_in_its_place_and_the_decoders_size_on_its_short_side():
    picture = tiny_drawing.source(1, 20).picture
    known, painted = canvas(picture, (0, 10, 0, 0), 8)
    assert known.shape == (1, 3, 8, 12) and not painted[0, :, :8].any() and painted[0, :, 8:].all()
    assert torch.allclose(known[..., :8], tiny_drawing.source(1).pixels(8)[None])
    known, painted = canvas(picture, (10, 10, 10, 10), 8)  # twice as large: the picture is the middle quarter
    assert painted[0].sum() == 64 - 16 and not painted[0, 2:6, 2:6].any()


@pytest.mark.parametrize(
    "margins, words",
    [
        ((0, 0, 0, 0), "how far"),
        ((-1, 2, 0, 0), "how far"),
        ((0, 1000, 0, 0), "more than 8 times"),
        ((0, 0, 0, 1), "less than a pixel"),
        ((400, 400, 400, 400), "0 x 0 pixels"),
    ],
)
def test_a_canvas_that_makes_no_sense_is_refused(margins, words):
    with pytest.raises(UserError, match=words):
        canvas(tiny_drawing.source(1, 20).picture, margins, 8)


def test_a_factor_makes_room_on_all_sides():
    assert margins_of(tiny_drawing.source(1, 20).picture, 1.5) == [5, 5, 5, 5]


@pytest.mark.parametrize("height, width", [(8, 8), (8, 9), (8, 12), (8, 30), (17, 8)])
def test_windows_cover_the_canvas_and_overlap_by_half(height, width):
    places = windows(height, width, 8)
    seen = np.zeros((height, width), dtype=int)
    for top, left in places:
        assert 0 <= top <= height - 8 and 0 <= left <= width - 8
        seen[top : top + 8, left : left + 8] += 1
    assert seen.min() >= 1
    starts = sorted({left for _, left in places}) if width > height else sorted({top for top, _ in places})
    assert all(0 < b - a <= 4 for a, b in zip(starts, starts[1:], strict=False))


def test_a_denoiser_of_single_pixels_does_not_notice_the_windows():
    def denoise(x, sigma):
        return x / (1 + sigma[:, None, None, None] ** 2)

    x, sigma = torch.randn(2, 3, 8, 21, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 2.0])
    whole = through_windows(denoise, windows(8, 21, 8), 8)(x, sigma)
    assert torch.allclose(whole, denoise(x, sigma), atol=1e-6)


def test_where_windows_disagree_the_nearer_middle_counts_more():
    def denoise(x, sigma):  # the first window says 0, the second 1
        return torch.cat([torch.zeros_like(x[:1]), torch.ones_like(x[:1])])

    guess = through_windows(denoise, [(0, 0), (0, 4)], 8)(torch.zeros(1, 1, 8, 12), torch.ones(1))[0, 0, 0]
    assert torch.allclose(guess, torch.tensor([0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]))


def test_an_outpainted_picture_holds_the_picture_and_is_made_again_from_its_record():
    generator, picture = tiny_drawing.generator(), tiny_drawing.source(1)
    rows = np.repeat(picture.row(generator.clip)[None], 2, axis=0)
    how = Sampling(steps=3, guidance=1.0, sampler="ddim")
    made = outpaint(generator, rows, picture, (0, 10, 0, 0), [3, 4], how, repeats=2)
    true = ((picture.pixels(8) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    for one in made:
        assert one.picture.size == (12, 8) and np.array_equal(np.asarray(one.picture)[:, :8], true)
    again = make_again(generator, made[1].provenance, [picture])
    assert np.abs(np.asarray(again.picture).astype(int) - np.asarray(made[1].picture)).max() <= 1
