"""What bytes are that are not what they should be: a line for the user instead of a puzzle."""

_CONVERT = "Convert it to JPEG, PNG or WebP"
_DECOMPRESS = "Decompress it: offsets into a compressed file cannot be read from"
_DOWNLOAD = "Download it again: a server sent this in place of the file"
_TIFF, _JP2 = ("a TIFF image", _CONVERT), ("a JPEG 2000 image", _CONVERT)
_JXL, _HEIC = ("a JPEG XL image", _CONVERT), ("a HEIC image", _CONVERT)
_KNOWN = {  # by the first bytes
    b"\x1f\x8b": ("gzip-compressed data", _DECOMPRESS),
    b"\x28\xb5\x2f\xfd": ("zstd-compressed data", _DECOMPRESS),
    b"\xfd7zXZ\0": ("xz-compressed data", _DECOMPRESS),
    b"BZh": ("bzip2-compressed data", _DECOMPRESS),
    b"PK\x03\x04": ("a zip archive", "Unpack it"),
    b"version https://git-lfs": ("a git-lfs pointer", "Fetch the file itself with git lfs pull"),
    b"<!doctype html": ("an HTML page", _DOWNLOAD),
    b"<html": ("an HTML page", _DOWNLOAD),
    b"<svg": ("an SVG drawing", _CONVERT),
    b"<?xml": ("an XML document", _DOWNLOAD),
    b"PAR1": ("a parquet file", "Convert it with wds-convnext shards"),
    b"\x89HDF": ("an HDF5 file", "Convert it"),
    b"%PDF": ("a PDF document", _CONVERT),
    b"8BPS": ("a Photoshop image", _CONVERT),
    b"II*\0": _TIFF,
    b"MM\0*": _TIFF,
    b"II+\0": _TIFF,
    b"MM\0+": _TIFF,
    b"\xff\x0a": _JXL,
    b"\0\0\0\x0cJXL ": _JXL,
    b"\xff\x4f\xff\x51": _JP2,
    b"\0\0\0\x0cjP  ": _JP2,
    b"\x93NUMPY": ("a numpy array", _CONVERT),
}
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), ("an AVIF image", _CONVERT)),
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"heim", b"heis"), _HEIC),
}


_IMAGES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM")


def begins_as_image(head: bytes) -> bool:
    """Whether bytes begin as a JPEG, PNG, GIF, BMP or WebP image does; 12 bytes decide."""
    return head.startswith(_IMAGES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def sniff(head: bytes | memoryview) -> tuple[str, str] | None:
    """What a file of another kind is, and what to do about it; None if the bytes say nothing.

    Args:
        head: its first bytes, 64 or more where it has them.
    """
    head = bytes(head[:64])
    if head[4:8] == b"ftyp":  # ISO base media: a box of brands
        return _BRANDS.get(head[8:12], ("a video or another file of MP4's kind", _CONVERT))
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, what in _KNOWN.items():
        if head.startswith(start) or (start[:1] == b"<" and text.startswith(start)):
            return what
    return None
