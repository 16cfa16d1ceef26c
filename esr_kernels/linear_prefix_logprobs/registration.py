"""`linear_prefix_logprobs` as torch.library ops on the compacted rows; see `define_linear_op`."""

from esr_kernels.linear_prefix_logprobs.rows import TokenLogprobRows, TokenLogprobs
from esr_kernels.output_projection.registration import define_linear_op

NAME = "linear_prefix_logprobs"

define_linear_op(NAME, "Tensor token_ids, float temperature", len(TokenLogprobs._fields), TokenLogprobRows)
