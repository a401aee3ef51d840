#include "team.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace contrastile::cpu {

#if defined(__unix__) || defined(__APPLE__)

static const pid_t loaded_by = getpid();

bool is_forked() { return getpid() != loaded_by; }

#else

bool is_forked() { return false; }

#endif

}  // namespace contrastile::cpu
