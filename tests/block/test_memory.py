"""What an image in memory has beyond others; see test_image.py for what all have."""

from fleecefs.block.memory import MemoryImage


def test_an_image_can_be_made_with_data():
    image = MemoryImage(8192, b"data")

    assert image.pread(6, 0) == b"data\0\0"
    assert image.find_hole(0) == 4096


def test_durable_is_what_was_there_at_the_last_flush():
    image = MemoryImage(8)
    image.pwrite(b"one", 0)

    image.flush()
    image.pwrite(b"two", 0)

    assert image.durable == b"one\0\0\0\0\0"


def test_a_partly_discarded_page_stays_data():
    image = MemoryImage(8192, b"x" * 8192)

    image.discard(4096, 100)

    assert image.find_hole(0) == 8192
