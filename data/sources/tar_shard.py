"""Index of one shard: a tar file in the layout of WebDataset.

Members whose paths are the same up to the first dot of the file name are one sample: `a/0001.jpg`,
`a/0001.cls` and `a/0001.json` have the key `a/0001`. Members without an ending, and hidden files, are
ignored.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from coursepack.data.sources.roots import summarize_names
from coursepack.data.sources.scan import inspect_content
from coursepack.parsing import MAX_JSON_BYTES, parse_json

if TYPE_CHECKING:
    from typing import IO

    from numpy.typing import NDArray

    from coursepack.data.sources.shards import Shards

    Arrays = dict[str, NDArray[Any]]

HEADER = tarfile.BLOCKSIZE
"""Size in bytes of the header before a member's content."""
MAX_CLASS_BYTES = 4096
MAX_IMAGE_BYTES = (1 << 32) - 1
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of compressed files."""
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


def index_shard(file: IO[bytes], json_key: str | None) -> Arrays:
    """Return the index of one shard: arrays with an entry per sample, and its classes and damaged images.

    Args:
        file: the shard, open for reading.
        json_key: member of each sample's `.json` that is its class. None takes the class from `.cls`, or from
            the folder of the image if no sample has that.

    Raises:
        ValueError: the shard is damaged or has samples without image or class. The message is a predicate, to
            be put after the name of the shard.
    """
    _refuse_compressed(file)
    reader = _ShardReader(file, json_key)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                reader.add(tar, member)
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"is not a tar file, or is truncated: {error}") from error
    _check_end(file, end)
    return reader.arrays()


def member_name(place: Shards, shard: str, offset: int) -> str:
    """Return the name of the member whose content begins at an offset; of a long name, the beginning."""
    try:
        (header,) = place.read(shard, [offset - HEADER], [offset])
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
    except (OSError, tarfile.TarError):
        return f"at byte {offset}"


@dataclass
class _Sample:
    """Members of one sample."""

    endings: list[str] = field(default_factory=list)
    image: str = ""
    """Name of the member that is the image."""
    numbers: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    """Offset and length of the image in bytes, its height and width, crc32c of its header."""
    damage: str = ""
    text: str | None = None
    """Class as given in `.cls` or `.json`."""


class _ShardReader:
    """Collects the samples of a shard, member by member."""

    def __init__(self, file: IO[bytes], json_key: str | None) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS

        self._file, self._json_key = file, json_key
        self._length = file.seek(0, io.SEEK_END)
        file.seek(0)
        self._samples: dict[str, _Sample] = {}
        self._image_endings = frozenset(IMG_EXTENSIONS)

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Add a member to its sample."""
        found = _MEMBER.fullmatch(member.name.removeprefix("./"))
        if found is None or member.isdir():
            return
        name, key, ending = found[0], found[1], f".{found[2].lower()}"
        sample = self._samples.setdefault(key, _Sample())
        sample.endings.append(ending)
        is_image = ending in self._image_endings
        if not is_image and ending != (".cls" if self._json_key is None else ".json"):
            return
        if not member.isreg() or member.issparse():
            raise ValueError(
                f"has the member {name!r}, which is a link or a sparse file, expected a regular file"
            )
        stop = member.offset_data + member.size
        if stop > self._length:
            raise ValueError(
                f"is truncated: its member {name!r} ends at byte {stop:,}, but the shard has "
                f"{self._length:,} bytes"
            )
        content = tar.extractfile(member)
        assert content is not None
        with content:
            if is_image:
                self._add_image(sample, key, name, member, content)
            elif sample.text is not None:
                raise ValueError(f"has the member {name!r} twice")
            else:
                sample.text = self._text(name, content, member.size)

    def _add_image(
        self, sample: _Sample, key: str, name: str, member: tarfile.TarInfo, content: IO[bytes]
    ) -> None:
        if sample.image:
            raise ValueError(
                f"has two images in the sample {key!r}, {sample.image!r} and {name!r}. A key ends at the "
                "first dot of the file name: rename one of them, or leave it out"
            )
        if member.size > MAX_IMAGE_BYTES:
            raise ValueError(f"has the image {name!r} of {member.size:,} bytes, expected less than 4 GiB")
        height, width, sample.damage = inspect_content(content)
        self._file.seek(member.offset_data - HEADER)
        header = google_crc32c.value(self._file.read(HEADER))
        sample.image, sample.numbers = name, (member.offset_data, member.size, height, width, header)

    def _text(self, name: str, content: IO[bytes], size: int) -> str:
        """Return the class in a `.cls` or `.json` member as text."""
        most = MAX_CLASS_BYTES if self._json_key is None else MAX_JSON_BYTES
        if size > most:
            raise ValueError(f"has the member {name!r} of {size:,} bytes, expected at most {most:,}")
        if self._json_key is not None:
            return _json_text(name, content.read(), self._json_key)
        try:
            return content.read().decode().strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"has the member {name!r}, which is not text: {error}") from error

    def arrays(self) -> Arrays:
        """Return the index of the samples."""
        for key, sample in self._samples.items():
            if not sample.image:
                raise ValueError(f"has no image in the sample {key!r}, only {', '.join(sample.endings)}")
        samples = list(self._samples.values())
        has_text = any(sample.text is not None for sample in samples)
        kind = "json" if self._json_key is not None else "cls" if has_text else "folder"
        texts = [_class_text(key, sample, kind) for key, sample in self._samples.items()]
        classes, inverse = np.unique(np.array(texts, dtype=np.str_), return_inverse=True)
        numbers = np.array([sample.numbers for sample in samples], dtype=np.int64).reshape(-1, 5)
        keys = [hashlib.blake2b(_encoded(key), digest_size=8).digest() for key in self._samples]
        images = _encoded("\0".join(sample.image for sample in samples))
        damaged = [(index, sample) for index, sample in enumerate(samples) if sample.damage]
        return {
            "offset": numbers[:, 0],
            "length": numbers[:, 1].astype(np.uint32),
            "size": numbers[:, 2:4].astype(np.int32),
            "header": numbers[:, 4].astype(np.uint32),
            "key": np.frombuffer(b"".join(keys), dtype="<u8"),
            "names": np.array(hashlib.sha256(images).hexdigest()),
            "class": inverse.reshape(-1).astype(np.int32),
            "classes": classes,
            "kind": np.array(kind),
            "damaged": np.array([index for index, _ in damaged], dtype=np.int64),
            "damaged_names": np.array([sample.image for _, sample in damaged], dtype=np.str_),
            "damage": np.array([sample.damage for _, sample in damaged], dtype=np.str_),
        }


