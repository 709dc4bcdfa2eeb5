#define ADAPTER_NAME "UMF disjoint, OS memory"
#define UMF_POOL "Disjoint"
#define UMF_PROVIDER "Os"
#include "umf.h"
