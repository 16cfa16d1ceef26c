"""Are prompt files read or refused with the place named, and is the order of batches a function of the seed alone?

pytest tests/distill/test_prompts.py
"""

import gzip
import json
import lzma

import pytest
import torch
from chat_templates import TEMPLATE, encode
from tiny_models import BOS, make_tokenizer, write_prompts

from esr_distill.config import DataConfig
from esr_distill.input_error import InputError
from esr_distill.prompts import (
    PromptRecord,
    PromptSet,
    next_prompt_batch,
    pad_prompts,
    rank_rows,
    read_prompt_file,
    tokenize_prompts,
)

CPU = torch.device("cpu")
LINES = '{"prompt": "1+2=", "answer": 3}\n\n{"prompt": "4=", "answer": "4", "source": "by hand"}\n{"prompt": "5="}\n'
RECORDS = [PromptRecord("1+2=", "3"), PromptRecord("4=", "4", {"source": "by hand"}), PromptRecord("5=", None)]


def tokenize(records, tokenizer=None, chat_template=False, **options) -> list[list[int]]:
    data = DataConfig("prompts.jsonl", chat_template=chat_template, **options)
    return tokenize_prompts(records, tokenizer or make_tokenizer(), data, pad_id=0, device=CPU).token_ids


def make_set(count: int) -> PromptSet:
    """Prompt i is [100 + i]."""
    return PromptSet([[100 + i] for i in range(count)], [None] * count, 0, CPU)


def order(count: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """The prompts of each batch as indices."""
    prompts = make_set(count)
    batches = [next_prompt_batch(prompts, batch_size, step, seed) for step in range(steps)]
    return [(batch.prompt_ids_B_P[:, 0] - 100).tolist() for batch in batches]


# Files


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".xz", lzma.open), (".gz", gzip.open)])
def test_read(tmp_path, suffix, opener):
    path = tmp_path / f"prompts.jsonl{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(LINES)
    assert read_prompt_file(path, "data.prompts") == RECORDS


