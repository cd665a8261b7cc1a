"""Checkpoint files, written whole or not at all and checked when read, and the facts they hold.

A file is what torch.save writes: a zip archive of uncompressed records, each with a CRC-32, which
torch.load does not compare (pytorch issue 126952) and `load_checkpoint` does. Version 0.1.0 added
a line with the SHA-256 of the archive; it is checked where it is found.
"""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, BinaryIO, NamedTuple

import torch

from wds_convnext.errors import CheckpointError
from wds_convnext.files import replacing, unwritable
from wds_convnext.stream.transforms import Preprocessing
from wds_convnext.training.precision import TORCHS_CONVOLUTIONS

FORMAT = 1
_TRAILER = b"\nsha256:"  # of version 0.1.0
_TRAILER_BYTES = len(_TRAILER) + 64
_END_OF_ARCHIVE = b"PK\5\6"
_END_BYTES = 22
_BLOCK_BYTES = 1 << 20


class Difference(NamedTuple):
    """One fact that is another now than it was then."""

    part: str  # "model", "data", "environment", "config", ...: a field of Facts
    name: str  # the field itself, or what differs within it
    then: Any
    now: Any


@dataclass(frozen=True)
class DataFacts:
    """What decides which sample comes at which step of a run."""

    shards: str  # the data set's digest
    seed: int
    global_batch_size: int
    shuffle_buffer: int
    num_lanes: int
    weighting: str | None = None  # its digest; None where every sample comes once an epoch
    repeats: int = 1  # how often each comes in a row


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says about the run that wrote it, besides the state of it."""

    model: str
    class_names: tuple[str, ...]
    batch_size: int  # per process
    preprocessing: Preprocessing
    data: DataFacts
    dataset: str = "unnamed"
    val_shards: str | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)  # versions, device, precision
    config: Mapping[str, Any] = field(default_factory=dict)  # the options, by name

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in checkpoints."""
        return {
            **asdict(self),
            "class_names": list(self.class_names),
            "num_classes": self.num_classes,
            "preprocessing": self.preprocessing.to_dict(),
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Facts":
        """The facts of a checkpoint of this version, an older or a newer one.

        Keys that are not known are ignored, and what has a default may be missing.

        Raises:
            CheckpointError: if something else is missing, or has a value not known here.
        """
        try:
            data = _known(DataFacts, stored["data"])
            preprocessing = Preprocessing.from_dict(stored["preprocessing"])
            known = _known(cls, stored) | {
                "class_names": tuple(stored["class_names"]),
                "preprocessing": preprocessing,
                "data": DataFacts(**data),
            }
            return cls(**known)
        except KeyError as error:
            reason = f"say nothing of {error}"
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            reason = f"cannot be read: {error}"
        raise CheckpointError(
            f"The checkpoint's facts {reason}. Read it with the version of wds-convnext that "
            "wrote it."
        )

    def differences(self, other: "Facts") -> Iterator[Difference]:
        """What is another in `other`, field by field; of the inner parts, what both have."""
        for part in (f.name for f in fields(self)):
            then, now = getattr(self, part), getattr(other, part)
            if part in ("preprocessing", "data", "environment", "config"):
                then, now = _plain(then), _plain(now)
                # Runs from before this fact was noted had torch's convolutions.
                if part == "environment" and "amp" in then:
                    then = {"convolutions": TORCHS_CONVOLUTIONS, **then}
                for name in (name for name in then if name in now):
                    if then[name] != now[name]:
                        yield Difference(part, name, then[name], now[name])
            elif then != now:
                yield Difference(part, part, then, now)


def _known(cls: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The stored values of a dataclass's fields; KeyError for one that is missed."""
    needed = {f.name for f in fields(cls) if f.default is f.default_factory is MISSING}
    for name in needed - stored.keys():
        raise KeyError(name)
    return {f.name: stored[f.name] for f in fields(cls) if f.name in stored}


def _plain(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else asdict(value)


def save_checkpoint(path: str | os.PathLike, content: dict) -> None:
    """Write a checkpoint: temporary file, fsync, rename.

    Raises:
        CheckpointError: if it cannot be written (the file of that name stays as it was).
    """
    try:
        with replacing(path) as file:
            torch.save({"format": FORMAT, **content}, file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(unwritable(path, error)) from None


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Its tensors are mapped from the file: they take no memory until they are copied, and the file
    stays open as long as one of them is referred to. Copy what is to be kept.

    Raises:
        CheckpointError: if it is missing, damaged, or of another format.
    """
    try:
        with open(path, "rb") as file:
            is_whole = _is_whole(file)
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}. Give a run folder or a .pt file."
        ) from None
    if not is_whole:
        raise CheckpointError(
            f"{path}: damaged, or not a checkpoint of wds-convnext. "
            "Use another one of the run; plain state dicts go to --init-from."
        )
    try:
        content = torch.load(os.fspath(path), map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a pickle that was not written by us makes it raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{path}: whole, but holds more than weights and plain values ({reason}). "
            "It was not written by this version."
        ) from None
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(
            f"{path}: not a checkpoint of wds-convnext. "
            "Give one of a run; plain state dicts go to --init-from."
        )
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: format {content['format']}, expected {FORMAT}. "
            "Read it with the version of wds-convnext that wrote it."
        )
    return content


def step_and_facts(checkpoint: Mapping[str, Any], path: str | os.PathLike) -> tuple[int, Facts]:
    """How many steps a checkpoint's run had done, and its facts.

    Args:
        path: of its file, for the message.
    Raises:
        CheckpointError: if it lacks them, or has a value not known here.
    """
    try:
        with taking_over():
            return checkpoint["step"], Facts.from_dict(checkpoint["facts"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _is_whole(file: BinaryIO) -> bool:
    """Whether a file is an archive with nothing but right checksums, first byte to last.

    Not checked is what neither this nor torch.load looks at, such as dates and padding.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TRAILER_BYTES))
    trailer = file.read()
    if trailer.startswith(_TRAILER):
        size -= len(trailer)
        if trailer != _TRAILER + _sha256(file, size).encode():
            return False
    # zipfile puts up with bytes before and after an archive. Here they mean that some are missing
    # or added, and torch.load may look for its records elsewhere.
    file.seek(max(0, size - _END_BYTES))
    end = file.read(_END_BYTES)
    if not end.startswith(_END_OF_ARCHIVE) or not end.endswith(b"\0\0"):  # the comment's length
        return False
    num_records = int.from_bytes(end[10:12], "little")
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            return (len(records) == num_records or num_records == 0xFFFF) and (
                records[0].header_offset == 0
                and all(map(_is_plain, records))
                and archive.testzip() is None
            )
    except (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError, IndexError):
        return False  # what zipfile raises on fields that make no sense


def _is_plain(record: zipfile.ZipInfo) -> bool:
    # torch.load gives memory as it finds it for a record that is marked as a folder (bit 4).
    return record.compress_type == zipfile.ZIP_STORED and not record.external_attr & 0x10


def _sha256(file: BinaryIO, num_bytes: int) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while num_bytes > 0:
        block = file.read(min(num_bytes, _BLOCK_BYTES))
        digest.update(block)
        num_bytes -= len(block)
    return digest.hexdigest()


@contextmanager
def taking_over() -> Iterator[None]:
    """Within this context, values of a checkpoint that do not fit are an error of it."""
    try:
        yield
    except KeyError as error:
        reason = f"holds no {error}"
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = f"does not fit: {' '.join(str(error).split())}"
    else:
        return
    raise CheckpointError(f"The checkpoint {reason[:300]}. Use another one of the run.")


def load_weights(model: torch.nn.Module, checkpoint: dict[str, Any]) -> None:
    """The weights that a checkpoint is evaluated with: their average, if it has one."""
    model.load_state_dict(checkpoint["model"])
    if checkpoint.get("ema"):
        model.load_state_dict(checkpoint["ema"], strict=False)  # it holds no buffers
