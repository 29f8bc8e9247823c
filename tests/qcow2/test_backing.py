"""Which format a backing file has, when its guest may have forged a header."""

import pytest

from fleecefs.errors import NotUsable
from fleecefs.qcow2.backing import find_backing_format, is_qcow2
from fleecefs.qcow2.header import new_header
from fleecefs.units import MiB
from tests.qcow2.files import MemoryFile

SIZE = 1 * MiB + 1


def qcow2(length, size=SIZE, **changes):
    header = new_header(size, 65536, 65536)._replace(**changes)
    return header.encode_image(b"").ljust(length, b"\0")


@pytest.mark.parametrize(
    ("content", "told", "found"),
    [
        pytest.param(bytes(SIZE), None, "raw", id="raw"),
        pytest.param(bytes(SIZE), "raw", "raw", id="raw, told"),
        pytest.param(qcow2(1000), None, "qcow2", id="qcow2"),
        pytest.param(qcow2(1000), "qcow2", "qcow2", id="qcow2, told"),
        pytest.param(qcow2(SIZE), "qcow2", "qcow2", id="either, told qcow2"),
        pytest.param(qcow2(SIZE), "raw", "raw", id="either, told raw"),
        pytest.param(
            qcow2(SIZE, size=2 * SIZE), "raw", "raw", id="forged of another size"
        ),
    ],
)
def test_the_format_is_found(content, told, found):
    assert find_backing_format(MemoryFile(content), SIZE, told) == found


@pytest.mark.parametrize(
    ("content", "told", "reason"),
    [
        pytest.param(bytes(SIZE - 1), None, "has 1048576 bytes, .* 1048577", id="less"),
        pytest.param(bytes(SIZE - 1), "raw", "has 1048576 bytes, .* 1048577", id="raw"),
        pytest.param(b"", None, "has 0 bytes, and the disk 1048577", id="empty"),
        pytest.param(
            qcow2(SIZE), None, "say which with --backing-format", id="raw or qcow2"
        ),
        pytest.param(
            qcow2(SIZE, size=5), None, "say which with --backing-format", id="forged"
        ),
        pytest.param(
            qcow2(1000, size=4 * MiB), None, "4194304.* has 1000 bytes", id="other disk"
        ),
        pytest.param(qcow2(1000, size=4 * MiB), "qcow2", "4194304", id="told, other"),
        pytest.param(qcow2(1000, incompatible=2), None, "corrupt", id="corrupt"),
        pytest.param(bytes(SIZE), "qcow2", "is no qcow2 file", id="told qcow2, is raw"),
        pytest.param(qcow2(1000), "raw", "has 1000 bytes", id="told raw, is qcow2"),
        pytest.param(bytes(SIZE), "vmdk", "neither raw nor qcow2", id="told vmdk"),
    ],
)
def test_what_is_not_the_backup_of_such_a_disk_is_refused(content, told, reason):
    with pytest.raises(NotUsable, match=f"^c.qcow2: .*{reason}"):
        find_backing_format(MemoryFile(content), SIZE, told)


def test_the_magic_says_qcow2():
    assert is_qcow2(qcow2(512))
    assert not is_qcow2(b"QFI")
    assert not is_qcow2(bytes(512))
