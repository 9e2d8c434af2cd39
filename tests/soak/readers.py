"""Every format that the program reads, with what reads it."""

from tests.soak import binary_readers, image_readers, run_readers, text_readers, user_readers

READERS = [
    *text_readers.READERS,
    *binary_readers.READERS,
    *user_readers.READERS,
    *image_readers.READERS,
    *run_readers.READERS,
]
