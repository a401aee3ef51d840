// contrastile._C: the C++ backends as seen from Python. Tensors cross as
// addresses, so that no libtorch is linked and one build serves every torch;
// python/contrastile/backends/cpu.py, cpu_rows.py and cpu_prefixes.py, which call
// the sweeps and row passes, check shapes and keep the tensors alive during a call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef CONTRASTILE_HAS_CUDA
#include "cuda_bindings.h"
#endif
#include "cpu/isa.h"
#include "cpu/prefix_sweep.h"
#include "cpu/row_pass.h"
#include "cpu/sweeps.h"
#include "cpu/team.h"
#include "cpu/workspace.h"

namespace py = pybind11;
using namespace contrastile::cpu;

namespace {

using Address = std::optional<std::uintptr_t>;

template <class T>
T* pointer(Address address) {
  return address ? reinterpret_cast<T*>(*address) : nullptr;
}

ElementType element_type(const std::string& name) {
  if (name == "float16") return ElementType::float16;
  if (name == "bfloat16") return ElementType::bfloat16;
  if (name == "float32") return ElementType::float32;
  if (name == "float64") return ElementType::float64;
  throw std::invalid_argument("element type " + name + ": expected float16, bfloat16, float32 or float64");
}

WeightFunction weight_function(const std::string& name) {
  if (name == "exponential") return WeightFunction::exponential;
  if (name == "capped") return WeightFunction::capped;
  if (name == "sigmoid") return WeightFunction::sigmoid;
  throw std::invalid_argument("weight function " + name + ": expected exponential, capped or sigmoid");
}

template <class Real>
void bind_sweeps(py::module_& module, const char* suffix) {
  const auto named = [&](const char* name) { return std::string(name) + suffix; };

  py::class_<PairProblem<Real>>(module, named("PairProblem").c_str())
      .def(py::init([](const EmbeddingView& anchors, const EmbeddingView& candidates, Address scale, Address positives,
                       Address row_groups, Address col_groups, Address row_ceiling,
                       std::optional<std::int64_t> self_offset, bool self_similarity) {
             return PairProblem<Real>{anchors,
                                      candidates,
                                      pointer<Real>(scale),
                                      pointer<std::int64_t>(positives),
                                      pointer<std::int64_t>(row_groups),
                                      pointer<std::int64_t>(col_groups),
                                      pointer<Real>(row_ceiling),
                                      self_offset,
                                      self_similarity};
           }),
           py::kw_only(), py::arg("anchors"), py::arg("candidates"), py::arg("scale"), py::arg("positives"),
           py::arg("row_groups"), py::arg("col_groups"), py::arg("row_ceiling"), py::arg("self_offset"),
           py::arg("self_similarity"));

  py::class_<PairStats<Real>>(module, named("PairStats").c_str())
      .def(py::init([](Address row_max, Address row_sum, Address col_max, Address col_sum, Address positive_logit,
                       Address row_rank) {
             return PairStats<Real>{pointer<Real>(row_max),        pointer<Real>(row_sum),
                                    pointer<Real>(col_max),        pointer<Real>(col_sum),
                                    pointer<Real>(positive_logit), pointer<std::int64_t>(row_rank)};
           }),
           py::kw_only(), py::arg("row_max") = py::none(), py::arg("row_sum") = py::none(),
           py::arg("col_max") = py::none(), py::arg("col_sum") = py::none(), py::arg("positive_logit") = py::none(),
           py::arg("row_rank") = py::none());

  py::class_<GivenWeights<Real>>(module, named("GivenWeights").c_str())
      .def(py::init([](Address row_shift, Address row_gain, Address col_shift, Address col_gain, Address positive_coeff,
                       const std::string& function) {
             return GivenWeights<Real>{pointer<Real>(row_shift),      pointer<Real>(row_gain),
                                       pointer<Real>(col_shift),      pointer<Real>(col_gain),
                                       pointer<Real>(positive_coeff), weight_function(function)};
           }),
           py::kw_only(), py::arg("row_shift"), py::arg("row_gain"), py::arg("col_shift"), py::arg("col_gain"),
           py::arg("positive_coeff"), py::arg("function"));

  py::class_<PairGrads<Real>>(module, named("PairGrads").c_str())
      .def(py::init([](Address dx, Address dy, Address row_moment, Address row_mass, Address col_mass, Address row_weight) {
             return PairGrads<Real>{pointer<Real>(dx),       pointer<Real>(dy),       pointer<Real>(row_moment),
                                    pointer<Real>(row_mass), pointer<Real>(col_mass), pointer<Real>(row_weight)};
           }),
           py::kw_only(), py::arg("dx"), py::arg("dy"), py::arg("row_moment"), py::arg("row_mass"),
           py::arg("col_mass"), py::arg("row_weight"));

  py::class_<PrefixProblem<Real>>(module, named("PrefixProblem").c_str())
      .def(py::init([](const EmbeddingView& anchors, const EmbeddingView& candidates, Address scale, Address positives,
                       std::vector<std::int64_t> ends, std::vector<double> gains, bool columns, bool normalize) {
             return PrefixProblem<Real>{anchors,
                                        candidates,
                                        pointer<Real>(scale),
                                        pointer<std::int64_t>(positives),
                                        std::move(ends),
                                        std::move(gains),
                                        columns,
                                        normalize};
           }),
           py::kw_only(), py::arg("anchors"), py::arg("candidates"), py::arg("scale"), py::arg("positives"),
           py::arg("ends"), py::arg("gains"), py::arg("columns"), py::arg("normalize"));

  py::class_<PrefixResults<Real>>(module, named("PrefixResults").c_str())
      .def(py::init([](Address row_max, Address row_sum, Address col_max, Address col_sum, Address positive_logit,
                       Address dx, Address dy, Address row_moment) {
             return PrefixResults<Real>{pointer<Real>(row_max), pointer<Real>(row_sum),        pointer<Real>(col_max),
                                        pointer<Real>(col_sum), pointer<Real>(positive_logit), pointer<Real>(dx),
                                        pointer<Real>(dy),      pointer<Real>(row_moment)};
           }),
           py::kw_only(), py::arg("row_max"), py::arg("row_sum"), py::arg("col_max"), py::arg("col_sum"),
           py::arg("positive_logit"), py::arg("dx"), py::arg("dy"), py::arg("row_moment"));

  const py::call_guard<py::gil_scoped_release> without_gil;
  module.def(named("prefix_softmax").c_str(), &prefix_softmax<Real>, without_gil);
  module.def(
      named("positive_logits").c_str(),
      [](const PairProblem<Real>& problem, Address logits, const Execution& execution) {
        positive_logits(problem, pointer<Real>(logits), execution);
      },
      without_gil);
  module.def(named("pair_stats").c_str(), &pair_stats<Real>, without_gil);
  module.def(named("pair_grad_given").c_str(), &pair_grad_given<Real>, without_gil);
  module.def(
      named("bridge_rows").c_str(),
      [](const std::vector<RowInput>& inputs, Address time, Address gain, Address values, int threads) {
        bridge_rows(inputs, pointer<const Real>(time), pointer<const Real>(gain), pointer<Real>(values), threads);
      },
      without_gil);
  module.def(
      named("dot_product_rows").c_str(),
      [](const std::vector<RowInput>& inputs, bool difference, Address gain, Address values, int threads) {
        dot_product_rows(inputs, difference ? DotProducts::difference : DotProducts::squares,
                         pointer<const Real>(gain), pointer<Real>(values), threads);
      },
      without_gil);
  module.def(named("pair_grad_softmax").c_str(), &pair_grad_softmax<Real>, without_gil);
}

double fma_peak(int threads, double seconds) {
  std::vector<double> rates(threads);
  Team(threads).for_each(threads, [&](std::int64_t member, int) { rates[member] = isa().fma_rate(seconds); });
  double total = 0;
  for (const double rate : rates) total += rate;
  return total;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ and CUDA sweeps over raw pointers; use contrastile.backends.";
#ifdef CONTRASTILE_HAS_CUDA
  py::module_ cuda = module.def_submodule("cuda", "Launches of the CUDA kernels.");
  contrastile::cuda::bind(cuda);
#endif

  py::class_<EmbeddingView>(module, "EmbeddingView")
      .def(py::init([](Address data, std::int64_t rows, std::int64_t depth, std::int64_t row_stride,
                       const std::string& type) {
             return EmbeddingView{pointer<void>(data), rows, depth, row_stride, element_type(type)};
           }),
           py::kw_only(), py::arg("data"), py::arg("rows"), py::arg("depth"), py::arg("row_stride"),
           py::arg("element_type"));

  py::class_<RowInput>(module, "RowInput")
      .def(py::init([](const EmbeddingView& rows, Address gradient) {
             return RowInput{rows, pointer<void>(gradient)};
           }),
           py::kw_only(), py::arg("rows"), py::arg("gradient"));

  py::class_<Execution>(module, "Execution")
      .def(py::init([](int threads, std::int64_t workspace_bytes) { return Execution{threads, workspace_bytes}; }),
           py::kw_only(), py::arg("threads"), py::arg("workspace_bytes"));

  bind_sweeps<float>(module, "_float32");
  bind_sweeps<double>(module, "_float64");

  module.def("release_workspace", &Buffer::release_kept, "Frees the memory that is kept between sweeps.");
  module.def("isa", [] { return isa().name; }, "Instruction set in use.");
  module.def("fma_peak", &fma_peak, py::arg("threads"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
             "Measured float32 fused multiply-add rate on registers, flop/s, "
             "all threads together.");
}
