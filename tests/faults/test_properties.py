"""What holds for any text, json or bytes, tried by hypothesis on what it thinks up. Filters: tests/test_where.py."""

import json
import re
import string

import pytest
import tiny
import torch
import webdataset.tariterators

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from clip_train.address import without_secrets
from clip_train.console import harmless
from clip_train.folder import read_manifest
from clip_train.settings import UserError, override
from clip_train.sources import Columns, _described
from clip_train.tars import split_name
from clip_train.tensors import load_tensors, save_tensors
from diffusion.prior import PriorConfig
from retrieval.asked import to_json
from retrieval.query import QueryError, parse_algebra, parse_term

slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("same each time", derandomize=True, database=None, deadline=None, suppress_health_check=slow)
settings.load_profile("same each time")

ANY_TEXT = st.text(st.characters())  # lone surrogates, too
FLAT = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
ANY_JSON = st.recursive(FLAT, lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner), max_leaves=8)


def one_line(error):
    return str(error).strip() and "\n" not in str(error).strip()


@given(st.text(st.sampled_from("ab./JPG 🦊\u0130")))
def test_a_members_name_is_split_as_webdataset_splits_it(name):
    assume(not name.rpartition("/")[2].startswith("."))  # hidden; webdataset has its folder for a key
    theirs = webdataset.tariterators.base_plus_ext(name)
    assert split_name(name) == ((theirs[0], theirs[1].lower()) if theirs[0] else ("", ""))


@given(st.binary() | ANY_JSON.map(lambda value: json.dumps(value).encode()), st.binary() | ANY_TEXT.map(str.encode))
@example(b"[" * 100_000, b"")
@example(b"9" * 5000, b"\xff")
def test_a_sample_has_captions_or_a_reason(meta, text):
    row = _described("a", None, text, meta, Columns())
    assert row.problem if row.captions is None else all(caption.strip() == caption for caption in row.captions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.store(tmp_path_factory.mktemp("world") / "emb", tiny.unit_rows(4, 32)).folder


@given(st.data())
def test_a_manifest_is_read_or_refused_in_one_line(folder, data):
    path = folder / "manifest.json"
    whole = path.read_text()
    fields = json.loads(whole)
    place = fields if data.draw(st.booleans()) else fields[data.draw(st.sampled_from(["config", "inputs", "result"]))]
    place[data.draw(st.sampled_from([*place, "another"]))] = data.draw(ANY_JSON)
    path.write_text(json.dumps(fields))
    try:
        assert read_manifest(folder).kind == fields["kind"]
    except UserError as error:
        assert one_line(error)
    finally:
        path.write_text(whole)


@given(st.sampled_from(["width", "depth", "sigma_data", "guidance", "x"]), ANY_JSON.map(json.dumps) | ANY_TEXT)
def test_a_setting_is_taken_or_refused(name, value):
    try:
        (config,) = override([PriorConfig()], [f"{name}={value}"])
        assert isinstance(config, PriorConfig)
    except UserError as error:
        assert str(error)


@given(st.text(st.sampled_from("ab+-*:. 0e9()'\"\\\n")) | ANY_TEXT)
def test_a_query_means_something_or_is_refused(text):
    for parse in (parse_term, parse_algebra):
        try:
            assert parse(text)
        except QueryError as error:
            assert str(error)


@given(ANY_TEXT)
def test_what_a_terminal_is_told_is_what_was_said_or_a_question_mark(text):
    said = harmless(text)
    assert len(said) == len(text) and harmless(said) == said and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", said)
    assert all(one == other for one, other in zip(text, said, strict=True) if one.isprintable())


SECRET = st.text(string.ascii_letters + string.digits, min_size=8).map("S3".__add__)
REST = st.text(st.characters(codec="utf-8", exclude_characters="@:/?#'\"|;&\\ \t\r\n"), max_size=5)


@given(SECRET, REST, REST, st.sampled_from([
    "https://{a}:{secret}@h/{b}.tar", "s3://{secret}@h/{b}.tar", "https://h/{b}.tar?token={secret}",
    "pipe:curl -u me:{secret} https://h/a.tar", "pipe:curl -H 'Authorization: {secret}' https://h/{b}.tar",
    "pipe:KEY={secret} aws s3 cp s3://b/a.tar -", "a.tar::https://{a}:{secret}@h/b.tar?x={secret}",
]))  # fmt: skip
def test_an_address_that_is_kept_holds_no_password(secret, a, b, template):
    assume(secret not in a + b)
    assert secret not in without_secrets(template.format(secret=secret, a=a, b=b))


@given(ANY_TEXT)
def test_any_text_can_be_cleaned_of_secrets(text):
    assert isinstance(without_secrets(text), str) and isinstance(without_secrets(f"pipe:{text}"), str)


@settings(max_examples=20)
@given(st.dictionaries(st.text() | st.integers(), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists)))  # fmt: skip
def test_numbers_beside_tensors_come_back_as_json_has_them(tmp_path, numbers):
    save_tensors(tmp_path / "a.safetensors", {"w": torch.arange(3.0)}, numbers)
    tensors, read = load_tensors(tmp_path / "a.safetensors")
    assert read == json.loads(json.dumps(numbers)) and tensors["w"].tolist() == [0, 1, 2]


KNOWN = st.recursive(FLAT | st.binary(), lambda one: st.lists(one) | st.dictionaries(st.text() | st.integers(), one))


@given(KNOWN)
def test_whatever_the_server_knows_its_answer_is_json(value):
    def refuse(word):
        raise ValueError(word)

    json.loads(to_json(value).decode(), parse_constant=refuse)
