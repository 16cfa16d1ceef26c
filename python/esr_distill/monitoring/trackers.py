"""TensorBoard, W&B and Trackio, through accelerate's trackers. The packages are optional, and all that knows them is here."""

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from esr_distill.config import TrainConfig
from esr_distill.input_error import InputError


def check_trackers(names: list[str]) -> None:
    """Raises InputError where a package is missing, with the command that installs it."""
    missing = [package for package in dict.fromkeys(["accelerate", *names]) if find_spec(package) is None]
    if names and missing:
        raise InputError(
            f"monitoring.trackers must name installed packages, got {names} without {' and '.join(missing)} "
            f"(pip install {' '.join(missing)})"
        )


def open_trackers(config: TrainConfig, output_dir: Path) -> list:
    """Accelerate's trackers by the names in `monitoring.trackers`, started, with the options of the run.

    TensorBoard writes into `output_dir`/tensorboard. At wandb and trackio a run that goes on is one more run of the same name.
    """
    settings = config.monitoring
    if not settings.trackers:
        return []
    check_trackers(settings.trackers)
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers ask it which process they are in
    options = flat(asdict(config))
    opened = []
    for name in settings.trackers:
        make = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            tracker = make(name, logging_dir=str(output_dir))
        else:
            tracker = make(settings.project, name=output_dir.resolve().name)
        tracker.start()
        # a table of options takes numbers and texts alone
        tracker.store_init_configuration(
            {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in options.items()}
        )
        opened.append(tracker)
    return opened


def numbers_of(record: dict) -> dict[str, float]:
    """The numbers of a record by path, e.g. "train/divergence_by_position/0-4"; texts, lists and None are left out."""
    room = "train" if record["kind"] == "step" else record["kind"]
    numbers = {name: value for name, value in flat(record).items() if name != "step"}
    return {
        f"{room}/{name}": float(value)
        for name, value in numbers.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def flat(value: dict, before: str = "") -> dict:
    """One level in place of nested mappings; names are joined by slashes."""
    result = {}
    for name, item in value.items():
        if isinstance(item, dict):
            result |= flat(item, f"{before}{name}/")
        else:
            result[f"{before}{name}"] = item
    return result
