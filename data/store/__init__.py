"""The store: one Zarr v3 group per teacher, written block by block and read by memory map.

    locations      storage backends: local files, or an object store
    layout         division of rows into blocks, shards and chunks, and their keys
    shards         the bytes of one shard
    zarr_metadata  the metadata for other Zarr readers
    manifest       index of a store's contents
    contents       files and records of views, loaded lazily
    versions       serialization of these in each version of the format
    opening        loading and parsing of manifests
    planning       planned contents of a new or extended store
    block, done    files of a block being written, and the record of a finished block
    records        statistics, draws and fidelity of a view
    owners         assignment of parts to live processes
    writer         writing of blocks and committing of views
    reader         reading of committed views through memory maps
    check          verification of every file against the manifest

See docs/decisions/store-format.md for the design decisions.
"""

from coursepack.data.store.block import Block as Block
from coursepack.data.store.check import StoreReport as StoreReport
from coursepack.data.store.check import verify as verify
from coursepack.data.store.manifest import Manifest as Manifest
from coursepack.data.store.opening import load_manifest as load_manifest
from coursepack.data.store.planning import StorePlan as StorePlan
from coursepack.data.store.reader import StoreReader as StoreReader
from coursepack.data.store.reader import read_together as read_together
from coursepack.data.store.writer import StoreWriter as StoreWriter

__all__ = [
    "Block",
    "Manifest",
    "StorePlan",
    "StoreReader",
    "StoreReport",
    "StoreWriter",
    "load_manifest",
    "read_together",
    "verify",
]
