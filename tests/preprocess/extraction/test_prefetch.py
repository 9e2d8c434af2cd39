"""Slides in their turn: the next one is decoded meanwhile, one at most, and its errors wait for its turn."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.images.slides import Slide, open_slide
from preprocess.extraction import prefetch as slides_ahead
from preprocess.extraction.prefetch import opened_in_turn

NAMES = ["A", "B", "C", "D"]


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, name in enumerate(NAMES):
        Image.fromarray(np.full((20, 30, 3), 40 * number, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


class Opener:
    """Opens the slides of a folder and keeps them, with the name of the thread that did it."""

    def __init__(self, folder: Path):
        self.folder, self.opened, self.threads = folder, {}, {}

    def __call__(self, name: str) -> Slide:
        self.threads[name] = threading.current_thread().name
        self.opened[name] = open_slide(self.folder / f"{name}.png")
        return self.opened[name]

    def decoded(self) -> set[str]:
        """Slides whose pixels are in memory now."""
        return {name for name, slide in self.opened.items() if slide._reader._pixels is not None}


def wait_for(condition) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_the_next_slide_is_decoded_while_the_present_one_is_in_use(folder):
    opener = Opener(folder)
    for number, slide in enumerate(opened_in_turn(NAMES, opener, lambda _name: True)):
        assert slide.path.stem == NAMES[number]
        assert (slide.read_region(0, 0, 30, 20) == 40 * number).all()
        expected = set(NAMES[number : number + 2])
        assert wait_for(lambda: opener.decoded() == expected), "this one, the next one, and no other"  # noqa: B023
        time.sleep(0.02)
        assert opener.decoded() == expected
    assert opener.decoded() == set() and list(opener.opened) == NAMES
    assert opener.threads["A"] == "MainThread"
    assert all(opener.threads[name].startswith("slide-opener") for name in NAMES[1:])


def test_large_images_are_decoded_in_their_turn(folder, monkeypatch):
    monkeypatch.setattr(slides_ahead, "DECODED_AHEAD_BYTES", 30 * 20 * 3 - 1)
    opener = Opener(folder)
    for slide in opened_in_turn(NAMES, opener, lambda _name: True):
        slide.read_region(0, 0, 4, 4)
        following = NAMES[NAMES.index(slide.path.stem) + 1 :][:1]
        assert wait_for(lambda: all(name in opener.opened for name in following))  # noqa: B023
        time.sleep(0.02)
        assert opener.decoded() == {slide.path.stem}


def test_what_may_not_be_opened_ahead_is_opened_in_its_turn(folder):
    opener = Opener(folder)
    for slide in opened_in_turn(NAMES, opener, lambda name: name != "C"):
        if slide.path.stem == "B":
            time.sleep(0.02)
            assert "C" not in opener.opened
    assert opener.threads["C"] == "MainThread" and opener.threads["D"].startswith("slide-opener")


@pytest.mark.parametrize("content", [b"not an image", None], ids=["no image", "truncated"])
def test_errors_of_a_slide_wait_for_its_turn(folder, content):
    path = folder / "C.png"
    path.write_bytes(content or path.read_bytes()[:-30])
    opener, seen = Opener(folder), []
    with pytest.raises(ValueError, match=r"C\.png"):
        for slide in opened_in_turn(NAMES, opener, lambda _name: True):
            seen.append(slide.path.stem)
            time.sleep(0.02)
    assert seen == ["A", "B"] and opener.decoded() == set() and "D" not in opener.opened


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_whoever_leaves_early_leaves_nothing_open(folder, error):
    opener = Opener(folder)
    with pytest.raises(error), closing(opened_in_turn(NAMES, opener, lambda _name: True)) as slides:
        for slide in slides:
            slide.read_region(0, 0, 4, 4)
            if slide.path.stem == "B":
                raise error
    assert opener.decoded() == set() and "D" not in opener.opened
    assert not any(thread.name.startswith("slide-opener") for thread in threading.enumerate())


def test_one_slide_and_none(folder):
    assert [slide.path.stem for slide in opened_in_turn(["B"], Opener(folder), lambda _name: True)] == ["B"]
    assert list(opened_in_turn([], Opener(folder), lambda _name: True)) == []
