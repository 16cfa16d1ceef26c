"""Random models of two layers, the 19-symbol tokenizer and prompt files, made on the spot: no test downloads anything."""

import json
import random
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from esr_distill.demo.character_tokenizer import make_character_tokenizer
from esr_distill.prompts import PromptBatch
from esr_distill.rollout import RolloutBatch

VOCAB_SIZE = 19
PAD, BOS, EOS = 0, 1, 2


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 `<pad>`, 1 `<bos>`, 2 `<eos>`, then one id per character; no chat template."""
    return make_character_tokenizer(max_length=128)


def make_model(seed: int = 0, config_class: type[PreTrainedConfig] = LlamaConfig, **overrides) -> PreTrainedModel:
    """A causal LM with random float32 weights in eval mode; `overrides` are fields of its config.

    The weights are large enough for distributions that are far from uniform and that differ from position to position.
    """
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config_class(**(fields | overrides)), dtype=torch.float32).eval()


def save_pair(folder: Path) -> tuple[Path, Path]:
    """Two random models with the same tokenizer in `folder`/student and `folder`/teacher."""
    paths = Path(folder) / "student", Path(folder) / "teacher"
    for seed, path in enumerate(paths):
        make_model(seed).save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    return paths


def write_prompts(path: Path, count: int = 8, with_answers: bool = True, texts: list[str] | None = None) -> list[str]:
    """A JSONL file of `count` short sums of different lengths, or of `texts`; returns the prompts."""
    rng = random.Random(0)
    if texts is None:
        texts = ["+".join(str(rng.randrange(100)) for _ in range(rng.randint(1, 4))) + "=" for _ in range(count)]
    lines = [{"prompt": text} | ({"answer": str(rng.randrange(100))} if with_answers else {}) for text in texts]
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return texts


def make_prompt_batch(
    rows: list[list[int]], request_ids: list[int] | None = None, pad_id: int = PAD, samples_per_prompt: int = 1
) -> PromptBatch:
    """Left-padded prompts, written out here so that nothing depends on the code that pads in the loop."""
    width = max(map(len, rows))
    return PromptBatch(
        prompt_ids_B_P=torch.tensor([[pad_id] * (width - len(row)) + row for row in rows]),
        prompt_mask_B_P=torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows]),
        request_ids_B=torch.tensor(list(range(len(rows))) if request_ids is None else request_ids),
        samples_per_prompt=samples_per_prompt,
    )


def make_rollouts(
    prompts: list[list[int]], responses: list[list[int]], eos_ids: tuple[int, ...] = (EOS,), pad_id: int = PAD
) -> RolloutBatch:
    """The rollouts that a model writing `responses` (EOS included, where they end with one) would leave."""
    prompt_width, width = max(map(len, prompts)), max(map(len, responses))
    ids, mask = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        before, after = prompt_width - len(prompt), width - len(response)
        ids.append([pad_id] * before + prompt + response + [pad_id] * after)
        mask.append([0] * before + [1] * (len(prompt) + len(response)) + [0] * after)
    return RolloutBatch(
        token_ids_B_T=torch.tensor(ids),
        attention_mask_B_T=torch.tensor(mask),
        prompt_width=prompt_width,
        response_lengths_B=torch.tensor([len(response) for response in responses]),
        stopped_by_eos_B=torch.tensor([response[-1] in eos_ids for response in responses]),
        logprobs_B_K=torch.zeros(len(prompts), width),
        sampling_logprobs_B_K=torch.zeros(len(prompts), width),
    )
