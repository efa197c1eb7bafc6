// Export of the tables of windows on the GPU (csrc/pager/window.h). One launch to the caller's current stream; nothing
// is allocated.
#include "common/tensor_check.h"
#include "pager/device_window.h"
#include "pager/window_arguments.h"

namespace flashcore {
namespace {

tvm::ffi::Array<tvm::ffi::Function> make_window(WindowOptions options) {
  return make_window_functions(
      options, {[](const WindowParams& p, const WindowInput& in, const WindowFields& out, const TensorView& like) {
                  check_device("fields", like, like);
                  launch_window(p, in, out, multiprocessors(like), current_stream(like));
                },
                [](const WindowFields& fields, const WindowMask& mask, const TensorView& like) {
                  check_device("fields", like, like);
                  launch_cut_mask(fields, mask, multiprocessors(like), current_stream(like));
                }});
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_window, make_window);
}  // namespace flashcore
