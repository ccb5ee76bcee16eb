"""Where: "license == 'MIT' and width >= 64" -> which rows of the metadata are meant. Computed by pyarrow, never eval.

What may be written is in grammar.py. An empty value is unknown, as in SQL: comparing it gives neither true nor false,
and the row is not chosen.
"""

import difflib
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval import grammar
from retrieval.grammar import Node, nodes, place
from retrieval.query import QueryError

if TYPE_CHECKING:
    from clip_train.store import MetadataTable

LISTED = 40  # columns named in an error
# the functions of pyarrow.compute
COMPARISONS = {"==": "equal", "!=": "not_equal", "<": "less", "<=": "less_equal"}
COMPARISONS |= {">": "greater", ">=": "greater_equal"}
MIRRORED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
OPERATORS = {"==": operator.eq, "!=": operator.ne, "<": operator.lt}
OPERATORS |= {"<=": operator.le, ">": operator.gt, ">=": operator.ge}
ARITHMETIC = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}


@dataclass(frozen=True)
class Where:
    """A parsed filter. Two of the same text are equal."""

    text: str
    columns: tuple[str, ...] = field(compare=False)  # that it reads
    tree: Node = field(compare=False, repr=False)

    def mask(self, table: "MetadataTable") -> np.ndarray:
        """(rows,) bool: the rows for which it is true. Reads its own columns alone, part after part.

        QueryError: a column that is not there (the message lists those that are), or values of a kind that do not go
        together, such as a text and a number.
        """
        chosen, there = [], set()
        for part, rows in _parts(table, self.columns):
            chosen.append(self._of_part(part, rows))
            there |= set(part.column_names)
        for node in nodes(self.tree):
            if node.kind == "column" and node.value not in there:
                raise QueryError(
                    f"{self._at(node)} there is no column {node.value!r}{_like(node.value, columns_of(table))}"
                )
        return np.concatenate(chosen) if chosen else np.zeros(0, dtype=bool)

    def _of_part(self, part: Any, rows: int) -> np.ndarray:
        import pyarrow as pa
        import pyarrow.compute as pc

        try:
            kind, chosen = self._value(self.tree, part, rows)
            if kind not in ("boolean", "empty"):
                raise QueryError(
                    f"{self._at(self.tree)} this is {_a(kind)}, not a condition: compare it with something"
                )
            if kind == "empty":
                return np.zeros(rows, dtype=bool)
            if isinstance(chosen, pa.Scalar):
                return np.full(rows, bool(chosen.as_py()))
            return np.asarray(pc.fill_null(chosen, False).to_numpy(zero_copy_only=False), dtype=bool)
        except (pa.ArrowException, OverflowError) as error:  # what the checks below did not foresee
            said = " ".join(str(error).split())[:200]
            raise QueryError(f"the filter {self.text[:200]!r} cannot be applied: {said}") from error

    def _at(self, node: Node) -> str:
        return place(self.text, node.at)

    def _value(self, node: Node, part: Any, rows: int) -> tuple[str, Any]:
        """A node's kind, and its values: an arrow array of a row each, or a scalar."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if node.kind == "column":
            if node.value not in part.column_names:
                return "empty", pa.nulls(rows)
            return _plain(part.column(node.value))
        if node.kind == "literal":
            return _literal(node.value)
        if node.kind in ("and", "or"):
            join = pc.and_kleene if node.kind == "and" else pc.or_kleene
            made = self._condition(node.parts[0], part, rows)
            for one in node.parts[1:]:
                made = join(made, self._condition(one, part, rows))
            return "boolean", made
        if node.kind == "not":
            return "boolean", pc.invert(self._condition(node.parts[0], part, rows))
        if node.kind in COMPARISONS:
            return "boolean", self._compared(node, part, rows)
        if node.kind in ARITHMETIC:
            left, right = (self._number(one, part, rows) for one in node.parts)
            return "number", getattr(pc, ARITHMETIC[node.kind])(left, right)
        if node.kind == "negative":
            return "number", pc.negate(self._number(node.parts[0], part, rows))
        if node.kind == "null":
            kind, values = self._value(node.parts[0], part, rows)
            return "boolean", pc.is_null(values, nan_is_null=kind == "number")
        if node.kind == "isin":
            return "boolean", self._one_of(node, part, rows)
        if node.kind == "within":
            return "boolean", self._within(*node.parts, part, rows)
        return self._method(node, part, rows)

    def _condition(self, node: Node, part: Any, rows: int) -> Any:
        import pyarrow as pa

        kind, values = self._value(node, part, rows)
        if kind == "empty":
            return pa.scalar(None, pa.bool_()) if isinstance(values, pa.Scalar) else pa.nulls(rows, pa.bool_())
        if kind != "boolean":
            raise QueryError(f"{self._at(node)} this is {_a(kind)}, not a condition: compare it with something")
        return values

    def _number(self, node: Node, part: Any, rows: int) -> Any:
        """Its values as float64: no overflow, and a division by zero is infinite."""
        import pyarrow as pa
        import pyarrow.compute as pc

        kind, values = self._value(node, part, rows)
        if kind not in ("number", "empty"):
            raise QueryError(f"{self._at(node)} this is {_a(kind)}; only numbers can be added or multiplied")
        return pc.cast(values, pa.float64(), safe=False)

    def _compared(self, node: Node, part: Any, rows: int) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc

        left, right = node.parts
        (a, one), (b, two) = self._value(left, part, rows), self._value(right, part, rows)
        if "empty" in (a, b):
            return pa.nulls(rows, pa.bool_())
        if a == "date" and b == "text":
            b, two = "date", self._date(right)
        elif a == "text" and b == "date":
            a, one = "date", self._date(left)
        if a != b or a not in ("number", "text", "boolean", "date"):
            raise QueryError(f"{self._at(left)} {_a(a)} cannot be compared with {_a(b)}{_how(a, b)}")
        if a == "number":
            if left.kind == right.kind == "literal":
                return pa.scalar(OPERATORS[node.kind](left.value, right.value))
            if right.kind == "literal":
                return _against(node.kind, one, right.value)
            if left.kind == "literal":
                return _against(MIRRORED[node.kind], two, left.value)
            one, two = self._alike(node, one, two)
        return getattr(pc, COMPARISONS[node.kind])(one, two)

    def _alike(self, node: Node, one: Any, two: Any) -> tuple[Any, Any]:
        """Two columns of numbers as one type that holds both exactly."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.types as t

        if one.type == two.type:
            return one, two
        common = pa.decimal128(20, 0) if t.is_integer(one.type) and t.is_integer(two.type) else pa.float64()
        try:
            return pc.cast(one, common), pc.cast(two, common)
        except pa.ArrowInvalid as error:
            raise QueryError(
                f"{self._at(node)} whole numbers above 2**53 cannot be compared exactly with fractions"
            ) from error

    def _date(self, node: Node) -> Any:
        import pyarrow as pa

        if node.kind != "literal":
            raise QueryError(f"{self._at(node)} a column of text cannot be compared with one of dates")
        try:
            when = datetime.fromisoformat(node.value)
            when = when.astimezone(UTC).replace(tzinfo=None) if when.tzinfo else when
        except (ValueError, OverflowError) as error:
            raise QueryError(f"{self._at(node)} {node.value!r} is no date; write it like '2026-01-31'") from error
        return pa.scalar(when, pa.timestamp("us"))

    def _one_of(self, node: Node, part: Any, rows: int) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc

        kind, values = self._value(node.parts[0], part, rows)
        if kind == "empty":
            return pa.nulls(rows, pa.bool_())
        for item in node.parts[1:]:
            of = "date" if kind == "date" and isinstance(item.value, str) else _literal(item.value)[0]
            if of != kind:
                raise QueryError(f"{self._at(item)} {_a(kind)} cannot be compared with {_a(of)}{_how(kind, of)}")
        if kind == "date":
            choices = [self._date(item).as_py() for item in node.parts[1:]]
        elif kind == "number":  # a number that the column's type cannot hold is in no row
            between = (_between(item.value, values.type) for item in node.parts[1:])
            choices = [low for low, high in between if low == high]
        else:
            choices = [item.value for item in node.parts[1:]]
        choices = pa.array(choices, values.type)
        return pc.if_else(pc.is_valid(values), pc.is_in(values, choices), pa.scalar(None, pa.bool_()))

    def _within(self, item: Node, whole: Node, part: Any, rows: int) -> Any:
        """'fox' in caption, 'flag' in tags: a part of a text, one of a list."""
        import pyarrow as pa
        import pyarrow.compute as pc

        kind, values = self._value(whole, part, rows)
        of, scalar = _literal(item.value)
        if kind == "empty":
            return pa.nulls(rows, pa.bool_())
        if kind == "text" and of == "text":
            return pc.match_substring(values, item.value)
        if kind != "list":
            raise QueryError(f"{self._at(whole)} a {of} cannot be looked for in {_a(kind)}")
        values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        inner, items = _plain(pc.list_flatten(values))
        chosen = np.zeros(rows, dtype=bool)
        if inner != "empty":
            if inner != of:
                raise QueryError(
                    f"{self._at(item)} a {of} cannot be looked for in a list whose items are each {_a(inner)}"
                )
            equal = _against("==", items, item.value) if of == "number" else pc.equal(items, scalar)
            hits = np.asarray(pc.fill_null(equal, False))
            chosen[np.asarray(pc.list_parent_indices(values))[hits]] = True
        return pc.if_else(pc.is_valid(values), pa.array(chosen), pa.scalar(None, pa.bool_()))

    def _method(self, node: Node, part: Any, rows: int) -> tuple[str, Any]:
        import pyarrow as pa
        import pyarrow.compute as pc

        kind, values = self._value(node.parts[0], part, rows)
        result = "text" if node.kind == "lower" else "boolean"
        if kind == "empty":
            return result, pa.nulls(rows, pa.string() if result == "text" else pa.bool_())
        if kind == "list" and node.kind == "contains":
            return "boolean", self._within(node.parts[1], node.parts[0], part, rows)
        if kind != "text":
            raise QueryError(f"{self._at(node.parts[0])} {node.kind}() is for texts, and this is {_a(kind)}")
        if node.kind == "lower":
            return "text", pc.utf8_lower(values)
        pattern = node.parts[1].value
        if node.kind == "matches":
            try:
                return "boolean", pc.match_substring_regex(values, pattern)
            except pa.ArrowInvalid as error:
                said = str(error).removeprefix("Invalid regular expression: ")[:200]
                raise QueryError(f"{self._at(node.parts[1])} this is no regular expression: {said}") from error
        match = {"contains": pc.match_substring, "startswith": pc.starts_with, "endswith": pc.ends_with}
        return "boolean", match[node.kind](values, pattern)


