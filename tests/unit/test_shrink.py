# SPDX-License-Identifier: Apache-2.0
"""``shrink``: what it writes, what it counts, what it refuses; nothing is left half done."""

from __future__ import annotations

import inspect
import json
import json.decoder
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import EOS, HIDDEN_SIZE, VOCAB_SIZE
from vllm_specdecpp import cli
from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.shrink import check, checkpoint, schemes, vocabulary
from vllm_specdecpp.shrink.vocabulary import Text, choose


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
    compressor, parts = BaseCompressor.get_value_from_registry(config["format"]), dict[str, dict[str, torch.Tensor]]()
    for name, value in tensors(folder).items():
        if "_proj." in name:
            module, _, part = name.rpartition(".")
            parts.setdefault(module, {})[part] = value
    made = schemes.scheme_for(scheme, dict.fromkeys(parts, (HIDDEN_SIZE, HIDDEN_SIZE)))
    return {f"{name}.weight": compressor.decompress(p, made)["weight"].float() for name, p in parts.items()}


@pytest.mark.parametrize(("scheme", "steps"), [("int8", 127.5), ("fp8", 8.0), ("int4", 7.5)])
def test_weights_come_back_within_half_a_step(tiny, tmp_path, capsys, scheme, steps):
    """fp8's steps are relative: 2^-3 of a value's power of two. Groups of int4 have 64 inputs here."""
    assert shrink(tiny.draft_good, "--out", tmp_path / "out", "--scheme", scheme) == 0
    before, after = tensors(tiny.draft_good), tensors(tmp_path / "out")
    found = decompressed(tmp_path / "out", scheme)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(found) == 14 and config["ignore"] == ["lm_head", "model.embed_tokens"]
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
    assert shrink(source, "--out", tmp_path / "out", "--scheme", "none") == 0
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors(tmp_path / "out").items())


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


def test_int4_takes_the_largest_group_that_divides():
    assert schemes.scheme_for("int4", {"a": (8, 256), "b": (8, 192)}).weights.group_size == 64
    with pytest.raises(ValueError, match="groups of 32, and b has 48"):
        schemes.scheme_for("int4", {"a": (8, 256), "b": (8, 48)})


def test_bytes_of_a_tied_output_layer_count_once(tmp_path):
    shapes: Any = {"model.embed_tokens.weight": (10, 4), "model.layers.0.mlp.up_proj.weight": (4, 4)}
    found = checkpoint.Checkpoint(tmp_path, {"tie_word_embeddings": True}, {}, shapes, {})
    sizes = {"model.embed_tokens.weight": 80, "model.layers.0.mlp.up_proj.weight": 32}
    assert found.bytes_a_pass(sizes) == 112 and found.bytes_a_pass(sizes, share=0.5) == 72


# The vocabulary.


def test_the_most_frequent_ids_and_all_that_must_be_kept():
    texts = [Text("a", [5, 5, 7], [9, 9, 9]), Text("b", [], [7, 11])]
    kept = choose(texts, {2, 30}, 5, 40)
    assert kept.ids == [2, 5, 7, 9, 30]
    assert choose(texts, {2, 30}, 7, 40).ids == [0, 2, 5, 7, 9, 11, 30], "unseen ones by their rank"


def test_coverage_is_of_text_that_was_not_counted():
    """Every text has a token of its own: counted ones are covered, held-out ones are not."""
    texts = [Text(f"t{i}", [1], [2, 100 + i]) for i in range(400)]
    kept = choose(texts, set(), 3 + 400, 1000)
    held = kept.held_out_tokens // 2
    assert 20 < held < 60 and kept.covered == kept.held_out_tokens - sum(100 + i not in kept.ids for i in range(400))
    assert kept.covered < 0.9 * kept.held_out_tokens
    assert "too few" in choose(texts[:1], set(), 3, 1000).coverage


def test_a_trimmed_folder_keeps_special_and_stop_tokens(tiny, tmp_path, capsys):
    counts = tmp_path / "texts.jsonl"
    rows = [{"id": i, "prompt": f"def wrap(text, width={i}):", "response": "return text"} for i in range(60)]
    counts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    assert shrink(tiny.draft_good, "--out", out, "--scheme", "none", "--vocab", 80, "--counts", counts) == 0
    ids = load_file(out / "draft_vocab.safetensors")["d2t"]
    assert ids.dtype == torch.int64 and ids.shape == (80,) and bool((ids.diff() > 0).all())
    assert {0, 1, EOS} <= set(ids.tolist()) and int(ids[-1]) < VOCAB_SIZE
    made = json.loads((out / "shrink.json").read_text())
    assert made["vocab"]["kept"] == 80 and "of the" in made["vocab"]["coverage"]
    assert "80 of 512 tokens kept" in capsys.readouterr().out
    sizes = made["bytes_a_pass"]
    head = tensors(tiny.draft_good)["lm_head.weight"].nbytes
    assert sizes["after"] == sizes["before"] - head + round(80 / 512 * head)


