"""Memory that forgets: the process, its allocator, its stacks and its free blocks."""