def parse(text: str) -> Where:
    """The filter that a text says. QueryError, with the place, if it is none; nothing else, whatever the text."""
    tree = grammar.parse(text)
    names = dict.fromkeys(node.value for node in nodes(tree) if node.kind == "column")
    return Where(text, tuple(names), tree)


def columns_of(table: "MetadataTable") -> dict[str, str]:
    """{column: kind} of all parts together: text, number, boolean, date, list, empty, or other (null or not, no more).

    "number/text" where parts disagree, as they do when one sample's json holds something else than the others'.
    """
    import pyarrow.parquet as pq

    found: dict[str, set[str]] = {}
    for path in table.paths:
        for column in pq.read_schema(path):
            found.setdefault(column.name, set()).add(kind_of(column.type))
    return {name: "/".join(sorted(kinds - {"empty"})) or "empty" for name, kinds in found.items()}


def kind_of(type_: Any) -> str:
    """An arrow type's kind."""
    import pyarrow.types as t

    if t.is_dictionary(type_):
        return kind_of(type_.value_type)
    kinds: dict[str, tuple[Callable[[Any], bool], ...]] = {
        "boolean": (t.is_boolean,),
        "number": (t.is_integer, t.is_floating, t.is_decimal),
        "text": (t.is_string, t.is_large_string),
        "date": (t.is_timestamp, t.is_date),
        "list": (t.is_list, t.is_large_list, t.is_fixed_size_list),
        "empty": (t.is_null,),
    }
    return next((kind for kind, tests in kinds.items() if any(test(type_) for test in tests)), "other")


