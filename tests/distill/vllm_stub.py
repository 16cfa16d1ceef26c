"""The part of vLLM's HTTP interface that the backend uses, in a thread: it loads checkpoints and draws from their model.

Written from vLLM's documentation and source, without its code. It shares nothing with the backend but the wire.
"""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import torch
from tiny_models import make_model
from transformers import AutoModelForCausalLM

OWN_EOS = 2  # of the server's files; ends a response unless ignore_eos is sent


class VllmStub:
    """Starts with other weights than any student. `calls`, `loaded` and `drawn` are what it was asked, read and answered.

    Attributes:
        mode: --logprobs-mode.
        max_model_len: --max-model-len.
        script: None draws; else the response ids to give, by prompt, with minus a token's place as its log-prob.
        tamper: changes an answer by path before it is sent: (path, answer) -> answer; bytes are sent as they are.
        refuse: path to (status, answer) of a refusal.
        drop: paths at which the connection ends without an answer.
        delay_s: before each response.
        busy: so many times the prefix cache is in use when it is to be emptied.
        folders: the start of a path as the server sees it, and as this test does.
        dtype: of the served weights.
        not_loaded: names of weights that keep their old values, as where a checkpoint lacks them.
    """

    def __init__(self, mode: str = "raw_logprobs", max_model_len: int = 128, script: dict | None = None) -> None:
        self.mode, self.max_model_len, self.script = mode, max_model_len, script
        self.tamper: Callable[[str, dict], dict | bytes] = lambda path, answer: answer
        self.refuse: dict[str, tuple[int, dict | str]] = {}
        self.drop: set[str] = set()
        self.delay_s, self.busy, self.folders = 0.0, 0, ("", "")
        self.dtype, self.not_loaded = torch.float32, ()
        self.model, self.version, self.has_old_cache = make_model(99), "default", False
        self.calls: list[tuple[str, dict]] = []
        self.drawn: list[tuple[list[int], list[int]]] = []
        self.loaded: list[str] = []
        self.in_flight, self.most_in_flight, self.lock = 0, 0, threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def completions(self) -> list[dict]:
        """Those that draw; one with prompt_logprobs asks for a look at the weights."""
        return [body for path, body in self.calls if path == "/v1/completions" and "prompt_logprobs" not in body]

    def answer(self, path: str, body: dict) -> tuple[int, dict | str]:
        if path in self.refuse:
            return self.refuse[path]
        if path == "/v1/models":
            card = {"id": "student-at-start", "object": "model", "max_model_len": self.max_model_len}
            return 200, {"object": "list", "data": [card, {"id": "an-adapter", "max_model_len": None}]}
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path == "/server_info":
            return 200, {"vllm_config": {"model_config": {"logprobs_mode": self.mode}}, "vllm_env": {}}
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return 200, {"success": True, "new_version": self.version}
        if path == "/reset_prefix_cache":
            self.busy -= 1
            self.has_old_cache = self.has_old_cache and self.busy >= 0
            return 200, {"success": self.busy < 0}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.load(body["kwargs"]["weights_path"])
            return 200, {"results": [None, None]}
        assert path == "/v1/completions", path
        assert not self.has_old_cache, "keys and values of old weights would be used"
        return 200, self.score(body) if "prompt_logprobs" in body else self.complete(body)

    def load(self, path: str) -> None:
        self.loaded.append(path)
        path = path.replace(*self.folders, 1) if self.folders[0] else path
        model = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype, local_files_only=True).eval()
        old_weights = self.model.state_dict()
        model.load_state_dict({name: old_weights[name] for name in self.not_loaded}, strict=False)
        self.model, self.has_old_cache = model, True

    def complete(self, body: dict) -> dict:
        with self.lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        time.sleep(self.delay_s)
        prompt = body["prompt"]
        if self.script is None:
            token_ids, logprobs = self.draw(body)
        else:
            token_ids = self.script[tuple(prompt)]
            logprobs = [-float(place) for place in range(1, len(token_ids) + 1)]
        with self.lock:
            self.in_flight -= 1
            self.drawn.append((prompt, token_ids))
        ends = set(body["stop_token_ids"]) | (set() if body["ignore_eos"] else {OWN_EOS})
        choice = {
            "index": 0,
            "text": "",
            "finish_reason": "stop" if token_ids and token_ids[-1] in ends else "length",
            "logprobs": {"token_logprobs": logprobs, "tokens": ["?"] * len(token_ids)},
            "token_ids": token_ids if body["return_token_ids"] else None,
            "prompt_token_ids": prompt if body["return_token_ids"] else None,
        }
        return {"id": "cmpl-1", "object": "text_completion", "model": "student-at-start", "choices": [choice]}

    @torch.no_grad()
    def score(self, body: dict) -> dict:
        ids = body["prompt"]
        logprobs_T_V = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        told = [{str(i): {"logprob": logprobs_T_V[t, i].item(), "rank": 1}} for t, i in enumerate(ids[1:])]
        return {"choices": [{"index": 0, "text": "", "prompt_logprobs": [None, *told]}]}

    @torch.no_grad()
    def draw(self, body: dict) -> tuple[list[int], list[float]]:
        generator = torch.Generator().manual_seed(body["seed"])
        ends = set(body["stop_token_ids"]) | (set() if body["ignore_eos"] else {OWN_EOS})
        ids, logprobs = list(body["prompt"]), []
        for _ in range(body["max_tokens"]):
            logits_V = self.model(torch.tensor([ids])).logits[0, -1].double()
            raw_V, processed_V = logits_V.log_softmax(-1), self.process(logits_V, body).log_softmax(-1)
            chosen = int(processed_V.argmax())
            if body["temperature"] > 0:
                chosen = int(torch.multinomial(processed_V.exp(), 1, generator=generator))
            reported_V = raw_V if self.mode == "raw_logprobs" else processed_V
            ids.append(chosen)
            logprobs.append(reported_V[chosen].item())
            if chosen in ends:
                break
        return ids[len(body["prompt"]) :], logprobs

    @staticmethod
    def process(logits_V: torch.Tensor, body: dict) -> torch.Tensor:
        """vLLM's order: bias, temperature, min-p, top-k, top-p; greedy sampling has the bias alone."""
        logits_V = logits_V.clone()
        for token_id, bias in (body["logit_bias"] or {}).items():
            logits_V[int(token_id)] += bias
        if body["temperature"] == 0:
            return logits_V
        logits_V /= body["temperature"]
        logits_V[logits_V.softmax(-1) < body["min_p"] * logits_V.softmax(-1).max()] = -torch.inf
        if body["top_k"] > 0:
            logits_V[logits_V < logits_V.topk(body["top_k"]).values[-1]] = -torch.inf
        if body["top_p"] < 1:
            sorted_V, order_V = logits_V.softmax(-1).sort(descending=True)
            logits_V[order_V[sorted_V.cumsum(-1) - sorted_V >= body["top_p"]]] = -torch.inf
        return logits_V

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply({})

            def do_POST(self) -> None:
                self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def reply(self, body: dict) -> None:
                path = urlsplit(self.path).path
                with stub.lock:
                    stub.calls.append((path, body))
                if path in stub.drop:
                    return
                try:
                    status, answer = stub.answer(path, body)
                except Exception as error:  # as vLLM does: the engine's error in words
                    status, answer = 500, {"error": {"message": f"{type(error).__name__}: {error}", "code": 500}}
                answer = stub.tamper(path, answer) if status == 200 else answer
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except ConnectionError:
                    pass  # the client had waited long enough

            def log_message(self, *_) -> None:
                pass

        return Handler
