"""Is the prompt of every turn of a stream a function of seed and turn, also where a run goes on in the middle?

pytest tests/distill/test_prompt_stream.py
"""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tiny_models import BOS, make_tokenizer

from esr_distill.config import DataConfig
from esr_distill.input_error import InputError
from esr_distill.prompts import next_prompt_batch
from esr_distill.prompts.prepare_prompts import fit_prompts, prepare_prompts
from esr_distill.prompts.prompt_encoder import PromptEncoder
from esr_distill.prompts.prompt_set import PromptSet
from esr_distill.prompts.prompt_sources import PromptRecord, read_prompts

CPU = torch.device("cpu")


class Numbers:
    """The prompts "0" to "9", of which `read` counts how many were read; `long` are followed by a longer one."""

    def __init__(self, count: int, long: tuple[int, ...] = ()) -> None:
        self.count, self.long, self.read = count, long, 0

    def records(self) -> Iterator[PromptRecord]:
        for number in range(self.count):
            self.read += 1
            yield PromptRecord(str(number), None, {"id": number}, "7")
            if number in self.long:
                yield PromptRecord("1+2+3=")


def make_stream(source, window: int, limit: int = 4, **options):
    data = DataConfig("numbers", chat_template=False, stream_prompts=window, **options)
    teacher = make_tokenizer() if data.has_teacher_prompts else None
    encoder = PromptEncoder(make_tokenizer(), data, pad_id=0, device=CPU, teacher_tokenizer=teacher)
    stream, dropped = prepare_prompts(source, encoder, limit=limit, limit_source="context 8 minus 4")
    assert dropped == 0
    return stream


def numbers(stream, turns, seed: int = 0) -> list[int]:
    """The prompts of these turns, read back from their ids: digit d is id d + 3."""
    chosen = stream.at_turns(list(turns), seed)
    assert all(ids[0] == BOS and len(ids) == 2 for ids in chosen.token_ids)
    assert [row["id"] for row in chosen.columns] == [ids[1] - 3 for ids in chosen.token_ids]
    return [ids[1] - 3 for ids in chosen.token_ids]


def permutation(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def test_each_window_holds_the_next_prompts_in_an_order_of_its_own():
    stream = make_stream(Numbers(10), window=4)
    drawn = numbers(stream, range(20), seed=2)
    # Two passes: the window of turns 8 to 11 holds the last two prompts and, of the second pass, the first two.
    held = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]
    expected = [[window[i] for i in permutation(4, 2_000_006 + number)] for number, window in enumerate(held)]
    assert drawn == sum(expected, [])
    assert numbers(make_stream(Numbers(10), window=4), range(20), seed=3) != drawn


def test_a_window_of_the_whole_source_is_an_epoch():
    """Then a stream draws what a set draws."""
    encoder = PromptEncoder(make_tokenizer(), DataConfig("n", chat_template=False), pad_id=0, device=CPU)
    whole, _ = prepare_prompts(list(Numbers(7).records()), encoder, limit=4, limit_source="")
    stream = make_stream(Numbers(7), window=7)
    assert numbers(stream, range(30), seed=5) == numbers(whole, range(30), seed=5)
    assert stream.digest == whole.digest and stream.longest == whole.longest == 2


@pytest.mark.parametrize("window", [1, 3, 4, 25])
@pytest.mark.parametrize("start", [0, 1, 7, 12])
def test_going_on_at_any_step_draws_what_an_uninterrupted_run_draws(window, start):
    steps = [next_prompt_batch(make_stream(Numbers(10), window), 3, step, seed=1) for step in range(16)]
    stream = make_stream(Numbers(10), window)
    for step in range(start, 16):
        batch = next_prompt_batch(stream, 3, step, seed=1)
        assert torch.equal(batch.prompt_ids_B_P, steps[step].prompt_ids_B_P)
        assert torch.equal(batch.request_ids_B, steps[step].request_ids_B)


def test_the_first_prompts_are_in_the_order_of_the_source():
    stream = make_stream(Numbers(10), window=4)
    numbers(stream, [9])
    for count, expected in ((3, [0, 1, 2]), (9, [0, 1, 2, 3])):
        assert [row["id"] for row in stream.first(count).columns] == expected
    assert PromptSet([[1], [2]], [None] * 2, 0, CPU).first(5).token_ids == [[1], [2]]


def test_turns_may_fall_back():
    stream = make_stream(Numbers(10), window=3)
    late, early = numbers(stream, range(12, 15)), numbers(stream, range(2))
    assert (late, early) == tuple(numbers(make_stream(Numbers(10), 3), turns) for turns in (range(12, 15), range(2)))


