"""QEMU's tools as counterparts: qemu-img, and qemu-nbd seen by nbdinfo."""

import json
import shutil
import subprocess

import pytest

# Of qemu-img check: there are only clusters that nothing leads to.
LEAKED = 3


def require_qemu():
    for tool in "qemu-img", "qemu-nbd", "nbdinfo":
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")


def qemu_img(*arguments) -> str:
    done = subprocess.run(
        ["qemu-img", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def check_code(path) -> int:
    """Return the exit code of `qemu-img check`: 0 if all is well."""
    command = ["qemu-img", "check", "-q", "-f", "qcow2", path]
    return subprocess.run(command, capture_output=True).returncode


def listed_bitmaps(path) -> dict[str, tuple[int, set[str]]]:
    """Return granularity and flags of each bitmap that `qemu-img info` shows."""
    info = json.loads(qemu_img("info", "-f", "qcow2", "--output=json", path))
    bitmaps = info["format-specific"]["data"].get("bitmaps", [])
    return {each["name"]: (each["granularity"], set(each["flags"])) for each in bitmaps}


def dirty_extents(path, name) -> list[tuple[int, int]]:
    """Return where a bitmap is dirty, (offset, length), as an NBD client sees it.

    nbdinfo starts qemu-nbd itself, and ends it.
    """
    server = ["[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, path, "]"]
    command = ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", "--", *server]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    extents = []
    for each in json.loads(done.stdout):
        if each["type"] & 1:
            extents.append((each["offset"], each["length"]))
    return extents
