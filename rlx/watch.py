"""All runs below a folder, live in a browser: `python -m rlx.watch runs=DIR`.

    runs=outputs       the folder below which runs are looked for
    port=8080          0: any that is free
    host=127.0.0.1     who may connect: this machine alone; 0.0.0.0: everyone who reaches it
    names=null         further names of this machine that browsers may use, with commas between

Ctrl-C ends it. It only reads. What the page polls is JSON, for other programs too: /api/runs, and
/api/run?name=NAME&metric=METRIC&metric=OTHER.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import ipaddress
import json
import platform
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.parse import parse_qs

from rlx.config.options import command
from rlx.problems import refuse
from rlx.results.live import LiveRuns
from rlx.types import Range

PAGE = Path(__file__).with_name("watch_page.html")
MAX_METRICS = 64  # of one question
TIMEOUT_S = 20.0  # a client that sends or takes nothing for so long is left
_PORT = re.compile(r":\d*$")
WORTH_PACKING = 1400  # bytes; a smaller answer fits one packet as it is


class PageServer(ThreadingHTTPServer):
    """Serves the page, and what is known of the runs below a folder."""

    daemon_threads = True  # a browser that keeps a connection open does not delay the end

    def __init__(self, runs: Path, host: str, port: int, names: Sequence[str] = ()) -> None:
        """Raises OSError where it cannot listen there; port 0 is any that is free."""
        self._names = {*map(str.lower, ("localhost", host, platform.node(), *names))}
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, address = found[0][0], found[0][4]
        self.folder, self.runs, self.page = runs, LiveRuns(runs), PAGE.read_bytes()
        self.policy = content_policy(self.page.decode())
        super().__init__((str(address[0]), port), Handler)

    @property
    def url(self) -> str:
        """The address for a browser on this machine."""
        host, port = self.server_address[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(host), str(host))
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    def is_named(self, host: str | None) -> bool:
        """Says whether a request's Host is an address, or a name of this machine.

        A page of elsewhere may let its own name lead here, and would read the answers: by a name
        only those are answered that this machine is known by.
        """
        if host is None:  # no browser
            return True
        name = host.strip().lower().rpartition(":")[0] if _PORT.search(host) else host.lower()
        name = name.strip(".")
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name in self._names
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores a browser that goes away."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection. A run's name is looked up, never opened: no path leads out of the folder."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "rlx", ""
    timeout: ClassVar[float] = TIMEOUT_S
    server: PageServer

    def do_GET(self) -> None:
        """The page, /api/runs or /api/run."""
        path, _, query = self.path.partition("?")
        if not self.server.is_named(self.headers.get("Host")):
            self._refuse(HTTPStatus.FORBIDDEN, "not a name of this machine; names=NAME allows it")
            return
        if path == "/":
            self._answer(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif path == "/api/runs":
            self._answer_json({"runs": self.server.runs.all()})
        elif path == "/api/run":
            self._run(parse_qs(query))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there are /, /api/runs and /api/run?name=NAME")

    def _run(self, query: dict[str, list[str]]) -> None:
        names, metrics = query.get("name", []), query.get("metric", [])
        if len(names) != 1 or len(metrics) > MAX_METRICS:
            says = f"write name=NAME once and metric=METRIC up to {MAX_METRICS} times"
            self._refuse(HTTPStatus.BAD_REQUEST, says)
        elif (run := self.server.runs.one(names[0], metrics)) is None:
            self._refuse(HTTPStatus.NOT_FOUND, "no run of this name; /api/runs lists them")
        else:
            self._answer_json(run)

    def _only_get(self) -> None:
        self.close_connection = True  # a body may follow, and is not read
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "only GET")

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _only_get

    def _refuse(self, status: HTTPStatus, says: str) -> None:
        self._answer_json({"error": says}, status)

    def _answer_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        data = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
        self._answer(status, data, "application/json")

    def _answer(self, status: HTTPStatus, data: bytes, kind: str) -> None:
        self.send_response(status)
        if len(data) > WORTH_PACKING and "gzip" in self.headers.get("Accept-Encoding", ""):
            data = gzip.compress(data, compresslevel=1)
            self.send_header("Content-Encoding", "gzip")
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
            self.send_header("Connection", "close")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: polls are frequent."""


def content_policy(page: str) -> str:
    """Lets a browser run the page's own script and nothing else, whatever a file of a run says."""
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in script]
    scripts = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'self'"
    )


# --- the command line ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line takes these options; the module's docstring explains them."""

    runs: str = "outputs"
    port: Annotated[int, Range(ge=0, le=65535)] = 8080
    host: str = "127.0.0.1"
    names: tuple[str, ...] | None = None


def open_server(runs: Path, host: str, port: int, names: Sequence[str] = ()) -> PageServer:
    """A server that listens; ConfigError where it cannot."""
    try:
        return PageServer(runs, host, port, names)
    except socket.gaierror as error:
        says = f"no such host ({error.strerror}); 127.0.0.1 is this machine alone, 0.0.0.0 all"
        raise refuse("host", says, given=host) from error
    except OSError as error:
        says = f"cannot be listened on ({error.strerror}); give another, or port=0 for a free one"
        raise refuse("port", says, given=str(port)) from error


def main(argv: Sequence[str] | None = None) -> None:
    """`runs=DIR port=8080 host=127.0.0.1`."""
    server = command("rlx.watch", __doc__, Options, open_given, argv)
    if server is None:
        return
    with server:
        print(f"rlx.watch: {server.folder} at {server.url} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            print()


def open_given(options: Options) -> PageServer:
    """The server that the options ask for; ConfigError where there cannot be one."""
    if not Path(options.runs).is_dir():
        says = "no such folder; give one below which runs are, as outputs or multirun"
        raise refuse("runs", says, given=options.runs)
    runs = Path(options.runs).resolve()
    return open_server(runs, options.host, options.port, options.names or ())


if __name__ == "__main__":
    main()
