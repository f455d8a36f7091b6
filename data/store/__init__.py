"""The store: one Zarr v3 group per teacher, written block by block and read by memory map.

    locations      where a store's objects are: files, or a service that keeps objects
    layout         how rows are cut into blocks, shards and chunks, and where each lies
    shards         the bytes of one shard
    zarr_metadata  the metadata that other readers of Zarr need
    manifest       what a store holds
    contents       files and records of views, read as they are needed
    versions       how the versions of the format spell them
    opening        a manifest from its location
    planning       what a store is to hold, before it does
    block, done    one block's files as they are written, and what a finished block says
    records        statistics, draws and fidelity of a view
    owners         which live process writes which part
    writer         blocks in, committed views out
    reader         rows of a committed view, straight from the memory map
    check          compares every byte with what the manifest vouches for

docs/decisions/store-format.md has the reasons.
"""

from coursepack.data.store.block import Block as Block
from coursepack.data.store.check import StoreReport as StoreReport
from coursepack.data.store.check import verify as verify
from coursepack.data.store.manifest import Manifest as Manifest
from coursepack.data.store.opening import load_manifest as load_manifest
from coursepack.data.store.planning import StorePlan as StorePlan
from coursepack.data.store.reader import StoreReader as StoreReader
from coursepack.data.store.writer import StoreWriter as StoreWriter

__all__ = [
    "Block",
    "Manifest",
    "StorePlan",
    "StoreReader",
    "StoreReport",
    "StoreWriter",
    "load_manifest",
    "verify",
]
