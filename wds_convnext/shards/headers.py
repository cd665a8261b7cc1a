"""The headers of a tar file: who stands where, without trusting a number that a header states.

The standard library's `tarfile` loops for ever on a negative size, allocates whatever an extension
header asks for, and takes a damaged header for the end of the archive. Here a walk costs one read
of a block for each member, and every header is right or an error.

Source: POSIX.1-2017, pax; GNU tar manual, "Basic Tar Format".
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512  # bytes; a member is a header of one block, then its data padded to whole blocks
_MAX_EXTENSION = 1 << 20  # bytes of extension headers before one member
_LONG_NAME, _LONG_LINK, _PAX, _PAX_OF_ALL, _SPARSE = b"L", b"K", (b"x", b"X"), b"g", b"S"
_FILES = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,7}) ([^=\n]+)=")


class Header(NamedTuple):
    """A member as its headers state it: where they start, and where its data stands."""

    name: str
    type: bytes  # b"0" for a file, b"1" a hard link, b"2" a symbolic link, b"5" a folder, …
    start: int
    offset: int
    num_bytes: int

    @property
    def is_file(self) -> bool:
        return self.type in _FILES

    @property
    def is_folder(self) -> bool:
        return self.type == b"5"

    @property
    def end(self) -> int:
        """Where the next header stands."""
        return self.offset if self.type in _WITHOUT_DATA else end_of(self.offset, self.num_bytes)


def end_of(offset: int, num_bytes: int) -> int:
    """Where a member's last block ends, given where its data starts."""
    return offset + -(-num_bytes // BLOCK) * BLOCK


def walk_headers(read: Callable[[int, int], bytes]) -> Iterator[Header]:
    """The members of a tar, in order, up to a block of zeros or the end of the file.

    Args:
        read: gives so many bytes from an offset on; fewer where the file ends.
    Raises:
        ValueError: if a header is damaged, or of a kind that is not read.
    """
    at = start = 0
    name, num_bytes = None, None  # from the extension headers before a member
    while True:
        block = read(BLOCK, at)
        if len(block) < BLOCK or not block.strip(b"\0"):
            if at != start:
                raise ValueError(f"extension headers without a member at byte {start:,}")
            return
        kind, size = block[156:157], _checked_size(block, at)
        if kind in (_LONG_NAME, _LONG_LINK, *_PAX, _PAX_OF_ALL):
            if size + at - start > _MAX_EXTENSION:
                raise ValueError(f"extension headers of {size + at - start:,} bytes at byte {at:,}")
            data = read(size, at + BLOCK)
            if kind == _LONG_NAME:
                name = _text(data)
            elif kind != _LONG_LINK:
                stated = _read_pax(data, at)
                if kind == _PAX_OF_ALL and stated:
                    raise ValueError(f"a name or size for all members at byte {at:,}")
                name = _text(stated[b"path"]) if b"path" in stated else name
                num_bytes = _decimal(stated[b"size"], at) if b"size" in stated else num_bytes
            at = end_of(at + BLOCK, size)
            continue
        if kind == _SPARSE:
            raise ValueError(f"a sparse file at byte {at:,}; write the tar without --sparse")
        if num_bytes is not None:
            size = num_bytes
        name = header_name(block) if name is None else name
        if kind == b"\0" and name.endswith("/"):  # a folder, before there was a type for it
            kind = b"5"
        header = Header(name, kind, start, at + BLOCK, size)
        yield header
        at = start = header.end
        name = num_bytes = None


def header_name(header: bytes) -> str:
    """The name that a header states, its prefix included."""
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345] != 0:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def announced_bytes(header: bytes) -> int | None:
    """The size that a tar header states (octal, or base 256); None if it is not a header."""
    if header[257:262] != b"ustar":
        return None
    field = header[124:136]
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    try:
        return int(digits or b"0", 8) if digits.isdigit() or not digits else None
    except ValueError:
        return None


def _checked_size(block: bytes, at: int) -> int:
    """The size that a header states, after a look at its checksum.

    Raises:
        ValueError: if it is not a header of the formats that are read.
    """
    counted = block[:148] + b" " * 8 + block[156:]
    stated = block[148:156].partition(b"\0")[0].strip()
    found = int(stated, 8) if re.fullmatch(rb"[0-7]+", stated) else -1
    # Some old writers counted bytes over 127 as negative numbers.
    if found != sum(counted) and found != sum(counted) - 256 * sum(b > 127 for b in counted):
        raise ValueError(f"no header of a member at byte {at:,}")
    if block[257:262] != b"ustar":
        raise ValueError(f"a header of the V7 format at byte {at:,}; write it as ustar, gnu or pax")
    size = announced_bytes(block)
    if size is None:
        raise ValueError(f"a member without a size at byte {at:,}")
    return size


def _read_pax(data: bytes, at: int) -> dict[bytes, bytes]:
    """The name and the size in a pax header, as far as it states them."""
    stated, position = {}, 0
    while position < len(data) and data[position]:
        record = _PAX_RECORD.match(data, position)
        end = position + int(record[1]) if record else 0
        if not record or not record.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise ValueError(f"a damaged pax header at byte {at:,}")
        if record[2].startswith(b"GNU.sparse."):
            raise ValueError(f"a sparse file at byte {at:,}; write the tar without --sparse")
        if record[2] in (b"path", b"size"):
            stated[record[2]] = data[record.end() : end - 1]
        position = end
    return stated


def _decimal(digits: bytes, at: int) -> int:
    if not re.fullmatch(rb"[0-9]{1,18}", digits):
        raise ValueError(f"a size that is not a number at byte {at:,}")
    return int(digits)


def _text(name: bytes) -> str:
    return name.partition(b"\0")[0].decode("utf-8", "surrogateescape")
