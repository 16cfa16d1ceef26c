"""Writes the classes of a tokenizer's ids by the string matches of arXiv 2605.27028, for rules of kind token_classes.

    python -m esr_distill.token_selection.paper_classes --model Qwen/Qwen3-1.7B --output classes.json

The paper names words and signs; which of its classes a token with several of these is in is our reading: the first that holds,
in the order of `class_of`.
"""

import argparse
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from esr_distill.complete_files import write_json
from esr_distill.exit_status import BAD_INPUT
from esr_distill.input_error import InputError
from esr_distill.models import load_tokenizer

PLANNING = {"To", "Let", "First", "Step", "We", "Given", "Therefore", "Thus", "Since"}
OPERATORS = set("+-−×/=")
LATEX = ("\\(", "\\[")


def class_of(text: str) -> str:
    """The class of a token by its text, without the space around it."""
    word = text.strip()
    if any(sign in word for sign in LATEX):
        return "math_latex"
    if word in PLANNING:
        return "planning"
    if word.isdecimal():
        return "math_number"
    if word and set(word) <= OPERATORS:
        return "math_operator"
    if not any(character.isalnum() for character in word):
        return "structural"
    return "continuation"


def classes_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Every id, as text, and its class; special tokens are structural."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return {
        str(token_id): "structural" if token_id in special else class_of(tokenizer.decode([token_id]))
        for token_id in sorted(tokenizer.get_vocab().values())
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hub id or local folder with the tokenizer.")
    parser.add_argument("--output", required=True, help="JSON file for the classes.")
    options = parser.parse_args(argv)
    try:
        write_json(Path(options.output), classes_of(load_tokenizer(options.model, "--model")))
    except InputError as error:
        print(f"paper_classes: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