def _refuse_compressed(file: IO[bytes]) -> None:
    head = file.read(8)
    for magic, kind in COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(
                f"is compressed with {kind}, so that its samples cannot be read one by one: unpack it to a "
                "plain tar file"
            )


def _json_text(name: str, data: bytes, key: str) -> str:
    try:
        values = parse_json(data)
    except ValueError as error:
        raise ValueError(f"has the member {name!r}, which {error}") from error
    if not isinstance(values, dict) or key not in values:
        found = f"found {summarize_names(values)}" if isinstance(values, dict) else "it is not a mapping"
        raise ValueError(f"has no {key!r} in the member {name!r}: {found}")
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(
            f"has {value!r:.80} as {key!r} in the member {name!r}, expected an integer or a class name"
        )
    return str(value).strip()


def _class_text(key: str, sample: _Sample, kind: str) -> str:
    if kind != "folder":
        if sample.text is None:
            raise ValueError(f"has no class for the sample {key!r}: there is no member {f'{key}.{kind}'!r}")
        return sample.text
    folder = key.rpartition("/")[0].rpartition("/")[2]
    if not folder:
        raise ValueError(
            f"has no class for the sample {key!r}: there is no member {f'{key}.cls'!r}, and the image is in "
            "no folder. A class in .json members is read with tar,json=KEY:PATTERN"
        )
    return folder


def _check_end(file: IO[bytes], end: int) -> None:
    """Check that an archive ends with its marker, and that nothing follows."""
    file.seek(end)
    marker = file.read(HEADER)
    if len(marker) < HEADER:
        raise ValueError(
            f"is truncated: it ends at byte {end + len(marker):,} without the end marker of tar files"
        )
    if any(marker):
        raise ValueError(f"is damaged: at byte {end:,}, there is no header of a member")
    while piece := file.read(1 << 20):
        if any(piece):
            raise ValueError(
                f"has more content after its end at byte {end:,}, as joined tar files have: write all "
                "members into one archive"
            )


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
