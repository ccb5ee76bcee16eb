import numpy as np
import pytest
import tiny_drawing

from clip_train.settings import UserError
from diffusion.again import make_again
from diffusion.generate import Sampling
from diffusion.img2img import img2img, noise_level

HOW = Sampling(steps=4, guidance=1.0, sigma_min=0.002)


def test_strength_is_the_cosine_schedules_time():
    assert noise_level(0.5, HOW) == pytest.approx(1) and noise_level(2 / 3, HOW) == pytest.approx(3**0.5)
    assert noise_level(1.0, HOW) == HOW.sigma_max
    for strength, words in ((0.0, "must be above 0"), (1.1, "at most 1"), (0.001, "less than sigma_min")):
        with pytest.raises(UserError, match=words):
            noise_level(strength, Sampling())


def test_a_picture_drawn_over_changes_with_the_strength_and_is_made_again_from_its_record():
    generator, picture = tiny_drawing.generator(), tiny_drawing.source(1)
    rows = np.repeat(picture.row(generator.clip)[None], 2, axis=0)
    true, changed = 127.5 * (picture.pixels(8).permute(1, 2, 0).numpy() + 1), []
    for strength in (0.01, 0.3, 0.8):
        made = img2img(generator, rows, picture, [3, 4], HOW, strength=strength)
        changed.append(np.abs(np.asarray(made[0].picture) - true).mean())
    assert changed[0] < 4 < changed[1] < changed[2]
    assert np.abs(np.asarray(made[0].picture).astype(int) - np.asarray(made[1].picture)).max() > 5  # another seed
    again = make_again(generator, made[1].provenance, [picture])
    assert np.abs(np.asarray(again.picture).astype(int) - np.asarray(made[1].picture)).max() <= 1
    assert again.provenance == made[1].provenance
