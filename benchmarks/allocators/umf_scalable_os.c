#define ADAPTER_NAME "UMF scalable, OS memory"
#define UMF_POOL "Scalable"
#define UMF_PROVIDER "Os"
#include "umf.h"
