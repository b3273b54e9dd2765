# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-specdecpp``: each command's arguments come from its pydantic schema, its work from its ``run``.

Only the module of the chosen command is imported: ``vllm-specdecpp --help`` needs neither torch nor vLLM.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

PROGRAM = "vllm-specdecpp"
_AGAIN = "run the same command again"
_EXTRA = {"scipy": "scipy", "sklearn": "scikit-learn", "tqdm": "tqdm", "transformers": "transformers"}
"""What only the extra ``train`` brings: name in an import, and in pip."""


@dataclass(frozen=True)
class Command:
    """A command's line in the overview, and where to find it."""

    summary: str
    module: str
    """Holds ``run`` and one class whose name is the command's, capitalised, plus ``Options``."""

    when_interrupted: str = _AGAIN


COMMANDS = {
    "check": Command("say before serving whether a pair would start, and what it takes", "vllm_specdecpp.engine.check"),
    "fit": Command(
        "from a pair to a tuned acceptance head, and whether it pays: the next four in one",
        "vllm_specdecpp.training.fit.command",
        "what is finished is kept; the same command goes on from there",
    ),
    "collect": Command(
        "record labels: which of the draft's tokens the target accepts",
        "vllm_specdecpp.training.collect.command",
        "finished shards are kept; the same command goes on from there",
    ),
    "train": Command("train an acceptance head on collected labels", "vllm_specdecpp.training.fit.train"),
    "calibrate": Command(
        "make the head's score a probability, and measure it", "vllm_specdecpp.training.fit.calibrate"
    ),
    "tune": Command("choose the stop rule by replaying recorded rounds", "vllm_specdecpp.training.replay.tune"),
    "shrink": Command(
        "make a draft model cheaper: quantised weights",
        "vllm_specdecpp.shrink.command",
        "the folder is there whole, or not at all",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: command and its arguments; by default this process's own.

    Returns:
        Exit status: 0, the command's own, 2 for wrong input (one line on stderr), 130 if interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from vllm_specdecpp import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        return _complain(PROGRAM, f"unknown {kind} {name!r}; {_nearest(name, list(COMMANDS))}")
    program = f"{PROGRAM} {name}"
    try:
        module = import_module(COMMANDS[name].module)
        options_class: type[BaseModel] = getattr(module, f"{name.capitalize()}Options")
        run: Callable[[Any], int] = module.run
        options = parse(options_class, rest, program, inspect.getdoc(module) or "")
        return run(options)
    except ValidationError as error:
        return _complain(program, _flattened(error))
    except ValueError as error:
        return _complain(program, str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRA:
            raise
        return _complain(program, f"needs {_EXTRA[package]}; in the clone: pip install '.[train]'")
    except KeyboardInterrupt:
        return _complain(program, f"interrupted; {COMMANDS[name].when_interrupted}", 130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        return _complain(program, f"{error.filename}: {error.strerror}", 1)


def overview() -> str:
    """The text of ``vllm-specdecpp --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND ...",
            "",
            "Before a pair of models is served; a cheaper draft; an acceptance head, from labels to the stop rule.",
            "",
            "commands, in the order of their use:",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help explains a command's options; {PROGRAM} --version.",
        ]
    )


def parse(options_class: type[BaseModel], arguments: Sequence[str], program: str, description: str = "") -> Any:
    """``arguments`` as an instance of ``options_class``.

    Raises:
        ValueError: one line: an unknown option (with the nearest known one), a missing or a bad value.
        SystemExit: after ``--help``.
    """
    parser = build_parser(options_class, program, description)
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in arguments:
        if argument == "--":
            break
        option = argument.partition("=")[0]
        if option.startswith("--") and option not in known:
            raise ValueError(f"unknown option {option}; {_nearest(option, known)}")
    # Intermixed: positional arguments may stand before, between and after the options.
    found, unexpected = parser.parse_known_intermixed_args(arguments)
    if unexpected:
        raise ValueError(f"unexpected argument {unexpected[0]!r}; {program} --help lists the arguments")
    return options_class.model_validate(vars(found))


def build_parser(options_class: type[BaseModel], program: str, description: str = "") -> argparse.ArgumentParser:
    """An argument parser whose arguments, help and defaults are those of the schema."""
    parser = _Parser(
        prog=program, description=(inspect.cleandoc(options_class.__doc__ or "") or description).replace("``", "`"),
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    for name, field in options_class.model_fields.items():
        _add(parser, field.alias or name, field)
    return parser


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print together with the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help explains the arguments")


def _add(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    """Add one field as an argument. Values stay text (pydantic converts them), but for a ``Literal``'s."""
    kind, several = _kind(field.annotation)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    positional = bool(extra.get("positional"))
    keywords: dict[str, Any] = {"help": _help(field)}
    if kind is bool and not several:
        parser.add_argument(f"--{_dashed(name)}", dest=name, action=argparse.BooleanOptionalAction, **keywords)
        return
    if choices:
        by_text = {str(choice): choice for choice in choices}
        # Text that is no choice goes on as it is: pydantic then names the choices.
        keywords["type"] = lambda text: by_text.get(text, text)
        keywords["metavar"] = "{" + ",".join(by_text) + "}"
    else:
        keywords["metavar"] = _dashed(name).upper() if positional else _metavar(kind)
    if positional:
        keywords["nargs"] = ("+" if field.is_required() else "*") if several else None if field.is_required() else "?"
        parser.add_argument(name, **keywords)
    else:
        if several:
            keywords |= {"nargs": "+", "action": "extend"}
        parser.add_argument(f"--{_dashed(name)}", dest=name, required=field.is_required(), **keywords)


def _kind(annotation: Any) -> tuple[Any, bool]:
    """The type without its Optional and its list, and whether it takes several values."""
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [part for part in get_args(annotation) if part is not type(None)]
        return _kind(rest[0]) if len(rest) == 1 else (str, False)
    if get_origin(annotation) in (list, tuple, set, frozenset, Sequence):
        return _kind(get_args(annotation)[0])[0], True
    return annotation, False


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _help(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split()).replace("``", "")
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if default not in (None, "", [], ()) and default is not False:
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        text += f" [default: {'on' if default is True else shown}]"
    return text.replace("%", "%%")


def _nearest(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name.lower().replace("_", "-"), known, n=1)
    return f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}"


def _flattened(error: ValidationError) -> str:
    """Pydantic's report as one line: option, value, what is wrong."""
    parts = []
    for entry in error.errors():
        message = str(entry["msg"]).removeprefix("Value error, ").removeprefix("specdecpp: ")
        if not entry["loc"]:  # from a validator over several options, which words its own message
            parts.append(message)
        elif entry["type"] == "missing":
            parts.append(f"--{_dashed(str(entry['loc'][0]))} is missing")
        else:
            message = message[:1].lower() + message[1:]
            parts.append(f"--{_dashed(str(entry['loc'][0]))} {entry['input']}: {message}")
    return "; ".join(dict.fromkeys(parts))


def _complain(program: str, message: str, status: int = 2) -> int:
    line = " ".join(message.removeprefix("specdecpp: ").split())
    print(f"{program}: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
