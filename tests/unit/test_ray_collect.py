# SPDX-License-Identifier: Apache-2.0
"""Ray workers: every unit once, also when a worker is lost; their errors in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_specdecpp.training.collect import ray_collect
from vllm_specdecpp.training.collect.ray_collect import TRIES, collect_with_ray

# As the collection itself does before it imports Ray.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")


@pytest.fixture(autouse=True, scope="module")
def cluster():
    """One local Ray for all tests, started as ``collect_with_ray`` starts its own."""
    _, ours = ray_collect._connect(num_workers=2)
    assert ours
    yield
    ray.shutdown()


def _toy_collector(folder: Path, failing_unit: int, deaths: int, message: str = ""):
    """Writes a file a unit; at ``failing_unit`` its process ends ``deaths`` times, or it raises ``message``."""

    # Inside a function: pickled by value, since a worker cannot import this file.
    class Toy:
        def collect(self, unit_index, prompts):
            attempts = folder / f"attempts-{unit_index}"
            with attempts.open("a") as file:
                file.write(f"{os.getpid()}\n")
            if unit_index == failing_unit:
                if message:
                    raise ValueError(message)
                if len(attempts.read_text().splitlines()) <= deaths:
                    os._exit(1)
            (folder / f"unit-{unit_index}").write_text(" ".join(prompts))
            return {"rows": len(prompts), "pid": os.getpid()}

        def close(self):
            pass

    return Toy


UNITS = {3: ["a", "b"], 0: ["c"], 7: ["d", "e", "f"], 1: ["g"], 9: ["h"]}


def test_the_unit_of_a_lost_worker_is_collected_again_and_no_other(tmp_path):
    found = list(collect_with_ray(UNITS, _toy_collector(tmp_path, 7, deaths=1), num_workers=2))
    assert sorted(unit for unit, _ in found) == sorted(UNITS), "each unit once"
    attempts = {unit: (tmp_path / f"attempts-{unit}").read_text().split() for unit in UNITS}
    assert {unit: len(pids) for unit, pids in attempts.items()} == {0: 1, 1: 1, 3: 1, 7: 2, 9: 1}
    assert len(set(attempts[7])) == 2 and str(os.getpid()) not in sum(attempts.values(), [])
    assert {unit: (tmp_path / f"unit-{unit}").read_text().split() for unit in UNITS} == UNITS
    assert {unit: summary["rows"] for unit, summary in found} == {unit: len(ps) for unit, ps in UNITS.items()}


@pytest.mark.slow
def test_relative_paths_of_the_command_hold_in_the_workers(tiny, tmp_path, monkeypatch):
    """A worker has another working directory: it must neither write nor look elsewhere. Its labels are those that are
    made without Ray."""
    from vllm_specdecpp.data.shards import open_dataset
    from vllm_specdecpp.training.collect.command import run
    from vllm_specdecpp.training.collect.options import CollectOptions

    monkeypatch.chdir(tmp_path)
    Path("models").symlink_to(tiny.root)
    Path("prompts.txt").write_text("one\ntwo\nthree\n")
    shared: dict[str, Any] = {
        "target": "models/target", "draft": "models/draft_good", "prompts": "prompts.txt", "dtype": "float32",
        "unit": 2, "max_tokens": 12, "kv_cache_mib": 64, "eager": True,
    }  # fmt: skip
    assert run(CollectOptions(out=Path("labels"), ray=2, **shared)) == 0
    labels = open_dataset(tmp_path / "labels")
    assert labels.done_units() == {0, 1} and labels.summary().prompts == 3
    assert labels.manifest.target == "models/target"
    assert run(CollectOptions(out=Path("plain"), **shared)) == 0
    for one, other in zip(labels.shards(), open_dataset(tmp_path / "plain").shards(), strict=True):
        assert one.prompts == other.prompts
        assert torch.equal(one.token_ids, other.token_ids) and torch.equal(one.outcome, other.outcome)


@pytest.mark.slow  # four workers start, one after the other
def test_a_unit_that_always_loses_its_worker_ends_the_run(tmp_path):
    with pytest.raises(ValueError, match=f"^specdecpp: a Ray worker was lost {TRIES} times"):
        list(collect_with_ray({0: ["a"], 1: ["b"]}, _toy_collector(tmp_path, 1, deaths=99), num_workers=2))
    assert len((tmp_path / "attempts-1").read_text().splitlines()) == TRIES


def test_a_collectors_error_arrives_as_it_is(tmp_path):
    message = "specdecpp: draft='x' has another vocabulary; take one of the target's family"
    with pytest.raises(ValueError) as failure:
        list(collect_with_ray(UNITS, _toy_collector(tmp_path, 3, 0, message), num_workers=2))
    assert str(failure.value) == message
    assert len((tmp_path / "attempts-3").read_text().splitlines()) == 1, "a wrong input is not tried again"


def test_nothing_to_do_starts_nothing():
    def never():
        raise AssertionError("no worker is needed")

    assert list(collect_with_ray({}, never, num_workers=2)) == []


def test_it_listens_on_loopback_only():
    found = set()
    mine = {node["NodeManagerPort"] for node in ray.nodes()} | {node["ObjectManagerPort"] for node in ray.nodes()}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, port = local.split(":")
            if state == "0A" and int(port, 16) in mine:  # listening
                found.add(address)
    loopback = ("0100007F", "0000000000000000FFFF00000100007F")  # 127.0.0.1 in the kernel's byte order, v4 and mapped
    assert found and found <= set(loopback)
    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
