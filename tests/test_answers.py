import csv
import io
import json

import pytest
from click.testing import CliRunner

import cli
from clip_train.settings import UserError
from retrieval import answers
from retrieval.query import questions
from retrieval.search import Hit

META = {"tags": ["a", "é"], "note": "one, two"}
HITS = [[Hit(1, 0.5, 3, "k3", "a fox", META, 0.25), Hit(2, 0.25, 1, "k1", "", {"width": 7}, 0.125)], []]
ASKED = questions(["fox", "king - man"])


def test_json_holds_what_was_asked_and_found():
    found = json.loads(answers.to_json(ASKED, HITS))
    assert [one["query"] for one in found] == ["fox", '"king" - "man"'] and "terms" not in found[0]
    assert found[1]["terms"][1] == {"kind": "text", "value": "man", "weight": -1.0} and found[1]["hits"] == []
    first = {"rank": 1, "score": 0.5, "row": 3, "key": "k3", "caption": "a fox", "meta": META, "probability": 0.25}
    assert found[0]["hits"][0] == first


def test_csv_has_a_line_a_hit_and_a_column_for_everything_known():
    lines = list(csv.DictReader(io.StringIO(answers.to_csv(ASKED, HITS))))
    assert len(lines) == 2 and lines[0]["note"] == "one, two" and json.loads(lines[0]["tags"]) == ["a", "é"]
    assert lines[1] == {
        **{"query": "fox", "rank": "2", "score": "0.25", "probability": "0.125", "row": "1", "key": "k1"},
        **{"caption": "", "tags": "", "note": "", "width": "7"},
    }


def test_json_has_null_where_there_is_no_number():
    hits = [[Hit(1, 0.5, 3, "k3", "", {"area": float("nan"), "deep": {"sizes": [1.5, float("inf")]}})]]
    refuse = {"parse_constant": lambda name: pytest.fail(f"{name} is no json")}
    (one,) = json.loads(answers.to_json(ASKED[:1], hits), **refuse)
    assert one["hits"][0]["meta"] == {"area": None, "deep": {"sizes": [1.5, None]}}
    (line,) = csv.DictReader(io.StringIO(answers.to_csv(ASKED[:1], hits)))
    assert json.loads(line["deep"], **refuse) == {"sizes": [1.5, None]}


def test_csv_keeps_metadata_that_is_named_like_a_column_of_its_own():
    hits = [[Hit(1, 0.5, 3, "k3", "a fox", {"query": "found by", "rank": "mammal", "key": "K", "width": 7})]]
    (line,) = csv.DictReader(io.StringIO(answers.to_csv(ASKED[:1], hits)))
    assert (line["query"], line["rank"], line["key"], line["width"]) == ("fox", "1", "k3", "7")
    assert (line["meta.query"], line["meta.rank"], line["meta.key"]) == ("found by", "mammal", "K")


def test_a_table_has_a_column_of_probabilities_only_where_there_are_some():
    (head, rows), (other, none) = answers.tables(HITS)
    assert head == ("rank", "score", "match", "key", "caption") and rows[0] == (1, "0.500", "0.25", "k3", "a fox")
    assert other == ("rank", "score", "key", "caption") and none == []


def test_answers_are_kept_as_the_name_of_the_file_says(tmp_path):
    answers.write(tmp_path / "hits.JSON", ASKED, HITS)
    answers.write(tmp_path / "hits.csv", ASKED, HITS)
    assert json.loads((tmp_path / "hits.JSON").read_text())[0]["query"] == "fox"
    assert (tmp_path / "hits.csv").read_text().startswith("query,rank,score")
    with pytest.raises(UserError, match="the name must end in .json or .csv"):
        answers.write(tmp_path / "hits.txt", ASKED, HITS)


def test_a_name_that_no_answer_can_be_written_to_is_refused_before_the_search():
    with pytest.raises(UserError, match=r"--out hits.xlsx: the name must end in .json or .csv"):
        CliRunner().invoke(cli.cli, ["search", "x", "--out", "hits.xlsx", "--index", "no"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("2*4 board", "'2*4 board' is read as 2*\"4 board\"; --literal takes it as it stands"),
        ('"2*4 board"', 'is read as "2*4 board";'),
        ("key:s001", "'key:s001' is read as key:s001;"),
        ("a - b", '\'a - b\' is read as "a" - "b";'),
        ("a red fox", ""),
    ],
)
def test_a_query_that_is_not_taken_as_it_stands_is_said(typed, said):
    result = CliRunner().invoke(cli.cli, ["search", typed, "--index", "no"])
    assert isinstance(result.exception, UserError)  # there is no such index
    assert said in result.stderr and ("read as" in result.stderr) == bool(said)