def test_a_datasets_answers_are_counted(tiny, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.draft_good)
    ids = tokenizer.encode("def fill(text, width): return the wrapped lines of text", add_special_tokens=False)
    folder = dataset(tmp_path / "data", [{"id": "a", "set": "s", "prompt_token_ids": ids, "token_ids": [*ids, EOS]}])
    found = list(vocabulary.read_texts(folder, tokenizer, VOCAB_SIZE))
    assert found == [Text("a", ids, [*ids, EOS])]


def dataset(folder: Path, rows: list[dict[str, Any]]) -> Path:
    from tests.dataset_files import make_manifest
    from vllm_specdecpp.data.manifest import write_manifest

    write_manifest(folder, make_manifest())
    (folder / "responses").mkdir()
    (folder / "responses" / "00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# Bad input: one line each, and nothing is left.


def bad_counts(tmp_path: Path, tiny: Any) -> dict[str, Path]:
    from transformers import AutoTokenizer

    lines = inspect.getsource(json.decoder).splitlines()
    foreign = AutoTokenizer.from_pretrained(tiny.target).train_new_from_iterator(lines, VOCAB_SIZE)
    ids = foreign.encode("\n".join(lines[:40]))
    row = {"id": "a", "set": "s", "prompt_token_ids": ids, "token_ids": ids}
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "columns.jsonl").write_text('{"words": "x"}\n')
    return {
        "foreign": dataset(tmp_path / "foreign", [row]),
        "beyond": dataset(tmp_path / "beyond", [row | {"token_ids": [VOCAB_SIZE]}]),
        **{name: tmp_path / f"{name}.jsonl" for name in ("empty", "list", "columns", "missing")},
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scheme", "int3"], "--scheme int3: input should be 'int8', 'fp8', 'int4' or 'none'"),
        (["--vocab", 513, "--counts", "list"], "vocab=513 is more than the draft's 512 rows"),
        (["--vocab", 2, "--counts", "list"], "vocab=2 has no room for the 3 special and stop tokens"),
        (["--vocab", 100, "--counts", "foreign"], "was made with another tokenizer than the draft's"),
        (["--vocab", 100, "--counts", "beyond"], "holds the token id 512, and the draft has 512 rows"),
        (["--vocab", 100, "--counts", "empty"], "holds no text"),
        (["--vocab", 100, "--counts", "list"], "line 1, is no JSON object"),
        (["--vocab", 100, "--counts", "columns"], "line 1, has no prompt or"),
        (["--vocab", 100, "--counts", "missing"], "cannot be read (No such file or directory)"),
        (["--vocab", 100], "vocab= and counts= belong together"),
        (["--check"], "check= needs the target and some prompts"),
    ],
)
def test_bad_options_are_told_in_one_line(tiny, tmp_path, capsys, arguments, words):
    counts = bad_counts(tmp_path, tiny)
    before = sorted(tmp_path.iterdir())
    assert shrink(tiny.draft_good, "--out", tmp_path / "out", *(counts.get(a, a) for a in arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error and error.startswith("vllm-specdecpp shrink: ")
    assert sorted(tmp_path.iterdir()) == before


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
        monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(full))
    assert shrink(tiny.draft_good, "--out", tmp_path / "out", "--scheme", "int8") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert ("0.0 GB are free" if when == "before" else "No space left on device") in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(tiny, tmp_path, number):
    program = (
        "import sys, time\nfrom vllm_specdecpp import cli\nfrom vllm_specdecpp.shrink import checkpoint\n"
        "real = checkpoint.save_file\n"
        "def slow(*a):\n real(*a)\n print('half', flush=True)\n time.sleep(3600)\n"
        "checkpoint.save_file = slow\nsys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "shrink", tiny.draft_good, "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "half\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(number)
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
    from vllm_specdecpp.shrink.options import ShrinkOptions

    (tmp_path / "p.txt").write_text("\n".join("word " * n for n in range(1, 11)))
    options = ShrinkOptions(
        draft="d", out=tmp_path, check=True, target=tiny.target, prompts=str(tmp_path / "p.txt"), num_prompts=3
    )
    lengths = [len(ids) for ids in check.read_prompts(options)]
    assert len(lengths) == 3 and lengths[1] - lengths[0] == lengths[2] - lengths[1] == 3
    folder = dataset(tmp_path / "d", [{"id": "a", "set": "s", "prompt_token_ids": [5, 6], "token_ids": [7]}])
    assert check.read_prompts(options.model_copy(update={"prompts": str(folder)})) == [[5, 6]]
