"""Files that appear whole or not at all, and stay after a power cut."""

import contextlib
import errno
import os
import secrets
import socket
from pathlib import Path

_SUFFIX = ".tmp"
# What file systems without hard links say.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}
_HOST = socket.gethostname().split(".")[0]


def write_file(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Writes a file durably: a temporary one beside it, synchronised, renamed, and the folder synchronised.

    Its mode is that of any new file, by the umask. An interrupted call leaves at most a temporary file behind, which
    :func:`remove_abandoned` knows.

    Args:
        path: in a folder that exists.
        data: all of it.
        replace: whether an old file gives way; two writers that must not replace each other agree on who was first.

    Raises:
        FileExistsError: the file is there, and is not to be replaced.
        OSError: whatever else the file system says; nothing was written then.
    """
    temporary = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}{_SUFFIX}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(handle, rest) :]
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


def whole_path(path: str | Path) -> Path:
    """A path that means the same after the working directory has changed, and in other processes."""
    return Path(path).expanduser().absolute()


def move_file(path: Path, target: Path) -> None:
    """Renames a file, never in the place of another.

    Raises:
        FileExistsError: there is a file of that name.
        OSError: whatever else the file system says.
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
    """Makes a folder, and those above it, durably; one that is there is left as it is.

    Raises:
        OSError: it cannot be made.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):  # another process was sooner
        os.mkdir(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """What was renamed in a folder is on the disk after this."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_temporary(path: Path) -> bool:
    """Whether a file is one of :func:`write_file`, which its writer has not finished."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


def remove_abandoned(folder: Path) -> list[Path]:
    """Removes the temporary files of this machine's processes that are no more, in a folder and those below."""
    removed = []
    for path in folder.rglob(f".*{_SUFFIX}"):
        *_, host, process, _, _ = ("", "", "", *path.name.split("."))
        if host == _HOST and process.isdecimal() and not _runs(int(process)):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True
