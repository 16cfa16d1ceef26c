"""JSON to and from a vLLM server, with every way in which that can fail as one kind of error."""

import http.client
import json
import urllib.error
import urllib.request

from esr_distill.input_error import InputError


class VllmHttp:
    """A server's address and how long it may take.

    Args:
        url: where the server listens, such as `http://host:8000`, without `/v1`.
        timeout_s: seconds without an answer after which a call fails.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"the URL of a vLLM server must begin with http:// or https://, got {url!r}")
        if not timeout_s > 0:
            raise InputError(f"the time limit of a vLLM server must be > 0 seconds, got {timeout_s!r}")
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        # The environment's proxies are for the world outside, and would not find a machine of the cluster.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> dict:
        """The server's answer. Raises InputError where there is none, or a refusal."""
        return self._send("GET", path, None)

    def post(self, path: str, body: dict) -> dict:
        """The server's answer to `body`. Raises InputError where there is none, or a refusal."""
        return self._send("POST", path, json.dumps(body).encode())

    def error(self, must: str, got: object) -> InputError:
        return InputError(f"the vLLM server at {self.url} must {must}, got {got}")

    def _send(self, method: str, path: str, data: bytes | None) -> dict:
        what = f"{method} {path}"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        try:
            with self.opener.open(request, timeout=self.timeout_s) as response:
                text = response.read()
        except urllib.error.HTTPError as refusal:
            must = f"accept {what}"
            if refusal.code == 404 and not path.startswith("/v1/"):
                must += ", which vLLM 0.32 does when it was started with VLLM_SERVER_DEV_MODE=1"
            raise self.error(must, f"status {refusal.code} ({_words(refusal)})") from None
        except (OSError, http.client.HTTPException) as error:
            raise self.error(
                f"answer {what} within {self.timeout_s:g} s", f"{type(error).__name__}: {error}"
            ) from error
        try:
            answer = json.loads(text or b"{}")
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self.error(f"answer {what} with a JSON object", repr(text[:60]))
        return answer


def _words(refusal: urllib.error.HTTPError) -> str:
    """What the server says about it: {"error": {"message": ...}}, {"error": ...} or {"detail": ...}, else the whole text."""
    try:
        text = refusal.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return refusal.reason
    try:
        said = json.loads(text)
        said = said.get("error", said.get("detail", text))
        said = said.get("message", said) if isinstance(said, dict) else said
    except (ValueError, AttributeError):
        said = text
    return str(said or refusal.reason)[:300]
