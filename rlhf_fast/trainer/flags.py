"""A config's fields as flags of a command and keys of its YAML file; what is written in them."""

from __future__ import annotations

import difflib
import os
import re
from argparse import ArgumentDefaultsHelpFormatter
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .contradictions import PPO, useless
from .errors import InputError
from .recipes import FILES

# The parts of --help and of docs/options.md, in this order.
GROUPS = ("model and data", "sampling", "rewards", "objective", "optimiser", "run", "devices")

# Names in one text, separated by commas; in a file they may also be a list.
COMMAS = {"report_to", "lora_target_modules"}

# Lists of `name=value`; in a file they may also be a mapping.
PAIRS = {"rollout_engine_options"}

C = TypeVar("C")


class FlagHelp(ArgumentDefaultsHelpFormatter):
    """One spelling of each flag in --help (both `_` and `-` are taken), its values, its default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)

    def _format_action_invocation(self, action: Any) -> str:
        flag = action.option_strings[0]
        if action.nargs in (0, "?"):
            return flag
        if action.choices:
            return f"{flag} {{{','.join(action.choices)}}}"
        kind = {int: "INT", float: "FLOAT", yes_or_no: "BOOL"}.get(action.type, "TEXT")
        return f"{flag} {kind}{' …' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: Any) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


class FlagParser(HfArgumentParser):
    """Flags in GROUPS. Raises InputError where argparse would print its usage and leave."""

    def _add_dataclass_arguments(self, config_class: type) -> None:
        self.groups = {title: self.add_argument_group(title) for title in GROUPS}
        super()._add_dataclass_arguments(config_class)

    def _parse_dataclass_field(self, parser: Any, field: Field) -> None:
        flag = copy(field)
        flag.metadata = dict(field.metadata)  # the rest is argparse's
        required = flag.metadata.pop("needed", False)
        HfArgumentParser._parse_dataclass_field(self.groups[flag.metadata.pop("group")], flag)
        if required:
            next(a for a in self._actions if a.dest == field.name).required = True

    def error(self, message: str) -> None:
        raise InputError(message)


def flag_parser(config_class: type, *, prog: str) -> FlagParser:
    """A config's fields as flags; --help prints them."""
    parser = FlagParser(
        config_class,
        prog=prog,
        usage=f"{prog} [--config FILE.yaml] [--flag VALUE …]",
        description=config_class.__doc__,
        formatter_class=FlagHelp,
        allow_abbrev=False,
        add_help=False,
    )
    parser._negative_number_matcher = re.compile(r"-\d*\.?\d+(e[-+]?\d+)?$")  # -1e-3 is no flag
    run = parser.groups["run"]
    run.add_argument("--config", help="YAML file of these flags, without the dashes")
    if config_class.__name__ == "PPOConfig":
        run.add_argument(
            "--recipe",
            choices=FILES,
            help="options of a method, by its name; what --config and other flags say wins",
        )
    run.add_argument("--help", "-h", action="help", help="show this and leave")
    for action in parser._actions:
        if action.dest == "resume":  # a switch that also takes the word other trainers have for it
            action.type = lambda word: word == "auto" or yes_or_no(word)
        elif action.dest == "metric_for_best_model":
            action.type = without_eval
        elif action.type is string_to_bool:
            action.type = yes_or_no
    return parser


def parse(config_class: type[C], argv: Sequence[str], *, prog: str) -> C:
    """Flags, and the YAML file they name with --config, -> a checked config."""
    parser = flag_parser(config_class, prog=prog)
    argv, recipe = list(argv), []
    if not {"-h", "--help"} & set(argv):
        file = FlagParser(add_help=False, allow_abbrev=False)
        file.add_argument("--config")
        if "recipe" in {action.dest for action in parser._actions}:
            file.add_argument("--recipe", choices=FILES)
        named, argv = file.parse_known_args(argv)
        if "\0" in (named.config or ""):
            raise InputError(f"config={named.config!r}: expected text without a NUL character")
        if named.config is not None:  # the file's values come first, so later flags win
            argv = yaml_flags(Path(named.config), config_class) + argv
        if getattr(named, "recipe", None) is not None:
            recipe = below(argv, named.recipe, config_class)
            argv = recipe + argv

    required = [action for action in parser._actions if action.required]
    for action in required:  # asked for below, after misspelt flags: one of those may be the cause
        action.required = False
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(f"unknown flag {unknown[0]}{nearest(unknown[0], config_class, '--')}")
    missing = [a.option_strings[0] for a in required if getattr(namespace, a.dest) is None]
    if missing:
        raise InputError(f"missing {', '.join(missing)}: give the flag, or the key in --config")
    values = vars(namespace)
    for name in ("config", "recipe"):
        values.pop(name, None)
    if recipe:
        without_effect(recipe, values, config_class)
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            print(f"recipe {named.recipe}: {' '.join(flag.removeprefix('--') for flag in recipe)}")
    return config_class(**values)


