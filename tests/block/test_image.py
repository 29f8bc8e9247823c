"""What every image does: in memory, in a file, on tmpfs, on a block device."""

import errno

import pytest

from fleecefs.block.image import mapped_at
from fleecefs.block.memory import MemoryImage
from fleecefs.block.raw import RawImage
from tests.support.mount import loop_device, require_mount

PAGE = 4096
SIZE = 16 * PAGE

DATA = bytes(range(1, 256)) * 258


def in_memory(request):
    yield MemoryImage(SIZE)


def in_a_file(request):
    path = request.getfixturevalue("tmp_path") / "image"
    yield RawImage.create(path, SIZE)


def on_tmpfs(request):
    path = request.getfixturevalue("tmpfs_path") / "image"
    yield RawImage.create(path, SIZE)


def on_a_device(request):
    require_mount()
    path = request.getfixturevalue("tmp_path") / "backing"
    path.write_bytes(bytes(SIZE))
    with loop_device(path) as device:
        image = RawImage.open_source(device)
        yield image
        image.close()


IMAGES = [in_memory, in_a_file, on_tmpfs, on_a_device]


@pytest.fixture(params=IMAGES, ids=lambda make: make.__name__)
def image(request):
    yield from request.param(request)


@pytest.fixture(params=[in_memory, in_a_file, on_tmpfs], ids=lambda make: make.__name__)
def sparse(request):
    """An image that knows of holes."""
    yield from request.param(request)


RANGES = [
    pytest.param(0, PAGE, id="aligned"),
    pytest.param(0, SIZE, id="all"),
    pytest.param(512, PAGE, id="across pages"),
    pytest.param(1, 1, id="one byte"),
    pytest.param(PAGE - 1, 2, id="across two by a byte"),
    pytest.param(SIZE - 3, 3, id="last bytes"),
    pytest.param(10, 0, id="nothing"),
]


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_what_is_written_is_read(image, offset, length):
    data = DATA[:length]

    assert image.pwrite(data, offset) == length

    assert image.pread(length, offset) == data
    whole = image.pread(SIZE, 0)
    assert whole == (bytes(offset) + data).ljust(SIZE, b"\0")


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_reading_into_a_buffer_fills_it(image, offset, length):
    image.pwrite(DATA[:SIZE], 0)
    buffer = bytearray(b"?" * (length + 2))

    image.pread_into(memoryview(buffer)[1:-1], offset)

    assert buffer == b"?" + DATA[offset : offset + length] + b"?"


def test_a_memoryview_can_be_written(image):
    image.pwrite(memoryview(b"xhellox")[1:-1], 100)

    assert image.pread(7, 99) == b"\0hello\0"


# A device can be told to zero or discard whole sectors only.
SECTORS = [
    pytest.param(PAGE, PAGE, id="one page"),
    pytest.param(0, SIZE, id="all"),
    pytest.param(512, 2 * PAGE, id="across pages"),
    pytest.param(SIZE - 512, 512, id="last sector"),
]


@pytest.mark.parametrize("operation", ["zero", "discard"])
@pytest.mark.parametrize(("offset", "length"), SECTORS)
def test_what_is_zeroed_or_discarded_reads_as_zeroes(image, operation, offset, length):
    image.pwrite(DATA[:SIZE], 0)

    getattr(image, operation)(length, offset)

    expected = DATA[:offset] + bytes(length) + DATA[offset + length : SIZE]
    assert image.pread(SIZE, 0) == expected
    assert image.size == SIZE


@pytest.mark.parametrize("operation", ["zero", "discard"])
@pytest.mark.parametrize(("offset", "length"), RANGES[3:6])
def test_single_bytes_can_be_zeroed_where_there_are_files(
    sparse, operation, offset, length
):
    sparse.pwrite(DATA[:SIZE], 0)

    getattr(sparse, operation)(length, offset)

    expected = DATA[:offset] + bytes(length) + DATA[offset + length : SIZE]
    assert sparse.pread(SIZE, 0) == expected


def test_a_new_image_is_one_hole(sparse):
    assert sparse.find_data(0) == SIZE
    assert sparse.find_hole(0) == 0
    assert sparse.allocated() == 0


def test_what_is_written_is_data(sparse):
    sparse.pwrite(b"x", 4 * PAGE)
    sparse.pwrite(b"x", 9 * PAGE)

    assert sparse.find_data(0) == 4 * PAGE
    assert sparse.find_data(4 * PAGE + 5) == 4 * PAGE + 5
    assert sparse.find_hole(4 * PAGE) == 5 * PAGE
    assert sparse.find_data(5 * PAGE) == 9 * PAGE
    assert sparse.find_data(10 * PAGE) == SIZE
    assert sparse.allocated() == 2 * PAGE


def test_what_is_discarded_is_a_hole_again(sparse):
    sparse.pwrite(DATA[:SIZE], 0)

    sparse.discard(2 * PAGE, 4 * PAGE)

    assert sparse.find_hole(0) == 4 * PAGE
    assert sparse.find_data(4 * PAGE) == 6 * PAGE
    assert sparse.allocated() == SIZE - 2 * PAGE


def test_a_full_image_has_no_hole_but_its_end(sparse):
    sparse.pwrite(DATA[:SIZE], 0)

    assert sparse.find_data(5) == 5
    assert sparse.find_hole(5) == SIZE
    assert sparse.find_hole(SIZE - 1) == SIZE


def test_searches_at_the_end_find_the_end(image):
    assert image.find_data(SIZE) == SIZE
    assert image.find_hole(SIZE) == SIZE


def test_an_image_can_be_flushed(image):
    image.pwrite(b"x", 0)

    image.flush()


def test_holes_and_data_are_mapped_one_after_the_other(sparse):
    sparse.pwrite(b"x" * PAGE, 4 * PAGE)

    assert mapped_at(sparse, 0, SIZE) == (0, 4 * PAGE, "none")
    assert mapped_at(sparse, 4 * PAGE, SIZE) == (4 * PAGE, PAGE, "source")
    assert mapped_at(sparse, 5 * PAGE, SIZE) == (5 * PAGE, SIZE - 5 * PAGE, "none")


@pytest.mark.parametrize(
    ("offset", "end", "expected"),
    [
        pytest.param(10, 20, (10, 10, "none"), id="in a hole"),
        pytest.param(0, 4 * PAGE + 1, (0, 4 * PAGE, "none"), id="hole, then data"),
        pytest.param(
            4 * PAGE + 1, 4 * PAGE + 3, (4 * PAGE + 1, 2, "source"), id="data"
        ),
        pytest.param(
            4 * PAGE + 1, 6 * PAGE, (4 * PAGE + 1, PAGE - 1, "source"), id="to a hole"
        ),
    ],
)
def test_a_map_stays_in_its_range(sparse, offset, end, expected):
    sparse.pwrite(b"x" * PAGE, 4 * PAGE)

    assert mapped_at(sparse, offset, end) == expected


def test_a_device_is_all_data(request):
    for image in on_a_device(request):
        assert mapped_at(image, 0, SIZE) == (0, SIZE, "source")
        assert image.allocated() == SIZE


def test_a_full_device_says_no_space(request):
    for image in on_a_device(request):
        with pytest.raises(OSError) as e:
            image.pwrite(b"x", SIZE)

        assert e.value.errno == errno.ENOSPC
