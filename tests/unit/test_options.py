# SPDX-License-Identifier: Apache-2.0
"""From what a user types to vLLM's own options, in the front-end process."""

from __future__ import annotations

import json
import logging
import os
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

vllm_args = pytest.importorskip("vllm.engine.arg_utils")

from tests import toy_rule  # noqa: E402
from vllm_specdecpp import plugin  # noqa: E402
from vllm_specdecpp.engine import options  # noqa: E402

DRAFT = "org/draft"


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Leave the model runner's choice as it was."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    plugin.register()


@pytest.fixture
def no_hub(monkeypatch):
    """EngineArgs would look the model up on the hub when it is offline."""
    monkeypatch.setattr(vllm_args, "get_model_path", lambda model, revision: model)


def _args(**kwargs):
    return vllm_args.EngineArgs(**{"model": "org/target", **kwargs})


def _parse(*argv: str):
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = vllm_args.AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return vllm_args.AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", "org/target", *argv]))


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps({"org/target": {"draft": DRAFT}}))
    monkeypatch.setenv("SPECDECPP_PAIRS", str(file))


def _check(args) -> dict:
    assert options.expand(args) is not None
    assert args.speculative_config["method"] == "draft_model"
    assert args.speculative_config["model"] == DRAFT
    assert args.worker_cls == "vllm_specdecpp.engine.cpu_worker.CPUWorker"
    assert args.async_scheduling is None  # left to engine.gpu_defaults
    assert (args.spec_method, args.spec_model, args.spec_tokens) == (None, None, None)
    return args.additional_config["specdecpp"]


@pytest.mark.parametrize(
    "argv",
    [
        ("--speculative-config", "specdecpp"),
        ("-sc", "specdecpp"),
        ("--speculative-config=specdecpp",),
        ("--spec-method", "specdecpp"),
    ],
)
def test_bare_word_finds_the_pair(pairs, no_hub, argv):
    _check(_parse(*argv))


@pytest.mark.parametrize(
    "argv",
    [
        ("--speculative-config", json.dumps({"method": "specdecpp", "model": DRAFT, "threshold": 0.3})),
        ("--speculative-config.method", "specdecpp", "--speculative-config.model", DRAFT,
         "--speculative-config.threshold", "0.3"),
        ("--spec-method", "specdecpp", "--spec-model", DRAFT, "--speculative-config", '{"threshold": 0.3}'),
    ],
)  # fmt: skip
def test_options_reach_the_worker(no_hub, argv):
    assert _check(_parse(*argv))["threshold"] == 0.3


def test_spec_tokens_is_the_upper_bound(no_hub):
    args = _parse("--spec-method", "specdecpp", "--spec-model", DRAFT, "--spec-tokens", "7")
    assert _check(args)["num_speculative_tokens"] == 7
    assert args.speculative_config["num_speculative_tokens"] == 7


def test_python_forms(pairs, no_hub):
    _check(_args(speculative_config="specdecpp"))
    _check(_args(speculative_config={"method": "specdecpp"}))
    _check(_args(spec_method="specdecpp", spec_model=DRAFT))


def test_vllms_own_options_pass_through(no_hub):
    args = _args(speculative_config={"method": "specdecpp", "model": DRAFT, "draft_sample_method": "probabilistic"})
    _check(args)
    assert args.speculative_config["draft_sample_method"] == "probabilistic"


def test_additional_config_of_the_user_is_kept(no_hub):
    args = _args(speculative_config={"method": "specdecpp", "model": DRAFT}, additional_config={"theirs": 1})
    _check(args)
    assert args.additional_config["theirs"] == 1


def test_a_second_expansion_changes_nothing(no_hub):
    args = _args(speculative_config={"method": "specdecpp", "model": DRAFT})
    _check(args)
    before = dict(vars(args))
    assert options.expand(args) is None
    assert vars(args) == before


