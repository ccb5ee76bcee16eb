import numpy as np
import pytest
import tiny

from diffusion.lab import choice
from diffusion.lab.choice import at_scales, candidates, draw_zero_shot, probabilities
from diffusion.lab.pairs import ordinal

COSINES = np.array([0.3, 0.1, -0.2, 0.05])


def test_probabilities_are_those_of_torch():
    import torch

    wanted = torch.softmax(torch.tensor(7 * COSINES), 0).numpy()
    assert np.allclose(probabilities(COSINES, 7), wanted)
    assert probabilities(COSINES, 1e6).tolist() == [1, 0, 0, 0]  # no overflow


def test_heat_opens_a_choice_and_cold_decides_it():
    assert candidates(probabilities(COSINES, 1e-9)) == pytest.approx(4)
    assert candidates(probabilities(COSINES, 1e4)) == pytest.approx(1)
    open_to = [candidates(probabilities(COSINES, scale)) for scale in (1, 3, 10, 30, 100)]
    assert open_to == sorted(open_to, reverse=True)


def test_temperature_changes_the_confidence_and_never_what_is_right():
    image = tiny.unit_rows(50, 16, seed=1)
    text = image + 0.8 * tiny.unit_rows(50, 16, seed=2)
    rows = at_scales(image @ text.T, [1e-6, 1, 10, 100, 1000])
    assert len({row["accuracy"] for row in rows}) == 1 and 0.5 < rows[0]["accuracy"] <= 1
    confidence = [row["confidence"] for row in rows]
    assert confidence == sorted(confidence) and confidence[0] == pytest.approx(1 / 50, rel=1e-3)
    assert rows[0]["loss"] == pytest.approx(np.log(50), rel=1e-3)
    assert rows[2]["loss"] < min(rows[0]["loss"], rows[4]["loss"]) or rows[0]["accuracy"] == 1
    assert rows[0]["temperature"] == 1e6


def test_the_loss_is_that_of_the_training_in_one_direction():
    import torch
    import torch.nn.functional as F

    cosines = tiny.unit_rows(9, 5) @ tiny.unit_rows(9, 5, seed=1).T
    wanted = F.cross_entropy(torch.tensor(12.0 * cosines), torch.arange(9))
    assert at_scales(cosines, [12.0])[0]["loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_a_name_that_is_not_among_the_bars_is_said_to_come_later(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(choice, "save", lambda figure, path: drawn.append(figure.axes[0].get_xlabel()))
    names, cosines = [f"name {n}" for n in range(30)], -np.arange(30.0)
    for truth in ("Name 0", "name 6", "name 21", None):
        draw_zero_shot(tmp_path / "a.png", np.zeros((4, 4, 3)), names, cosines, 1.0, truth)
    assert drawn == ["", "", "its name\ncomes 22nd", ""]


def test_places_are_said_as_words():
    said = [ordinal(place) for place in (1, 2, 3, 4, 11, 12, 13, 21, 102, 111, 113)]
    assert said == ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "111th", "113th"]
