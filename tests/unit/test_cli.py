# SPDX-License-Identifier: Apache-2.0
"""The command line: arguments from a schema, errors in one line, nothing heavy before a command is chosen."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from vllm_specdecpp import cli
from vllm_specdecpp.training.options import POSITIONAL, CommandOptions


class ToyOptions(CommandOptions):
    """Play with some data.

    Example: ``vllm-specdecpp toy a b --out c``
    """

    data: list[Path] = Field(json_schema_extra=POSITIONAL)
    """Folders to play with."""

    out: Path
    """Where the toys go, 100 % of them."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Step size."""

    limit: int | None = None
    """At most so many."""

    lag: Literal[0, 1] = 1
    """Which state is read."""

    features: list[Literal["entropy", "margin"]] = []
    """Inputs beside ``hidden_states``."""

    weights: tuple[float, ...] = (1.0, 3.0)
    """Weights to try."""

    tied: bool = True
    """Share the blocks' weights."""

    force: bool = False
    """Write over what is there."""

    as_json: bool = Field(default=False, alias="json")
    """JSON output."""

    @model_validator(mode="after")
    def _check(self) -> ToyOptions:
        if self.limit == 13:
            raise ValueError("specdecpp: limit=13 brings bad luck; take 12")
        return self


class LateOptions(CommandOptions):
    head: str | None = Field(default=None, json_schema_extra=POSITIONAL)
    """A head."""

    costs: str = "none"
    """Costs."""


@pytest.fixture
def toy(monkeypatch):
    """Commands ``toy`` and ``late``, and the options that they were run with."""
    module = types.ModuleType("specdecpp_toy", "Toys, as a module says it.")
    module.seen = []  # type: ignore[attr-defined]
    module.failure = None  # type: ignore[attr-defined]

    def run(options: CommandOptions) -> int:
        if module.failure is not None:
            raise module.failure
        module.seen.append(options)
        return 0

    module.run = run  # type: ignore[attr-defined]
    module.ToyOptions = ToyOptions  # type: ignore[attr-defined]
    module.LateOptions = LateOptions  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "toy", cli.Command("plays", module.__name__, "toys are kept"))
    monkeypatch.setitem(cli.COMMANDS, "late", cli.Command("comes late", module.__name__))
    return module


def _error(capsys, arguments: list[str], status: int = 2) -> str:
    assert cli.main(arguments) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1, "one line"
    return err.strip()


