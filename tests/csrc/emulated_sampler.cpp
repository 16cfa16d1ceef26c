// Runs the sampler of csrc/sampler on the emulated device, or its CPU half.
//
//   emulated_sampler CASES RESULTS
//
// Both files are sequences without padding, in the byte order of the machine. CASES: int64, the number of launches; then for
// each launch the int64s of LaunchHeader, the logits from the first one of the first row to the last one of the last row
// (rows are row_stride elements apart), and the arrays in the order of `read_arrays`. RESULTS: for each launch int64, the
// cudaError_t of the last call, then the arrays in the order of `write_arrays`.
//
// Every array is a heap block of its own of exactly its size, so AddressSanitizer sees what is read or written outside.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "emulator/settings.h"
#include "sampler.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#endif

namespace {

struct LaunchHeader {
  int64_t half;  // 0: the CUDA half, 1: the CPU half
  int64_t dtype, batch_size, vocab_size, horizon, row_stride;
  int64_t first_row_offset;  // in bytes from an address that 16 divides
  int64_t num_eos_ids, pad_id;
  int64_t blocks_per_row, threads_per_block, row_in_shared_memory;
  int64_t compute_capability_major, num_multiprocessors, shared_bytes_per_block;
  int64_t order, order_seed;
  int64_t num_calls;  // of the sampler, one after the other on the same state and logits
};

[[noreturn]] void refuse(const char* what, const char* name) {
  std::fprintf(stderr, "emulated_sampler: %s %s\n", what, name);
  std::exit(2);
}

class File {
 public:
  File(const char* name, const char* mode) : name_(name), file_(std::fopen(name, mode)) {
    if (file_ == nullptr) refuse("cannot open", name);
  }
  ~File() { std::fclose(file_); }
  void read(void* to, size_t bytes) {
    if (std::fread(to, 1, bytes, file_) != bytes) refuse("unexpected end of", name_);
  }
  void write(const void* from, size_t bytes) {
    if (std::fwrite(from, 1, bytes, file_) != bytes) refuse("cannot write", name_);
  }

 private:
  const char* name_;
  std::FILE* file_;
};

class HeapBlock {
 public:
  explicit HeapBlock(size_t bytes) : bytes_(bytes) {
    if (posix_memalign(&data_, 16, bytes) != 0) refuse("no memory for", "an array");
  }
  HeapBlock(const HeapBlock&) = delete;
  ~HeapBlock() { std::free(data_); }
  char* data() const { return static_cast<char*>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

class Launch {
 public:
  explicit Launch(File& cases) {
    cases.read(&header_, sizeof header_);
    a_.dtype = static_cast<esr::LogitDtype>(header_.dtype);
    a_.batch_size = static_cast<int>(header_.batch_size);
    a_.vocab_size = static_cast<int>(header_.vocab_size);
    a_.horizon = static_cast<int>(header_.horizon);
    a_.row_stride = header_.row_stride;
    a_.num_eos_ids = static_cast<int>(header_.num_eos_ids);
    a_.pad_id = header_.pad_id;
    read_logits(cases);
    read_arrays(cases);
  }

  void run() {
    emulator::settings.order = static_cast<emulator::Order>(header_.order);
    emulator::settings.seed = static_cast<uint64_t>(header_.order_seed);
    emulator::settings.compute_capability_major = static_cast<int>(header_.compute_capability_major);
    emulator::settings.num_multiprocessors = static_cast<int>(header_.num_multiprocessors);
    emulator::settings.shared_bytes_per_block = static_cast<int>(header_.shared_bytes_per_block);
    const esr::LaunchPlan plan{static_cast<int>(header_.blocks_per_row), static_cast<int>(header_.threads_per_block),
                               static_cast<int>(header_.row_in_shared_memory)};
    for (int64_t call = 0; call < header_.num_calls && error_ == 0; ++call) {
      if (header_.half == 0) {
        error_ = esr::launch_sample_tokens(a_, nullptr, plan);
      } else {
        esr::sample_rows_on_cpu(a_, 0, a_.batch_size);
      }
    }
  }

  void write_arrays(File& results) const {
    results.write(&error_, sizeof error_);
    for (const HeapBlock* array : changed_) results.write(array->data(), array->bytes());
  }

 private:
  // What lies between the rows is no part of them. Poison has a granularity of 8 bytes, and covers less where it must.
  void read_logits(File& cases) {
    const size_t element = a_.dtype == esr::LogitDtype::float32 ? 4 : 2, offset = static_cast<size_t>(header_.first_row_offset);
    const size_t row = element * static_cast<size_t>(a_.vocab_size), stride = element * static_cast<size_t>(a_.row_stride);
    const size_t num_rows = static_cast<size_t>(a_.batch_size);
    const size_t bytes = num_rows == 0 ? 0 : (num_rows - 1) * stride + row;
    blocks_.push_back(std::make_unique<HeapBlock>(offset + bytes));
    char* first = blocks_.back()->data() + offset;
    cases.read(first, bytes);
    ASAN_POISON_MEMORY_REGION(blocks_.back()->data(), offset);
    for (size_t i = 0; i + 1 < num_rows && stride > row; ++i) ASAN_POISON_MEMORY_REGION(first + i * stride + row, stride - row);
    a_.logits_B_V = first;
  }

  void read_arrays(File& cases) {
    const size_t B = static_cast<size_t>(a_.batch_size), K = static_cast<size_t>(a_.horizon);
    const auto read = [&](auto*& array, size_t length) {
      blocks_.push_back(std::make_unique<HeapBlock>(length * sizeof *array));
      cases.read(blocks_.back()->data(), blocks_.back()->bytes());
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(blocks_.back()->data());
    };
    const auto read_changed = [&](auto*& array, size_t length) {
      read(array, length);
      changed_.push_back(blocks_.back().get());
    };
    read_changed(a_.token_ids_B_K, B * K);
    read_changed(a_.logprobs_B_K, B * K);
    read_changed(a_.sampling_logprobs_B_K, B * K);
    read_changed(a_.lengths_B, B);
    read_changed(a_.finished_B, B);
    read_changed(a_.stopped_by_eos_B, B);
    read_changed(a_.next_ids_B, B);
    read_changed(a_.active, 1);
    read_changed(a_.invalid_B, B);
    read(a_.sampling_temperature_B, B);
    read(a_.top_k_B, B);
    read(a_.top_p_B, B);
    read(a_.min_p_B, B);
    read(a_.seed_B, B);
    read(a_.request_ids_B, B);
    read(a_.eos_ids_E, static_cast<size_t>(a_.num_eos_ids));
  }

  LaunchHeader header_;
  esr::SamplerArguments a_{};
  int64_t error_ = 0;
  std::vector<std::unique_ptr<HeapBlock>> blocks_;
  std::vector<const HeapBlock*> changed_;
};

}  // namespace

int main(int count, char** words) {
  if (count != 3) refuse("usage:", "emulated_sampler CASES RESULTS");
  File cases(words[1], "rb"), results(words[2], "wb");
  int64_t num_launches;
  cases.read(&num_launches, sizeof num_launches);
  for (int64_t i = 0; i < num_launches; ++i) {
    Launch launch(cases);
    launch.run();
    launch.write_arrays(results);
  }
}
