import numpy as np
import pytest
import tiny

from clip_train.arithmetic import Term, answer, parse, plot, words_of
from clip_train.settings import UserError


@pytest.mark.parametrize(
    "expression, terms",
    [
        ("person with hat - person", [(1, "person with hat"), (-1, "person")]),
        ("king - man + woman", [(1, "king"), (-1, "man"), (1, "woman")]),
        ("t-shirt + 0.5*fox", [(1, "t-shirt"), (0.5, "fox")]),
        ("2 * fox - .25 * old owl", [(2, "fox"), (-0.25, "old owl")]),
        ("-person + hat", [(-1, "person"), (1, "hat")]),
        ("- person + hat", [(-1, "person"), (1, "hat")]),
        ('"rock + roll" - 2*"roll"', [(1, "rock + roll"), (-2, "roll")]),
        ("2 hearts", [(1, "2 hearts")]),
        ("fox -owl", [(1, "fox -owl")]),  # a sign needs a space after it as well
    ],
)
def test_expressions_are_read_as_one_writes_them(expression, terms):
    assert parse(expression) == [Term(weight, text) for weight, text in terms]


@pytest.mark.parametrize("expression", ["", "fox - ", "fox + + owl", '"" + fox', "0*fox + owl", "2*"])
def test_expressions_with_nothing_to_add_are_one_line(expression):
    with pytest.raises(UserError, match="empty term|weight of"):
        parse(expression)


def world():
    """Words whose rows are sums of a person's, a hat's and other directions."""
    axes = np.eye(40, dtype=np.float32)
    words = ["person", "hat", "cap", *[f"word{i}" for i in range(37)]]
    rows = axes.copy()
    rows[2] = axes[1] * 0.8 + axes[2] * 0.6  # a cap is much of a hat
    return words, rows, (axes[0] + axes[1]) / np.sqrt(2)


def test_person_with_hat_minus_person_is_hat_and_cap_comes_second():
    words, rows, both = world()
    terms = parse("person with hat - 0.7071*person")
    found = answer("x", terms, np.stack([both, rows[0]]), words, rows)
    assert [a["word"] for a in found["answers"][:2]] == ["hat", "cap"]
    assert found["answers"][0]["cosine"] == pytest.approx(1, abs=1e-4) and found["margin"] == pytest.approx(
        0.2, abs=1e-3
    )
    assert found["left_out"] == ["person"] and found["words"] == 39
    # sums of two of these words come nowhere near a third, but for hat and cap themselves
    assert found["p_cosine"] < 0.01 and found["p_margin"] < 0.1


def test_random_words_are_as_close_as_random_words():
    words, rows = [f"w{i}" for i in range(200)], tiny.unit_rows(200, 16)
    p = []
    for seed in range(40):
        i, j = np.random.default_rng(seed).choice(200, 2, replace=False)
        terms = [Term(1.0, words[i]), Term(-1.0, words[j])]
        found = answer("x", terms, rows[[i, j]], words, rows, permutations=200, seed=seed)
        assert {a["word"] for a in found["answers"]}.isdisjoint({words[i], words[j]})
        p.append((found["p_cosine"], found["p_margin"]))
    for column in np.array(p).T:  # uniform under the null: mean 1/2, standard error 0.046
        assert 0.35 < column.mean() < 0.65 and column.min() >= 1 / 201


def test_terms_that_are_no_words_are_drawn_from_a_pool_of_their_own_without_their_words():
    words, rows, both = world()
    terms = parse("person with hat - 0.7071*person")
    given = {"permutations": 200, "seed": 1}
    plain = answer("x", terms, np.stack([both, rows[0]]), words, rows, **given)
    same = answer(
        "x", terms, np.stack([both, rows[0]]), words, rows, pool=rows, pool_words=np.eye(40, dtype=bool), **given
    )
    assert same == plain
    pool = np.concatenate([rows[1:2]] * 3)  # pictures that show nothing but hats
    own = np.zeros((3, 40), dtype=bool)
    named = answer("x", terms, np.stack([both, rows[0]]), words, rows, pool=pool, pool_words=own, **given)
    own[:, 1] = True  # and are called so
    called = answer("x", terms, np.stack([both, rows[0]]), words, rows, pool=pool, pool_words=own, **given)
    assert named["p_cosine"] == 1 and called["p_cosine"] == 1 / 201
    with pytest.raises(UserError, match="1 are too few to draw the 2 terms"):
        answer("x", terms, np.stack([both, rows[0]]), words, rows, pool=rows[:1], **given)


def test_terms_that_cancel_out_and_lists_that_are_too_short_are_one_line():
    words, rows, _ = world()
    with pytest.raises(UserError, match="cancel out"):
        answer("fox - fox", parse("fox - fox"), rows[[5, 5]], words, rows)
    with pytest.raises(UserError, match="3 words are too few"):
        answer("a + b", parse("a + b"), rows[:2], words[:3], rows[:3])


def test_words_of_captions_are_counted_once_a_caption_without_the_commonest():
    captions = ["The red fox, the fox", "a red owl's T-shirt", "red", "x 12"]
    assert words_of(captions) == ["red", "fox", "owl's", "t-shirt"]
    assert words_of(captions, most=1) == ["red"]


def test_the_chart_shows_every_expression(tmp_path):
    from PIL import Image

    words, rows, both = world()
    one = answer("person with hat - person", parse("a - b"), np.stack([both, rows[0]]), words, rows, permutations=100)
    plot(tmp_path / "one.png", [one])
    plot(tmp_path / "two.png", [one, one])
    heights = []
    for name in ("one.png", "two.png"):
        with Image.open(tmp_path / name) as chart:
            heights.append(chart.height)
    assert heights[1] > 1.5 * heights[0]
