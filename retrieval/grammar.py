"""The language of filters: "license == 'MIT' and width >= 64" -> a tree of nodes. Nothing is computed here.

The grammar, loosest first; a filter may come from strangers (a server takes them), so its length and depth are bounded:

    a or b    a and b    not a              also | & ~, as pandas writes them, but binding as loosely as the words
    == != < <= > >=                         may be chained: 64 <= width < 512
    a in ['MIT', 'CC0']    a not in [...]   'fox' in caption (a part of it)    'flag' in tags (one of the list)
    a is null    a is not null
    + - * /                                 numbers, as floats
    a.contains('x') a.startswith('x') a.endswith('x') a.matches('regular expression') a.lower()
    a.isin([...]) a.isnull() a.notnull()    `.str.` may stand before them, as in pandas
    width   source.page   `a column`        columns; in backticks where a name is no plain word
    'text' "text" 12 -0.5 1e6 true false
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from retrieval.query import QueryError

MOST_CHARACTERS = 2000
DEEPEST = 32  # brackets, nots and minuses within each other
MOST_DIGITS = 40

TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
    |(?P<quoted>`[^`]+`)
    |(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
    |(?P<name>[^\W\d]\w*)
    |(?P<sign>==|!=|<>|<=|>=|&&|\|\||.)""",
    re.VERBOSE | re.DOTALL,
)
ESCAPES = {"n": "\n", "t": "\t", "\\": "\\", "'": "'", '"': '"'}
SAME_WORD = {"&": "and", "&&": "and", "|": "or", "||": "or", "~": "not", "!": "not", "<>": "!="}
WORDS = {"and", "or", "not", "in", "is", "null", "none", "true", "false"}
COMPARISONS = ("==", "!=", "<", "<=", ">", ">=")
# what a method takes: one text, a list, or nothing
METHODS = {"contains": "text", "startswith": "text", "endswith": "text", "matches": "text", "lower": ""}
METHODS |= {"isin": "list", "isnull": "", "isna": "", "notnull": "", "notna": ""}


@dataclass(frozen=True)
class Node:
    """One operation, column or literal of a filter, and the character at which it stands (from 0)."""

    kind: str
    at: int
    parts: "tuple[Node, ...]" = ()
    value: Any = None


def parse(text: str) -> Node:
    """The tree of a filter. QueryError, with the place, if the text is none; nothing else, whatever the text."""
    if not text.strip():
        raise QueryError("the filter is empty; write one like: license == 'MIT' and width >= 64")
    if len(text) > MOST_CHARACTERS:
        raise QueryError(f"the filter has {len(text)} characters; at most {MOST_CHARACTERS} are read")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise QueryError(f"{place(text, error.start)} this is not UTF-8 text") from error
    return _Parser(text).parse()


def nodes(node: Node) -> Iterator[Node]:
    """A node and all that are below it."""
    yield node
    for part in node.parts:
        yield from nodes(part)


def place(text: str, at: int) -> str:
    """Where in a filter something is wrong, as its error begins."""
    shown = text if len(text) <= 120 else f"...{text[max(0, at - 40) : at + 60]}..."
    return f"the filter {shown!r}, character {at + 1}:"


