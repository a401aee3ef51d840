// Launches of the CUDA kernels as Python calls them: contrastile._C.cuda. Tensors cross as addresses. The one caller,
// python/contrastile/backends/cuda_launches.py, keeps them alive until the launch; after it the stream's order does.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

namespace contrastile::cuda {

namespace py = pybind11;
using Address = std::optional<std::uintptr_t>;

template <class T>
T* pointer(Address address) {
  return address ? reinterpret_cast<T*>(*address) : nullptr;
}

inline Stream stream_at(std::uintptr_t address) { return reinterpret_cast<Stream>(address); }

inline ElementType element_type(const std::string& name) {
  if (name == "float16") return ElementType::float16;
  if (name == "bfloat16") return ElementType::bfloat16;
  if (name == "float32") return ElementType::float32;
  throw std::invalid_argument("element type " + name + ": expected float16, bfloat16 or float32");
}

inline Float32Products float32_products(const std::string& name) {
  if (name == "ieee") return Float32Products::exact;
  if (name == "tf32x3") return Float32Products::tf32x3;
  if (name == "tf32") return Float32Products::tf32;
  throw std::invalid_argument("float32 products " + name + ": expected ieee, tf32x3 or tf32");
}

inline WeightFunction weight_function(const std::string& name) {
  if (name == "exponential") return WeightFunction::exponential;
  if (name == "capped") return WeightFunction::capped;
  if (name == "sigmoid") return WeightFunction::sigmoid;
  throw std::invalid_argument("weight function " + name + ": expected exponential, capped or sigmoid");
}

inline void bind_arguments(py::module_& module) {
  using py::arg, py::kw_only;
  py::class_<Pairs>(module, "Pairs")
      .def(py::init([](Address anchors, Address candidates, const std::string& type, const std::string& products,
                       std::int64_t anchor_stride, std::int64_t candidate_stride, int rows, int cols, int depth,
                       Address scale, Address positives, Address row_groups, Address col_groups,
                       Address row_ceiling, std::optional<int> self_offset) {
             return Pairs{pointer<void>(anchors), pointer<void>(candidates), element_type(type),
                          float32_products(products), anchor_stride, candidate_stride, rows, cols, depth,
                          pointer<float>(scale), pointer<std::int64_t>(positives), pointer<std::int64_t>(row_groups),
                          pointer<std::int64_t>(col_groups), pointer<float>(row_ceiling), self_offset.has_value(),
                          self_offset.value_or(0)};
           }),
           kw_only(), arg("anchors"), arg("candidates"), arg("element_type"), arg("float32_products"),
           arg("anchor_stride"), arg("candidate_stride"), arg("rows"), arg("cols"), arg("depth"), arg("scale"),
           arg("positives"), arg("row_groups"), arg("col_groups"), arg("row_ceiling"), arg("self_offset"));
  py::class_<Window>(module, "Window")
      .def(py::init([](int first_row, int first_col, int rows, int cols) {
        return Window{first_row, first_col, rows, cols};
      }));
  py::class_<Sums>(module, "Sums").def(py::init([](Address max, Address sum, Address mass, Address weight) {
    return Sums{pointer<float>(max), pointer<float>(sum), pointer<float>(mass), pointer<float>(weight)};
  }));
  py::class_<Weights>(module, "Weights")
      .def(py::init([](Address row_shift, Address row_gain, Address col_shift, Address col_gain, Address positive_coeff,
                       const std::string& function) {
             return Weights{pointer<float>(row_shift), pointer<float>(row_gain),       pointer<float>(col_shift),
                            pointer<float>(col_gain),  pointer<float>(positive_coeff), weight_function(function)};
           }),
           arg("row_shift"), arg("row_gain"), arg("col_shift"), arg("col_gain"), arg("positive_coeff"),
           arg("function"));
  py::class_<Strip>(module, "Strip").def(py::init([](Address coefficients, bool is_float32, std::int64_t stride,
                                                     Address factor, Address rows) {
    return Strip{pointer<void>(coefficients), is_float32, stride, pointer<float>(factor), pointer<bool>(rows)};
  }));
  py::class_<Gradients>(module, "Gradients").def(py::init([](Address anchors, Address candidates, Address factor) {
    return Gradients{pointer<float>(anchors), pointer<float>(candidates), pointer<float>(factor)};
  }));
}

inline void bind_row_sums(py::module_& module) {
  using py::arg;
  py::class_<RowSums>(module, "RowSums")
      .def(py::init([](Address values, Address other_values, Address row_factors, Address factor, Address embeddings,
                       std::int64_t embedding_stride, const std::string& type, Address gradient, bool rounds,
                       Address moments, int rows, int depth) {
             return RowSums{pointer<float>(values),   pointer<float>(other_values), pointer<float>(row_factors),
                            pointer<float>(factor),   pointer<void>(embeddings),    embedding_stride,
                            element_type(type),       pointer<void>(gradient),      rounds,
                            pointer<float>(moments),  rows,                         depth};
           }),
           py::kw_only(), arg("values"), arg("other_values"), arg("row_factors"), arg("factor"), arg("embeddings"),
           arg("embedding_stride"), arg("element_type"), arg("gradient"), arg("rounds"), arg("moments"), arg("rows"),
           arg("depth"));
}

inline void bind_launches(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> without_gil;
  module.def(
      "statistics",
      [](const Pairs& pairs, const Window& window, const Sums& row_sums, const Sums& col_sums, Address positive_logit,
         Address row_rank, std::uintptr_t stream) {
        launch_statistics(pairs, window, row_sums, col_sums, pointer<float>(positive_logit),
                          pointer<std::int64_t>(row_rank), stream_at(stream));
      },
      without_gil);
  module.def(
      "coefficients",
      [](const Pairs& pairs, const Window& window, const Weights& weights, const Strip& strip, const Sums& row_sums,
         const Sums& col_sums, std::uintptr_t stream) {
        launch_coefficients(pairs, window, weights, strip, row_sums, col_sums, stream_at(stream));
      },
      without_gil);
  module.def(
      "gradient",
      [](const Pairs& pairs, const Window& window, const Weights& weights, const Gradients& gradients,
         const Sums& row_sums, const Sums& col_sums, std::uintptr_t stream) {
        launch_gradient(pairs, window, weights, gradients, row_sums, col_sums, stream_at(stream));
      },
      without_gil);
  module.def(
      "merge",
      [](const Sums& tiles, const Sums& totals, int lines, int length, std::uintptr_t stream) {
        launch_merge(tiles, totals, lines, length, stream_at(stream));
      },
      without_gil);
  module.def(
      "positives",
      [](const Pairs& pairs, Address positive_logit, std::uintptr_t stream) {
        launch_positives(pairs, pointer<float>(positive_logit), stream_at(stream));
      },
      without_gil);
  module.def(
      "finish_rows", [](const RowSums& sums, std::uintptr_t stream) { launch_finish_rows(sums, stream_at(stream)); },
      without_gil);
}

inline void bind(py::module_& module) {
  module.attr("MOST_FUSED_FEATURES") = most_fused_features;
  module.attr("SUMS_TILE") = py::make_tuple(tiles_of_sums().rows, tiles_of_sums().cols);
  module.attr("GRADIENT_TILE") = py::make_tuple(tiles_of_gradient().rows, tiles_of_gradient().cols);
  bind_arguments(module);
  bind_row_sums(module);
  bind_launches(module);
}

}  // namespace contrastile::cuda
