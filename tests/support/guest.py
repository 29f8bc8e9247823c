"""A guest: Linux in a virtual machine whose disk is a file.

The kernel is Debian's for clouds, unpacked, not installed; busybox and the tools of
ext4 are in an initramfs made here. The guest makes a file system on its disk, and
writes and verifies files on it as often as it is told to on its console.
"""

import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.support.mount import PATIENCE, run, wait_until

PACKAGE = "linux-image-cloud-amd64"

# For the whole of a guest's boot, emulated on a busy machine.
BOOT_SECONDS = 120.0

# What the guest's kernel or our script says when something is wrong.
COMPLAINTS = (
    "I/O error",
    "EXT4-fs error",
    "EXT4-fs warning",
    "Kernel panic",
    "BUG:",
    "blocked for more than",
    "FAILED",
)

# Found by the kernel in the order in which they are needed.
MODULES = ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"]

TOOLS = ["mke2fs", "e2fsck"]

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
stty -echo

try() {
    "$@" || echo "FAILED: $*"
}

fill() {
    # Random and each time another; more than this would take long to make.
    { echo "$1" && cat /tmp/random; } >/tmp/data
    cp /tmp/data "/mnt/$1.whole"
    dd if=/tmp/data of=/mnt/in-place bs=4k seek="$1" conv=notrunc 2>/dev/null
    mkdir "/mnt/$1"
    for i in 1 2 3 4 5 6 7 8 9; do
        head -c "$i$i$i$i" /tmp/data >"/mnt/$1/$i"
    done
    sync
}

verify() {
    echo 3 >/proc/sys/vm/drop_caches
    try cmp /tmp/data "/mnt/$1.whole"
    dd if=/mnt/in-place bs=4k skip="$1" 2>/dev/null | try cmp /tmp/data -
    for i in 1 2 3 4 5 6 7 8 9; do
        head -c "$i$i$i$i" /tmp/data | try cmp - "/mnt/$1/$i"
    done
}

for module in /modules/*; do
    try insmod "$module"
done
until [ -b /dev/vda ]; do
    sleep 0.1
done
try dd if=/dev/urandom of=/tmp/random bs=64k count=96 2>/dev/null
try /sbin/mke2fs -q -t ext4 /dev/vda
try mount -t ext4 -o errors=continue /dev/vda /mnt
echo READY
while read -r command number; do
    case $command in
        round)
            try fill "$number"
            verify "$number"
            rm -rf "/mnt/$((number - 4))" "/mnt/$((number - 4)).whole"
            try fstrim /mnt
            echo "VERIFIED $number"
            ;;
        end)
            try umount /mnt
            try /sbin/e2fsck -fn /dev/vda
            dmesg
            echo DONE
            poweroff -f
            ;;
    esac
done
"""


class Kernel(NamedTuple):
    """A kernel, and its modules in the order in which they have to be loaded."""

    image: Path
    modules: list[Path]


def fetch_kernel() -> Kernel:
    """Download and unpack the kernel's package, once for all tests."""
    package = _package()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    directory = cache / "fleecefs-tests" / package
    if not directory.exists():
        _unpack(package, directory)
    (image,) = directory.glob("boot/vmlinuz-*")
    found = {path.stem: path for path in directory.glob("lib/modules/**/*.ko")}
    return Kernel(image, _in_order(found))


def _package() -> str:
    """Return the name of the package that has the kernel itself."""
    pattern = re.compile(r"Depends: (linux-image-\S+-cloud-amd64)$", re.MULTILINE)
    found = pattern.search(run("apt-cache", "depends", PACKAGE))
    if found is None:
        run("apt-get", "-q", "update")
        found = pattern.search(run("apt-cache", "depends", PACKAGE))
    assert found is not None, f"{PACKAGE} depends on no kernel"
    return found[1]


