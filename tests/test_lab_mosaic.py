import numpy as np
import torch
from PIL import Image

from diffusion.lab import style
from diffusion.lab.mosaic import BREAK, CELL, GAP, LINE, mosaic, to_pictures

RED, BLUE = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))


def drawn(*arguments, **options):
    with style.drawing():
        return mosaic(*arguments, **options).axes[0]


def test_every_picture_stands_in_its_row_and_column_and_an_empty_place_is_white():
    canvas = np.asarray(drawn([[RED, None], [None, BLUE]]).images[0].get_array())
    side, far = CELL // 2, CELL + GAP + CELL // 2
    assert canvas[side, side].tolist() == [255, 0, 0] and canvas[far, far].tolist() == [0, 0, 255]
    assert canvas[side, far].tolist() == canvas[far, side].tolist() == [255, 255, 255]
    assert canvas.shape == (2 * CELL + GAP, 2 * CELL + GAP, 3)


def test_words_below_and_groups_take_their_room():
    plain, words, groups = (
        drawn([[RED], [BLUE]], **options).images[0].get_array().shape[0]
        for options in ({}, {"below": [["one"], [""]]}, {"groups": [1]})
    )
    assert words == plain + LINE and groups == plain + BREAK


def test_words_are_words_and_no_markup():
    axes = drawn([[RED]], ["$a_$"], ["50 %$"], title="x_$y$", below=[["$"]])
    assert [label.get_text() for label in (*axes.get_yticklabels(), *axes.get_xticklabels())] == ["$a_$", "50 %$"]
    texts = [axes.title, *axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels()]
    assert len(texts) == 4 and not any(text.get_parse_math() for text in texts)


def test_what_is_outside_the_range_is_cut_off():
    (picture,) = to_pictures(torch.tensor([-9.0, 0.0, 9.0])[None, :, None, None].expand(1, 3, 2, 2))
    assert picture.getpixel((0, 0)) == (0, 128, 255)


def test_no_word_is_cut_off_and_no_picture_is_scaled():
    words = ["told what to draw,\nin very many words indeed", "told nothing"]
    with style.drawing():
        figure = mosaic([[RED], [BLUE]], words, ["a heading that is wider than its picture"], title="A title " * 5)
        (axes,) = figure.axes
        box, whole = axes.get_tightbbox(), figure.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= whole.width and 0 <= box.y0 < box.y1 <= whole.height
    place = axes.get_window_extent()
    assert (round(place.width), round(place.height)) == (CELL, 2 * CELL + GAP)
