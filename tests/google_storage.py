"""A server with the XML API of Google Cloud Storage on this machine: moto's S3 server with other headers.

The two protocols share addresses, lists and contents. They differ in conditions, which Google Cloud Storage
expresses by generations, and in names of headers. Known emulators have the other protocol, that of JSON.
"""

from __future__ import annotations

from urllib.parse import quote, unquote

from buckets import S3Server

CONDITION = "HTTP_X_GOOG_IF_GENERATION_MATCH"
AUTHORIZATION = "AWS4-HMAC-SHA256 Credential=tests/20260101/us-east-1/s3/aws4_request"


class GoogleServer(S3Server):
    """moto's server in a thread. The generation of an object is the number that its entity tag writes."""

    prefix = "google"

    def __init__(self):
        super().__init__()
        self._s3 = self._app
        self._app = self._translated

    @property
    def environment(self):
        """The variables that clients read."""
        return {"GOOGLE_BASE_URL": self.url, "GOOGLE_BEARER_TOKEN": "tests"}

    def _translated(self, environ, start_response):
        environ = {name.replace("X_GOOG_META", "X_AMZ_META"): value for name, value in environ.items()}
        environ["HTTP_AUTHORIZATION"] = AUTHORIZATION
        for name in ("RAW_URI", "REQUEST_URI"):  # slashes in a path are quoted
            path, mark, query = environ[name].partition("?")
            environ[name] = quote(unquote(path)) + mark + query
        if (generation := environ.pop(CONDITION, None)) == "0":
            environ["HTTP_IF_NONE_MATCH"] = "*"
        elif generation is not None:
            environ["HTTP_IF_MATCH"] = f'"{int(generation):032x}"'

        def start(status, headers, *rest):
            tags = [value.strip('"') for name, value in headers if name.lower() == "etag"]
            headers = [(name.lower().replace("x-amz-meta", "x-goog-meta"), value) for name, value in headers]
            headers += [("x-goog-generation", str(int(tag, 16))) for tag in tags]
            return start_response(status, headers, *rest)

        return self._s3(environ, start)