def _unpack(package: str, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        download = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download"]
        done = subprocess.run([*download, package], cwd=temporary, check=False)
        if done.returncode != 0:
            # What it knows may be older than the mirror.
            run("apt-get", "-q", "update")
            subprocess.run([*download, package], cwd=temporary, check=True)
        (archive,) = Path(temporary).glob("*.deb")
        unpacked = Path(temporary, "root")
        run("dpkg-deb", "--extract", archive, unpacked)
        unpacked.rename(directory)


def _in_order(found: dict[str, Path]) -> list[Path]:
    """Return MODULES and what they need, without what the kernel has built in."""
    ordered: list[Path] = []

    def add(name: str) -> None:
        path = found.get(name) or found.get(name.replace("_", "-"))
        if path is None or path in ordered:
            return
        depends = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        assert depends is not None
        for each in depends[1].decode().split(","):
            add(each)
        ordered.append(path)

    for name in MODULES:
        add(name)
    return ordered


def make_initramfs(kernel: Kernel) -> bytes:
    """Return an archive in cpio's "new ASCII" format (cpio(5))."""
    archive = _Archive()
    for name in "bin", "dev", "lib", "lib64", "mnt", "modules", "proc", "sys", "tmp":
        archive.add(name, 0o40755)
    archive.add("dev/console", 0o20600, device=(5, 1))
    archive.add("init", 0o100755, INIT.encode())
    archive.add_file("bin/busybox", _which("busybox"))
    for index, path in enumerate(kernel.modules):
        archive.add_file(f"modules/{index:02}-{path.name}", path)
    for name in TOOLS:
        tool = _which(name)
        archive.add_file(f"sbin/{name}", tool)
        for library in _libraries(tool):
            archive.add_file(str(library).lstrip("/"), library)
    archive.add("TRAILER!!!", 0)
    return bytes(archive.data)


class _Archive:
    def __init__(self) -> None:
        self.data = bytearray()
        self._names: set[str] = set()

    def add_file(self, name: str, path: Path) -> None:
        for directory in reversed(Path(name).parents[:-1]):
            self.add(str(directory), 0o40755)
        self.add(name, 0o100755, path.read_bytes())

    def add(
        self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        if name in self._names:
            return
        self._names.add(name)
        fields = [
            len(self._names),
            mode,
            *(0, 0, 1, 0),  # user, group, links, time
            len(data),
            *(0, 0),  # the device it is on
            *device,
            len(name) + 1,
            0,
        ]
        header = "070701" + "".join(f"{field:08X}" for field in fields)
        self._append(header.encode() + name.encode() + b"\0")
        self._append(data)

    def _append(self, data: bytes) -> None:
        self.data += data + bytes(-len(data) % 4)


def _which(name: str) -> Path:
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert path is not None, f"{name} is missing: contrib/setup installs it"
    return Path(path)


def _libraries(program: Path) -> Iterator[Path]:
    """Yield the shared libraries of a program, and who loads them."""
    for match in re.finditer(r"(/\S+) \(0x", run("ldd", program)):
        yield Path(match[1])


class Guest:
    """A guest that is running, in a `with`; `console` is what it has said."""

    def __init__(self, disk: Path, directory: Path, *, aio: str) -> None:
        self._lines: list[str] = []
        self._directory = directory
        self._disk = disk
        self._aio = aio

    def __enter__(self) -> Self:
        kernel = fetch_kernel()
        initramfs = self._directory / "initramfs"
        initramfs.write_bytes(make_initramfs(kernel))
        drive = f"file={self._disk},format=raw,if=none,id=disk,cache=none"
        self._process = subprocess.Popen(
            [
                "qemu-system-x86_64",
                # KVM boots no guest on the machines of a CI.
                *("-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "256"),
                *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                *("-serial", "stdio", "-kernel", str(kernel.image)),
                *("-initrd", str(initramfs)),
                *("-append", "console=ttyS0 loglevel=5 panic=-1"),
                *("-drive", f"{drive},aio={self._aio},discard=unmap,werror=report"),
                *("-device", "virtio-blk-pci,drive=disk"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self._wait_for("READY", BOOT_SECONDS)
            assert not self.complaints(), self.console
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line.rstrip())

    @property
    def console(self) -> str:
        return "\n".join(list(self._lines))

    def complaints(self) -> list[str]:
        """Return the lines in which somebody complains."""
        return [
            line for line in list(self._lines) if any(c in line for c in COMPLAINTS)
        ]

    def round(self, number: int) -> None:
        """Let it write files, and read them back from its disk."""
        self._say(f"round {number}")
        self._wait_for(f"VERIFIED {number}", PATIENCE)

    def end(self) -> None:
        """Let it unmount and check its file system, and power off."""
        self._say("end")
        self._wait_for("DONE", PATIENCE)
        self._process.wait(PATIENCE)

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _wait_for(self, line: str, seconds: float) -> None:
        def is_there() -> bool:
            return line in self._lines or self._process.poll() is not None

        try:
            wait_until(is_there, line, seconds)
            # What it said last may not have been read yet.
            wait_until(lambda: line in self._lines, line, 1)
        except AssertionError as e:
            raise AssertionError(f"{e}; the console:\n{self.console}") from None
