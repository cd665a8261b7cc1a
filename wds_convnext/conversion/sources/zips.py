"""Members of a zip file by offset: where each stands, and its bytes, without unpacking the file.

The standard library's `zipfile` keeps about a kilobyte for every member; here the directory is read
as a stream. No number that it states is trusted with memory, and every member is compared with its
CRC-32. Source: PKWARE's APPNOTE.TXT 6.3.10 (4.3.7 local header, 4.3.12 directory, 4.3.14 zip64).
"""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from wds_convnext.conversion.sources.images import has_image_suffix
from wds_convnext.conversion.sources.places import Entry, is_shown
from wds_convnext.door import read_head
from wds_convnext.errors import DataError, UsageError
from wds_convnext.files import read_at
from wds_convnext.shards.limits import MAX_BYTES
from wds_convnext.shards.sniff import begins_as_image

_LOCAL = struct.Struct("<4s22xHH")  # lengths of name and extra field
_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<4sIQI")
_MEMBER = struct.Struct("<4sBBHHHHHIIIHHHHHII")
_MOST_COMMENT = 1 << 16
_LARGE16, _LARGE32 = 0xFFFF, 0xFFFFFFFF  # stands for: see the zip64 record
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _UTF8, _HIDDEN_DIRECTORY = 1, 1 << 11, 1 << 13  # flags
_UNIX, _LINK = 3, 0o120000
_MUCH, _MAX_RATIO = 1 << 26, 200  # bytes; how much smaller encoded images can be packed


def is_zip(path: str) -> bool:
    """Whether a file is a zip, by its first bytes, or by its name where it begins otherwise."""
    return read_head(path, 4) in (b"PK\3\4", b"PK\5\6") or path.lower().endswith(".zip")


class _Directory(NamedTuple):
    start: int
    num_bytes: int
    num_members: int
    shift: int  # bytes before the archive, as of one that unpacks itself


