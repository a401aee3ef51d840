// Runs a kernel over a grid, block after block, on the thread that calls.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>

#include "shared_memory.h"

namespace contrastile::host {

// As the linker knows it, without its arguments; "kernel" where the program does not export it.
inline std::string kernel_name(const void* kernel) {
  Dl_info found{};
  if (!dladdr(kernel, &found) || !found.dli_sname || found.dli_saddr != kernel) return "kernel";
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> plain(abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, &status),
                                                     std::free);
  std::string name = status == 0 ? plain.get() : found.dli_sname;
  name = name.substr(0, name.find('('));
  return name.starts_with("void ") ? name.substr(5) : name;
}

inline void require_launchable(const std::string& kernel, dim3 grid, dim3 shape, std::size_t shared_bytes) {
  const auto refuse = [&](const std::string& why) { throw KernelFailure(kernel + " cannot be launched: " + why); };
  const std::uint64_t threads = std::uint64_t{shape.x} * shape.y * shape.z;
  if (threads == 0 || threads > 1024 || threads % lanes_per_warp != 0)
    refuse("a block of " + std::to_string(threads) + " threads; whole warps, 1024 threads at most");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    refuse("a grid of " + Block::text({grid.x, grid.y, grid.z}));
  if (shared_bytes > shared_limit(settings.target))
    refuse(std::to_string(shared_bytes) + " bytes of shared memory; " + name_of(settings.target) + " has " +
           std::to_string(shared_limit(settings.target)));
}

inline std::vector<std::uint64_t> block_order(std::uint64_t count) {
  std::vector<std::uint64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (settings.blocks == Order::reversed) std::reverse(order.begin(), order.end());
  if (settings.blocks == Order::random) std::shuffle(order.begin(), order.end(), std::mt19937_64(settings.seed));
  return order;
}

inline Report last_report;   // of the launch that ended last
inline Report total_report;  // of all launches since this was set anew

// Throws KernelFailure, a runtime_error that names the kernel, the block and the thread.
template <typename... Parameters, typename... Arguments>
Report launch_named(const std::string& name, void (*kernel)(Parameters...), dim3 grid, dim3 shape,
                    std::size_t shared_bytes, Arguments&&... arguments) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  require_launchable(name, grid, shape, shared_bytes);
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  const std::function<void()> body = [&] { std::apply(kernel, parameters); };

  gridDim = grid;
  blockDim = shape;
  std::vector<Stack> stacks(shape.x * shape.y * shape.z);
  // No larger than asked for, so that AddressSanitizer sees what lies beyond.
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, shared_bytes) != 0) throw std::bad_alloc();
  const std::unique_ptr<void, void (*)(void*)> shared(memory, std::free);
  Block running(name, shape, shared_bytes, stacks);
  for (const std::uint64_t index : block_order(std::uint64_t{grid.x} * grid.y * grid.z)) {
    blockIdx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                static_cast<unsigned>(index / grid.x / grid.y)};
    std::memset(shared.get(), poison, shared_bytes);
    running.run(blockIdx, static_cast<char*>(shared.get()), body);
  }
  last_report = running.report;
  total_report += running.report;
  return running.report;
}

// launch(kernel, grid, block, shared_bytes, arguments...) finds the name of an exported kernel itself.
template <typename... Parameters, typename... Arguments>
Report launch(void (*kernel)(Parameters...), dim3 grid, dim3 shape, std::size_t shared_bytes,
              Arguments&&... arguments) {
  return launch_named(kernel_name(reinterpret_cast<const void*>(kernel)), kernel, grid, shape, shared_bytes,
                      std::forward<Arguments>(arguments)...);
}

// launch<kernel>(name, grid, block, shared_bytes, stream, arguments...), for callers that also launch on a device;
// the launch is over when this returns, whatever the stream.
template <auto Kernel, typename... Arguments>
Report launch(const char* name, dim3 grid, dim3 shape, std::size_t shared_bytes, void* /*stream*/,
              Arguments&&... arguments) {
  return launch_named(name, Kernel, grid, shape, shared_bytes, std::forward<Arguments>(arguments)...);
}

}  // namespace contrastile::host
