#define ADAPTER_NAME "UMF disjoint, fixed memory"
#define UMF_POOL "Disjoint"
#define UMF_PROVIDER "Fixed"
#include "umf.h"
