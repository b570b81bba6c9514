// normfused._C: what Python asks about the kernels (plans, versions, limits), not how it runs them: operators do that.
//
// It opens the operator library by its path, so it needs neither torch's nor CUDA's headers, and serves the emulation as well.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "code.h"
#include "interface.h"

namespace py = pybind11;

namespace normfused {
namespace {

template <size_t n> int place_in(const std::array<const char*, n>& names, const std::string& name, const char* what) {
    std::string known;
    for (size_t i = 0; i < n; ++i) {
        if (name == names[i]) return static_cast<int>(i);
        known += (i > 0 ? ", " : "") + std::string(names[i]);
    }
    throw py::value_error(std::string(what) + " must be one of " + known + ", got " + name);
}

constexpr std::array<const char*, 6> steps{"norm_act", "norm_act_backward", "moments", "apply", "grad_moments", "grad_apply"};
constexpr std::array<const char*, 4> types{"float32", "float16", "bfloat16", "float64"};

using Numbers = std::map<std::string, int>;

Limits limits_from(const Numbers& numbers) {
    Limits limits;
    for (const auto& [name, value] : numbers) {
        if (name == "processors") limits.processors = value;
        else if (name == "shared_bytes_per_block") limits.shared_bytes_per_block = value;
        else if (name == "shared_bytes_per_processor") limits.shared_bytes_per_processor = value;
        else if (name == "threads_per_processor") limits.threads_per_processor = value;
        else if (name == "largest_cluster") limits.largest_cluster = value;
        else if (name == "spare_processors") limits.spare_processors = value;
        else throw py::value_error("limits: unknown name " + name);
    }
    return limits;
}

Numbers numbers_from(const Limits& limits) {
    return {{"processors", limits.processors},
            {"shared_bytes_per_block", limits.shared_bytes_per_block},
            {"shared_bytes_per_processor", limits.shared_bytes_per_processor},
            {"threads_per_processor", limits.threads_per_processor},
            {"largest_cluster", limits.largest_cluster},
            {"spare_processors", limits.spare_processors}};
}

struct Question {
    Problem problem;
    Step step = Step::norm_act;
    Needs needs;
    Limits limits;
    bool pool = true;
};

Question question(const std::string& step, int64_t code, const std::string& dtype, const std::array<int64_t, 3>& sizes, int64_t groups,
                  double eps, double momentum, double p0, double p1, int64_t needs, const Numbers& limits, bool pool) {
    if (!is_code(code)) throw py::value_error("code must be packed by pack_code, got " + std::to_string(code));
    Question asked;
    unpack(code, asked.problem);
    asked.problem.type = static_cast<Type>(place_in(types, dtype, "dtype"));
    asked.problem.N = sizes[0];
    asked.problem.C = sizes[1];
    asked.problem.S = sizes[2];
    asked.problem.groups = groups;
    asked.problem.eps = eps;
    asked.problem.momentum = momentum;
    asked.problem.p0 = p0;
    asked.problem.p1 = p1;
    asked.step = static_cast<Step>(place_in(steps, step, "step"));
    asked.needs = {(needs & NeedsCode::dx) != 0, (needs & NeedsCode::dresidual) != 0, (needs & NeedsCode::parameters) != 0};
    asked.limits = limits_from(limits);
    asked.pool = pool;
    return asked;
}

class Library {
   public:
    explicit Library(const std::string& path) {
        // Loaded by torch before, as a rule; never closed, since its operators stay registered
        void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (handle == nullptr) throw std::runtime_error(dlerror());
        auto* entry = reinterpret_cast<decltype(&normfused_interface)>(dlsym(handle, "normfused_interface"));
        if (entry == nullptr) throw std::runtime_error(path + " is not an operator library of normfused");
        interface_ = entry();
        if (interface_->version != interface_version)
            throw std::runtime_error(path + " and normfused._C are of different builds: interface " + std::to_string(interface_->version) +
                                     " and " + std::to_string(interface_version));
    }

    const Interface& operator()() const { return *interface_; }

    Numbers limits(int device) const {
        Limits limits;
        const int status = interface_->limits(device, &limits);
        if (status != ok) throw std::runtime_error("device " + std::to_string(device) + ": " + interface_->error_string(status));
        return numbers_from(limits);
    }

    std::string describe(const Question& q) const {
        std::vector<char> text(4096);
        const int length = interface_->describe(q.problem, q.step, q.needs, q.limits, q.pool, text.data(), static_cast<int>(text.size()));
        return {text.data(), static_cast<size_t>(std::min(std::max(length, 0), static_cast<int>(text.size()) - 1))};
    }

   private:
    const Interface* interface_;
};

}  // namespace
}  // namespace normfused

PYBIND11_MODULE(_C, module) {
    using namespace normfused;
    using namespace pybind11::literals;
    module.doc() = "Plans, limits and versions of the operator library; see csrc/binding/module.cpp";
    py::class_<Question>(module, "Question", "A step of a problem on a device: what a plan is chosen from")
        .def(py::init(&question), "step"_a, "code"_a, "dtype"_a, "sizes"_a, "groups"_a = 1, "eps"_a = 1e-5, "momentum"_a = 0.1,
             "p0"_a = 0.0, "p1"_a = 0.0, "needs"_a = 7, "limits"_a = Numbers{}, "pool"_a = true)
        .def_property_readonly("masked", [](const Question& q) { return q.problem.masked(); })
        .def_property_readonly("limits", [](const Question& q) { return numbers_from(q.limits); });
    py::class_<Library>(module, "Library", "The operator library at a path")
        .def(py::init<const std::string&>(), "path"_a)
        .def_property_readonly("architectures", [](const Library& l) { return l().architectures; })
        .def_property_readonly("runtime_version", [](const Library& l) { return l().runtime_version(); })
        .def_property_readonly("driver_version", [](const Library& l) { return l().driver_version(); })
        .def(
            "error_string", [](const Library& l, int status) { return l().error_string(status); }, "status"_a)
        .def("limits", &Library::limits, "device"_a = 0)
        .def("requirements",
             [](const Library& l, const Question& q) {
                 const Requirements needed = l().requirements(q.problem, q.step, q.needs, q.limits, q.pool);
                 return std::pair<size_t, uint32_t>(needed.scratch_bytes, needed.arrivals);
             })
        .def("describe", &Library::describe);
}
