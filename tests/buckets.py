"""Servers on this machine that can be told to fail or to ignore conditions, among them an S3 server."""

from __future__ import annotations

import threading
import time
from collections import Counter
from http.client import HTTPConnection
from urllib.parse import urlsplit

from werkzeug.serving import WSGIRequestHandler, make_server


class Quiet(WSGIRequestHandler):
    """Logs nothing."""

    def log(self, *_):
        pass


class FailingServer:
    """A WSGI application in a thread. The next request that a fault fits is given that fault."""

    def __init__(self, app):
        self._app = app
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Quiet)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._turn = threading.Lock()
        self.url = f"http://127.0.0.1:{self._server.port}"
        self.requests = Counter()
        """Number of requests by method and last part of the key."""
        self.recover()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def recover(self):
        """Fail no longer."""
        self.keeps_conditions = True
        self.is_down = False
        self.faults = []
        self.requests.clear()

    def fail(self, fault, *, method="PUT", key="", times=1):
        """Give a fault to requests of a method whose key contains a text.

        refused   not done, 503
        forbidden not done, 403
        lost      done, and 503 all the same
        slow      done, and answered after two seconds
        cut       done in half: the answer ends before its content does
        """
        self.faults += [(fault, method, key)] * times

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests[method, path.rpartition("/")[2]] += 1
        if not self.keeps_conditions:
            environ = {name: value for name, value in environ.items() if "_IF_" not in name}
        fault = "refused" if self.is_down else self._fault(method, path)
        if fault in ("refused", "forbidden"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return self._answer(start_response, "403 Forbidden" if fault == "forbidden" else "503 Slow Down")
        if fault == "lost":
            list(self._app(environ, lambda *_: lambda _: None))
            return self._answer(start_response, "503 Slow Down")
        answer = self._app(environ, start_response)
        if fault == "slow":
            time.sleep(2)
        if fault == "cut":
            whole = b"".join(answer)
            return [whole[: len(whole) // 2]]
        return answer

    def _fault(self, method, path):
        with self._turn:
            for number, (fault, wanted, key) in enumerate(self.faults):
                if method == wanted and key in path:
                    del self.faults[number]
                    return fault
        return None

    @staticmethod
    def _answer(start_response, status):
        start_response(status, [("Content-Length", "0")])
        return [b""]


class S3Server(FailingServer):
    """moto's server."""

    prefix = "bucket"
    """Beginning of names of buckets. All servers of a process share moto's buckets."""

    def __init__(self):
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        super().__init__(DomainDispatcherApplication(create_backend_app))
        self._buckets = 0

    @property
    def environment(self):
        """The variables that clients read."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_REGION": "us-east-1",
        }

    def new_bucket(self):
        """Create a bucket and return its name."""
        with self._turn:
            self._buckets += 1
            name = f"{self.prefix}-{self._buckets}"
        connection = HTTPConnection(urlsplit(self.url).netloc)
        connection.request("PUT", f"/{name}", body=b"")
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.read()
        connection.close()
        return name
