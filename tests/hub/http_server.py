"""An HTTP server on 127.0.0.1 that logs its requests and fails when told to."""

import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


class Request(NamedTuple):
    method: str
    target: str
    headers: Any
    body: bytes

    @property
    def quoted_path(self) -> str:
        """Without the query, still percent-encoded, so that a slash always separates."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        return {key: values[-1] for key, values in parse_qs(urlsplit(self.target).query).items()}


class Response(NamedTuple):
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012 (never written to)


class LogEntry(NamedTuple):
    """One request: its path with the query, unquoted; status None if nothing was answered."""

    method: str
    path: str
    status: int | None


@dataclass
class Fault:
    """What goes wrong with requests in whose `METHOD path` the regular expression `pattern` is found.

    It strikes the `first`-th such request (from 1) and those after it, `times` in all.

    - `status` is answered, with `headers`; the request is not carried out.
    - `drop_request` closes the connection without an answer; the request is not carried out.
    - `drop_response=n` carries the request out, sends n bytes of the body, and closes the connection. With n = 0
      not even the status is sent.
    - `hang` answers nothing until the server ends; the request is not carried out.
    - `corrupt` carries the request out and flips every bit of the body.
    """

    pattern: str
    first: int = 1
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop_request: bool = False
    drop_response: int | None = None
    hang: bool = False
    corrupt: bool = False
    seen: int = 0

    def strikes(self, request: str) -> bool:
        if not re.search(self.pattern, request):
            return False
        self.seen += 1
        return self.first <= self.seen < self.first + self.times

    @property
    def bytes_sent(self) -> int | None:
        """How much of the body is sent before the connection closes; None if it does not close."""
        return 0 if self.drop_request else self.drop_response


NO_FAULT = Fault("")


class LoggingServer:
    """Serves `answer(request)`, one request at a time. A context manager; the system picks a free port."""

    def __init__(self) -> None:
        self.log: list[LogEntry] = []
        self.faults: list[Fault] = []
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, request: Request) -> Response:
        raise NotImplementedError

    def inject(self, pattern: str, **fault: Any) -> Fault:
        """Let requests fail; for the arguments see `Fault`. Of several that strike, the first injected counts."""
        self.faults.append(Fault(pattern, **fault))
        return self.faults[-1]

    def requests(self, pattern: str = "") -> list[LogEntry]:
        """Logged requests in whose `METHOD path` a regular expression is found, in the order of their answers."""
        return [entry for entry in self.log if re.search(pattern, f"{entry.method} {entry.path}")]

    def exchange(self, request: Request) -> tuple[Response, int | None]:
        """The answer to a request, and after how many bytes of its body to drop the connection, if at all."""
        path = unquote(request.target)
        with self._lock:
            striking = [fault for fault in self.faults if fault.strikes(f"{request.method} {path}")]  # each one counts
            fault = striking[0] if striking else NO_FAULT
            if fault.drop_request or fault.hang:
                response = Response()
            elif fault.status is not None:
                response = Response(fault.status, b'{"error": "injected fault"}', fault.headers)
            else:
                response = self.answer(request)
            self.log.append(LogEntry(request.method, path, None if fault.bytes_sent == 0 else response.status))
        if fault.hang:
            self._ended.wait()
        if fault.corrupt:
            response = response._replace(body=bytes(byte ^ 0xFF for byte in response.body))
        return response, fault.bytes_sent


class _Handler(BaseHTTPRequestHandler):
    owner: LoggingServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: the second would wait for an acknowledgement

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        response, bytes_sent = self.owner.exchange(Request(self.command, self.path, self.headers, body))
        if bytes_sent != 0:
            self.send_response(response.status)
            for key, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(response.body[:bytes_sent])
        if bytes_sent is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr; the log is `LoggingServer.log`."""
