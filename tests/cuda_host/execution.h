// The names of csrc/cuda/device.h on a host, and contrastile::host::launch. Included by device.h.
#pragma once

#include "words.h"

#include "async_copy.h"
#include "barriers.h"
#include "launch.h"
#include "matrix.h"
#include "numbers.h"
#include "shared_memory.h"
#include "warp.h"
