"""What a job is told when it starts, with QEMU's names for it."""

import enum
import errno
from dataclasses import dataclass
from pathlib import Path

from fleecefs.block.epoch import OnCbwError
from fleecefs.block.mirror import GRANULARITY, GRANULARITY_MAX, GRANULARITY_MIN
from fleecefs.errors import NotUsable
from fleecefs.units import MiB, format_size

# Beyond it a backup takes the guest's time and its target's, and is not faster.
WORKERS = 24
# Linux lets in one write to a file at a time: another worker reads meanwhile, and more
# wait for each other. 16 have 0.8 of the speed of two within tmpfs.
MIRROR_WORKERS = 2
# QEMU's: so much data in flight.
BUF_SIZE = 16 * MiB


class OnError(enum.Enum):
    """What a job does when it can not read its source or write its target."""

    REPORT = "report"  # fail
    IGNORE = "ignore"  # try again later, and never leave it out
    STOP = "stop"  # pause, and try again when told to resume
    ENOSPC = "enospc"  # stop if there is no space, report everything else
    AUTO = "auto"  # for jobs the same as enospc


class Action(enum.Enum):
    """What follows from an OnError, for one error."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"


def action_on(error: OSError, policy: OnError) -> Action:
    """Return what a job with this policy does about an error."""
    if policy in (OnError.ENOSPC, OnError.AUTO):
        is_full = error.errno == errno.ENOSPC
        return Action.STOP if is_full else Action.REPORT
    return Action(policy.value)


class Sync(enum.Enum):
    """Which part of a disk a backup copies."""

    FULL = "full"  # all of it
    TOP = "top"  # what is allocated in the source
    NONE = "none"  # what the guest overwrites from now on
    INCREMENTAL = "incremental"  # what is dirty in a bitmap, with BitmapMode.ON_SUCCESS
    BITMAP = "bitmap"  # what is dirty in a bitmap

    @property
    def is_of_bitmap(self) -> bool:
        """Whether a bitmap says what is copied."""
        return self in (Sync.INCREMENTAL, Sync.BITMAP)


class BitmapMode(enum.Enum):
    """What becomes of a bitmap when the job that uses it ends."""

    ON_SUCCESS = "on-success"  # it begins anew if the job ends well
    NEVER = "never"  # it stays as it is
    ALWAYS = "always"  # it begins anew; what was not copied stays dirty


class Format(enum.Enum):
    """What kind of file a target is."""

    RAW = "raw"
    QCOW2 = "qcow2"


@dataclass(frozen=True)
class BackupOptions:
    """One backup. What is None is as the mount has it.

    `backing` is the backup that a new qcow2 file adds to. `fallback`: a bitmap that can
    not be used makes it a full backup; `fell_back` is why it has become one.
    """

    device: str
    target: Path
    job_id: str
    sync: Sync = Sync.FULL
    # Bytes a second; 0 is as fast as it goes.
    speed: int = 0
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    on_cbw_error: OnCbwError | None = None
    cbw_timeout: float | None = None
    workers: int = WORKERS
    auto_finalize: bool = True
    auto_dismiss: bool = True
    bitmap: str | None = None
    bitmap_mode: BitmapMode | None = None
    format: Format = Format.RAW
    backing: Path | None = None
    backing_format: Format | None = None
    fallback: bool = False
    fell_back: str | None = None


class CopyMode(enum.Enum):
    """When what the guest writes comes to the target of a mirror."""

    BACKGROUND = "background"  # later
    WRITE_BLOCKING = "write-blocking"  # before its write is answered


@dataclass(frozen=True)
class MirrorOptions:
    """One mirror.

    `buf_size` is how much data is in flight at the most. `is_auto`: if the guest writes
    faster than it copies, its copy mode becomes write-blocking.
    """

    device: str
    target: Path
    job_id: str
    sync: Sync = Sync.FULL
    # Bytes a second, in the background; 0 is as fast as it goes.
    speed: int = 0
    granularity: int = GRANULARITY
    buf_size: int = BUF_SIZE
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    copy_mode: CopyMode = CopyMode.BACKGROUND
    is_auto: bool = False
    target_is_zero: bool = False
    workers: int = MIRROR_WORKERS
    auto_finalize: bool = True
    auto_dismiss: bool = True


@dataclass(frozen=True)
class VerifyOptions:
    """One comparison of a disk with a backup of it.

    `bitmap` has what may differ, nothing without one. A `format` that is None is found
    out.
    """

    device: str
    target: Path
    job_id: str
    bitmap: str | None = None
    format: Format | None = None
    # Bytes a second; 0 is as fast as it goes.
    speed: int = 0
    auto_dismiss: bool = True


def check_options(options: BackupOptions) -> None:
    """Raise NotUsable for what makes no sense together; QEMU's rules and words."""
    if options.workers < 1:
        raise NotUsable(f"{options.workers} workers: at least one is needed")
    if options.speed < 0:
        raise NotUsable("a speed is not negative")
    if options.cbw_timeout is not None and options.cbw_timeout < 0:
        raise NotUsable("a cbw-timeout is not negative")
    _check_bitmap(options.sync, options.bitmap, options.bitmap_mode)
    if options.fallback and options.bitmap is None:
        raise NotUsable("a fallback is for a backup with a bitmap")
    if options.format is Format.RAW:
        if options.backing is not None:
            raise NotUsable("a raw target has no backing file: use format qcow2")
    elif options.sync is Sync.NONE:
        raise NotUsable("sync mode 'none' needs a raw target")
    elif options.sync is Sync.TOP and options.backing is not None:
        raise NotUsable(
            "sync mode 'top' has no backing file: what is not allocated would be seen "
            "through"
        )
    if options.backing_format is not None and options.backing is None:
        raise NotUsable("a backing format is for a backing file")


