"""Writing result files: all or none, never half of one, never over somebody else's.

Text to disk only. A file may be replaced if it holds the signature that all our files hold.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from planner.errors import InputError

_HEAD_BYTES = 400  # the signature stands near the beginning of every file
_SIGNATURE = b"written by shardplan"


def write_files(folder: Path, texts: Mapping[str, str], force: bool = False) -> list[Path]:
    """Writes every text into `folder` (made if missing), or raises and leaves all as it was."""
    targets = {folder / name: text for name, text in texts.items()}
    for path in targets:
        _check_replaceable(path, force)
    made: list[tuple[Path, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in targets.items():
            made.append((_staged(path, text), path))
        _commit(made)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    finally:
        for temporary, _ in made:
            temporary.unlink(missing_ok=True)
    return list(targets)


def write_file(path: Path, text: str, force: bool = False) -> None:
    write_files(path.parent, {path.name: text}, force)


def _check_replaceable(path: Path, force: bool) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder")
    if force or not path.exists():
        return
    try:
        with path.open("rb") as file:
            ours = _SIGNATURE in file.read(_HEAD_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not ours:
        raise InputError(f"{path} was not written by this program", "--force replaces it")


def _staged(path: Path, text: str) -> Path:
    """`text` in a temporary file beside `path`, with the permissions of an ordinary file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _commit(made: list[tuple[Path, Path]]) -> None:
    """Moves every temporary file into place; a failure half way puts the old files back."""
    done: list[tuple[Path, Path | None]] = []
    try:
        for temporary, path in made:
            done.append((path, _backup(path)))
            os.replace(temporary, path)
    except BaseException:
        for path, backup in reversed(done):
            if backup is not None:
                os.replace(backup, path)
            else:
                path.unlink(missing_ok=True)
        raise
    for _, backup in done:
        if backup is not None:
            with contextlib.suppress(FileNotFoundError):
                backup.unlink()


def _backup(path: Path) -> Path | None:
    if not path.exists():
        return None
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old")
    os.close(handle)
    shutil.copy2(path, name)
    return Path(name)
