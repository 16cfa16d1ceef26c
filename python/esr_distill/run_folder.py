"""The folder of a run that begins: what a run wrote there may be written anew, what a user put there may not."""

import shlex
from pathlib import Path

import yaml

from esr_distill.config import TrainConfig
from esr_distill.config_file import CONFIG_FILE, save_config
from esr_distill.input_error import InputError
from esr_distill.kept_checkpoints import find_checkpoints
from esr_distill.monitoring.run_log import METRICS_FILE
from esr_distill.monitoring.sample_table import SAMPLES_FILE


def check_new_folder(config: TrainConfig) -> None:
    """A run may begin in `run.output_dir`: nothing is there, or what a run left that has no checkpoint yet.

    Raises:
        InputError: the folder holds checkpoints, or a file that the run would replace and that no run wrote.
    """
    output_dir = Path(config.run.output_dir)
    if find_checkpoints(output_dir):
        raise InputError(
            f"run.output_dir must not hold another run's checkpoints, got {str(output_dir)!r}; "
            f"go on with it by --resume {shlex.quote(str(output_dir))}, or choose another folder"
        )
    options = output_dir / CONFIG_FILE
    if options.exists():
        if not is_written_by_a_run(options):
            raise InputError(
                f"run.output_dir must not hold a {CONFIG_FILE} of yours, since the run writes all of its options there, got "
                f"{str(options)!r}, which no run wrote; give the file another name, or choose another folder"
            )
        return
    for name in (METRICS_FILE, SAMPLES_FILE):
        if (output_dir / name).exists():
            raise InputError(
                f"run.output_dir must not hold the {name} of something else, since the run begins a new one, got "
                f"{str(output_dir / name)!r} without a run's {CONFIG_FILE}; move the file, or choose another folder"
            )


def is_written_by_a_run(path: Path) -> bool:
    """Whether the file is to the letter what a program writes, with every group of options: no comment, nothing left out."""
    try:
        text = path.read_text(encoding="utf-8")
        options = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    if not isinstance(options, dict) or not options.keys() >= TrainConfig.__dataclass_fields__.keys():
        return False
    return yaml.safe_dump(options, sort_keys=False) == text


def begin_folder(config: TrainConfig) -> None:
    """Make the folder and write the options into it.

    Raises:
        InputError: it cannot be written.
    """
    output_dir = Path(config.run.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, output_dir)
    except OSError as error:
        raise InputError(
            f"run.output_dir must be a folder that can be written, got {str(output_dir)!r} ({error.strerror})"
        ) from None
