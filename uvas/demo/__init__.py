"""What ``uvas demo`` runs: the main job on real input, and the harm that it avoids.

``squatters``  threads that map and unmap where uvas wants to reserve
``index``      a pointer-linked index of real text, built by the host and walked by devices
``kernel``     the same index, walked by an OpenCL kernel
``moving``     where the pages of an array are while several parties work on it
``clobber``    the same race with the destructive MAP_FIXED, in a child process
``run``        the acts in order, and what of their claims was verified
"""
