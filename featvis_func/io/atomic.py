"""Atomic and durable file operations."""

import contextlib
import errno
import os
import secrets
import socket
from pathlib import Path

_SUFFIX = ".tmp"
# Errors of file systems without hard links.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}
_HOST = socket.gethostname().split(".")[0]


def write_file(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write a file atomically and durably.

    The data is written to a temporary file in the same folder and synchronised to disk; the file is then renamed and
    the folder synchronised. The file mode follows the umask. An interrupted call leaves at most a temporary file, which
    :func:`remove_abandoned` removes.

    Args:
        path: the file to write, in an existing folder.
        data: the contents.
        replace: whether to replace an existing file. If ``False``, exactly one of several concurrent writers succeeds.

    Raises:
        FileExistsError: If the file exists and ``replace`` is ``False``.
        OSError: If any other file operation fails. Unless synchronising the folder failed, the target is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}{_SUFFIX}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            remaining = memoryview(data)
            while remaining:
                remaining = remaining[os.write(handle, remaining) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        if replace:
            os.replace(temporary, path)
        else:
            move_file(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def absolute_path(path: str | Path) -> Path:
    """Expand ``~`` and make a path absolute, so that it does not depend on the working directory."""
    return Path(path).expanduser().absolute()


def move_file(path: Path, target: Path) -> None:
    """Rename a file without replacing an existing one.

    Raises:
        FileExistsError: If the target exists.
        OSError: If any other file operation fails.
    """
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        os.replace(path, target)
    else:
        os.unlink(path)


def make_folder(path: Path) -> None:
    """Create a folder and its parents durably, if they do not exist.

    Raises:
        OSError: If a folder cannot be created.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):  # Another process created it first.
        os.mkdir(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Synchronise a folder to disk, so that renamed files survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_temporary(path: Path) -> bool:
    """Return whether a file is an unfinished temporary file of :func:`write_file`."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


def remove_abandoned(folder: Path) -> list[Path]:
    """Remove the temporary files left in a folder tree by terminated processes of this machine.

    Returns:
        The removed files.
    """
    removed = []
    for path in folder.rglob(f".*{_SUFFIX}"):
        *_, host, process, _, _ = ("", "", "", *path.name.split("."))
        if host == _HOST and process.isdecimal() and not _is_running(int(process)):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # The process belongs to another user.
        return True
    return True
