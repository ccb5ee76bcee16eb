"""What strangers may try, a few of each kind; benchmarks/faults.py attack has thousands."""

import io
import tarfile

import addresses
import attack
import pytest
import target as target_module
import tiny
from click.testing import CliRunner

import cli
from clip_train.console import harmless
from clip_train.fetch import is_public
from clip_train.folder import without_secrets

pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    target = target_module.Target(tmp_path_factory.mktemp("target"))
    yield target
    target.client.__exit__(None, None, None)


@pytest.mark.parametrize("kind", attack.KINDS)
def test_attacks_come_to_nothing(target, kind):
    for number in range(60):
        outcome = attack.attempt(target, kind, 1, number)
        assert outcome.how == "done", (number, outcome)


def test_inner_addresses_are_known_as_such_and_a_public_one_is_not():
    assert [one for one in (*addresses.INNER, *addresses.INNER6) if is_public(one)] == []
    assert is_public(addresses.PUBLIC) and is_public("2600::1")


@pytest.mark.parametrize(
    "address, kept",
    [
        ("s3://me:secret@b/{0..3}.tar?signature=abc", "s3://b/{0..3}.tar"),
        ("https://me@mail.example:secret@h/a.tar?x=a:abc::s3://u:secret@b/1.tar", "https://h/a.tar::s3://b/1.tar"),
        (
            "pipe:curl -u me:secret 'https://h/a.tar?sig=abc' -H 'Authorization: Bearer secret' | cat",
            "pipe:curl -u ... 'https://h/a.tar' -H ... | cat",
        ),
        ("pipe:aws s3 cp s3://b/{0..9}.tar -", "pipe:aws s3 cp s3://b/{0..9}.tar -"),
    ],
)
def test_addresses_are_kept_without_what_they_keep_secret(address, kept):
    assert without_secrets(address) == kept


def test_captions_cannot_make_a_terminal_do_things():
    assert harmless("a\x1b]52;c;ZXZpbA==\x07 fox\u202e🦊\u200d\x9b31m\r") == "a�]52;c;ZXZpbA==� fox�🦊\u200d�31m�"
    assert harmless("two\nlines\tof text") == "two\nlines\tof text"


def test_names_in_tars_and_words_in_captions_never_become_paths(tmp_path):
    names = ("../../evil", "/abs/evil", "..", "a\x1b]0;x\x07", "b\n../c", "~/d", "e" * 90, "CON", "-rf", "f;touch g")
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "0.tar", "w") as tar:
        for n, name in enumerate(names):
            for suffix, data in (("png", tiny.picture(n)), ("txt", f"../../{name} a fox".encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    tiny.clip(tmp_path / "clip")
    (tmp_path / "names.txt").write_text("../../up\n/etc/passwd\n..\na/b\n")
    out = tmp_path / "out"
    out.mkdir()
    before = {path for path in tmp_path.rglob("*")}
    index, classes = f"--index {out / 'index'}", f"--classnames {tmp_path / 'names.txt'}"
    for words in (
        f"shard {tmp_path / 'in'} --out {out / 'shards'}",
        f"embed --shards {out / 'shards'} --clip {tmp_path / 'clip'} --out {out / 'emb'} --device cpu",
        f"index --embeddings {out / 'emb'} --out {out / 'index'}",
        f"cluster {index} --out {out / 'clusters'} --count 2",
        f"classify {index} {classes} --sheet {out / 'sheets'} --out {out / 'c.parquet'} --device cpu",
        f"search fox {index} --sheet {out / 'found.png'}",
    ):
        done = CliRunner().invoke(cli.cli, words.split())
        assert done.exit_code == 0, (words, done.output, done.exception)
        assert "\x1b" not in done.output
    made = {path for path in tmp_path.rglob("*")} - before
    assert [path for path in made if out not in path.parents] == []
    assert not any("evil" in path.name or ".." in path.name or "touch" in path.name for path in made)
