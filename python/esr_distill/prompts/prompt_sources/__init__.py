"""Where prompts come from: JSONL and parquet files, data sets of the hub, folders saved by datasets."""

from esr_distill.prompts.prompt_sources.read_prompts import PromptSource, open_source, read_prompt_file, read_prompts
from esr_distill.prompts.prompt_sources.record import PromptColumns, PromptRecord

__all__ = ["PromptColumns", "PromptRecord", "PromptSource", "open_source", "read_prompt_file", "read_prompts"]
