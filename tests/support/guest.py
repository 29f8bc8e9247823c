"""A real guest: Debian's cloud kernel and a busybox, booted by qemu without KVM.

The kernel comes from Debian's package, unpacked into a directory and not installed; the
initramfs is made here: busybox, the modules a virtio disk needs, and a script.
"""

import os
import re
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.mount import run, wait_until

# What the guest needs to see /dev/vda and the file system on it; what these need in
# turn is found in the modules.
MODULES = ["virtio_pci", "virtio_blk", "ext4", "crc32c_generic"]

# Makes a file system, then writes, reads back and verifies files, round by round, until
# somebody says stop on the console.
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
echo 1 > /proc/sys/kernel/printk_devkmsg 2>/dev/null
for module in $(cat /modules/order); do
    insmod /modules/$module || echo FAILED $module
done
while [ ! -b /dev/vda ]; do usleep 10000; done
mke2fs /dev/vda > /dev/null || echo FAILED mke2fs
mkdir -p /mnt
mount -t ext4 /dev/vda /mnt || echo FAILED mount
round=0
while true; do
    round=$((round + 1))
    dd if=/dev/urandom of=/mnt/$((round % 20)) bs=64k count=8 2>/dev/null \\
        || echo FAILED write
    sync
    (cd /mnt && md5sum [0-9]*) > /sums
    echo 3 > /proc/sys/vm/drop_caches
    (cd /mnt && md5sum -c /sums > /dev/null) || echo FAILED verify
    echo ROUND $round
    read -t 1 line && [ "$line" = stop ] && break
done
umount /mnt || echo FAILED umount
echo DONE $round
poweroff -f
"""


def unpack_kernel(place: Path) -> Path:
    """Download Debian's cloud kernel and unpack it; return the directory."""
    found = run("apt-cache", "depends", "linux-image-cloud-amd64")
    name = re.search(r"Depends: (linux-image-\S+-cloud-amd64)", found)
    assert name is not None, found
    place.mkdir()
    # apt gives its rights away for a download, if it can.
    subprocess.run(
        ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", name[1]],
        cwd=place,
        check=True,
        capture_output=True,
        timeout=300,
    )
    (package,) = place.glob("*.deb")
    run("dpkg-deb", "-x", package, place / "root")
    return place / "root"


def make_initramfs(kernel: Path) -> bytes:
    """Return a cpio archive (newc) to boot from."""
    files = {path.stem: path for path in kernel.glob("**/*.ko")}
    order: list[str] = []
    for module in MODULES:
        _add_module(module, files, order)
    archive = [_entry(name, 0o040755) for name in DIRECTORIES]
    archive.append(_entry("dev/console", 0o020600, device=(5, 1)))
    archive.append(_entry("bin/busybox", 0o100755, Path("/bin/busybox").read_bytes()))
    archive.append(_entry("init", 0o100755, INIT.encode()))
    names = "".join(f"{name}.ko\n" for name in order)
    archive.append(_entry("modules/order", 0o100644, names.encode()))
    archive += [
        _entry(f"modules/{name}.ko", 0o100644, files[name].read_bytes())
        for name in order
    ]
    return b"".join([*archive, _entry("TRAILER!!!", 0)])


DIRECTORIES = ["bin", "dev", "modules", "proc", "sys"]


def _add_module(name: str, files: dict[str, Path], order: list[str]) -> None:
    """Add a module after all that it needs, which its .modinfo section names."""
    name = name if name in files else name.replace("_", "-")
    if name not in files or name in order:
        return  # built in, or there already
    needed = re.search(rb"\0depends=([^\0]*)\0", files[name].read_bytes())
    for other in needed[1].decode().split(",") if needed else []:
        _add_module(other, files, order)
    order.append(name)


def _entry(
    name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
) -> bytes:
    """Return one file of a cpio archive (cpio(5), New ASCII Format)."""
    path = name.encode() + b"\0"
    fields = [0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0]
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    head = header + path
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


class Guest:
    """A running qemu, and what it has said on its console."""

    def __init__(self, kernel: Path, initramfs: Path, disk: Path) -> None:
        (image,) = kernel.glob("boot/vmlinuz-*")
        self.console = ""
        self._command = [
            "qemu-system-x86_64",
            *("-accel", "tcg", "-m", "256", "-nic", "none"),
            *("-display", "none", "-serial", "stdio", "-monitor", "none"),
            *("-no-reboot", "-kernel", image, "-initrd", initramfs),
            *("-append", "console=ttyS0 panic=-1 random.trust_cpu=on"),
            "-drive",
            f"file={disk},format=raw,if=virtio,cache=none,aio=threads",
        ]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._process:  # closes the pipes
            self._process.kill()
            self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while data := os.read(fd, 65536):
            self.console += data.decode(errors="replace")

    @property
    def rounds(self) -> int:
        """How many rounds of files the guest has verified."""
        return self.console.count("ROUND ")

    def wait_rounds(self, count: int) -> None:
        wait_until(lambda: self.rounds >= count, f"round {count}", PATIENCE)

    def stop(self) -> None:
        """Let the guest finish its round, unmount and power off."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"stop\n")
        self._process.stdin.flush()
        self._process.wait(PATIENCE)
        self._reader.join()


# An emulated processor on a busy machine is slow.
PATIENCE = 180.0
