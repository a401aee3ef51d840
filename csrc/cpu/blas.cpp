#include "blas.h"

namespace contrastile::cpu {

Blas& blas() {
  static Blas handed_over;
  return handed_over;
}

}  // namespace contrastile::cpu
