"""Objects through which the replicas of a group exchange weights, in a folder or a bucket.

group.json              recipe and data fingerprints, which are the same for all replicas of the group
replica-1.json          claim of the process that trains the first replica
replica-1.safetensors   newest weights of the first replica, with its number of steps

Objects are replaced as a whole, and each but the first is written by one replica. A process claims its
replica when it starts, also if another has claimed it before: that one may have been killed. A process that
finds the claim of another stops, so of two that train one replica, the one that started later goes on.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from typing import TYPE_CHECKING, Any

from coursepack.canonical import canonical_json, difference_table
from coursepack.config import Config, parse_config
from coursepack.errors import RunBusy, RunError
from coursepack.parsing import parse_json

if TYPE_CHECKING:
    from coursepack.data.store.locations.base import Location

GROUP_FILE = "group.json"
MAX_GROUP_BYTES = 1 << 24
MAX_CLAIM_BYTES = 1 << 16


class Claim(Config):
    """Process that trains a replica."""

    token: str
    """Random text that no other process has."""
    host: str
    pid: int
    started: str
    """Time of its first step, by the clock of its machine."""


class GroupFiles:
    """Objects of a group, as the process of one replica reads and writes them."""

    def __init__(self, location: Location, identity: dict[str, Any], index: int, count: int) -> None:
        """Check that a location is empty or holds this group; nothing is written.

        Args:
            location: location of the group.
            identity: everything in which the replicas of the group agree, as plain values.
            index: index of the process's replica.
            count: number of replicas.

        Raises:
            RunError: the location holds another group, or cannot be read.
        """
        self.location, self.index, self.count = location, index, count
        self._identity = identity
        self._claim = b""
        self._tags: dict[int, str] = {}
        try:
            location.names("")
        except OSError as error:
            raise self._unusable(error) from error
        check_group(location, identity)

    def start(self) -> None:
        """Create the group unless it exists, remove what a killed process left, and claim the replica.

        Raises:
            RunError: the location holds another group by now, or cannot be written to.
        """
        name, location = f"replica-{self.index + 1}.", self.location
        claim = Claim(
            token=secrets.token_hex(16),
            host=socket.gethostname(),
            pid=os.getpid(),
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        self._claim = canonical_json(claim.model_dump(), indent=1).encode()
        content = canonical_json(self._identity, indent=1).encode()
        try:
            # A server that ignores conditions will do: replicas that start at one time write the same group.
            location.begin_writing(single_writer=True)
            is_new = location.create(GROUP_FILE, content) is not None
            location.sweep("", lambda other: other.startswith(name))
            location.put(self._claim_key, self._claim)
        except OSError as error:
            raise self._unusable(error) from error
        if not is_new:
            check_group(location, self._identity)

    def publish(self, content: bytes) -> None:
        """Replace the weights of the process's replica.

        Raises:
            RunBusy: another process has claimed the replica since.
            OSError: the location cannot be reached.
        """
        self._check_claim()
        self.location.put(weights_key(self.index), content)

    def changed(self, index: int, max_bytes: int) -> bytes | None:
        """Return the file of a replica's weights, or None if there is none or it was returned before.

        Raises:
            OSError: the location cannot be reached.
            ValueError: the file is larger than `max_bytes`; raised once for each content.
        """
        key = weights_key(index)
        tag = self.location.tag(key)
        if tag is None or tag == self._tags.get(index):
            return None
        try:
            content, self._tags[index] = self.location.get_tagged(key, max_bytes)
        except ValueError:
            self._tags[index] = tag
            raise
        return content

    @property
    def _claim_key(self) -> str:
        return f"replica-{self.index + 1}.json"

    def _check_claim(self) -> None:
        """Check that no other process has claimed the replica; a lost or damaged claim is written again."""
        where = self.location.where(self._claim_key)
        try:
            found = self.location.get(self._claim_key, MAX_CLAIM_BYTES)
            if found == self._claim:
                return
            other = parse_config(Claim, parse_json(found), where)
        except (FileNotFoundError, ValueError):
            self.location.put(self._claim_key, self._claim)
            return
        raise RunBusy(
            f"replica {self.index + 1} of group {str(self.location)!r} was taken over by process {other.pid} "
            f"on {other.host!r:.80}, which started later, at {other.started:.40}. If both were meant to run, "
            f"give each a number of its own with --replica I/{self.count}; to go on with this run instead, "
            "stop that process and repeat the command with --resume"
        )

    def _unusable(self, error: OSError) -> RunError:
        bucket = "the address, the endpoint and the credentials of the bucket"
        place = bucket if self.location.is_remote else "the folder"
        return RunError(
            f"group {str(self.location)!r} cannot be used: {error.strerror or error}. Check {place}, or give "
            "another --group"
        )


def weights_key(index: int) -> str:
    """Return the key of a replica's weights."""
    return f"replica-{index + 1}.safetensors"


def check_group(location: Location, identity: dict[str, Any]) -> None:
    """Check that a location is empty, or that of a group of this identity.

    Raises:
        RunError: it belongs to another group, or cannot be read.
    """
    try:
        content = location.get(GROUP_FILE, MAX_GROUP_BYTES)
        held = parse_json(content)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise RunError(
            f"{location.where(GROUP_FILE)!r} cannot be read ({error}): give another --group"
        ) from error
    if held != parse_json(canonical_json(identity)):
        table = difference_table(held, identity, "group", "this run")
        raise RunError(
            f"group {str(location)!r} is of other replicas.\n{table}\n"
            "Train with the values of the group, or give another --group."
        )
