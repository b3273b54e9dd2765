# SPDX-License-Identifier: Apache-2.0
"""The formula and the round trip, with what our heads have beyond the released ones: width, scalars, and so on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_specdecpp.decision.features import SCALAR_FEATURES, num_inputs
from vllm_specdecpp.head.files import Calibration, update_config
from vllm_specdecpp.head.model import AcceptanceHead

HIDDEN, WIDTH, ROWS = 8, 5, 6
TOLERANCE = 1e-5  # the same float32 operations in another order
FEATURES = ["margin", "top1_prob"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"width": WIDTH},
    {"features": FEATURES, "lag": 0},
    {"standardize": True},
    {"lag": 0},
    {"width": WIDTH, "features": list(SCALAR_FEATURES), "standardize": True, "lag": 0},
    {"width": 1, "features": ["entropy"], "standardize": True, "lag": 0},
]


def make_head(num_layers: int = 2, tied: bool = True, **options: Any) -> AcceptanceHead:
    torch.manual_seed(0)
    head = AcceptanceHead(HIDDEN, num_layers, tied, **options)
    if head.standardize:
        torch.nn.init.normal_(head.mean)
        torch.nn.init.uniform_(head.scale)
    return head.eval()


def inputs(head: AcceptanceHead, num_rows: int = ROWS) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_rows, HIDDEN, generator=generator)
    scalars = torch.randn(num_rows, num_inputs(head.features), generator=generator)
    return hidden, scalars if head.features else None


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("num_layers", "tied"), [(0, True), (2, True), (2, False)])
def test_the_formula(options: dict[str, Any], num_layers: int, tied: bool) -> None:
    head = make_head(num_layers, tied, **options)
    hidden, scalars = inputs(head)
    w = {key: value.double() for key, value in head.state_dict().items()}
    x = hidden.double()
    if head.standardize:
        x = (x - w["mean"]) * w["scale"]
    if head.width:
        x = x @ w["project.weight"].T + w["project.bias"]
    if scalars is not None:
        x = torch.cat([x, scalars.double()], 1)
    for i in range(num_layers):
        z = x @ w[f"blocks.{0 if tied else i}.linear.weight"].T + w[f"blocks.{0 if tied else i}.linear.bias"]
        x = x + z / (1 + torch.exp(-z))
    logits = x @ w["output.weight"].T + w["output.bias"]
    torch.testing.assert_close(head(hidden, scalars).double(), logits, atol=TOLERANCE, rtol=TOLERANCE)
    logit = logits[:, 1] - logits[:, 0]
    torch.testing.assert_close(head.logit(hidden, scalars).double(), logit, atol=TOLERANCE, rtol=TOLERANCE)
    expected = 1 / (1 + torch.exp(-logit))
    torch.testing.assert_close(head.probability(hidden, scalars).double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("num_layers", "tied"), [(0, True), (1, True), (3, True), (3, False)])
def test_round_trip(tmp_path: Path, options: dict[str, Any], num_layers: int, tied: bool) -> None:
    head = make_head(num_layers, tied, **options)
    head.metadata = {"draft": "org/small", "target": "org/large", "w_rej": 6.0, "soft": False, "rule": {"rule": "x"}}
    head.calibration = Calibration(slope=0.5, intercepts=[1.0, -2.0], fitted_on="a set")
    folder = tmp_path / "new" / "head"
    head.save_pretrained(folder)
    loaded = AcceptanceHead.from_pretrained(folder, expected_hidden_size=HIDDEN, expected_draft="org/small")
    hidden, scalars = inputs(head)
    assert torch.equal(loaded(hidden, scalars), head(hidden, scalars))
    assert torch.equal(loaded.probability(hidden, scalars, 2), head.probability(hidden, scalars, 2))
    for name in ("hidden_size", "num_layers", "width", "features", "lag", "standardize", "metadata", "calibration"):
        assert getattr(loaded, name) == getattr(head, name), name
    assert loaded.config() == head.config() | {"tied": loaded.tied}


def test_a_plain_heads_config_is_the_released_formats(tmp_path: Path) -> None:
    make_head(3).save_pretrained(tmp_path)
    text = '{\n  "hidden_size": 8,\n  "num_layers": 3,\n  "tied": true\n}\n'
    assert (tmp_path / "config.json").read_text() == text
    keys = ["model.0.linear.bias", "model.0.linear.weight", "model.3.bias", "model.3.weight"]
    assert sorted(load_file(tmp_path / "model.safetensors")) == keys


def test_other_dtypes() -> None:
    head = make_head(features=FEATURES, lag=0, standardize=True, width=WIDTH).bfloat16()
    hidden, scalars = inputs(head)
    assert head(hidden, scalars).dtype == torch.bfloat16
    assert head.logit(hidden, scalars).dtype == head.probability(hidden, scalars).dtype == torch.float32
    hidden, scalars = inputs(head, 0)
    assert head.probability(hidden, scalars).shape == (0,)
    assert make_head()(hidden.bfloat16()).dtype == torch.float32


def test_dropout_is_of_training_only() -> None:
    head = make_head(features=FEATURES, lag=0)
    hidden, scalars = inputs(head)
    plain = head(hidden, scalars)
    head.dropout = 0.5
    assert torch.equal(head(hidden, scalars), plain)
    head.train()
    first, second = head(hidden, scalars), head(hidden, scalars)
    assert not torch.equal(first, second) and not torch.equal(first, plain)
    head.dropout = 0.0
    assert torch.equal(head(hidden, scalars), plain)


class TestCalibration:
    SLOPE, INTERCEPTS = 0.6, [1.5, -0.5, 0.25]

    def head(self) -> AcceptanceHead:
        head = make_head()
        head.calibration = Calibration(slope=self.SLOPE, intercepts=self.INTERCEPTS)
        return head

    @pytest.mark.parametrize("position", [1, 2, 3, 4, 100])
    def test_one_position(self, position: int) -> None:
        head = self.head()
        hidden, _ = inputs(head)
        shift = self.INTERCEPTS[min(position, 3) - 1]
        expected = torch.sigmoid(self.SLOPE * head.logit(hidden).double() + shift)
        torch.testing.assert_close(head.probability(hidden, None, position).double(), expected, atol=1e-6, rtol=1e-6)
        each = head.calibrated(head.logit(hidden), position)
        assert head.calibration is not None
        positions = torch.full((len(hidden),), position)
        torch.testing.assert_close(head.calibration.probability(head.logit(hidden), positions), each)

    def test_the_logit_stays_uncalibrated_and_none_removes_it(self) -> None:
        head, plain = self.head(), make_head()
        hidden, _ = inputs(head)
        assert torch.equal(head.logit(hidden), plain.logit(hidden))
        assert not torch.equal(head.probability(hidden), plain.probability(hidden))
        head.calibration = None
        assert torch.equal(head.probability(hidden), plain.probability(hidden))

    @pytest.mark.parametrize(
        "bad",
        [{}, {"slope": 1.0}, {"slope": 1.0, "intercepts": []}, {"slope": math.nan, "intercepts": [0.0]},
         {"slope": "1", "intercepts": [0.0]}, {"slope": 1.0, "intercepts": [math.inf]}, [1.0],
         {"slope": True, "intercepts": [0.0]}, {"slope": 1.0, "intercepts": 0.0}],
    )  # fmt: skip
    def test_what_cannot_be_applied(self, tmp_path: Path, bad: Any) -> None:
        make_head().save_pretrained(tmp_path)
        before = (tmp_path / "config.json").read_bytes()
        with pytest.raises(ValueError, match=r"^specdecpp: [^\n]*config.json is damaged \(calibration[^\n]*$"):
            update_config(tmp_path, calibration=bad)
        assert (tmp_path / "config.json").read_bytes() == before


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"features": ["top_1"]}, "features='top_1' is unknown; choose among"),
            ({"features": FEATURES}, "features=margin,top1_prob with lag=1: such a head reads the hidden state alone"),
        ],
    )
    def test_what_cannot_be(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError) as caught:
            AcceptanceHead(**{"hidden_size": HIDDEN, **options})
        assert str(caught.value).startswith("specdecpp: ") and message in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(("features", "columns"), [(FEATURES, None), (FEATURES, 2), ([], 3)])
    def test_scalars_of_another_head(self, features: list[str], columns: int | None) -> None:
        head = make_head(features=features, lag=0)
        with pytest.raises(ValueError, match=r"^specdecpp: the head reads features=.* as \d scalars a row, but got"):
            head(torch.zeros(2, HIDDEN), None if columns is None else torch.zeros(2, columns))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"width": 0}, "width=0: Input should be greater than 0"),
            ({"width": True}, "width=True: Input should be a valid integer"),
            ({"features": "margin"}, "features='margin': Input should be a valid array"),
            ({"features": ["margins"]}, "features='margins' is unknown"),
            ({"lag": 2}, "lag=2: Input should be 0 or 1"),
            ({"features": ["margin"]}, "features=margin with lag=1"),
            ({"standardize": 1}, "standardize=1: Input should be a valid boolean"),
            ({"calibration": {"slope": 1}}, "calibration.intercepts: Field required"),
            ({"standardize": True}, "lacks mean, scale; fetch or train the head again"),
            ({"width": 4}, "lacks project.weight, project.bias"),
            ({"lag": 0, "features": ["margin"]}, "has shape [8, 8], but config.json (hidden_size 8) wants [9, 9]"),
        ],
    )
    def test_a_config_that_cannot_be(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        make_head().save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        with pytest.raises(ValueError) as caught:
            AcceptanceHead.from_pretrained(tmp_path)
        assert message in str(caught.value) and str(path.parent) in str(caught.value)
        assert str(caught.value).startswith("specdecpp: ") and "\n" not in str(caught.value)

    def test_a_projection_that_the_config_does_not_know(self, tmp_path: Path) -> None:
        make_head(width=WIDTH).save_pretrained(tmp_path)
        update_config(tmp_path, width=None)
        with pytest.raises(ValueError, match="has the unknown key 'project.bias'"):
            AcceptanceHead.from_pretrained(tmp_path)

    def test_statistics_that_are_no_numbers(self, tmp_path: Path) -> None:
        make_head(standardize=True).save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        state["scale"][0] = math.inf
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="scale holds values that are no finite numbers"):
            AcceptanceHead.from_pretrained(tmp_path)


class TestDraft:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        head = make_head()
        head.metadata["draft"] = "Org/Small-0.5B"
        head.save_pretrained(tmp_path / "head")
        return tmp_path / "head"

    @pytest.mark.parametrize(
        "draft",
        ["Org/Small-0.5B", "other/small-0.5b", "models/Small-0.5B/", None, "",
         "hub/models--Org--Small-0.5B/snapshots/0123abc"],
    )  # fmt: skip
    def test_the_same_by_its_last_name(self, folder: Path, draft: str | None) -> None:
        assert AcceptanceHead.from_pretrained(folder, expected_draft=draft).metadata["draft"] == "Org/Small-0.5B"

    @pytest.mark.parametrize("draft", ["Org/Small-1.5B", "Small", "hub/models--Org--Large/snapshots/0123abc"])
    def test_another(self, folder: Path, draft: str) -> None:
        with pytest.raises(ValueError) as caught:
            AcceptanceHead.from_pretrained(folder, expected_draft=draft)
        text = str(caught.value)
        assert f"was trained for the draft 'Org/Small-0.5B', but the draft model is {draft!r}; use a head" in text
        assert text.startswith("specdecpp: head=") and "\n" not in text

    def test_a_released_head_names_none(self, tmp_path: Path) -> None:
        make_head().save_pretrained(tmp_path)
        assert AcceptanceHead.from_pretrained(tmp_path, expected_draft="any/thing").metadata == {}


class TestUpdateConfig:
    def test_other_keys_stay(self, tmp_path: Path) -> None:
        head = make_head(features=FEATURES, lag=0)
        head.metadata = {"draft": "d", "note": "mine"}
        head.save_pretrained(tmp_path)
        weights = (tmp_path / "model.safetensors").read_bytes()
        update_config(tmp_path, calibration={"slope": 1.5, "intercepts": [0.5]}, rule={"rule": "fixed"})
        loaded = AcceptanceHead.from_pretrained(tmp_path)
        assert loaded.metadata == {"draft": "d", "note": "mine", "rule": {"rule": "fixed"}}
        assert loaded.calibration == Calibration(slope=1.5, intercepts=[0.5]) and loaded.features == tuple(FEATURES)
        update_config(tmp_path, calibration=None)
        assert AcceptanceHead.from_pretrained(tmp_path).calibration is None
        assert (tmp_path / "model.safetensors").read_bytes() == weights
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]

    def test_no_head_there(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="has no config.json"):
            update_config(tmp_path, rule={})
