// Export of the tables of windows on the GPU (csrc/pager/window.h). One launch to the caller's current stream; nothing
// is allocated.
#include "common/tensor_check.h"
#include "pager/device_window.h"
#include "pager/window_arguments.h"

namespace flashcore {
namespace {

tvm::ffi::Function make_window(WindowOptions options) {
  return make_window_function(
      options, [](const WindowParams& p, const WindowInput& in, const WindowFields& out, const TensorView& table) {
        check_device("table", table, table);
        launch_window(p, in, out, multiprocessors(table), current_stream(table));
      });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_window, make_window);
}  // namespace flashcore
