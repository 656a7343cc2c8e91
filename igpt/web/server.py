"""The page over HTTP, by Python's own server: no package to install, nothing fetched from elsewhere, no file served but
the page's three. At most one picture is drawn at a time and a few wait; who goes away stops what is drawn for him.

    GET /, /page.js, /page.css   the page            POST /picture    a picture file -> {"tokens"}
    GET /model                   Studio.facts()      POST /complete   a wish -> one line of JSON a row
    GET /emoji/N                 {"tokens"}          an error is {"error": words}, with a status or as the last line
"""

import ipaddress
import json
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from igpt.convert.tensors import JSON_LIMIT, parse_json
from igpt.web.studio import FILE_BYTES, Studio

PAGE = {"/": ("index.html", "text/html"), "/page.js": ("page.js", "text/javascript"),
        "/page.css": ("page.css", "text/css")}  # fmt: skip
WAITING = 4  # wishes, beside the one that is drawn
CONNECTIONS = 32
SILENCE = 30  # seconds without a byte, after which a connection ends
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Refused(ValueError):
    """An HTTP status and the words for it."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves a Studio at (host, port) with `serve_forever`; port 0 takes a free one. Raises ValueError for an address
    that cannot be had."""

    daemon_threads = True

    def __init__(self, studio: Studio, host: str, port: int):
        self.studio, self.host = studio, host
        self.turn, self.waiting = threading.Lock(), threading.BoundedSemaphore(1 + WAITING)
        self.connections = threading.BoundedSemaphore(CONNECTIONS)
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise ValueError(f"host, port: got {host} and {port}, which cannot be had: {error}") from error

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.server_port}"

    def knows(self, name: str) -> bool:
        """Whether a request may call us so. A page of another site whose name was made to lead here is not answered."""
        names = {self.host, "localhost"}
        return not is_loopback(self.host) or name.rpartition(":")[0] in names or name in names

    def process_request(self, request, address):
        if not self.connections.acquire(blocking=False):
            return self.shutdown_request(request)
        super().process_request(request, address)

    def process_request_thread(self, request, address):
        try:
            super().process_request_thread(request, address)
        finally:
            self.connections.release()

    def handle_error(self, request, address):
        """Connections break; whatever else goes wrong was told by `answer`."""


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Handler(BaseHTTPRequestHandler):
    timeout, server_version, sys_version = SILENCE, "igpt", ""

    def do_GET(self):
        self.answer(self.get)

    def do_POST(self):
        self.answer(self.post)

    def answer(self, method) -> None:
        try:
            if not self.server.knows(self.headers.get("Host", "")):
                raise Refused(403, f"expected a request to {self.server.url}")
            method()
        except ValueError as error:
            self.send(getattr(error, "status", 400), {"error": str(error)})
        except OSError:  # the browser went away
            self.close_connection = True
        except Exception:
            traceback.print_exc(file=sys.stderr)
            self.send(500, {"error": "this went wrong on our side; the terminal says more"})

    def get(self) -> None:
        studio, (name, kind) = self.server.studio, PAGE.get(self.path, ("", ""))
        emoji = self.path.removeprefix("/emoji/")
        if name:
            self.begin(200, f"{kind}; charset=utf-8")
            self.wfile.write((Path(__file__).parent / "page" / name).read_bytes())
        elif self.path == "/model":
            self.send(200, studio.facts())
        elif emoji != self.path and emoji.isdecimal() and len(emoji) < 10:
            self.send(200, {"tokens": studio.emoji(int(emoji))})
        else:
            raise Refused(404, "there is nothing here")

    def post(self) -> None:
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{self.headers.get('Host')}":
            raise Refused(403, "expected a request from our own page")
        if self.path == "/picture":
            self.send(200, {"tokens": self.server.studio.tokens_of(self.body(FILE_BYTES))})
        elif self.path == "/complete":
            self.complete(parse_json(self.body(JSON_LIMIT), "request"))
        else:
            raise Refused(404, "there is nothing here")

    def body(self, most: int) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(411, "expected a request that says how long it is")
        if len(length) > 15 or int(length) > most:
            raise Refused(413, f"got {length:.15} bytes, expected at most {most:,}")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refused(400, f"got {len(body):,} bytes of {length}")
        return body

    def complete(self, wish: dict) -> None:
        """Rows as they are drawn. Once they have begun, a failure can only be the last line."""
        server = self.server
        if not server.waiting.acquire(blocking=False):
            raise Refused(503, f"{WAITING} others are waiting already: try again in a moment")
        try:
            with server.turn:
                rows = server.studio.complete(wish)
                self.begin(200, "application/x-ndjson")
                try:
                    for row in rows:
                        self.wfile.write(json.dumps(row).encode() + b"\n")
                except OSError:
                    raise
                except Exception:
                    traceback.print_exc(file=sys.stderr)
                    self.wfile.write(b'{"error": "this went wrong on our side; the terminal says more"}\n')
        finally:
            server.waiting.release()

    def send(self, status: int, value: dict) -> None:
        self.begin(status, "application/json")
        self.wfile.write(json.dumps(value).encode())

    def begin(self, status: int, kind: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        """Nothing: the page says what went wrong, and what is wrong with us goes to the terminal by itself."""
