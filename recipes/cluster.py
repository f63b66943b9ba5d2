"""Independent jobs spread over a Ray cluster.

The cluster is the one that RAY_ADDRESS names, or that runs on this machine, or else one of this machine's processors.
Its machines need this project and the model under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def require_ray() -> Any:
    """The module.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs Ray: run `pip install -c constraints.txt -e '.[ray]'`") from None
    return ray


def spread(
    make: Callable[[], Callable[[Given], Iterable[Made]]],
    jobs: Sequence[Given],
    *,
    workers: int | None,
    cpus: int,
    gpus: int,
) -> Iterator[list[Made]]:
    """Do jobs on a cluster, by workers that live as long as there are jobs.

    Args:
        make: makes what does a job; called once in every worker.
        jobs: what it is called with.
        workers: at most; as many as there is room for if None.
        cpus: processors that a worker takes.
        gpus: GPUs that a worker takes.

    Yields:
        What each job gave, in the order in which they are done.

    Raises:
        ValueError: there is no Ray, or no room for so many workers.
        ChildProcessError: a worker was lost.
    """
    ray = require_ray()
    from ray.util import ActorPool

    class Hand:
        def __init__(self) -> None:
            self._do = make()

        def do(self, job: Given) -> list[Made]:
            return list(self._do(job))

    ray.init(include_dashboard=False, logging_level="ERROR")
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needs = {kind: need for kind, need in (("CPU", cpus), ("GPU", gpus)) if need}
        room = sum(min(int(node.get(kind, 0) // need) for kind, need in needs.items()) for node in nodes)
        if room < (workers or 1):  # Ray would wait for more machines for ever
            raise ValueError(f"the cluster has room for {room} workers of {cpus} CPUs and {gpus} GPUs: ask for less")
        hand = ray.remote(num_cpus=cpus, num_gpus=gpus)(Hand)
        hands = [hand.remote() for _ in range(min(workers or room, len(jobs)))]
        yield from ActorPool(hands).map_unordered(lambda actor, job: actor.do.remote(job), jobs)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise ChildProcessError(f"a worker was lost; run this again for what is still missing ({error})") from error
    finally:
        ray.shutdown()
