import math
import operator
import random
import string
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_train.store import MetadataTable
from retrieval.query import QueryError
from retrieval.where import columns_of, parse

WIDTHS = [64, 512, None, 100, 2**53 + 1, 7]
FIRST = {
    "license": ["MIT", "CC0", None, "MIT"],
    "width": WIDTHS[:4],
    "score": [0.5, float("nan"), None, -1.0],
    "animated": [True, False, None, True],
    "tags": [["flag", "EH"], [], None, ["fox", "red"]],
    "sizes": [[1, 2], [3], None, []],
    "source.page": [1, 2, 3, 4],
    "a column": ["x", "y", "z", "it's"],
    "taken": [datetime(2026, 1, 31, 12), datetime(2025, 6, 1), None, datetime(2024, 1, 1)],
    "empty": [None] * 4,
    "in": [1, 2, 3, 4],
}
SECOND = {
    "license": ["CC-BY", "mit"],
    "width": WIDTHS[4:],
    "animated": [False, False],
    "tags": [["é"], ["fox"]],
    "a column": ["Fox", "a fox here"],
    "odd": [1, 2],
}


def write(columns, path):
    """A part of the metadata; every part has keys."""
    table = pa.table(columns)
    pq.write_table(table.append_column("image_path", pa.array([str(n) for n in range(len(table))])), path)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Six rows in two parts; the second lacks some columns, and has one of its own."""
    folder = tmp_path_factory.mktemp("metadata")
    write(FIRST, folder / "metadata_0.parquet")
    write(SECOND, folder / "metadata_1.parquet")
    return MetadataTable(folder)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("license == 'MIT'", [0, 3]),
        ('license == "MIT" and width >= 100', [3]),
        ("license != 'MIT'", [1, 4, 5]),
        ("not (license == 'MIT')", [1, 4, 5]),  # an empty value is neither
        ("not license == 'MIT' or license is null", [1, 2, 4, 5]),
        ("license == 'MIT' | license == 'CC0' & width > 1000", [0, 3]),
        ("~(license == 'MIT')", [1, 4, 5]),
        ("license in ['MIT', 'CC0']", [0, 1, 3]),
        ("license not in ('MIT', 'CC0',)", [4, 5]),
        ("license.isin(['mit'])", [5]),
        ("license in []", []),
        ("64 <= width < 512", [0, 3]),
        ("width == 9007199254740993", [4]),  # 2**53 + 1: no float holds it
        ("width > 1e3", [4]),
        ("width in [64, 100.0]", [0, 3]),
        ("width / 2 == 50", [3]),
        ("width * 2 - 28 > 100 and width < 1000", [1, 3]),
        ("width / 0 > 1 and width + -width == 0", [0, 1, 3, 4, 5]),
        ("score < -0.5", [3]),
        ("score is null", [1, 2, 4, 5]),  # not a number counts as empty; the second part has no such column
        ("score is not null and width is not null", [0, 3]),
        ("animated", [0, 3]),
        ("not animated", [1, 4, 5]),
        ("animated == false or width == 64", [0, 1, 4, 5]),
        ("'flag' in tags", [0]),
        ("tags.contains('fox')", [3, 5]),
        ("'fox' not in tags", [0, 1, 4]),
        ("tags is null", [2]),
        ("2 in sizes", [0]),
        ("source.page > 2", [2, 3]),
        ("`source.page` > 2", [2, 3]),
        ("`a column` == 'it\\'s'", [3]),
        ('`a column` == "it\'s"', [3]),
        ("'fox' in `a column`", [5]),
        ("`a column`.str.lower().str.contains('fox')", [4, 5]),
        ("`a column`.startswith('F') or `a column`.endswith('re')", [4, 5]),
        ("`a column`.matches('^[xy]$')", [0, 1]),
        ("'é' in tags", [4]),
        ("`in` == 2", [1]),
        ("taken >= '2025-06-01'", [0, 1]),
        ("taken < '2026-01-31T13:30:00+02:00'", [1, 3]),
        ("empty == 'x' or empty > 3", []),
        ("empty is null", [0, 1, 2, 3, 4, 5]),
        ("odd == 2", [5]),
        ("1 == 1", [0, 1, 2, 3, 4, 5]),
        ("true and 1 > 2", []),
        ("width == 99999999999999999999999", []),
        ("'MIT' == license in ['MIT', 'CC0']", [0, 3]),  # a chain, and a list at its end
        ("18446744073709551615 == 18446744073709551614", []),
    ],
)
def test_a_filter_chooses_the_rows_that_it_says(table, text, rows):
    assert np.flatnonzero(parse(text).mask(table)).tolist() == rows


def test_a_filter_chooses_what_pandas_query_chooses(tmp_path):
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "width": rng.integers(0, 100, 500),
            "height": rng.integers(0, 100, 500),
            "license": rng.choice(["MIT", "CC0", "other"], 500),
            "name": rng.choice(["a fox", "a red fox", "dog"], 500),
        }
    )
    write({name: table.column(name) for name in table.column_names}, tmp_path / "a.parquet")
    for text in (
        "license == 'MIT' and width >= 64",
        "license in ['MIT', 'CC0'] and not (width < 50 or height < 50)",
        "20 < width <= 60 and width > height",
        "width * height > 2500 or width / 2 > height + 10",
        "name.str.contains('fox') and name.str.startswith('a r')",
        "license.isin(['MIT']) | (license == 'CC0') & (width > 10)",
    ):
        expected = table.to_pandas().query(text, engine="python").index.tolist()
        assert 0 < len(expected) < 500
        assert np.flatnonzero(parse(text).mask(MetadataTable(tmp_path))).tolist() == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the filter is empty"),
        (
            "licence == 'MIT'",
            r"character 1: there is no column 'licence' \(license\?\); the columns are: license \(text\)",
        ),
        ("license == MIT", r"character 12: there is no column 'MIT' \(a text stands in quotes\)"),
        ("license = 'MIT'", "character 9: write == to compare, found '='"),
        ("license == 'MIT", "character 12: the ' has no partner"),
        ("license == 3", "a text cannot be compared with a number; a text stands in quotes"),
        ("width == '3'", "a number cannot be compared with a text"),
        ("tags == 'x'", "a list cannot be compared with a text; look into it: 'x' in column"),
        ("3 in tags", "a number cannot be looked for in a list whose items are each a text"),
        ("license in 'MIT'", "'in' wants a list"),
        ("license in [width]", "a list holds texts, numbers, true or false"),
        (
            "license in ['MIT'] is null",
            "character 20: a list ends a comparison: expected 'and', 'or' or the end, found",
        ),
        ("license in [] == 'x'", "character 15: a list ends a comparison"),
        ("'a' == license in ['MIT'] not in ['x']", "character 27: a list ends a comparison"),
        ("license", "this is a text, not a condition"),
        ("width and license == 'MIT'", "character 1: this is a number, not a condition"),
        ("license + 1 > 2", "this is a text; only numbers can be added"),
        ("license == null", "write 'is null' or 'is not null'"),
        ("license is 3", "after 'is' comes null or not null"),
        ("width.contains('3')", r"contains\(\) is for texts, and this is a number"),
        ("license.size() > 3", r"there is no size\(\); there are: contains"),
        ("license.matches('(')", "this is no regular expression: missing \\)"),
        ("__import__('os').system('true')", "expected 'and', 'or' or the end, found '\\('"),
        ("license == 'a' and", "expected a column, a text or a number, the filter ends"),
        ("taken > 'yesterday'", "'yesterday' is no date; write it like '2026-01-31'"),
        ("taken in [3]", "a date cannot be compared with a number"),
        ("1x == 2", "a space or a sign is missing before 'x'"),
        ("(" * 40, "more than 32 levels are too deep"),
        ("not " * 400 + "animated", "more than 32 levels are too deep"),
        ("-" * 1000 + "1 == 1", "more than 32 levels are too deep"),
        ("1" + "+1" * 500 + " == 1", "more than 32 levels are too deep"),
        ("license" + ".lower()" * 100 + " == ''", "more than 32 levels are too deep"),
        ("a" * 5000, "the filter has 5000 characters; at most 2000 are read"),
        ("1" * 500 + " == 1", "more than 40 characters"),
        ("license == '\ud800'", "character 13: this is not UTF-8 text"),
    ],
)
def test_a_filter_that_means_nothing_is_one_line_with_the_place(table, text, said):
    with pytest.raises(QueryError, match=said):
        parse(text).mask(table)


def test_a_long_chain_of_conditions_is_no_depth(table):
    text = " or ".join(["width == 64"] * 120)
    assert np.flatnonzero(parse(text).mask(table)).tolist() == [0]


def test_whatever_the_text_a_filter_is_an_answer_or_a_query_error(table):
    rng = random.Random(0)
    columns = ["license", "width", "tags", "taken", "`a column`", "source.page", "score", "animated", "empty", "x"]
    values = ["'MIT'", '"fox"', "3", "-0.5", "1e400", "9" * 30, "true", "'2026-01-01'", "'\\''", "['a', 1]", "(1, 2)"]
    signs = ["==", "!=", "<", ">=", "in", "not in", "is", "is not", "+", "-", "*", "/", "and", "or", "&", "|", ","]
    signs += ["in ['MIT']", "not in []", "in [1, 2.5]", "is null"]
    others = ["not ", "~", "(", ")", "[", "]", ".", ".contains('x')", ".lower()", ".isin(['a'])", ".matches('[')"]
    others += [".str", "null", "'", "`", "\\", "\0", "é", "\ud800", "lambda", "#", "=", " ", "\n"]
    whole = ["license == 'MIT'", "64 <= width < 100", "'fox' in tags", "animated", "score is null", "width / 2 > score"]
    whole += ["taken < '2026-01-01'", "license not in ['MIT']", "`a column`.str.lower().contains('x')", "empty > 3"]
    letters = string.printable + "é漢\ud800\u2028"

    def some() -> str:
        kind = rng.random()
        if kind < 0.3:  # what a person writes, half of it with a slip of the finger
            one = f" {rng.choice(['and', 'or', '|', 'and not'])} ".join(rng.choices(whole, k=rng.randint(1, 4)))
            at = rng.randint(0, len(one))
            return rng.choice([one, f"({one})", one[:at] + one[at + 1 :], one[:at] + rng.choice(letters) + one[at:]])
        if kind < 0.4:
            return f"{rng.choice(columns)} {rng.choice(signs)} {rng.choice([*values, *columns])}"
        if kind < 0.5:  # a chain of comparisons
            parts = [rng.choice([*columns, *values]) + f" {rng.choice(signs)} " for _ in range(rng.randint(2, 4))]
            return "".join(parts) + rng.choice(["", *columns, *values])
        if kind < 0.75:
            words = rng.choices([*columns, *values, *signs, *others], k=rng.randint(1, 12))
            return rng.choice([" ", ""]).join(words)
        return "".join(rng.choices(letters, k=rng.randint(0, 60)))

    done = 0
    for _ in range(8000):
        try:
            mask = parse(some()).mask(table)
        except QueryError as error:
            assert str(error)
            continue
        assert mask.dtype == bool and mask.shape == (6,)
        done += 1
    assert done > 400


def test_the_columns_have_the_kinds_that_a_filter_knows(table):
    kinds = columns_of(table)
    assert kinds["width"] == kinds["score"] == "number" and kinds["license"] == "text" and kinds["tags"] == "list"
    assert kinds["animated"] == "boolean" and kinds["taken"] == "date" and kinds["empty"] == "empty"
    assert kinds["odd"] == "number"


def test_a_column_of_two_kinds_is_told_of(tmp_path):
    write({"width": [64]}, tmp_path / "0.parquet")
    write({"width": ["64px"]}, tmp_path / "1.parquet")
    table = MetadataTable(tmp_path)
    assert columns_of(table)["width"] == "number/text"
    with pytest.raises(QueryError, match="a text cannot be compared with a number"):
        parse("width > 3").mask(table)


def test_other_types_of_columns_are_read_as_their_kind(tmp_path):
    columns = {
        "small": pa.array([1, 200], pa.uint8()),
        "huge": pa.array([1, 2**63 + 5], pa.uint64()),
        "half": pa.array(np.array([0.5, 2], dtype=np.float16)),
        "name": pa.array(["a", "b"]).dictionary_encode(),
        "long": pa.array(["a", "b"], pa.large_string()),
        "day": pa.array([datetime(2026, 1, 1).date(), datetime(2026, 1, 2).date()]),
        "zoned": pa.array([datetime(2026, 1, 1, 23, tzinfo=UTC)] * 2, pa.timestamp("ns", "Asia/Tokyo")),
        "raw": pa.array([b"x", None]),
        "many": pa.array([["a"], None], pa.large_list(pa.large_string())),
    }
    write(columns, tmp_path / "0.parquet")
    table = MetadataTable(tmp_path)
    for text, rows in {
        "small > 100": [1],
        "huge > 9e18": [1],
        "half < 1": [0],
        "name == 'b'": [1],
        "long in ['b']": [1],
        "'a' in long": [0],
        "day > '2026-01-01'": [1],
        "zoned < '2026-01-02'": [0, 1],
        "raw is null": [1],
        "'a' in many": [0],
    }.items():
        assert np.flatnonzero(parse(text).mask(table)).tolist() == rows, text
    with pytest.raises(QueryError, match="a value of some other type cannot be compared with a text"):
        parse("raw == 'x'").mask(table)


def test_large_numbers_are_compared_as_they_are_and_not_as_their_nearest_float(tmp_path):
    columns = {
        "i": ([-(2**63), -1, 0, 2**53, 2**53 + 1, 2**63 - 1, None], pa.int64()),
        "u": ([0, 2**53 + 1, 2**63 + 5, 2**64 - 2, 2**64 - 1, 1, None], pa.uint64()),
        "f": ([0.5, -1.0, 2.0**53, 2.0**63, 2.0**64, -math.inf, None], pa.float64()),
    }
    write({name: pa.array(*one) for name, one in columns.items()}, tmp_path / "0.parquet")
    table = MetadataTable(tmp_path)
    signs = {"==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le}
    signs |= {">": operator.gt, ">=": operator.ge}
    numbers = [2**53 + 1, -(2**53) - 1, 2**63, 2**64 - 1, 2**64, 10**25, -(2**63) - 5, -(2**63), 0.5, -0.5, 9.5e18]
    for sign, compare in signs.items():
        for name, (values, _) in columns.items():
            for number in numbers:
                expected = [value is not None and compare(value, number) for value in values]  # Python's is exact
                assert parse(f"{name} {sign} {number!r}").mask(table).tolist() == expected, (name, sign, number)
                mirrored = [value is not None and compare(number, value) for value in values]
                assert parse(f"{number!r} {sign} {name}").mask(table).tolist() == mirrored, (name, sign, number)
        pairs = zip(columns["i"][0], columns["u"][0], strict=True)
        both = [one is not None and compare(one, two) for one, two in pairs]
        assert parse(f"i {sign} u").mask(table).tolist() == both
    for name, (values, _) in columns.items():
        for number in numbers:
            expected = [value is not None and value in (number, 1.5, -1) for value in values]
            assert parse(f"{name} in [{number!r}, 1.5, -1]").mask(table).tolist() == expected, (name, number)


def test_a_comparison_of_columns_that_cannot_be_exact_is_refused(tmp_path):
    write({"id": [2**53 + 1], "share": [0.5], "width": [7]}, tmp_path / "0.parquet")
    table = MetadataTable(tmp_path)
    assert parse("share < width / 2 and width > share").mask(table).tolist() == [True]
    for text in ("id > share", "share != id", "width / 2 < id"):
        with pytest.raises(QueryError, match=r"whole numbers above 2\*\*53 cannot be compared exactly with fractions"):
            parse(text).mask(table)


def test_filters_of_one_text_are_one():
    assert parse("a == 1") == parse("a == 1") and len({parse("a == 1"), parse("a == 1"), parse("a == 2")}) == 2
    assert parse("a == 1 and b.c > a").columns == ("a", "b.c")
