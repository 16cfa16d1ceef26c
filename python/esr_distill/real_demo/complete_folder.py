"""Results of a stage that appear whole or not at all, so that whatever is there can be used again."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` if the block ends without an exception, and is removed if not.

    An older `target` is replaced only then.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: dict) -> None:
    """Write JSON so that readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


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
