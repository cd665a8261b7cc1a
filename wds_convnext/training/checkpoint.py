"""Checkpoints: written whole or not at all, checked before a byte of them is believed.

A file is what torch.save writes plus one line with the SHA-256 of it: torch.load reads it as it
is (what follows a zip archive is ignored), and any flipped or missing byte is found here.
"""

import hashlib
import io
import os
import pickle
import re
from pathlib import Path

import torch

from wds_convnext.errors import CheckpointError
from wds_convnext.files import sync_folder

FORMAT = 1
_TRAILER = b"\nsha256:"
_TRAILER_BYTES = len(_TRAILER) + 64


class _HashingFile:
    """A file for writing that hashes what passes."""

    def __init__(self, file):
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(path: str | os.PathLike, content: dict) -> None:
    """Write a checkpoint: temp file, checksum, fsync, rename.

    Raises:
        CheckpointError: if it cannot be written (the file of that name stays as it was).
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            hashing = _HashingFile(file)
            torch.save({"format": FORMAT, **content}, hashing)
            file.write(_TRAILER + hashing.hash.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path)
    except (OSError, RuntimeError) as error:
        Path(temporary).unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written ({error}). Free some space.") from None


def load_checkpoint(path: str | os.PathLike) -> dict:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: if it is missing, damaged, or of another format.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}. Give a run folder or a .pt file."
        ) from None
    body, trailer = data[:-_TRAILER_BYTES], data[-_TRAILER_BYTES:]
    if trailer != _TRAILER + hashlib.sha256(body).hexdigest().encode():
        raise CheckpointError(
            f"{path}: damaged, or no checkpoint of wds-convnext (its checksum does not fit). "
            "Use another one of the run; plain state dicts go to --init-from."
        )
    try:
        content = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: whole, but holds more than weights and plain values "
            f"({str(error).splitlines()[0]}). It was not written by this version."
        ) from None
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {content.get('format')}, expected {FORMAT}. "
            "Read it with the version of wds-convnext that wrote it."
        )
    return content


def link_checkpoint(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Give a checkpoint a second name, atomically; it costs no space."""
    temporary = f"{target}.tmp"
    Path(temporary).unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        Path(temporary).write_bytes(Path(source).read_bytes())
    os.replace(temporary, target)
    sync_folder(target)


def prune_steps(folder: str | os.PathLike, *, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints named by step (`step-000001000.pt`)."""
    for path in step_checkpoints(folder)[keep:]:
        path.unlink()


def step_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run named by step, newest first."""
    names = [p for p in Path(folder).glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", p.name)]
    return sorted(names, reverse=True)


def load_newest(folder: str | os.PathLike, *, warn) -> dict:
    """The newest checkpoint of a run that is whole; damaged ones are passed over, with a warning.

    Raises:
        CheckpointError: if there is none.
    """
    last = Path(folder) / "last.pt"
    candidates = ([last] if last.exists() else []) + step_checkpoints(folder)
    for path in candidates:
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            warn(f"{error} Trying the one before it.")
    raise CheckpointError(
        f"{folder}: holds no whole checkpoint to resume from. "
        "Start afresh with --overwrite, or in another folder with --out."
    )