def test_messages_and_characters_outside_ascii(tmp_path):
    path, messages = tmp_path / "prompts.jsonl", [{"role": "user", "content": "Zwölf÷3 = ?"}]
    path.write_text(json.dumps({"prompt": messages}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_prompt_file(path, "data.prompts") == [PromptRecord(messages)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"data\.prompts must hold at least one prompt, got '.*prompts\.jsonl', which is empty"),
        ("\n \n", r"data\.prompts must hold at least one prompt"),
        ('{"prompt": "1="}\nnot json\n', r"data\.prompts: .*prompts\.jsonl, line 2 must be JSON, got 'not json'"),
        (
            '{"prompt": "1="}\n\n{"prompt": "2="\n',
            r"data\.prompts: .*, line 3 must be JSON, got '\{\"prompt\": \"2=\"'",
        ),
        (
            '{"question": "1=", "id": 4}\n',
            r"data\.prompts: .*, line 1 must have a column 'prompt', got 'question', 'id'",
        ),
        ('{"prompt": ""}\n', r"line 1, 'prompt' must be a text or a list of chat messages and not empty, got ''"),
        ('{"prompt": " \\n"}\n', r"line 1, 'prompt' must be a text that is not empty, got ' \\n'"),
        ('{"prompt": []}\n', r"line 1, 'prompt' must be a text or a list of chat messages and not empty, got \[\]"),
        ('\n{"prompt": 7}\n', r"line 2, 'prompt' must be a text or a list of chat messages and not empty, got 7"),
        ('{"prompt": null}\n', r"line 1, 'prompt' must be a text or a list of chat messages and not empty, got None"),
        ('{"prompt": ["1="]}\n', r"line 1, 'prompt', message 1 must have role and content, both text, got '1='"),
        (
            '{"prompt": [{"content": "1="}]}\n',
            r"'prompt', message 1 must have role and content, both text, got \{'content",
        ),
        (
            '{"prompt": [{"role": "user", "content": "1="}, {"role": "user", "content": ["2="]}]}\n',
            r"'prompt', message 2 must have role and content, both text, got \{'role': 'user', 'content': \['2='\]\}",
        ),
        (
            '{"prompt": [{"role": "user", "content": "1="}, {"role": "assistant", "content": "1"}]}\n',
            r"line 1, 'prompt' must end before the assistant's turn, which the student writes, got an answer .* '1'",
        ),
        ('["1="]\n', r"data\.prompts: .*, line 1 must be an object with a column 'prompt', got \['1='\]"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_prompt_file(tmp_path / "prompts.jsonl", "data.prompts")


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match=r"evaluation\.prompts must be a JSONL file, got 'no\.jsonl', which does not"):
        read_prompt_file("no.jsonl", "evaluation.prompts")
    with pytest.raises(InputError, match=r"evaluation\.prompts must be a JSONL file, got .*, which is no file"):
        read_prompt_file(tmp_path, "evaluation.prompts")


def test_damaged_files(tmp_path):
    whole_xz, whole_gz = lzma.compress(LINES.encode() * 50), gzip.compress(LINES.encode() * 50)
    files = {
        "cut.jsonl.xz": whole_xz[:-20],
        "cut.jsonl.gz": whole_gz[:-20],
        "changed.jsonl.gz": whole_gz[:20] + b"\xff\xff\xff" + whole_gz[23:],
        "plain.jsonl.xz": LINES.encode(),
        "plain.jsonl.gz": LINES.encode(),
        "latin1.jsonl": '{"prompt": "Zwölf"}\n'.encode("latin-1"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"data.prompts must be a readable JSONL file, got '.*{name}'"):
            read_prompt_file(tmp_path / name, "data.prompts")


# Tokens


def test_plain_text_gets_the_tokenizers_own_special_tokens():
    assert tokenize([PromptRecord("1+2="), PromptRecord("4=")]) == [[BOS, *encode("1+2=")], [BOS, *encode("4=")]]


def test_answers_pad_id_and_device_travel_along():
    data = DataConfig("prompts.jsonl", chat_template=False)
    prompts = tokenize_prompts(RECORDS, make_tokenizer(), data, pad_id=5, device=CPU)
    assert (prompts.answers, prompts.pad_id, prompts.device, prompts.longest) == (["3", "4", None], 5, CPU, 5)


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        ("4=", {}, "#1;4=#2;"),
        ("4=", {"system_prompt": "77"}, "#0;77#1;4=#2;"),
        ([{"role": "user", "content": "4="}], {}, "#1;4=#2;"),
        (
            [
                {"role": "user", "content": "1="},
                {"role": "assistant", "content": "1"},
                {"role": "user", "content": "4="},
            ],
            {"system_prompt": "77"},
            "#0;77#1;1=#2;1#1;4=#2;",
        ),
    ],
)
def test_chat_template(prompt, options, expected):
    """No special token is added to what the template wrote."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert tokenize([PromptRecord(prompt)], tokenizer, chat_template=True, **options) == [encode(expected)]


def test_messages_use_the_template_although_texts_do_not():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    records = [PromptRecord("4="), PromptRecord([{"role": "user", "content": "4="}])]
    assert tokenize(records, tokenizer) == [[BOS, *encode("4=")], encode("#1;4=#2;")]


def test_no_chat_template():
    with pytest.raises(InputError, match=r"data\.chat_template must be false for a tokenizer without .*, got true"):
        tokenize([PromptRecord("4=")], chat_template=True)
    with pytest.raises(InputError, match=r"data\.prompts must hold texts for a tokenizer without .*, got messages"):
        tokenize([PromptRecord([{"role": "user", "content": "4="}])])


def test_a_template_that_refuses_the_messages():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(InputError, match=r"data\.prompts must suit the .* template, got .*System role not supported"):
        tokenize([PromptRecord("4=")], tokenizer, chat_template=True, system_prompt="7")


def test_a_prompt_without_tokens():
    tokenizer, data = make_tokenizer(), DataConfig("prompts.jsonl")
    tokenizer.chat_template = "{% if add_generation_prompt and messages[0].content != '4=' %}7{% endif %}"
    records = [PromptRecord("4="), PromptRecord("1=")]
    with pytest.raises(
        InputError, match=r"evaluation\.prompts: a prompt must give at least one token, got none for '4='"
    ):
        tokenize_prompts(records, tokenizer, data, pad_id=0, device=CPU, option="evaluation.prompts")


def test_the_written_prompts_come_back(tmp_path):
    texts = write_prompts(tmp_path / "prompts.jsonl", count=5)
    records = read_prompt_file(tmp_path / "prompts.jsonl", "data.prompts")
    assert [ids[1:] for ids in tokenize(records)] == [encode(text) for text in texts]
    assert all(record.answer.isdigit() for record in records)


# Batches


def test_left_padding():
    prompts = PromptSet([[1, 5, 6], [1], [1, 7]], [None] * 3, 0, CPU)
    batch = pad_prompts(prompts, [2, 0, 1], [30, 31, 32])
    assert batch.prompt_ids_B_P.tolist() == [[0, 1, 7], [1, 5, 6], [0, 0, 1]]
    assert batch.prompt_mask_B_P.tolist() == [[False, True, True], [True, True, True], [False, False, True]]
    assert batch.request_ids_B.tolist() == [30, 31, 32]
    assert (batch.prompt_ids_B_P.dtype, batch.prompt_mask_B_P.dtype) == (torch.int64, torch.bool)
    assert pad_prompts(prompts, [2, 1], [0, 1]).prompt_ids_B_P.shape == (2, 2)


def test_a_pad_id_inside_a_prompt_is_a_token():
    batch = pad_prompts(PromptSet([[1, 0, 5], [0]], [None] * 2, 0, CPU), [0, 1], [0, 1])
    assert batch.prompt_mask_B_P.tolist() == [[True, True, True], [False, False, True]]


@pytest.mark.parametrize(("count", "batch_size"), [(12, 4), (7, 3), (3, 8), (1, 2), (5, 5)])
def test_every_epoch_is_a_permutation(count, batch_size):
    """Also where a batch crosses from one epoch to the next, or holds several epochs."""
    epochs = 6
    batches = order(count, batch_size, steps=count * epochs // batch_size, seed=3)
    assert all(len(batch) == batch_size for batch in batches)
    stream = sum(batches, [])
    whole = [stream[i : i + count] for i in range(0, len(stream) - count + 1, count)]
    assert whole and all(sorted(epoch) == list(range(count)) for epoch in whole)
    if count >= 5:
        assert len({tuple(epoch) for epoch in whole}) == len(whole)


def test_order_depends_on_the_seed_alone():
    assert order(20, 4, 10, seed=1) == order(20, 4, 10, seed=1)
    assert order(20, 4, 5, seed=1) != order(20, 4, 5, seed=2)
    # The same prompts in the same order, however they are cut into batches.
    assert sum(order(20, 4, 10, seed=1), []) == sum(order(20, 10, 4, seed=1), [])
    assert torch.equal(
        next_prompt_batch(make_set(20), 4, 7, 1).prompt_ids_B_P[:, 0] - 100, torch.tensor(order(20, 4, 8, 1)[7])
    )


def test_order_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    order(20, 4, 3, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 2**32, 2**63, 2**64 - 1])
def test_large_seeds(seed):
    assert sorted(order(6, 6, 1, seed)[0]) == list(range(6))


def test_request_ids_number_the_rollouts_of_the_run():
    """No two rollouts of a run share a random stream, also when a prompt comes back."""
    prompts = make_set(3)
    ids = [next_prompt_batch(prompts, 4, step, 0).request_ids_B.tolist() for step in range(3)]
    assert ids == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_samples_of_a_prompt_stand_together_and_are_requests_of_their_own():
    prompts = make_set(6)
    shared = [next_prompt_batch(prompts, 6, step, 0, samples_per_prompt=3) for step in range(3)]
    single = [next_prompt_batch(prompts, 2, step, 0) for step in range(3)]
    for batch, plain in zip(shared, single, strict=True):
        assert batch.samples_per_prompt == 3 and plain.samples_per_prompt == 1
        assert torch.equal(batch.prompt_ids_B_P, plain.prompt_ids_B_P.repeat_interleave(3, dim=0))
    assert torch.cat([batch.request_ids_B for batch in shared]).tolist() == list(range(18))


def test_pad_prompts_keeps_columns_and_samples():
    columns = [{"id": 0}, {"id": 1}, {"id": 2}]
    prompts = PromptSet([[5], [6, 7], [8]], [None] * 3, 0, CPU, columns=columns)
    batch = pad_prompts(prompts, [2, 2, 0, 0], [4, 5, 6, 7], samples_per_prompt=2)
    assert [row["id"] for row in batch.columns_B] == [2, 2, 0, 0]
    assert batch.samples_per_prompt == 2 and batch.teacher_prompts is None and batch.for_teacher is batch
    assert pad_prompts(make_set(3), [0, 1], [0, 1]).columns_B is None


# Ranks


@pytest.mark.parametrize(("batch_size", "samples"), [(12, 1), (24, 2)])
def test_ranks_share_the_batch_of_one_rank(batch_size, samples):
    """For every world size the ranks' rows, one rank after another, are the rows of one rank, with their request ids."""
    prompts = make_set(7)
    for step in range(5):
        whole = next_prompt_batch(prompts, batch_size, step, 3, samples)
        for world_size in (1, 2, 3, 4, 12):
            parts = [
                next_prompt_batch(prompts, batch_size, step, 3, samples, rank=rank, world_size=world_size)
                for rank in range(world_size)
            ]
            assert all(part.samples_per_prompt == samples for part in parts)
            assert all(len(part.request_ids_B) == batch_size // world_size for part in parts)
            for name in ("prompt_ids_B_P", "request_ids_B"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_the_prompts_of_an_epoch_are_disjoint_over_ranks():
    prompts, world_size = make_set(24), 3
    seen = [[], [], []]
    for step in range(4):
        for rank in range(world_size):
            batch = next_prompt_batch(prompts, 6, step, 1, rank=rank, world_size=world_size)
            seen[rank] += (batch.prompt_ids_B_P[:, 0] - 100).tolist()
    assert [len(set(rows)) for rows in seen] == [8, 8, 8]
    assert sorted(sum(seen, [])) == list(range(24))


def test_rows_of_a_rank():
    assert [list(rank_rows(8, 2, rank, 2)) for rank in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    message = r"rollout\.batch_size must be a multiple of .*samples_per_prompt = 4 times .* processes = 3, got 16"
    with pytest.raises(InputError, match=message):
        rank_rows(16, 4, 0, 3)
    with pytest.raises(InputError, match=r"rank must be in \[0, 2\), got 2"):
        rank_rows(8, 1, 2, 2)


def test_the_order_is_that_of_earlier_versions():
    """A run that was begun with one version goes on with another: these orders are torch.randperm(6) of seeds 0, 1, 5000015."""
    assert order(6, 6, 2, seed=0) == [permutation(0), permutation(1)]
    assert order(6, 6, 1, seed=5) == [permutation(5_000_015)]


def permutation(seed: int) -> list[int]:
    return torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()
