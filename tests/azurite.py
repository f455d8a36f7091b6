"""An Azure Blob Storage server on this machine: Azurite, a program of Node, behind one that can fail."""

from __future__ import annotations

import base64
import email.utils
import hmac
import os
import re
import shutil
import subprocess
import urllib.request
from http.client import HTTPConnection

from buckets import FailingServer

PROGRAM = "azurite-blob"
ACCOUNT, KEY = "tests", base64.b64encode(b"key of the tests").decode()
OPTIONS = (
    "--silent",
    "--inMemoryPersistence",
    "--skipApiVersionCheck",
    "--disableTelemetry",
    "--blobPort",
    "0",
)
BETWEEN = ("connection", "keep-alive", "transfer-encoding")
"""Headers of one connection."""


def found_azurite():
    """Path of Azurite's program, or None."""
    return shutil.which(PROGRAM)


class AzureServer(FailingServer):
    """Azurite in a process of its own, with one account."""

    def __init__(self, folder):
        super().__init__(self._forwarded)
        self._folder = folder
        self._containers = 0

    @property
    def environment(self):
        """The variables that clients read."""
        return {
            "AZURE_STORAGE_ENDPOINT": f"{self.url}/{ACCOUNT}",
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        }

    def __enter__(self):
        self._process = subprocess.Popen(
            [found_azurite(), *OPTIONS],
            cwd=self._folder,
            env={**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        printed = []
        for line in self._process.stdout:
            printed.append(line)
            if found := re.search(r"successfully listens on http://(\S+)", line):
                self._azurite = found[1]
                return super().__enter__()
        self._end()
        raise RuntimeError(f"{PROGRAM} did not start: {''.join(printed)}")

    def __exit__(self, *error):
        super().__exit__(*error)
        self._end()

    def _end(self):
        self._process.terminate()
        self._process.communicate()

    def _forwarded(self, environ, start_response):
        names = {name[5:].replace("_", "-").lower(): name for name in environ if name.startswith("HTTP_")}
        names |= {"content-type": "CONTENT_TYPE", "content-length": "CONTENT_LENGTH"}
        headers = {name: environ[key] for name, key in names.items() if environ.get(key)}
        body = environ["wsgi.input"].read(int(headers.get("content-length", 0)))
        connection = HTTPConnection(self._azurite)
        connection.request(environ["REQUEST_METHOD"], environ["REQUEST_URI"], body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        kept = [(name, value) for name, value in response.getheaders() if name.lower() not in BETWEEN]
        start_response(f"{response.status} {response.reason}", kept)
        return [content]

    def new_container(self):
        """Create a container, which the library cannot, and return its name."""
        self._containers += 1
        name = f"container-{self._containers}"
        headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
        stated = "".join(f"{key}:{value}\n" for key, value in headers.items())
        text = "PUT" + 12 * "\n" + f"{stated}/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
        signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), "sha256")).decode()
        headers |= {"Authorization": f"SharedKey {ACCOUNT}:{signature}", "Content-Length": "0"}
        request = urllib.request.Request(
            f"{self.url}/{ACCOUNT}/{name}?restype=container", method="PUT", headers=headers
        )
        with urllib.request.urlopen(request):
            return name
