"""TRAINING.compile: the same numbers where it works, aloud without it where it does not."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from modes.compiled import CompiledForward

compile_of_torch = torch.compile


class Doubled(nn.Module):
    """A model that is called by keyword, as ours are."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, *, rows: torch.Tensor) -> torch.Tensor:
        return 2 * self.linear(rows)


def broken_backend(graph, inputs):
    raise FileNotFoundError("no C++ compiler found")


@pytest.fixture
def with_backend(monkeypatch):
    """with_backend(backend): what torch.compile uses from now on, instead of minutes with a C++ compiler."""

    def choose(backend):
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", functools.partial(compile_of_torch, backend=backend))

    yield choose
    torch._dynamo.reset()


def test_a_compiled_model_gives_the_numbers_and_gradients_of_the_model(with_backend, capsys):
    with_backend("eager")
    model, rows = Doubled(), torch.randn(5, 3)
    forward = CompiledForward(model)
    forward(rows=rows).sum().backward()
    compiled = model.linear.weight.grad.clone()
    model.zero_grad()
    model(rows=rows).sum().backward()
    assert torch.allclose(forward(rows=rows), model(rows=rows))
    assert torch.allclose(compiled, model.linear.weight.grad)
    assert forward.is_compiled and capsys.readouterr().out == ""
    assert list(model.state_dict()) == ["linear.weight", "linear.bias"], "checkpoints do not know of compiling"


def test_where_compiling_fails_that_is_said_once_and_training_goes_on(with_backend, capsys):
    with_backend(broken_backend)
    model, rows = Doubled(), torch.randn(5, 3)
    forward = CompiledForward(model)
    assert torch.equal(forward(rows=rows), model(rows=rows))
    assert torch.equal(forward(rows=rows), model(rows=rows))
    told = capsys.readouterr().out
    assert told.count("TRAINING.compile: torch.compile failed (") == 1
    assert "no C++ compiler found" in told and "training goes on without it" in told
    assert not forward.is_compiled


def test_an_error_of_the_model_itself_is_not_hidden(with_backend):
    with_backend("eager")
    forward = CompiledForward(Doubled())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        forward(rows=torch.randn(5, 4))


def test_a_batch_of_another_size_passes_the_model_as_it_is(with_backend):
    """The last batch of an epoch must not start the compiler again."""
    compiled_for = []

    def backend(graph, inputs):
        compiled_for.append([tuple(value.shape) for value in inputs if isinstance(value, torch.Tensor)])
        return graph.forward

    with_backend(backend)
    model = Doubled()
    forward = CompiledForward(model)
    for count in (5, 3, 5, 4):
        rows = torch.randn(count, 3)
        assert torch.allclose(forward(rows=rows), model(rows=rows))
    assert len(compiled_for) == 1 and (5, 3) in compiled_for[0]


def test_too_little_memory_is_no_failure_of_the_compiler(with_backend, capsys):
    class Hungry(Doubled):
        def forward(self, *, rows):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with_backend("eager")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        CompiledForward(Hungry())(rows=torch.randn(5, 3))
    assert "torch.compile failed" not in capsys.readouterr().out


@pytest.mark.gpu
def test_compiling_on_cuda_gives_the_numbers_of_the_model():
    torch._dynamo.reset()
    model = Doubled().cuda()
    forward = CompiledForward(model)
    for count in (64, 30, 64):
        rows = torch.randn(count, 3, device="cuda")
        found = forward(rows=rows)
        found.sum().backward()
        torch.testing.assert_close(found, model(rows=rows), atol=1e-5, rtol=1e-5)
    assert forward.is_compiled
