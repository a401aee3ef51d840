// contrastile_cuda_host: the launches of contrastile._C.cuda, run by the host execution layer.
#include "cuda_bindings.h"
#include "exports.h"

namespace py = pybind11;
using namespace contrastile;

PYBIND11_MODULE(contrastile_cuda_host, module) {
  cuda::bind(module);
  module.def("configure", [](int target, int blocks, bool random_threads, unsigned long long seed) {
    contrastile_host_configure(target, blocks, random_threads, seed);
  });
  // Of the last launch.
  module.def("bank_conflicts", [] {
    const host::Report& report = host::last_report;
    return report.loads.conflicts + report.stores.conflicts + report.matrix_loads.conflicts;
  });
  module.def("copies_never_waited_for", [] { return host::last_report.copies_never_waited_for; });
  module.def("unwritten_bytes_read", [] { return host::last_report.unwritten_bytes_read; });
}
