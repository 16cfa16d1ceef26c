"""The divergence of each kept position, with the options of a run."""

from torch import Tensor

from esr_distill.devices.sharding import whole_head
from esr_distill.distill_loss import PLAIN_DIVERGENCES
from esr_distill.hidden_states import output_head
from esr_distill.prefix_positions import PrefixPositions, gather_rows
from esr_distill.training_run import TrainingRun
from esr_kernels import Divergence, DivergenceOutput, linear_divergence


def score_positions(
    run: TrainingRun, student_hidden_B_T_D: Tensor, teacher_hidden_B_T_E: Tensor, positions: PrefixPositions
) -> DivergenceOutput:
    """`linear_divergence` of the rows that predict these tokens; no other row meets the vocabulary. The gated divergence is added
    where the config has one."""
    loss = run.config.loss
    student_hidden_N_D = gather_rows(student_hidden_B_T_D, positions)
    teacher_hidden_N_E = gather_rows(teacher_hidden_B_T_E, positions)

    student_head, teacher_head = (whole_head(output_head(model)) for model in (run.student, run.teacher))

    def scored(divergence: Divergence, rows: Tensor | slice) -> DivergenceOutput:
        return linear_divergence(
            student_hidden_N_D[rows],
            student_head,
            teacher_hidden_N_E[rows],
            teacher_head,
            divergence,
            loss_temperature=loss.loss_temperature,
            token_ids_N=positions.token_ids_N[rows],
            stop_ids=run.stop.eos_ids if loss.merge_stop_ids else (),
            vocab_size=loss.vocab_size,
            impl=run.divergence_impl,
        )

    output = scored(run.divergence, slice(None))
    if loss.gated_divergence is None:
        return output
    rows = (output.teacher_entropy_N > loss.gate_entropy).nonzero().squeeze(1)
    gated = scored(PLAIN_DIVERGENCES[loss.gated_divergence](), rows)
    return output._replace(
        divergence_N=output.divergence_N.index_add(0, rows, loss.gate_coefficient * gated.divergence_N)
    )
