"""A training config from flags and YAML, to YAML, and back from the file that a run left."""

import sys
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal

import yaml
from jsonargparse import ArgumentParser, Namespace

from esr_distill.complete_files import write_text
from esr_distill.config import TrainConfig
from esr_distill.input_error import InputError
from esr_distill.presets import PRESETS, preset_options
from esr_distill.strict_parser import strict_parser
from esr_distill.trl_names import OTHER_MEANINGS, TRL_NAMES, translated

CONFIG_FILE = "config.yaml"
# What decides which of a preset's values are of use.
PRESET_OPTIONS = sorted({name for options in PRESETS.values() for name in options} | {"horizon.kind"})


def train_parser() -> ArgumentParser:
    """A YAML file by --config, then flags by the same names, e.g. --rollout.horizon 100."""
    parser = strict_parser(description="Distil a student from a teacher on the student's own rollouts.")
    parser.add_argument("--config", action="config", help="YAML file of options; flags after it win.")
    parser.add_argument(
        "--resume", type=str, default=None, help="Folder of a run to go on with; takes no other option."
    )
    parser.add_argument(
        "--preset", type=Literal[tuple(PRESETS)] | None, default=None, help="A published method; all other options win."
    )
    parser.add_class_arguments(TrainConfig, None)
    group = parser.add_argument_group("TRL's names of options, where they mean the same")
    for name, trl_name in TRL_NAMES.items():
        group.add_argument(
            f"--{name}",
            type=trl_name.type | None,
            default=None,
            help=f"becomes {trl_name.becomes}",
        )
    for name in OTHER_MEANINGS:
        group.add_argument(f"--{name}", type=int | None, default=None, help="means something else here and is refused")
    return parser


def parse_train_options(arguments: list[str]) -> TrainConfig:
    """The config that file and flags give, by our names or TRL's, on top of the preset that they name.

    Raises:
        InputError: an option by both names; a group that is no group; a value out of its range.
    """
    parser = train_parser()
    options = parser.parse_args(arguments)
    given = parser.parse_args(arguments, defaults=False)
    of_trl = {name: options[name] for name in (*TRL_NAMES, *OTHER_MEANINGS) if options[name] is not None}
    theirs, messages = translated(of_trl, lambda option: option in given)
    for message in messages:
        print(f"esr-distill: {message}", file=sys.stderr)
    preset = {}
    if options.preset is not None:
        named = {name: given[name] for name in PRESET_OPTIONS if name in given}
        preset = preset_options(options.preset, named | theirs)
    defaults = preset | theirs
    if defaults:
        parser.set_defaults(defaults)
        options = parser.parse_args(arguments)
    try:
        return read_config(options, parser)
    except InputError as error:
        of_preset = [f"{name}: {value}" for name, value in preset.items() if name in str(error)]
        if not of_preset:
            raise
        raise InputError(f"{error} (--preset {options.preset} sets {', '.join(of_preset)})") from None


def read_config(options: Namespace, parser: ArgumentParser) -> TrainConfig:
    """Parsed train options as a checked TrainConfig.

    Raises:
        InputError: a group that is no group, e.g. `loss:` with nothing below it; a value out of its range.
    """
    for name in TrainConfig.__dataclass_fields__:
        if not isinstance(options[name], Namespace):
            raise InputError(f"{name} must be a group of options, got {options[name]!r}")
    if not isinstance(options["model"]["lora"], Namespace):
        raise InputError(f"model.lora must be a group of options, got {options['model']['lora']!r}")
    groups = parser.instantiate(options)
    return TrainConfig(**{name: groups[name] for name in TrainConfig.__dataclass_fields__})


def load_saved_config(output_dir: Path) -> TrainConfig:
    """The config of an earlier run, from the file it left. Its `run.output_dir` is where the run lies now.

    Raises:
        InputError: there is no such file.
    """
    path = output_dir / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"--resume must name the folder of a run, got {str(output_dir)!r}, which has no {CONFIG_FILE}")
    parser = train_parser()
    config = read_config(parser.parse_path(path), parser)
    # A run may have been moved or copied, and a relative folder means another one in another working directory.
    return replace(config, run=replace(config.run, output_dir=str(output_dir)))


def save_config(config: TrainConfig, output_dir: Path) -> None:
    """Write the resolved config, every field with its value, beside the checkpoints."""
    write_text(output_dir / CONFIG_FILE, yaml.safe_dump(_plain(asdict(config)), sort_keys=False))


def changed_options(config: object, prefix: str = "") -> list[str]:
    """ "group.option: value" of every option that has not its default; the rest of the resolved config is in config.yaml."""
    lines = []
    for field in fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            lines += changed_options(value, f"{name}.")
        elif value != (field.default if field.default_factory is MISSING else field.default_factory()):
            lines.append(f"{name}: {_plain(value)}")
    return lines


def _plain(value: object) -> object:
    """As YAML has it; of a rule the fields that are set."""
    if is_dataclass(value):
        set_fields = {field.name: getattr(value, field.name) for field in fields(value)}
        return {name: _plain(item) for name, item in set_fields.items() if item is not None}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