def test_overview_imports_nothing_heavy():
    program = (
        "import sys; from vllm_specdecpp.cli import main; status = main(['--help']);"
        "heavy = {'torch', 'vllm', 'transformers', 'numpy', 'ray'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in cli.COMMANDS:
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_all_its_options(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    schema = getattr(sys.modules[cli.COMMANDS[command].module], f"{command.capitalize()}Options")
    for name, field in schema.model_fields.items():
        assert field.description, f"{name} has no docstring"
        shown_as = (field.alias or name).replace("_", "-")
        assert f"--{shown_as}" in shown or shown_as.upper() in shown


def test_all_kinds_of_fields(toy):
    arguments = "toy a b --out c --learning-rate 2e-4 --limit 5 --lag 0 --features entropy margin --no-tied --json"
    assert cli.main([*arguments.split(), "--weights", "6", "--weights=1.5"]) == 0
    (options,) = toy.seen
    assert options.data == [Path("a"), Path("b")] and options.out == Path("c")
    assert options.learning_rate == 2e-4 and options.limit == 5 and options.lag == 0
    assert options.features == ["entropy", "margin"] and options.weights == (6.0, 1.5)
    assert (options.tied, options.force, options.as_json) == (False, False, True)


def test_defaults_are_the_schemas(toy):
    assert cli.main(["toy", "a", "--out", "c"]) == 0
    assert toy.seen == [ToyOptions(data=[Path("a")], out=Path("c"))]


def test_positional_arguments_may_stand_after_options(toy):
    assert cli.main(["late", "--costs", "c", "my-head"]) == 0
    assert cli.main(["late"]) == 0
    assert cli.main(["toy", "a", "--out", "c", "b"]) == 0
    assert [toy.seen[0].head, toy.seen[1].head, toy.seen[2].data] == ["my-head", None, [Path("a"), Path("b")]]


@pytest.mark.parametrize(("command", "status"), [("train", 2), ("check", 0)])
def test_a_missing_extra_is_told_in_one_line(command, status):
    code = "import sys; sys.modules['sklearn'] = None; from vllm_specdecpp import cli; sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, command, "--help"], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    if status:
        assert done.stderr == "vllm-specdecpp train: needs scikit-learn; in the clone: pip install '.[train]'\n"


def test_help_of_a_command(toy, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["toy", "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Play with some data." in shown and "Example: `vllm-specdecpp toy a b --out c`" in shown
    assert "DATA [DATA ...]" in shown and "--out PATH" in shown and "100 % of them." in shown
    assert "--learning-rate X" in shown and "Step size. [default: 0.001]" in shown
    assert "--lag {0,1}" in shown and "[default: 1.0 3.0]" in shown
    assert "--tied, --no-tied" in shown and "[default: on]" in shown
    assert "At most so many. --" in shown, "no default is shown for None"
    assert "Inputs beside hidden_states." in shown


def test_help_falls_back_on_the_modules_docstring(toy, capsys):
    with pytest.raises(SystemExit):
        cli.main(["late", "--help"])
    assert "Toys, as a module says it." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["toys"], "vllm-specdecpp: unknown command 'toys'; did you mean toy?"),
        (["--forse"], "vllm-specdecpp: unknown option '--forse'; known: check"),
        (["toy", "a", "--learning_rate", "1"], "toy: unknown option --learning_rate; did you mean --learning-rate?"),
        (["toy", "--forse"], "vllm-specdecpp toy: unknown option --forse; did you mean --force?"),
        (["toy", "a", "--o", "b"], "unknown option --o; "),
        (["toy", "a", "--out"], "argument --out: expected one argument"),
        (["toy", "--out", "b"], "required: DATA"),
        (["toy", "a"], "required: --out"),
        (["late", "a", "b"], "unexpected argument 'b'"),
        (["toy", "a", "--out", "b", "--limit", "many"], "toy: --limit many: input should be a valid integer"),
        (["toy", "a", "--out", "b", "--lag", "2"], "toy: --lag 2: input should be 0 or 1"),
        (["toy", "a", "--out", "b", "--features", "entropi"], "--features entropi: input should be 'entropy' or"),
        (["toy", "a", "--out", "b", "--learning-rate", "0"], "--learning-rate 0: input should be greater than 0"),
        (["toy", "a", "--out", "b", "--limit", "13"], "vllm-specdecpp toy: limit=13 brings bad luck; take 12"),
        (["toy", "a", "--out", "b", "--lag", "2", "--limit", "x"], "; --lag 2: "),
    ],
)
def test_wrong_input_is_told_in_one_line(toy, capsys, arguments, expected):
    line = _error(capsys, arguments)
    assert line.startswith("vllm-specdecpp") and expected in line
    assert not toy.seen


def test_errors_of_a_run(toy, capsys, tmp_path):
    arguments = ["toy", "a", "--out", "b"]
    toy.failure = ValueError("specdecpp: data='a' is empty;\nfill it")
    assert _error(capsys, arguments) == "vllm-specdecpp toy: data='a' is empty; fill it"
    toy.failure = KeyboardInterrupt()
    assert _error(capsys, arguments, 130) == "vllm-specdecpp toy: interrupted; toys are kept"
    toy.failure = PermissionError(13, "Permission denied", "b/x")
    assert _error(capsys, arguments, 1) == "vllm-specdecpp toy: b/x: Permission denied"
    toy.failure = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(arguments)


def test_no_command_is_an_error_and_version_is_not(capsys):
    assert cli.main([]) == 2
    assert "usage: vllm-specdecpp COMMAND" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vllm-specdecpp ")
