"""Config to YAML and back."""

import os
from dataclasses import asdict
from pathlib import Path

import yaml

from esr_distill.config import TrainConfig

CONFIG_FILE = "config.yaml"


def save_config(config: TrainConfig, output_dir: Path) -> None:
    """Write the resolved config, every field with its value, beside the checkpoints."""
    text = yaml.safe_dump(_plain(asdict(config)), sort_keys=False)
    temporary = output_dir / (CONFIG_FILE + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, output_dir / CONFIG_FILE)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
