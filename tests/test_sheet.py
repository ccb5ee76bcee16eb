import numpy as np
import pytest
from PIL import Image, ImageFont

from clip_train.sheet import RIGHT, _wrap, contact_sheet, fit_picture, query_sheet

RED, BLUE = Image.new("RGB", (40, 40), (255, 0, 0)), Image.new("RGB", (40, 40), (0, 0, 255))


def pixels_of(sheet, colour):
    return int((np.asarray(sheet) == colour).all(axis=2).sum())


def test_every_picture_is_in_the_sheet_in_its_own_cell():
    sheet = contact_sheet([RED, BLUE, RED], ["a", "b", "c"], columns=2, cell=80)
    assert pixels_of(sheet, (255, 0, 0)) == 2 * 80 * 80 and pixels_of(sheet, (0, 0, 255)) == 80 * 80
    reds, blues = ((np.asarray(sheet) == colour).all(axis=2).nonzero() for colour in [(255, 0, 0), (0, 0, 255)])
    assert blues[1].min() > reds[1].max() - 80 and blues[0].max() < reds[0].max() - 80  # top right; red above and below


def test_a_sheet_without_pictures_labels_or_with_missing_pictures_is_drawn():
    assert contact_sheet([]).size[0] > 0
    assert contact_sheet([RED]).size[0] > 0
    assert pixels_of(contact_sheet([None, RED], ["gone", "there"], cell=80), (255, 0, 0)) == 80 * 80


def test_longer_labels_make_room_for_themselves_and_the_title_too():
    plain = contact_sheet([RED], [""])
    labelled = contact_sheet([RED], ["a label of many words that needs more than one line"])
    titled = contact_sheet([RED], [""], title="A title")
    assert plain.height < labelled.height and plain.height < titled.height


def test_right_answers_and_only_they_are_framed():
    framed = query_sheet(["red"], [[RED, BLUE]], right=[[True, False]], cell=80)
    none = query_sheet(["red"], [[RED, BLUE]], right=[[False, False]], cell=80)
    assert pixels_of(none, RIGHT) == 0
    assert pixels_of(framed, RIGHT) == 86 * 86 - 80 * 80
    assert pixels_of(framed, (255, 0, 0)) == 80 * 80  # the frame covers nothing of the picture


def test_a_query_may_be_a_picture_and_rows_may_differ_in_length():
    sheet = query_sheet([BLUE, "words"], [[RED], [RED, RED, RED]], [["a"], ["b", "c", "d"]], cell=80)
    assert pixels_of(sheet, (0, 0, 255)) == 80 * 80 and pixels_of(sheet, (255, 0, 0)) == 4 * 80 * 80


def test_labels_must_be_as_many_as_pictures():
    with pytest.raises(ValueError):
        contact_sheet([RED, BLUE], ["one"])


def test_small_pictures_grow_by_whole_pixels_and_others_are_fitted():
    dots = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16)
    large = np.asarray(fit_picture(dots, 96))[:, :, 0]
    np.testing.assert_array_equal(large, np.kron(np.asarray(dots), np.ones((24, 24), np.uint8)))
    assert fit_picture(Image.new("RGB", (300, 100)), 96).size == (96, 32)
    assert fit_picture(Image.new("RGB", (70, 35)), 96).size == (96, 48)
    assert fit_picture(Image.new("RGB", (3000, 1)), 96).size == (96, 1)


def test_transparent_pictures_lie_on_white():
    assert fit_picture(Image.new("RGBA", (96, 96), (255, 0, 0, 0)), 96).getpixel((5, 5)) == (255, 255, 255)


def test_wrapped_lines_fit_keep_the_words_and_say_when_something_is_left_out():
    font = ImageFont.load_default(size=12)
    text = "a rather long description of a very small drawing"
    lines = _wrap(text, font, 100, 99)
    assert " ".join(lines) == text and all(font.getlength(line) <= 100 for line in lines)
    cut = _wrap(text, font, 100, 2)
    assert len(cut) == 2 and cut[-1].endswith("…") and all(font.getlength(line) <= 100 for line in cut)
    assert _wrap("", font, 100, 2) == []
    word = "x" * 60
    assert "".join(_wrap(word, font, 100, 99)) == word
    assert len(_wrap("many words " * 5000, font, 100, 3)) == 3