class _Parser:
    """Recursive descent over the tokens, one function for each line of the grammar."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(self._tokens())
        self.next = 0
        self.depth = 0

    def parse(self) -> Node:
        tree = self._either()
        if self._kind() != "end":
            raise self._wrong("expected 'and', 'or' or the end")
        return tree

    def _tokens(self) -> Iterator[tuple[str, str, int]]:
        """(kind, word, place): the words of the language and the signs are kinds of their own."""
        before = ""
        for match in TOKEN.finditer(self.text):
            kind, word, at = match.lastgroup or "", match[0], match.start()
            if kind in ("name", "number") and before == "number" or before == "name" and kind == "text":
                raise QueryError(f"{place(self.text, at)} a space or a sign is missing before {word[:40]!r}")
            before = kind
            if kind == "name" and word.lower() in WORDS:
                kind = word.lower()
            elif kind == "sign":
                kind = SAME_WORD.get(word, word)
            if kind != "space":
                yield kind, word, at
        yield "end", "", len(self.text)

    def _kind(self, ahead: int = 0) -> str:
        return self.tokens[min(self.next + ahead, len(self.tokens) - 1)][0]

    def _take(self, *kinds: str) -> tuple[str, str, int] | None:
        """The next token if it is of one of these kinds."""
        if self._kind() not in kinds:
            return None
        self.next += 1
        return self.tokens[self.next - 1]

    def _need(self, kind: str) -> tuple[str, str, int]:
        token = self._take(kind)
        if token is None:
            raise self._wrong(f"expected {kind!r}")
        return token

    def _wrong(self, what: str) -> QueryError:
        kind, word, at = self.tokens[self.next]
        if word == "=":
            what = "write == to compare"
        elif word in ("'", '"', "`"):
            what = f"the {word} has no partner"
        elif word in SAME_WORD:
            what += f" (write {SAME_WORD[word]!r})" * (word == "!")
        found = "the filter ends" if kind == "end" else f"found {word[:40]!r}"
        return QueryError(f"{place(self.text, at)} {what}, {found}")

    def _deeper(self, inner: Callable[[], Node]) -> Node:
        before = self._down()
        made = inner()
        self.depth = before
        return made

    def _down(self) -> int:
        """One level deeper; the level that it was before."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise QueryError(f"{place(self.text, self.tokens[self.next][2])} more than {DEEPEST} levels are too deep")
        return self.depth - 1

    def _either(self) -> Node:
        return self._joined("or", lambda: self._joined("and", self._not))

    def _joined(self, word: str, inner: Callable[[], Node]) -> Node:
        parts = [inner()]
        while self._take(word):
            parts.append(inner())
        return parts[0] if len(parts) == 1 else Node(word, parts[0].at, tuple(parts))

    def _not(self) -> Node:
        token = self._take("not")
        return Node("not", token[2], (self._deeper(self._not),)) if token else self._comparison()

    def _comparison(self) -> Node:
        left = self._sum()
        found: list[Node] = []
        while True:
            token = self._take(*COMPARISONS)
            negated = token is None and self._kind() == "not" and self._kind(1) == "in" and self._take("not")
            if token:
                right = self._sum()
                found.append(Node(token[0], left.at, (left, right)))
            elif self._take("in"):
                right = self._items() if self._kind() in ("(", "[") else self._sum()
                found.append(self._negated(bool(negated), self._in(left, right)))
                if right.kind == "list" and self._kind() in (*COMPARISONS, "in", "is", "not"):
                    raise self._wrong("a list ends a comparison: expected 'and', 'or' or the end")
            elif self._take("is"):
                negated = self._take("not")
                if not self._take("null", "none"):
                    raise self._wrong("after 'is' comes null or not null")
                found.append(self._negated(bool(negated), Node("null", left.at, (left,))))
                right = left
            else:
                break
            left = right
        if not found:
            return left
        return found[0] if len(found) == 1 else Node("and", found[0].at, tuple(found))

    def _negated(self, yes: bool, node: Node) -> Node:
        return Node("not", node.at, (node,)) if yes else node

    def _in(self, left: Node, right: Node) -> Node:
        if right.kind == "list":
            return Node("isin", left.at, (left, *right.parts))
        if left.kind != "literal":
            raise QueryError(f"{place(self.text, left.at)} 'in' wants a list, like in ['MIT', 'CC0'], or 'x' in column")
        if right.kind == "literal":
            raise QueryError(
                f"{place(self.text, right.at)} 'in' wants a column or a list like ['MIT', 'CC0'] behind it"
            )
        return Node("within", left.at, (left, right))

    def _items(self) -> Node:
        """[a, b] or (a, b): literals only."""
        opening = self._take("(", "[")
        closing = "]" if opening[0] == "[" else ")"
        items: list[Node] = []
        while not self._take(closing):
            if items:
                self._need(",")
                if self._take(closing):
                    break
            item = self._deeper(self._sign)
            if item.kind != "literal":
                raise QueryError(f"{place(self.text, item.at)} a list holds texts, numbers, true or false")
            items.append(item)
        return Node("list", opening[2], tuple(items))

    def _sum(self) -> Node:
        return self._folded("+-", lambda: self._folded("*/", self._sign))

    def _folded(self, signs: str, inner: Callable[[], Node]) -> Node:
        made = inner()
        before = self.depth
        while token := self._take(*signs):
            self._down()  # a - b - c leans to the left, so a long one is a deep one
            made = Node(token[0], made.at, (made, inner()))
        self.depth = before
        return made

    def _sign(self) -> Node:
        if token := self._take("-", "+"):
            inner = self._deeper(self._sign)
            if token[0] == "+":
                return inner
            if inner.kind == "literal" and not isinstance(inner.value, str | bool):
                return Node("literal", token[2], value=-inner.value)
            return Node("negative", token[2], (inner,))
        return self._with_methods()

    def _with_methods(self) -> Node:
        made, before = self._primary(), self.depth
        while self._take("."):
            name = self._need("name")
            if name[1] != "str" or self._kind() != ".":
                self._down()
                made = self._called(made, name)
        self.depth = before
        return made

    def _called(self, of: Node, name: tuple[str, str, int]) -> Node:
        method, at = name[1], name[2]
        takes = METHODS.get(method)
        if takes is None:
            raise QueryError(f"{place(self.text, at)} there is no {method[:40]}(); there are: {', '.join(METHODS)}")
        self._need("(")
        arguments: tuple[Node, ...] = ()
        if takes == "list":
            if self._kind() not in ("[", "("):
                raise self._wrong("expected a list like ['MIT', 'CC0']")
            arguments = self._items().parts
        elif takes == "text":
            token = self._need_text(method)
            arguments = (Node("literal", token[2], value=self._unquoted(token)),)
        self._need(")")
        if method in ("isnull", "isna", "notnull", "notna"):
            return self._negated(method.startswith("not"), Node("null", of.at, (of,)))
        return Node(method, of.at, (of, *arguments))

    def _need_text(self, method: str) -> tuple[str, str, int]:
        token = self._take("text")
        if token is None:
            raise self._wrong(f"{method}() wants a text in quotes")
        return token

    def _primary(self) -> Node:
        if token := self._take("text"):
            return Node("literal", token[2], value=self._unquoted(token))
        if token := self._take("number"):
            return Node("literal", token[2], value=self._number(token))
        if token := self._take("true", "false"):
            return Node("literal", token[2], value=token[0] == "true")
        if self._take("("):
            inner = self._deeper(self._either)
            self._need(")")
            return inner
        if token := self._take("quoted"):
            return Node("column", token[2], value=token[1][1:-1])
        if token := self._take("name"):
            return Node("column", token[2], value=self._dotted(token[1]))
        if self._kind() in ("null", "none"):
            raise self._wrong("nothing equals null: write 'is null' or 'is not null'")
        if self._kind() in WORDS:
            raise self._wrong("expected a column, a text or a number (a column of such a name stands in `backticks`)")
        raise self._wrong("expected a column, a text or a number")

    def _dotted(self, name: str) -> str:
        """The whole name of a nested column, up to a method and pandas' str before it."""
        while self._kind() == "." and self._kind(1) in {"name", *WORDS}:
            if self._kind(2) == "(":
                break
            word = self.tokens[self.next + 1][1]
            if word == "str" and self._kind(2) == "." and self._kind(4) == "(":
                break
            name += "." + word
            self.next += 2
        return name

    def _unquoted(self, token: tuple[str, str, int]) -> str:
        return re.sub(r"\\(.)", lambda m: ESCAPES.get(m[1], m[0]), token[1][1:-1], flags=re.DOTALL)

    def _number(self, token: tuple[str, str, int]) -> int | float:
        if len(token[1]) > MOST_DIGITS:
            raise QueryError(f"{place(self.text, token[2])} the number has more than {MOST_DIGITS} characters")
        whole = re.fullmatch("[0-9]+", token[1])
        number = int(token[1]) if whole else float(token[1])
        return number
