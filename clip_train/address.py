"""Addresses of shards that are not files here: URLs and commands (pipe:), and how they are kept and said."""

import re

ADDRESS = re.compile(r"pipe:|[a-zA-Z][a-zA-Z0-9+.-]*://")
_WORD = re.compile(r"""[|;&]+|(?:'[^']*'|"[^"]*"|\\.|[^\s|;&'"\\])+|\S""")  # of a shell
_NAME = re.compile(r"[a-z][a-z0-9_.-]*")  # what a command begins with: aws s3 cp
_OPTION = re.compile(r"-|-[A-Za-z]|--[a-z][a-z-]*|\d{1,3}")  # without a value, or a small number
_FILE = re.compile(r"""(['"]?)[^\s'"=@]*(\{\d+\.\.\d+\}[^\s'"=@]*|\.(tar|tgz|gz|zst|txt|csv|json|py|sh))\1""")


def split_parts(spec: str) -> list[str]:
    """The addresses, commands and paths that '::' joins. A spec of paths alone stays as it is."""
    return re.split(rf"::(?={ADDRESS.pattern}|[./~\w])", spec) if ADDRESS.search(spec) else [spec]


def without_secrets(spec: str) -> str:
    """Addresses as they are kept and said: without user names, passwords and queries, which may be signed.

    Of a command, the names that it begins with, options without their values, addresses, and files that their suffix or
    a range ({000..099}) tells from a password; "..." is whatever else it says. A command of no others stays whole.
    """
    return "::".join(_command(part) if part.startswith("pipe:") else _address(part) for part in split_parts(spec))


def _command(part: str) -> str:
    begins = True

    def told(match: re.Match) -> str:
        nonlocal begins
        word = match[0]
        if word[0] in "|;&":
            begins = True
            return word
        if ADDRESS.match(word.strip("'\"")):
            begins = False
            return _address(word)
        if begins and "=" in word:  # NAME=VALUE in front of a command
            return "..."
        if begins and _NAME.fullmatch(word):
            return word
        begins = False
        return word if _OPTION.fullmatch(word) or _FILE.fullmatch(word) else "..."

    return "pipe:" + re.sub(r"\.{3}(\s*\.{3})+", "...", _WORD.sub(told, part.removeprefix("pipe:")))


def _address(part: str) -> str:
    part = re.sub(r"://[^/\s'\"]*@", "://", part)
    part = re.sub(r"""(https?://[^\s'"?]*)\?[^\s'"]*""", r"\1", part)
    return re.sub(r"""(://[^\s'"]*?)\?[\w.~%-]*=[^\s'"]*""", r"\1", part)  # elsewhere ? may be one of a glob
