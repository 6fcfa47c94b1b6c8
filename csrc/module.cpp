// The Python module: build facts only. Importing it loads the library, and loading registers the kernels.
#include <pybind11/pybind11.h>

#include <torch/headeronly/version.h>

#ifndef TORCH_EXTENSION_NAME
#define TORCH_EXTENSION_NAME _C
#endif
#define STRINGIFY_(x) #x
#define STRINGIFY(x) STRINGIFY_(x)

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("built_with_torch") = STRINGIFY(TORCH_VERSION_MAJOR) "." STRINGIFY(TORCH_VERSION_MINOR) "." STRINGIFY(TORCH_VERSION_PATCH);
}
