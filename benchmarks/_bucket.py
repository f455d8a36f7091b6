"""S3 server for `remote.py`: moto's, in a process of its own, with a limited bandwidth.

    python benchmarks/_bucket.py BYTES_PER_SECOND

prints its port and serves until it is killed. All responses together are sent at that rate.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

PIECE = 32 << 10
"""Bytes that are sent at a time."""
SLACK_SECONDS = 0.01
"""Time by which a sender that slept too long may catch up."""
COUNTS = "/requests-since-the-last-call"
"""Path that returns the number of requests by method."""


class Throttled:
    """WSGI application that sends the responses of another at a limited rate, and counts requests."""

    def __init__(self, app: Callable[..., Iterable[bytes]], bytes_per_second: float) -> None:
        self._app, self._rate = app, bytes_per_second
        self._turn, self._free_at = threading.Lock(), 0.0
        self._counts: Counter[str] = Counter()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == COUNTS:
            with self._turn:
                text = json.dumps(self._counts).encode()
                self._counts.clear()
            start_response("200 OK", [("Content-Length", str(len(text)))])
            return [text]
        with self._turn:
            self._counts[environ["REQUEST_METHOD"]] += 1
        return self._slowly(self._app(environ, start_response))

    def _slowly(self, answer: Iterable[bytes]) -> Iterator[bytes]:
        for content in answer:
            for start in range(0, len(content), PIECE):
                piece = content[start : start + PIECE]
                with self._turn:
                    self._free_at = (
                        max(self._free_at, time.monotonic() - SLACK_SECONDS) + len(piece) / self._rate
                    )
                    free_at = self._free_at
                time.sleep(max(0.0, free_at - time.monotonic()))
                yield piece


class Bucket:
    """An empty bucket of a server in a process of its own."""

    NAME = "benchmark"

    def __init__(self, port: int) -> None:
        self._port = port
        self._request("PUT", f"/{self.NAME}")
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_REGION": "us-east-1",
        }
        """Variables by which clients find it."""

    def requests(self) -> int:
        """Return the number of requests since the last call."""
        counts: dict[str, int] = json.loads(self._request("GET", COUNTS))
        return sum(counts.values())

    def _request(self, method: str, path: str) -> bytes:
        connection = HTTPConnection("127.0.0.1", self._port)
        connection.request(method, path)
        content = connection.getresponse().read()
        connection.close()
        return content


@contextmanager
def serving(bytes_per_second: float) -> Iterator[Bucket]:
    """Run a server, and yield a bucket."""
    command = [sys.executable, __file__, str(bytes_per_second)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            port = process.stdout.readline()
            if not port:
                raise SystemExit("No S3 server: install the extra `s3-server`.")
            yield Bucket(int(port))
        finally:
            process.kill()


def main() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        """Logs nothing."""

        def log(self, *_: Any) -> None:
            pass

    app = Throttled(DomainDispatcherApplication(create_backend_app), float(sys.argv[1]))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