@pytest.mark.parametrize("config", [None, {"method": "ngram", "num_speculative_tokens": 3}])
def test_other_methods_are_left_alone(no_hub, config):
    args = _args(speculative_config=config)
    before = dict(vars(args))
    assert options.expand(args) is None
    assert vars(args) == before


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"worker_cls": "my.Worker"}, ["--worker-cls my.Worker", "leave it out"]),
        ({"async_scheduling": True}, ["--async-scheduling", "leave it out"]),
        ({"pipeline_parallel_size": 2}, ["pipeline_parallel_size=2", "last stage", "use 1"]),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_mend(no_hub, kwargs, words):
    args = _args(speculative_config={"method": "specdecpp", "model": DRAFT}, **kwargs)
    with pytest.raises(ValueError, match="^specdecpp: ") as caught:
        options.expand(args)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_data_parallel_ranks_that_depend_on_each_other_are_refused():
    def config(ranks, is_moe):
        model = SimpleNamespace(is_moe=is_moe)
        return SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=ranks), model_config=model)

    for independent in (config(2, False), config(1, True)):
        options._check_data_parallel(independent)
    with pytest.raises(ValueError, match="^specdecpp: data_parallel_size=2 .*experts.*use 1"):
        options._check_data_parallel(config(2, True))


@pytest.mark.parametrize("key", ["parallel_drafting", "use_local_argmax_reduction", "use_heterogeneous_vocab"])
def test_unusable_speculative_options_are_refused_with_the_reason(no_hub, key):
    with pytest.raises(ValueError, match=f"^specdecpp: {key}=True cannot be used: "):
        options.expand(_args(speculative_config={"method": "specdecpp", "model": DRAFT, key: True}))


def _ours(**options):
    return {"method": "specdecpp", "model": DRAFT, "rule": "confidence", **options}


@pytest.fixture
def choose(monkeypatch):
    """The environment's choice of a model runner, None for vLLM's own, on a machine with Triton or without."""

    def set_up(runner: str | None, triton: bool = True) -> None:
        monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", triton)
        if runner is None:
            monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
        else:
            monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)

    return set_up


@pytest.mark.parametrize("runner", [None, "0", "1"])
@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("rule", ["confidence", "cost_aware"])
def test_vllms_choice_of_a_model_runner_stands(no_hub, choose, runner, triton, rule):
    choose(runner, triton)
    assert options.expand(_args(speculative_config=_ours(rule=rule))) is not None
    assert os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == runner


def test_what_only_v1_can_serve_selects_it_unless_v2_is_asked_for(no_hub, choose, monkeypatch):
    toy_rule.registered(monkeypatch)
    choose(None)
    assert options.expand(_args(speculative_config=_ours(rule="alternate"))) is not None
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    choose("1")
    with pytest.raises(ValueError, match="^specdecpp: rule='alternate'.*VLLM_USE_V2_MODEL_RUNNER=0"):
        options.expand(_args(speculative_config=_ours(rule="alternate")))


@pytest.mark.parametrize("runner", [None, "1"])
def test_asynchronous_scheduling_runs_on_v2(no_hub, choose, runner):
    choose(runner)
    args = _args(speculative_config=_ours(), async_scheduling=True)
    assert options.expand(args) is not None
    assert args.async_scheduling is True


@pytest.mark.parametrize(("runner", "triton"), [("0", True), ("0", False), (None, False)])
@pytest.mark.parametrize(
    ("ours", "args"),
    [({}, {"async_scheduling": True}), ({"enable_adaptive_verification": True}, {})],
    ids=["async_scheduling", "adaptive_verification"],
)
def test_what_only_v2_can_serve_is_refused_on_v1(no_hub, choose, runner, triton, ours, args):
    choose(runner, triton)
    with pytest.raises(ValueError, match="^specdecpp: .*; leave it out$"):
        options.expand(_args(speculative_config=_ours(**ours), **args))


