# SPDX-License-Identifier: Apache-2.0
"""What is packaged, where the kernels end up, what the install asks for, and that importing stays cheap."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vllm_specdecpp

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "vllm_specdecpp", "kernels"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository to build in: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("repository")
    for name in SOURCES:
        source, copy = ROOT / name, folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    return folder


def build(tree: Path, kind: str, out: Path) -> zipfile.ZipFile:
    """The wheel that pip would install; ``kind`` is ``wheel`` or ``editable`` (PEP 517, 660)."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(out / done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return build(tree, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata_of_wheel(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


def run(*command: str | Path, cwd: Path) -> list[str]:
    """Lines that a command prints, without this environment's variables for Python."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def python(code: str, *options: str, cwd: Path) -> list[str]:
    """Lines that ``code`` prints in a new process."""
    return run(sys.executable, *options, "-c", code, cwd=cwd)


def test_wheel_holds_the_package_its_data_and_the_kernels_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    for path in ROOT.glob("vllm_specdecpp/**/*"):
        if path.suffix in (".py", ".json", ".html") or path.name == "py.typed":
            assert str(path.relative_to(ROOT)) in names
    for path in ROOT.glob("kernels/**/*.py"):
        assert f"vllm_specdecpp/{path.relative_to(ROOT)}" in names
    assert {name.split("/")[0] for name in names} == {"vllm_specdecpp"}


def test_wheel_leaves_the_users_vllm_and_torch_alone(metadata_of_wheel: Message) -> None:
    requirements = [Requirement(line) for line in metadata_of_wheel.get_all("Requires-Dist", [])]
    assert not [requirement for requirement in requirements if re.match(r"vllm\b", requirement.name)]
    (torch,) = [requirement for requirement in requirements if requirement.name == "torch"]
    assert str(torch.specifier) == ""
    assert metadata_of_wheel["Requires-Python"] == ">=3.10"


def test_wheel_names_version_extras_and_entry_point(wheel: zipfile.ZipFile, metadata_of_wheel: Message) -> None:
    assert metadata_of_wheel["Name"] == "vllm-specdecpp"
    assert metadata_of_wheel["Version"] == vllm_specdecpp.__version__
    assert metadata_of_wheel.get_all("Provides-Extra") == ["cpu", "train", "bench", "docs", "dev"]
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert wheel.read(name).decode().split() == [
        "[console_scripts]", "vllm-specdecpp", "=", "vllm_specdecpp.cli:main",
        "[vllm.general_plugins]", "specdecpp", "=", "vllm_specdecpp.plugin:register",
    ]  # fmt: skip


def test_editable_install_maps_the_kernels_below_the_package(tree: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    build(tree, "editable", tmp_path).extractall(site)
    code = f"""
import site
site.addsitedir({str(site)!r})
import vllm_specdecpp, vllm_specdecpp.kernels
print(vllm_specdecpp.__file__)
print(vllm_specdecpp.kernels.__file__)
"""
    # -S: without the installed packages, among which this very package may be.
    assert python(code, "-S", cwd=tmp_path) == [
        str(tree / "vllm_specdecpp/__init__.py"),
        str(tree / "kernels/__init__.py"),
    ]


def test_wheel_installs_beside_a_vllm(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """In a fresh environment, which sees this one's packages: vLLM finds the plugin, which imports nothing
    heavy; the command starts."""
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        pytest.skip("needs vLLM")
    fresh = tmp_path / "fresh"
    run(sys.executable, "-m", "venv", "--without-pip", fresh, cwd=tmp_path)
    pip = [sys.executable, "-m", "pip", "--python", str(fresh / "bin/python")]
    run(*pip, "install", "--no-index", "--no-deps", str(wheel.filename), cwd=tmp_path)
    (site,) = fresh.glob("lib/python*/site-packages")
    # Plain paths: an editable install of this package, there, is not followed.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "beside.pth").write_text("\n".join([*others, str(Path(vllm.origin).parents[1])]))
    code = """
import os, sys
import vllm.plugins
from vllm.engine.arg_utils import EngineArgs
own, before = EngineArgs.create_engine_config, set(sys.modules)
os.environ["VLLM_PLUGINS"] = "specdecpp"
vllm.plugins.load_general_plugins()
heavy = "vllm_specdecpp.head.model", "vllm_specdecpp.decision", "vllm_specdecpp.engine.v1.proposer"
print("loaded", *(
    name for name in set(sys.modules) - before
    if name.split(".")[0] in ("vllm", "torch") or name.startswith(heavy)
))
import vllm_specdecpp, vllm_specdecpp.kernels
print(EngineArgs.create_engine_config.__wrapped__ is own)
print(vllm_specdecpp.__file__, vllm_specdecpp.kernels.__file__, sep="\\n")
"""
    found = run(fresh / "bin/python", "-c", code, cwd=tmp_path)
    package = site / "vllm_specdecpp"
    # Every vLLM process loads the plugin: the draft loop, the head and the decision core wait until they are used.
    assert found[-4:] == ["loaded", "True", str(package / "__init__.py"), str(package / "kernels/__init__.py")]
    assert run(fresh / "bin/vllm-specdecpp", "--help", cwd=tmp_path)[0].startswith("usage: vllm-specdecpp")


@pytest.mark.parametrize("module", ["vllm_specdecpp", "vllm_specdecpp.setup.cpu_install"])
def test_import_brings_in_nothing_heavy(module: str) -> None:
    code = f"""
import sys
before = set(sys.modules)
import {module}
loaded = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(name for name in loaded - set(sys.stdlib_module_names)))
"""
    assert python(code, cwd=ROOT) == ["vllm_specdecpp"]


def make_lines(target: str) -> list[str]:
    # Under `make test` this would be a sub-make, which prints the folder it leaves.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "--dry-run", "PYTHON=python3", target]  # else it tries each Python that there may be
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("target", "last"), [("test", "-m pytest "), ("demo", "-m benchmarks.demo"), ("bench", "-m benchmarks.campaign")]
)
def test_nothing_is_printed_after_the_command_itself(target: str, last: str) -> None:
    assert last in make_lines(target)[-1]


def test_ci_runs_the_tests() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^exec make .*\btest\b", script.read_text(), re.MULTILINE)


def test_the_public_hosts_ci_runs_targets_of_the_makefile() -> None:
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    commands = re.findall(r"^ +- run: (.*)$", workflow, re.MULTILINE)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"check", "docs", "test"} <= {command.removeprefix("make ") for command in commands} <= targets
    assert workflow.count("run:") == len(commands) and all(command.startswith("make ") for command in commands)
    assert 'python-version: "3.11"' in workflow
