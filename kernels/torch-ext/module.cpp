// For kernel-builder alone: its libraries are also modules that Python imports, which is how it loads them.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
