"""CUDA GPUs as devices: by shared page tables, by registered memory, or by the driver's own mappings."""
