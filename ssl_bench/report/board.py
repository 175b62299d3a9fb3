"""The page of runs, served while they go on.

http.server of the standard library is enough: a page, and a question every few seconds from some
browsers. It answers GET and HEAD at two addresses and reads no file that a request names.
"""

import hmac
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from ssl_bench.errors import UserError
from ssl_bench.report import grouping, page
from ssl_bench.runs import record

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SECRET = 16  # characters of a token, at least
EVERY = 1.0  # seconds between two looks at the disk, at least
SHARE = 5  # a look that takes long is followed by so many times its duration
# Names in runs come from elsewhere; should one get past its escaping, it still reaches nobody.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class Watch:
    """What the page says of the runs at or below some paths, renewed when it is asked for."""

    def __init__(self, paths: Sequence[Path], metric: str | None):
        self.paths, self.metric = paths, metric
        self.version = 0  # grows with each change
        self._reader = record.Reader()
        self._lock = threading.Lock()
        self._due = 0.0
        self._seen: list | None = None
        self._page = page.Page("", [], [], [], live=True)
        self._charts: dict = {}
        self._curves: dict[tuple, dict] = {}
        self._sections: dict[str, str] = {}
        self._changed: dict[tuple, int] = {}  # what may change -> the version that changed it

    def html(self) -> str:
        with self._lock:
            self._look()
            return self._page.html(self._charts | {"version": self.version})

    def news(self, since: int) -> dict:
        """What has changed since a version: sections as HTML, charts, curves of groups."""
        with self._lock:
            self._look()
            if since == self.version:
                return {"version": self.version}
            # of another server, or of one that was started again: everything
            since = since if since < self.version else -1
            boards = []
            for board in self._charts["boards"]:
                told = {
                    name: {key: value for key, value in group.items() if key != "curves"}
                    | ({"curves": group["curves"]} if self._changed[name] > since else {})
                    for name, group in page.every_group(board)
                }

                def of(key: str, told: dict[tuple, dict] = told) -> list[dict]:
                    return [group for (_, own, _), group in told.items() if own == key]

                by = [one | {"groups": of(one["key"])} for one in board["by"]]
                boards.append(board | {"groups": of(""), "by": by})
            sections = {
                name: html for name, html in self._sections.items() if self._changed[name,] > since
            }
            return {"version": self.version, "boards": boards, "sections": sections}

    def _look(self) -> None:
        """Read what has changed on the disk, unless that was done just now."""
        began = time.monotonic()
        if began < self._due:
            return
        runs, notes = self._read()
        # a Ran is made anew when one of its files has changed; members that wait are always new
        seen = [notes, *((ran.directory, ran.lines and ran, ran.state) for ran in runs)]
        if seen != self._seen:
            self._seen = seen
            self._renew(runs, notes)
        now = time.monotonic()
        self._due = now + max(EVERY, SHARE * (now - began))

    def _read(self) -> tuple[list[record.Ran], list[str]]:
        self._reader.broken.clear()
        runs: dict[Path, record.Ran] = {}
        notes = []
        for path in self.paths:
            try:
                for ran in record.find([path], self._reader):
                    runs.setdefault(ran.directory.resolve(), ran)
            except record.NoRunError:
                if not self._reader.broken:
                    notes.append(
                        f"There is no run in {path} yet. Runs appear here when they start."
                    )
            except (UserError, OSError) as error:  # gone while it was read, or a broken sweep
                notes.append(str(error))
        return list(runs.values()), [*notes, *self._reader.broken]

    def _renew(self, runs: list[record.Ran], notes: list[str]) -> None:
        self.version += 1
        boards = grouping.boards(runs, self.metric)
        if said := grouping.left_out(runs):
            notes = [*notes, said]
        title = " and ".join(map(str, self.paths))
        self._page = page.Page(title, runs, boards, notes, live=True)
        before = {
            name: group["curves"]
            for board in self._charts.get("boards", ())
            for name, group in page.every_group(board)
        }
        self._charts = page.charts(boards, self._curves)
        for board in self._charts["boards"]:
            for name, group in page.every_group(board):
                if before.get(name) is not group["curves"]:
                    self._changed[name] = self.version
        sections = self._page.sections()
        for section, html in sections.items():
            if self._sections.get(section) != html:
                self._changed[section,] = self.version
        self._sections = sections


def _handler(
    watch: Watch, token: str | None, own: Callable[[], set[str]]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version, sys_version = "ssl_bench", ""
        timeout = 60  # seconds until a silent browser is let go

        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            query = parse_qs(asked.query)
            if token is None:
                # a page from elsewhere may have had its name resolved to this machine
                if self.headers.get("Host", "").lower() not in own():
                    return self._answer(HTTPStatus.FORBIDDEN, "text/plain", "another host's name\n")
            elif not hmac.compare_digest(query.get("token", [""])[0].encode(), token.encode()):
                return self._answer(
                    HTTPStatus.FORBIDDEN, "text/plain", "no token, or another one\n"
                )
            if asked.path == "/":
                return self._answer(HTTPStatus.OK, "text/html", watch.html())
            if asked.path == "/news":
                since = query.get("since", ["-1"])[0]
                news = watch.news(int(since) if since.isdecimal() else -1)
                text = json.dumps(news, separators=(",", ":"), allow_nan=False)
                return self._answer(HTTPStatus.OK, "application/json", text)
            return self._answer(HTTPStatus.NOT_FOUND, "text/plain", "the page is at /\n")

        do_HEAD = do_GET

        def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Referrer-Policy", "no-referrer")  # the address may have the token
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a browser asks every few seconds."""

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no error; any other is shown."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def server(
    paths: Sequence[Path], metric: str | None, host: str, port: int, token: str | None
) -> ThreadingHTTPServer:
    """A server of the page, which has its port and doesn't serve yet. UserError: it is taken."""

    class Server(_Server):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    def own() -> set[str]:
        number = made.server_address[1]
        names = (f"[{name}]" if ":" in name else name for name in LOOPBACK)
        return {f"{name}:{number}" for name in names}

    try:
        made = Server((host, port), _handler(Watch(paths, metric), token, own))
    except OSError as error:
        raise UserError(
            f"stage.host={host} stage.port={port}: can't be served ({error.strerror}); "
            "stage.port=0 takes any port"
        ) from None
    return made


def address(made: ThreadingHTTPServer, token: str | None) -> str:
    """The address of the page."""
    host, port = str(made.server_address[0]), made.server_address[1]
    query = f"?{urlencode({'token': token})}" if token else ""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/{query}"
