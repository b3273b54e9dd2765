# SPDX-License-Identifier: Apache-2.0
"""The acceptance head: its size, the released formats, saving, and bad files; ``test_head_inputs`` has the formula."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from vllm_specdecpp.head.model import AcceptanceHead

HIDDEN = 8
TOLERANCE = 1e-6  # the same float32 operations in another order


class ReleasedBlock(nn.Module):
    """The published checkpoints' block: x + SiLU(linear(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(x))


class Released(nn.Module):
    """What the published checkpoints were saved from: one block object in every place, so the keys repeat."""

    def __init__(self, num_layers: int = 3, tied: bool = True) -> None:
        super().__init__()
        blocks = [ReleasedBlock()] * num_layers if tied else [ReleasedBlock() for _ in range(num_layers)]
        self.model = nn.Sequential(*blocks, nn.Linear(HIDDEN, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def write_config(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"hidden_size": HIDDEN, "num_layers": 3, **config}))
    return folder


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, since safetensors refuses to store shared memory twice."""
    return {key: tensor.clone() for key, tensor in state.items()}


def hidden_states(num_reqs: int = 5) -> Tensor:
    return torch.randn(num_reqs, HIDDEN)  # [num_reqs, hidden_size]


@pytest.mark.parametrize(("num_layers", "tied", "blocks"), [(3, True, 1), (3, False, 3), (1, False, 1), (0, True, 0)])
def test_parameters_are_counted_once(num_layers: int, tied: bool, blocks: int) -> None:
    head = AcceptanceHead(HIDDEN, num_layers, tied)
    assert head.num_parameters == blocks * (HIDDEN * HIDDEN + HIDDEN) + 2 * HIDDEN + 2
    assert head(hidden_states()).shape == (5, 2)


class TestReleasedFormats:
    @pytest.mark.parametrize("num_layers", [0, 1, 3, 4])
    def test_repeated_keys_in_safetensors(self, tmp_path: Path, num_layers: int) -> None:
        released = Released(num_layers)
        path = write_config(tmp_path, num_layers=num_layers) / "model.safetensors"
        save_file(contiguous(released.state_dict()), path)
        self.check(tmp_path, released, tied=True)

    @pytest.mark.parametrize("num_layers", [0, 1, 3, 4])
    def test_keys_dropped_by_a_shared_tensor_aware_writer(self, tmp_path: Path, num_layers: int) -> None:
        released = Released(num_layers)
        path = write_config(tmp_path, num_layers=num_layers) / "model.safetensors"
        save_model(released, str(path))
        assert len(load_file(path)) == (4 if num_layers else 2)
        self.check(tmp_path, released, tied=True)

    @pytest.mark.parametrize("kept", [0, 1, 2])
    def test_whichever_shared_block_was_kept(self, tmp_path: Path, kept: int) -> None:
        released = Released()
        state = {k: t for k, t in released.state_dict().items() if k.startswith((f"model.{kept}.", "model.3."))}
        save_file(contiguous(state), write_config(tmp_path) / "model.safetensors")
        self.check(tmp_path, released, tied=True)

    @pytest.mark.parametrize("legacy", [False, True])
    def test_bin(self, tmp_path: Path, legacy: bool) -> None:
        released = Released()
        path = write_config(tmp_path) / "pytorch_model.bin"
        torch.save(released.state_dict(), path, _use_new_zipfile_serialization=not legacy)
        self.check(tmp_path, released, tied=True)

    def test_blocks_that_differ_are_not_tied(self, tmp_path: Path) -> None:
        released = Released(tied=False)
        torch.save(released.state_dict(), write_config(tmp_path) / "pytorch_model.bin")
        self.check(tmp_path, released, tied=False)

    def test_blocks_that_differ_in_one_bias_only_are_not_tied(self, tmp_path: Path) -> None:
        released = Released()
        state = contiguous(released.state_dict())
        state["model.2.linear.bias"][0] += 1
        save_file(state, write_config(tmp_path) / "model.safetensors")
        assert not AcceptanceHead.from_pretrained(tmp_path).tied

    def test_other_keys_in_the_config_are_ignored(self, tmp_path: Path) -> None:
        released = Released()
        save_model(released, str(write_config(tmp_path, _commit_hash="0", note="x") / "model.safetensors"))
        self.check(tmp_path, released, tied=True)

    def test_safetensors_come_first(self, tmp_path: Path) -> None:
        released = Released()
        save_model(released, str(write_config(tmp_path) / "model.safetensors"))
        torch.save(Released().state_dict(), tmp_path / "pytorch_model.bin")
        self.check(tmp_path, released, tied=True)

    def check(self, folder: Path, released: Released, tied: bool) -> None:
        head = AcceptanceHead.from_pretrained(folder, expected_hidden_size=HIDDEN)
        x = hidden_states()
        assert head.tied is tied and not head.training
        torch.testing.assert_close(head(x), released(x), atol=TOLERANCE, rtol=TOLERANCE)


class TestSave:
    def test_the_released_class_reads_what_we_write(self, tmp_path: Path) -> None:
        from safetensors.torch import load_model

        head = AcceptanceHead(HIDDEN)
        head.save_pretrained(tmp_path)
        released = Released()
        load_model(released, str(tmp_path / "model.safetensors"))
        x = hidden_states()
        torch.testing.assert_close(released(x), head(x), atol=TOLERANCE, rtol=TOLERANCE)

    def test_our_own_state_dict_loads_too(self, tmp_path: Path) -> None:
        head = AcceptanceHead(HIDDEN)
        torch.save(head.state_dict(), write_config(tmp_path) / "pytorch_model.bin")
        assert torch.equal(AcceptanceHead.from_pretrained(tmp_path)(x := hidden_states()), head(x))

    def test_a_saved_head_is_float32_and_replaces_another(self, tmp_path: Path) -> None:
        AcceptanceHead(HIDDEN).bfloat16().save_pretrained(tmp_path)
        assert AcceptanceHead.from_pretrained(tmp_path).output.weight.dtype == torch.float32
        AcceptanceHead(HIDDEN, num_layers=2).save_pretrained(tmp_path)
        assert AcceptanceHead.from_pretrained(tmp_path).num_layers == 2

    def test_a_file_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "f").write_text("")
        with pytest.raises(ValueError, match="cannot be written"):
            AcceptanceHead(HIDDEN).save_pretrained(tmp_path / "f")


def load_error(source: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        AcceptanceHead.from_pretrained(source, **options)
    text = str(caught.value)
    assert text.startswith("specdecpp: ") and "\n" not in text
    return text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    AcceptanceHead(HIDDEN).save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    for key, tensor in changes.items():
        key = key.replace("__", ".")
        state.pop(key, None)
        if tensor is not None:
            state[key] = tensor
    path.unlink()
    save_file(state, path)


class TestErrors:
    @pytest.mark.parametrize("name", ["/nowhere/head", "./head", "~/no/such/head", "head", "a b/c", "a/b/../c d"])
    def test_missing_folder(self, name: str) -> None:
        assert load_error(name) == f"specdecpp: head={name!r} does not exist; give a folder or a hub id (org/name)"

    def test_what_is_not_there_or_another(self, folder: Path) -> None:
        assert "is a file; give the folder" in load_error(folder / "model.safetensors")
        assert load_error(folder, revision="main").startswith("specdecpp: head_revision='main' is for a hub id")
        text = load_error(folder, expected_hidden_size=16)
        assert "is for hidden size 8, but the draft model has 16; use the head that was trained for this" in text
        (folder / "model.safetensors").unlink()
        assert "has no model.safetensors or pytorch_model.bin" in load_error(folder)
        (folder / "config.json").unlink()
        assert "has no config.json; give the folder that train wrote" in load_error(folder)

    @pytest.mark.parametrize("text", ["", "{", "\x00"])
    def test_config_is_not_json(self, folder: Path, text: str) -> None:
        (folder / "config.json").write_text(text)
        assert "config.json is damaged (Invalid JSON" in load_error(folder)

    @pytest.mark.parametrize(
        "config",
        [
            [],
            3,
            {},
            {"hidden_size": 8},
            {"num_layers": 3},
            {"hidden_size": 0, "num_layers": 3},
            {"hidden_size": 8, "num_layers": -1},
            {"hidden_size": "8", "num_layers": 3},
            {"hidden_size": 8, "num_layers": True},
        ],
    )
    def test_config_without_sizes(self, folder: Path, config: Any) -> None:
        (folder / "config.json").write_text(json.dumps(config))
        assert "config.json is damaged (" in load_error(folder)

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
    @pytest.mark.parametrize("damage", ["empty", "garbage", "truncated"])
    def test_corrupt_weights(self, folder: Path, name: str, damage: str) -> None:
        torch.save(Released().state_dict(), folder / "pytorch_model.bin")
        whole = (folder / name).read_bytes()
        (folder / "model.safetensors").unlink()
        damaged = {"empty": b"", "garbage": b"no weights at all" * 9, "truncated": whole[: len(whole) // 2]}[damage]
        (folder / name).write_bytes(damaged)
        assert f"{name} is corrupt or holds more than tensors" in load_error(folder)

    def test_a_pickle_with_code_is_refused_and_not_run(self, tmp_path: Path) -> None:
        mark = tmp_path / "the-code-ran"

        class Evil:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(mark),)

        torch.save({"model.0.linear.weight": Evil()}, write_config(tmp_path / "head") / "pytorch_model.bin")
        text = load_error(tmp_path / "head")
        assert "pytorch_model.bin is corrupt or holds more than tensors" in text
        assert not mark.exists()

    @pytest.mark.parametrize("content", [[torch.zeros(2)], {"a": 1}, torch.zeros(2)])
    def test_a_pickle_that_is_no_state_dict(self, tmp_path: Path, content: Any) -> None:
        torch.save(content, write_config(tmp_path) / "pytorch_model.bin")
        assert "holds more than tensors (not a dict of tensors)" in load_error(tmp_path)

    @pytest.mark.parametrize(
        "keys",
        [["model.0.linear.weight"], ["model.0.linear.bias"], ["model.3.weight"], ["model.3.bias"],
         ["model.0.linear.weight", "model.0.linear.bias"]],
    )  # fmt: skip
    def test_missing_keys(self, folder: Path, keys: list[str]) -> None:
        rewrite(folder, **{key.replace(".", "__"): None for key in keys})
        more = "; fetch or train the head again" if len(keys) == 1 else ", model.1.linear.weight"
        assert f"lacks {', '.join(keys)}{more}" in load_error(folder)

    @pytest.mark.parametrize(
        ("kept", "config", "missing"),
        [(("model.0.", "model.2.", "model.3."), {}, "model.1.linear.weight, model.1.linear.bias"),
         (("model.0.", "model.3."), {"tied": False}, "model.1.linear.weight")],
    )  # fmt: skip
    def test_missing_blocks(self, tmp_path: Path, kept: Any, config: dict[str, Any], missing: str) -> None:
        """One of three; and all but one, of a head of ours that is not tied."""
        state = {k: t for k, t in Released().state_dict().items() if k.startswith(kept)}
        save_file(contiguous(state), write_config(tmp_path, **config) / "model.safetensors")
        assert f"lacks {missing}" in load_error(tmp_path)

    @pytest.mark.parametrize("key", ["lm_head.weight", "model.3.linear.weight", "model.0.weight", "model.4.weight"])
    def test_unknown_key(self, folder: Path, key: str) -> None:
        rewrite(folder, **{key.replace(".", "__"): torch.zeros(2)})
        assert f"has the unknown key {key!r} for num_layers 3; check num_layers in config.json" in load_error(folder)

    def test_num_layers_that_does_not_match(self, folder: Path) -> None:
        write_config(folder, num_layers=2)
        assert "has the unknown key 'model.3." in load_error(folder)

    def test_wrong_shape(self, folder: Path) -> None:
        write_config(folder, hidden_size=4)
        assert "has shape [8, 8], but config.json (hidden_size 4) wants [4, 4]" in load_error(folder)
        rewrite(folder, model__3__weight=torch.zeros(3, HIDDEN))
        write_config(folder)
        assert "output.weight has shape [3, 8]" in load_error(folder)

    @pytest.mark.parametrize("bad", [[float("nan"), 0.0], [float("inf"), 0.0], [1, 2]])
    def test_values_that_are_no_finite_numbers(self, folder: Path, bad: list[float]) -> None:
        rewrite(folder, model__3__bias=torch.tensor(bad))
        assert "output.bias holds values that are no finite numbers" in load_error(folder)


class TestHub:
    """The hub client is replaced: no test needs the network."""

    @pytest.fixture
    def calls(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        calls: list[Any] = []

        def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
            calls.append((repo_id, revision, allow_patterns))
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    def test_whole_repository(self, tmp_path: Path, calls: list[Any]) -> None:
        AcceptanceHead(HIDDEN).save_pretrained(tmp_path)
        assert AcceptanceHead.from_pretrained("org/name", "v1").hidden_size == HIDDEN
        assert calls == [("org/name", "v1", ["config.json", "model.safetensors", "pytorch_model.bin"])]

    def test_folder_of_a_repository(self, tmp_path: Path, calls: list[Any]) -> None:
        AcceptanceHead(HIDDEN).save_pretrained(tmp_path / "pair" / "run")
        assert AcceptanceHead.from_pretrained("org/name/pair/run").hidden_size == HIDDEN
        files = [f"pair/run/{name}" for name in ("config.json", "model.safetensors", "pytorch_model.bin")]
        assert calls == [("org/name", None, files)]
        assert "the hub repository has no folder 'pair/other/'" in load_error("org/name/pair/other")

    def test_the_hub_does_not_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **kwargs: Any) -> str:
            raise OSError("no route to host\nsecond line")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        text = load_error("org/name")
        assert "head='org/name' is no folder here, and the hub did not give it (no route to host); check" in text


def test_what_is_saved_can_be_read_by_whom_the_umask_lets(tmp_path):
    """safetensors alone would write it for its owner."""
    before = os.umask(0o022)
    try:
        AcceptanceHead(8, 1).save_pretrained(tmp_path / "head")
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "head").iterdir()} == {
        "config.json": 0o644,
        "model.safetensors": 0o644,
    }