def check_mirror(options: MirrorOptions) -> None:
    """Raise NotUsable for what makes no sense; QEMU's rules and words."""
    if options.sync not in (Sync.FULL, Sync.TOP, Sync.NONE):
        raise NotUsable(f"Sync mode '{options.sync.value}' not supported")
    if options.workers < 1:
        raise NotUsable(f"{options.workers} workers: at least one is needed")
    if options.speed < 0:
        raise NotUsable("a speed is not negative")
    if options.buf_size < 1:
        raise NotUsable(f"a buf-size of {options.buf_size} bytes: nothing would move")
    granularity = options.granularity
    is_power = granularity > 0 and granularity.bit_count() == 1
    if not is_power or not GRANULARITY_MIN <= granularity <= GRANULARITY_MAX:
        raise NotUsable(
            f"granularity of {granularity} bytes: has to be a power of two from "
            f"{GRANULARITY_MIN} to {format_size(GRANULARITY_MAX)}"
        )


def _check_bitmap(sync: Sync, bitmap: str | None, mode: BitmapMode | None) -> None:
    if sync.is_of_bitmap and bitmap is None:
        raise NotUsable(
            f"must provide a valid bitmap name for '{sync.value}' sync mode"
        )
    if bitmap is None:
        if mode is not None:
            raise NotUsable("Cannot specify bitmap sync mode without a bitmap")
        return
    if sync is Sync.INCREMENTAL and mode not in (None, BitmapMode.ON_SUCCESS):
        raise NotUsable(
            "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'"
        )
    if sync is not Sync.INCREMENTAL and mode is None:
        raise NotUsable("Bitmap sync mode must be given when providing a bitmap")
    if sync is Sync.NONE:
        raise NotUsable("sync mode 'none' does not produce meaningful bitmap outputs")
    if mode is BitmapMode.NEVER and not sync.is_of_bitmap:
        raise NotUsable(
            "Bitmap sync mode 'never' has no meaningful effect when combined with sync "
            f"mode '{sync.value}'"
        )
