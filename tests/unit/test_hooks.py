# SPDX-License-Identifier: Apache-2.0
"""The ledger against the installed vLLM, which may be 0.33 (``make test-v033``), and against 0.33's wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vllm_specdecpp.engine import supported

OTHER_VERSION = "0.33.0"


def test_ledger_matches_the_installed_vllm():
    assert supported.problems() == ()


def test_every_entry_says_why():
    for hook in supported.LEDGER:
        assert hook.why, hook.symbol
    assert len({hook.symbol for hook in supported.LEDGER}) == len(supported.LEDGER)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, "m:C.f is gone"),
        ("class C: pass", "m:C.f is gone"),
        ("class C:\n def f(self): pass", "m:C.f has no x"),
        ("class C:\n def f(self, *, x=1): pass", None),
        ("class C:\n async def f(self, x): pass", None),
    ],
)
def test_a_changed_symbol_is_found(source, expected):
    found = supported.find_problems(lambda _: source, (supported.Hook("m:C.f", ("self", "x")),))
    assert found == ([expected] if expected else [])


def test_a_folder_that_may_not_be_read_does_not_end_the_start(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(Path, "exists", lambda _: (_ for _ in ()).throw(PermissionError(13, "denied")))
    supported.problems.cache_clear()
    assert supported.problems() == ()


@pytest.mark.parametrize(("change", "times"), [("", 1), ("# another\n", 2)])
def test_sources_that_were_compared_are_not_parsed_again(monkeypatch, tmp_path, change, times):
    """Nor where something was missing: that is never kept."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(supported, "LEDGER", (supported.Hook("m:C.f", ("x",)),))
    sources, parsed = ["class C: pass", "class C:\n def f(self, x): pass\n"], []
    find = supported.find_problems

    def counted(get):
        parsed.append(1)
        return find(get, supported.LEDGER)

    monkeypatch.setattr(supported, "find_problems", counted)
    for source in [*sources[:1] * 2, sources[1], sources[1] + change]:
        monkeypatch.setattr(supported, "_installed_source", lambda _, source=source: source)
        supported.problems.cache_clear()
        assert bool(supported.problems()) is (source == sources[0])
    supported.problems.cache_clear()
    assert len(parsed) == 2 + times


@pytest.mark.parametrize("version", [None, "0.31.4", "0.34.0", "1.0"])
def test_an_unknown_vllm_is_refused_in_one_line(monkeypatch, version):
    supported.problems.cache_clear()
    monkeypatch.setattr(supported, "vllm_version", lambda: version)
    try:
        with pytest.raises(ValueError, match="supported version") as caught:
            supported.require_supported()
    finally:
        supported.problems.cache_clear()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0"])
def test_a_supported_vllm_is_checked_symbol_by_symbol(monkeypatch, version):
    supported.problems.cache_clear()
    monkeypatch.setattr(supported, "vllm_version", lambda: version)
    monkeypatch.setattr(supported, "_installed_source", lambda module: None)
    try:
        assert len(supported.problems()) == len(supported.LEDGER)
    finally:
        supported.problems.cache_clear()


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1000)
def test_ledger_matches_the_other_version(tmp_path):
    """Its sources are read from its wheel; ``make test-v033`` runs them."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path)]
    done = subprocess.run(
        [*command, f"vllm=={OTHER_VERSION}"], capture_output=True, text=True, timeout=900, check=False
    )
    if done.returncode:
        pytest.skip(f"vLLM {OTHER_VERSION} could not be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())

        def read(module: str) -> str | None:
            base = Path(*module.split("."))
            for path in (base.with_suffix(".py"), base / "__init__.py"):
                if path.as_posix() in names:
                    return archive.read(path.as_posix()).decode()
            return None

        assert supported.find_problems(read) == []
