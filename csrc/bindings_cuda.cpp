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

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels; see fastedit/ops/cuda for what may be passed.";

  m.def("problem", &problem, "Why no kernel can run in this process, or None.");

  m.def("capture_keys", [](Cube gate, Cube up, Line weights, Line active, Address keys, Address mass, int n_edits,
                           int n_templates, int d_ff, int activation, Address stream) {
    const CaptureKeys arguments{rows(gate),      rows(up), vector(weights), vector(active), at<float>(keys),
                                at<float>(mass), n_edits,  n_templates,     d_ff,           activation};
    return capture_keys(arguments, at<void>(stream));
  });

  m.def("select_neurons", [](Line score, int d_ff, int rule, int top_k, double share, Address index, Address status,
                             Address stream) {
    const SelectNeurons arguments{
        vector(score), d_ff, rule, top_k, share, at<std::int64_t>(index), at<std::int64_t>(status)};
    return select_neurons(arguments, at<void>(stream));
  });

  m.def("masked_gram", [](Plane moment, double weight, Plane keys, Plane past, Plane history, Plane out, Line active,
                          Line index, Address count, int n_edits, int n_past, int d_ff, int capacity, bool packed,
                          Address stream) {
    const MaskedGram arguments{matrix(moment), matrix(keys),  matrix(past), matrix(history),
                               matrix(out),    vector(active), vector(index), at<const std::int64_t>(count),
                               weight,         n_edits,        n_past,        d_ff,
                               capacity,       packed};
    return masked_gram(arguments, at<void>(stream));
  });
}
