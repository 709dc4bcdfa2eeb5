#define ADAPTER_NAME "UMF scalable, fixed memory"
#define UMF_POOL "Scalable"
#define UMF_PROVIDER "Fixed"
#include "umf.h"
