"""A training config from flags and YAML, to YAML, and back from the file that a run left."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import yaml
from jsonargparse import ArgumentParser, Namespace

from esr_distill.complete_files import write_text
from esr_distill.config import TrainConfig
from esr_distill.input_error import InputError
from esr_distill.presets import PRESETS

CONFIG_FILE = "config.yaml"


def train_parser() -> ArgumentParser:
    """A YAML file by --config, then flags by the same names, e.g. --rollout.horizon 100."""
    parser = ArgumentParser(description="Distil a student from a teacher on the student's own rollouts.")
    parser.add_argument("--config", action="config", help="YAML file of options; flags after it win.")
    parser.add_argument(
        "--resume", type=str, default=None, help="Folder of a run to go on with; takes no other option."
    )
    parser.add_argument(
        "--preset", type=Literal[tuple(PRESETS)] | None, default=None, help="A published method; all other options win."
    )
    parser.add_class_arguments(TrainConfig, None)
    return parser


def parse_train_options(arguments: list[str]) -> TrainConfig:
    """The config that file and flags give, on top of the preset that they name."""
    parser = train_parser()
    options = parser.parse_args(arguments)
    if options.preset is not None:
        given = parser.parse_args(arguments, defaults=False)
        parser.set_defaults({name: value for name, value in PRESETS[options.preset].items() if name not in given})
        options = parser.parse_args(arguments)
    return read_config(options, parser)


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


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
