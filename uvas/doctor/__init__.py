"""What ``uvas doctor`` looks at: what this kernel, its limits and its devices can do for uvas.

``check``        one thing that was looked at, as a value
``kernel``       what the kernel does, found by trying
``userfaultfd``  whether memory can move when it is touched
``limits``       what the process may have, read
``devices``      what is advertised, and what answered
``drivers``      the questions to GPU drivers, in a process of their own
``run``          the table, the JSON, the verdict
"""
