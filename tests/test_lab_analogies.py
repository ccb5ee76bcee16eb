import numpy as np
import pytest

from clip_train.arithmetic import Term
from diffusion.lab.analogies import Analogy, derive, different, mean_rows, nearest_words, pictures_of

NAMES = ["cat", "cat", "cat with hat", "grinning cat", "fox", "Fox with key", "bell pepper", "owl with a key", "key"]
WORDS = ["hat", "key", "grinning", "cat", "fox", "pepper"]


def test_names_that_are_another_name_and_one_word_more_are_sums():
    found = derive(NAMES, WORDS)
    assert [(one.expression, one.rest) for one in found[:2]] == [
        ("fox with key - fox", "key"),  # "hat" is a rarer word
        ("cat with hat - cat", "hat"),
    ]
    assert {one.rest for one in found} == {"hat", "key", "grinning", "fox"}  # "fox with key - key" is one too
    assert all("pepper" not in one.expression for one in found)  # there is no bell


def test_sums_shown_together_differ_in_base_and_answer():
    found = derive(NAMES, WORDS)
    shown = different(found, 3)
    assert len({one.rest for one in shown}) == len({one.terms[1] for one in shown}) == 3


def test_captions_without_such_names_give_words_that_stand_together():
    captions = ["a red fox runs", "a red fox sleeps", "the red fox", *["a red owl"] * 3, *["one grey fox"] * 3]
    found = derive(captions, ["red", "fox", "owl", "grey"])
    assert {(one.expression, one.rest) for one in found} >= {
        ("red with fox - red", "fox"),
        ("fox with red - fox", "red"),
    }
    assert derive(["picture number 1", "picture number 2"], ["picture", "number"]) == []


@pytest.mark.parametrize(
    "expression, rest",
    [("person with hat - person", "hat"), ("king - man + woman", None), ("red fox - owl", None), ("2*fox - owl", None)],
)
def test_the_answer_of_a_sum_that_was_asked_for_is_known_where_it_is_plain(expression, rest):
    assert Analogy.asked(expression).rest == rest


def test_pictures_of_a_term_are_those_of_its_name_or_those_that_hold_its_words_alone():
    def shown(*terms):
        found = pictures_of(NAMES, [Term(1.0, terms[0]), *[Term(-1.0, text) for text in terms[1:]]])
        return None if found is None else [rows.tolist() for rows in found]

    assert shown("cat with hat", "cat") == [[2], [0, 1]]
    assert shown("with a key", "fox") == [[5, 7, 8], [4]]
    assert shown("grinning cat", "grinning") is None  # no picture is grinning and no cat
    assert shown("dragon") is None


def test_taking_the_base_away_turns_a_sum_towards_the_missing_word_and_adding_it_does_not():
    axes = np.eye(12)
    words = ["cat", "hat", "key", "fox", "pet", *[f"w{i}" for i in range(7)]]
    rows = axes.copy()
    rows[4] = (0.95 * axes[0] + 0.2 * axes[1]) / np.hypot(0.95, 0.2)  # a pet is much of a cat
    whole = (0.9 * axes[0] + 0.43 * axes[1])[None]
    one = Analogy.of("cat with hat", "cat", "hat")
    both = np.stack([whole, 0.9 * axes[:1]], axis=1)
    nearest, rank = nearest_words([one], both, words, rows, subtract=True)
    assert words[nearest[0]] == "hat" and rank[0] == 1
    nearest, rank = nearest_words([one], both, words, rows, subtract=False)
    assert words[nearest[0]] == "pet" and rank[0] == 2
    nearest, rank = nearest_words([one], both * [[[1], [-1]]], words, rows, subtract=True)
    assert rank[0] > 1


def test_the_mean_of_pictures_is_a_unit_row():
    rows = mean_rows(np.eye(3), [np.array([0, 1]), np.array([2])])
    assert np.allclose(rows, [[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]])


def test_terms_with_signs_of_their_own_are_quoted():
    one = Analogy.of("rock - roll cat", "rock - roll", "cat")
    assert Analogy.asked(one.expression).terms == one.terms
