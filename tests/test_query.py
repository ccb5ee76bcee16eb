import numpy as np
import pytest

from clip_train.settings import UserError
from retrieval.query import Term, combine, describe, parse_algebra, parse_term, questions


def said(terms):
    return [(term.kind, term.value, term.weight) for term in terms]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("a red fox", [("text", "a red fox", 1)]),
        ("king - man + woman", [("text", "king", 1), ("text", "man", -1), ("text", "woman", 1)]),
        ("fox - 0.5*cartoon + 2 * red", [("text", "fox", 1), ("text", "cartoon", -0.5), ("text", "red", 2)]),
        ("- red", [("text", "red", -1)]),
        # signs without a space on both sides are none
        ("t-shirt", [("text", "t-shirt", 1)]),
        ("-5 degrees", [("text", "-5 degrees", 1)]),
        ("C++ - old", [("text", "C++", 1), ("text", "old", -1)]),
        ("a fox -", [("text", "a fox -", 1)]),
        ("woman – red", [("text", "woman – red", 1)]),
        ('"t-shirt - red"', [("text", "t-shirt - red", 1)]),
        ('"t-shirt - red" - blue', [("text", "t-shirt - red", 1), ("text", "blue", -1)]),
        # quoted text is not read again
        ('"key:foo"', [("text", "key:foo", 1)]),
        ('"image:fox.jpg"', [("text", "image:fox.jpg", 1)]),
        ('"0.5*cat"', [("text", "0.5*cat", 1)]),
        ('a - "key:x"', [("text", "a", 1), ("text", "key:x", -1)]),
        ('a - 0.5*"2*4 board"', [("text", "a", 1), ("text", "2*4 board", -0.5)]),
        ('"a" "b" - c', [("text", '"a" "b"', 1), ("text", "c", -1)]),
        ("king \u2212 man", [("text", "king", 1), ("text", "man", -1)]),
        ("key:train0001 - red", [("key", "train0001", 1), ("text", "red", -1)]),
        ("image:my fox.jpg + in the snow", [("image", "my fox.jpg", 1), ("text", "in the snow", 1)]),
        ('image:"a - b.jpg" + red', [("image", "a - b.jpg", 1), ("text", "red", 1)]),
        ("text:key:abc", [("text", "key:abc", 1)]),
        ("0.5*vector:row.npy + x", [("vector", "row.npy", 0.5), ("text", "x", 1)]),
        ("time: 3 o'clock", [("text", "time: 3 o'clock", 1)]),
    ],
)
def test_a_text_is_read_as_a_sum_only_where_signs_stand_between_spaces(text, terms):
    assert said(parse_algebra(text)) == terms


@pytest.mark.parametrize("text", ["a - ", "", "key:", "a + + b", "0*a + b", 'text:""'])
def test_a_sum_with_an_empty_term_or_a_weight_of_nothing_is_refused(text):
    with pytest.raises(UserError):
        parse_algebra(text)
    with pytest.raises(
        UserError, match=r"^'a - ' has an empty term; .*; a text with signs of its own stands in double"
    ):
        parse_algebra("a - ")


def test_the_signs_in_an_added_term_are_text():
    assert said([parse_term("t-shirt - red", -1)]) == [("text", "t-shirt - red", -1)]
    assert said([parse_term("0.5 * image:a.png", -2)]) == [("image", "a.png", -1)]


def test_combine_is_the_weighted_sum_made_a_unit_row():
    rows = np.array([[3 / 5, 4 / 5, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32)
    terms = [Term("text", "a", 2.0), Term("text", "b", -1.0), Term("image", "c", 0.5)]
    by_hand = np.array([6 / 5, 3 / 5, 1 / 2])
    made = combine(terms, rows)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, by_hand / np.linalg.norm(by_hand), atol=1e-6)


def test_a_gap_between_the_two_kinds_does_not_change_the_order():
    """Pictures and texts set apart by a direction of their own: the sum ranks as if there were no gap."""
    rng = np.random.default_rng(0)

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    pictures, texts = unit(rng.standard_normal((200, 16))), unit(rng.standard_normal((2, 16)))
    apart = np.tile(unit(rng.standard_normal((1, 4))), (200, 1))
    far_pictures, far_texts = unit(np.hstack([pictures, apart])), unit(np.hstack([texts, -apart[:2]]))
    terms = [Term("image", "x"), Term("text", "plus", 1.0), Term("text", "minus", -1.0)]
    near = pictures @ combine(terms, np.vstack([pictures[:1], texts]))
    far = far_pictures @ combine(terms, np.vstack([far_pictures[:1], far_texts]))
    assert np.argsort(-near).tolist() == np.argsort(-far).tolist()


def test_terms_that_cancel_out_are_refused_by_name():
    row = np.ones((1, 4), dtype=np.float32) / 2
    with pytest.raises(UserError, match='the terms of "a" - "a" cancel out'):
        combine(parse_algebra("a - a"), np.vstack([row, row]))
    with pytest.raises(UserError, match="the query has no terms"):
        combine([], np.empty((0, 4)))


@pytest.mark.parametrize(("kind", "weight"), [("sound", 1.0), ("text", 0.0), ("text", float("nan"))])
def test_a_term_of_no_kind_or_weight_is_refused(kind, weight):
    with pytest.raises(UserError):
        Term(kind, "x", weight)


def test_each_thing_given_is_a_query_of_its_own_unless_they_go_together():
    given = {"images": ["a.png"], "keys": ["k1"], "vectors": [("v.npy[0]", np.ones(4))]}
    asked = questions(["fox", "cat - dog"], **given)
    assert [name for name, _ in asked] == ["fox", '"cat" - "dog"', "a.png", "key:k1", "v.npy[0]"]
    assert [len(terms) for _, terms in asked] == [1, 2, 1, 1, 1]
    ((name, terms),) = questions(["fox", "cat - dog"], **given, together=True)
    assert len(terms) == 6 and name == '"fox" + "cat" - "dog" + image:a.png + key:k1 + vector:...'


def test_plus_and_minus_change_every_query():
    asked = questions(["fox", "cat"], plus=["red", "0.5*key:k1"], minus=["cartoon"], weight=0.8)
    for start, (_, terms) in zip(("fox", "cat"), asked, strict=True):
        expected = [("text", start, 1), ("text", "red", 0.8), ("key", "k1", 0.4), ("text", "cartoon", -0.8)]
        assert said(terms) == expected
    assert asked[0][0] == '"fox" + 0.8*"red" + 0.4*key:k1 - 0.8*"cartoon"'
    ((name, terms),) = questions(plus=["red"])
    assert said(terms) == [("text", "red", 1)] and name == "red"
    assert questions() == []


def test_a_literal_query_has_no_signs_and_no_prefixes():
    assert said(questions(["t-shirt - red"], literal=True)[0][1]) == [("text", "t-shirt - red", 1)]
    assert said(questions(["key:abc"], literal=True)[0][1]) == [("text", "key:abc", 1)]


def test_a_sum_is_described_as_it_was_read():
    assert describe(parse_algebra("king - 0.5*man + key:k1")) == '"king" - 0.5*"man" + key:k1'
