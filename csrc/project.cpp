// project.cpp: project on the host, on one thread
//
// work     draws x points products and sums. One draw of two points takes less than the call from Python
// equal    project.h
#include "projector.h"

namespace zo {

void project(const Projection& projection) {
  const Projector all(projection);
  all.average(0, 1);
  all.finish(0, 1, all.rows(0, 1));
}

}  // namespace zo
