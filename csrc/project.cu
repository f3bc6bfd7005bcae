// project.cu: project on a GPU, one warp
//
// math     project.h
// traffic  8 B for every loss and weight, 20 B a draw: a launch, and nothing beside it
// launch   one block of 32 threads. A lane has the draws lane, lane + 32, ...; a usual step has 1 to 64 and 2
//          to 130 points. Sums are in order, so no two lanes share a draw
// equal    bit for bit to zokern/backends/reference.py. Every product, sum and quotient is written as rounded
//          once: tests/kernels_cuda/test_project_cuda.py finds no other fused one in the PTX
// source   project.h
#include <cuda_runtime.h>

#include "device.h"
#include "projector.h"

namespace zo {
namespace projects {  // named, so that the kernel has the same symbol in every build

constexpr int kLanes = 32;

__global__ void __launch_bounds__(kLanes) project_kernel(const Projection projection) {
  __shared__ uint32_t seen[kLanes];
  const int64_t lane = threadIdx.x;
  const Projector all(projection);
  all.average(lane, kLanes);
  __syncwarp();
  seen[lane] = all.rows(lane, kLanes);
  __syncwarp();
  uint32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= seen[i];
  all.finish(lane, kLanes, any);
}

}  // namespace projects

void project(const Projection& projection) {
  ZO_LAUNCH(projects::project_kernel, 1, projects::kLanes, reinterpret_cast<cudaStream_t>(projection.stream),
            projection);
  device::check(cudaGetLastError(), "project");
}

}  // namespace zo
