"""Who holds which addresses: the registry against the kernel's own book.

``kernel``  the kernel's book of a process, as values
``rows``    the lines of a map
``own``     the map of this process: registry and kernel compared
``tags``    the map of another process, by what its tags tell
``draw``    a map for people
``run``     ``uvas maps``
"""
