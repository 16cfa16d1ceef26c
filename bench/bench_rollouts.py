"""D1 and D2: how fast rollouts are drawn, by the in-process engine and by transformers' `generate`.

python -m bench.bench_rollouts                                        # on a GPU: shapes of Qwen3-0.6B and 1.7B, random weights
python -m bench.bench_rollouts --models folder --batch-sizes 16       # a saved model; on a CPU too
python -m bench.bench_rollouts --smoke                                # tiny shapes; its times mean nothing

Every rollout has the whole horizon: no id ends it. Temperature 0.7 and top-p 0.95, the trainer's defaults, for all. Gate: greedy
tokens of the engine must be those of `generate`, in float32 all of them; in 16 bits ties are rounded apart, so there the share of
rows that agree is a column. Its log-probs must be those of a training forward. Floor of a step: its weights and KV cache, read
once at the copy rate of this machine. The result file is written whole after each row.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from transformers import GenerationConfig, PreTrainedModel

from bench.ceilings import Ceilings
from bench.record_demo import RESULTS, ROOT, machine_folder
from bench.rollout_models import SHAPES, make_model, make_prompts, step_bytes
from bench.timing import Stopwatch
from esr_distill.complete_files import write_json
from esr_distill.hidden_states import last_hidden_states, output_head
from esr_distill.input_error import InputError
from esr_distill.machine import machine_record
from esr_distill.prompts import PromptBatch
from esr_distill.rollout import GREEDY, InProcessBackend, RolloutBatch, SamplerSettings, generate_rollouts
from esr_distill.rollout.hf_generate import HFGenerateBackend, only_generation_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLER = SamplerSettings(sampling_temperature=0.7, top_p=0.95)
LOGPROB_LIMIT = {"float32": 1e-3, "bfloat16": 0.5}
DEFAULT_MODELS = ["qwen3-0.6b", "qwen3-1.7b"]
Run = Callable[[], object]


def rollouts(
    model: PreTrainedModel, prompts: PromptBatch, horizon: int, sampler: SamplerSettings, backend, eos_ids=()
) -> RolloutBatch:
    return generate_rollouts(
        model, prompts, horizon=horizon, sampler=sampler, eos_ids=eos_ids, pad_id=0, seed=0, backend=backend
    )


def generate_run(model: PreTrainedModel, prompts: PromptBatch, horizon: int, cache: str | None) -> Run:
    """`generate` as one calls it; with "static" it compiles its step on a GPU."""
    config = GenerationConfig(
        do_sample=True,
        temperature=SAMPLER.sampling_temperature,
        top_k=SAMPLER.top_k,
        top_p=SAMPLER.top_p,
        max_new_tokens=horizon,
        pad_token_id=0,
        cache_implementation=cache,
    )

    def run() -> object:
        with only_generation_config(model, config):
            mask_B_P = prompts.prompt_mask_B_P.long()
            tokens = model.generate(prompts.prompt_ids_B_P, attention_mask=mask_B_P)
        if tokens.shape[1] != prompts.prompt_ids_B_P.shape[1] + horizon:
            raise RuntimeError(f"generate gave {tokens.shape[1]} columns, expected the prompt's and {horizon}")
        return tokens

    return run


def candidates(
    model: PreTrainedModel, prompts: PromptBatch, horizon: int, is_cuda: bool
) -> dict[str, tuple[Run, object]]:
    """By name: what is timed, and the engine whose memory is released afterwards."""
    engines = {"ours, CUDA graphs" if is_cuda else "ours": InProcessBackend()}
    if is_cuda:
        engines["ours, no graphs"] = InProcessBackend(use_graphs=False)
    engines["ours, compiled step"] = InProcessBackend(compile_backend="inductor")
    runs = {
        name: (lambda engine=engine: rollouts(model, prompts, horizon, SAMPLER, engine), engine)
        for name, engine in engines.items()
    }
    caches = {"generate": None} | ({"generate, static cache": "static"} if is_cuda else {})
    return runs | {name: (generate_run(model, prompts, horizon, cache), None) for name, cache in caches.items()}


@torch.no_grad()
def gate(model: PreTrainedModel, prompts: PromptBatch, horizon: int, engine: InProcessBackend, dtype: str) -> dict:
    """Greedy tokens against `generate`, to the horizon and with an id that ends rows, and log-probs against one forward."""
    greedy = rollouts(model, prompts, horizon, GREEDY, engine)
    expected = rollouts(model, prompts, horizon, GREEDY, HFGenerateBackend())
    agree_B = (greedy.token_ids_B_T == expected.token_ids_B_T).all(-1)
    eos_ids = (int(expected.response_ids_B_K[0, horizon // 2]),)  # the first row draws it
    ended = [rollouts(model, prompts, horizon, GREEDY, backend, eos_ids) for backend in (engine, HFGenerateBackend())]
    same_length_B = ended[0].response_lengths_B == ended[1].response_lengths_B
    shape = min(rollout.token_ids_B_T.shape[1] for rollout in ended)
    agree_B &= same_length_B & (ended[0].token_ids_B_T[:, :shape] == ended[1].token_ids_B_T[:, :shape]).all(-1)
    num_ended = int(ended[1].stopped_by_eos_B.sum())
    start, error = greedy.prompt_width, 0.0
    hidden_B_T_D, head = last_hidden_states(model, greedy), output_head(model)
    for row, hidden_T_D in enumerate(hidden_B_T_D):
        logprobs_K_V = head.logits(hidden_T_D[start - 1 : -1]).float().log_softmax(-1)
        drawn_K = logprobs_K_V.gather(1, greedy.response_ids_B_K[row, :, None])[:, 0]
        error = max(error, (drawn_K - greedy.logprobs_B_K[row]).abs().max().item())
    share = agree_B.float().mean().item()
    if error > LOGPROB_LIMIT[dtype] or (dtype == "float32" and share < 1):
        raise AssertionError(f"log-probs off by {error:.3g}, {share:.0%} of the rows agree with generate")
    return {"rows_equal_to_generate": share, "rows_that_ended": num_ended, "largest_logprob_error": error}


def measured(run: Run, stopwatch: Stopwatch, repetitions: int) -> dict:
    first = stopwatch.seconds(run)
    observed = stopwatch.observed(run)
    seconds = sorted(stopwatch.seconds(run) for _ in range(repetitions))
    return {
        "first_call_s": first,
        "median_s": statistics.median(seconds),
        "least_s": seconds[0],
        "most_s": seconds[-1],
        "repetitions": repetitions,
        **observed,
    }


def group_rows(
    options: argparse.Namespace, model: PreTrainedModel, setting: dict, stopwatch: Stopwatch, copy_rate: float
):
    prompts = make_prompts(model, setting["batch_size"], setting["prompt"], is_ragged=setting["is_ragged"])
    horizon, batch_size = setting["horizon"], setting["batch_size"]
    floor_ms = 1e-6 * step_bytes(model, prompts, horizon) / copy_rate
    known = candidates(model, prompts, horizon, stopwatch.is_cuda)
    unknown = set(options.only or ()) - set(known)
    if unknown:
        raise ValueError(f"--only must name some of {', '.join(known)}, got {', '.join(unknown)}")
    for name, (run, engine) in known.items():
        if options.only is not None and name not in options.only:
            continue
        row = {**setting, "implementation": name, "floor_ms_per_step": floor_ms}
        try:
            if engine is not None:
                row |= gate(model, prompts, horizon, engine, options.dtype)
            if options.repetitions == 0:
                yield row | {"status": "checked" if engine is not None else "not timed"}
                continue
            row |= measured(run, stopwatch, options.repetitions)
            milliseconds = 1e3 * row["median_s"] / horizon
            row |= {
                "status": "timed",
                "tokens_per_s": batch_size * horizon / row["median_s"],
                "ms_per_step": milliseconds,
                "share_of_floor": floor_ms / milliseconds,
            }
        except (AssertionError, InputError, RuntimeError, ValueError) as error:
            row |= {"status": "refused" if isinstance(error, AssertionError) else "failed", "message": str(error)[:500]}
        if engine is not None:
            engine.release()
        if stopwatch.is_cuda:
            torch.cuda.empty_cache()
        yield row


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=DEFAULT_MODELS, help=f"{', '.join(SHAPES)} or folders")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[16, 32, 128, 512])
    parser.add_argument("--only", nargs="+", help="implementations, by the names in the results")
    parser.add_argument("--horizon", type=int, default=100)
    parser.add_argument("--prompt", type=int, default=200, help="columns of the prompts")
    parser.add_argument("--ragged", action="store_true", help="prompts of different lengths")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--repetitions", type=int, default=5, help="0 checks and takes no time")
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()], help="of torch, in turn")
    parser.add_argument("--out", type=Path, help="folder of rollouts.json; default: bench/results, by the machine")
    parser.add_argument("--commit", help="recorded where there is no git to ask")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: does it run?")
    options = parser.parse_args(argv)
    if options.smoke:
        options.models, options.batch_sizes, options.horizon, options.prompt = ["tiny"], [3], 5, 6
        options.repetitions, options.out = 1, options.out or ROOT / "runs" / "rollouts-smoke"
        if options.out.resolve().is_relative_to(RESULTS):
            parser.error(f"--out must not be under bench/results with --smoke, got {options.out}")
    options.device = "cuda" if torch.cuda.is_available() and not options.smoke else "cpu"
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    return options


def label(model: str) -> str:
    """A shape's name or a folder's, with its parent's for the roles of a pair."""
    folder = Path(model)
    return f"{folder.parent.name}-{folder.name}" if folder.name in ("student", "teacher") else folder.name