def _plain(values: Any) -> tuple[str, Any]:
    """An arrow column's kind, and its values in one type for each kind: int64, uint64 or float64, us timestamps in UTC.

    Decimals are float64, too.
    """
    import pyarrow as pa
    import pyarrow.types as t

    if t.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    kind = kind_of(values.type)
    if kind == "number":
        whole = t.is_integer(values.type) and values.type != pa.uint64()
        if values.type != pa.uint64():
            values = values.cast(pa.int64()) if whole else values.cast(pa.float64(), safe=False)
    elif kind == "date":
        if t.is_timestamp(values.type) and values.type.tz:
            values = values.cast(pa.timestamp("us", "UTC"), safe=False)
        values = values.cast(pa.timestamp("us"), safe=False)
    return kind, values


def _literal(value: Any) -> tuple[str, Any]:
    import pyarrow as pa

    kind = "boolean" if isinstance(value, bool) else "text" if isinstance(value, str) else "number"
    return kind, pa.scalar(float(value) if kind == "number" else value)  # numbers are compared by _against()


def _against(sign: str, values: Any, number: int | float) -> Any:
    """values < number and so on, exactly, whatever the number: the values are not rounded, and neither is it.

    values: int64, uint64 or float64. x < number is x < high, and x > number is x > low, with the values low and high
    of the type that lie next to it; both are the number itself if the type holds it.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    low, high = _between(number, values.type)
    if sign in ("==", "!=") and low != high or None in (low, high):
        always = OPERATORS[sign](0, number)
        return pc.if_else(pc.is_valid(values), pa.scalar(always), pa.scalar(None, pa.bool_()))
    chosen = pa.scalar(high if sign in ("<", ">=") else low, values.type)
    return getattr(pc, COMPARISONS[sign])(values, chosen)


def _between(number: int | float, type_: Any) -> tuple[Any, Any]:
    """The largest value of the type that is no more than a number, and the smallest that is no less; or None."""
    import pyarrow.types as t

    if t.is_floating(type_):
        near = float(number)
        if near == number:
            return near, near
        return (near, math.nextafter(near, math.inf)) if near < number else (math.nextafter(near, -math.inf), near)
    least, most = (0, 2**64 - 1) if t.is_unsigned_integer(type_) else (-(2**63), 2**63 - 1)
    if not least <= number <= most:
        return (None, least) if number < least else (most, None)
    return math.floor(number), math.ceil(number)


def _parts(table: "MetadataTable", columns: tuple[str, ...]) -> Iterator[tuple[Any, int]]:
    """Each part's columns as a pyarrow Table (without those that it lacks), and its number of rows."""
    return ((table._read(part, columns), rows) for part, rows in enumerate(table.counts))


def _like(name: str, there: dict[str, str]) -> str:
    """What to write instead of a column that is not there."""
    close = difflib.get_close_matches(name, there, 1)
    more = f", and {len(there) - LISTED} more" if len(there) > LISTED else ""
    listed = ", ".join(f"{column} ({kind})" for column, kind in list(there.items())[:LISTED])
    meant = f" ({close[0]}?)" if close else " (a text stands in quotes)"
    return f"{meant}; the columns are: {listed}{more}"


def _a(kind: str) -> str:
    return "a value of some other type" if kind == "other" else f"a {kind}"


def _how(a: str, b: str) -> str:
    if {a, b} == {"text", "number"}:
        return "; a text stands in quotes, a number does not"
    return "; look into it: 'x' in column" if "list" in (a, b) else ""
