// What a shared library of kernels offers to Python: settings, and calls that return failures as text. build.py has
// the other side.
#pragma once

#include <cstdio>
#include <exception>

#include "launch.h"

namespace contrastile::host {

// Runs body(); gives the report of its last launch, or what failed in `message`.
template <typename Body>
bool guarded(Body body, Report* report, char* message, std::size_t message_bytes) {
  try {
    last_report = {};
    body();
    *report = last_report;
    return true;
  } catch (const std::exception& failure) {
    std::snprintf(message, message_bytes, "%s", failure.what());
    return false;
  }
}

}  // namespace contrastile::host

extern "C" inline __attribute__((used, visibility("default"))) void contrastile_host_configure(
    int target, int blocks, int random_threads, unsigned long long seed) {
  contrastile::host::settings = {static_cast<contrastile::host::Target>(target),
                                 static_cast<contrastile::host::Order>(blocks), random_threads != 0, seed};
}
