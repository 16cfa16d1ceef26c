"""Measurements that are taken once and read back when a demo is started again."""

import time
from collections.abc import Callable
from pathlib import Path

from esr_distill.complete_files import read_json, write_json


def remembered(path: Path, settings: dict, measure: Callable[[], dict]) -> dict:
    """What `measure` returned when it last ran with these settings, from the file `path`; else run it and write that.

    The seconds that it took are added under "seconds".
    """
    if path.is_file():
        stored = read_json(path)
        if stored["settings"] == settings:
            return stored["result"]
    start = time.perf_counter()
    result = {**measure(), "seconds": time.perf_counter() - start}
    write_json(path, {"settings": settings, "result": result})
    return result
