"""Writing one shard: tar, sidecar, index records and checksums, in one pass and flat memory.

The bytes are those that the standard library's `tarfile` writes for the same members (USTAR,
owner 0, mode 0644, mtime 0), so equal samples in equal order give equal files anywhere. A header
is made by filling two fields into a template, in a twentieth of the time of `TarInfo.tobuf`.
"""

import hashlib
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import xxhash

from wds_convnext.conversion.records import left_as
from wds_convnext.conversion.shrink import AS_STORED, SOURCE
from wds_convnext.files import replacing, write_atomically
from wds_convnext.shards.headers import BLOCK
from wds_convnext.shards.index import HAS_CHECKSUM, Record, checksum
from wds_convnext.shards.sidecar import format_sidecar_line, sidecar_head
from wds_convnext.shards.tar import Member

_FLUSH_BYTES = 1 << 20  # hashed and written while it is in the cache
_BLANK_CHECKSUM = 8 * ord(" ")


def member_header(name: bytes, num_bytes: int) -> bytes:
    """The tar header of a regular file; `name` is at most 100 bytes of ASCII."""
    if num_bytes >= 8**11:
        raise ValueError(f"{num_bytes:,} bytes do not fit a tar member of 8 GiB")
    size = b"%011o" % num_bytes
    checksum = _BASE_CHECKSUM + sum(name) + sum(size)
    return b"".join(
        (name, _TEMPLATE[len(name) : 124], size, _TEMPLATE[135:148], b"%06o\0" % checksum, _REST)
    )


def _template() -> bytes:
    header = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
    return header[:124] + bytes(11) + header[135:]


_TEMPLATE = _template()
_REST = _TEMPLATE[155:]
_BASE_CHECKSUM = sum(_TEMPLATE[:148]) + _BLANK_CHECKSUM + sum(_TEMPLATE[156:])


class ShardWriter(ExitStack):
    """Writes samples to a tar file. Leaving the context ends it and writes sidecar and records.

    The file has a name of its own until then: of several that write the same shard at once, as
    on machines that were taken for lost, each replaces a whole file by a whole one. After an
    exception nothing is left.

    Args:
        records_path: where the shard's part of the split's index goes, see `shards.index`, and
            after it the digests of the samples' sources, see `shrink`.
    """

    def __init__(self, path: str, *, sidecar_path: str, records_path: str):
        super().__init__()
        self.path = path
        self.sidecar_path = sidecar_path
        self.records_path = records_path
        self.num_samples = 0
        self.num_bytes = 0
        self._sha256, self._digest = hashlib.sha256(), xxhash.xxh3_64()
        self._pending: list[bytes | memoryview] = []
        self._pending_bytes = 0
        self._sidecar = bytearray()
        self._records = bytearray()
        self._sources = bytearray()
        # Left in the opposite order: the end is written, the hash is done, the file gets its name.
        self._file = self.enter_context(replacing(path, buffering=0))
        # A third of the time is SHA-256, which leaves the interpreter free to read meanwhile.
        self._hasher = self.enter_context(ThreadPoolExecutor(1))
        self._hashed = self._hasher.submit(self._hash, b"")
        self.push(self._finish)

    def write(
        self,
        key: str,
        image: bytes | memoryview,
        *,
        extension: str,
        label: int,
        source: int = AS_STORED,
    ) -> None:
        """Append one sample: `<key>.<extension>` and `<key>.cls`."""
        image_member = self._append(f"{key}.{extension}", image)
        label_member = self._append(f"{key}.cls", b"%d" % label)
        self._sidecar += format_sidecar_line((image_member, label_member))
        start = image_member.start
        record = Record(
            start=start,
            checksum=checksum(image, label, self.num_samples),
            num_bytes=label_member.end - start,
            image_offset=image_member.offset - start,
            image_bytes=image_member.num_bytes,
            label_offset=label_member.offset - start,
            label_bytes=label_member.num_bytes,
            label=label,
            flags=HAS_CHECKSUM,
        )
        self._records += record.pack()
        self._sources += SOURCE.pack(source)
        self.num_samples += 1
        if self._pending_bytes >= _FLUSH_BYTES:
            self._flush()

    def _append(self, name: str, data: bytes | memoryview) -> Member:
        num_bytes = len(data)
        padding = bytes(-num_bytes % BLOCK)
        self._pending += (member_header(name.encode(), num_bytes), data, padding)
        member = Member(name, self.num_bytes + BLOCK, num_bytes)
        self._pending_bytes += BLOCK + num_bytes + len(padding)
        self.num_bytes += BLOCK + num_bytes + len(padding)
        return member

    def _flush(self) -> None:
        chunk = b"".join(self._pending)
        self._pending.clear()
        self._pending_bytes = 0
        self._hashed.result()
        self._hashed = self._hasher.submit(self._hash, chunk)
        rest = memoryview(chunk)
        while rest:
            rest = rest[self._file.write(rest) :]

    def _hash(self, chunk: bytes) -> None:
        self._sha256.update(chunk)
        self._digest.update(chunk)

    def record(self) -> dict:
        """What a manifest states of the shard, once it is closed, and the files as they were left.

        See `records` for the latter.
        """
        return {
            "num_samples": self.num_samples,
            "num_bytes": self.num_bytes,
            "sha256": self._sha256.hexdigest(),
            "files": {
                os.path.basename(self.path): [self.num_bytes, self._digest.hexdigest()],
                os.path.basename(self.sidecar_path): left_as(self._sidecar),
                os.path.basename(self.records_path): left_as(self._records + self._sources),
            },
        }

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        end = 2 * BLOCK
        end += -(self.num_bytes + end) % tarfile.RECORDSIZE
        self._pending.append(bytes(end))
        self.num_bytes += end
        self._flush()
        self._hashed.result()
        self._sidecar[:0] = sidecar_head(self.num_samples)
        write_atomically(self.sidecar_path, self._sidecar)
        write_atomically(self.records_path, self._records + self._sources)
