"""The encoder through torch.compile: the same numbers, no trace of the padding, aloud without it where it fails."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from datasets.patch_encoder import PatchEncoder

CPU, SIZE, BATCH = torch.device("cpu"), 16, 4
compile_of_torch = torch.compile


@dataclass(frozen=True)
class Encoded:
    tokens: Tensor
    pooled: Tensor


class TinyEncoder(nn.Module):
    """A patch embedding, one block of attention and a mean. Notes the shapes and strides that it was called with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block = (
            nn.Conv2d(3, 8, 4, 4),
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True),
        )
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Encoded:
        tokens = self.block(self.embed(images.float() / 255).flatten(2).transpose(1, 2))
        return Encoded(tokens, tokens.mean(dim=1))


def broken_backend(graph, inputs):
    raise FileNotFoundError("no C++ compiler found")


def backend_without_memory(graph, inputs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def device_without_memory(graph, inputs):
    def run(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    return run


@pytest.fixture
def with_backend(monkeypatch):
    """with_backend(backend): what torch.compile uses from now on; returns the shapes and strides that are compiled."""

    def choose(backend) -> list:
        torch._dynamo.reset()
        compiled = []

        def noting(graph, inputs):
            compiled.append([(tuple(t.shape), t.stride()) for t in inputs if t.dtype == torch.uint8])
            return graph if backend == "eager" else backend(graph, inputs)

        monkeypatch.setattr(
            torch, "compile", lambda model, **options: compile_of_torch(model, backend=noting, **options)
        )
        return compiled

    yield choose
    torch._dynamo.reset()


def images_of(count: int) -> Tensor:
    return torch.randint(256, (count, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def encoders(**options) -> tuple[PatchEncoder, PatchEncoder]:
    """The same encoder as it is, and compiled."""
    backbone = TinyEncoder()
    return tuple(PatchEncoder(backbone, CPU, batch_size=BATCH, compiled=is_on, **options) for is_on in (False, True))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_numbers_are_the_same_for_every_number_of_images_and_one_shape_is_compiled(with_backend, capsys, precision):
    shapes = with_backend("eager")
    plain, compiled = encoders(precision=precision)
    tolerance = {"rtol": 0.02, "atol": 1e-2} if precision == "bf16" else {"rtol": 1e-5, "atol": 1e-5}
    compiled.warm_up(SIZE)
    for count, with_tokens in ((1, 1), (3, 0), (4, 2), (9, 9), (11, 5)):
        views = images_of(count).permute(0, 2, 1, 3)  # another layout in memory, as turned patches have
        for images in (views, views.contiguous()):
            (want, want_tokens), (got, tokens) = (one.encode(images, with_tokens) for one in (plain, compiled))
            assert got.shape == (count, 8) and got.dtype == torch.float32
            torch.testing.assert_close(got, want, **tolerance)
            if with_tokens:
                assert tokens.shape == (with_tokens, 16, 8) and tokens.dtype == want_tokens.dtype
                torch.testing.assert_close(
                    tokens,
                    want_tokens,
                    rtol=0.02 if precision == "bf16" else 1e-5,
                    atol=1e-2 if precision == "bf16" else 1e-5,
                )
            else:
                assert tokens is None
    assert len(shapes) == 1 and shapes[0] == [((BATCH, 3, SIZE, SIZE), (SIZE * SIZE * 3, 1, SIZE * 3, 3))]
    assert compiled.is_compiled and not plain.is_compiled and capsys.readouterr().out == ""


def test_padding_leaves_no_trace(with_backend):
    """An image gives the same alone, beside others, and as the last one of a full batch."""
    with_backend("eager")
    _, compiled = encoders()
    images = images_of(BATCH)
    whole, _ = compiled.encode(images, 0)
    for image, expected in zip(images, whole):
        torch.testing.assert_close(compiled.encode(image[None], 0)[0][0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of PyTorch needs a C++ compiler")
def test_the_compiler_of_pytorch_itself():
    torch._dynamo.reset()
    plain, compiled = encoders()
    for count in (BATCH, 3):
        (want, want_tokens), (got, tokens) = (one.encode(images_of(count), count) for one in (plain, compiled))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tokens, want_tokens, rtol=1e-4, atol=1e-5)
    assert compiled.is_compiled
    torch._dynamo.reset()


def test_where_compiling_fails_that_is_said_once_and_the_encoder_runs(with_backend, capsys):
    with_backend(broken_backend)
    plain, compiled = encoders()
    assert compiled.is_compiled, "until it is tried"
    compiled.warm_up(SIZE)
    assert not compiled.is_compiled
    for _ in range(2):
        assert torch.equal(compiled.encode(images_of(6), 0)[0], plain.encode(images_of(6), 0)[0])
    told = capsys.readouterr().out
    assert told.count("--compile: torch.compile failed (") == 1
    assert "no C++ compiler found" in told and "the encoder runs without it" in told


@pytest.mark.parametrize("backend", [backend_without_memory, device_without_memory])
def test_too_little_memory_is_no_failure_of_the_compiler(with_backend, capsys, backend):
    with_backend(backend)
    _, compiled = encoders()
    with pytest.raises(RuntimeError, match="out of memory"):
        compiled.encode(images_of(BATCH), 0)
    assert capsys.readouterr().out == "" and compiled.is_compiled


def test_an_error_of_the_encoder_itself_is_not_hidden(with_backend):
    with_backend("eager")
    _, compiled = encoders()
    with pytest.raises(RuntimeError, match=r"channels"):
        compiled.encode(torch.zeros(2, SIZE, SIZE, 5, dtype=torch.uint8), 0)


def test_an_encoder_that_is_not_to_be_compiled_is_not_warmed_up():
    def never(images):
        raise AssertionError("called")

    PatchEncoder(never, CPU).warm_up(SIZE)
