// Finds two accesses of different threads to the same byte, at least one of them a write and not both atomic, that no barrier
// orders. What counts as order: access_set.h. The first one found ends the program.
//
// Watched is all memory but the stacks of the emulated threads, in code compiled with -fsanitize=thread, whose calls
// race_instrumentation.cpp takes. Without EMULATOR_DETECTS_RACES nothing is watched.
#pragma once

#include <cstddef>

namespace emulator::races {

enum class Kind { read, write, atomic };

#if defined(EMULATOR_DETECTS_RACES)

void begin_launch();   // all that earlier launches did is known
void begin_cluster();  // of emulator::cluster; its shared memory is new
void pass_block_barrier(int rank);
void pass_cluster_barrier();
void pass_warp_barrier(int rank, int first_thread, unsigned mask);
void end_block(int rank);
void access(const volatile void* address, size_t bytes, Kind kind, const void* code);

#else

inline void begin_launch() {}
inline void begin_cluster() {}
inline void pass_block_barrier(int) {}
inline void pass_cluster_barrier() {}
inline void pass_warp_barrier(int, int, unsigned) {}
inline void end_block(int) {}

#endif

}  // namespace emulator::races
