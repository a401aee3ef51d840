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
  module.def("reset_totals", [] { host::total_report = {}; });
  module.def("totals", [] {
    const host::Report& total = host::total_report;
    const auto conflicts = total.loads.conflicts + total.stores.conflicts + total.matrix_loads.conflicts;
    return py::dict(py::arg("bank_conflicts") = conflicts,
                    py::arg("copies_never_waited_for") = total.copies_never_waited_for,
                    py::arg("unwritten_bytes_read") = total.unwritten_bytes_read);
  });
}