def test_options_of_both_runners_cannot_be_combined(no_hub, choose, monkeypatch):
    toy_rule.registered(monkeypatch)
    choose(None)
    with pytest.raises(ValueError, match="^specdecpp: rule='alternate'.*async-scheduling"):
        options.expand(_args(speculative_config=_ours(rule="alternate"), async_scheduling=True))


def test_adaptive_verification_needs_estimates(no_hub, choose):
    choose("1")
    with pytest.raises(ValueError, match="^specdecpp: enable_adaptive_verification=True.*rule='fixed'"):
        options.expand(_args(speculative_config=_ours(rule="fixed", enable_adaptive_verification=True)))
    with pytest.raises(ValueError, match="^specdecpp: enable_adaptive_verification=True.*'probabilistic'.*leave one"):
        options.expand(_args(speculative_config=_ours(
            draft_sample_method="probabilistic", enable_adaptive_verification=True
        )))  # fmt: skip
    args = _args(speculative_config=_ours(enable_adaptive_verification=True))
    assert options.expand(args) is not None
    assert args.speculative_config["enable_adaptive_verification"] is True


@pytest.mark.parametrize(
    ("chosen", "ours", "async_scheduling"),
    [(False, {}, True), (True, {"rule": "alternate"}, None)],
)
def test_the_runner_that_vllm_chose_in_the_end_is_checked(no_hub, monkeypatch, chosen, ours, async_scheduling):
    """vLLM prefers V1 for some models and options, which only shows once its own configuration is made."""
    toy_rule.registered(monkeypatch)
    config, _ = options.SpecDecPPConfig.from_speculative_config(_ours(**ours), passthrough=[])
    args = _args(speculative_config={"method": "draft_model"}, async_scheduling=async_scheduling)
    with pytest.raises(ValueError, match="^specdecpp: "):
        options._check_model_runner(args, config, SimpleNamespace(use_v2_model_runner=chosen))
    options._check_model_runner(args, config, SimpleNamespace(use_v2_model_runner=not chosen))


def test_a_lossy_verification_is_refused(no_hub):
    for method in ("fly", "synthetic"):
        wanted = f"^specdecpp: rejection_sample_method='{method}' accepts tokens that the target"
        with pytest.raises(ValueError, match=wanted):
            options.expand(_args(speculative_config=_ours(rejection_sample_method=method)))


@pytest.mark.parametrize("word", ["specdecp", "spec-decpp", "SpecDec++", "specdec"])
def test_a_mistyped_word_is_told(no_hub, capsys, word):
    message = f"unknown speculative method '{word}'; did you mean 'specdecpp'?"
    with pytest.raises(SystemExit):
        _parse("--speculative-config", word)
    assert message in capsys.readouterr().err
    for given in ({"speculative_config": word}, {"speculative_config": {"method": word}}):
        with pytest.raises(ValueError) as caught:
            options.expand(_args(**given))
        assert str(caught.value) == f"specdecpp: {message}"


@pytest.mark.parametrize("word", ["ngram", "suffix", "spectre", "draft_model"])
def test_other_words_are_vllms(no_hub, capsys, word):
    assert options.expand(_args(speculative_config={"method": word})) is None
    with pytest.raises(SystemExit):
        _parse("--speculative-config", word)
    assert "did you mean" not in capsys.readouterr().err


def test_paths_and_numpy_numbers_are_taken(no_hub):
    import numpy as np

    args = _args(
        speculative_config={
            "method": "specdecpp", "model": Path("org") / "draft", "num_speculative_tokens": np.int64(7),
            "threshold": np.float64(0.25), "draft_tensor_parallel_size": np.int32(1),
        }
    )  # fmt: skip
    assert _check(args)["num_speculative_tokens"] == 7
    json.dumps([args.additional_config, args.speculative_config])  # Python's own types from here on
    assert args.speculative_config["draft_tensor_parallel_size"] == 1


