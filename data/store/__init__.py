"""The store: one Zarr v3 group per teacher, written block by block and read by memory map.

    layout    how rows are cut into blocks, shards and chunks, and where each lies
    shards    the bytes of one shard file
    manifest  the truth about what a store holds
    planning  what a store is to hold, before it does
    block     one block's files as they are written
    records   statistics, draws and fidelity of a view
    owners    which live process writes which part
    writer    blocks in, committed views out
    reader    rows of a committed view, straight from the memory map
    check     is every byte what the manifest vouches for?

docs/decisions/store-format.md has the reasons.
"""

from coursepack.data.store.block import Block as Block
from coursepack.data.store.check import StoreReport as StoreReport
from coursepack.data.store.check import verify as verify
from coursepack.data.store.manifest import Manifest as Manifest
from coursepack.data.store.manifest import load_manifest as load_manifest
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
