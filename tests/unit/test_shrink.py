# SPDX-License-Identifier: Apache-2.0
"""``shrink``: what it writes, what it counts, what it refuses; nothing is left half done."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import HIDDEN_SIZE
from vllm_specdecpp import cli
from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.shrink import check, checkpoint, schemes


def shrink(*arguments: Any) -> int:
    return cli.main(["shrink", *map(str, arguments)])


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in Path(folder).glob("model*.safetensors"):
        found |= load_file(path)
    return found


def decompressed(folder: str | Path, scheme: str) -> dict[str, torch.Tensor]:
    """Linear layer's weight → [num_out, num_in] float32, by compressed-tensors' own decompression."""
    from compressed_tensors.compressors import BaseCompressor

    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    found = tensors(folder)
    groups = {target: group["format"] for group in config["config_groups"].values() for target in group["targets"]}
    modules = [name.removesuffix(".weight_scale") for name in found if name.endswith(".weight_scale")]
    parts = {m: {n.rpartition(".")[2]: value for n, value in found.items() if n.startswith(f"{m}.")} for m in modules}
    whole = {}
    for name, part in parts.items():
        kind = schemes.output_scheme(scheme) if name == schemes.OUTPUT else scheme
        target = schemes.OUTPUT_LAYER if name == schemes.OUTPUT else schemes.LAYERS
        made = schemes.scheme_for(kind, {name: (HIDDEN_SIZE, HIDDEN_SIZE)}, [target])
        compressor = BaseCompressor.get_value_from_registry(groups[target])
        whole[f"{name}.weight"] = compressor.decompress(part, made)["weight"].float()
    return whole


@pytest.mark.parametrize(("scheme", "steps"), [("int8", 127.5), ("fp8", 8.0), ("int4", 7.5)])
def test_weights_come_back_within_half_a_step(tiny, tmp_path, capsys, scheme, steps):
    """fp8's steps are relative: 2^-3 of a value's power of two. Groups of int4 have 64 inputs here."""
    assert shrink(tiny.draft_good, "--out", tmp_path / "out", "--scheme", scheme) == 0
    before, after = tensors(tiny.draft_good), tensors(tmp_path / "out")
    found = decompressed(tmp_path / "out", scheme)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(found) == 15 and config["ignore"] == ["model.embed_tokens"]
    assert config["format"] == {"int8": "int-quantized", "fp8": "float-quantized", "int4": "mixed-precision"}[scheme]
    for name, weight in before.items():
        if name not in found:
            assert torch.equal(after[name], weight), name
            continue
        group = HIDDEN_SIZE if scheme == "int4" else weight.shape[1]
        largest = weight.unflatten(1, (-1, group)).abs().amax(-1, keepdim=True).expand(-1, -1, group).flatten(1)
        if scheme == "fp8":
            allowed = weight.abs() / (2 * steps) + largest * 2**-9 / 448
        else:
            allowed = largest / steps * 0.51
            clipped = weight > largest * (1 - 0.5 / steps)  # there is one step more below zero than above
            allowed = torch.where(clipped, 2 * allowed, allowed)
        assert bool(((found[name] - weight).abs() <= allowed + 1e-6).all()), name
    assert "a pass reads" in capsys.readouterr().out


def test_the_folder_says_where_it_comes_from_and_is_whole(tiny, tmp_path):
    out = tmp_path / "deep" / "out"
    assert shrink(tiny.draft_good, "--out", out, "--scheme", "int8") == 0
    made = json.loads((out / "shrink.json").read_text())
    assert made["source"].endswith("/draft_good") and made["scheme"] == "int8" and made["versions"]["torch"]
    names = {path.name for path in Path(tiny.draft_good).iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"shrink.json", "model.safetensors.index.json"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    sizes = {name: tensor.nbytes for name, tensor in tensors(tiny.draft_good).items()}
    assert made["bytes_a_pass"]["before"] == sum(sizes.values()) - sizes["model.embed_tokens.weight"]
    after = sum(tensor.nbytes for tensor in tensors(out).values()) - sizes["model.embed_tokens.weight"]
    assert made["bytes_a_pass"]["after"] == after < made["bytes_a_pass"]["before"]
    assert shrink(out, "--out", tmp_path / "again") == 2, "quantised already"


def test_files_of_any_size_are_read_and_written(tiny, tmp_path):
    """A sharded source, with a foreign file beside it, into several files."""
    source, whole = tmp_path / "source", tensors(tiny.draft_good)
    shutil.copytree(tiny.draft_good, source)
    (source / "model.safetensors").unlink()
    with checkpoint.new_folder(tmp_path / "parts", 0) as parts:
        checkpoint.write_tensors(parts, iter(whole.items()), file_bytes=100_000)
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for path in (tmp_path / "parts").iterdir():
        shutil.copy(path, source)
    save_file({"foreign": torch.zeros(2)}, source / "consolidated.safetensors")
    found = checkpoint.open_checkpoint(str(source))
    assert dict(found.tensors()).keys() == whole.keys() == found.shapes.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.tensors())


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), True),
        ("model.layers.11.mlp.down_proj.weight", (8, 8), True),
        ("gpt_neox.layers.3.mlp.dense_h_to_4h.weight", (8, 8), True),
        ("transformer.h.1.attn.c_proj.weight", (8, 8), False),
        ("model.layers.0.mlp.gate.weight", (8, 8), False),
        ("model.layers.0.self_attn.q_proj.bias", (8,), False),
        ("model.layers.0.input_layernorm.weight", (8,), False),
        ("model.embed_tokens.weight", (8, 8), False),
        ("lm_head.weight", (8, 8), False),
        ("vision_proj.weight", (8, 8), False),
    ],
)
def test_which_tensors_are_quantised(name, shape, expected):
    assert schemes.is_linear(name, shape) is expected


def tie(folder: str, out: Path, tied: bool | None) -> Path:
    """A copy whose output layer is the embedding; ``tied``: what its configuration says, None for nothing."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config.pop("tie_word_embeddings")
    (out / "config.json").write_text(json.dumps(config | ({} if tied is None else {"tie_word_embeddings": tied})))
    found = tensors(out)
    found.pop("lm_head.weight")
    save_file(found, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("tied", [True, None])
def test_a_tied_output_layer_becomes_one_of_its_own(tiny, tmp_path, tied):
    """Gemma's configuration need not say that it is tied."""
    source, out = tie(tiny.draft_good, tmp_path / "source", tied), tmp_path / "out"
    assert shrink(source, "--out", out, "--scheme", "int8") == 0
    found, embedding = tensors(out), tensors(source)["model.embed_tokens.weight"]
    assert torch.equal(found["model.embed_tokens.weight"], embedding) and found["lm_head.weight"].dtype == torch.int8
    assert torch.allclose(
        decompressed(out, "int8")["lm_head.weight"], embedding, atol=float(embedding.abs().max()) / 128
    )
    config = json.loads((out / "config.json").read_text())
    assert not config["tie_word_embeddings"] and config["quantization_config"]["ignore"] == ["model.embed_tokens"]
    made = json.loads((out / "shrink.json").read_text())["bytes_a_pass"]
    assert made["after"] == sum(t.nbytes for t in found.values()) - embedding.nbytes < made["before"]


@pytest.mark.parametrize("name", sorted(schemes.KNOWN_OUTPUTS))
def test_vllm_can_quantise_the_output_layer_of(name):
    """Its class hands the quantisation to ``lm_head``, and ties it only if the configuration says so."""
    from vllm.model_executor.models.registry import ModelRegistry

    model = ModelRegistry.models[name].load_model_cls()
    source = next(s for s in map(inspect.getsource, model.__mro__) if "ParallelLMHead(" in s)
    call = source[source.index("self.lm_head = ParallelLMHead(") :]
    assert "quant_config=quant_config" in call[: call.index("tie_word_embeddings")]
    assert call.index("if config.tie_word_embeddings") < call.index("tie_weights(")


def test_an_unknown_output_layer_stays(tiny, tmp_path):
    shutil.copytree(tiny.draft_good, tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text()) | {"architectures": ["OtherForCausalLM"]}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    assert shrink(tmp_path / "source", "--out", tmp_path / "out", "--scheme", "int8") == 0
    head = tensors(tmp_path / "out")["lm_head.weight"]
    assert torch.equal(head, tensors(tiny.draft_good)["lm_head.weight"])


@pytest.mark.parametrize(
    ("flags", "scheme", "says"),
    [
        ("avx2 fma", "int8", "without VNNI .* no faster than bfloat16, and their sums overflow"),
        ("avx2 fma", "int4", "no kernel for it on CPUs without AVX-512"),
        ("avx512f", "int4", "without VNNI"),
        ("avx512f avx512_vnni", "int8", None),
        ("avx2 avx_vnni", "int8", None),
        ("avx512f avx512_vnni", "fp8", "few CPUs have fp8"),
        ("", "int8", None),  # nothing is known
    ],
)
def test_a_scheme_that_this_cpu_is_no_good_at_is_named(monkeypatch, flags, scheme, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(schemes, "cpu_flags", lambda: frozenset(flags.split()))
    found = schemes.missing_kernel(scheme)
    assert (found or "") == "" if says is None else re.search(says, found or "")


def test_int4_takes_the_largest_group_that_divides():
    assert schemes.scheme_for("int4", {"a": (8, 256), "b": (8, 192)}).weights.group_size == 64
    with pytest.raises(ValueError, match="groups of 32, and b has 48"):
        schemes.scheme_for("int4", {"a": (8, 256), "b": (8, 48)})


def test_bytes_of_a_tied_output_layer_count_once(tmp_path):
    shapes: Any = {"model.embed_tokens.weight": (10, 4), "model.layers.0.mlp.up_proj.weight": (4, 4)}
    found = checkpoint.Checkpoint(tmp_path, {"tie_word_embeddings": True}, {}, shapes, {})
    sizes = {"model.embed_tokens.weight": 80, "model.layers.0.mlp.up_proj.weight": 32}
    assert found.is_tied and found.bytes_a_pass(sizes) == 112


# Bad input: one line each, and nothing is left.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scheme", "int3"], "--scheme int3: input should be 'int8', 'fp8' or 'int4'"),
        (["--check"], "check= needs the target and some prompts"),
    ],
)
def test_bad_options_are_told_in_one_line(tiny, tmp_path, capsys, arguments, words):
    assert shrink(tiny.draft_good, "--out", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error and error.startswith("vllm-specdecpp shrink: ")
    assert not list(tmp_path.iterdir())


def test_bad_drafts_are_told_in_one_line(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_text("{}")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text("{}")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\x08")
    shutil.copytree(tiny.draft_good, tmp_path / "other")
    (tmp_path / "reaches").mkdir()
    (tmp_path / "reaches" / "config.json").write_text("{}")
    index = json.dumps({"weight_map": {"secret": "../other/model.safetensors"}})
    (tmp_path / "reaches" / "model.safetensors.index.json").write_text(index)
    cases = {
        "empty": "is no model", "weightless": "holds no *.safetensors", "cut": "cannot be read", "no/where": "hub",
        "reaches": "names '../other/model.safetensors', which is not in its folder",
    }  # fmt: skip
    for name, words in cases.items():
        draft = tmp_path / name if name != "no/where" else name
        assert shrink(draft, "--out", tmp_path / "out", "--scheme", "int8") == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line, name


def test_nothing_is_overwritten(tiny, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert shrink(tiny.draft_good, "--out", tmp_path / "out", "--scheme", "int8") == 2
    assert "exists; name another folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot be written"), checkpoint.new_folder(tmp_path / "out", 0):
        pass  # it came into being meanwhile
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_full_disk_leaves_nothing(tiny, tmp_path, capsys, monkeypatch, when):
    if when == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 100, 0))
    else:
        full = OSError(28, "No space left on device")
        monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(full))
    assert shrink(tiny.draft_good, "--out", tmp_path / "out", "--scheme", "int8") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert ("0.0 GB are free" if when == "before" else "the disk is full") in line
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_nothing(tiny, tmp_path):
    program = (
        "import sys, time\nfrom vllm_specdecpp import cli\nfrom vllm_specdecpp.shrink import checkpoint\n"
        "real = checkpoint.write_whole\n"
        "def slow(*a):\n real(*a)\n print('half', flush=True)\n time.sleep(3600)\n"
        "checkpoint.write_whole = slow\nsys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "shrink", tiny.draft_good, "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "half\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(signal.SIGTERM)  # Ctrl-C raises by itself
        last = process.stderr.read().strip().splitlines()[-1]
    assert process.returncode == 130 and "interrupted; the folder is there whole" in last
    assert list(tmp_path.iterdir()) == []


# --check, but for the engines.


def played(agrees: list[list[bool]], step: float, verify: float = 0.1) -> check.Played:
    curves = {"first": step, "step": step, "verify": verify, "read": step}
    return check.Played(agrees, {name: {1: seconds, 16: seconds} for name, seconds in curves.items()})


def test_agreement_counts_what_was_verified():
    rounds = [
        {"request_id": "a", "candidates": [1, 2, 3], "accepted": 1},
        {"request_id": "b", "candidates": [], "accepted": 0},
        {"request_id": "a", "candidates": [4, 5], "accepted": 2},
        {"request_id": "b", "candidates": [6], "accepted": 0},
    ]
    assert check.agreements(rounds) == [[True, False, True, True], [False]]
    assert check.Played(check.agreements(rounds), {}).agreement == 0.6


def test_predicted_speed_is_that_of_the_best_fixed_length():
    """Draft pass 0.01 s, verification 0.1 s: nine tokens in 0.18 s where all agree, one in 0.1 s where none does."""
    costs = CostModel({1: 0.01}, {1: 0.01}, {1: 0.1, 200: 0.1})
    assert check.tokens_per_second([[True] * 9], costs, 1) == (pytest.approx(9 / 0.18), 8)
    assert check.tokens_per_second([[False] * 9], costs, 4) == (pytest.approx(4 / 0.1), 0)
    # Two agree, one does not: K = 2 emits three tokens in 0.12 s.
    assert check.tokens_per_second([[True, True, False] * 5], costs, 1) == (pytest.approx(3 / 0.12), 2)


@pytest.mark.parametrize(
    ("agrees", "step", "expected"),
    [
        ([[True] * 40], 0.01, True),  # a third of the time, nothing lost
        ([[True] * 40], 0.03, False),  # no faster
        ([[True] * 40], 0.05, False),  # slower
        ([[True, False] * 20], 0.01, False),  # faster passes, and every other candidate lost
    ],
)
def test_it_pays_if_it_is_faster(agrees, step, expected):
    lines, pays = check.report(played([[True] * 40], 0.03), played(agrees, step))
    assert pays is expected and ("would not" not in lines[-1]) is expected
    assert f"{step / 0.03:.2f} of the time" in lines[2]


def test_the_noise_of_the_targets_passes_counts_for_neither():
    fast, slow = played([[True] * 40], 0.03, verify=0.1), played([[True] * 40], 0.03, verify=0.2)
    assert not check.report(slow, fast)[1] and "1.00, predicted" in check.report(slow, fast)[0][-2]


def test_a_folder_that_is_there_is_only_checked(tiny, tmp_path, monkeypatch, capsys):
    asked: list[Any] = []

    def fake(options: Any) -> int:
        asked.append(options)
        return 1

    monkeypatch.setattr(check, "check", fake)
    arguments = [tiny.draft_good, "--out", tmp_path / "out", "--check", "--target", tiny.target, "--prompts", "p.jsonl"]
    assert shrink(*arguments, "--scheme", "int8") == 1
    written = (tmp_path / "out" / "shrink.json").stat().st_mtime_ns
    assert shrink(*arguments) == 1 and len(asked) == 2
    assert (tmp_path / "out" / "shrink.json").stat().st_mtime_ns == written
    assert shrink(*arguments, "--scheme", "fp8") == 2
    assert shrink(tiny.draft_rand, *arguments[1:]) == 2
    assert capsys.readouterr().err.count("holds another shrunk draft") == 2 and len(asked) == 2


def test_prompts_are_spread_over_their_source(tiny, tmp_path):
    from tests.dataset_files import make_manifest
    from vllm_specdecpp.data.manifest import write_manifest
    from vllm_specdecpp.shrink.options import ShrinkOptions

    (tmp_path / "p.txt").write_text("\n".join("word " * n for n in range(1, 11)))
    options = ShrinkOptions(
        draft="d", out=tmp_path, check=True, target=tiny.target, prompts=str(tmp_path / "p.txt"), num_prompts=3
    )
    lengths = [len(ids) for ids in check.read_prompts(options)]
    assert len(lengths) == 3 and lengths[1] - lengths[0] == lengths[2] - lengths[1] == 3
    (tmp_path / "d" / "responses").mkdir(parents=True)
    write_manifest(tmp_path / "d", make_manifest())
    row = {"id": "a", "set": "s", "prompt_token_ids": [5, 6], "token_ids": [7]}
    (tmp_path / "d" / "responses" / "00000.jsonl").write_text(json.dumps(row) + "\n")
    assert check.read_prompts(options.model_copy(update={"prompts": str(tmp_path / "d")})) == [[5, 6]]
