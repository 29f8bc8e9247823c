"""What a request can fail with.

Every error is an OSError, so a failed pread(2) of the disk below and a refusal of
our own reach the caller the same way: as an errno.
"""

import errno


class Error(OSError):
    """Base of our own errors. A subclass names the errno it answers with."""

    code = errno.EIO

    def __init__(self, message: str) -> None:
        super().__init__(self.code, message)

    def __str__(self) -> str:
        return str(self.strerror)


class SnapshotLost(Error):
    """The snapshot is broken or deleted: it has no past left to show."""


class FlushFailed(Error):
    """An earlier flush of this disk failed, so no later one can be trusted."""


class NotFound(Error):
    """There is no disk, snapshot or mount of that name."""

    code = errno.ENOENT


class NameTaken(Error):
    """A snapshot of that name exists."""

    code = errno.EEXIST


class BadName(Error):
    """A name that a disk or a snapshot can not have."""

    code = errno.EINVAL


class NameTooLong(BadName):
    """A name longer than a disk or a snapshot can have."""

    code = errno.ENAMETOOLONG


class Refused(Error):
    """What was asked for is not allowed."""

    code = errno.EPERM


class VerbRejected(Error):
    """The job is in a status that does not accept the verb."""

    code = errno.EPERM


class ReadOnly(Error):
    """A write to a snapshot."""

    code = errno.EROFS


class Busy(Error):
    """Somebody else uses it."""

    code = errno.EBUSY


class NotUsable(Error):
    """A file, directory or option that can not be used as what it was given for."""

    code = errno.EINVAL


class NoSpace(Error):
    """The end of a disk, or the limit of a store."""

    code = errno.ENOSPC


class TimedOut(Error):
    """Preserving took longer than cbw-timeout."""

    code = errno.ETIMEDOUT


class Unsupported(Error):
    """An operation this kind of image does not have."""

    code = errno.EOPNOTSUPP


class Differs(Error):
    """A backup is not like its disk where it should be."""


class Abandoned(Exception):
    """The guest's request was taken over, because the copy it waited for hung.

    Not an OSError: nobody waits for an answer any more, and none may be given.
    """


def describe(error: OSError) -> str:
    """Return what went wrong and with which file, for people: no errno, no quotes."""
    text = error.strerror or str(error)
    return f"{error.filename}: {text}" if error.filename else text
