"""Services of object storage: the environment variables that configure their clients, and their errors.

The library reads the variables itself. Their names are here for error messages, and because it refuses
endpoints without encryption unless that is allowed.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass

from coursepack.errors import first_line

PLAIN = "http://"
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
"""Codes of services for a bucket that does not exist, in errors of lists, which have no type of their own."""
DENIED = ("401 Unauthorized", "403 Forbidden")
"""Statuses for wrong credentials, in the same errors."""
INSTANCE = ("169.254.169.254", "metadata.google.internal")
"""Hosts with the credentials of a cloud instance, which the library requests where there are no others."""
_DEBUG = "Debug source:"
_BODY = re.compile(r": <.*")
_ELEMENT = re.compile(r"<(?:Code|Message)>\s*([^<\n]+)")


@dataclass(frozen=True)
class Service:
    """A service of object storage."""

    bucket: str
    """Its word for a bucket."""
    endpoint: tuple[str, ...]
    """Environment variables that lead to the server."""
    credentials: tuple[str, ...]
    """Environment variables with the usual credentials."""

    def allows_http(self) -> bool:
        """Return True if a variable names an endpoint without encryption."""
        return any(os.environ.get(name, "").startswith(PLAIN) for name in self.endpoint)

    def system_error(self, error: Exception, where: str) -> OSError:
        """Return the system error that fits an error of the library about an object."""
        from obstore import exceptions

        text, said = str(error), _summary(error)
        denied = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        if any(host in text for host in INSTANCE):
            message = f"There are no credentials: set {' and '.join(self.credentials)}. {said}"
            return PermissionError(errno.EACCES, message, where)
        if isinstance(error, denied) or any(status in text for status in DENIED):
            message = f"The server refuses the credentials: {said} (set by {' and '.join(self.credentials)})"
            return PermissionError(errno.EACCES, message, where)
        if any(code in text for code in NO_BUCKET):
            return self.no_bucket(where)
        if isinstance(error, exceptions.NotSupportedError) or "501 Not Implemented" in text:
            return OSError(errno.ENOTSUP, f"The server does not support this: {said}", where)
        return OSError(errno.EIO, said, where)

    def no_bucket(self, where: str) -> FileNotFoundError:
        """Return the error for an object whose bucket does not exist."""
        return FileNotFoundError(errno.ENOENT, f"There is no such {self.bucket}", where)


def _summary(error: Exception) -> str:
    """Return the first line of an error, and code and message of the XML document that the server sent."""
    line, found = first_line(error), _ELEMENT.findall(str(error).partition(_DEBUG)[0])
    return ": ".join([_BODY.sub("", line), *found]) if found else line


SERVICES = {
    "s3": Service(
        "bucket",
        ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"),
        ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    ),
    "gs": Service("bucket", ("GOOGLE_BASE_URL",), ("GOOGLE_APPLICATION_CREDENTIALS",)),
    "az": Service(
        "container",
        ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
        ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"),
    ),
}
"""Services by the scheme of their addresses."""