def test_an_error_of_ours_shows_none_of_our_frames(no_hub):
    with pytest.raises(ValueError, match="^specdecpp: unknown option colour") as caught:
        _args(speculative_config=_ours(colour="red")).create_engine_config()
    assert len(traceback.extract_tb(caught.value.__traceback__)) == 2  # this call, and the wrap itself
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_an_error_that_is_not_ours_keeps_its_frames(no_hub, monkeypatch):
    def deep(args):
        raise ValueError("somebody else's")

    monkeypatch.setattr(options, "expand", deep)
    with pytest.raises(ValueError, match="somebody else's") as caught:
        _args(speculative_config=_ours()).create_engine_config()
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "deep"


def test_a_key_may_be_spelt_with_hyphens(no_hub):
    ours = _check(_args(speculative_config={**_ours(), "trace-rounds": 7}))
    assert ours["trace_rounds"] == 7


def test_a_key_given_with_both_spellings_is_refused(no_hub):
    args = _args(speculative_config={**_ours(), "min-speculative-tokens": 1, "min_speculative_tokens": 2})
    with pytest.raises(ValueError, match="specdecpp: min_speculative_tokens is given twice"):
        _check(args)


def test_flag_and_json_that_disagree_are_refused(no_hub):
    args = _args(speculative_config={"model": DRAFT}, spec_method="specdecpp", spec_model="org/other")
    with pytest.raises(ValueError, match="--spec-model org/other"):
        options.expand(args)


def test_registering_twice_wraps_once():
    before = vllm_args.EngineArgs.create_engine_config, vllm_args.EngineArgs.add_cli_args
    plugin.register()
    plugin.register()
    assert (vllm_args.EngineArgs.create_engine_config, vllm_args.EngineArgs.add_cli_args) == before
    assert before[0].__wrapped__.__qualname__ == "EngineArgs.create_engine_config"
    assert not hasattr(before[0].__wrapped__, "__wrapped__")


def test_works_beside_a_plugin_that_wraps_the_same_method(no_hub, monkeypatch):
    """Ours is wrapped already; another plugin wraps it again: both see the call, and vLLM's own gets our options."""
    seen = []
    ours = vllm_args.EngineArgs.create_engine_config

    def other(self, *args, **kwargs):
        seen.append(self.speculative_config["method"])
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(vllm_args.EngineArgs, "create_engine_config", other)
    plugin.register()
    assert vllm_args.EngineArgs.create_engine_config is other
    monkeypatch.setattr(
        vllm_args,
        "maybe_override_with_speculators",
        lambda model, tokenizer, vllm_speculative_config, **_: (model, tokenizer, vllm_speculative_config),
    )

    class Reached(Exception):
        """vLLM's own method has begun, with the options that it was given."""

    def create_model_config(self):
        seen.append(self.speculative_config)
        raise Reached

    monkeypatch.setattr(vllm_args.EngineArgs, "create_model_config", create_model_config)
    with pytest.raises(Reached):
        _args(speculative_config={"method": "specdecpp", "model": DRAFT}).create_engine_config()
    assert seen[0] == "specdecpp"
    assert seen[1]["method"] == "draft_model"


def test_register_never_raises(monkeypatch, caplog):
    def broken():
        raise RuntimeError("no such hook")

    monkeypatch.setattr(options, "install", broken)
    monkeypatch.setattr(logging.getLogger("vllm.specdecpp"), "level", logging.WARNING)
    logger = logging.getLogger("vllm.specdecpp")
    logger.addHandler(caplog.handler)
    try:
        plugin.register()
    finally:
        logger.removeHandler(caplog.handler)
    assert "no such hook" in caplog.text


def test_an_unsupported_vllm_still_serves_without_us(no_hub, monkeypatch):
    from vllm_specdecpp.engine import supported

    monkeypatch.setattr(supported, "problems", lambda: ("X.y is gone",))
    assert options.expand(_args()) is None
    with pytest.raises(ValueError, match="X.y is gone"):
        options.expand(_args(speculative_config={"method": "specdecpp", "model": DRAFT}))
