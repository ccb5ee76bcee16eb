from dataclasses import dataclass

import pytest

from clip_train.settings import UserError, config_from_json, config_to_json, override


@dataclass(frozen=True, kw_only=True)
class Example:
    width: int
    rate: float = 0.5
    name: str = "a"
    fast: bool = False
    sizes: tuple[int, ...] = (1, 2)
    limit: int | None = None


def test_a_config_survives_json():
    config = Example(width=3, sizes=(4, 5), limit=7)
    assert config_from_json(Example, config_to_json(config), "x") == config


def test_set_reads_each_value_as_its_field_type():
    (config,) = override([Example(width=1)], ["rate=2", "name=12", "fast=true", "sizes=[3]", "limit=none", "width=9"])
    assert config == Example(width=9, rate=2.0, name="12", fast=True, sizes=(3,), limit=None)


def test_set_goes_to_the_config_that_has_the_key():
    @dataclass(frozen=True)
    class Other:
        depth: int = 1

    first, second = override([Example(width=1), Other()], ["depth=4", "width=2"])
    assert (first.width, second.depth) == (2, 4)


@pytest.mark.parametrize(
    "data, word",
    [
        ({}, "'width' is missing"),
        ({"width": 1, "colour": 2}, "unknown setting 'colour'"),
        ({"width": "3"}, "must be int"),
        ({"width": True}, "must be int"),
        ({"width": 1, "sizes": 3}, "must be a list"),
        ([1], "expected an object"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_with_the_file_and_the_field(data, word):
    with pytest.raises(UserError, match="conf.json") as caught:
        config_from_json(Example, data, "conf.json")
    assert word in str(caught.value)


@pytest.mark.parametrize("pair", ["depth=3", "width", "width=wide"])
def test_set_refuses_unknown_keys_and_wrong_types(pair):
    with pytest.raises(UserError, match="--set"):
        override([Example(width=1)], [pair])
