// The sampler's two halves behind one set of arguments. No torch header: the callers bring tensors as pointers.
#pragma once

#include <cstdint>

namespace esr {

enum class LogitDtype { float32, bfloat16, float16 };

// What `sample_tokens` reads and writes; B rows, V logits each, K slots. All arrays are contiguous but the logits, whose
// rows are `row_stride` elements apart. Names and meanings as in SamplerState (esr_kernels/sample_tokens/state.py).
struct SamplerArguments {
  const void* logits_B_V;
  LogitDtype dtype;
  int64_t row_stride;
  int batch_size, vocab_size, horizon;

  int64_t* token_ids_B_K;
  float* logprobs_B_K;
  float* sampling_logprobs_B_K;
  int64_t* lengths_B;
  bool* finished_B;
  bool* stopped_by_eos_B;
  int64_t* next_ids_B;
  int64_t* active;
  bool* invalid_B;

  const double* sampling_temperature_B;
  const int64_t* top_k_B;
  const double* top_p_B;
  const double* min_p_B;
  const int64_t* seed_B;
  const int64_t* request_ids_B;
  const int64_t* eos_ids_E;
  int num_eos_ids;
  int64_t pad_id;
};

// Rows [first, last), one after the other on the calling thread; different rows may run on different threads.
void sample_rows_on_cpu(const SamplerArguments& arguments, int64_t first, int64_t last);

// How a row is spread over a device. Zeros: chosen from the sizes and the device.
struct LaunchPlan {
  int blocks_per_row = 0;     // 1, 2, 4 or 8; more than 1 is a cluster, which needs compute capability 9.0
  int threads_per_block = 0;  // a multiple of 32
  int row_in_shared_memory = -1;  // 1 or 0: read a row from memory once, or once per pass
};

// Enqueues one kernel on a CUDA stream (cudaStream_t) of the current device; never waits. Returns a cudaError_t.
int launch_sample_tokens(const SamplerArguments& arguments, void* stream, LaunchPlan plan = {});
const char* describe_cuda_error(int error);

}  // namespace esr