def result_name(models: list[str]) -> str:
    """A selection of models has its own file, so that it replaces no full run."""
    return "rollouts.json" if models == DEFAULT_MODELS else f"rollouts-{'-'.join(map(label, models)).lower()}.json"


def main(argv: list[str] | None = None) -> int:
    options, console = parsed(argv), Console()
    stopwatch = Stopwatch(torch.device(options.device))
    copy_rate = Ceilings(stopwatch, is_smoke=options.smoke).copy_gb_per_s()
    machine = machine_record()
    machine["commit"] = machine["commit"] or options.commit
    results = {"is_smoke": options.smoke, "machine": machine, "copy_gb_per_s": copy_rate, "rows": []}
    path = (options.out or RESULTS / machine_folder(machine)) / result_name(options.models)
    for name in options.models:
        model = make_model(name, options.device, DTYPES[options.dtype])
        for threads, batch_size in itertools.product(options.threads, options.batch_sizes):
            torch.set_num_threads(threads)
            setting = {
                "model": label(name),
                "dtype": options.dtype,
                "threads": threads,
                "batch_size": batch_size,
                "prompt": options.prompt,
                "horizon": options.horizon,
                "is_ragged": options.ragged,
            }
            for row in group_rows(options, model, setting, stopwatch, copy_rate):
                results["rows"].append(row)
                write_json(path, results)
                told = row.get("message", row["status"])
                if row["status"] == "timed":
                    told = f"{row['tokens_per_s']:.0f} tokens/s, {row['ms_per_step']:.2f} ms a step"
                console.print(
                    f"{row['model']} B {batch_size}, {threads} threads: {row['implementation']}: {told}",
                    highlight=False,
                    soft_wrap=True,
                )
        del model
    console.print(f"{path} written", soft_wrap=True)
    ours = [row for row in results["rows"] if row["implementation"].startswith("ours")]
    return 0 if all(row["status"] in ("timed", "checked") for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
