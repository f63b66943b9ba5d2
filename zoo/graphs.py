"""The decode step as graphs: captured once per number of rows, replayed for every token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kernels.checks import check


class GraphError(RuntimeError):
    """A graph cannot be made, or would no longer compute what the step does."""


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Do the same work again, on the same memory."""
        ...


class Place(NamedTuple):
    """Where a tensor that a graph reads or writes is held, so that another one in its place is noticed.

    Args:
        name: for people.
        table: what holds it.
        key: under which.
    """

    name: str
    table: dict[str, Any]
    key: str


def places(model: nn.Module, **holders: object) -> Iterator[Place]:
    """Places of a model's parameters and buffers, and of all tensors that further objects hold as attributes.

    Args:
        model: the model.
        **holders: by the name that errors call them.

    Yields:
        One place per tensor.

    Example:
        >>> [place.name for place in places(nn.Linear(2, 2), other=nn.Parameter)]
        ['weight', 'bias']
    """
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    yield Place(f"{path}.{key}".lstrip("."), table, key)
    for name, holder in holders.items():
        for key, value in vars(holder).items():
            if isinstance(value, Tensor):
                yield Place(f"{name}.{key}", vars(holder), key)


def row_counts(rows: int) -> list[int]:
    """Numbers of rows that graphs are made for: powers of two, and all.

    Example:
        >>> row_counts(6)
        [1, 2, 4, 6]
    """
    return [*(2**i for i in range(rows.bit_length()) if 2**i < rows), rows]


class GraphedStep:
    """Decodes one token per row by replaying a graph, and never in another way.

    There is a graph for the first row, the first two, four and so on, and one for all rows; the smallest that has every
    active row runs. All are captured here, the one of most rows first, so that the others find its memory in the pool.
    A graph works on the memory that it was captured with: every call first checks that all of it is still where it was.

    Args:
        step: takes token_B (int64) and active_B (bool) of up to `rows` rows and gives their logits (B, V). Its work
            must depend on nothing but these tensors and what is at `fixed`, and must not wait for the device. It is
            called with no row active, and may then leave no trace.
        rows: B.
        vocab_size: V.
        dtype: of the logits.
        device: where everything is.
        fixed: places of all that the step reads and writes.
        capture: makes a graph of a function without arguments, which it may also run a few times.

    Raises:
        GraphError: the step cannot be captured, **or** it replaces what is at a fixed place.

    Example:
        >>> from types import SimpleNamespace
        >>> total = SimpleNamespace(sum_B=torch.zeros(3, dtype=torch.int64))
        >>> def step(token_B, active_B):
        ...     total.sum_B[: len(token_B)] += token_B * active_B
        ...     return total.sum_B[: len(token_B), None] * 1.0
        >>> class Again:
        ...     def __init__(self, run):
        ...         self.replay = run
        >>> size = {"rows": 3, "vocab_size": 1, "dtype": torch.float32, "device": torch.device("cpu")}
        >>> graphed = GraphedStep(step, **size, fixed=places(nn.Module(), total=total), capture=Again)
        >>> _ = graphed(torch.tensor([1, 2, 3]), [True, False, True])
        >>> graphed(torch.tensor([1, 2, 3]), [True, False, False])[:, 0]
        tensor([2., 0., 3.])
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], Tensor],
        *,
        rows: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
        fixed: Iterable[Place],
        capture: Callable[[Callable[[], None]], Graph],
    ) -> None:
        self._token_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self._active_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self._logits_BV = torch.zeros(rows, vocab_size, dtype=dtype, device=device)
        self._active = [False] * rows
        self._places = list(fixed)
        self._addresses = self._addresses_now()
        self._graphs: dict[int, Graph] = {}
        for count in reversed(row_counts(rows)):
            self._graphs[count] = capture(partial(self._run, step, count))
            self._check_addresses()

    def _run(self, step: Callable[[Tensor, Tensor], Tensor], count: int) -> None:
        self._logits_BV[:count].copy_(step(self._token_B[:count], self._active_B[:count]))

    def __call__(self, token_B: Tensor, active: Sequence[bool]) -> Tensor:
        """Decode one token per row.

        Args:
            token_B: the token that each row continues with.
            active: rows that take part.

        Returns:
            (B, V) logits, a copy; those of rows that do not take part mean nothing.

        Raises:
            GraphError: something that the graphs work on has moved.
            ValueError: tokens or flags are not of as many rows, **or** tokens are no integers or elsewhere.
        """
        check("token_B", token_B, shape=self._token_B.shape, dtype=(torch.int64, torch.int32), like=self._token_B)
        if len(active) != len(self._active):
            raise ValueError(f"active has {len(active)} flags, it must have {len(self._active)}")
        self._check_addresses()
        if list(active) != self._active:  # flags come from the host, which may have to wait for their way to a device
            self._active = list(active)
            self._active_B.copy_(torch.tensor(self._active))
        self._token_B.copy_(token_B)
        used = max((row + 1 for row, flag in enumerate(active) if flag), default=1)
        self._graphs[min(count for count in self._graphs if count >= used)].replay()
        return self._logits_BV.clone()

    def _addresses_now(self) -> list[int]:
        return [table[key].data_ptr() for _, table, key in self._places]

    def _check_addresses(self) -> None:
        try:
            now = self._addresses_now()
        except (KeyError, AttributeError):
            now = []
        if now != self._addresses:
            moved = [place.name for place, a in zip(self._places, self._addresses, strict=True) if _address(place) != a]
            raise GraphError(
                f"{moved[0]} is not where it was when the decode step was captured ({len(moved)} of "
                f"{len(self._places)} tensors have moved): make a new Engine after changing a model"
            )


def _address(place: Place) -> int | None:
    tensor = place.table.get(place.key)
    return tensor.data_ptr() if isinstance(tensor, Tensor) else None


class CudaGraphs:
    """Captures on a CUDA device. All graphs of one object share a pool of memory, so they cannot run side by side.

    The function runs twice before it is captured, so that kernels are compiled and libraries ready. The second time and
    when it is captured, PyTorch raises where it would wait for the device.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], object]) -> Graph:
        """Capture a function.

        Args:
            run: launches work on the device's current stream.

        Returns:
            The graph.

        Raises:
            GraphError: it waits for the device, **or** CUDA refuses.
        """
        with torch.cuda.device(self._device), _named_errors():
            graph, outer = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            self._stream.wait_stream(outer)
            with torch.cuda.stream(self._stream):
                run()
                with _no_waiting():
                    run()
            outer.wait_stream(self._stream)
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream), _no_waiting():
                run()
        return graph


@contextmanager
def _no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise GraphError(f"the decode step cannot be captured ({reason}): run uncompiled, and report it") from error
