"""The trainer's present weights on a vLLM server: through a folder that both machines see."""

import shutil
import time
import uuid
from pathlib import Path, PurePosixPath

import torch
from transformers import PreTrainedModel

from esr_distill.complete_files import complete_folder
from esr_distill.input_error import InputError
from esr_distill.rollout.eval_mode import eval_mode
from esr_distill.rollout.vllm_http import VllmHttp

IDLE_SECONDS = 30.0  # for the server to give up the blocks of its last requests
PAUSE_SECONDS = 0.1
CHECKED_TOKENS = 64
MAX_DIFFERENCE = 0.5  # nats a token: far above rounding and quantisation, far below a layer that is missing
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of an element in bytes


class VllmWeights:
    """Keeps the weights of a vLLM server equal to those of a model.

    A push writes a checkpoint of safetensors under a name of its own, whole before it gets that name, lets all workers of the
    server load it in place (`/collective_rpc` with `reload_weights`), empties the prefix cache, which holds keys and values of
    the old weights, gives the server the checkpoint's name as its weight version, and removes the checkpoint. It costs a write
    and a read of all weights, and both sides wait.

    `is_unchecked` after a push, until `check_policy` has found the model's distribution on the server.

    Args:
        server: the server.
        folder: where checkpoints are written. On one machine a folder in memory (tmpfs) saves the disk.
        folder_on_server: the same folder as the server sees it; the same path by default.
    """

    def __init__(self, server: VllmHttp, folder: str | Path, folder_on_server: str | None = None) -> None:
        self.server, self.folder = server, Path(folder).absolute()
        self.folder_on_server = PurePosixPath(folder_on_server or self.folder.as_posix())
        if not self.folder_on_server.is_absolute():
            raise InputError(
                f"the weights' folder on the vLLM server must be an absolute path, got {folder_on_server!r}"
            )
        self.run, self.pushes = f"esr-{uuid.uuid4().hex[:12]}", 0
        self.forget()

    def forget(self) -> None:
        """The next push happens whatever the server holds."""
        self.version: str | None = None
        self.pushed: list | None = None
        self.is_unchecked = True

    def push(self, model: PreTrainedModel) -> None:
        """Bring the weights to the server, unless it holds them.

        Raises:
            InputError: the model has adapters, or the server does not load the weights.
        """
        present = fingerprint(model)
        if present == self.pushed and self._version_there() == self.version:
            return
        if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
            raise InputError(
                "a model whose rollouts a vLLM server draws must be a transformers model without adapters, "
                f"got {type(model).__name__}{' with adapters' if isinstance(model, PreTrainedModel) else ''}"
            )
        self.forget()  # a push that fails half-way leaves neither the old weights nor the new ones
        self.pushes += 1
        version = f"{self.run}-{self.pushes:06d}"
        try:
            with complete_folder(self.folder / version) as partial:
                model.save_pretrained(partial)
            self._load(version)
        finally:
            shutil.rmtree(self.folder / version, ignore_errors=True)
        self.version, self.pushed = version, present

    def check_still_there(self) -> None:
        """Versions are set once, so one that is still there was there all the time. Raises InputError where another is."""
        version = self._version_there()
        if version != self.version:
            raise self.server.error(f"hold the weights {self.version!r} while it draws", f"{version!r}")

    def check_policy(self, model: PreTrainedModel, served_model: str, token_ids: list[int]) -> None:
        """Compare the server's log-probs of a sequence with the model's own, after a push.

        vLLM only warns in its log where a checkpoint lacks weights of the model that it serves, and draws with its old ones.

        Raises:
            InputError: they differ by more than any rounding.
        """
        token_ids = token_ids[:CHECKED_TOKENS]
        body = {"model": served_model, "prompt": token_ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}
        answer = self.server.post("/v1/completions", body)
        try:
            told = answer["choices"][0]["prompt_logprobs"][1:]
            theirs_T = torch.tensor([told[i][str(token_id)]["logprob"] for i, token_id in enumerate(token_ids[1:])])
        except (KeyError, IndexError, TypeError, ValueError):
            raise self.server.error("return log-probs of a prompt (prompt_logprobs)", repr(answer)[:300]) from None
        ids_1_T = torch.tensor([token_ids], device=model.device)
        with eval_mode(model), torch.no_grad():
            logprobs_T_V = model(input_ids=ids_1_T).logits[0, :-1].float().log_softmax(-1)
        ours_T = logprobs_T_V.gather(-1, ids_1_T[0, 1:, None])[:, 0].cpu()
        difference = (ours_T - theirs_T).abs().mean().item()
        if not difference <= MAX_DIFFERENCE:
            self.forget()
            raise self.server.error(
                "have the student's distribution after loading its weights",
                f"log-probs that are off by {difference:.2f} nats a token; its log may name weights that were not loaded",
            )
        self.is_unchecked = False

    def _version_there(self) -> object:
        """The version of the last push; that of others if they pushed, or vLLM's first one where it was started anew."""
        return self.server.get("/weight_info").get("weight_version")

    def _load(self, version: str) -> None:
        # A path that was never read before: neither the server nor a network file system can have an older file of that name.
        path = str(self.folder_on_server / version)
        self.server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
        deadline = time.monotonic() + IDLE_SECONDS
        while self.server.post("/reset_prefix_cache?reset_external=true", {}).get("success") is not True:
            if time.monotonic() > deadline:
                raise self.server.error("serve nobody else while its weights change", "a prefix cache in use")
            time.sleep(PAUSE_SECONDS)
        self.server.post("/update_weight_version", {"new_version": version})


def fingerprint(model: PreTrainedModel) -> list[tuple[int, int]]:
    """For each tensor that is saved its version counter and the sum of its bits, read as integers.

    The counters alone are not enough: torch's fused optimizers and writes through `.data` do not count. One read of the
    weights is little beside writing them to a file.
    """
    return [
        (tensor._version, tensor.detach().view(BITS[tensor.element_size()]).sum().item())
        for tensor in model.state_dict(keep_vars=True).values()
    ]
