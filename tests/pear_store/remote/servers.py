"""Web servers for the tests of remotes."""

import http.server
import re
from pathlib import Path
from typing import ClassVar


class StaticHandler(http.server.SimpleHTTPRequestHandler):
    """The standard library's, which knows no ranges; keeps connections, and is silent."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass


class RangeHandler(StaticHandler):
    """Knows ranges of bytes."""

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            return super().do_GET()
        data = path.read_bytes()
        start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
        if start >= len(data):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        self.wfile.write(data[start:end])
        return None


class RedirectHandler(StaticHandler):
    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", "http://169.254.169.254/latest")
        self.send_header("Content-Length", "0")
        self.end_headers()


class EndlessHandler(StaticHandler):
    """Never ends its answer."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        except OSError:
            self.close_connection = True


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers every request the same, and notes it; for subclasses that set what."""

    protocol_version = "HTTP/1.1"
    status = 200
    fields: ClassVar[dict[str, str]] = {}
    body = b""
    asked: ClassVar[list[str]] = []

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.asked.append(f"{self.command} {self.path}")
        self.send_response(self.status)
        for name, value in {"Content-Length": str(len(self.body)), **self.fields}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def log_message(self, format: str, *args: object) -> None:
        pass


def answering(status: int, body: bytes = b"", **fields: str) -> type[Answering]:
    """A handler that always answers so; underscores in names of fields stand for hyphens."""
    named = {name.replace("_", "-"): value for name, value in fields.items()}
    return type("Handler", (Answering,), {"status": status, "body": body, "fields": named, "asked": []})
