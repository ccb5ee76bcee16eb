"""One captioned picture, and how its members in a tar are read: KEY.jpg, KEY.txt, KEY.json, KEY.cls."""

import json
from dataclasses import dataclass, field
from typing import Any

PICTURES = ("jpg", "jpeg", "png", "webp")  # suffixes of pictures; the first that a sample has is its picture
NO_CAPTION = "no caption"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One captioned picture. `image` is the picture file as it is, `ext` its kind; `meta` is the sample's json."""

    key: str
    image: bytes = field(repr=False)
    ext: str
    captions: list[str]  # the first is the one that KEY.txt holds
    meta: dict[str, Any] = field(default_factory=dict)
    cls: bytes | None = field(default=None, repr=False)  # KEY.cls as it was read; it is not written

    @property
    def caption(self) -> str:
        return self.captions[0]

    def label(self, field: str = "label") -> str | None:
        return label_of(self.meta, self.cls, field)


def label_of(meta: dict[str, Any], cls: bytes | None, field: str) -> str | None:
    """One field of a sample's json as text, None if it has none: equal labels mark pictures of the same thing.

    The field "cls" is the text of KEY.cls where there is one.
    """
    if field == "cls" and cls is not None:
        return cls.decode(errors="replace").strip()
    value = meta.get(field)
    return None if value is None else str(value)


def captions_of(text: bytes | None, meta: dict[str, Any]) -> list[str]:
    """What is said about a picture: KEY.txt, then the json's "caption" and "captions"; distinct, stripped."""
    listed = meta.get("captions")
    said = [text.decode("utf-8-sig") if text else None, meta.get("caption"), *(listed if type(listed) is list else [])]
    return list(dict.fromkeys(s.strip() for s in said if isinstance(s, str) and s.strip()))


def json_object(data: bytes | None) -> dict[str, Any]:
    """KEY.json's object, empty where there is none; ValueError if it is something else."""
    meta = json.loads(data) if data is not None else {}
    if not isinstance(meta, dict):
        raise ValueError("not a json object")
    return meta


def why_no_caption(text: bytes | None, meta: bytes | None) -> str | None:
    """The reason why a sample's KEY.txt and KEY.json hold no caption to use; None if they do."""
    try:
        captions = captions_of(text, json_object(meta))
        "".join(captions).encode()  # json can hold half a surrogate pair
        return None if captions else NO_CAPTION
    except UnicodeError:
        return "caption is not UTF-8"
    except (ValueError, RecursionError):
        return "json cannot be read"