def below(argv: Sequence[str], recipe: str, config_class: type) -> list[str]:
    """The recipe's flags that argv does not give."""
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word[:2] == "--"}
    flags = yaml_flags(FILES[recipe], config_class)
    return [flag for flag in flags if name_of(flag) not in given]


def without_effect(recipe: list[str], values: dict[str, Any], config_class: type) -> None:
    """Take what the user's flags leave without an effect out of the recipe's and out of values."""
    there = set(map(name_of, recipe)) & set(useless(config_class, values, PPO))
    values |= {f.name: f.default for f in fields(config_class) if f.name in there}
    recipe[:] = [flag for flag in recipe if name_of(flag) not in there]


def name_of(flag: str) -> str:
    return flag.split("=")[0].removeprefix("--")


def without_eval(metric: Any) -> Any:
    """transformers knows a metric with and without the prefix."""
    return metric.removeprefix("eval_") if isinstance(metric, str) else metric


def yes_or_no(word: str) -> bool:
    return string_to_bool({"on": "true", "off": "false"}.get(word.lower(), word))


def yaml_flags(path: Path, config_class: type) -> list[str]:
    """A YAML mapping as a list of flags, so that argparse checks both alike.

    A value is the text that is written, as a flag's is, and the option says what it means: YAML 1.1
    makes False of `no`, 7 of `007`, a date of `2026-11-28` and a string of `1e-5`. Of its words
    only `null`, `~` and nothing are not text, where they are not quoted: they leave the default.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"config={path}: expected lines of `key: value`")
        written = Counter(str(key.value) for key, _ in node.value)
        loader.flatten_mapping(node)  # `<<: *other`, whose keys come first
    except OSError as error:
        raise InputError(f"config={path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"config={path} is not UTF-8 text: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"config={path} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"config={path} is not YAML of options: it is nested too deep") from None
    known = {f.name: f for f in fields(config_class)}
    values: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value not in known:
            word = key.value if isinstance(key, yaml.ScalarNode) else "that is not a word"
            raise InputError(f"config={path}: unknown key {word}{nearest(word, config_class)}")
        if written[key.value] > 1:  # YAML itself would take the last
            raise InputError(f"config={path}: {key.value} is there {written[key.value]} times")
        values[key.value] = value
    flags = []
    for name, value in values.items():
        where = f"config={path}: {name}"
        several = str(known[name].type).startswith("list")
        if isinstance(value, yaml.MappingNode) and name in PAIRS:
            words = [f"{scalar(k, where)}={scalar(v, where)}" for k, v in value.value]
            flags += [f"--{name}", *words]
        elif isinstance(value, yaml.SequenceNode) and (several or name in COMMAS):
            words = [scalar(item, f"{where} has an item that") for item in value.value]
            if None in words:
                raise InputError(f"{where} has an item that is empty, expected text")
            if any(word.startswith("--") for word in words):
                raise InputError(f"{where} has an item that begins with --, as flags do")
            flags += [f"--{name}", *words] if several else [f"--{name}={','.join(words)}"]
        elif (word := scalar(value, where)) is not None:
            flags.append(f"--{name}={word}")
    return flags


def scalar(node: yaml.Node, where: str) -> str | None:
    """The text as it is written; None for null."""
    if not isinstance(node, yaml.ScalarNode):
        kind = "list" if isinstance(node, yaml.SequenceNode) else "dict"
        raise InputError(f"{where} is a {kind}, expected one value")
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind not in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge"):
        raise InputError(f"{where} has the tag {node.tag}, expected one value without a tag")
    return None if kind == "null" else node.value


def nearest(word: str, config_class: type, dashes: str = "") -> str:
    """` (did you mean …?)`, or nothing when no name is near."""
    names = [f.name for f in fields(config_class)] + (["config"] if dashes else [])
    asked = word.lstrip("-").split("=")[0].replace("-", "_")
    found = difflib.get_close_matches(asked, names, n=1)
    return f" (did you mean {dashes}{found[0]}?)" if found else ""
