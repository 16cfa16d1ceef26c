"""Parsers that take nothing for something else: no abbreviated flag, no key that a YAML mapping holds twice."""

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

MODE = "yaml_without_repeats"


class RepeatedKey(yaml.YAMLError):
    """A key of which YAML's usual readers keep the last value and drop the others."""


def strict_parser(**arguments: str) -> ArgumentParser:
    return ArgumentParser(parser_mode=MODE, allow_abbrev=False, **arguments)


def load_without_repeats(text: str) -> object:
    """Raises RepeatedKey."""
    check_keys(yaml.compose(text, Loader=yaml.SafeLoader))
    return get_loader("yaml")(text)


def check_keys(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                first = lines[key.value]
                raise RepeatedKey(f"{key.value} must be given once, got it in lines {first} and {line}")
            lines[key.value] = line
            check_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            check_keys(item)


set_loader(MODE, load_without_repeats, exceptions=(yaml.YAMLError,))
