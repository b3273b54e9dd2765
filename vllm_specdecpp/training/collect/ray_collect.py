# SPDX-License-Identifier: Apache-2.0
"""Collection spread over a Ray cluster with Ray Data: an actor a worker, each with a collector of its own.

One row of the Ray dataset is one unit (the prompts of one shard). A shard is named by its unit and written by the
worker itself, so the folder must be one that every node sees; what travels through Ray is prompts and summaries. When a
worker is lost, Ray restarts it and gives it the unit again, whose shard it writes anew: none is missing, none there
twice.
"""

from __future__ import annotations

import os
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

TRIES = 4
"""Of one unit: a worker that is lost each time (out of memory, say) ends the run instead of going on for ever."""
_OBJECT_STORE_BYTES = 128 << 20
"""Of a local Ray: only prompts and summaries are kept there."""


class Collector(Protocol):
    """What writes a unit's shard: ``OnPolicyCollector``."""

    def collect(self, unit_index: int, prompts: Any) -> Any: ...

    def close(self) -> None: ...


class _Attempts:
    """A Ray actor that counts how often each unit was begun: Ray itself retries without end."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def begin(self, unit: int) -> int:
        self._counts[unit] += 1
        return self._counts[unit]


class UnitWorker:
    """A Ray Data actor: makes its collector for the first unit, keeps it for the others."""

    def __init__(self, make_collector: Callable[[], Collector], attempts: Any) -> None:
        self._make_collector = make_collector
        self._attempts = attempts
        self._collector: Collector | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        results = [self._result(int(u), pickle.loads(p)) for u, p in zip(batch["unit"], batch["prompts"], strict=True)]
        return {"unit": list(batch["unit"]), "result": [pickle.dumps(result) for result in results]}

    def _result(self, unit: int, prompts: Any) -> Any:
        """What the collector returns, or the ValueError to be raised by the caller: Ray would wrap one raised here."""
        import ray

        if ray.get(self._attempts.begin.remote(unit)) > TRIES:
            return ValueError(
                f"specdecpp: a Ray worker was lost {TRIES} times with unit {unit} (out of memory?); lower ray or batch "
                "and run the same command again: finished units are kept"
            )
        try:
            # Not in __init__, which Ray would try again and again, whatever the error.
            if self._collector is None:
                self._collector = self._make_collector()
                weakref.finalize(self, self._collector.close)  # also at the worker's end
            return self._collector.collect(unit, prompts)
        except ValueError as error:
            return ValueError(str(error))


def collect_with_ray(
    units: Mapping[int, Sequence[Any]],
    make_collector: Callable[[], Collector],
    num_workers: int,
    *,
    gpus_per_worker: int = 1,
) -> Iterator[tuple[int, Any]]:
    """Collect units on a Ray cluster: the one that ``RAY_ADDRESS`` names, else one on this machine, loopback only.

    Args:
        units: unit index → its prompts; those still to be done.
        make_collector: called once in each worker; what it refers to is pickled.
        num_workers: actors; more than there are units are not started.
        gpus_per_worker: that a worker asks for where the cluster has any (its tensor-parallel size).

    Yields:
        (unit index, what ``Collector.collect`` returned), as the units end.

    Raises:
        ValueError: one line: Ray is not installed, the cluster is too small, a collector's own ValueError, or a worker
            that was lost with the same unit ``TRIES`` times. What is finished stays.
    """
    if not units:
        return
    num_workers = min(num_workers, len(units))
    ray, ours = _connect(num_workers)
    try:
        gpus = _gpus(ray.cluster_resources(), num_workers, gpus_per_worker)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        attempts = ray.remote(_Attempts).options(num_cpus=0).remote()
        rows = [{"unit": unit, "prompts": pickle.dumps(list(prompts))} for unit, prompts in sorted(units.items())]
        # A block a unit: what is lost with a worker is one unit's work.
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            UnitWorker,
            fn_constructor_args=(make_collector, attempts),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=gpus,
        )
        for row in done.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, ValueError):
                raise result
            yield int(row["unit"]), result
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else type(error).__name__
        raise ValueError(f"specdecpp: Ray gave up ({reason}); finished units are kept") from error
    finally:
        if ours:
            ray.shutdown()


def _connect(num_workers: int) -> tuple[Any, bool]:
    """The module ``ray``, connected, and whether it is this call that connected it."""
    address = os.environ.get("RAY_ADDRESS")
    # Before Ray is imported: it must not phone home, and a Ray of our own listens on loopback only (Ray's switch for
    # that is named after the systems on which it is the default).
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError("specdecpp: ray needs Ray Data; pip install 'ray[data]'") from None
    if ray.is_initialized():
        return ray, False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"specdecpp: RAY_ADDRESS={address!r} is no Ray cluster ({reason}); check it") from None
        return ray, True
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // num_workers))
    ray.init(
        address="local",
        # CPUs as Ray counts them, not cores: each worker takes one.
        num_cpus=num_workers + 1,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
        **quiet,
    )
    return ray, True


def _gpus(resources: Mapping[str, float], num_workers: int, per_worker: int) -> int:
    """GPUs of each worker; none where the cluster has none."""
    there = int(resources.get("GPU", 0))
    if there and there < num_workers * per_worker:
        raise ValueError(
            f"specdecpp: ray={num_workers} workers with {per_worker} GPUs each need {num_workers * per_worker}, but "
            f"the cluster has {there}; lower ray to {there // per_worker}"
        )
    return per_worker if there else 0
