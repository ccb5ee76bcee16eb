import pytest
from PIL import Image

from clip_train.settings import UserError
from diffusion.generate import Generated, Sampling
from diffusion.grid import Axis, axes_among, check_axes, draw_grid, grid_sheet, read_axis


def draw(how, seed):
    return Generated(Image.new("RGB", (4, 4)), {"steps": how.steps, "guidance": how.guidance, "seed": seed})


def test_every_combination_is_drawn_row_by_row():
    axes, told = [read_axis("guidance=1,2.5"), read_axis("steps=3,4,5")], []
    made = list(draw_grid(draw, axes, Sampling(sampler="ddim"), 7, lambda done, total: told.append((done, total))))
    assert [label for label, _ in made] == [f"guidance {g}, steps {s}" for s in (3, 4, 5) for g in ("1", "2.5")]
    assert [(one.provenance["guidance"], one.provenance["steps"]) for _, one in made] == [
        (g, s) for s in (3, 4, 5) for g in (1.0, 2.5)
    ]
    assert told[-1] == (6, 6)
    sheet = grid_sheet(made, axes, "a fox")
    assert sheet.height > sheet.width  # two columns, three rows


def test_seeds_are_an_axis_too():
    assert [one.provenance["seed"] for _, one in draw_grid(draw, [read_axis("seed=4,9")], Sampling())] == [4, 9]


@pytest.mark.parametrize(
    "text, words",
    [
        ("guidance", "expected SETTING=VALUE"),
        ("size=1,2", "with a setting out of: seed, steps"),
        ("steps=1,x", "steps must be int"),
        ("steps=0,1", "steps 0 must be at least 1"),
        ("sampler=heun,plms", "no sampler 'plms'"),
        ("steps=1,,2", "expected SETTING=VALUE"),
        ("steps=2,2", "stands there twice"),
        ("seed=-1,2", "non-negative"),
    ],
)
def test_an_axis_that_makes_no_sense_is_one_line(text, words):
    with pytest.raises(UserError, match=words):
        read_axis(text)


def test_a_grid_has_one_or_two_different_axes_and_an_end():
    one = read_axis("steps=1,2")
    for axes, words in (
        ([], "one or two axes, not 0"),
        ([one] * 3, "not 3"),
        ([one, one], "both axes"),
        ([Axis("seed", ("1",) * 30), Axis("steps", ("1",) * 30)], "30 x 30 = 900"),
    ):
        with pytest.raises(UserError, match=words):
            check_axes(axes)


def test_axes_stand_among_the_words_without_becoming_captions():
    assert axes_among(["a fox", "steps=1,2", "x=1", "seed = 3"]) == (["steps=1,2"], ["a fox", "x=1", "seed = 3"])
