"""Rollouts from the trainer's own weights: one prefill, then one step a token, on CUDA as replays of a captured graph."""

from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from esr_distill.prompts import PromptBatch
from esr_distill.rollout.captured_for import autocast_of, identity
from esr_distill.rollout.cuda_graph import ActivePoll, capture_step
from esr_distill.rollout.decode_attention import decode_attention, decode_attention_of
from esr_distill.rollout.decode_masks import make_decode_masks
from esr_distill.rollout.decode_rows import DecodeRows, DecodeStep, select_rows, write_rows
from esr_distill.rollout.eval_mode import eval_mode
from esr_distill.rollout.prefill import prefill
from esr_distill.rollout.rollout_batch import RolloutBatch
from esr_distill.rollout.rollout_request import RolloutRequest, check_request
from esr_distill.rollout.static_cache import RolloutCache
from esr_kernels import Impl, SamplerState, is_native_sampler_built, sample_tokens

STEPS_BETWEEN_POLLS = 16  # of a GPU's number of running rows
STEPS_PER_SEGMENT, STEPS_PER_SEGMENT_ON_GPU = 32, 128
PROMPT_COLUMNS = 64  # on a GPU prompts end at a multiple of this, so that few widths need a graph of their own


def choose_sampler_impl(device: torch.device) -> Impl:
    """The native sampler where it is built for the device, else plain PyTorch: both draw the same tokens."""
    return Impl.FUSED if is_native_sampler_built(device) else Impl.REFERENCE


