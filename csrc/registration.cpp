// esr_kernels::sample_tokens as a torch operator: checks tensors, hands pointers to the sampler. The only file with torch
// headers, all of them of the stable ABI: what is built with one torch loads in the later ones too.
//
// Compiled once for each half: ESR_SAMPLER_CPU defines the operator, ESR_SAMPLER_CUDA adds to it.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "sampler/sampler.h"

#if defined(ESR_SAMPLER_CUDA)
// Of libtorch_cuda; a torch without CUDA declares it nowhere.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Takes the arguments of a call from its stack, in the order of the schema.
class CallArguments {
 public:
  CallArguments(StableIValue* stack, uint64_t count) : stack_(stack), count_(count) {}

  template <class T>
  T next() {
    STD_TORCH_CHECK(taken_ < count_, "sample_tokens: the schema has ", count_, " arguments, the kernel reads more");
    return torch::stable::detail::to<T>(stack_[taken_++]);
  }

  // A contiguous tensor of that many elements of type T on the device of the logits; kept until the call ends.
  template <class T>
  T* next(const char* name, ScalarType dtype, int64_t numel, const Tensor& logits) {
    Tensor& tensor = tensors_[taken_] = next<Tensor>();
    STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.numel() == numel && tensor.is_contiguous() &&
                        tensor.device() == logits.device(),
                    "sample_tokens: ", name, " must be contiguous, on the device of logits_B_V, with ", numel,
                    " elements of the dtype that SamplerState.create gives it");
    return static_cast<T*>(tensor.data_ptr());
  }

 private:
  StableIValue* stack_;
  uint64_t count_, taken_ = 0;
  Tensor tensors_[24];
};

esr::LogitDtype dtype_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return esr::LogitDtype::float32;
    case ScalarType::BFloat16:
      return esr::LogitDtype::bfloat16;
    case ScalarType::Half:
      return esr::LogitDtype::float16;
    default:
      STD_TORCH_CHECK(false, "sample_tokens: logits_B_V must have dtype float32, bfloat16 or float16");
  }
}

int checked_int(const char* name, int64_t value) {
  STD_TORCH_CHECK(0 <= value && value < (int64_t{1} << 30), "sample_tokens: ", name, " must be below 2^30, got ", value);
  return static_cast<int>(value);
}

// Calls run(arguments, logits) with the arguments of one call.
template <class Run>
void call(StableIValue* stack, uint64_t count, Run run) {
  CallArguments call(stack, count);
  esr::SamplerArguments a{};
  const Tensor logits = call.next<Tensor>();
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                  "sample_tokens: logits_B_V must have two dimensions (B, V) and adjacent logits in a row");
  const int64_t B = logits.size(0);
  a.logits_B_V = logits.data_ptr();
  a.dtype = dtype_of(logits);
  a.row_stride = logits.stride(0);
  a.batch_size = checked_int("B", B);
  a.vocab_size = checked_int("V", logits.size(1));

  const Tensor token_ids = call.next<Tensor>();
  STD_TORCH_CHECK(token_ids.dim() == 2 && token_ids.size(0) == B && token_ids.scalar_type() == ScalarType::Long &&
                      token_ids.is_contiguous() && token_ids.device() == logits.device(),
                  "sample_tokens: token_ids_B_K must be int64 (B, K), contiguous, on the device of logits_B_V");
  const int64_t K = token_ids.size(1);
  a.token_ids_B_K = static_cast<int64_t*>(token_ids.data_ptr());
  a.horizon = checked_int("K", K);
  a.logprobs_B_K = call.next<float>("logprobs_B_K", ScalarType::Float, B * K, logits);
  a.sampling_logprobs_B_K = call.next<float>("sampling_logprobs_B_K", ScalarType::Float, B * K, logits);
  a.lengths_B = call.next<int64_t>("lengths_B", ScalarType::Long, B, logits);
  a.finished_B = call.next<bool>("finished_B", ScalarType::Bool, B, logits);
  a.stopped_by_eos_B = call.next<bool>("stopped_by_eos_B", ScalarType::Bool, B, logits);
  a.next_ids_B = call.next<int64_t>("next_ids_B", ScalarType::Long, B, logits);
  a.active = call.next<int64_t>("active", ScalarType::Long, 1, logits);
  a.invalid_B = call.next<bool>("invalid_B", ScalarType::Bool, B, logits);
  a.sampling_temperature_B = call.next<double>("sampling_temperature_B", ScalarType::Double, B, logits);
  a.top_k_B = call.next<int64_t>("top_k_B", ScalarType::Long, B, logits);
  a.top_p_B = call.next<double>("top_p_B", ScalarType::Double, B, logits);
  a.min_p_B = call.next<double>("min_p_B", ScalarType::Double, B, logits);
  a.seed_B = call.next<int64_t>("seed_B", ScalarType::Long, B, logits);
  a.request_ids_B = call.next<int64_t>("request_ids_B", ScalarType::Long, B, logits);
  const Tensor eos_ids = call.next<Tensor>();
  STD_TORCH_CHECK(eos_ids.scalar_type() == ScalarType::Long && eos_ids.is_contiguous() && eos_ids.device() == logits.device(),
                  "sample_tokens: eos_ids_E must be int64, contiguous, on the device of logits_B_V");
  a.eos_ids_E = static_cast<const int64_t*>(eos_ids.data_ptr());
  a.num_eos_ids = checked_int("E", eos_ids.numel());
  a.pad_id = call.next<int64_t>();
  if (B > 0) run(a, logits);
}

#if defined(ESR_SAMPLER_CPU)
void sample_tokens_cpu(StableIValue* stack, uint64_t count, uint64_t) {
  call(stack, count, [](const esr::SamplerArguments& arguments, const Tensor&) {
    torch::stable::parallel_for(0, arguments.batch_size, 1, [&](int64_t first, int64_t last) {
      esr::sample_rows_on_cpu(arguments, first, last);
    });
  });
}
#endif

#if defined(ESR_SAMPLER_CUDA)
void sample_tokens_cuda(StableIValue* stack, uint64_t count, uint64_t) {
  call(stack, count, [](const esr::SamplerArguments& arguments, const Tensor& logits) {
    const int32_t device = logits.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                    "sample_tokens: torch gave no stream for device ", device);
    const int error = esr::launch_sample_tokens(arguments, stream);
    STD_TORCH_CHECK(error == 0, "sample_tokens: the kernel could not be launched: ", esr::describe_cuda_error(error));
  });
}
#endif

}  // namespace

#if defined(ESR_SAMPLER_CPU)
STABLE_TORCH_LIBRARY_FRAGMENT(esr_kernels, library) {
  library.def(
      "sample_tokens(Tensor logits_B_V, Tensor(a!) token_ids_B_K, Tensor(b!) logprobs_B_K, "
      "Tensor(c!) sampling_logprobs_B_K, Tensor(d!) lengths_B, Tensor(e!) finished_B, Tensor(f!) stopped_by_eos_B, "
      "Tensor(g!) next_ids_B, Tensor(h!) active, Tensor(i!) invalid_B, Tensor sampling_temperature_B, Tensor top_k_B, "
      "Tensor top_p_B, Tensor min_p_B, Tensor seed_B, Tensor request_ids_B, Tensor eos_ids_E, int pad_id) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(esr_kernels, CPU, library) { library.impl("sample_tokens", &sample_tokens_cpu); }
#endif

#if defined(ESR_SAMPLER_CUDA)
STABLE_TORCH_LIBRARY_IMPL(esr_kernels, CUDA, library) { library.impl("sample_tokens", &sample_tokens_cuda); }
#endif
