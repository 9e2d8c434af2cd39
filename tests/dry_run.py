"""A CUDA device that only knows shapes, types and places: what would run there is followed without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class DryRun(FakeTensorMode):
    """Inside, tensors on CUDA are fake and those on the host are real, as they are on a machine with a GPU.

    An operation on tensors of both places is an error, as there; so is an index on the host, which CUDA takes and waits for,
    and everything else that would wait for the device, whose numbers are not known. Gradients cannot be followed: PyTorch
    asks the driver for them.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {**(kwargs or {})}
        kwargs.pop("pin_memory", None)
        if func is torch.ops.aten._pin_memory.default:
            return args[0]
        if func is torch.ops.aten.is_pinned.default:
            return False
        leaves = tree_leaves((args, kwargs))
        on_device = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        on_host = any(isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) and leaf.ndim for leaf in leaves)
        goes_there = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not on_device and not goes_there:
            return func(*args, **kwargs)
        assert not (on_device and on_host) or func in _COPIES, f"{func} meets tensors on the host and on the device"
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def dry_run() -> Iterator[None]:
    """Make PyTorch believe in a CUDA device with bf16 as far as it asks for one before it computes, and run dry."""
    with ExitStack() as stack:
        for name, answer in {
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.is_bf16_supported": lambda *_, **__: True,
            "torch.cuda.mem_get_info": lambda *_: (80 * 10**9, 80 * 10**9),
            "torch.cuda.get_device_capability": lambda *_: (9, 0),
            "torch.cuda.Stream": lambda *_: None,
        }.items():
            stack.enter_context(mock.patch(name, answer))
        stack.enter_context(DryRun())
        yield