class InProcessBackend:
    """Owns the KV cache, the states of rows and the captured graphs, and uses them again from call to call.

    Weights are read where the trainer has them, adapters included, so nothing is synchronised: an optimizer step changes them in
    place and graphs stay true. Graphs are made anew when shapes change, or a weight lies elsewhere, and that is printed.

    A long horizon is decoded in segments. At the end of each, rows that have finished leave the batch: on a CPU when a quarter
    has, on a GPU when half has, so that few batch sizes need a graph.

    Args:
        use_graphs: on a CUDA device, replay CUDA graphs; otherwise launch every kernel of every step.
        compile_backend: torch.compile the step with this backend ("inductor"), None leaves it eager.
        steps_per_segment: tokens between two looks at which rows have finished; 32 on a CPU, 128 on a GPU if None.
        console: where rebuilt graphs are reported.
        capture: makes of a step and a memory pool the call that replays it; tests put their own in its place.
    """

    def __init__(
        self,
        *,
        use_graphs: bool = True,
        compile_backend: str | None = None,
        steps_per_segment: int | None = None,
        console: Console | None = None,
        capture: Callable[[DecodeStep, tuple[int, int] | None], Callable[[], None]] | None = None,
    ) -> None:
        self.use_graphs, self.compile_backend = use_graphs, compile_backend
        self.steps_per_segment, self.console = steps_per_segment, console
        self.capture = capture or capture_step
        self.release()

    def release(self) -> None:
        """Free cache, states and graphs."""
        self.cache: RolloutCache | None = None
        self.rows: dict[int, DecodeRows] = {}
        self.steps: dict[tuple[int, int, int], tuple[DecodeStep, Callable[[], None]]] = {}
        self.made_for: tuple | None = None
        self.compiled: tuple[PreTrainedModel, Callable] | None = None
        self.pool: tuple[int, int] | None = None

    def describe(self, model: PreTrainedModel) -> str:
        device = next(model.parameters()).device
        sampler = choose_sampler_impl(device)
        how = "native" if sampler is Impl.FUSED else f"plain PyTorch: the native sampler is not built for {device.type}"
        graphs = "CUDA graphs" if self._has_graphs(device) else "no graphs"
        return (
            f"rollouts: inprocess, prefill {model.config._attn_implementation}, decode {decode_attention(model)}, {graphs}; "
            f"sampler: {sampler.value} ({how})"
        )

    def _has_graphs(self, device: torch.device) -> bool:
        return self.use_graphs and (device.type == "cuda" or self.capture is not capture_step)

    @torch.no_grad()
    def generate(self, model: PreTrainedModel, prompts: PromptBatch, request: RolloutRequest) -> RolloutBatch:
        """One response for each row. Rows are independent: their tokens depend on (seed, request id, prompt) and the weights.

        Raises:
            InputError: a request that cannot be met, or a model that does not decode like this.
            FloatingPointError: the model gave NaN or infinity.
        """
        check_request(model, prompts, request)
        with eval_mode(model):
            state = self._decode(model, prompts, request)
        if state.invalid_B.any():
            self.release()  # NaN in a masked column would reach later rollouts
            raise FloatingPointError(
                f"rollout: the logits must be finite, got NaN or infinity in {int(state.invalid_B.sum())} rows"
            )
        return collect_rollouts(prompts, state)

    def _decode(self, model: PreTrainedModel, prompts: PromptBatch, request: RolloutRequest) -> SamplerState:
        device, num_samples = prompts.prompt_ids_B_P.device, prompts.samples_per_prompt
        logits_B_V, prefilled = prefill(model, prompts)
        whole = new_state(prompts, request)
        impl = choose_sampler_impl(device)
        sample_tokens(logits_B_V[:, : request.vocab_size], whole, impl=impl)
        if request.horizon == 1:
            return whole

        batch_size, width = prompts.prompt_mask_B_P.shape
        column = -(-width // PROMPT_COLUMNS) * PROMPT_COLUMNS if self._has_graphs(device) else width
        prompt_mask_B_C = torch.nn.functional.pad(prompts.prompt_mask_B_P, (column - width, 0), value=False)
        with decode_attention_of(model):
            self._prepare(model, prefilled, batch_size, padded_columns(column + request.horizon - 1), request)
            self.cache.fill(prefilled, column, num_samples)
            del prefilled
            order_B, state = torch.arange(batch_size, device=device), whole
            position_B_1 = prompts.prompt_mask_B_P.sum(-1, keepdim=True)
            usual_steps = STEPS_PER_SEGMENT_ON_GPU if device.type == "cuda" else STEPS_PER_SEGMENT
            end = column + request.horizon - 1  # the last token that is drawn is never fed
            while column < end:
                kept_B = self._rows_to_keep(state, order_B)
                if len(kept_B) == 0:
                    break
                if len(kept_B) < len(order_B):
                    if state is not whole:
                        write_rows(whole, order_B, state)
                    self.cache.move_rows(kept_B, column)
                    order_B, state, position_B_1 = order_B[kept_B], select_rows(state, kept_B), position_B_1[kept_B]
                num_steps = min(self.steps_per_segment or usual_steps, end - column)
                rows = self._rows(state, position_B_1)
                self._segment(model, rows, prompt_mask_B_C[order_B], column, num_steps, request, impl)
                state, position_B_1, column = rows.state, rows.position_B_1, column + num_steps
            if state is not whole:
                write_rows(whole, order_B, state)
        return whole

    def _rows_to_keep(self, state: SamplerState, order_B: Tensor) -> Tensor:
        """Places of the rows that go on, running ones first; all rows where too few have finished, none where all have."""
        num_rows, active = len(order_B), int(state.active)
        if active == 0:
            return order_B[:0]
        if self._has_graphs(order_B.device):
            count = num_rows
            while count % 2 == 0 and count // 2 >= active:
                count //= 2
        else:
            count = active if active <= 0.75 * num_rows else num_rows
        return (
            torch.arange(num_rows, device=order_B.device)
            if count == num_rows
            else state.finished_B.byte().argsort(stable=True)[:count]
        )

    def _prepare(
        self,
        model: PreTrainedModel,
        prefilled: Sequence[tuple[Tensor, Tensor]],
        batch_size: int,
        num_columns: int,
        request: RolloutRequest,
    ) -> None:
        """Cache and graphs for these shapes: those of the last call where they serve."""
        made_for = (
            identity(model),
            request.horizon,
            request.eos_ids,
            request.pad_id,
            request.vocab_size,
            autocast_of(model),
        )
        has_cache = self.cache is not None and self.cache.holds(prefilled, batch_size, num_columns)
        if has_cache and made_for == self.made_for:
            return
        if self.steps and self.console is not None:
            why = "shapes or weights' places changed" if has_cache else "a larger cache is needed"
            self.console.print(f"rollout: {len(self.steps)} captured steps are dropped: {why}")
        self.rows, self.steps = {}, {}
        if not has_cache:
            self.cache = None  # before the new one is there
            self.cache = RolloutCache.allocate(prefilled, batch_size, num_columns)
        self.made_for = made_for

    def _rows(self, state: SamplerState, position_B_1: Tensor) -> DecodeRows:
        """The rows in memory that is kept for their number."""
        count = len(position_B_1)
        if count not in self.rows:
            every = torch.arange(count, device=position_B_1.device)
            self.rows[count] = DecodeRows(select_rows(state, every), position_B_1.clone(), self.cache.rows(count))
        elif self.rows[count].state is not state:
            self.rows[count].copy_from(state, position_B_1)
        return self.rows[count]

    def _segment(
        self,
        model: PreTrainedModel,
        rows: DecodeRows,
        prompt_mask_B_C: Tensor,
        column: int,
        num_steps: int,
        request: RolloutRequest,
        impl: Impl,
    ) -> None:
        """`num_steps` tokens, the first of which is written to `column`; fewer where all rows finish."""
        has_graphs = self._has_graphs(prompt_mask_B_C.device)
        visible = padded_columns(column + num_steps) if has_graphs else column + num_steps
        masks = make_decode_masks(
            model, prompt_mask_B_C, rows.cache, first_column=column, num_steps=num_steps, visible=visible
        )
        if not has_graphs:
            step = DecodeStep(self._forward(model), rows, masks, visible, vocab_size=request.vocab_size, impl=impl)
            step.start(masks, column)
            self._run_eagerly(step, column, num_steps)
            return
        key = len(prompt_mask_B_C), num_steps, visible
        is_new = key not in self.steps
        if is_new:
            step = DecodeStep(self._forward(model), rows, masks, visible, vocab_size=request.vocab_size, impl=impl)
            rows.cache.show(visible)
            step.start(masks, column)
            self.pool = self.pool or (torch.cuda.graph_pool_handle() if self.capture is capture_step else None)
            self.steps[key] = step, self.capture(step, self.pool)
            if self.console is not None:
                self.console.print(f"rollout: step captured for {key[0]} rows and {visible} columns", highlight=False)
        step, replay = self.steps[key]
        step.start(masks, column)
        poll = ActivePoll(rows.state.active) if rows.state.active.is_cuda else None
        for done in range(num_steps):
            if poll is not None and done % STEPS_BETWEEN_POLLS == 0 and poll.all_finished():
                break
            replay()

    def _run_eagerly(self, step: DecodeStep, column: int, num_steps: int) -> None:
        """Off a GPU a step sees no more columns than are written, and every step is asked whether it is the last."""
        poll = ActivePoll(step.rows.state.active) if step.step_1.is_cuda else None
        for done in range(num_steps):
            if poll is None:
                # a compiled step has the shapes that it was compiled for
                step.visible = column + done + 1 if self.compile_backend is None else step.visible
                if step.rows.state.active.item() == 0:
                    break
            elif done % STEPS_BETWEEN_POLLS == 0 and poll.all_finished():
                break
            step.rows.cache.show(step.visible)
            step()

    def _forward(self, model: PreTrainedModel) -> Callable:
        if self.compile_backend is None:
            return model
        if self.compiled is None or self.compiled[0] is not model:
            # on a CPU half of a small model's step is Python between the kernels
            is_cpu = next(model.parameters()).device.type == "cpu"
            options = {"cpp_wrapper": True} if is_cpu and self.compile_backend == "inductor" else None
            self.compiled = model, torch.compile(model, backend=self.compile_backend, options=options)
        return self.compiled[1]


def padded_columns(count: int) -> int:
    """Masks whose rows are whole vectors spare attention a copy of them."""
    return -(-count // 8) * 8


def new_state(prompts: PromptBatch, request: RolloutRequest) -> SamplerState:
    return SamplerState.create(
        len(prompts.request_ids_B),
        request.horizon,
        eos_ids=request.eos_ids,
        sampling_temperature=request.sampler.sampling_temperature,
        top_k=request.sampler.top_k,
        top_p=request.sampler.top_p,
        min_p=request.sampler.min_p,
        seed=request.seed,
        request_ids=prompts.request_ids_B,
        pad_id=request.pad_id,
        device=prompts.prompt_ids_B_P.device,
    )


def collect_rollouts(prompts: PromptBatch, state: SamplerState) -> RolloutBatch:
    return RolloutBatch.join(
        prompts,
        state.token_ids_B_K,
        lengths_B=state.lengths_B,
        stopped_by_eos_B=state.stopped_by_eos_B,
        logprobs_B_K=state.logprobs_B_K,
        sampling_logprobs_B_K=state.sampling_logprobs_B_K,
    )
