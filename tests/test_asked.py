import asyncio
import json
import math

import numpy as np
import pytest

from retrieval.asked import Asked, Refused, picture_bytes, plain, to_json, vector


class Request:
    """What Asked.read needs of one."""

    def __init__(self, body):
        self._body = body

    async def body(self):
        return self._body


def read(body, **how):
    async def in_thread(function):
        return function()

    return asyncio.run(Asked.read(Request(body), in_thread, **how))


@pytest.mark.parametrize(
    "body, said",
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"\xff\xfe{}", "the body is not JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "must be a JSON object, not a list"),
        (b"null", "must be a JSON object, not null"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused_in_one_line(body, said):
    with pytest.raises(Refused, match=said) as caught:
        read(body)
    assert caught.value.status == 400 and "\n" not in str(caught.value)
    assert json.loads(json.dumps(caught.value.body))["error"]["message"] == str(caught.value)


@pytest.mark.parametrize(
    "body",
    [b'{"a": [' + b"[]," * 300_000 + b"[]]}", b'{"a": ' + b"[" * 300_000, b'{"a": [' + b"1," * 300_000 + b"1]}"],
)
def test_a_body_of_very_many_values_is_refused_before_it_is_parsed(body, monkeypatch):
    monkeypatch.setattr("json.loads", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(Refused, match="the body holds more than 200000 values") as caught:
        read(body, pictures=True)
    assert caught.value.status == 413


def test_only_bodies_that_may_hold_pictures_may_be_large():
    body = json.dumps({"image": "A" * 300_000}).encode()
    assert len(read(body, pictures=True).get("image", str)) == 300_000
    with pytest.raises(Refused, match="the body has 300013 bytes; 256000 are the most here") as caught:
        read(body)
    assert caught.value.status == 413


def test_numbers_of_thousands_of_digits_are_refused_and_not_repeated():
    with pytest.raises(Refused, match="not JSON: a number of 4000 digits"):
        read(b'{"k": ' + b"9" * 4000 + b"}")
    assert read(b'{"k": -12345678901234567890}').get("k", int) == -12345678901234567890
    for value in (int("9" * 99), "9" * 4000, 1e300):
        with pytest.raises(Refused) as caught:
            Asked({"k": value}).number("k", 1.0 if isinstance(value, float) else 1, 0, 9)
        assert len(str(caught.value)) < 100


def test_long_bodies_are_parsed_in_a_thread():
    asked = []

    async def in_thread(function):
        asked.append(function)
        return function()

    body = json.dumps({"text": "x" * 100_000}).encode()
    assert asyncio.run(Asked.read(Request(body), in_thread)).get("text", str) == "x" * 100_000
    assert len(asked) == 1


@pytest.mark.parametrize(
    "fields, ask, said",
    [
        ({"a": 1}, lambda a: a.get("a", str), "a must be a text, not a whole number"),
        ({"a": True}, lambda a: a.get("a", int), "a must be a whole number, not true or false"),
        ({"a": 1.5}, lambda a: a.number("a", 1, 0, 9), "a must be a whole number, not a number"),
        ({"a": 10}, lambda a: a.number("a", 1, 0, 9), "a 10 must be between 0 and 9"),
        ({"a": "ten"}, lambda a: a.number("a", 1, 0, 9), "a must be a whole number, not 'ten'"),
        ({"a": "nan"}, lambda a: a.number("a", 1.0, 0, 9), "a nan must be between 0 and 9"),
        ({"a": 10**400}, lambda a: a.number("a", 1.0, 0, 9), "a is too large"),
        ({"a": "x" * 11}, lambda a: a.text("a", 10), "a has 11 characters; 10 are the most"),
        ({"a": "\ud800"}, lambda a: a.text("a"), "a is not valid Unicode"),
        ({"a": "sound"}, lambda a: a.choice("a", "image", "text"), "a 'sound' must be one of: image, text"),
        ({"a": [1, "2"]}, lambda a: a.whole_numbers("a", 9), "a must hold whole numbers, not a text"),
        ({"a": [1, 2]}, lambda a: a.whole_numbers("a", 1), "a holds 2 entries; 1 are the most"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(fields, ask, said):
    with pytest.raises(Refused, match=said):
        ask(Asked(fields))


def test_missing_and_null_fields_take_their_defaults():
    asked = Asked({"a": None, "t": "  "})
    assert asked.get("a", int, 3) == asked.get("b", int, 3) == 3
    assert asked.number("a", 5, 0, 9) == 5 and asked.choice("a", "x", "y") == "x"
    assert asked.text("t") is None and asked.whole_numbers("a", 3) == []


def test_forms_have_their_numbers_as_text_and_whole_numbers_may_stand_for_others():
    assert Asked({"n": "3"}).number("n", 1, 0, 9) == 3
    assert Asked({"n": 3}).number("n", 1.0, 0, 9) == 3.0


def test_a_vector_comes_out_with_length_one():
    np.testing.assert_allclose(vector([3, 4.0], 2, "v"), [0.6, 0.8], rtol=1e-6)
    huge = vector([1e200, 1e200], 2, "v")  # its length is beyond a float32
    np.testing.assert_allclose(huge, [math.sqrt(0.5)] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    "values, said",
    [
        ([1.0], "v must be 2 numbers, not 1 numbers"),
        ("ab", "v must be 2 numbers, not a text"),
        ([1.0, "2"], "v must hold numbers only"),
        ([1.0, True], "v must hold numbers only"),
        ([0, 0.0], "points nowhere"),
        ([1e999, 1.0], "points nowhere"),
        ([10**400, 1], "too large"),
    ],
)
def test_a_vector_that_cannot_be_searched_is_refused(values, said):
    with pytest.raises(Refused, match=said):
        vector(values, 2, "v")


def test_pictures_come_in_base64_with_or_without_a_data_address():
    assert picture_bytes("AAEC", "image") == picture_bytes("data:image/png;base64,AAEC", "image") == b"\0\1\2"
    with pytest.raises(Refused, match="image must be a picture in base64"):
        picture_bytes("A", "image")


def test_what_json_cannot_hold_is_sent_as_something_it_can():
    import datetime

    value = {"a": math.nan, "b": [math.inf, b"\xff"], "c": datetime.date(2026, 1, 2), "d": "\ud800", 5: None}
    sent = json.loads(to_json(value))
    assert sent["a"] is None and sent["b"][0] is None and sent["c"] == "2026-01-02" and sent["5"] is None
    assert to_json({"a": "ü"}) == '{"a":"ü"}'.encode()
    assert plain(value)["b"] == [None, "�"]
