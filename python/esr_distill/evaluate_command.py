"""`esr-distill eval`: accuracy of one model on a file of problems, printed and written as JSON."""

from pathlib import Path

from esr_distill.complete_files import write_json
from esr_distill.config import EvalConfig, RolloutConfig
from esr_distill.evaluate import Evaluation
from esr_distill.models import choose_attention, choose_device, find_stop_ids, load_model, load_tokenizer
from esr_distill.progress import make_console
from esr_distill.prompts import read_prompt_file
from esr_distill.rollout.choose_backend import make_backend


def evaluate_model(config: EvalConfig) -> int:
    """Print the accuracy; write it to `config.output` if that is set. Returns the exit status."""
    console = make_console()
    records = read_prompt_file(config.prompts, "prompts")
    device = choose_device(config.device)
    tokenizer = load_tokenizer(config.model, "model")
    attention = choose_attention(config.attn_implementation, device, is_in_16_bits=config.dtype == "bfloat16")
    model = load_model(config.model, "model", dtype=config.dtype, attn_implementation=attention, device=device)
    evaluation = Evaluation.prepare(
        records,
        tokenizer,
        config.data,
        config.evaluation,
        stop=find_stop_ids(tokenizer, model),
        model=model,
        device=device,
        rollouts=make_backend(RolloutConfig(backend=config.backend)),
        group="",
    )
    result = evaluation.accuracy(model, console)
    console.print(
        f"{config.model}: accuracy {100 * result.accuracy:.1f} +- {100 * result.standard_error:.1f} % (n {result.count}), "
        f"mean length {result.mean_length:.1f} tokens, finished {100 * result.finished:.0f} %"
    )
    if config.output is not None:
        write_json(Path(config.output), {"model": config.model, "prompts": config.prompts, **vars(result)})
    return 0