class ZipArchive:
    """A zip file, open: its members, and their bytes by place.

    Raises:
        UsageError: if it is damaged, in several parts, or encrypted.
        OSError: if it cannot be read.
    """

    is_sequential = False

    def __init__(self, path: str):
        self.path = path
        self._file = io.BufferedReader(io.FileIO(path))
        try:
            self._directory = self._find_directory()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "ZipArchive":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def entries(self) -> Iterator[Entry]:
        """The files that are meant to be seen, in the order of the directory.

        Raises:
            UsageError: if an image is encrypted, or compressed otherwise than by deflate.
        """
        directory = self._directory
        file, left = self._file, directory.num_bytes
        file.seek(directory.start)
        for _ in range(directory.num_members):
            header = file.read(_MEMBER.size)
            if len(header) < _MEMBER.size or not header.startswith(b"PK\1\2"):
                raise self._damaged("its directory ends early")
            (_, _, system, _, flags, method, _, _, crc, stored, size, len_name, len_extra,
             len_comment, _, _, mode, at) = _MEMBER.unpack(header)  # fmt: skip
            name, extra = file.read(len_name), file.read(len_extra)
            file.seek(len_comment, os.SEEK_CUR)
            left -= _MEMBER.size + len_name + len_extra + len_comment
            if left < 0:
                raise self._damaged("its directory is longer than it states")
            size, stored, at = self._wide(extra, (size, stored, at))
            name = _plain_name(name, flags, system)
            is_link = system == _UNIX and (mode >> 16) & 0o170000 == _LINK
            if name.endswith(b"/") or is_link or not is_shown(name):
                continue
            entry = Entry(name, at + directory.shift, stored, size, crc, method)
            if flags & _ENCRYPTED:
                raise UsageError(
                    f"{self.path}: {os.fsdecode(name)} is encrypted. Write the zip without a "
                    "password."
                )
            if method not in (_STORED, _DEFLATED):
                raise UsageError(
                    f"{self.path}: {os.fsdecode(name)} is compressed by method {method}; expected "
                    "stored or deflated members. Write the zip with zip -r."
                )
            is_image = has_image_suffix(os.fsdecode(name)) or begins_as_image(self._head(entry))
            yield entry._replace(is_image=is_image)

    def read(self, entry: Entry) -> bytes:
        """The bytes of a member.

        Raises:
            DataError: if it is damaged, or of a size that no image has.
        """
        stored, size = entry.stored, entry.num_bytes
        if size > MAX_BYTES or size > _MUCH + _MAX_RATIO * stored:
            raise DataError(f"too large: {stored:,} bytes in the zip unpack to {size:,}")
        data = self._stored(entry, stored)
        if entry.method == _DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error as error:
                raise DataError(f"does not unpack ({error})") from None
        if len(data) != size or zlib.crc32(data) != entry.crc:
            raise DataError("not the bytes that were packed (CRC-32)")
        return data

    def _head(self, entry: Entry) -> bytes:
        try:
            data = self._stored(entry, min(entry.stored, 256))
            if entry.method == _DEFLATED:
                return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, 64)
            return data
        except (DataError, zlib.error):
            return b""

    def _stored(self, entry: Entry, num_bytes: int) -> bytes:
        """The first bytes of a member as they stand in the file."""
        try:
            file, at = self._file.fileno(), entry.offset
            header = read_at(file, _LOCAL.size, at)
            signature, len_name, len_extra = _LOCAL.unpack(header)
            data = read_at(file, num_bytes, at + _LOCAL.size + len_name + len_extra)
        except (OSError, OverflowError, struct.error) as error:
            raise DataError(f"cannot be read ({error})") from None
        if signature != b"PK\3\4" or len(data) < num_bytes:
            raise DataError("not where the zip's directory says")
        return data

    def _find_directory(self) -> _Directory:
        size = os.fstat(self._file.fileno()).st_size
        tail_at = max(0, size - _END.size - _MOST_COMMENT)
        tail = read_at(self._file.fileno(), size - tail_at, tail_at)
        at = tail.rfind(b"PK\5\6")
        if at < 0 or at + _END.size > len(tail):
            raise self._damaged("it has no directory at its end")
        _, disk, first_disk, _, num_members, num_bytes, start, _ = _END.unpack_from(tail, at)
        end = tail_at + at  # of the directory, or of the zip64 records behind it
        locator = read_at(self._file.fileno(), _LOCATOR64.size, max(0, end - _LOCATOR64.size))
        if locator.startswith(b"PK\6\7"):
            end -= _LOCATOR64.size + _END64.size
            record = read_at(self._file.fileno(), _END64.size, max(0, end))
            if len(record) < _END64.size or not record.startswith(b"PK\6\6"):
                raise self._damaged("its zip64 record is not in its place")
            disk, first_disk, _, num_members, num_bytes, start = _END64.unpack(record)[4:]
        if disk or first_disk:
            raise UsageError(f"{self.path}: one of several parts of a zip. Join them: zip -s 0.")
        shift = end - num_bytes - start
        if shift < 0 or num_members * _MEMBER.size > num_bytes:
            raise self._damaged("its directory does not fit the file")
        return _Directory(start + shift, num_bytes, num_members, shift)

    def _wide(self, extra: bytes, narrow: tuple[int, int, int]) -> Iterator[int]:
        """Size, stored size and offset, from the zip64 field where they do not fit 32 bits."""
        wide = b""
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<HH", extra, at)
            if kind == 1:
                wide = extra[at + 4 : at + 4 + length]
            at += 4 + length
        for value in narrow:
            if value == _LARGE32:
                if len(wide) < 8:
                    raise self._damaged("a zip64 size is missing")
                value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
                if value >= 1 << 62:
                    raise self._damaged(f"a size of {value:,}")
            yield value

    def _damaged(self, reason: str) -> UsageError:
        return UsageError(f"{self.path}: not a whole zip file: {reason}. Copy it again.")


def _plain_name(name: bytes, flags: int, system: int) -> bytes:
    """A member's path in UTF-8, with slashes: some tools of Windows write others."""
    if not flags & _UTF8:
        try:
            name.decode()
        except UnicodeDecodeError:
            name = name.decode("cp437").encode()
    if system != _UNIX and b"/" not in name:
        name = name.replace(b"\\", b"/")
    return name
