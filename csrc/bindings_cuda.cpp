// The module fastedit._cuda. Every function takes operands as tuples (address, type, strides in elements), sizes, and a
// stream, enqueues its kernels without waiting, and returns None, or the text of the error.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "cuda.h"

namespace py = pybind11;
using namespace fastedit::cuda;

namespace {

using Address = std::uintptr_t;
using Line = std::tuple<Address, int, std::int64_t>;
using Plane = std::tuple<Address, int, std::int64_t, std::int64_t>;
using Cube = std::tuple<Address, int, std::int64_t, std::int64_t, std::int64_t>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Vector vector(const Line& from) { return {at<void>(std::get<0>(from)), std::get<1>(from), std::get<2>(from)}; }

Matrix matrix(const Plane& from) {
  return {at<void>(std::get<0>(from)), std::get<1>(from), std::get<2>(from), std::get<3>(from)};
}

Rows rows(const Cube& from) {
  return {at<void>(std::get<0>(from)), std::get<1>(from), std::get<2>(from), std::get<3>(from), std::get<4>(from)};
}

// In the order of the fields.
using CaptureTuple = std::tuple<Cube, Cube, Line, Line, Address, Address, int, int, int, int>;
using SelectTuple = std::tuple<Line, int, int, int, double, Address, Address>;
using GramTuple = std::tuple<Plane, Plane, Plane, Plane, Plane, Line, Line, Address, double, int, int, int, int, bool>;

CaptureKeys capture_of(const CaptureTuple& from) {
  const auto& [gate, up, weights, active, keys, mass, n_edits, n_templates, d_ff, activation] = from;
  return {rows(gate),      rows(up), vector(weights), vector(active), at<float>(keys),
          at<float>(mass), n_edits,  n_templates,     d_ff,           activation};
}

SelectNeurons select_of(const SelectTuple& from) {
  const auto& [score, d_ff, rule, top_k, share, index, status] = from;
  return {vector(score), d_ff, rule, top_k, share, at<std::int64_t>(index), at<std::int64_t>(status)};
}

MaskedGram gram_of(const GramTuple& from) {
  const auto& [moment, keys, past, history, out, active, index, count, weight, n_edits, n_past, d_ff, capacity,
               packed] = from;
  return {matrix(moment), matrix(keys), matrix(past), matrix(history), matrix(out), vector(active), vector(index),
          at<const std::int64_t>(count), weight, n_edits, n_past, d_ff, capacity, packed};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels; see fastedit/ops/cuda for what may be passed.";

  m.def("problem", &problem, "Why no kernel can run in this process, or None.");

  m.def("capture_keys", [](const CaptureTuple& capture, Address stream) {
    return capture_keys(capture_of(capture), at<void>(stream));
  });
  m.def("select_neurons", [](const SelectTuple& select, Address stream) {
    return select_neurons(select_of(select), at<void>(stream));
  });
  m.def("masked_gram", [](const GramTuple& gram, Address stream) {
    return masked_gram(gram_of(gram), at<void>(stream));
  });
  m.def("system_chain",
        [](const CaptureTuple& capture, const SelectTuple& select, const GramTuple& gram, Address stream) {
          return system_chain(capture_of(capture), select_of(select), gram_of(gram), at<void>(stream));
        });

  m.def("apply_delta", [](Plane weight, Plane master, Plane residual, Plane solution, Line index, Address ascending,
                          int d_model, int d_ff, int width, int n_edits, Address stream) {
    const ApplyDelta arguments{matrix(weight), matrix(master), matrix(residual), matrix(solution), vector(index),
                               at<int>(ascending), d_model, d_ff, width, n_edits};
    return apply_delta(arguments, at<void>(stream));
  });

  m.def("sparse_adam", [](Plane delta, Plane grad, Plane moment1, Plane moment2, Line decay, Line radius, double lr,
                          double beta1, double beta2, double eps, double bias1, double bias2, int n, int d,
                          Address stream) {
    const SparseAdam arguments{matrix(delta), matrix(grad), matrix(moment1), matrix(moment2), vector(decay),
                               vector(radius), lr, beta1, beta2, eps, bias1, bias2, n, d};
    return sparse_adam(arguments, at<void>(stream));
  });
}
