// The scan's kernels that the cases of scan_driver.cpp run, and no others: under ThreadSanitizer all of them take minutes to
// compile.
#include "cuda/backward_kernels.h"
#include "cuda/forward_kernels.h"

namespace hope::cuda {
namespace {

template <class Traits>
constexpr bool kSmall = Traits::kDim == 32;
template <class Traits>
constexpr bool kFull = Traits::kDim == 64 && Traits::kHidden == 256 && !Traits::kMomentum && !Traits::kDelta;
template <class Traits>
constexpr bool kTogether = Traits::kCluster && Traits::kHidden == 128 && !Traits::kMomentum;
template <class Traits>
constexpr bool kAmongCases =
    Traits::kType == DType::bfloat16 && (kSmall<Traits> || kFull<Traits> || kTogether<Traits>);

Status no_case() { return {StatusCode::invalid_argument, "this kernel is not among the cases"}; }

template <class Kind>
Status start_case(const ScanProblem& problem, const ForwardResult& result, const Device& device, void* workspace,
                  void* stream) {
  return with_traits<Kind>(problem, [&](auto traits) {
    if constexpr (kAmongCases<decltype(traits)>)
      return start_forward_kernel<decltype(traits)>(problem, result, device, workspace, stream);
    return no_case();
  });
}

template <class Kind, bool kMomentum>
Status start_case(const ScanProblem& problem, const BackwardResult& result, const Device& device, void* workspace,
                  void* stream) {
  return with_types<Kind, kMomentum>(problem, [&](auto traits) {
    if constexpr (kAmongCases<decltype(traits)>)
      return start_backward_kernel<decltype(traits)>(problem, result, device, workspace, stream);
    return no_case();
  });
}

}  // namespace

#define FORWARD_CASES(...)                                                                                            \
  template <>                                                                                                         \
  Status start_forward<ScanKind<__VA_ARGS__>>(const ScanProblem& problem, const ForwardResult& result,                \
                                              const Device& device, void* workspace, void* stream) {                  \
    return start_case<ScanKind<__VA_ARGS__>>(problem, result, device, workspace, stream);                             \
  }
FORWARD_CASES(Form::mlp, Rule::gd, false)
FORWARD_CASES(Form::mlp, Rule::gd, true)
FORWARD_CASES(Form::mlp, Rule::dgd, false)
FORWARD_CASES(Form::mlp, Rule::dgd, true)
FORWARD_CASES(Form::glu, Rule::gd, false)
FORWARD_CASES(Form::glu, Rule::gd, true)
FORWARD_CASES(Form::glu, Rule::dgd, false)
FORWARD_CASES(Form::glu, Rule::dgd, true)

#define BACKWARD_CASES(kMomentum, ...)                                                                                \
  template <>                                                                                                         \
  Status start_backward<BackwardKind<__VA_ARGS__>, kMomentum>(const ScanProblem& problem,                             \
                                                              const BackwardResult& result, const Device& device,     \
                                                              void* workspace, void* stream) {                        \
    return start_case<BackwardKind<__VA_ARGS__>, kMomentum>(problem, result, device, workspace, stream);              \
  }
BACKWARD_CASES(false, Form::mlp)
BACKWARD_CASES(false, Form::mlp, Rule::gd, true)
BACKWARD_CASES(true, Form::mlp)
BACKWARD_CASES(false, Form::mlp, Rule::dgd)
BACKWARD_CASES(false, Form::glu)
BACKWARD_CASES(true, Form::glu)
BACKWARD_CASES(false, Form::glu, Rule::dgd)

}  // namespace hope::cuda
