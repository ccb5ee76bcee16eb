import random
import string
import time

import open_clip
import pytest

from clip_train.byte_pairs import joined, simple_tokenizer


@pytest.fixture(scope="module")
def tokenizers():
    return simple_tokenizer(context_length=77), open_clip.SimpleTokenizer(context_length=77)


def test_every_word_has_the_tokens_that_open_clip_gives_it(tokenizers):
    ours, theirs = tokenizers
    rng = random.Random(0)
    words = [
        "a",
        "aa",
        "aaa",
        "a" * 50,
        "ababab",
        "unbelievableness",
        "foxes'",
        "東京",
        "🦊🦊",
        "!!!!!!!!",
        "hahahahahahaha",
    ]
    for letters in ("ab", "abc", "thein", string.ascii_lowercase, "Ã©é漢字🦊", "!?.-_=", string.printable):
        words += ["".join(rng.choices(letters, k=rng.randint(1, 60))) for _ in range(120)]
    for word in words:
        assert ours.encode(word) == theirs.encode(word), word
    caption = " ".join(words)
    assert ours.encode(caption) == theirs.encode(caption)
    assert (ours([caption, ""]) == theirs([caption, ""])).all()


@pytest.mark.parametrize("seed", range(20))
def test_pairs_that_lie_over_one_another_are_joined_as_by_the_plain_algorithm(seed):
    rng = random.Random(seed)
    ranks = {("".join(rng.choices("ab", k=rng.randint(1, 3))), "".join(rng.choices("ab", k=rng.randint(1, 3)))): 0
             for _ in range(30)}  # fmt: skip
    ranks = {pair: rank for rank, pair in enumerate(ranks)}
    for _ in range(100):
        word = rng.choices("ab", k=rng.randint(1, 20))
        assert joined(word, ranks) == plainly_joined(word, ranks)


def plainly_joined(word, ranks):
    while True:
        pairs = [pair for pair in zip(word, word[1:], strict=False) if pair in ranks]
        if not pairs:
            return word
        best, made, at = min(pairs, key=ranks.get), [], 0
        while at < len(word):
            both = tuple(word[at : at + 2]) == best
            made.append("".join(word[at : at + 2]) if both else word[at])
            at += 2 if both else 1
        word = made


def test_a_word_of_thousands_of_letters_takes_no_longer_than_many_short_ones(tokenizers):
    ours, _ = tokenizers
    letters = "".join(random.Random(1).choices(string.ascii_lowercase, k=20_000))
    began = time.perf_counter()
    assert len(ours.encode(letters)) > 5000
    assert time.perf_counter() - began < 2  # open_clip's own: minutes
