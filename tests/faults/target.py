"""A server that strangers attack, with something to find, and a watch on what Python does meanwhile."""

import json
import logging
import sys
from pathlib import Path

CANARY = "the-canary-sings-4711"
TOKEN = "correct-horse-battery"
COMMANDS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "exec", "compile", "pickle.find_class")


class Watch:
    """What Python does while something is tried: files opened, commands run, code compiled (PEP 578)."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if self.on and (event == "open" or event in COMMANDS):
            self.seen.append((event, str(args[0]) if args else ""))

    def __enter__(self) -> "Watch":
        self.on, self.seen = True, []
        return self

    def __exit__(self, *error: object) -> None:
        self.on = False

    def ran(self) -> list[str]:
        """Commands and code."""
        return [f"{event} {what}" for event, what in self.seen if event != "open"]


class Target:
    """A server in this process that fetches addresses and has a token, and a canary file beside its index."""

    def __init__(self, folder: Path) -> None:
        import sites
        from starlette.testclient import TestClient

        from retrieval.search import Searcher
        from retrieval.server import ServeConfig, create_app
        from retrieval.where import parse

        made = sites.world(folder / "world")
        (made / "canary.txt").write_text(CANARY)
        self.index = made / "index"
        config = ServeConfig(token=TOKEN, image_urls=True, precision="fp32", seconds=20)
        self.app = create_app({"tiny": Searcher.open(made / "index")}, config=config)
        self.client = TestClient(self.app, base_url="http://127.0.0.1", raise_server_exceptions=False)
        self.client.__enter__()
        open_app = create_app({"tiny": Searcher.open(made / "index")}, config=ServeConfig(precision="fp32"))
        self.at_home = TestClient(open_app, base_url="http://127.0.0.1")  # without a token
        self.table = self.app.state.hall.indexes["tiny"].searcher.index.table
        parse("width > 1 and caption.matches('a')").mask(self.table)  # what is imported late is imported now
        self.watch, self.log = Watch(), []
        self._handler = logging.Handler()
        self._handler.emit = lambda record: self.log.append(logging.Formatter().format(record))
        self._handler.addFilter(lambda record: not record.name.startswith("http"))  # of the client
        root = logging.getLogger()
        self._level = root.level
        root.setLevel(logging.INFO)
        root.addHandler(self._handler)
        self.ask("POST", "/api/search", {"terms": [{"kind": "text", "value": "a"}], "where": "width > 1"})
        self.ask("GET", "/api/picture/tiny/0?side=64")

    def close(self) -> None:
        """Stop it, and read no logs any more."""
        self.client.__exit__(None, None, None)
        logging.getLogger().removeHandler(self._handler)
        logging.getLogger().setLevel(self._level)

    def ask(self, method: str, path: str, fields: object = None, **headers: str):
        """The answer to a request with the token."""
        headers = {"Authorization": f"Bearer {TOKEN}", **headers}
        data = None if fields is None else json.dumps(fields).encode()
        return self.client.request(method, path, content=data, headers=headers)
