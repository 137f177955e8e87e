/* `#include <kvmmu/kvmmu.h>` with kvmmu.get_include() among the include directories. */
#include "kvmmu/include/kvmmu/kvmmu.h"
