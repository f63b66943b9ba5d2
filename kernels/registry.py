"""Which operators there are, what each must be tested with, and which of their forms runs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

import kernels

Arguments = tuple[Any, ...]
"""An operator's arguments, in the order of its schema."""

_LIBRARY = torch.library.Library("headkv", "FRAGMENT")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments that every form of an operator must take.

    Args:
        name: what is awkward about them.
        make: gives them for a dtype of the activations, on the CPU; the same at every call.
    """

    name: str
    make: Callable[[torch.dtype], Arguments]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model's sizes and what one decode step or prompt chunk asks of it.

    Args:
        model: its name.
        layers: L.
        heads: N.
        kv_heads: H.
        head_dim: D.
        hidden: E.
        intermediate: F.
        batch: B.
        kept: mean tokens per KV head in the cache.
        dtype: of weights, activations and cache.
    """

    model: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    batch: int
    kept: int
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """An operator, its forms, and what tests and models must know of it.

    Args:
        name: of the file and of the operator, `torch.ops.headkv.<name>`.
        schema: arguments and results in PyTorch's notation; what is written is marked, as in `Tensor(a!) k_arena`.
        reference: the specification in plain PyTorch, which runs on any device; sums are fp32.
        fake: what it returns, as empty tensors, and nothing else.
        launch: the Triton form, with the arguments and results of the reference; None if other libraries do better.
        cases: what the forms are tested with.
        bytes_moved: of arguments: bytes that must be read and written once, whatever computes it.
        flops: of arguments: additions and multiplications.
        sized: of a workload: arguments of a real size, tables on the CPU, all else on the meta device.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    launch: Callable[..., Any] | None
    cases: Callable[[], Iterable[Case]]
    bytes_moved: Callable[..., int]
    flops: Callable[..., int]
    sized: Callable[[Workload], Arguments]


def register(file: str, schema: str) -> Kernel:
    """Make an operator of what a file has.

    The reference runs everywhere, the Triton form on CUDA, and C++ on a CPU once `native.load()` was called.

    Args:
        file: the module's `__name__`. It has `reference`, `fake`, `cases`, `bytes_moved`, `flops` and `sized`, and
            `launch` if there is a Triton form; see `Kernel`.
        schema: see `Kernel`.

    Returns:
        The operator, by the file's name.
    """
    module = importlib.import_module(file)
    kernel = Kernel(
        name=file.rpartition(".")[2],
        schema=schema,
        reference=module.reference,
        fake=module.fake,
        launch=getattr(module, "launch", None),
        cases=module.cases,
        bytes_moved=module.bytes_moved,
        flops=module.flops,
        sized=module.sized,
    )
    _LIBRARY.define(f"{kernel.name}{kernel.schema}")
    _LIBRARY.impl(kernel.name, kernel.reference, "CompositeExplicitAutograd")
    if kernel.launch is not None:
        _LIBRARY.impl(kernel.name, kernel.launch, "CUDA")
    torch.library.register_fake(f"headkv::{kernel.name}", kernel.fake, lib=_LIBRARY)
    return kernel


def serve() -> bool:
    """Whether to call operators rather than what plain PyTorch does in their place.

    Yes outside autograd, which they have no part in, and where no compiler fuses what plain PyTorch does.
    """
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


@cache
def all_kernels() -> dict[str, Kernel]:
    """Every operator by name: those whose file in this folder has a `KERNEL`.

    Example:
        >>> "rms_norm" in all_kernels()
        True
    """
    modules = (importlib.import_module(f"kernels.{info.name}") for info in pkgutil.iter_modules(kernels.__path__))
    found = (getattr(module, "KERNEL", None) for module in modules)
    return {kernel.name: kernel for kernel in found if kernel is not None}


@contextmanager
def use(form: Literal["reference", "triton"]) -> Iterator[None]:
    """Let all operators run one form on CPU tensors, for tests; Triton's needs TRITON_INTERPRET=1.

    Args:
        form: which one; operators without a Triton form run as ever.

    Example:
        >>> from kernels.rms_norm import rms_norm
        >>> with torch.inference_mode(), use("reference"):
        ...     rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), 1e-6)
        tensor([0.8485, 1.1314])
    """
    with torch.library._scoped_library("headkv", "IMPL") as library:
        for kernel in all_kernels().values():
            function = kernel.reference if form == "reference" else kernel.launch
            if function is not None:
                library.impl(kernel.name, function, "CPU")
        yield
