"""Rollouts from a vLLM server, for students that a trainer's GPU cannot train and serve at once."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from esr_distill.devices import Devices
from esr_distill.input_error import InputError
from esr_distill.prompts import PromptBatch
from esr_distill.rollout.rollout_batch import RolloutBatch
from esr_distill.rollout.rollout_request import RolloutRequest, check_request
from esr_distill.rollout.vllm_http import VllmHttp
from esr_distill.rollout.vllm_request import check_sampler, row_seed, sampling_fields
from esr_distill.rollout.vllm_weights import VllmWeights
from esr_distill.sampler_settings import SamplerSettings

LOGPROBS_MODES = "raw_logprobs", "processed_logprobs"


@dataclass(frozen=True)
class DrawnRow:
    """One response, EOS included where it ends with one, and the log-prob of each token as the server reports it."""

    token_ids: list[int]
    logprobs: list[float]
    stopped_by_eos: bool


class VllmServerBackend:
    """Draws with a running vLLM server, which gets the model's present weights first (`VllmWeights`).

    Needs vLLM 0.32 or a later one with the same interface, started with VLLM_SERVER_DEV_MODE=1, for this trainer alone: see
    docs/vllm.md. Every answer is checked for what was asked; the server, for the weights that it was given and, after a push,
    for the student's distribution.

    **Tokens differ from those of `InProcessBackend` under the same seed**, because vLLM draws with a generator of its own. Each
    row is a request with its own seed, made from (seed, request id), so its random numbers depend neither on its place nor on
    its neighbours. Its logits may, in their last bits, unless the server runs with VLLM_BATCH_INVARIANT=1. The policy is that
    of the server's dtype and kernels.

    **Log-probs are NaN where the server does not tell.** It reports one number a token, by its --logprobs-mode:
    `raw_logprobs` is at temperature 1 over the whole head, `processed_logprobs` of the distribution that was sampled. The other
    one of `logprobs_B_K` and `sampling_logprobs_B_K` is known too at temperature 1 without filters, or for greedy sampling
    (0); else it is NaN, which no sum can hide. Nothing in the loop reads either: the divergence is computed from hidden
    states.

    Args:
        url: where the server listens, such as `http://host:8000`.
        weights_folder: folder that trainer and server see; each push writes a checkpoint there and removes it.
        weights_folder_on_server: path of that folder on the server; the same by default.
        concurrency: rows that are asked for at a time.
        timeout_s: seconds without an answer after which a call fails: for loading the weights, or for one response.
        devices: the processes that draw together: the main one pushes its weights and asks for the rows of all of them.
    """

    def __init__(
        self,
        url: str,
        weights_folder: str | Path,
        *,
        weights_folder_on_server: str | None = None,
        concurrency: int = 64,
        timeout_s: float = 600.0,
        devices: Devices | None = None,
    ) -> None:
        if concurrency < 1:
            raise InputError(f"rows asked of a vLLM server at a time must be >= 1, got {concurrency!r}")
        self.server, self.concurrency = VllmHttp(url, timeout_s), concurrency
        self.weights = VllmWeights(self.server, weights_folder, weights_folder_on_server)
        self.devices = devices or Devices(torch.device("cpu"))

    def release(self) -> None:
        """Nothing is held here: the memory is the server's."""

    def describe(self, model: PreTrainedModel) -> str:
        """Server, version and model. Raises InputError where no server answers."""
        name, _ = self._model_card()
        version = self.server.get("/version").get("version")
        return f"vLLM {version} at {self.server.url} serving {name}; weights of {type(model).__name__} by {self.weights.folder}"

    def generate(self, model: PreTrainedModel, prompts: PromptBatch, request: RolloutRequest) -> RolloutBatch:
        """One response for every row of `prompts`, on the prompts' device.

        Raises:
            InputError: a request that cannot be met, no server, a refusal, weights that do not arrive, or an answer that is
                not what was asked for.
            FloatingPointError: the model gave NaN or infinity.
        """
        check_request(model, prompts, request)
        width = model.get_output_embeddings().weight.shape[0]
        limit = width if request.vocab_size is None else request.vocab_size
        check_sampler(request.sampler, num_cut=width - limit)
        rows = [
            ids_P[mask_P].tolist()
            for ids_P, mask_P in zip(prompts.prompt_ids_B_P.cpu(), prompts.prompt_mask_B_P.bool().cpu(), strict=True)
        ]
        of_processes = self.devices.gathered(list(zip(rows, prompts.request_ids_B.tolist(), strict=True)))
        everybodys = [row for rows in of_processes for row in rows]
        mode, drawn = self.devices.done_by_main(lambda: self._draw_all(model, everybodys, request))
        first = sum(map(len, of_processes[: self.devices.rank]))
        return collect_rows(prompts, drawn[first : first + len(rows)], request, mode, is_cut=limit < width)

    def _draw_all(
        self, model: PreTrainedModel, rows: list[tuple[list[int], int]], request: RolloutRequest
    ) -> tuple[str, list[DrawnRow]]:
        """The server's logprobs mode, and a response for each (prompt, request id)."""
        width = model.get_output_embeddings().weight.shape[0]
        limit = width if request.vocab_size is None else request.vocab_size
        name, max_tokens = self._model_card()
        longest = max(len(prompt) for prompt, _ in rows)
        if longest + request.horizon > max_tokens:
            raise self.server.error(
                "have room (--max-model-len) for prompt and horizon",
                f"{longest} + {request.horizon} for its {max_tokens} tokens",
            )
        mode = self._logprobs_mode()

        self.weights.push(model)
        asked = sampling_fields(request, width) | {"model": name}
        bodies = [asked | {"prompt": prompt, "seed": row_seed(request.seed, number)} for prompt, number in rows]
        with ThreadPoolExecutor(self.concurrency) as pool:
            drawn = list(pool.map(lambda body: self._draw(body, request, limit), bodies))
        if self.weights.is_unchecked:
            answered = (prompt + row.token_ids for (prompt, _), row in zip(rows, drawn, strict=True))
            self.weights.check_policy(model, name, max(answered, key=len))
        self.weights.check_still_there()
        return mode, drawn

    def _model_card(self) -> tuple[str, int]:
        """Name and context length of the served model, which vLLM lists before its adapters."""
        answer = self.server.get("/v1/models")
        try:
            card = answer["data"][0]
            return card["id"], int(card["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise self.server.error("name a model and its max_model_len under /v1/models", repr(answer)[:300]) from None

    def _logprobs_mode(self) -> str:
        try:
            mode = self.server.get("/server_info?config_format=json")["vllm_config"]["model_config"]["logprobs_mode"]
        except (KeyError, TypeError):
            mode = None
        if mode not in LOGPROBS_MODES:
            raise self.server.error(f"run with --logprobs-mode {' or '.join(LOGPROBS_MODES)}", repr(mode))
        return mode

    def _draw(self, body: dict, request: RolloutRequest, limit: int) -> DrawnRow:
        answer = self.server.post("/v1/completions", body)
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            count = len(choices) if isinstance(choices, list) else choices
            raise self.server.error("answer a prompt with 1 choice", count)
        choice = choices[0]
        token_ids, echoed = choice.get("token_ids"), choice.get("prompt_token_ids")
        logprobs = choice.get("logprobs")
        logprobs = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        if not isinstance(token_ids, list) or echoed != body["prompt"]:
            raise self.server.error(
                "return the token ids of prompt and response (return_token_ids)",
                f"token_ids of type {type(token_ids).__name__} and "
                + ("the prompt" if echoed == body["prompt"] else "another prompt than it was sent"),
            )
        is_known = isinstance(logprobs, list) and all(isinstance(value, (int, float)) for value in logprobs)
        if not is_known or len(logprobs) != len(token_ids):
            raise self.server.error(f"return a log-prob for each of {len(token_ids)} tokens", repr(logprobs)[:100])
        self._check_tokens(token_ids, choice.get("finish_reason"), request, limit)
        if not all(map(math.isfinite, logprobs)):
            raise FloatingPointError(f"rollout: the log-probs of {self.server.url} must be finite, got {logprobs}")
        return DrawnRow(token_ids, logprobs, token_ids[-1] in request.eos_ids)

    def _check_tokens(self, token_ids: list, reason: object, request: RolloutRequest, limit: int) -> None:
        strange = [i for i in token_ids if not isinstance(i, int) or not 0 <= i < limit]
        if strange:
            raise self.server.error(f"draw ids below {limit}, the student's vocabulary", strange[0])
        stops = [place for place, i in enumerate(token_ids, 1) if i in request.eos_ids]
        end = stops[0] if stops else request.horizon
        if len(token_ids) != end:
            raise self.server.error(
                f"end a response at its first EOS or after {request.horizon} tokens",
                f"{len(token_ids)} tokens, finish_reason {reason!r} and EOS at {stops}",
            )


def collect_rows(
    prompts: PromptBatch, rows: list[DrawnRow], request: RolloutRequest, mode: str, is_cut: bool
) -> RolloutBatch:
    """Join prompts and responses, cut to the longest response; for `mode` and `is_cut` see `split_logprobs`."""
    device = prompts.prompt_ids_B_P.device
    lengths_B = torch.tensor([len(row.token_ids) for row in rows], device=device)
    width = int(lengths_B.max())
    after = [width - len(row.token_ids) for row in rows]
    ids = [row.token_ids + [request.pad_id] * count for row, count in zip(rows, after, strict=True)]
    reported = [row.logprobs + [0.0] * count for row, count in zip(rows, after, strict=True)]
    logprobs_B_K, sampling_logprobs_B_K = split_logprobs(
        torch.tensor(reported, dtype=torch.float32, device=device), mode, request.sampler, is_cut
    )
    return RolloutBatch.join(
        prompts,
        torch.tensor(ids, device=device),
        lengths_B=lengths_B,
        stopped_by_eos_B=torch.tensor([row.stopped_by_eos for row in rows], device=device),
        logprobs_B_K=logprobs_B_K,
        sampling_logprobs_B_K=sampling_logprobs_B_K,
    )


def split_logprobs(reported_B_K: Tensor, mode: str, sampler: SamplerSettings, is_cut: bool) -> tuple[Tensor, Tensor]:
    """Log-probs at temperature 1 and those of the sampled distribution, as far as the reported ones tell; else NaN.

    Raw log-probs are of the whole head, so a cut vocabulary (`is_cut`) leaves them unknown by the mass that is cut. Processed
    ones include the cut, and for greedy sampling neither temperature nor filters.
    """
    unknown_B_K = torch.full_like(reported_B_K, torch.nan)
    is_greedy, is_plain = sampler.sampling_temperature == 0, sampler == SamplerSettings()
    if mode == "raw_logprobs":
        logprobs_B_K = unknown_B_K if is_cut else reported_B_K
        sampling_logprobs_B_K = logprobs_B_K if is_plain else unknown_B_K
    else:
        logprobs_B_K = reported_B_K if is_plain or is_greedy else unknown_B_K
        sampling_logprobs_B_K = reported_B_K
    return logprobs_B_K, torch.zeros_like(reported_B_K) if is_greedy else sampling_logprobs_B_K
