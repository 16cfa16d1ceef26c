// Ends the program with a message about what the kernel did wrong.
#pragma once

namespace emulator {

constexpr int EXIT_SYNCHRONISATION = 3;  // a barrier or a warp operation that CUDA leaves undefined, or a deadlock
constexpr int EXIT_RACE = 4;

[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(int exit_status, const char* format, ...);

// The file's name without its folder.
const char* name_of_file(const char* path);

}  // namespace emulator
