"""One tar file's members, as far as they can be read: damage is told, not raised."""

import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

# what tarfile raises of damage; of a PAX record that it cannot parse, whatever parsing raises
BROKEN_TAR = (tarfile.TarError, ValueError, ArithmeticError, LookupError)
Span = tuple[int, int]  # offset and size in bytes of a member's contents in its tar


@dataclass(kw_only=True)
class TarMembers:
    """What one tar holds.

    samples: {key: {suffix: span}} of its regular files in tar order, grouped as webdataset does (see split_name).
    twice: names that came again (their first span is kept). apart: keys whose members do not lie together, which
    readers that stream take for two samples. other: names that are no sample's (no suffix, a link). damage: why the
    tar could not be read to its end, "" if it could.
    """

    samples: dict[str, dict[str, Span]] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    damage: str = ""


def read_members(path: str | Path) -> TarMembers:
    """The members of a tar, whole ones only. The names stay strings: nothing is written to a path that a tar names."""
    found = TarMembers()
    try:
        with open(path, "rb") as file:
            found.damage = _collect(file, found)
    except OSError as error:
        found.damage = error.strerror or str(error)
    return found


def _collect(file, found: TarMembers) -> str:
    """Fill `found`; why the tar ends too early, if it does."""
    size = os.fstat(file.fileno()).st_size
    last = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, suffix = split_name(member.name)
                if member.isdir():
                    continue
                if not (member.isreg() and key) or member.issparse():
                    found.other.append(member.name)
                    continue
                if member.size < 0 or member.offset_data + member.size > size:
                    break
                parts = found.samples.setdefault(key, {})
                if parts and key != last:
                    found.apart.append(key)
                last = key
                if suffix in parts:
                    found.twice.append(member.name)
                else:
                    parts[suffix] = (member.offset_data, member.size)
            end = tar.offset
    except BROKEN_TAR:
        end = size
    # at a broken or missing header tarfile stops in silence: a whole tar ends in a block of zeros
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE):
        return ""
    return f"cut short or damaged after {len(found.samples)} samples" if found.samples else "no tar"


def read_span(path: str | Path, span: Span) -> bytes:
    """The contents of one member. OSError if the tar cannot be read (any more)."""
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), span[1], span[0])


def split_name(name: str) -> tuple[str, str]:
    """A member's name -> key and suffix, as webdataset splits it; ("", "") if it has no key or no suffix.

    The key is the name up to the first dot of its last part, directories included; the suffix the rest in lower case.
    """
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot else ("", "")