def test_samples_and_ranks_share_the_same_order():
    whole = [next_prompt_batch(make_stream(Numbers(10), 4), 8, step, 0, 2).prompt_ids_B_P for step in range(3)]
    for world_size in (2, 4):
        streams = [make_stream(Numbers(10), 4) for _ in range(world_size)]
        for step in range(3):
            parts = [
                next_prompt_batch(stream, 8, step, 0, 2, rank=rank, world_size=world_size).prompt_ids_B_P
                for rank, stream in enumerate(streams)
            ]
            assert torch.equal(torch.cat(parts), whole[step])


def test_the_digest_of_what_was_read_knows_later_windows_and_not_what_is_still_to_come():
    class Changed(Numbers):
        """Number 5 is 9."""

        def records(self) -> Iterator[PromptRecord]:
            for record in super().records():
                yield replace(record, prompt="9") if record.prompt == "5" else record

    same, other = make_stream(Numbers(10), 4), make_stream(Changed(10), 4)
    assert same.digest == other.digest
    # number 5 is in the second window, of turns 4 to 7
    for turns, is_equal in ((0, True), (4, True), (5, False), (8, False), (30, False)):
        assert (same.digest_before(turns) == other.digest_before(turns)) == is_equal
    before = same.digest_before(12)
    numbers(same, range(2))  # reads the source again
    assert same.digest_before(9) == before != same.digest_before(13)


def test_every_rank_meets_a_bad_prompt_in_the_same_step():
    """It is in the window of turns 6 and 7, of which the first rank has none."""
    for rank in (0, 1):
        stream = make_stream(Numbers(10, long=(6,)), 2)
        next_prompt_batch(stream, 4, 0, 0, rank=rank, world_size=2)
        with pytest.raises(InputError, match="got 7 tokens in prompt 8"):
            next_prompt_batch(stream, 4, 1, 0, rank=rank, world_size=2)


def test_only_the_window_is_read_ahead():
    source = Numbers(10)
    stream = make_stream(source, window=4)
    assert source.read == 4
    numbers(stream, range(4))
    assert source.read == 4
    numbers(stream, [4])
    assert source.read == 8


def test_long_prompts():
    source = Numbers(6, long=(0, 4))
    assert sorted(numbers(make_stream(source, 6, limit=2, long_prompts="drop"), range(6))) == list(range(6))
    message = (
        r"data\.prompts must hold prompts of at most 2 tokens \(context 8 minus 4\), got 7 tokens in prompt 2; "
        r"data\.long_prompts: drop leaves such out"
    )
    with pytest.raises(InputError, match=message):
        make_stream(source, 6, limit=2)
    with pytest.raises(InputError, match=r"at most 1 tokens \(context 8 minus 4\), got none in the whole stream"):
        make_stream(source, 6, limit=1, long_prompts="drop")


def test_the_teachers_prompts_come_along():
    options = {"privileged_column": "hint", "privileged_template": "{privileged_context}{prompt}"}
    chosen = make_stream(Numbers(10), 4, **options).at_turns([0, 5], 0)
    assert [[BOS, 7 + 3, *ids[1:]] for ids in chosen.token_ids] == chosen.teacher_token_ids
    with pytest.raises(InputError, match=r"got 3 tokens in prompt 1"):
        make_stream(Numbers(10), 4, limit=2, **options)


def test_a_stream_of_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(n), "id": n}) + "\n" for n in range(10)))
    source = read_prompts(DataConfig(str(path), stream_prompts=4))
    assert numbers(make_stream(source, 4), range(20)) == numbers(make_stream(Numbers(10), 4), range(20))


# Prompts in memory


def test_dropped_prompts_take_everything_with_them():
    columns = [{"id": i} for i in range(3)]
    prompts = PromptSet([[1, 2], [3], [4]], ["a", "b", "c"], 0, CPU, [[1, 2], [3, 3, 3], [4, 4]], columns)
    kept, dropped = fit_prompts(prompts, limit=2, limit_source="", long_prompts="drop", option="data.prompts")
    assert dropped == 1
    assert kept == PromptSet([[1, 2], [4]], ["a", "c"], 0, CPU, [[1, 2], [4, 4]], [columns[0], columns[2]])


def test_prompts_in_memory_are_fitted():
    records = [PromptRecord("1="), PromptRecord("1+2+3="), PromptRecord("2=")]

    def prepare(**options):
        data = DataConfig("p", chat_template=False, **options)
        encoder = PromptEncoder(make_tokenizer(), data, pad_id=0, device=CPU)
        return prepare_prompts(records, encoder, limit=4, limit_source="context 8 minus 4")

    prompts, dropped = prepare(long_prompts="drop")
    assert dropped == 1 and [len(ids) for ids in prompts.token_ids] == [3, 3]
    message = (
        r"data\.prompts must hold prompts of at most 4 tokens \(context 8 minus 4\), got 1 of 3 that are longer, "
        r"the longest 7 tokens; data\.long_prompts: drop leaves them out"
    )
    with pytest.raises(InputError, match=message):
        prepare()
