"""What a request asks for: its body, checked field by field. Refused is the answer to all that cannot be done.

Clients send JSON as text/plain or without any content type (clip-retrieval's do), so the body is read as it is.
"""

import base64
import binascii
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from starlette.requests import Request

LONG_BODY = 65_536  # bytes; a longer one is parsed in a thread
MOST_BYTES = 256_000  # of a body that holds no picture
# json.loads lets no other thread run, so what it may take is bounded: 15 MB of one text take 0.03 s, 200,000 lists or
# numbers 0.05 s (15 MB of empty lists would take 5 s)
MOST_VALUES = 200_000
MOST_DIGITS = 100  # of a whole number
TYPES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


class Refused(Exception):
    """A request that is not answered; becomes {"error": {"message": ...}} with this status."""

    def __init__(self, status: int, message: str, *, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's API and our page have it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "requests" if self.status == 429 else kind  # OpenAI's word for too many
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


class Asked:
    """The fields of a JSON object (or a form). Each is asked for by name; a wrong one is Refused with its name."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields

    @classmethod
    async def read(cls, request: "Request", in_thread: Callable, *, pictures: bool = False) -> "Asked":
        """The request's JSON object. in_thread(function): awaits it in a worker thread.

        pictures: whether there may be some in it; a body without them is refused (413) above MOST_BYTES.
        """
        data = await request.body()
        if len(data) > MOST_BYTES and not pictures:
            raise Refused(413, f"the body has {len(data)} bytes; {MOST_BYTES} are the most here")
        value = await in_thread(partial(_json, data)) if len(data) > LONG_BODY else _json(data)
        if not isinstance(value, dict):
            raise Refused(400, f"the body must be a JSON object, not {_called(value)}")
        return cls(value)

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """The field's value as `kind`; the default where it is missing or null."""
        value = self.fields.get(name)
        if value is None:
            return default
        if kind is float and type(value) is int:
            try:
                value = float(value)
            except OverflowError as error:
                raise Refused(400, f"{name} is too large") from error
        if type(value) is not kind:
            raise Refused(400, f"{name} must be {TYPES[kind]}, not {_called(value)}")
        return value

    def text(self, name: str, longest: int = 10_000) -> str | None:
        """A text that says something; None where it is missing, null or empty."""
        value = self.get(name, str)
        if value is not None and len(value) > longest:
            raise Refused(400, f"{name} has {len(value)} characters; {longest} are the most")
        try:
            (value or "").encode()
        except UnicodeError as error:  # json can hold half a surrogate pair
            raise Refused(400, f"{name} is not valid Unicode") from error
        return value if value and value.strip() else None

    def number(self, name: str, default: int | float, low: float, high: float) -> Any:
        """A number within its bounds, whole where the default is; forms have it as text."""
        kind = type(default)
        value = self.fields.get(name)
        if isinstance(value, str):
            try:
                self.fields = {**self.fields, name: kind(value[: MOST_DIGITS + 1])}
            except ValueError as error:
                raise Refused(400, f"{name} must be {TYPES[kind]}, not {value[:40]!r}") from error
        value = self.get(name, kind, default)
        if not low <= value <= high:  # NaN too
            raise Refused(400, f"{name} {str(value)[:40]} must be between {low} and {high}")
        return value

    def choice(self, name: str, default: str, *others: str) -> str:
        """One of a few words."""
        value = self.get(name, str, default)
        if value not in (default, *others):
            raise Refused(400, f"{name} {value[:40]!r} must be one of: {', '.join((default, *others))}")
        return value

    def whole_numbers(self, name: str, most: int) -> list[int]:
        """A list of whole numbers."""
        values = self.get(name, list, [])
        if len(values) > most:
            raise Refused(400, f"{name} holds {len(values)} entries; {most} are the most")
        for value in values:
            if type(value) is not int:
                raise Refused(400, f"{name} must hold whole numbers, not {_called(value)}")
        return values


def vector(values: Any, width: int, name: str) -> np.ndarray:
    """(D,) float32 of unit length from a list of numbers."""
    if not isinstance(values, list) or len(values) != width:
        found = f"{len(values)} numbers" if isinstance(values, list) else _called(values)
        raise Refused(400, f"{name} must be {width} numbers, not {found}")
    if not all(type(value) in (float, int) for value in values):
        raise Refused(400, f"{name} must hold numbers only")
    try:
        row = np.array(values, dtype=np.float64)
    except OverflowError as error:
        raise Refused(400, f"{name} holds a number that is too large") from error
    largest = np.abs(row).max(initial=0)
    if not 0 < largest < math.inf:
        raise Refused(400, f"{name} has length {largest:g}, so it points nowhere")
    row /= largest  # the square of a large number would not fit
    return (row / np.linalg.norm(row)).astype(np.float32)


def picture_bytes(text: str, name: str) -> bytes:
    """The file in base64, with or without "data:image/png;base64," before it."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, f"{name} must be a picture in base64: {error}") from error


def plain(value: Any) -> Any:
    """The value as JSON can hold it: not-a-number is null, bytes and dates are text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(inner) for inner in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def to_json(value: Any) -> bytes:
    """Compact JSON; what JSON cannot hold goes through plain()."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode()
    except (ValueError, TypeError):  # UnicodeEncodeError is a ValueError
        return json.dumps(plain(value), allow_nan=False, separators=(",", ":")).encode()


def _json(data: bytes) -> Any:
    if len(data) > MOST_VALUES and sum(map(data.count, (b"[", b"{", b","))) > MOST_VALUES:
        raise Refused(413, f"the body holds more than {MOST_VALUES} values")
    try:
        return json.loads(data, parse_constant=_no_constant, parse_int=_whole)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        reason = " ".join(str(error).split()) if isinstance(error, ValueError) else "nested too deeply"
        raise Refused(400, f"the body is not JSON: {reason}") from error


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _called(value: Any) -> str:
    return "null" if value is None else TYPES.get(type(value), type(value).__name__)
