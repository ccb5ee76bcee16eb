"""What strangers may try, a few of each kind; benchmarks/faults.py attack has thousands."""

import contextlib
import io
import logging
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading

import addresses
import attack
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import target as target_module
import tiny
from click.testing import CliRunner
from tiny_world import copy_of, put

import cli
from clip_train.address import without_secrets
from clip_train.console import harmless
from clip_train.fetch import is_public

pytest.importorskip("fastapi")
from target import TOKEN

from retrieval.search import Searcher
from retrieval.server import ServeConfig, create_app, listen, run


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    target = target_module.Target(tmp_path_factory.mktemp("target"))
    yield target
    target.close()


@pytest.mark.parametrize("kind", attack.KINDS)
def test_attacks_come_to_nothing(target, kind):
    for number in range(60):
        outcome = attack.attempt(target, kind, 1, number)
        assert outcome.how == "done", (number, outcome)


# What the attacks would find, if it were there


def test_the_watch_sees_files_that_are_opened_and_code_and_commands_that_are_run(target):
    with target.watch as watch:
        open("/etc/passwd").close()
        eval("1 + 1")
        os.system("true")
        subprocess.run(["true"])
    assert ("open", "/etc/passwd") in watch.seen
    assert {what.split()[0] for what in watch.ran()} >= {"compile", "exec", "os.system", "subprocess.Popen"}
    before = len(watch.seen)
    eval("1 + 1")
    assert len(watch.seen) == before


WEAK = {  # kind of attack -> where a server would be weak against it, and how
    "addresses that lead inside": ("clip_train.fetch.is_public", lambda address: True),
    "redirects that lead inside": ("clip_train.fetch.is_public", lambda address: True),
    "names that could be paths or headers": ("retrieval.page_api._row", lambda text: open(text)),
    "tokens": ("hmac.compare_digest", lambda given, token: True),
    "host names and origins": ("retrieval.door.is_loopback", lambda host: True),
    "expressions in --where": ("retrieval.where.columns_of", lambda table: eval("{}")),
    "secrets": ("retrieval.door.Door._check_length", lambda door, headers: logging.getLogger("x").info(headers)),
}


@pytest.mark.parametrize("kind", attack.KINDS)
def test_an_attack_on_a_server_that_is_weak_is_noticed(target, monkeypatch, kind):
    monkeypatch.setattr(*WEAK[kind])
    assert "wrong" in {attack.attempt(target, kind, 1, number).how for number in range(60)}


def test_what_a_server_writes_to_its_log_holds_no_token(target, capfd):
    config = ServeConfig(port=0, token=TOKEN, precision="fp32")
    app, sock = create_app({"tiny": Searcher.open(target.index)}, config=config), listen(config)
    app.state.hall.index = lambda *_: 1 / 0
    lines = ("GET /metrics?token={} HTTP/1.1", "POST /knn-service HTTP/1.1", "GET /{} HTTP/1.1", "{} HTTP")

    def ask():
        for line in lines:
            head = f"{line}\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {{}}\r\nContent-Length: 15"
            with socket.create_connection(sock.getsockname(), timeout=10) as one, contextlib.suppress(OSError):
                one.sendall((head + '\r\n\r\n{"text": "fox"}').replace("{}", TOKEN, 2).encode())
                while one.recv(65536):
                    pass
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    run(app, sock)
    thread.join()
    said = "".join([*capfd.readouterr(), *target.log])
    assert "POST /knn-service failed" in said and "Invalid HTTP request" in said and TOKEN not in said


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
        ("pipe:curl -ume:secret https://h/a.tar", "pipe:curl ... https://h/a.tar"),
        ("pipe:curl -H'X: secret' 'https://h/a.tar?secret'", "pipe:curl ... 'https://h/a.tar'"),
        ("pipe:curl -sSu me:secret https://h/{0..9}.tar", "pipe:curl ... https://h/{0..9}.tar"),
        ("pipe:curl --proxy-user me:secret s3://h/a", "pipe:curl --proxy-user ... s3://h/a"),
        ("pipe:curl -x http://me:secret@p:80 s3://h/a", "pipe:curl -x http://p:80 s3://h/a"),
        ("pipe:curl -b secret -d token=secret me:secret@h/a.tar", "pipe:curl -b ... -d ..."),
        ("pipe:curl -u me:secret https://h/a?x=1&token=secret", "pipe:curl -u ... https://h/a&..."),
        ("pipe:curl https://h/a?x=1&token=secret", "pipe:curl https://h/a&..."),
        ("pipe:wget -O - --http-password=secret s3://h/a", "pipe:wget -O - ... s3://h/a"),
        ("pipe:AWS_SECRET_ACCESS_KEY=secret aws s3 cp s3://b/0.tar -", "pipe:... aws s3 cp s3://b/0.tar -"),
        ("pipe:smbclient //server/share secret -c 'get a.tar -'", "pipe:smbclient ... -c ..."),
        ("pipe:cat a.tar::s3://me:secret@b/1.tar?sig=secret::/x y.tar", "pipe:cat a.tar::s3://b/1.tar::/x y.tar"),
        ("s3://b/000?.tar?signature=secret", "s3://b/000?.tar"),
    ],
)
def test_addresses_are_kept_without_what_they_keep_secret(address, kept):
    assert without_secrets(address) == kept and "secret" not in kept


@pytest.mark.parametrize(
    "address",
    [
        "pipe:aws s3 cp s3://b/{0..9}.tar -",
        "pipe:cat part-{000..009}.tar",
        "pipe:sort -u list.txt | tar cf - {0..9}",
        "pipe:head -c 700 a.tar; exit 4",
        "pipe:python -u make.py 'part-{0..9}.tar' && cat a.tar.gz | gunzip -c",
        "pipe:rclone cat remote:bucket/{000..099}.tar",
        "s3://b/000?.tar",
        "https://h/{000..099}.tar::/local/what?.tar",
    ],
)
def test_addresses_and_commands_that_keep_nothing_secret_stay_whole(address):
    assert without_secrets(address) == address


HOSTILE = "a\x1b]52;c;ZXZpbA==\x07 fox\x1b[31m\u202e\x9b31m"


def test_a_terminal_is_told_nothing_that_it_would_obey_and_a_pipe_all_of_it(tmp_path, monkeypatch, capsys):
    root = copy_of(["index", "clip"], tmp_path)
    for path in (root / "index" / "metadata").iterdir():
        table, file = pq.read_table(path), io.BytesIO()
        pq.write_table(table.set_column(1, "caption", pa.array([HOSTILE] * len(table))), file)
        put(path, file.getvalue())
    for terminal in (True, False):
        for how in (["--csv"], ["--json"], []):
            words = ["search", f"{HOSTILE} + b", "c", "--index", str(root / "index"), "--device", "cpu", *how]
            monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
            cli.cli.main(words, standalone_mode=False)
            out, err = capsys.readouterr()
            out = out.replace("\x1b[1m", "").replace("\x1b[0m", "")  # our own headings
            assert "is read as" in err and err == harmless(err)
            assert (out == harmless(out)) == terminal
            assert terminal or how != ["--csv"] or HOSTILE in out
    monkeypatch.setenv("RANK", "1")
    cli.complain(ValueError(), HOSTILE)
    assert "rank 1" in (err := capsys.readouterr().err) and err == harmless(err)


def test_what_a_terminal_would_obey_is_replaced_and_nothing_else():
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
